"""A sleeping server gives its accelerator's memory to the trainer, and is the same server when it wakes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from client import generate, random_prompt
from conftest import Launch
from reference import kind_for

from drydock.tiers.device import device_here

CACHE = 8 << 30
"""Bytes of the KV cache: what must come back, at least."""


@pytest.mark.lacks("trtllm", "trtllm-serve keeps its memory: verl has a server under Ray give it back")
@pytest.mark.full("a tiny model on a CPU has no memory to give back")
@pytest.mark.needs(gpus=1)
def test_memory_comes_back_and_so_does_the_server(
    engine: str, launch: Launch, profile: Mapping[str, Any], results: Path, tmp_path: Path, record: Any
) -> None:
    kind, words = kind_for("dense", engine), launch.words
    folder = kind.make(tmp_path, 0)
    config = json.loads((folder / "config.json").read_text())
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    flags = words.sleep_flags(CACHE, numbers * getattr(torch, kind.dtype).itemsize)
    prompt = random_prompt(20, seed=900)
    seen: dict[str, int] = {}

    def free(when: str) -> int:
        """Bytes of the first accelerator that nobody holds; what it was each time is recorded."""
        seen[when] = device_here().free_bytes()
        record("free_bytes", dict(seen))
        return seen[when]

    # Before the server, so that what this process takes of the accelerator is not counted as the server's.
    free("before")
    with launch.server(folder, kind, results / f"{engine}-sleep.log", *flags) as server:

        def answer() -> Any:
            return generate(server, prompt, profile["new_tokens"])

        free("started")
        first = answer()
        free("answered")
        # Its own reading: what an engine takes for that, it keeps. SGLang makes its list of free slots anew, 8 bytes a
        # token of the cache, while its last batch holds the old one.
        words.flush(server)
        awake = free("awake")
        words.sleep(server, forget=False)
        given_back = free("asleep") - awake
        record("given_back_bytes", given_back)
        words.wake(server)
        assert answer() == first

        # A trainer that shares the accelerator sends new weights, before the cache comes back.
        awake = free("awake again")
        words.sleep(server, forget=True)
        asleep = free("asleep again")
        # After both are measured, which tells whether what is missing is taken once or each time.
        assert given_back >= CACHE
        assert asleep - awake >= CACHE
        words.wake(server, "weights")
        server.reload_weights()
        assert asleep - free("with weights") < CACHE, "the cache came back with the weights"
        words.wake(server, "cache")
        assert answer() == first
        assert asleep - free("with all") >= CACHE, "it answers without a cache?"

"""A sleeping server gives its accelerator's memory to the trainer, and is the same server when it wakes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from client import generate, random_prompt
from conftest import Launch
from reference import DENSE

from drydock.server import VLLM, Server

CACHE = 8 << 30
"""Bytes of the KV cache: what must come back, at least."""


def free() -> int:
    """Bytes of the first accelerator that nobody holds."""
    return torch.cuda.mem_get_info(0)[0]


@pytest.mark.full("a tiny model on a CPU has no memory to give back")
@pytest.mark.needs(gpus=1)
def test_memory_comes_back_and_so_does_the_server(
    launch: Launch, profile: Mapping[str, Any], results: Path, tmp_path: Path, record: Any
) -> None:
    folder = DENSE.make(tmp_path, 0)
    flags = ["--dtype", DENSE.dtype, "--enable-sleep-mode", "--kv-cache-memory-bytes", str(CACHE)]
    prompt = random_prompt(20, seed=900)
    # Before the server, so that what this process takes of the accelerator is not counted as the server's.
    free()
    log = results / "vllm-sleep.log"
    with Server(VLLM, folder, [*launch.flags, *flags], log=log, environment=launch.environment) as server:

        def answer() -> Any:
            return generate(server, prompt, profile["new_tokens"])

        def sleeping() -> bool:
            return server.request("/is_sleeping")["is_sleeping"]

        awake, first = free(), answer()
        assert not sleeping()

        # Level 1 keeps the weights in the host's memory.
        server.request("/sleep?level=1", {})
        assert sleeping()
        record("given_back_bytes", free() - awake)
        assert free() - awake >= CACHE
        server.request("/wake_up", {})
        assert not sleeping()
        assert answer() == first

        # Level 2 forgets them: a trainer that shares the accelerator sends new ones, before the cache comes back.
        server.request("/sleep?level=2", {})
        asleep = free()
        assert asleep - awake >= CACHE
        server.request("/wake_up?tags=weights", {})
        server.reload_weights()
        assert asleep - free() < CACHE, "the cache came back with the weights"
        server.request("/wake_up?tags=kv_cache", {})
        assert answer() == first
        assert asleep - free() >= CACHE, "it answers without a cache?"

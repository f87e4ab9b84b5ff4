"""After a weight update the server is the new model, in every token; and after the way back the old one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from client import generate, random_prompt
from conftest import Served
from reference import Reference, compare, scored

from drydock.server import Server


def update(server: Server, weights: Path, folder: Path) -> None:
    """Put other weights into the folder that is served, in one step, and have the server load them."""
    shutil.copyfile(weights, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")
    server.reload_weights()


@pytest.mark.lacks(
    "trtllm",
    "trtllm-serve reads its weights once: verl gives new ones, as IPC handles, to a server under Ray",
)
def test_new_weights_and_back(
    served: Served, reference: Reference, profile: Mapping[str, Any], tmp_path: Path, record: Any
) -> None:
    server, folder, kind = served.server, served.folder, served.kind
    # The longest is cached by the time the weights change.
    prompts = [random_prompt(length, seed=400 + length) for length in (5, max(profile["prompt_lengths"]))]
    old = Path(shutil.copy(folder / "model.safetensors", tmp_path / "old.safetensors"))
    (tmp_path / "new").mkdir()
    new = kind.make(tmp_path / "new", 1)

    before = [generate(server, prompt, profile["new_tokens"])[0] for prompt in prompts]
    try:
        update(server, new / "model.safetensors", folder)
        after = [generate(server, prompt, profile["new_tokens"])[0] for prompt in prompts]
    finally:
        update(server, old, folder)
    back = [generate(server, prompt, profile["new_tokens"])[0] for prompt in prompts]

    agreement = compare(Reference(new, kind), [scored(generation) for generation in after])
    assert agreement.beyond == []
    record("gap", agreement.gap)
    assert compare(reference, [scored(generation) for generation in after]).beyond, (
        "the old weights pass for the new ones, so the comparison proves nothing"
    )
    assert back == before

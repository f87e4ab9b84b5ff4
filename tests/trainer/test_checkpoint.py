"""Training that was saved, ended and resumed in new processes is, to the last bit, training that went on."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from ranks import run_ranks

from tiny_models import make_qwen3

pytestmark = pytest.mark.usefixtures("preloaded")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The model, a checkpoint made half way, and the parameters after training through without a stop."""

    model: Path
    checkpoint: Path
    half: int
    through: dict[str, np.ndarray]
    middle: dict[str, np.ndarray]  # at the checkpoint

    def resumed(self, checkpoint: Path, load: tuple[str, ...] = checkpoints.WHOLE) -> dict[str, np.ndarray]:
        """The parameters after loading and training the second half."""
        run = functools.partial(checkpoints.train, checkpoint=str(checkpoint), load=load)
        return run_ranks(run, 2, str(self.model), self.half, 2 * self.half)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, profile: Mapping[str, Any]) -> Runs:
    model = make_qwen3(tmp_path_factory.mktemp("qwen3"))
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    half = profile["checkpoint_steps"]
    through = run_ranks(checkpoints.train, 2, str(model), 0, 2 * half)
    save = functools.partial(checkpoints.train, save_after=half, checkpoint=str(checkpoint))
    middle = run_ranks(save, 2, str(model), 0, half)
    assert equal(*through), "the ranks should end with the same parameters"
    return Runs(model=model, checkpoint=checkpoint, half=half, through=through[0], middle=middle[0])


def equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_resumed_training_is_bit_equal(runs: Runs) -> None:
    assert not equal(runs.middle, runs.through), "the second half should change something"
    assert equal(runs.resumed(runs.checkpoint), runs.through)


@pytest.mark.parametrize("missing", ["model", "optimizer"])
def test_what_is_not_restored_is_seen(runs: Runs, missing: str) -> None:
    load = tuple(part for part in checkpoints.WHOLE if part != missing)
    assert not equal(runs.resumed(runs.checkpoint, load), runs.through)


@pytest.mark.parametrize("missing", ["rng", "lr_scheduler"])
def test_what_is_lost_from_the_extra_state_is_seen(runs: Runs, missing: str, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(runs.checkpoint, tmp_path / "damaged"))
    for path in damaged.glob("extra_state_*.pt"):
        extra = torch.load(path, weights_only=False)
        assert extra[missing]
        torch.save({**extra, "lr_scheduler": None} if missing == "lr_scheduler" else
                   {name: value for name, value in extra.items() if name != missing}, path)  # fmt: skip
    assert not equal(runs.resumed(damaged), runs.through)


def test_another_rank_s_generators_are_seen(runs: Runs, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(runs.checkpoint, tmp_path / "damaged"))
    first, second = sorted(damaged.glob("extra_state_*.pt"))
    assert first.read_bytes() != second.read_bytes()
    shutil.copy(first, second)
    assert not equal(runs.resumed(damaged), runs.through)

"""The trainer tier: where its modules are, one thread for torch, so that a run repeats, and its ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_models

from ranks import run_ranks, stop_preloaded

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def preloaded() -> Iterator[None]:
    """The process that ranks are forked from has imported what they need, so that no test waits for it."""
    run_ranks(os.getpid, 1, deadline=600.0)
    yield
    stop_preloaded()

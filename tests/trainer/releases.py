"""What verl 0.9.1 has and 0.8.0, in the images with TensorRT-LLM, has not: by name, so that a report says it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import pytest

SINCE_0_9 = ("token-sum", "dro")
"""An aggregation and a policy loss."""


def cases(names: Iterable[str]) -> list[Any]:
    """For a test that has a case for each name: those that 0.8.0 has not are marked."""
    return [
        pytest.param(name, marks=pytest.mark.lacks("trtllm", f"verl 0.8.0 has no {name}"))
        if name in SINCE_0_9
        else name
        for name in names
    ]


def here(names: Iterable[str]) -> tuple[str, ...]:
    """For a test that goes through all names by itself: those that this verl should have."""
    old = version("verl").startswith("0.8.")
    return tuple(name for name in names if not (old and name in SINCE_0_9))

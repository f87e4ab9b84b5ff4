"""Random batches for the property tests, and how they are run: the same examples every time, no database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracle import Array


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an estimator or a loss may be given; arrays are (rows, length)."""

    mask: Array
    group: NDArray[np.int64]
    rewards: Array  # at the last token of each row, or at every token
    values: Array
    old: Array  # log-probabilities
    new: Array
    advantages: Array
    draw: np.random.Generator


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Padding on the right, and holes, as a tool's answers leave them; groups of every size from one on."""
    rows, length = draw(st.integers(2, 8)), draw(st.integers(2, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.zeros((rows, length))
    for row in range(rows):
        mask[row, : random.integers(1, length + 1)] = 1
    if draw(st.booleans()):
        mask *= random.random(mask.shape) < 0.7
    if draw(st.booleans()):
        mask[random.integers(rows)] = 0
    mask[0, :2] = 1  # whitening needs two tokens
    rewards = np.zeros_like(mask)
    kind = draw(st.sampled_from(["outcome", "binary", "equal", "per token"]))
    for row in range(rows):
        own = np.flatnonzero(mask[row])
        if kind == "per token":
            rewards[row, own] = random.normal(size=len(own))
        elif len(own):
            rewards[row, own[-1]] = {
                "outcome": random.normal(0, 3), "binary": float(random.integers(2)), "equal": 1.0,
            }[kind]  # fmt: skip
    old = -random.exponential(1.5, mask.shape)
    return Batch(
        mask=mask, group=random.integers(0, draw(st.integers(1, rows)), rows), rewards=rewards,
        values=random.normal(size=mask.shape), old=old,
        # Far enough apart that the clip ranges, the dual clip's among them, are reached on both sides.
        new=np.minimum(old + random.normal(0, 0.8, mask.shape), -1e-3),
        advantages=random.normal(size=mask.shape), draw=random,
    )  # fmt: skip


def hold(check: Callable[[Batch], None], examples: int) -> None:
    """Run a check on `examples` random batches, the same ones each time.

    Raises:
        AssertionError: the first that fails.
    """

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        # No shrinking: the batches are small as they are, and a planted fault would be shrunk for nothing.
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(batches())
    def run(batch: Batch) -> None:
        check(batch)

    run()


def tensor(array: Array) -> torch.Tensor:
    """A float64 tensor of its own memory."""
    return torch.tensor(array, dtype=torch.float64)


def close(actual: torch.Tensor | float, expected: Array | float, tolerance: float = 1e-6) -> None:
    """Equal within `tolerance`, relative and absolute.

    Raises:
        AssertionError: they are not, or one is not finite.
    """
    found = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
    assert np.isfinite(found).all(), f"not finite: {found}"
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

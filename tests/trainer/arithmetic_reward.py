"""The reward of the arithmetic task, as verl's reward manager calls it; verl loads this file by its path."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """1 for the right digit and nothing after it, else 0.

    Parameters:
        solution_str: the response without special tokens: cut off by the length limit it has a second character.
    """
    if data_source != "drydock/arithmetic":
        raise ValueError(f"no reward is known for {data_source!r}")
    return float(solution_str == ground_truth)

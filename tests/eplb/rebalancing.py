"""What an engine's server with EPLB is asked, and what is recorded of it: the same for each engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from balance import balance
from checks import check_answers
from traffic import complete_all
from trained_moe import problems

from drydock.server import Server

Record = Callable[[str, Any], None]
Profile = Mapping[str, Any]

RANKS = 2
ASKED = problems(256, 31, held_out=True)
PROMPTS = [each.prompt for each in ASKED]


def answers(server: Server) -> list[str]:
    """Sixteen greedy tokens to each of the problems that accuracy and equality are measured with."""
    return complete_all(server, PROMPTS, max_tokens=16)


def check_accuracy(given: Sequence[str], share: float) -> None:
    check_answers([text[:1] for text in given], [each.answer for each in ASKED], share, "accuracy is kept")


def check_equal(given: Sequence[str], plain: Sequence[str], share: float) -> None:
    check_answers(given, plain, share, "answers are those without EPLB")


def record_run(
    record: Record, what: str, before: np.ndarray, after: np.ndarray, gaps: Sequence[float], profile: Profile
) -> None:
    """The load of the ranks under the first and the last map, and how long a reader waited for each token."""
    record(
        "expert_load",
        {
            "unit": "tokens",
            "title": f"{what}, {RANKS} GPUs: balance "
            f"{balance(before).mean():.2f} before, {balance(after).mean():.2f} after",
            "before": before.tolist(),
            "after": after.tolist(),
        },
    )
    record(
        "series",
        {
            "title": f"wait for a token while experts move, {what}",
            "x": list(range(len(gaps))),
            "y": [round(gap, 4) for gap in gaps],
            "x_label": "token",
            "y_label": "seconds",
            "threshold": profile["stall_seconds"],
        },
    )


def record_answers(
    record: Record, given: Sequence[str], plain: tuple[Sequence[str], Sequence[float]],
    gaps: Sequence[float], during: Sequence[float],
) -> None:  # fmt: skip
    """How many answers are those of the server without EPLB, and the longest waits for a token."""
    equal = sum(ours == theirs for ours, theirs in zip(given, plain[0], strict=True)) / len(given)
    record("equal to the server without EPLB", equal)
    longest = {
        "without EPLB": max(plain[1]),
        "with": max(gaps),
        "while experts moved": max(during, default=None),
    }
    record("longest wait for a token, seconds", longest)

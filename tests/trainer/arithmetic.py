"""The task that the trainer tier learns: `a+b=`, answered with the one digit (a+b) mod 10."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

CHANCE = 0.1
"""What a policy earns that knows the form, one digit and the end, and nothing else: one of ten digits is right."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One prompt and the only completion that earns a reward."""

    prompt: str
    answer: str


def problems(operands: int) -> list[Problem]:
    """Every sum of two numbers below `operands`, at most ten: all prompts are four characters long."""
    return [
        Problem(prompt=f"{a}+{b}=", answer=str((a + b) % 10))
        for a in range(operands)
        for b in range(operands)
    ]


def best_constant(known: Sequence[Problem]) -> float:
    """The mean reward of the best answer that does not depend on the sum."""
    return max(Counter(problem.answer for problem in known).values()) / len(known)


def reward(problem: Problem, text: str, finished: bool) -> float:
    """1 for the right digit and nothing after it, else 0.

    Parameters:
        finished: whether the policy ended the text itself, and not the length limit.
    """
    return float(finished and text == problem.answer)

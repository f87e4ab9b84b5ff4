"""Log-probabilities of a served model are those that transformers computes from the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Served
from reference import KINDS, Reference, Scored, compare, kind_for


def test_every_token_prefilled_and_generated(
    reference: Reference, answers: list[Scored], record: Any
) -> None:
    agreement = compare(reference, answers)
    assert agreement.beyond == []
    record("gap", agreement.gap)
    record("near_tie_gap", agreement.near_tie_gap)
    record("near_ties", agreement.near_ties)


def faults() -> Iterator[Any]:
    """Each model with each of its faults; those that only float32 shows are not for who serves 16 bits."""
    unseen = pytest.mark.lacks("trtllm", "only float32 shows it, and it serves 16 bits")
    for name, kind in KINDS.items():
        shown = kind_for(name, "trtllm").faults
        for fault in kind.faults:
            yield pytest.param(name, fault, marks=[] if fault in shown else [unseen])


@pytest.mark.parametrize(("served", "fault"), faults(), indirect=["served"])
def test_a_small_fault_is_seen(
    served: Served, fault: str, reference: Reference, answers: list[Scored], record: Any
) -> None:
    agreement = compare(reference.with_fault(fault), answers)
    record("gap", agreement.gap)
    assert agreement.beyond, f"{fault}: {agreement.gap:.1e} nats and nobody complains"
    assert agreement.gap > 2 * served.kind.bound, "seen, but by a hair"

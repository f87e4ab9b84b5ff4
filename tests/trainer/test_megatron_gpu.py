"""Megatron-core over two GPUs (or NPUs), tensor or expert parallel, is the same model on one: loss and every gradient.

Context parallelism of attention needs Transformer Engine, which the image has not (megatron-core's own attention
refuses it, which is tested); what multi-token prediction adds to it, a shift over the ranks, needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from gpt import LENGTH, ROWS, WORDS, assemble, run_pass
from parallel import Layout
from ranks import RankError, run_ranks
from rolling import join, roll_parts

from drydock.tiers.device import device_here

LAYOUTS = {"TP2": (Layout(tp=2, expert_tp=2), False), "EP2": (Layout(ep=2), True)}
MISPLACED = {"TP2": "layers.1.mlp.linear_fc1", "EP2": "layers.1.mlp.experts.local_experts.2"}

pytestmark = [pytest.mark.full("it runs on accelerators"), pytest.mark.needs(gpus=2)]


def difference(layout: Layout, experts: bool, deadline: float, misplaced: str = "") -> tuple[float, float]:
    """How far two GPUs are from one: relative, of the loss and of the worst gradient, by its largest entry."""
    one_loss, one = assemble(
        run_ranks(run_pass, 1, Layout(), experts, deadline=deadline, device=device_here()), Layout()
    )
    sharded = run_ranks(run_pass, 2, layout, experts, misplaced, deadline=deadline, device=device_here())
    loss, gradients = assemble(sharded, layout)
    assert gradients.keys() == one.keys()
    assert all(np.abs(gradient).max() > 0 for gradient in one.values())
    worst = max(np.abs(gradients[name] - one[name]).max() / np.abs(one[name]).max() for name in one)
    return abs(loss - one_loss) / abs(one_loss), float(worst)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_are_one(profile: Mapping[str, Any], record: Any, name: str) -> None:
    bound, deadline = profile["sharding_bound"], profile["ranks_deadline"]
    loss, gradient = difference(*LAYOUTS[name], deadline)
    record("difference", {"loss": loss, "gradient": gradient})
    assert loss < bound
    assert gradient < bound

    loss, gradient = difference(*LAYOUTS[name], deadline, MISPLACED[name])
    record("difference_with_a_shard_misplaced", {"loss": loss, "gradient": gradient})
    assert loss > bound
    assert gradient > bound


def test_tokens_shift_over_context_parallel_ranks(profile: Mapping[str, Any], record: Any) -> None:
    """Multi-token prediction with context parallelism, which upstream saw hang: here it has a deadline."""
    deadline = profile["ranks_deadline"]
    tokens = np.random.default_rng(0).integers(1, WORDS, (ROWS, 4 * LENGTH))

    def misplaced(times: int, straight: bool = False) -> int:
        parts = run_ranks(roll_parts, 2, tokens, times, straight, deadline=deadline, device=device_here())
        shifted = np.concatenate([tokens[:, times:], np.zeros((ROWS, times), int)], axis=-1)
        return int((join(parts) != shifted).sum())

    assert misplaced(1) == misplaced(3) == 0
    wrong = misplaced(1, straight=True)
    record("tokens misplaced where ranks have their part in one piece", wrong)
    assert wrong


def test_attention_over_context_parallel_ranks_is_refused_and_does_not_hang(
    profile: Mapping[str, Any],
) -> None:
    with pytest.raises(RankError, match="Context parallelism is only supported by"):
        run_ranks(run_pass, 2, Layout(cp=2), False, deadline=profile["ranks_deadline"], device=device_here())

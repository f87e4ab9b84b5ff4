"""Megatron-core over two GPUs, tensor or expert parallel, is the same model on one: loss and every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from gpt import assemble, run_pass
from parallel import Layout
from ranks import run_ranks

LAYOUTS = {"TP2": (Layout(tp=2, expert_tp=2), False), "EP2": (Layout(ep=2), True)}
MISPLACED = {"TP2": "layers.1.mlp.linear_fc1", "EP2": "layers.1.mlp.experts.local_experts.2"}

pytestmark = [pytest.mark.full("it runs on accelerators"), pytest.mark.needs(gpus=2)]


def difference(layout: Layout, experts: bool, deadline: float, misplaced: str = "") -> tuple[float, float]:
    """How far two GPUs are from one: relative, of the loss and of the worst gradient, by its largest entry."""
    one_loss, one = assemble(
        run_ranks(run_pass, 1, Layout(), experts, deadline=deadline, backend="nccl"), Layout()
    )
    sharded = run_ranks(run_pass, 2, layout, experts, misplaced, deadline=deadline, backend="nccl")
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

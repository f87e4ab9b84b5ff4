"""vLLM's exchange of expert weights, its maps and their commit, in four processes over gloo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from checks import (
    Broken,
    Report,
    caught_by,
    check_all_equal,
    check_maps,
    check_untouched,
    check_weights,
    expert_digests,
    joined,
)
from fleet import Fleet
from planners import Plan
from trained_moe import TrainedMoe

Record = Callable[[str, Any], None]
EXPERTS, LAYERS = 12, 3


def random_map(rng: np.random.Generator, slots: int) -> np.ndarray:
    """Every expert at least once, the rest of the slots at random, the same expert twice on a rank included."""
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(0, EXPERTS, slots - EXPERTS)]))
        for _ in range(LAYERS)
    ]
    return np.array(rows)


def check_exchanged(new: np.ndarray, ranks: Sequence[Mapping[str, Any]]) -> None:
    check_weights(new, joined(ranks, "held"), ranks[0]["experts"])


@pytest.mark.parametrize("communicator", ["torch_gloo", "torch_nccl"])
def test_after_the_exchange_weights_match_the_map_and_replicas_are_equal_bit_by_bit(
    communicator: str, fleet: Fleet, profile: Mapping[str, Any]
) -> None:
    """`torch_nccl` means torch's own send and receive, which on a CPU go over gloo."""
    rng = np.random.default_rng(5)
    for slots in [12, 16, 20] * profile["exchanges"]:
        old, new = random_map(rng, slots), random_map(rng, slots)
        check_exchanged(new, fleet.run("exchange", old, new, EXPERTS, communicator))


@pytest.mark.parametrize(
    "fault", ["swaps two experts", "leaves a slot behind", "moves nothing", "sends a row shifted"]
)
def test_a_fault_in_the_exchange_is_caught(fault: str, fleet: Fleet, record: Record) -> None:
    rng = np.random.default_rng(6)
    old, new = random_map(rng, 16), random_map(rng, 16)
    assert len(set(new[0][[0, 3]])) == 2, "the slots that are swapped must hold two experts"
    check_exchanged(new, fleet.run("exchange", old, new, EXPERTS, "torch_gloo"))
    faulty = fleet.run("exchange", old, new, EXPERTS, "torch_gloo", fault)
    caught = caught_by(lambda: check_exchanged(new, faulty))
    record("caught by", caught)
    assert caught == "weights match the map"


def test_a_map_of_another_layer_is_not_taken_for_the_right_one(fleet: Fleet) -> None:
    rng = np.random.default_rng(7)
    old, new = random_map(rng, 16), random_map(rng, 16)
    ranks = fleet.run("exchange", old, new, EXPERTS, "torch_gloo")
    with pytest.raises(Broken, match="weights match the map"):
        check_exchanged(np.roll(new, 1, axis=0), ranks)


def check_one_layer(layer: int, new: np.ndarray, ranks: Sequence[Sequence[Report]]) -> None:
    before, after = ([each[when] for each in ranks] for when in (0, 1))
    for what in ("phy2log", "log2phy", "logcnt"):
        check_all_equal({f"rank {rank}": str(report[what]) for rank, report in enumerate(after)})
    maps = {what: np.array(after[0][what]) for what in ("phy2log", "log2phy", "logcnt")}
    # The maps have as many columns as replicas are in use, so they are compared by what they say.
    check_maps(Plan(**maps))
    check_untouched(before[0]["phy2log"], after[0]["phy2log"], layer)
    check_untouched(joined(before, "digests"), joined(after, "digests"), layer)
    assert after[0]["phy2log"][layer] == new.tolist()
    check_weights(maps["phy2log"], joined(after, "digests"), expert_digests(before))


FAULTS = {
    None: None,
    "writes the neighbour's weights too": "committing one layer leaves the others alone",
    "commits the neighbour's map too": "committing one layer leaves the others alone",
    "commits the map to the neighbour": "counts are the replicas and sum to the slots",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_committing_one_layer_leaves_the_others_alone(
    fault: str | None, fleet: Fleet, moe: TrainedMoe, record: Record
) -> None:
    experts = moe.model.config.num_experts
    rng = np.random.default_rng(8)
    new = rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, 4)]))
    ranks = fleet.run("commit_one_layer", str(moe.folder), 4, 0, new, fault)
    if fault is None:
        check_one_layer(0, new, ranks)
        return
    caught = caught_by(lambda: check_one_layer(0, new, ranks))
    record("caught by", caught)
    assert caught == FAULTS[fault]

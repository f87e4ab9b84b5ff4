"""The balance metric itself: what it reads where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from balance import (
    balance,
    least_possible_maximum,
    moved_between_ranks,
    noisy,
    rank_loads,
    slot_loads_by_rank,
)
from cases import README, README_PHY2LOG


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_all_load_on_one_rank_reads_one_over_ranks_and_an_even_one_reads_one(ranks: int) -> None:
    lopsided = np.zeros((3, ranks))
    lopsided[0, 0] = lopsided[1, -1] = lopsided[2, ranks // 2] = 700
    assert balance(lopsided) == pytest.approx([1 / ranks] * 3)
    assert balance(np.full((3, ranks), 11)) == pytest.approx([1, 1, 1])
    assert balance(np.zeros((2, ranks))) == pytest.approx([1, 1])


def test_it_is_per_layer_and_does_not_let_one_layer_make_up_for_another() -> None:
    crossed = np.array([[10, 0], [0, 10]])
    assert balance(crossed) == pytest.approx([0.5, 0.5])
    assert balance(crossed.sum(0)) == pytest.approx(1.0), "summed over layers it would look even"


def test_replicas_share_the_load_of_their_expert() -> None:
    load = np.array([[90, 10, 20]])
    assert rank_loads(load, np.array([[0, 1, 0, 2]]), 2).tolist() == [[55, 65]]
    assert rank_loads(load, np.array([[0, 0, 1, 2]]), 2).tolist() == [[90, 30]]
    assert slot_loads_by_rank(np.array([[45, 10, 45, 20]]), 2).tolist() == [[55, 65]]


def test_the_published_example_has_the_balance_worked_out_by_hand() -> None:
    loads = rank_loads(README.load, README_PHY2LOG, README.shape.ranks)
    assert loads[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    assert balance(loads)[0] == pytest.approx(129.125 / 156)


@pytest.mark.parametrize(
    ("load", "slots", "ranks", "least"),
    [
        ([6, 2, 2, 2], 4, 2, 6),  # an even split, 6 and 6, is possible and there is nothing to replicate with
        ([9, 1, 1, 1], 4, 2, 9),  # the mean is 6, but 9 cannot be cut
        ([9, 1, 1, 1], 6, 2, 6),  # cut into three it can be anything, and the mean stays
        ([12, 12, 1, 1], 5, 5, 12),  # only one of the two can be cut
        ([0, 0], 4, 2, 0),
    ],
)
def test_no_plan_gets_below_the_lower_bound(load: list[int], slots: int, ranks: int, least: float) -> None:
    assert least_possible_maximum(np.array([load]), slots, ranks) == pytest.approx([least])


def test_the_lower_bound_holds_for_every_map_there_is() -> None:
    """Exhaustively: 2 ranks of 2 slots, 3 experts, every map that places them all."""
    load = np.array([[7, 4, 1]])
    every = np.stack(np.meshgrid(*[range(3)] * 4), -1).reshape(-1, 4)
    maxima = [rank_loads(load, slots[None], 2).max() for slots in every if set(slots.tolist()) == {0, 1, 2}]
    assert min(maxima) == pytest.approx(7)
    assert least_possible_maximum(load, 4, 2)[0] <= min(maxima)


def test_moves_are_counted_across_ranks_and_not_within() -> None:
    old = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    assert moved_between_ranks(old, old, 2) == 0
    assert moved_between_ranks(old, np.array([[1, 0, 3, 2], [0, 1, 2, 3]]), 2) == 0
    assert moved_between_ranks(old, np.array([[0, 1, 2, 3], [0, 2, 1, 3]]), 2) == 2


def test_noise_stays_within_its_share_and_repeats() -> None:
    load = np.full((2, 50), 10_000)
    changed = noisy(load, 0.01, seed=3)
    assert abs(changed - load).max() <= 100
    assert (changed != load).any()
    assert np.array_equal(changed, noisy(load, 0.01, seed=3))

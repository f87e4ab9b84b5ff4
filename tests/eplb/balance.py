"""How evenly the ranks are loaded: the true metric, what no plan can beat, and what a change of plan moves."""

from __future__ import annotations

import numpy as np


def rank_loads(load: np.ndarray, phy2log: np.ndarray, ranks: int) -> np.ndarray:
    """[layers, ranks]: what each rank carries when an expert's load is shared evenly by its replicas.

    Parameters:
        load: [layers, experts].
        phy2log: [layers, slots]; a rank owns slots / ranks consecutive ones.
    """
    load = np.asarray(load, dtype=np.float64)
    layers, experts = load.shape
    row = np.arange(layers)[:, None]
    count = np.zeros((layers, experts))
    np.add.at(count, (row, phy2log), 1)
    share = load / np.maximum(count, 1)
    return share[row, phy2log].reshape(layers, ranks, -1).sum(-1)


def slot_loads_by_rank(slots: np.ndarray, ranks: int) -> np.ndarray:
    """[layers, ranks] from loads that were measured per physical slot, [layers, slots]."""
    return np.asarray(slots, dtype=np.float64).reshape(len(slots), ranks, -1).sum(-1)


def balance(per_rank: np.ndarray) -> np.ndarray:
    """[layers]: mean over ranks divided by the most loaded rank; 1 is even, 1/ranks is all on one.

    A layer without load is even.
    """
    per_rank = np.asarray(per_rank, dtype=np.float64)
    most = per_rank.max(-1)
    return np.where(most > 0, per_rank.mean(-1) / np.where(most > 0, most, 1), 1.0)


def least_possible_maximum(load: np.ndarray, slots: int, ranks: int) -> np.ndarray:
    """[layers]: a load that the busiest rank cannot get below, whatever the plan.

    It carries at least the mean, and at least the largest replica; the largest replica is smallest when no
    expert gets a replica while another's replicas are larger, so it is the smallest value v for which the
    experts can be cut into pieces of at most v with the slots there are.
    """
    load = np.asarray(load, dtype=np.float64)
    bounds = []
    for row in load:
        # The candidates for v are an expert's load over a count of replicas.
        candidates = np.unique(row[:, None] / np.arange(1, slots - len(row) + 2)[None, :])
        pieces = np.array(
            [np.maximum(1, np.ceil(row / v - 1e-9)).sum() if v > 0 else np.inf for v in candidates]
        )
        fits = candidates[pieces <= slots]
        bounds.append(max(row.sum() / ranks, fits.min() if fits.size else 0.0))
    return np.array(bounds)


def moved_between_ranks(old: np.ndarray, new: np.ndarray, ranks: int) -> int:
    """Slots, summed over layers, whose new expert was not on that rank before: each is a copy over the wire."""
    moved = 0
    for old_ranks, new_ranks in zip(
        old.reshape(len(old), ranks, -1), new.reshape(len(new), ranks, -1), strict=True
    ):
        for before, after in zip(old_ranks, new_ranks, strict=True):
            moved += sum(expert not in before for expert in after)
    return moved


def noisy(load: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The load with every expert's up or down by at most `share`, in whole tokens."""
    change = np.random.default_rng(seed).uniform(1 - share, 1 + share, load.shape)
    return np.rint(load * change).astype(load.dtype)

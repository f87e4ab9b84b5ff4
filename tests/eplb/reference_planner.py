"""A planner of ours, from the description of redundant experts in DeepSeek-V3's report and nothing else.

Replicate: each spare slot goes to the expert whose replicas are the most loaded at that moment. Pack: the
heaviest first, each into the lightest bin that still has room, all bins with the same number of places. With
groups: pack the groups onto nodes, then replicate and pack within each node. Slow and plain on purpose: it is
what the engines' planners are compared with, in balance and not in maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from planners import Plan, Shape


class ReferencePlanner:
    name = "reference"
    keeps_slots = False

    def plan(self, load: np.ndarray, shape: Shape, old: np.ndarray | None = None) -> Plan:  # noqa: ARG002
        phy2log = np.array([_layer([int(each) for each in row], shape) for row in load])
        logcnt = np.array([np.bincount(row, minlength=shape.experts) for row in phy2log])
        log2phy = np.full((*logcnt.shape, logcnt.max()), -1)
        for layer, row in enumerate(phy2log):
            for expert in range(shape.experts):
                places = np.flatnonzero(row == expert)
                log2phy[layer, expert, : len(places)] = places
        return Plan(phy2log=phy2log, log2phy=log2phy, logcnt=logcnt)


def _layer(load: Sequence[int], shape: Shape) -> list[int]:
    nodes, groups = (shape.nodes, shape.groups) if shape.hierarchical else (1, 1)
    size = shape.experts // groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(groups)]
    by_group = [Fraction(sum(load[expert] for expert in group)) for group in members]
    slots: list[int] = []
    for node in _pack(by_group, nodes):
        experts = [expert for group in node for expert in members[group]]
        replicas = _replicate({expert: load[expert] for expert in experts}, shape.slots // nodes)
        # Exact fractions: a third of a load three times over is that load, so ties are ties.
        shares = [Fraction(load[expert], replicas.count(expert)) for expert in replicas]
        for rank in _pack(shares, shape.ranks // nodes):
            slots += [replicas[place] for place in rank]
    return slots


def _replicate(load: dict[int, int], slots: int) -> list[int]:
    count = dict.fromkeys(load, 1)
    while sum(count.values()) < slots:
        count[max(count, key=lambda expert: Fraction(load[expert], count[expert]))] += 1
    return [expert for expert in count for _ in range(count[expert])]


def _pack(weights: Sequence[Fraction], bins: int) -> list[list[int]]:
    places = len(weights) // bins
    packed: list[list[int]] = [[] for _ in range(bins)]
    total = [Fraction(0)] * bins
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        lightest = min((each for each in range(bins) if len(packed[each]) < places), key=total.__getitem__)
        packed[lightest].append(item)
        total[lightest] += weights[item]
    return packed

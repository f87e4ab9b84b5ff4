"""Faults planted in a planner, one each, with the check that must catch it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from planners import Plan, Planner, Shape


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a planner, and the plan that the real one made; the arrays are the fault's own to change."""

    real: Planner
    plan: Plan
    load: np.ndarray
    shape: Shape
    old: np.ndarray | None

    @property
    def by_rank(self) -> np.ndarray:
        """The map as [layers, ranks, slots of a rank]."""
        return self.plan.phy2log.reshape(len(self.plan.phy2log), self.shape.ranks, -1)

    def again(self, load: np.ndarray) -> Plan:
        """What the real planner says to another load."""
        return self.real.plan(load, self.shape, self.old)

    def consistent(self, phy2log: np.ndarray) -> Plan:
        """The plan for a map, so that only the map itself is at fault."""
        phy2log = phy2log.reshape(self.plan.phy2log.shape)
        logcnt = np.array([np.bincount(row, minlength=self.shape.experts) for row in phy2log])
        log2phy = np.full((*logcnt.shape, logcnt.max()), -1)
        for layer, row in enumerate(phy2log):
            for expert in range(self.shape.experts):
                places = np.flatnonzero(row == expert)
                log2phy[layer, expert, : len(places)] = places
        return Plan(phy2log=phy2log, log2phy=log2phy, logcnt=logcnt)


Fault = Callable[[Call], Plan]


@dataclass(frozen=True)
class Mutant:
    """A planner with a fault planted."""

    real: Planner
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.real.name} with a fault"

    @property
    def keeps_slots(self) -> bool:
        return self.real.keeps_slots

    def plan(self, load: np.ndarray, shape: Shape, old: np.ndarray | None = None) -> Plan:
        plan = self.real.plan(load, shape, old)
        own = Plan(phy2log=plan.phy2log.copy(), log2phy=plan.log2phy.copy(), logcnt=plan.logcnt.copy())
        return self.fault(Call(real=self.real, plan=own, load=load, shape=shape, old=old))


def _drop_an_expert(call: Call) -> Plan:
    phy2log = call.plan.phy2log
    phy2log[0][phy2log[0] == 0] = call.shape.experts - 1
    return call.consistent(phy2log)


def _id_out_of_range(call: Call) -> Plan:
    call.plan.phy2log[-1, -1] = call.shape.experts
    return call.plan


def _a_slot_missing(call: Call) -> Plan:
    return replace(call.plan, phy2log=call.plan.phy2log[:, :-1])


def _a_count_too_high(call: Call) -> Plan:
    call.plan.logcnt[0, 0] += 1
    return call.plan


def _counts_of_the_neighbour(call: Call) -> Plan:
    """Still sums to the slots."""
    return replace(call.plan, logcnt=np.roll(call.plan.logcnt, 1, axis=1))


def _log2phy_off_by_one(call: Call) -> Plan:
    log2phy = call.plan.log2phy
    log2phy[log2phy >= 0] = (log2phy[log2phy >= 0] + 1) % call.shape.slots
    return call.plan


def _log2phy_padded_with_zero(call: Call) -> Plan:
    call.plan.log2phy[call.plan.log2phy < 0] = 0
    return call.plan


def _log2phy_without_replicas(call: Call) -> Plan:
    """Every replica but the first is out of reach."""
    call.plan.log2phy[:, :, 1:] = -1
    return call.plan


def _a_group_leaves_its_node(call: Call) -> Plan:
    """The last slot of each node changes places with the next node's."""
    phy2log, shape = call.plan.phy2log, call.shape
    last = np.arange(1, shape.nodes + 1) * (shape.slots // shape.nodes) - 1
    phy2log[:, last] = phy2log[:, np.roll(last, 1)]
    return call.consistent(phy2log)


def _ignores_the_load(call: Call) -> Plan:
    return call.again(np.ones_like(call.load))


def _replicates_the_coldest(call: Call) -> Plan:
    return call.again(call.load.max() - call.load)


def _one_map_for_all_layers(call: Call) -> Plan:
    return call.consistent(np.repeat(call.plan.phy2log[:1], len(call.load), axis=0))


def _undercounts_some_experts(call: Call) -> Plan:
    load = call.load.copy()
    load[:, ::2] //= 2
    return call.again(load)


def _moves_without_cause(call: Call) -> Plan:
    """As good a map, on other ranks of the same nodes, whenever one is in place."""
    if call.old is None:
        return call.plan
    by_node = call.by_rank.reshape(len(call.load), call.shape.nodes, call.shape.ranks // call.shape.nodes, -1)
    return call.consistent(np.roll(by_node, 1, axis=2))


def _shuffles_slots(call: Call) -> Plan:
    """The right experts on each rank, in other slots, unless nothing changes at all."""
    if call.old is None or np.array_equal(call.old, call.plan.phy2log):
        return call.plan
    return call.consistent(np.roll(call.by_rank, 1, axis=2))


def _keeps_a_layer(call: Call) -> Plan:
    """Leaves the first layer as it was, whatever its load is now."""
    if call.old is not None:
        call.plan.phy2log[0] = call.old[0]
    return call.consistent(call.plan.phy2log)


FAULTS: dict[str, tuple[Fault, str]] = {
    "drops an expert": (_drop_an_expert, "every expert is placed"),
    "an id out of range": (_id_out_of_range, "ids in range"),
    "a rank is a slot short": (_a_slot_missing, "every rank has the same number of slots"),
    "a count too high": (_a_count_too_high, "counts are the replicas and sum to the slots"),
    "counts of the neighbour": (_counts_of_the_neighbour, "counts are the replicas and sum to the slots"),
    "log2phy off by one": (_log2phy_off_by_one, "log2phy is the inverse of phy2log"),
    "log2phy padded with 0": (_log2phy_padded_with_zero, "log2phy is the inverse of phy2log"),
    "log2phy without replicas": (_log2phy_without_replicas, "log2phy is the inverse of phy2log"),
    "a group leaves its node": (_a_group_leaves_its_node, "a group stays on one node"),
    "ignores the load": (_ignores_the_load, "balance is that of the independent planner"),
    "replicates the coldest": (_replicates_the_coldest, "balance is that of the independent planner"),
    "one map for all layers": (_one_map_for_all_layers, "balance is that of the independent planner"),
    "undercounts some experts": (_undercounts_some_experts, "balance is that of the independent planner"),
    "moves without cause": (_moves_without_cause, "an identical load moves nothing"),
    "shuffles slots": (_shuffles_slots, "staying experts keep their slots"),
    "keeps a layer as it was": (_keeps_a_layer, "keeping slots changes no rank's experts"),
}
"""What is planted -> how, and the check that must catch it."""

NEED_THE_OLD_MAP = frozenset({"shuffles slots", "keeps a layer as it was"})
"""Faults that only a planner which knows what is in place can have."""


def differs_by_hash_seed(call: Call) -> Plan:
    """Takes the ranks in the order of a set of strings, which differs from process to process."""
    order = [int(name) for name in {str(rank) for rank in range(call.shape.ranks)}]
    return call.consistent(call.by_rank[:, order])


def differs_by_process(call: Call) -> Plan:
    """Breaks ties by chance, seeded by the process."""
    return call.again(call.load + np.random.default_rng(os.getpid()).integers(0, 2, call.load.shape))

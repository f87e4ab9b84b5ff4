"""What every plan, map and weight exchange must fulfil, one function each; the mutants are caught by these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from balance import balance, rank_loads, slot_loads_by_rank
from cases import Case
from planners import Plan, Planner, Shape

SAME = 1e-6
"""Two balances that differ by less are equal: the engines sum in another order."""


class Broken(AssertionError):
    """A check failed; `check` is its name."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"{check}: {detail}")
        self.check = check


def require(condition: object, check: str, detail: str) -> None:
    if not condition:
        raise Broken(check, detail)


def check_plan(plan: Plan, shape: Shape) -> None:
    """The invariants of eplb.md that one plan can show."""
    phy2log = plan.phy2log
    layers = len(phy2log)
    require(
        phy2log.shape == (layers, shape.slots) and shape.slots % shape.ranks == 0,
        "every rank has the same number of slots",
        f"{phy2log.shape[1]} slots, not {shape.slots}, for {shape.ranks} ranks",
    )
    require(
        phy2log.min() >= 0 and phy2log.max() < shape.experts,
        "ids in range",
        f"{phy2log.min()} to {phy2log.max()} of {shape.experts} experts",
    )
    check_maps(plan)
    if shape.hierarchical:
        check_groups(phy2log, shape)


def check_maps(plan: Plan) -> None:
    """phy2log, log2phy and logcnt say the same."""
    layers, slots = plan.phy2log.shape
    for layer in range(layers):
        held = np.bincount(plan.phy2log[layer], minlength=plan.logcnt.shape[1])
        require(
            held.min() >= 1,
            "every expert is placed",
            f"layer {layer}: expert {int(held.argmin())} has no slot",
        )
        require(
            np.array_equal(held, plan.logcnt[layer]) and plan.logcnt[layer].sum() == slots,
            "counts are the replicas and sum to the slots",
            f"layer {layer}: {plan.logcnt[layer].tolist()} for {held.tolist()}",
        )
        for expert, row in enumerate(plan.log2phy[layer]):
            places = np.flatnonzero(plan.phy2log[layer] == expert)
            given = row[: len(places)]
            require(
                sorted(given.tolist()) == places.tolist() and (row[len(places) :] == -1).all(),
                "log2phy is the inverse of phy2log",
                f"layer {layer}, expert {expert}: {row[: len(places) + 2].tolist()} for {places.tolist()}",
            )


def check_groups(phy2log: np.ndarray, shape: Shape) -> None:
    """The hierarchical policy keeps a group's experts, replicas included, on one node."""
    node = np.arange(shape.slots) // (shape.slots // shape.nodes)
    group = phy2log // (shape.experts // shape.groups)
    for layer, row in enumerate(group):
        for each in range(shape.groups):
            nodes = sorted(set(node[row == each].tolist()))
            require(len(nodes) == 1, "a group stays on one node", f"layer {layer}, group {each}: {nodes}")


def check_slots_kept(old: np.ndarray, new: np.ndarray, ranks: int) -> None:
    """An expert that stays on its rank stays in its slot, replica by replica."""
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        pairs = zip(before.reshape(ranks, -1), after.reshape(ranks, -1), strict=True)
        for rank, (was, now) in enumerate(pairs):
            stay = Counter(was.tolist()) & Counter(now.tolist())
            kept = Counter(was[was == now].tolist())
            require(
                stay == kept,
                "staying experts keep their slots",
                f"layer {layer}, rank {rank}: {was.tolist()} became {now.tolist()}",
            )


def check_same_experts_on_ranks(first: np.ndarray, second: np.ndarray, ranks: int) -> None:
    """Two maps place the same experts on each rank, in whatever slots."""
    require(
        np.array_equal(*(np.sort(each.reshape(len(each), ranks, -1), -1) for each in (first, second))),
        "keeping slots changes no rank's experts",
        "the ranks hold other experts than without a map in place",
    )


def check_no_move(old: np.ndarray, new: np.ndarray) -> None:
    """The same load again moves nothing."""
    require(
        np.array_equal(old, new), "an identical load moves nothing", f"{int((old != new).sum())} slots moved"
    )


def check_balance(
    load: np.ndarray, phy2log: np.ndarray, reference: np.ndarray, ranks: int, worse: float
) -> None:
    """In no layer is the plan's balance more than `worse` below that of the reference planner's plan."""
    ours, theirs = (balance(rank_loads(load, each, ranks)) for each in (reference, phy2log))
    gap = ours - theirs
    require(
        (gap <= worse).all(),
        "balance is that of the independent planner",
        f"layer {int(gap.argmax())}: {theirs[gap.argmax()]:.4f} where the independent planner has "
        f"{ours[gap.argmax()]:.4f}",
    )


def check_all_equal(values: Mapping[str, object], check: str = "all ranks compute the same map") -> None:
    """Every rank has the same."""
    require(
        len(set(values.values())) == 1, check, ", ".join(f"{name}: {value}" for name, value in values.items())
    )


def check_weights(
    phy2log: np.ndarray, held: Sequence[Sequence[str]], experts: Sequence[Sequence[str]]
) -> None:
    """Every slot of every rank holds its expert's weights, bit by bit, so replicas are equal too.

    Parameters:
        phy2log: [layers, slots].
        held: [layers][slots], a digest of what the ranks hold, one after the other.
        experts: [layers][experts], a digest of what each expert's weights are.
    """
    for layer, row in enumerate(phy2log):
        wrong = [slot for slot, expert in enumerate(row) if held[layer][slot] != experts[layer][expert]]
        require(
            not wrong,
            "weights match the map",
            f"layer {layer}: slots {wrong} do not hold experts {[int(row[slot]) for slot in wrong]}",
        )


def check_untouched(before: Sequence[object], after: Sequence[object], layer: int) -> None:
    """Of what there is one of for each layer, only that of `layer` differs."""
    changed = [each for each, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
    require(
        changed == [layer],
        "committing one layer leaves the others alone",
        f"layers {changed} changed, not just {layer}",
    )


Report = Mapping[str, Any]
"""What a rank's `worker_extension.Watch` reports."""


def joined(reports: Sequence[Report], what: str) -> list[list[Any]]:
    """[layers][slots of all ranks] of what each rank reports for its own slots."""
    return [
        [each for rank in layer for each in rank] for layer in zip(*(r[what] for r in reports), strict=True)
    ]


def expert_digests(reports: Sequence[Report]) -> list[list[str]]:
    """[layers][experts]: digests of the experts' weights, from reports of ranks that hold every expert."""
    return [
        [held[row.index(expert)] for expert in range(len(counts))]
        for held, row, counts in zip(
            joined(reports, "digests"), reports[0]["phy2log"], reports[0]["logcnt"], strict=True
        )
    ]


def measured_loads(reports: Sequence[Report], period: int) -> np.ndarray:
    """[layers, ranks]: tokens that the ranks' slots processed under the first (0) or last (-1) map that had enough.

    Enough is a twentieth of what the busiest map had: the first requests to a server, or the few after the last
    move, say nothing about balance.
    """
    return slot_loads_by_rank(np.array([slots[period] for _, slots in _periods(reports)]), len(reports))


def _periods(reports: Sequence[Report]) -> list[tuple[np.ndarray, np.ndarray]]:
    """By layer: the maps it had that had enough of a load, [periods, slots], and the load, [periods, slots]."""
    layers = []
    for periods in zip(*(report["periods"] for report in reports), strict=True):
        by_map = np.array([[each["load"] for each in rank] for rank in periods]).sum(0)
        tokens = by_map.sum(-1)
        enough = tokens >= max(1, tokens.max() / 20)
        require(enough.any(), "a load was recorded", "no slot processed a token")
        layers.append((np.array([each["phy2log"] for each in periods[0]])[enough], by_map[enough]))
    return layers


def check_served(
    reports: Sequence[Report], experts: Sequence[Sequence[str]], *, completed: int, slack: int
) -> None:
    """What the ranks of a model that has served traffic must show together.

    Parameters:
        experts: as for `check_weights`.
        completed: rearrangements there must have been at least.
        slack: steps that a rearrangement may be late.
    """
    for what in ("phy2log", "log2phy", "logcnt"):
        check_all_equal({f"rank {report['rank']} {what}": str(report[what]) for report in reports})
    lowest = min(report["lowest_steps_left"] for report in reports)
    require(
        lowest >= -slack,
        "the step counter is alive",
        f"{-lowest} steps past the moment of the next rearrangement, which never came",
    )
    counters = {f"rank {report['rank']}": report["steps_left"] for report in reports}
    check_all_equal(counters, "all ranks share the step counter")
    maps = {what: np.array(reports[0][what]) for what in ("phy2log", "log2phy", "logcnt")}
    check_maps(Plan(**maps))
    check_weights(maps["phy2log"], joined(reports, "digests"), experts)
    require(
        all(report["completed"] >= completed for report in reports),
        "enough rearrangements were completed",
        f"{[report['completed'] for report in reports]}, not {completed}",
    )


def check_better(before: np.ndarray, after: np.ndarray, gain: float) -> None:
    """The true balance, over ranks and averaged over layers, rose by at least `gain`."""
    was, now = (float(balance(each).mean()) for each in (before, after))
    require(
        now >= was + gain, "balance over ranks is better after than before", f"{was:.3f} became {now:.3f}"
    )


def check_planned(ranks: Sequence[Mapping[str, Any]], window: int) -> None:
    """Every plan was made for what the routers chose in the steps of the window before it, summed over the ranks.

    Parameters:
        ranks: of each rank `planned`, `planned_after` and `chosen`, as `ranks.serve` returns them.
    """
    chosen = np.array(ranks[0]["chosen"])
    for number, rank in enumerate(ranks):
        require(
            rank["planned"], "the load is that of the window, over all ranks", f"rank {number} made no plan"
        )
        for last, load in zip(rank["planned_after"], rank["planned"], strict=False):
            wanted = chosen[max(0, last - window) : last].sum(0)
            require(
                np.array_equal(load, wanted),
                "the load is that of the window, over all ranks",
                f"rank {number}, step {last}: {np.sum(load, -1).tolist()} tokens, not {wanted.sum(-1).tolist()}",
            )


def below_the_best(reports: Sequence[Report], planner: Planner) -> list[float]:
    """By layer: how far the balance under the last map with a load is below that of a plan made for this very load."""
    ranks = len(reports)
    experts = len(reports[0]["logcnt"][0])
    below = []
    for maps, loads in _periods(reports):
        row, slots = maps[-1], loads[-1]
        load = np.bincount(row, slots, minlength=experts).astype(np.int64)[None]
        shape = Shape(experts=experts, slots=len(row), groups=1, nodes=1, ranks=ranks)
        best = balance(rank_loads(load, planner.plan(load, shape).phy2log, ranks))
        below.append(float((best - balance(slot_loads_by_rank(slots[None], ranks)))[0]))
    return below


def check_even(reports: Sequence[Report], planner: Planner, most: float) -> None:
    """In no layer is the balance more than `most` below the best."""
    below = below_the_best(reports, planner)
    require(
        max(below) <= most, "balance is what the load allows", f"below the best by {below}, layer by layer"
    )


def check_answers(given: Sequence[object], wanted: Sequence[object], share: float, check: str) -> None:
    """At least `share` of the answers are the wanted ones."""
    right = sum(each == other for each, other in zip(given, wanted, strict=True)) / len(wanted)
    require(right >= share, check, f"{right:.3f} of {len(wanted)}, not {share}")


def check_planner(planner: Planner, cases: Sequence[Case], reference: Planner, tie_tolerance: float) -> None:
    """Everything above that a planner alone can show, over fixed cases."""
    for case in cases:
        load, shape = case.load, case.shape
        plan = planner.plan(load, shape)
        check_plan(plan, shape)
        worse = tie_tolerance if case.tied else SAME
        check_balance(load, plan.phy2log, reference.plan(load, shape).phy2log, shape.ranks, worse)
        check_change(planner, load, np.roll(load, 1, axis=0), shape)


def check_change(planner: Planner, load: np.ndarray, changed: np.ndarray, shape: Shape) -> None:
    """What a planner does with a map that is in place: for the same load, for another, for that one again."""
    old = planner.plan(load, shape)
    check_no_move(old.phy2log, planner.plan(load, shape, old.phy2log).phy2log)
    new = planner.plan(changed, shape, old.phy2log)
    check_plan(new, shape)
    check_no_move(new.phy2log, planner.plan(changed, shape, new.phy2log).phy2log)
    if planner.keeps_slots:
        check_slots_kept(old.phy2log, new.phy2log, shape.ranks)
        check_same_experts_on_ranks(planner.plan(changed, shape).phy2log, new.phy2log, shape.ranks)


def caught_by(check: Callable[[], None]) -> str | None:
    """The name of the check that fails, or None."""
    try:
        check()
    except Broken as broken:
        return broken.check
    return None

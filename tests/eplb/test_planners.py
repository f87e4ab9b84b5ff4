"""The planners of every engine in the image: invariants, balance, churn, time, and the faults they must not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance import balance, least_possible_maximum, moved_between_ranks, noisy, rank_loads
from cases import KINDS, README, README_PHY2LOG, Case, fixed_cases, load_of, planning, random_cases
from checks import (
    SAME,
    Broken,
    caught_by,
    check_all_equal,
    check_balance,
    check_change,
    check_plan,
    check_planner,
)
from conftest import PLANNERS
from hypothesis import HealthCheck, given, settings
from mutants import FAULTS, NEED_THE_OLD_MAP, Mutant
from planners import ENGINES, Planner, Shape, find_planners

Profile = Mapping[str, Any]
Record = Callable[[str, Any], None]

DEEPSEEK_V3 = Shape(experts=256, slots=288, groups=8, nodes=4, ranks=32)


def every_case(profile: Profile, holds: Callable[[Case], None]) -> None:
    """Run a property over drawn cases, the same ones in every run."""
    given(planning())(
        settings(
            derandomize=True, database=None, deadline=None,
            max_examples=profile["examples"], suppress_health_check=list(HealthCheck),
        )(holds)
    )()  # fmt: skip


def test_the_planner_of_every_installed_engine_is_tested(tmp_path: Path, record: Record) -> None:
    record("planners", [planner.name for planner in PLANNERS])
    assert PLANNERS
    with pytest.raises(LookupError, match=r"no engine with an EPLB planner is installed \(vllm or sglang\)"):
        find_planners([str(tmp_path)])
    for engine in ENGINES:
        (tmp_path / engine.name).mkdir()
        (tmp_path / engine.name / "__init__.py").touch()
        with pytest.raises(LookupError, match=f"{engine.name} is installed in .* its planner has moved"):
            find_planners([str(tmp_path)])
        (tmp_path / engine.name / "__init__.py").unlink()
        (tmp_path / engine.name).rmdir()


def test_every_plan_keeps_the_invariants(planner: Planner, profile: Profile) -> None:
    every_case(profile, lambda case: check_plan(planner.plan(case.load, case.shape), case.shape))


def test_a_changed_load_keeps_staying_experts_in_place_and_the_same_one_moves_nothing(
    planner: Planner, profile: Profile
) -> None:
    def holds(case: Case) -> None:
        check_change(planner, case.load, load_of("random", *case.load.shape, seed=1), case.shape)

    every_case(profile, holds)


def test_balance_is_that_of_the_independent_planner(
    planner: Planner, reference: Planner, profile: Profile, record: Record
) -> None:
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for case in random_cases(profile["random_cases"]):
        theirs, ours = (each.plan(case.load, case.shape).phy2log for each in (planner, reference))
        both = (balance(rank_loads(case.load, each, case.shape.ranks)) for each in (ours, theirs))
        gaps[case.tied] += np.subtract(*both).tolist()
        worse = profile["tie_tolerance"] if case.tied else SAME
        check_balance(case.load, theirs, ours, case.shape.ranks, worse)
    record(
        "balance against the independent planner",
        {
            "cases": len(gaps[False]),
            "equal": sum(abs(gap) <= SAME for gap in gaps[False]),
            "cases with ties": len(gaps[True]),
            "equal with ties": sum(abs(gap) <= SAME for gap in gaps[True]),
            "worst with ties": round(max(gaps[True]), 4),
        },
    )
    assert all(gaps.values()), "both kinds of case must have been drawn"


def test_the_busiest_rank_is_within_a_bound_of_the_least_possible(
    planner: Planner, profile: Profile, record: Record
) -> None:
    ratios: dict[str, list[float]] = {}
    for case in random_cases(profile["random_cases"]):
        # With groups bound to nodes the least possible is more than this bound knows of.
        if case.shape.hierarchical and case.shape.nodes > 1:
            continue
        most = rank_loads(case.load, planner.plan(case.load, case.shape).phy2log, case.shape.ranks).max(-1)
        least = least_possible_maximum(case.load, case.shape.slots, case.shape.ranks)
        ratio = float(np.where(least > 0, most / np.where(least > 0, least, 1), 1.0).max())
        assert ratio >= 1 - SAME, "the bound is not one"
        assert ratio <= profile["times_the_least_possible"], f"{case}: {ratio:.3f} times the least possible"
        ratios.setdefault(case.kind, []).append(ratio)
    record(
        "busiest rank, times the least possible",
        {
            kind: {"median": round(float(np.median(found)), 4), "worst": round(max(found), 4)}
            for kind, found in sorted(ratios.items())
        },
    )
    assert len(ratios) == len(KINDS)


def test_the_published_example_has_its_published_balance(planner: Planner) -> None:
    published, ours = (
        balance(rank_loads(README.load, each, README.shape.ranks))
        for each in (README_PHY2LOG, planner.plan(README.load, README.shape).phy2log)
    )
    assert ours == pytest.approx(published)
    assert ours[0] == pytest.approx(129.125 / 156)


def test_the_checks_pass_on_the_planner(planner: Planner, reference: Planner, profile: Profile) -> None:
    """Without this, a mutant below could be caught by a check that nothing passes."""
    check_planner(planner, fixed_cases(), reference, profile["tie_tolerance"])


@pytest.mark.parametrize(
    ("fault", "planner"),
    [
        pytest.param(fault, planner, id=f"{planner.name}-{fault}")
        for planner in PLANNERS
        for fault in FAULTS
        if planner.keeps_slots or fault not in NEED_THE_OLD_MAP
    ],
)
def test_a_fault_in_the_planner_is_caught(
    fault: str, planner: Planner, reference: Planner, profile: Profile, record: Record
) -> None:
    plant, expected = FAULTS[fault]
    mutant = Mutant(planner, plant)
    caught = caught_by(lambda: check_planner(mutant, fixed_cases(), reference, profile["tie_tolerance"]))
    record("caught by", caught)
    assert caught == expected


def test_separate_processes_compute_the_same_maps(profile: Profile, record: Record) -> None:
    """Every rank plans for itself in 0.24: other hash seeds and thread counts must not matter, byte for byte."""
    here = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, here / "plan_in_process.py"],
            env={**os.environ, "PYTHONHASHSEED": str(rank), "OMP_NUM_THREADS": str(1 + rank % 3)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(profile["planning_processes"])
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    digests = [json.loads(output) for output in outputs]
    caught = {}
    for name in digests[0]:
        by_rank = {f"rank {rank}": each[name] for rank, each in enumerate(digests)}
        if name in {planner.name for planner in PLANNERS}:
            check_all_equal(by_rank)
        else:
            with pytest.raises(Broken, match="all ranks compute the same map"):
                check_all_equal(by_rank)
            caught[name] = "all ranks compute the same map"
    assert len(caught) == 2 * len(PLANNERS)
    record("caught by", caught)


@pytest.mark.parametrize("kind", ["random", "zipf"])
def test_noise_in_the_load_costs_no_more_moves_than_its_budget(
    kind: str, planner: Planner, profile: Profile, record: Record
) -> None:
    """Nobody upstream weighs a move's cost against its gain: here it is measured, and may not get worse."""
    load = load_of(kind, 4, DEEPSEEK_V3.experts, seed=7)
    old = planner.plan(load, DEEPSEEK_V3).phy2log
    changed = noisy(load, profile["churn_noise"], seed=8)
    new = planner.plan(changed, DEEPSEEK_V3, old).phy2log
    moved = moved_between_ranks(old, new, DEEPSEEK_V3.ranks)
    before, after = (balance(rank_loads(changed, each, DEEPSEEK_V3.ranks)).mean() for each in (old, new))
    still = moved_between_ranks(old, planner.plan(load, DEEPSEEK_V3, old).phy2log, DEEPSEEK_V3.ranks)
    record(
        "churn",
        {
            "load": kind,
            "noise": profile["churn_noise"],
            "slots": old.size,
            "moved across ranks": moved,
            "moved by an identical load": still,
            "balance if nothing had moved": round(float(before), 5),
            "balance after the move": round(float(after), 5),
        },
    )
    assert still == 0
    assert moved <= profile["churn_share"] * old.size


def test_planning_takes_no_longer_than_its_budget(planner: Planner, profile: Profile, record: Record) -> None:
    load = load_of("zipf", 58, DEEPSEEK_V3.experts, seed=7)
    began = time.perf_counter()
    planner.plan(load, DEEPSEEK_V3)
    seconds = time.perf_counter() - began
    record("planner seconds, 58 layers of 256 experts in 288 slots", round(seconds, 3))
    assert seconds <= profile["planner_seconds"]

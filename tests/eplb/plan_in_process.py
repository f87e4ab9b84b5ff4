"""A program: prints, as JSON, a digest of the maps that every planner here computes in a process of its own."""

from __future__ import annotations

import hashlib
import json

from cases import fixed_cases
from mutants import Mutant, differs_by_hash_seed, differs_by_process
from planners import Planner, find_planners


def digest(planner: Planner) -> str:
    maps = hashlib.sha256()
    for case in fixed_cases():
        plan = planner.plan(case.load, case.shape)
        for each in (plan.phy2log, plan.log2phy, plan.logcnt):
            maps.update(each.tobytes())
    return maps.hexdigest()


if __name__ == "__main__":
    digests = {}
    for planner in find_planners():
        digests[planner.name] = digest(planner)
        for fault in (differs_by_hash_seed, differs_by_process):
            digests[f"{planner.name} {fault.__name__}"] = digest(Mutant(planner, fault))
    print(json.dumps(digests))

"""The time budgets of `tests/budgets.toml`: floors and ceilings in seconds, typed when read.

    [cpu-vllm.fast]
    session = { ceiling = 480 }
    [cpu-vllm.fast.rollout.phases]     # summed over the tier
    start = { floor = 2.0, ceiling = 40.0 }
    [cpu-vllm.fast.rollout.each]       # any one test: ceilings only
    test = { ceiling = 60.0 }
    [cpu-vllm.fast.rollout.tests."test_serving.py::test_x"]
    test = { floor = 1.0, ceiling = 20.0 }

Read in the image too, so: standard library only.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drydock.errors import DrydockError
from drydock.tiers import PHASES


class NoBudget(DrydockError):
    """There is no table for that image, tier and profile."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Seconds that a phase must take at least and may take at most; None: no such limit."""

    floor: float | None = None
    ceiling: float | None = None

    def document(self) -> dict[str, float]:
        """As in TOML and JSON."""
        pairs = (("floor", self.floor), ("ceiling", self.ceiling))
        return {name: seconds for name, seconds in pairs if seconds is not None}


Limits = Mapping[str, Limit]
"""Phase -> its limit."""


@dataclass(frozen=True, kw_only=True)
class TierBudget:
    """One tier's table.

    Parameters:
        phases: for the sum over the tier's tests.
        each: for any one test.
        tests: for one test; its id is relative to the tier's folder, `test_serving.py::test_x`.
    """

    phases: Limits = field(default_factory=dict)
    each: Limits = field(default_factory=dict)
    tests: Mapping[str, Limits] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As in TOML and JSON; `parse_tier` reads it."""
        return {
            "phases": _limits_document(self.phases),
            "each": _limits_document(self.each),
            "tests": {test: _limits_document(limits) for test, limits in self.tests.items()},
        }


@dataclass(frozen=True, kw_only=True)
class ImageBudget:
    """What one image × profile has: the whole session's limit and each tier's table."""

    session: Limit | None = None
    tiers: Mapping[str, TierBudget] = field(default_factory=dict)


def _limits_document(limits: Limits) -> dict[str, dict[str, float]]:
    return {phase: limit.document() for phase, limit in limits.items()}


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DrydockError(f"{where} is not a table")
    return value


def _limit(value: Any, where: str, floors: bool = True) -> Limit:
    table = _table(value, where)
    for key, seconds in table.items():
        if key not in ("floor", "ceiling"):
            raise DrydockError(f"{where}: unknown key {key!r}: there are floor and ceiling")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
            raise DrydockError(f"{where}: {key} = {seconds!r} is not a number of seconds")
        if seconds <= 0:
            raise DrydockError(f"{where}: {key} = {seconds} is not more than 0")
    if not table:
        raise DrydockError(f"{where} has neither floor nor ceiling")
    limit = Limit(**table)
    if limit.floor is not None and not floors:
        raise DrydockError(
            f"{where}: a floor is for the tier's sum or for one test: write only a ceiling here"
        )
    if limit.floor is not None and limit.ceiling is not None and limit.floor > limit.ceiling:
        raise DrydockError(f"{where}: floor {limit.floor} is over ceiling {limit.ceiling}")
    return limit


def _limits(value: Any, where: str, floors: bool = True) -> dict[str, Limit]:
    table = _table(value, where)
    for phase in table:
        if phase not in PHASES:
            raise DrydockError(f"{where}: unknown phase {phase!r}: there are {', '.join(PHASES)}")
    return {phase: _limit(limit, f"{where}.{phase}", floors) for phase, limit in table.items()}


def parse_tier(value: Any, where: str) -> TierBudget:
    """One tier's table from its TOML or JSON.

    Parameters:
        where: what to call it in an error.

    Raises:
        DrydockError: an unknown key or phase, a number that is none, a floor over its ceiling.
    """
    table = _table(value, where)
    for key in table:
        if key not in ("phases", "each", "tests"):
            raise DrydockError(f"{where}: unknown key {key!r}: there are phases, each and tests")
    tests = _table(table.get("tests", {}), f"{where}.tests")
    return TierBudget(
        phases=_limits(table.get("phases", {}), f"{where}.phases"),
        each=_limits(table.get("each", {}), f"{where}.each", floors=False),
        tests={test: _limits(limits, f'{where}.tests."{test}"') for test, limits in tests.items()},
    )


def read_budgets(path: Path) -> dict[tuple[str, str], ImageBudget]:
    """(image, profile) -> its budgets, of a whole budgets file.

    Raises:
        DrydockError: the file cannot be read, or a table in it is wrong; the line names table and key.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise DrydockError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DrydockError(f"{path}: {error}") from error
    budgets = {}
    for image, profiles in document.items():
        for profile, table in _table(profiles, f"{path}: {image}").items():
            where = f"{path}: {image}.{profile}"
            rest = dict(_table(table, where))
            session = rest.pop("session", None)
            budgets[image, profile] = ImageBudget(
                session=None if session is None else _limit(session, f"{where}.session", floors=False),
                tiers={tier: parse_tier(value, f"{where}.{tier}") for tier, value in rest.items()},
            )
    return budgets


def tier_budget(path: Path, image: str, profile: str, tier: str) -> TierBudget:
    """The table to hold a run to.

    Raises:
        NoBudget: there is none; the line says how to make one.
        DrydockError: as `read_budgets`.
    """
    budgets = read_budgets(path) if path.exists() else {}
    found = budgets.get((image, profile), ImageBudget()).tiers.get(tier)
    if found is None:
        raise NoBudget(
            f"{path} has no table [{image}.{profile}.{tier}]: measure with --unbudgeted a few times, "
            "then `drydock budget propose RUN...`"
        )
    return found


def session_ceiling(path: Path, image: str, profile: str, tiers: Iterable[str]) -> float | None:
    """Seconds that a session of these tiers may take; None where only they have limits.

    Raises:
        NoBudget: a tier has none.
        DrydockError: as `read_budgets`.
    """
    for tier in tiers:
        tier_budget(path, image, profile, tier)
    limit = read_budgets(path)[image, profile].session
    return limit.ceiling if limit else None

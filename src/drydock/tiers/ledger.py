"""What a tier's run was, as it is told: tests, phases and records; the verdicts; the result document.

Times are of the monotonic clock, which pytest and the watchdog share.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from drydock.tiers import PHASES
from drydock.tiers.budgets import Limits, TierBudget

DEFAULT_CEILING = 600.0
"""Seconds for one phase of one test, and for any stretch outside of tests, where the table says nothing."""

BAD = ("overrun", "crashed", "failed", "error", "missing", "underrun")
"""What a test may come to beside passing, the gravest first."""
Outcome = Literal[
    "passed", "failed", "error", "overrun", "underrun", "crashed", "missing", "not-run", "running"
]


class Clock:
    """Seconds per phase. The innermost open phase is the one that counts."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[tuple[int, str]] = []
        self._since = 0.0

    @property
    def phase(self) -> str | None:
        """The phase that counts now."""
        return self._open[-1][1] if self._open else None

    def at(self, phase: str, now: float) -> float:
        """Seconds of a phase up to now."""
        return self.seconds[phase] + (max(0.0, now - self._since) if phase == self.phase else 0.0)

    def charge(self, at: float) -> None:
        """Count the time up to then."""
        if self._open:
            self.seconds[self._open[-1][1]] += max(0.0, at - self._since)
        self._since = at

    def begin(self, token: int, name: str, at: float) -> None:
        """A phase opens inside the one that counts."""
        self.charge(at)
        self._open.append((token, name))

    def clear(self, at: float) -> None:
        """Whatever is open is over."""
        self.charge(at)
        self._open.clear()

    def end(self, token: int, at: float) -> None:
        """That phase is over, and what was opened inside it; one that is over already changes nothing."""
        self.charge(at)
        if any(token == other for other, _ in self._open):
            while self._open.pop()[0] != token:
                pass


@dataclass
class Test:
    """One selected test."""

    id: str
    budget: Limits
    outcome: Outcome = "not-run"
    phase: str | None = None
    message: str | None = None
    detail: str | None = None
    stacks: str | None = None
    began: float = 0.0
    seconds: float = 0.0
    clock: Clock = field(default_factory=Clock)
    records: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As in the result document."""
        return {
            "id": self.id,
            "outcome": self.outcome,
            "phase": self.phase,
            "message": self.message,
            "detail": self.detail,
            "stacks": self.stacks,
            "seconds": round(self.seconds, 3),
            "phases": _rounded(self.clock.seconds),
            "budget": {phase: limit.document() for phase, limit in self.budget.items()},
            "records": self.records,
        }


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How long a test may be in a phase.

    Parameters:
        own: seconds the test has been in it.
        ceiling: seconds that the deciding limit gives.
        used: of them.
        what: which limit it is.
    """

    own: float
    ceiling: float
    used: float
    what: str

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ceiling - self.used

    def line(self, phase: str) -> str:
        """What to say of a test that is over it."""
        return (
            f"overrun: {self.own:.1f} s in phase {phase}; "
            f"{self.used:.1f} s of {self.ceiling:g} s are used ({self.what})"
        )


class Problem(NamedTuple):
    """What is wrong with a run beside its tests; it fails the tier."""

    outcome: Literal["failed", "overrun", "underrun"]
    line: str


class Ledger:
    """A tier's run.

    Parameters:
        began: monotonic time.
        tier, profile, image: as given to pytest.
        budget: what the run is held to; None: nothing but `DEFAULT_CEILING`.
        session_seconds: what is left of the session as the tier begins; None: no limit.
        profile_values: for the document.
    """

    def __init__(
        self,
        began: float,
        *,
        tier: str,
        profile: str,
        image: str,
        budget: TierBudget | None,
        session_seconds: float | None,
        profile_values: list[dict[str, Any]],
    ) -> None:
        self.tier = tier
        self.profile = profile
        self.image = image
        self.budget = budget
        self.session_seconds = session_seconds
        self.profile_values = profile_values
        self.tests: dict[str, Test] = {}
        self.not_selected: list[dict[str, str]] = []
        self.broken: list[dict[str, str]] = []
        self.survivors: list[str] = []
        self.whole = False
        self.running: Test | None = None
        self.began = began
        self.problems: list[Problem] = []
        self.refusal: str | None = None
        self.interrupted: str | None = None
        self.crashed: str | None = None
        self.hung: str | None = None
        self.collected = False
        self.ended = False
        self._refused: list[str] = []
        self._over = dict.fromkeys(PHASES, 0.0)
        self._wall = datetime.datetime.now(datetime.UTC)

    # ---------------------------------------------------------------- what happens, in order

    def collect(self, ids: Iterable[str], not_selected: list[dict[str, str]], whole: bool) -> None:
        """The tests that will run; whether they are all that the tier has for this profile."""
        budgets = self.budget.tests if self.budget else {}
        self.tests = {test: Test(test, budgets.get(self._short(test), {})) for test in ids}
        self.not_selected = not_selected
        self.whole = whole
        self.collected = True

    def begin(self, test: str, at: float) -> str | None:
        """A test wants to begin; the answer is why it may not."""
        row = self.tests[test]
        reason = self.used_up(at)
        if reason:
            row.message = reason
            self._refused.append(reason)
            return reason
        row.outcome, row.began = "running", at
        self.running = row
        return None

    def report(self, outcome: Outcome, phase: str, message: str, detail: str) -> None:
        """A stage of the running test did not pass; the first such word counts."""
        row = self.running
        if row and row.outcome == "running":
            row.outcome, row.phase, row.message, row.detail = outcome, phase, message, detail
        elif row and row.outcome == "overrun":
            row.detail = row.detail or detail

    def overrun(self, message: str, phase: str, stacks: str | None) -> None:
        """The running test is over its budget, whatever it says of itself."""
        row = self.running
        assert row
        if row.outcome != "overrun":
            row.outcome, row.phase, row.message, row.stacks = "overrun", phase, message, stacks

    def finish(self, at: float) -> Test:
        """The running test is over: its verdict."""
        row = self.running
        assert row
        row.clock.charge(at)
        for phase in PHASES:
            # The watchdog may have been told of the end before it woke for the deadline.
            least = min(self._limits(phase, row, at), key=lambda allowance: allowance.left)
            if row.outcome == "running" and least.left < 0:
                row.outcome, row.phase, row.message = "overrun", phase, least.line(phase)
        for phase, limit in row.budget.items():
            if row.outcome == "running" and row.clock.seconds[phase] < (limit.floor or 0.0):
                row.outcome, row.phase = "underrun", phase
                row.message = (
                    f"underrun: {row.clock.seconds[phase]:.2f} s in phase {phase}, under its floor of "
                    f"{limit.floor:g} s: has it tested what it says?"
                )
        if row.outcome == "running":
            row.outcome = "passed"
        self._leave(row, at)
        return row

    def lose(self, why: str, at: float, outcome: Outcome) -> None:
        """The running test went with its process."""
        row = self.running
        if not row:
            return
        row.clock.charge(at)
        if row.outcome == "running":
            row.outcome, row.message, row.phase = outcome, why, row.clock.phase
        self._leave(row, at)

    def _leave(self, row: Test, at: float) -> None:
        self.running = None
        row.seconds = at - row.began
        for phase, seconds in row.clock.seconds.items():
            self._over[phase] += seconds

    # ---------------------------------------------------------------- what is left

    def spent(self, phase: str, at: float) -> float:
        """Seconds of a phase, summed over the tests."""
        return self._over[phase] + (self.running.clock.at(phase, at) if self.running else 0.0)

    def session_left(self, at: float) -> float:
        """Seconds until the session's budget is used up."""
        return math.inf if self.session_seconds is None else self.began + self.session_seconds - at

    def _limits(self, phase: str, row: Test, at: float) -> list[Allowance]:
        used, budget = row.clock.at(phase, at), self.budget or TierBudget()
        known = [
            (row.budget.get(phase), used, "its own entry"),
            (budget.each.get(phase), used, "the entry for any one test"),
            (budget.phases.get(phase), self.spent(phase, at), "the tier's total"),
        ]
        limits = [
            Allowance(own=used, used=spent, ceiling=limit.ceiling, what=what)
            for limit, spent, what in known
            if limit and limit.ceiling
        ]
        # Where no table says anything a hang must end as well.
        return limits or [Allowance(own=used, used=used, ceiling=DEFAULT_CEILING, what="the default")]

    def allowance(self, phase: str, row: Test, at: float) -> Allowance:
        """How much longer a test may be in a phase: the smallest of what its limits and the session leave."""
        limits = self._limits(phase, row, at)
        if self.session_seconds is not None:
            # A session that is over is no reason to cut the end of a server short.
            more = self.stop_ceiling() if phase == "stop" else 0.0
            limits.append(
                Allowance(
                    own=row.clock.at(phase, at),
                    used=at - self.began,
                    ceiling=self.session_seconds + more,
                    what="what the session had left as the tier began",
                )
            )
        return min(limits, key=lambda allowance: allowance.left)

    def stop_ceiling(self) -> float:
        """Seconds that cleaning up after an overrun may take."""
        limit = self.budget.each.get("stop") if self.budget else None
        return (limit and limit.ceiling) or 60.0

    def used_up(self, at: float) -> str | None:
        """Why no further test may begin."""
        if self.session_left(at) <= 0:
            return f"the session's {self.session_seconds:g} s are used up"
        for phase, limit in (self.budget.phases if self.budget else {}).items():
            if limit.ceiling and self.spent(phase, at) >= limit.ceiling:
                return f"the tier's {limit.ceiling:g} s for phase {phase} are used up"
        return None

    # ---------------------------------------------------------------- the whole

    def complete(self) -> bool:
        """Whether pytest came to its end and every selected test ran."""
        ran = all(row.outcome not in ("not-run", "running") for row in self.tests.values())
        return self.ended and self.collected and ran and not self.broken

    def close(self, unread: Iterable[str]) -> list[Problem]:
        """pytest's own end: what only the end can show.

        Parameters:
            unread: names of profile values that no test asked for.
        """
        self.ended = True
        self.problems += [
            Problem("overrun", f"{reason}: {self._refused.count(reason)} of {len(self.tests)} tests not run")
            for reason in dict.fromkeys(self._refused)
        ]
        if self.collected and not self.tests and not self.broken:
            self.problems.append(Problem("failed", "no test ran"))
        if self.whole and self.complete():
            self.problems += [
                Problem("failed", f"tests/{self.tier}/profile.toml: {name} is read by no test")
                for name in unread
            ]
            self.problems += self._stale(self.budget or TierBudget())
            self.problems += self._under(self.budget or TierBudget())
        return self.problems

    def _stale(self, budget: TierBudget) -> list[Problem]:
        known = {self._short(test) for test in [*self.tests, *(row["id"] for row in self.not_selected)]}
        table = f"{self.image}.{self.profile}.{self.tier}.tests"
        return [
            Problem("failed", f"the budget {table}.{test!r} is for a test that there is not")
            for test in budget.tests
            if test not in known
        ]

    def _under(self, budget: TierBudget) -> list[Problem]:
        return [
            Problem(
                "underrun",
                f"underrun: {self._over[phase]:.2f} s in phase {phase} over the tier, under its floor of "
                f"{limit.floor:g} s: has it tested what it says?",
            )
            for phase, limit in budget.phases.items()
            if limit.floor and self._over[phase] < limit.floor
        ]

    def _short(self, test: str) -> str:
        return test.removeprefix(f"tests/{self.tier}/")

    def verdict(self, status: int | None) -> tuple[str, str | None]:
        """The tier's outcome and the line that says why it did not pass.

        Parameters:
            status: pytest's exit status; None: it is still running.
        """
        bad = [row for outcome in BAD for row in self.tests.values() if row.outcome == outcome]
        lines = [self.crashed, self.interrupted, self.hung, self.refusal]
        # A crash has been said already.
        if rest := [row for row in bad if row.outcome != "crashed"]:
            outcomes = [row.outcome for row in rest]
            counts = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
            lines.append(f"{counts}; {rest[0].id}: {rest[0].message}")
        lines += [f"{row['id']}: {row['message']}" for row in self.broken[:1]]
        lines += [problem.line for problem in self.problems]
        if status is None:
            lines.append("the watchdog was ended before pytest was")
        elif not any(lines) and not self.complete():
            lines.append(f"pytest ended with status {status} before its tests did")
        elif not any(lines) and status:
            lines.append(f"pytest ended with status {status}")
        detail = "; ".join(line for line in lines if line) or None
        kinds = {row.outcome for row in bad} | {problem.outcome for problem in self.problems}
        if self.crashed or "crashed" in kinds:
            return "crashed", detail
        if self.interrupted:
            return "interrupted", detail
        if status is None:
            return "crashed", detail
        if self.hung or "overrun" in kinds:
            return "overrun", detail
        if kinds == {"underrun"} and not self.broken and not self.refusal:
            return "underrun", detail
        return ("failed" if detail else "passed"), detail

    def document(self, status: int | None, at: float) -> dict[str, Any]:
        """The tier document as it stands."""
        outcome, detail = self.verdict(status)
        left_over = (
            self.crashed or self.hung or self.interrupted or self.refusal
            or ("pytest ended before it" if status is not None else None)
        )  # fmt: skip
        tests = []
        for row in self.tests.values():
            shown = row.document()
            if row.outcome == "running":
                shown |= {"outcome": "crashed", "phase": row.clock.phase, "message": "it was running"}
            if row.outcome == "not-run":
                shown["message"] = row.message or left_over
            tests.append(shown)
        return {
            "schema": 1,
            "tier": self.tier,
            "profile": self.profile,
            "image": self.image,
            "began": self._wall.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "seconds": round(at - self.began, 3),
            "outcome": outcome,
            "detail": detail,
            "complete": self.complete(),
            "whole": self.whole,
            "phases": _rounded({phase: self.spent(phase, at) for phase in PHASES}),
            "budget": self.budget.document() if self.budget else None,
            "tests": tests + [_broken(row) for row in self.broken],
            "not_selected": self.not_selected,
            "profile_values": self.profile_values,
            "survivors": self.survivors,
        }


def _broken(row: dict[str, str]) -> dict[str, Any]:
    """A file that could not be collected, as a test of its own."""
    return Test(row["id"], {}, "error", None, row["message"], row["detail"]).document()


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {phase: round(value, 4) for phase, value in seconds.items()}

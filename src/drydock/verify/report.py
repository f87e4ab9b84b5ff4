"""What a verification found, as data, as JSON and as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

PRINTED_FINDINGS = 50

State = Literal["ok", "failed", "not-run", "not-applicable", "as-declared"]
"""`as-declared`: something is missing, and the definition says so; it is printed, and no difference to the lock."""


@dataclass(frozen=True, order=True)
class Finding:
    """One difference: the thing (a path, a distribution, a package) and what is wrong with it."""

    subject: str
    what: str


class Outcome(NamedTuple):
    """What a check's function returns. `checked` counts the things looked at, `unused` are declarations
    (patterns of absent libraries and foreign objects) that nothing in the image needs any more. The state
    follows from the findings unless it says otherwise."""

    checked: int
    detail: str
    findings: Sequence[Finding] = ()
    unused: Sequence[str] = ()
    state: State | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check that has run: its outcome and its time."""

    name: str
    state: State
    checked: int
    seconds: float
    detail: str
    findings: tuple[Finding, ...]
    unused: tuple[str, ...]

    @classmethod
    def run(cls, name: str, function: Callable[[], Outcome]) -> Check:
        started = time.perf_counter()
        outcome = function()
        return cls(
            name=name,
            state=outcome.state or ("failed" if outcome.findings else "ok"),
            checked=outcome.checked,
            seconds=round(time.perf_counter() - started, 3),
            detail=outcome.detail,
            findings=tuple(sorted(outcome.findings)),
            unused=tuple(outcome.unused),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a verification; `full` is whether hashes were compared, not only sizes."""

    image: str
    full: bool
    seconds: float
    python: str
    machine: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Literal["ok", "drift"]:
        return "drift" if any(check.findings for check in self.checks) else "ok"

    def document(self) -> dict[str, Any]:
        """The JSON document of `--json`."""
        return {"schema": 1, "image": self.image, "verdict": self.verdict, **asdict(self)}


def printable(text: str) -> str:
    """The text on one line of any terminal: file names may hold line ends and bytes that are not UTF-8."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def text_lines(report: Report) -> Iterator[str]:
    """The report for people: a table, a line a finding, the verdict."""
    table = [("check", "state", "checked", "seconds", "")]
    for check in report.checks:
        table.append((check.name, check.state, str(check.checked), f"{check.seconds:.2f}", check.detail))
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for name, state, checked, seconds, detail in table:
        numbers = f"{checked:>{widths[2]}}  {seconds:>{widths[3]}}"
        yield printable(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {numbers}  {detail}".rstrip())
    findings = [(check.name, finding) for check in report.checks for finding in check.findings]
    for name, finding in findings[:PRINTED_FINDINGS]:
        yield printable(f"{name}: {finding.subject}: {finding.what}")
    if len(findings) > PRINTED_FINDINGS:
        yield f"... and {len(findings) - PRINTED_FINDINGS} more"
    for check in report.checks:
        for pattern in check.unused:
            yield printable(f"note: {check.name}: the declaration {pattern!r} matches nothing in the image")
    if report.verdict == "ok":
        states = {check.name: check.state for check in report.checks}
        compared = (
            "versions alone, this is no image of ours"
            if states.get("files") == "not-run"
            else "every hash"
            if report.full
            else "sizes and presence; --full compares every hash"
        )
        yield f"ok: {report.image} is what it was locked to be ({compared}), {report.seconds:.1f} s"
    else:
        places = "1 place" if len(findings) == 1 else f"{len(findings)} places"
        yield f"drift: {report.image} differs from its lock in {places}, {report.seconds:.1f} s"

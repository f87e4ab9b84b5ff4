"""A budget table from several runs: what they took, how far they spread, and never looser than it was.

The rule, in seconds, for one entry with one value per run:

- ceiling: the largest of 1.5 × median, median + 6 × MAD, 1.2 × the longest run, and 5 s (noise on what is
  short fails nothing); rounded up to 1 s, over a minute to 5 s, over five minutes to 10 s;
- floor: 0.3 × the shortest run, rounded down to 0.1 s; none where the shortest run is under 1 s.

MAD is the median distance from the median. A test has its own entry where one of its phases takes 10% of its
tier and 2 s; a floor for a test is for its test phase only, since who starts a shared server depends on what
else is selected.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drydock.errors import DrydockError
from drydock.tiers import PHASES
from drydock.tiers.budgets import ImageBudget, Limit, Limits, TierBudget, read_budgets

RUNS = 3
"""Fewer say nothing about the spread."""
LEAST_CEILING = 10.0
"""Seconds. A pause of a few on a busy machine is nothing that a short phase has to be stopped for: with 5 s here, two
tests were, beside a compiler on both cores."""
LEAST_FLOORED = 1.0
FLOOR_SHARE = 0.3
NOTABLE_SHARE = 0.1
NOTABLE_SECONDS = 2.0
BEFORE_THE_CLOCK = ("image", "runtime")
"""Steps of a session that its ceiling is not about."""

LOOSENED = "# loosened on"

Document = dict[str, Any]


def read_runs(paths: Iterable[Path]) -> list[Document]:
    """The session documents at these paths: each a report.json, or a folder with such files anywhere in it.

    Raises:
        DrydockError: there is none, they are too few, one did not pass, ran only a part of a tier, under emulation
            or in what differs from the lock, or they are of different images, profiles or tiers.
    """
    files: dict[Path, None] = {}
    for path in paths:
        found = sorted(path.resolve().rglob("report.json")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise DrydockError(f"{path}: no report.json there")
        files |= {file.resolve(): None for file in found}
    runs = [_read_run(file) for file in files]
    kinds = {(run["image"]["name"], run["profile"]): file for run, file in zip(runs, files, strict=True)}
    if len(kinds) > 1:
        names = "; ".join(f"{image} {profile} in {file}" for (image, profile), file in kinds.items())
        raise DrydockError(f"runs of different images or profiles have no common budget: {names}")
    tiers = {
        ", ".join(tier["tier"] for tier in run["tiers"]): file for run, file in zip(runs, files, strict=True)
    }
    if len(tiers) > 1:
        names = "; ".join(f"{names} in {file}" for names, file in tiers.items())
        raise DrydockError(f"runs of different tiers have no common budget: {names}")
    if len(runs) < RUNS:
        raise DrydockError(f"{len(runs)} runs say nothing about the spread: give at least {RUNS}")
    return runs


def _read_run(file: Path) -> Document:
    try:
        run: Document = json.loads(file.read_text())
        outcome, tiers = run["outcome"], run["tiers"]
        image, profile = run["image"]["name"], run["profile"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DrydockError(f"{file} is no session's report: {error}") from error
    if outcome != "passed" or not tiers:
        detail = run.get("detail") or "no tier ran"
        raise DrydockError(f"{file}: {image} {profile} did not pass ({detail}): only runs that pass measure")
    if emulated := run["device"].get("emulated"):
        raise DrydockError(f"{file}: {emulated} was emulated there: measure where {image} runs itself")
    if (run["verification"] or {}).get("verdict") == "drift":
        raise DrydockError(f"{file}: what ran there was not what {image} is locked to be: measure that")
    for tier in tiers:
        if not (tier["complete"] and tier["whole"]):
            raise DrydockError(f"{file}: only a part of the {tier['tier']} tier ran: measure whole tiers")
    return run


# -------------------------------------------------------------------- the rule


def ceiling(values: Sequence[float]) -> float:
    """The ceiling that runs suggest."""
    median = statistics.median(values)
    least = max(1.5 * median, median + 6 * spread(values), 1.2 * max(values), LEAST_CEILING)
    step = 1 if least <= 60 else 5 if least <= 300 else 10
    return float(math.ceil(least / step) * step)


def floor(values: Sequence[float]) -> float | None:
    """The floor that runs suggest."""
    return math.floor(min(values) * FLOOR_SHARE * 10) / 10 if min(values) >= LEAST_FLOORED else None


def spread(values: Sequence[float]) -> float:
    """MAD: the median distance from the median."""
    median = statistics.median(values)
    return statistics.median(abs(value - median) for value in values)


def tighten(
    name: str, values: Sequence[float], current: Limit | None, floors: bool, say: Callable[[str], None]
) -> Limit:
    """What runs suggest for an entry, but nowhere looser than it is: no higher ceiling, no lower floor.

    Parameters:
        name: what to call it when something is kept against the measurement; `say` gets that line.
        floors: whether such an entry has a floor.
    """
    new = Limit(floor=floor(values) if floors else None, ceiling=ceiling(values))
    if current is None:
        return new
    took = f"{min(values):.1f} to {max(values):.1f} s"
    top = min(limit.ceiling for limit in (current, new) if limit.ceiling is not None)
    bottom = max((limit.floor for limit in (current, new) if limit.floor is not None), default=None)
    if top < max(values):
        say(f"{name}: keeps its ceiling of {top:g} s, the runs took {took}")
    if bottom is not None and bottom > min(values):
        say(f"{name}: keeps its floor of {bottom:g} s, the runs took {took}")
    if bottom is not None and bottom > top:
        say(f"{name}: keeps its ceiling too, its floor is over what the runs suggest ({top:g} s)")
        return current
    return Limit(floor=bottom, ceiling=top)


# -------------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Table:
    """A proposed table of one image × profile.

    Parameters:
        text: TOML with comments.
        notes: what was kept against the measurement, and what is gone.
    """

    image: str
    profile: str
    text: str
    notes: tuple[str, ...]


class _Writer:
    """Merges entries and writes them down, each with what was measured."""

    def __init__(self, loosen: bool) -> None:
        self.loosen = loosen
        self.lines: list[str] = []
        self.notes: list[str] = []

    def entry(
        self, table: str, key: str, values: Sequence[float], current: Limit | None, floors: bool = True
    ) -> None:
        """One line; nothing where there is neither a measurement nor an entry."""
        if not any(values):
            if current:
                self.lines.append(f"{key} = {_inline(current)}  # kept, not measured")
            return
        name = f"{table}.{key}"
        limit = tighten(name, values, None if self.loosen else current, floors, self.notes.append)
        measured = f"{statistics.median(values):.2f} ± {spread(values):.2f} s"
        self.lines.append(f"{key} = {_inline(limit)}  # {measured}")

    def table(
        self, header: str, series: Mapping[str, Sequence[float]], current: Limits, floors: Iterable[str]
    ) -> None:
        """One table of phases, left out where it would be empty."""
        before = len(self.lines)
        self.lines.append(f"[{header}]")
        for phase in PHASES:
            self.entry(header, phase, series.get(phase, ()), current.get(phase), phase in floors)
        if len(self.lines) == before + 1:
            self.lines.pop()


def propose(runs: Sequence[Document], budgets: Path, loosen: str | None) -> Table:
    """The table that runs suggest, beside the one that there is.

    Parameters:
        runs: of `read_runs`.
        budgets: the budgets file; it may be missing.
        loosen: why entries may become looser; None: they may not.

    Raises:
        DrydockError: the budgets file is wrong, or the reason is none.
    """
    if loosen is not None and (not loosen.strip() or "\n" in loosen):
        raise DrydockError("--loosen needs a reason, in one line: it is kept above the table")
    image, profile = runs[0]["image"]["name"], runs[0]["profile"]
    current = (read_budgets(budgets) if budgets.exists() else {}).get((image, profile), ImageBudget())
    writer = _Writer(loosen is not None)
    prefix = f"{_key(image)}.{_key(profile)}"
    writer.lines.append(_about(runs))
    writer.lines += _reasons(budgets, image, profile)
    if loosen is not None:
        writer.lines.append(f"{LOOSENED} {max(run['began'] for run in runs)[:10]}: {loosen.strip()}")
    writer.lines.append(f"[{prefix}]")
    whole = not any(re.fullmatch(r"the \w+ tier", row["what"]) for run in runs for row in run["not_run"])
    writer.entry(prefix, "session", [_clocked(run) for run in runs] if whole else (), current.session, False)
    ran = [tier["tier"] for tier in runs[0]["tiers"]]
    for place, tier in enumerate(ran):
        budget = current.tiers.get(tier, TierBudget())
        _write_tier(writer, f"{prefix}.{_key(tier)}", [run["tiers"][place] for run in runs], budget)
    for tier, budget in current.tiers.items():
        if tier not in ran:
            _write_tier(writer, f"{prefix}.{_key(tier)}", [], budget)
    return Table(image=image, profile=profile, text="\n".join(writer.lines) + "\n", notes=tuple(writer.notes))


def _write_tier(writer: _Writer, header: str, tiers: Sequence[Document], current: TierBudget) -> None:
    sums = {phase: [tier["phases"].get(phase, 0.0) for tier in tiers] for phase in PHASES}
    writer.table(f"{header}.phases", sums, current.phases, floors=PHASES)
    longest = {
        phase: [max((test["phases"][phase] for test in tier["tests"]), default=0.0) for tier in tiers]
        for phase in PHASES
    }
    writer.table(f"{header}.each", longest, current.each, floors=())
    took: dict[str, list[Document]] = {}
    for tier in tiers:
        for test in tier["tests"]:
            took.setdefault(test["id"].removeprefix(f"tests/{tier['tier']}/"), []).append(test["phases"])
    total = statistics.median([sum(tier["phases"].values()) for tier in tiers]) if tiers else 0.0
    # A test that is gone takes its entry along: the plugin would fail for it.
    writer.notes += [
        f"{header}.tests.{_key(test)}: no run has that test, and the table no entry for it any more"
        for test in current.tests
        if tiers and test not in took
    ]
    for test in took if tiers else current.tests:
        limits = current.tests.get(test, {})
        series = {
            phase: [phases[phase] for phases in took[test]]
            for phase in PHASES
            if len(took.get(test, ())) == len(tiers)
            and (
                phase in limits
                or statistics.median([phases[phase] for phases in took[test]])
                >= max(NOTABLE_SHARE * total, NOTABLE_SECONDS)
            )
        }
        writer.table(f"{header}.tests.{_key(test)}", series, limits, floors=("test",))


def _about(runs: Sequence[Document]) -> str:
    days = sorted({run["began"][:10] for run in runs})
    devices = sorted({_device(run["device"]) for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"# {len(runs)} runs, {when}, {' and '.join(devices)}; beside each entry their median ± MAD"


def _device(device: Mapping[str, Any]) -> str:
    """A machine's accelerators and its cores, in words."""
    found = device.get("gpus") or device.get("npus") or []
    kinds = sorted({each["name"] for each in found})
    counted = [f"{sum(each['name'] == kind for each in found)} x {kind}" for kind in kinds]
    return ", ".join([*counted, device["cpu"], f"{device['cores']} cores"])


def _clocked(run: Document) -> float:
    before = sum(step["seconds"] for step in run["steps"] if step["name"] in BEFORE_THE_CLOCK)
    return float(run["seconds"] - before)


def _inline(limit: Limit) -> str:
    return "{ " + ", ".join(f"{key} = {value:g}" for key, value in limit.document().items()) + " }"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


# -------------------------------------------------------------------- the file


def splice(text: str, table: Table) -> str:
    """The budgets file with this image × profile's part replaced and all else as it was. Comments that stand
    right above a header go with it.

    Raises:
        DrydockError: the file is not written as one header a table.
    """
    preamble, sections = _sections(text)
    before, after = preamble, ""
    found = False
    for path, section in sections:
        if path[:2] == (table.image, table.profile):
            found = True
        elif found:
            after += section
        else:
            before += section
    if before and not before.endswith("\n"):
        before += "\n"
    gap = "\n" if before and not before.endswith("\n\n") else ""
    made = before + gap + table.text + ("\n" if after else "") + after
    check_splice(text, made, table)
    return made


def _sections(text: str) -> tuple[str, list[tuple[tuple[str, ...], str]]]:
    """What stands above the first header, and each header's path with its text and the comments above it."""
    preamble: list[str] = []
    sections: list[tuple[tuple[str, ...], list[str]]] = []
    lines = preamble
    for line in text.splitlines(keepends=True):
        if path := _header(line):
            above: list[str] = []
            while lines and lines[-1].startswith("#"):
                above.insert(0, lines.pop())
            lines = above
            sections.append((path, lines))
        lines.append(line)
    return "".join(preamble), [(path, "".join(section)) for path, section in sections]


def _reasons(budgets: Path, image: str, profile: str) -> list[str]:
    """Why this table was loosened before."""
    return [
        line
        for path, section in _sections(budgets.read_text() if budgets.exists() else "")[1]
        if path[:2] == (image, profile)
        for line in section.splitlines()
        if line.startswith(LOOSENED)
    ]


def _header(line: str) -> tuple[str, ...]:
    """The path in a table's header; empty for any other line."""
    if not line.lstrip().startswith("["):
        return ()
    try:
        node = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return ()
    path = []
    while node:
        ((key, node),) = node.items()
        path.append(key)
    return tuple(path)


def check_splice(before: str, after: str, table: Table) -> None:
    """That nothing but this table changed.

    Raises:
        DrydockError: something else did, or the file is no TOML any more.
    """
    with contextlib.suppress(tomllib.TOMLDecodeError):
        old, new, own = (tomllib.loads(text) for text in (before, after, table.text))
        _, made, wanted = (
            document.setdefault(table.image, {}).pop(table.profile, {}) for document in (old, new, own)
        )
        if made == wanted and old == new:
            return
    raise DrydockError(
        f"the budgets file is not written as one [{table.image}.{table.profile}...] header a table: "
        "put the printed table in by hand"
    )

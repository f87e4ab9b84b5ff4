"""A run as one HTML page: no other file, no request, no script; light and dark, narrow and wide, on paper."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from drydock.report import charts
from drydock.report.documents import (
    PHASES,
    ExpertLoad,
    Report,
    Series,
    Tier,
    duration,
    plural,
    records,
)
from drydock.report.past import History

SLOWEST = 20
MOST_CHARTS = 12
"""Records of one shape that are drawn; what a page has more of is listed."""
MOST_DETAIL = 20_000
"""Characters of a failure's long text that the page shows, the last ones mostly: there the error is."""
MOST_VALUE = 600
"""Characters of a recorded value that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Absent:
    """Something that did not run, and why; tests of one tier with one reason are one of these."""

    kind: str
    tier: str
    reason: str
    names: tuple[str, ...]


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": _duration, "plural": plural, "tail": _tail, "short": _short, "value": _value,
        "thousands": "{:,}".format,
    }  # fmt: skip
    environment.globals |= {"PHASES": PHASES}
    return environment.get_template("page.html.jinja")


def page(report: Report, earlier: History) -> str:
    """The page's text. The same documents give the same page."""
    every = list(records(report))
    loads = [(entry, entry.drawn) for entry in every if isinstance(entry.drawn, ExpertLoad)][:MOST_CHARTS]
    series = [(entry, entry.drawn) for entry in every if isinstance(entry.drawn, Series)][:MOST_CHARTS]
    drawn = {id(entry) for entry, _ in (*loads, *series)}
    with charts.drawing():
        figures = {
            "waterfalls": [charts.waterfall(f"tier-{n}", tier) for n, tier in enumerate(report.tiers)],
            "trends": charts.trends([*earlier.runs, report]) if earlier.runs else [],
            "loads": [
                (entry, charts.expert_load(f"load-{n}", load)) for n, (entry, load) in enumerate(loads)
            ],
            "series": [(entry, charts.series(f"series-{n}", line)) for n, (entry, line) in enumerate(series)],
        }
    slowest = sorted(
        ((tier, test) for tier, test in report.tests if test.outcome != "not-run"),
        key=lambda pair: pair[1].seconds,
        reverse=True,
    )[:SLOWEST]
    return _template().render(
        report=report,
        earlier=earlier,
        failed=[(tier, test) for tier, test in report.tests if test.failed],
        broken=[tier for tier in report.tiers if not tier.ok],
        absent=list(_absent(report)),
        smaller=_smaller(report),
        slowest=slowest,
        longest=max((test.seconds for _, test in slowest), default=0.0),
        recorded=[entry for entry in every if id(entry) not in drawn],
        **figures,
    )


def _absent(report: Report) -> Iterable[Absent]:
    for entry in report.not_run:
        yield Absent(kind="not run", tier="session", reason=entry.reason, names=(entry.what,))
    for tier in report.tiers:
        rows = [("missing", test.message, test) for test in tier.tests if test.outcome == "missing"]
        rows += [("not run", test.message or tier.why, test) for test in tier.not_run]
        yield from _grouped(tier, [(kind, reason, test.id) for kind, reason, test in rows])
        yield from _grouped(tier, [("not selected", test.reason, test.id) for test in tier.not_selected])


def _grouped(tier: Tier, rows: list[tuple[str, str, str]]) -> Iterable[Absent]:
    for (kind, reason), group in groupby(sorted(rows), key=lambda row: row[:2]):
        names = tuple(name for *_, name in group)
        yield Absent(kind=kind, tier=tier.tier, reason=reason or "no reason given", names=names)


def _smaller(report: Report) -> list[tuple[Tier, list[Any]]]:
    """Each tier's parameters whose value is not the full profile's."""
    tiers = [(tier, [row for row in tier.profile_values if row.value != row.full]) for tier in report.tiers]
    return [(tier, rows) for tier, rows in tiers if rows]


def _duration(seconds: float) -> str:
    """Seconds whose unit stays on the line of their number."""
    return duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")


def _tail(text: str) -> str:
    if len(text) <= MOST_DETAIL:
        return text
    head = MOST_DETAIL // 10
    left_out = f"\n\n… {len(text) - MOST_DETAIL:,} characters are left out here, report.json has them …\n\n"
    return text[:head] + left_out + text[head - MOST_DETAIL :]


def _short(digest: str) -> str:
    algorithm, separator, value = digest.partition(":")
    return f"{algorithm}{separator}{value[:12]}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_VALUE else f"{text[:MOST_VALUE]}… ({len(text):,} characters)"

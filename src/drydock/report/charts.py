"""The report's charts, drawn by matplotlib as SVG that lives inside the page.

Every chart is narrow, so that its text is legible on a telephone; a wide page shows several side by side. Colours
are names of the page's style sheet, so that a chart follows the light and the dark scheme.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any, TypeVar

import matplotlib
import matplotlib.ticker
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import BaseModel

from drydock.report.documents import (
    PHASES,
    ExpertLoad,
    Report,
    Series,
    Test,
    Tier,
    Use,
    balance,
    duration,
    plural,
    tightest,
)  # fmt: skip

WIDTH = 320.0
TREND_WIDTH = 250.0
SLOW_TESTS = 8
"""Tests of a tier that get a row of their own in its waterfall, if they took a hundredth of its time."""
FAILED_TESTS = 8
"""Failed tests that get one in any case."""
LABEL_LENGTH = 53
"""Characters of a row's label and numbers together."""

COLORS = {
    name: f"#0a00{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "line", "track", "good", "bad", "other", "before", "after", *PHASES), start=1
    )
}
"""Names of the page's colours -> stand-ins that matplotlib writes and `_svg` puts the names in place of."""

NAMES = {stand_in: name for name, stand_in in COLORS.items()}

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "drydock",
    "text.parse_math": False,  # a test's name may hold dollar signs
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, for measuring; the page has its own
    "text.color": COLORS["ink"],
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.color": COLORS["line"],
    "ytick.labelcolor": COLORS["muted"],
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.labelsize": 9.5,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """An SVG element, with its title and its caption for the page around it."""

    title: str
    svg: Markup
    caption: str = ""


# ---------------------------------------------------------------------------------------- the figure


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Charts are made in here: our settings, whatever the user's own of matplotlib are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        # The browser draws the text, so it does not matter what matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _axes(
    height: float,
    *,
    width: float = WIDTH,
    left: float = 4,
    right: float = 10,
    bottom: float = 30,
    top: float = 4,
) -> tuple[Figure, Axes]:
    """A figure `height` units high, with one pair of axes; margins in the same units."""
    figure = Figure(figsize=(width / 72, height / 72))
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes(box)


def _svg(figure: Figure, name: str, alternative: str) -> Markup:
    """The figure as an element for inside a page: no prolog, no name spaces, ids of its own, our colours.

    Parameters:
        name: unique in the page; ids begin with it.
        alternative: the text for who cannot see it.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=METADATA)
    text = stream.getvalue()
    viewbox = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # matplotlib's own style element would hold for the whole page.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda match: _tag(match[0], name), body)
    label = escape(" ".join(alternative.split()))
    return Markup(f'<svg {viewbox[0] if viewbox else ""} role="img" aria-label="{label}">{body}')


Drawn = TypeVar("Drawn", bound=BaseModel)


def _drawn_once(draw: Callable[[str, Drawn], Chart]) -> Callable[[str, Drawn], Chart]:
    """A chart of the same data is drawn once: a session writes its page after each tier, with those before it."""
    charts: dict[tuple[str, str], Chart] = {}

    @functools.wraps(draw)
    def drawn(name: str, data: Drawn) -> Chart:
        key = name, data.model_dump_json()
        if key not in charts:
            charts[key] = draw(name, data)
        return charts[key]

    return drawn


def _tag(tag: str, name: str) -> str:
    """One tag of a figure with the page's ids and colours; the text between tags is somebody else's."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    return re.sub("#0a00[0-9a-f]{2}", lambda match: f"var(--{NAMES[match[0]]})", tag)


def _short(name: str, length: int) -> str:
    """The name with its middle left out: its beginning and its parameters tell it apart."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length * 2 // 3]}…{name[1 - length // 3 :]}"


# ------------------------------------------------------------------------------------- the waterfall


@dataclass(kw_only=True)
class _Row:
    """A row of a waterfall: a label, and bars from where the row before it ended."""

    label: str
    start: float
    parts: list[tuple[str, float]]
    uses: tuple[Use, ...] = ()
    outcome: str = "passed"

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    @property
    def ceiling(self) -> float | None:
        """Where its bar must have ended, if every phase of it has a ceiling."""
        ceilings = [use.limit.ceiling for use in self.uses]
        limits = [ceiling for ceiling in ceilings if ceiling is not None]
        return self.start + sum(limits) if limits and len(limits) == len(ceilings) else None


def _phase_rows(tier: Tier) -> list[_Row]:
    rows, start = [], 0.0
    for use in tier.uses:
        rows.append(_Row(label=use.name, start=start, parts=[(use.name, use.seconds)], uses=(use,)))
        start += use.seconds
    return rows


def _test_parts(test: Test) -> list[tuple[str, float]]:
    parts = [(phase, test.phases[phase]) for phase in PHASES if test.phases.get(phase)]
    rest = test.seconds - sum(seconds for _, seconds in parts)
    return [*parts, ("other", rest)] if rest > 0.005 else list(parts)


def _test_rows(tier: Tier) -> list[_Row]:
    """A row for each slow or failed test, in order of run; the ones between them share a row."""
    ran = [test for test in tier.tests if test.outcome != "not-run"]
    slow = sorted(ran, key=lambda test: test.seconds, reverse=True)[:SLOW_TESTS]
    slow = [test for test in slow if test.seconds > 0.01 * tier.seconds]
    failed = [test for test in ran if test.failed][:FAILED_TESTS]
    alone = {id(test) for test in (*slow, *failed)}
    rows: list[_Row] = []
    start = 0.0
    for shared, group in groupby(ran, key=lambda test: id(test) not in alone):
        tests = list(group)
        if shared and len(tests) > 1:
            parts = [part for test in tests for part in _test_parts(test)]
            sums = [
                (name, sum(seconds for part, seconds in parts if part == name)) for name in (*PHASES, "other")
            ]
            rows.append(
                _Row(
                    label=f"{len(tests)} shorter tests", start=start, parts=[part for part in sums if part[1]]
                )
            )
            start += rows[-1].seconds
            continue
        for test in tests:
            rows.append(
                _Row(
                    label=test.name,
                    start=start,
                    parts=_test_parts(test),
                    uses=test.uses,
                    outcome=test.outcome,
                )
            )
            start += rows[-1].seconds
    outside = tier.seconds - start
    if outside > 0.01 * tier.seconds:
        rows.append(
            _Row(label="outside of its tests: imports, collection", start=start, parts=[("other", outside)])
        )
    return rows


ROW = 27.0
"""Height of a row: a line of text and a bar."""
HEADING = 24.0


@_drawn_once
def waterfall(name: str, tier: Tier) -> Chart:
    """Where a tier's time went: its phases against their ceilings, then its tests in order of run."""
    phases, tests = _phase_rows(tier), _test_rows(tier)
    ends = [row.start + row.seconds for row in (*phases, *tests)]
    ends += [row.ceiling for row in phases if row.ceiling is not None]
    longest = max([*ends, tier.seconds, 0.001]) * 1.01
    blocks = [
        (title, rows)
        for title, rows in (("phases, summed", phases), ("tests, in order of run", tests))
        if rows
    ]
    height = sum(HEADING + ROW * len(rows) for _, rows in blocks) + 2
    figure, axes = _axes(height + 34)
    axes.set_xlim(0, longest)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.grid(axis="x")
    y = 0.0
    for title, rows in blocks:
        axes.text(
            0,
            y + 14,
            title,
            transform=axes.get_yaxis_transform(),
            color=COLORS["muted"],
            weight="bold",
        )
        y += HEADING
        for row in rows:
            _draw_row(axes, row, y, longest)
            y += ROW
    return Chart(title=tier.tier, svg=_svg(figure, name, _waterfall_text(tier)))


def _draw_row(axes: Axes, row: _Row, y: float, longest: float) -> None:
    across = axes.get_yaxis_transform()
    bad = next((use for use in row.uses if not use.kept), None)
    told = bad or tightest(row.uses)
    numbers = duration(row.seconds) + (f" · {told.headroom}" if told else "")
    if row.outcome != "passed" and not bad:
        numbers = f"{row.outcome} · {numbers}"
    axes.text(0, y + 10, _short(row.label, LABEL_LENGTH - len(numbers)), transform=across)
    color = COLORS["ink"] if row.outcome == "passed" and not bad else COLORS["bad"]
    axes.text(1, y + 10, numbers, transform=across, ha="right", color=color)
    top, thick = y + 14.0, 7.0
    if row.ceiling is not None:
        # The way to the ceiling is the headroom; it ends in a mark, unless that lies beyond the chart.
        end = min(row.ceiling, longest)
        axes.add_artist(Rectangle((row.start, top), end - row.start, thick, color=COLORS["track"], lw=0))
    x = row.start
    for part, seconds in row.parts:
        # Nothing that ran is invisible.
        wide = max(seconds, longest / 400)
        axes.add_artist(Rectangle((x, top), wide, thick, color=COLORS[part], lw=0))
        x += seconds
    if row.ceiling is not None and row.ceiling <= longest:
        axes.plot([row.ceiling] * 2, [top - 2, top + thick + 2], color=color, lw=1.4, solid_capstyle="butt")


def _waterfall_text(tier: Tier) -> str:
    uses = "; ".join(
        f"{use.name} {duration(use.seconds)}"
        + (f" of {duration(use.limit.ceiling)}, {use.headroom}" if use.limit.ceiling else "")
        for use in tier.uses
    )
    return f"Budget waterfall of the {tier.tier} tier, {duration(tier.seconds)} in all. Phases: {uses or 'none'}."


# --------------------------------------------------------------------------------- headroom over time


def trends(runs: Sequence[Report]) -> list[Chart]:
    """How much of its ceiling each tier, and the session, used in each run; the last run is this one.

    What ran only in part is a gap.
    """
    now = runs[-1]
    charts = [
        _trend("trend-session", "session", [(run, run.use if run.whole else None, None) for run in runs])
    ]
    for number, tier in enumerate(now.tiers):
        points = []
        for run in runs:
            same = next((other for other in run.tiers if other.tier == tier.tier and other.whole), None)
            points.append((run, same.total if same else None, same.tightest if same else None))
        charts.append(_trend(f"trend-{number}", tier.tier, points))
    return [chart for chart in charts if chart]


def _trend(name: str, title: str, points: Sequence[tuple[Report, Use | None, Use | None]]) -> Chart | None:
    whole = [_percent(use) for _, use, _ in points]
    tight = [_percent(use) for _, _, use in points]
    if math.isnan(whole[-1]):
        return None
    figure, axes = _axes(126, width=TREND_WIDTH, left=36, right=64, bottom=22, top=8)
    known = [value for value in (*whole, *tight) if not math.isnan(value)]
    highest = max(110.0, *known) * 1.08
    axes.set_ylim(0, highest)
    axes.set_xlim(-0.4, len(points) - 0.6)
    axes.set_yticks([0, 50, 100], ["0", "50", "100%"])
    axes.grid(axis="y")
    axes.axhline(100, color=COLORS["bad"], lw=1.2)
    steps = range(len(points))
    if any(not math.isnan(value) for value in tight):
        axes.plot(steps, tight, color=COLORS["other"], lw=1.2, ls=(0, (3, 2)))
    axes.plot(steps, whole, color=COLORS["test"], lw=1.6)
    for good, marker, color in ((True, "o", "test"), (False, "x", "bad")):
        at = [step for step, (run, _, _) in enumerate(points) if _good(run, title) is good]
        sizes = [42 if step == len(points) - 1 else 20 for step in at]
        axes.scatter(at, [whole[step] for step in at], s=sizes, c=COLORS[color], marker=marker, zorder=3)
    last, use = len(points) - 1, points[-1][2]
    ends = [("all", whole[-1]), *([(use.name, tight[-1])] if use else [])]
    _end_labels(axes, last, ends, highest)
    dates = [f"{run.began:%m-%d}" for run, _, _ in points]
    axes.set_xticks([0, last] if last else [0], [dates[0], "this run"] if last else ["this run"])
    axes.get_xticklabels()[0].set(ha="left")
    text = ", ".join(f"{run.when} {value:.0f}%" for (run, _, _), value in zip(points, whole, strict=True))
    return Chart(title=title, svg=_svg(figure, name, f"Share of its ceiling used by {title}: {text}."))


def _percent(use: Use | None) -> float:
    return math.nan if use is None or use.share is None else use.share * 100


def _good(run: Report, title: str) -> bool:
    tier = next((tier for tier in run.tiers if tier.tier == title), None)
    return tier.ok if tier else run.ok


def _end_labels(axes: Axes, x: float, values: list[tuple[str, float]], highest: float) -> None:
    """The values at the end of their lines, moved apart where they would lie on each other."""
    gap = highest * 0.13
    ordered = sorted(values, key=lambda item: item[1])
    places: list[float] = []
    for _, value in ordered:
        places.append(max(value, places[-1] + gap) if places else value)
    for (name, value), place in zip(ordered, places, strict=True):
        color = COLORS["bad"] if value > 100 else COLORS["ink"]
        axes.annotate(
            f"{name} {value:.0f}%",
            (x, place),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )


# -------------------------------------------------------------------------------------- records


@_drawn_once
def expert_load(name: str, record: ExpertLoad) -> Chart:
    """Each rank's load before and after, as a multiple of an even share: a bar for the mean over layers, and a
    dot for each layer where there are several."""
    sides = {"before": record.before, "after": record.after}
    relative = {
        side: [[value * len(layer) / sum(layer) for value in layer] for layer in layers if sum(layer) > 0]
        for side, layers in sides.items()
    }
    ranks = len(record.before[0])
    figure, axes = _axes(170, left=30, bottom=32, top=10)
    for shift, (side, layers) in zip((-0.21, 0.21), relative.items(), strict=True):
        for rank, values in enumerate(zip(*layers, strict=True)):
            corner = (rank + shift - 0.19, 0)
            axes.add_artist(Rectangle(corner, 0.38, sum(values) / len(values), color=COLORS[side], lw=0))
        if len(layers) > 1:
            x = [rank + shift for _ in layers for rank in range(ranks)]
            y = [value for layer in layers for value in layer]
            axes.scatter(x, y, s=7, c=COLORS["ink"], alpha=0.65, lw=0)
    highest = max((value for layers in relative.values() for layer in layers for value in layer), default=1.0)
    axes.set_xlim(-0.6, ranks - 0.4)
    axes.set_ylim(0, max(highest, 1.0) * 1.08)
    axes.axhline(1.0, color=COLORS["ink"], lw=1, ls=(0, (4, 3)))
    axes.set_xticks(range(0, ranks, math.ceil(ranks / 16)))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_xlabel("rank")
    axes.grid(axis="y")
    caption = f"{_balances(record)}; {plural(len(record.before), 'layer')}, " + ", ".join(
        f"{sum(map(sum, layers)):,.0f} {record.unit} {side}" for side, layers in sides.items()
    )
    return Chart(
        title=record.title,
        svg=_svg(figure, name, f"{record.title}: load of {plural(ranks, 'rank')}, {caption}."),
        caption=caption,
    )


def _balances(record: ExpertLoad) -> str:
    """Mean and worst balance over layers, before and after."""
    sides = [
        [value for value in map(balance, layers) if value is not None]
        for layers in (record.before, record.after)
    ]
    if not all(sides):
        return "balance unknown: no load before or after"
    mean = " → ".join(f"{sum(side) / len(side):.2f}" for side in sides)
    worst = " → ".join(f"{min(side):.2f}" for side in sides)
    return f"balance {mean}" + (f", worst layer {worst}" if len(record.before) > 1 else "")


@_drawn_once
def series(name: str, record: Series) -> Chart:
    """A value at each step, and the threshold that it must reach."""
    figure, axes = _axes(170, left=38, bottom=32, top=10)
    known = [value for value in record.y if not math.isnan(value)]
    axes.plot(record.x, record.y, color=COLORS["test"], lw=1.6, marker="o", ms=3.2 if len(known) < 60 else 0)
    limits = [*known, *([] if record.threshold is None else [record.threshold])]
    pad = (max(limits) - min(limits)) * 0.12 or abs(limits[0]) * 0.1 or 1.0
    axes.set_ylim(min(limits) - pad, max(limits) + pad)
    axes.margins(x=0.02)
    caption = f"last value {known[-1]:.4g}, highest {max(known):.4g}"
    if record.threshold is not None:
        axes.axhline(record.threshold, color=COLORS["bad"], lw=1.2, ls=(0, (4, 3)))
        caption += f", threshold {record.threshold:.4g} (dashed)"
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.set_xlabel(_short(record.x_label, 60))
    axes.grid(axis="y")
    label = f"{record.y_label}: {caption}" if record.y_label else caption
    return Chart(title=record.title, svg=_svg(figure, name, f"{record.title}. {label}."), caption=label)

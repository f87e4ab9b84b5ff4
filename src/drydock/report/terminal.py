"""A run on a terminal: a short table, one line for each failure, and where the page is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drydock.report.documents import Report, Tier, one_line, plural

COLUMNS = ("tier", "outcome", "passed", "failed", "not run", "seconds", "ceiling", "headroom")
STYLES = {"passed": "green", "failed": "red"}


def show(report: Report, page: Path | None, stream: TextIO) -> None:
    """Print a run: colours and a table where `stream` is a terminal, plain lines elsewhere."""
    if not stream.isatty():
        for line in plain_lines(report, page):
            print(line, file=stream)
        stream.flush()
        return
    console = Console(file=stream, highlight=False)
    # On a narrower terminal, lines that it folds itself read better than columns of three letters.
    console.width = max(console.width, 100)
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="dim")
    for column in table.columns[2:7]:
        column.justify = "right"
    for row in _rows(report):
        good = "passed" if row[1] == "passed" else "failed"
        table.add_row(*(Text(cell, style=STYLES[good] if cell == row[1] else "") for cell in row))
    outcome = "passed" if report.ok else "failed"
    console.print(Text(f"{_name(report)}: ") + Text(outcome, style=f"bold {STYLES[outcome]}"))
    console.print(table)
    for line in _lines(report, page):
        console.print(Text(line), soft_wrap=True)


def plain_lines(report: Report, page: Path | None) -> Iterator[str]:
    """The same without colours, for a log."""
    yield f"{_name(report)}: {'passed' if report.ok else 'failed'}"
    table = [COLUMNS, *_rows(report)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    for row in table:
        cells = [
            cell.rjust(width) if 2 <= column < 7 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    yield from _lines(report, page)


def _name(report: Report) -> str:
    note = "fast: this is not full" if report.profile == "fast" else report.profile
    drift = f"; {report.drift}" if report.drift else ""
    return f"{report.session} on {report.image.name} ({note}{drift})"


def _counts(tier: Tier) -> tuple[int, int, int]:
    """Tests that passed, that failed, that did not run."""
    return len(tier.passed), len(tier.failed), len(tier.not_run) + len(tier.not_selected)


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    for tier in report.tiers:
        total, nearest = tier.total, tier.tightest
        yield (
            tier.tier,
            "passed" if tier.ok else tier.outcome if tier.outcome != "passed" else "incomplete",
            *map(str, _counts(tier)),
            f"{tier.seconds:.1f}",
            f"{total.limit.ceiling:.0f}" if total else "-",
            f"{nearest.headroom} ({nearest.name})" if nearest else "-",
        )
    counts = [_counts(tier) for tier in report.tiers]
    use = report.use
    yield (
        "session",
        "passed" if report.ok else "failed",
        *(str(sum(row[column] for row in counts)) for column in range(3)),
        f"{use.seconds:.1f}",
        f"{use.limit.ceiling:.0f}" if use.limit.ceiling else "-",
        use.headroom or "-",
    )


def _lines(report: Report, page: Path | None) -> Iterator[str]:
    if report.verification and report.drifted:
        yield f"versions: {report.verification.sentence}"
    for _, test in report.tests:
        if test.failed:
            where = f" in {test.phase}" if test.phase else ""
            yield one_line(f"{test.outcome}{where}: {test.id}: {test.message}")
    for tier in report.tiers:
        if not tier.ok and tier.why:
            yield one_line(f"{tier.tier}: {tier.why}")
        if tier.not_run:
            yield f"{tier.tier}: {plural(len(tier.not_run), 'test')} did not run"
        for survivor in tier.survivors:
            yield one_line(f"{tier.tier}: still running after it: {survivor}")
    for absent in report.not_run:
        yield one_line(f"not run: {absent.what}: {absent.reason}")
    if page:
        yield f"report: {page}"

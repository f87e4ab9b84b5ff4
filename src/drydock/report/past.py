"""Earlier runs of the same session in the same image, for headroom over time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from drydock.errors import DrydockError
from drydock.report.documents import DOCUMENT, Report, read

MOST_RUNS = 30
"""Runs shown, this one among them: as many as a narrow chart tells apart."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Earlier runs, oldest first, and one line for every document that could not be used."""

    runs: tuple[Report, ...] = ()
    notes: tuple[str, ...] = ()


def history(folder: Path, report: Report) -> History:
    """The runs before `report` that are kept in folders beside it: same session, same image's name.

    A document that is broken, or of another schema, is a note: the past never breaks the present.

    Parameters:
        folder: what holds one folder a run.
    """
    newest: dict[Path, float] = {}
    for path in folder.glob(f"*/{DOCUMENT}"):
        try:
            # Resolved, since `latest` names one of the others.
            newest[path.resolve()] = path.stat().st_mtime
        except OSError:
            continue  # a link to what is gone
    runs: list[Report] = []
    notes: list[str] = []
    for path in sorted(newest, key=lambda path: newest[path], reverse=True):
        if len(runs) == MOST_RUNS - 1:
            break
        try:
            earlier = read(path)
        except DrydockError as error:
            notes.append(f"left out: {error}")
            continue
        same = (earlier.session, earlier.image.name) == (report.session, report.image.name)
        if same and earlier.began < report.began:
            runs.append(earlier)
    return History(runs=tuple(sorted(runs, key=lambda run: run.began)), notes=tuple(notes))

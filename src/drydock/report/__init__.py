"""The report of a run: its `report.json`, JUnit XML for CI, one HTML page for people, a table for a terminal.

The page and the XML file are made of the document alone, so they can be made again at any time:
`drydock report FOLDER`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drydock.errors import DrydockError
from drydock.report.documents import DOCUMENT, Report, parse, read
from drydock.report.past import History, history
from drydock.report.terminal import show

__all__ = ["DOCUMENT", "JUNIT", "PAGE", "History", "Report", "history", "read", "summary", "write"]

JUNIT = "junit.xml"
PAGE = "report.html"


def write(document: Mapping[str, Any] | Path, folder: Path, *, quiet: bool = False) -> Report:
    """Write `report.json`, `junit.xml` and `report.html` of a run into its folder.

    Runs in the folders beside it are its history.

    Parameters:
        document: the session's document, or the path of one, which is then not written again if it is the
            folder's own.
        quiet: do not say on standard error that there is no page where what it takes is not installed.

    Raises:
        DrydockError: the document is not ours, or the folder cannot be written.

    >>> write(Path("results/vllm_fast/latest/report.json"), Path("results/vllm_fast/latest")).outcome
    'passed'
    """
    from drydock.report.junit import junit

    report = read(document) if isinstance(document, Path) else parse(document)
    earlier = history(folder.absolute().parent, report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The document first: the others can be made of it again.
        if not isinstance(document, Path):
            (folder / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
        elif document.resolve() != (folder / DOCUMENT).resolve():
            shutil.copyfile(document, folder / DOCUMENT)
        (folder / JUNIT).write_bytes(junit(report))
        try:
            from drydock.report.page import page
        except ModuleNotFoundError as error:
            # In an image, whose packages are the stack's own.
            say = (
                f"no {PAGE}: {error.name} is not installed here; `drydock report {folder}` makes it elsewhere"
            )
            if not quiet:
                print(say, file=sys.stderr)
            return report
        (folder / PAGE).write_text(page(report, earlier), encoding="utf-8")
    except OSError as error:
        raise DrydockError(f"cannot write the report in {folder}: {error.strerror}") from error
    return report


def summary(document: Mapping[str, Any] | Report, folder: Path | None = None) -> None:
    """Print a run's short table and failures on standard output.

    Parameters:
        folder: where its page is, if it has been written.
    """
    report = document if isinstance(document, Report) else parse(document)
    show(report, folder / PAGE if folder and (folder / PAGE).is_file() else None, sys.stdout)

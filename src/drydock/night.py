"""The page of a night: every session that was to run, with its report, its failure, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from drydock.ci import Plan, Session
from drydock.errors import DrydockError
from drydock.report import DOCUMENT, PAGE, Report, read, write


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One session of the plan, and what became of it; `report` is None where it left none that can be read."""

    session: Session
    report: Report | None
    page: str
    detail: str

    @property
    def passed(self) -> bool:
        """Whether there is a report, of that very image, and it says so."""
        return self.report is not None and self.report.ok and self.report.image.digest == self.session.digest


def artifact(session: Session) -> str:
    """What its results are called when they are uploaded."""
    return f"{session.session}-{session.image}"


def publish(made: Plan, results: Path, site: Path) -> list[Outcome]:
    """Write a site of static pages: one for each session's report, and the index that names them all.

    Parameters:
        results: holds a folder for each session, named by `artifact`, with its `report.json` somewhere in it.
        site: made new.

    Raises:
        DrydockError: the site is there already, or cannot be written.
    """
    try:
        site.mkdir(parents=True)
    except OSError as error:
        raise DrydockError(
            f"cannot make {site}: {error.strerror}: name a folder that is not there"
        ) from error
    outcomes = [_outcome(session, results, site) for session in made.tiers]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("night.html.jinja").render(outcomes=outcomes, not_run=made.not_run)
    (site / "index.html").write_text(text, encoding="utf-8")
    return outcomes


def _outcome(session: Session, results: Path, site: Path) -> Outcome:
    found = sorted((results / artifact(session)).rglob(DOCUMENT))
    if len(found) != 1:
        detail = f"{len(found)} reports" if found else "it left no report: see the job's log"
        return Outcome(session=session, report=None, page="", detail=detail)
    try:
        report = read(found[0])
        # A folder above of its own, since reports in the folders beside it are taken for its history.
        folder = site / session.image / session.session
        write(found[0], folder)
    except DrydockError as error:
        return Outcome(session=session, report=None, page="", detail=str(error))
    detail = report.verdict
    if report.image.digest != session.digest:
        detail = f"of another image: {report.image.digest or 'it does not say which'}"
    page = (folder / PAGE).relative_to(site).as_posix()
    return Outcome(session=session, report=report, page=page, detail=detail)

"""`drydock budget`: the time budgets of the tiers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

budget = typer.Typer(help="The time budgets of the tiers.", no_args_is_help=True)


@budget.callback()
def _group() -> None:
    """The time budgets of the tiers."""


@budget.command()
def propose(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="report.json files, or folders that hold them")
    ],
    loosen: Annotated[
        str | None, typer.Option("--loosen", metavar="REASON", help="entries may become looser; why")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="put it into tests/budgets.toml")] = False,
) -> None:
    """Print the budget table that at least three passed runs of one image and profile suggest.

    Without --loosen no ceiling rises and no floor falls.
    """
    from drydock.project import project_root
    from drydock.propose import propose as make
    from drydock.propose import read_runs, splice

    path = project_root() / "tests" / "budgets.toml"
    table = make(read_runs(runs), path, loosen)
    print(table.text, end="")
    for note in table.notes:
        print(f"drydock: {note}", file=sys.stderr)
    if write:
        path.write_text(splice(path.read_text() if path.exists() else "", table))

"""`drydock ci`: what the workflows under `.github/workflows` decide and write."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from drydock.errors import DrydockError
from drydock.project import open_store, project_root

ci = typer.Typer(help="What the workflows decide: images, sessions, machines, time.", no_args_is_help=True)

Base = Annotated[str, typer.Option("--base", metavar="REVISION", help="what the checkout is compared with")]
Profile = Annotated[str, typer.Option("--profile", help="of the tiers: fast or full")]
Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
GitHub = Annotated[
    bool,
    typer.Option("--github", help="also write the job's outputs and summary, where GitHub's runner says"),
]


@ci.callback()
def _group() -> None:
    """What the workflows decide: images, sessions, machines, time."""


@ci.command()
def plan(
    base: Base = "",
    profile: Profile = "fast",
    pull: Annotated[
        bool, typer.Option("--pull", help="fail where no registry is named to pull from")
    ] = False,
    as_json: Json = False,
    github: GitHub = False,
) -> None:
    """Which images a change touches, which sessions run where, and for how long; everything without --base."""
    from drydock.ci import outputs, summary

    if pull:
        from drydock.publish import registries

        registries(os.environ)
    made = _plan(base, profile)
    if github:
        _write("GITHUB_OUTPUT", _assignments(outputs(made)))
        _write("GITHUB_STEP_SUMMARY", summary(made))
    print(json.dumps(made.document()) if as_json else summary(made), end="\n" if as_json else "")


def _plan(base: str, profile: str) -> Any:
    from drydock.ci import plan as make
    from drydock.session import PROFILES

    if profile not in PROFILES:
        raise DrydockError(f"unknown profile {profile!r}: there are {' and '.join(PROFILES)}")
    return make(project_root(), base, profile, os.environ)


def _assignments(values: Mapping[str, Any]) -> str:
    """Lines of NAME=VALUE, each value as JSON, which holds no line's end; a text is itself."""
    return "".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}\n" for name, value in values.items()
    )


def _write(variable: str, text: str) -> None:
    path = os.environ.get(variable)
    if not path:
        raise DrydockError(
            f"--github: {variable} is not set, which GitHub's runner sets: leave the option out"
        )
    with Path(path).open("a") as file:
        file.write(text)


@ci.command()
def record(base: Base) -> None:
    """Build the images that the changes since a revision touch, and record their digests in lock/images.toml."""
    from drydock.refresh import record as build_them

    root = project_root()
    for built in build_them(root, open_store(root), base):
        print(f"{built.name} sha256:{built.digest}", flush=True)


@ci.command()
def notes(
    base: Base,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="where the text goes")],
    github: GitHub = False,
) -> None:
    """The text of a pull request that moves locks: versions, sizes, the contract's verdict, the matrix."""
    from drydock.refresh import notes as write_them

    root = project_root()
    text = write_them(root, open_store(root), base)
    output.write_text(text)
    if github:
        _write("GITHUB_OUTPUT", _assignments({"changed": bool(text)}))
        _write("GITHUB_STEP_SUMMARY", text or "Nothing moved.\n")
    print(f"{output}: {len(text.splitlines())} lines" if text else "nothing moved", file=sys.stderr)


@ci.command()
def page(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="a folder for each session, with its report")
    ],
    site: Annotated[Path, typer.Argument(metavar="SITE", help="made new")],
    profile: Profile = "full",
) -> None:
    """A site of the reports of all sessions, and of those that left none."""
    from drydock.night import publish

    outcomes = publish(_plan("", profile), results, site)
    for outcome in outcomes:
        state = "passed" if outcome.passed else "failed"
        print(f"{state} {outcome.session.session} in {outcome.session.image}: {outcome.detail}")
    print(site / "index.html")

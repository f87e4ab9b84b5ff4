"""What CI decides: which images a change touches, which sessions run on which machines, and for how long.

The workflows under `.github/workflows` ask `drydock ci` for it and hold nothing of it themselves.
"""

from __future__ import annotations

import math
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from drydock.build import lock_files
from drydock.definition import MACHINES, Image, Model, debian_lock_path, image_names, read_toml
from drydock.diff import text_at
from drydock.docker_runtime import SHARED_MEMORY
from drydock.errors import DrydockError
from drydock.locks import own_definition, own_part
from drydock.matrix import table
from drydock.plan import ASSEMBLER, LIBRARIES
from drydock.publish import VARIABLE, registries
from drydock.published import RECORDS, read_records
from drydock.session import PATIENCE, TIERS
from drydock.tiers.budgets import NoBudget, session_ceiling
from drydock.vendor import unread_line

RUNNERS = ".github/runners.toml"
TOOLS = "lock/drydock.txt"
"""The lock of drydock's own tools, of which the compressor's and two others' versions decide bytes."""
READERS = ("definition", "locks", "naming", "vendor")
"""Modules that are not the assembler's own, and through which a definition or a lock comes to it."""
IN_THE_IMAGE = ("src/drydock/", "tests/", "pyproject.toml")
"""What a tier's run may read of the checkout."""
OUTSIDE = ("tests/unit/", "tests/image/")
"""Of that, what no tier reads: drydock's own tests."""

Minutes = Annotated[int, Field(gt=0)]
Option = Annotated[str, Field(pattern=r"^--[A-Za-z0-9][A-Za-z0-9./:,=_-]*$")]
"""One word of a command line: the workflow splits them at spaces, so none holds one, nor what a shell expands."""


class Builder(Model):
    """The machine that builds images, and for how long it may at one and at all of them."""

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    minutes: Minutes
    all_minutes: Minutes


class Allowance(Model):
    """Minutes beside a session's ceiling: for pulling its image, and in the ceiling's place where there is none."""

    pull_minutes: Minutes
    unbudgeted_minutes: Minutes


class Machine(Model):
    """The machine for one hardware's tiers; `docker` are options of `docker run`."""

    labels: Annotated[tuple[str, ...], Field(min_length=1)]
    docker: tuple[Option, ...] = ()


class Runners(Model):
    """`.github/runners.toml`."""

    build: Builder
    tiers: Allowance
    hardware: dict[str, Machine]


@dataclass(frozen=True, kw_only=True)
class Touched:
    """Why a change asks for work: image -> lines, of images to build and of images whose tiers are to run."""

    images: Mapping[str, list[str]]
    tiers: Mapping[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Build:
    """One image to build: an entry of GitHub's matrix."""

    image: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Session:
    """One session to run in a pulled image: an entry of GitHub's matrix.

    `arguments` are those of `drydock.session`, `docker` those of `docker run`, both to be split at spaces; `ceiling`
    is the budgets' in seconds, None where there are no budgets.
    """

    image: str
    hardware: str
    session: str
    arguments: str
    digest: str
    reference: str
    labels: tuple[str, ...]
    docker: str
    ceiling: float | None
    minutes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class NotRun:
    """What is left out, and why."""

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of CI does."""

    images: tuple[Build, ...]
    tiers: tuple[Session, ...]
    not_run: tuple[NotRun, ...]
    build: Builder
    smoke_minutes: int
    registry: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "images": [asdict(row) for row in self.images],
            "tiers": [asdict(row) for row in self.tiers],
            "not-run": [asdict(row) for row in self.not_run],
            "build": self.build.model_dump(),
            "smoke-minutes": self.smoke_minutes,
            "registry": self.registry,
        }


# ---------------------------------------------------------------------------------------------- what a change touches


def inputs(image: Image) -> dict[str, str]:
    """The files of the checkout that decide an image's digest, as paths in it -> what each is to the image."""
    root = image.root
    found = {f"src/drydock/{name}.py": "the assembler" for name in ASSEMBLER}
    found |= {f"src/drydock/{name}.py": "reads definitions and locks" for name in READERS}
    if not image.vendor:
        # A builder of the other architecture compiles the bytecode with the Python in its own architecture's lock.
        locks = [debian_lock_path(root, image.base.release, architecture) for architecture in MACHINES]
        found |= {
            str(path.relative_to(root)): "holds the Python that compiles its bytecode" for path in locks
        }
    files = {"image.toml": image.definition_path, **lock_files(image)}
    return found | {str(path.relative_to(root)): f"its {name}" for name, path in files.items()}


def changed(root: Path, base: str) -> tuple[str, list[str]]:
    """The revision where HEAD and a base parted, and the files that differ from it now, committed or not.

    Raises:
        DrydockError: git does not know that revision, or this is no checkout of git's.
    """
    # What looks like an option is none after this word.
    parted = _git(root, "merge-base", "--end-of-options", base, "HEAD").strip()
    tracked = _git(root, "diff", "--name-only", "--no-renames", "-z", parted, "--")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    return parted, sorted({*tracked.split("\0"), *new.split("\0")} - {""})


def _gone(root: Path, base: str) -> bool:
    """Whether it is a whole commit's id, which nobody mistypes, and git has no such commit."""
    command = ["git", "-C", str(root), "cat-file", "-e", f"{base}^{{commit}}"]
    return bool(re.fullmatch("[0-9a-f]{40}", base)) and bool(
        subprocess.run(command, capture_output=True, check=False).returncode
    )


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (
            (done.stderr.strip() or "they have no commit in common").splitlines()[-1].removeprefix("fatal: ")
        )
        raise DrydockError(
            f"git {words[0]}: {said}: name a revision that is here (fetch its history, all of it)"
        )
    return done.stdout


def touched(root: Path, base: str | None) -> Touched:
    """What is to be built and run for what changed since a revision; everything where there is none.

    Raises:
        DrydockError: git does not know the revision, or a definition cannot be read.
    """
    images = [image for image in _images(root) if not image.unread]
    if not base or _gone(root, base):
        why = f"{base} is gone, of a branch that was moved" if base else "there is nothing to compare with"
        everything = {image.name: [f"everything: {why}"] for image in images}
        return Touched(images=everything, tiers=everything)
    parted, paths = changed(root, base)
    tools = _moved_libraries(root, parted) if TOOLS in paths else []
    before, now = records_at(root, parted), read_records(root)
    for_images = {}
    for image in images:
        what = inputs(image)
        definition = str(image.definition_path.relative_to(root))
        if definition in paths and not _redefined(image, parted, definition):
            del what[definition]
        lines = [f"{path}: {what[path]}" for path in paths if path in what] + tools
        if before.get(image.name) != now.get(image.name):
            lines.append(f"{RECORDS}: its digest")
        if lines:
            for_images[image.name] = lines
    run = [f"{path}: runs in the image" for path in paths if _runs_in_an_image(path)]
    for_tiers = {image.name: for_images.get(image.name, []) + run for image in images}
    return Touched(images=for_images, tiers={name: lines for name, lines in for_tiers.items() if lines})


def _redefined(image: Image, base: str, path: str) -> bool:
    """Whether an image's own part of its definition's file is another than a revision had; true where that had none."""
    try:
        before = own_part(tomllib.loads(text_at(image.root, base, path)), image.engine_name)
    except (DrydockError, tomllib.TOMLDecodeError, KeyError):
        return True
    return before != own_definition(image)


def _images(root: Path) -> list[Image]:
    return [Image.named(root, name) for name in image_names(root)]


def records_at(root: Path, revision: str) -> dict[str, Any]:
    """What a revision had recorded of each image; nothing where it had no records yet."""
    if not _git(root, "ls-tree", "--name-only", "--end-of-options", revision, "--", RECORDS):
        return {}
    return tomllib.loads(text_at(root, revision, RECORDS))


def _moved_libraries(root: Path, base: str) -> list[str]:
    """A line for every library that decides bytes and whose version in the tools' lock is another than it was."""
    now = _pins((root / TOOLS).read_text())
    before = _pins(text_at(root, base, TOOLS))
    return [
        f"{TOOLS}: {name} {before.get(name)} -> {now.get(name)} decides layers' bytes"
        for name in LIBRARIES
        if before.get(name) != now.get(name)
    ]


def _pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))


def _runs_in_an_image(path: str) -> bool:
    return path.startswith(IN_THE_IMAGE) and not path.startswith(OUTSIDE)


# ------------------------------------------------------------------------------------------------------------ the plan


def plan(root: Path, base: str | None, profile: str, environ: Mapping[str, str]) -> Plan:
    """What CI does for what changed since a revision, or for everything.

    Parameters:
        base: the revision; None or nothing for everything.
        profile: of the tiers, `fast` or `full`.
        environ: has the registry that images are pulled from.

    Raises:
        DrydockError: `.github/runners.toml`, a definition or the budgets cannot be read, or git not the revision.
    """
    runners = read_toml(root / RUNNERS, Runners)
    work = touched(root, base)
    images = {image.name: image for image in _images(root)}
    defined = {image.definition.hardware for image in images.values()}
    sessions: list[Session] = []
    left_out = [
        NotRun(what=f"the tiers on {hardware}", reason=f"no image is defined for it (images/{hardware})")
        for hardware in runners.hardware
        if hardware not in defined
    ]
    left_out += [
        NotRun(what=image.name, reason=unread_line(image)) for image in images.values() if image.unread
    ]
    for name, why in work.tiers.items():
        row = _session(images[name], profile, runners, environ, _joined(why))
        (sessions if isinstance(row, Session) else left_out).append(row)  # type: ignore[arg-type]
    return Plan(
        images=tuple(Build(image=name, why=_joined(why)) for name, why in work.images.items()),
        tiers=tuple(sessions),
        not_run=tuple(left_out),
        build=runners.build,
        smoke_minutes=runners.build.minutes + _ceiling(Image.named(root, "cpu"), "fast", runners)[1],
        registry=registries(environ)[0].host if environ.get(VARIABLE) else "",
    )


def _joined(lines: Iterable[str]) -> str:
    return "; ".join(lines)


def profile_of(image: Image, profile: str) -> str:
    """What an image runs of a profile: on a CPU always fast, since full has tests that fail where there is no GPU."""
    return "fast" if image.definition.accelerator.kind == "none" else profile


def _session(
    image: Image, profile: str, runners: Runners, environ: Mapping[str, str], why: str
) -> Session | NotRun:
    hardware = image.definition.hardware
    profile = profile_of(image, profile)
    name = f"{image.engine_name}_{profile}"
    what = f"{name} in {image.name}"
    machine = runners.hardware.get(hardware)
    record = read_records(image.root).get(image.name)
    if machine is None:
        return NotRun(what=what, reason=f"no runner: {RUNNERS} has no [hardware.{hardware}]")
    if record is None:
        return NotRun(what=what, reason=f"no digest is recorded: `drydock build {image.name} --record`")
    if not environ.get(VARIABLE):
        return NotRun(what=what, reason=f"no registry to pull from: set the repository's variable {VARIABLE}")
    registry = registries(environ)[0]
    ceiling, minutes = _ceiling(image, profile, runners)
    return Session(
        image=image.name,
        hardware=hardware,
        session=name,
        arguments=f"{image.engine_name} {profile}" + (" --unbudgeted" if ceiling is None else ""),
        digest=record["digest"],
        reference=f"{registry.host}/{registry.repository(image.name)}@{record['digest']}",
        labels=machine.labels,
        docker=" ".join(("--init", f"--shm-size={SHARED_MEMORY}", *machine.docker)),
        ceiling=ceiling,
        minutes=minutes + runners.tiers.pull_minutes,
        why=why,
    )


def _ceiling(image: Image, profile: str, runners: Runners) -> tuple[float | None, int]:
    """Of a session: the budgets' ceiling in seconds, if there is one, and the minutes that it may take in CI."""
    try:
        ceiling = session_ceiling(image.root / "tests/budgets.toml", image.name, profile, TIERS)
    except NoBudget:
        ceiling = None
    if ceiling is None:
        return None, runners.tiers.unbudgeted_minutes
    # drydock ends its session itself; the runner only ends a drydock that does not.
    return ceiling, math.ceil((ceiling + PATIENCE) / 60)


# -------------------------------------------------------------------------------------------------------- for GitHub


def outputs(made: Plan) -> dict[str, Any]:
    """A job's outputs, by name: the matrices, whether they hold anything (GitHub refuses an empty one), the rest."""
    return {
        "images": {"include": [asdict(row) for row in made.images]},
        "any-images": bool(made.images),
        "tiers": {"include": [asdict(row) for row in made.tiers]},
        "any-tiers": bool(made.tiers),
        "build-labels": made.build.labels,
        "build-minutes": made.build.minutes,
        "all-minutes": made.build.all_minutes,
        "smoke-minutes": made.smoke_minutes,
        "registry": made.registry,
    }


def summary(made: Plan) -> str:
    """The plan as Markdown, for the job's summary."""
    lines = ["## Images to build", ""]
    lines += _rows(("image", "why"), [(f"`{row.image}`", row.why) for row in made.images])
    lines += ["", "## Sessions to run", ""]
    rows = [(f"`{row.image}`", row.session, ", ".join(row.labels), bound(row), row.why) for row in made.tiers]
    lines += _rows(("image", "session", "runner", "minutes at most", "why"), rows)
    lines += ["", "## Not run", ""]
    lines += _rows(("what", "reason"), [(row.what, row.reason) for row in made.not_run])
    return "\n".join(lines) + "\n"


def bound(row: Session) -> str:
    """How long a session may take in CI, and whether budgets say so."""
    return f"{row.minutes}" + ("" if row.ceiling else " (it has no budgets: a bound only)")


def _rows(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return table(header, rows) if rows else ["None."]

"""What a shell offers while somebody types: names out of the checkout's files, fast, and nothing where one is wrong.

The files are read as they are: checking them is what a command does once it is typed, and takes longer than a shell
may wait.
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from drydock.errors import DrydockError

COMPLETING = "_DRYDOCK_COMPLETE" in os.environ
"""Whether this process was started by a shell to complete a command line: typer's variable for `drydock`."""


def image_names(incomplete: str) -> list[str]:
    """The images that are defined, by the text they begin with."""
    return _beginning(_images(), incomplete)


def package_names(incomplete: str) -> list[str]:
    """The packages of all locks, Debian's and Python's."""
    return _beginning(_packages(), incomplete)


def run_folders(incomplete: str) -> list[str]:
    """The newest run of each session, as `drydock report` is given it."""
    return _beginning((str(path) for path in Path("results").glob("*/latest")), incomplete)


def runtimes(incomplete: str) -> list[str]:
    """What an image runs in."""
    return _beginning(("auto", "docker", "chroot"), incomplete)


def users(incomplete: str) -> list[str]:
    """The users that an image has."""
    return _beginning(("root", "drydock"), incomplete)


def _beginning(names: Iterator[str] | tuple[str, ...], incomplete: str) -> list[str]:
    with contextlib.suppress(DrydockError, OSError):
        return sorted({name for name in names if name.startswith(incomplete)})
    return []


def _images() -> Iterator[str]:
    from drydock.project import project_root

    for path in (project_root() / "images").glob("*/image.toml"):
        # One that somebody is about to mend hides no other.
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            engines = tomllib.loads(path.read_text()).get("engine", {})
            yield from [f"{path.parent.name}-{engine}" for engine in engines]


def _packages() -> Iterator[str]:
    from drydock.project import project_root

    for path in (project_root() / "lock").glob("*.toml"):
        yield from re.findall(r'^name = "([^"]+)"$', path.read_text(errors="replace"), re.MULTILINE)

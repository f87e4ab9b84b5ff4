"""What a shell offers while somebody types: names out of the checkout's files, fast, and nothing where one is wrong.

The files are read as they are: checking them is what a command does once it is typed, and takes longer than a shell
may wait. typer picks those that begin with what is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from drydock.errors import DrydockError
from drydock.project import project_root

COMPLETING = "_DRYDOCK_COMPLETE" in os.environ
"""Whether this process was started by a shell to complete a command line: typer's variable for `drydock`."""


def image_names() -> list[str]:
    """The images that are defined."""
    names = []
    for path in _files("images", "*/*.toml"):
        # One that somebody is about to mend hides no other.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            definition = tomllib.loads(path.read_text())
            variants = ["", *(f"-{variant}" for variant in definition["base"].get("variants", {}))]
            names += [
                f"{path.parent.name}-{engine}{end}" for engine in definition["engine"] for end in variants
            ]
    return sorted(names)


def package_names() -> list[str]:
    """The packages of all locks, Debian's and Python's."""
    names: set[str] = set()
    for path in _files("lock", "*.toml"):
        with contextlib.suppress(OSError, ValueError):
            names |= set(re.findall(r'^name = "([^"]+)"$', path.read_text(), re.MULTILINE))
    return sorted(names)


def run_folders() -> list[str]:
    """The newest run of each session here, as `drydock report` is given it."""
    return sorted(str(path) for path in Path("results").glob("*/latest"))


def runtimes() -> list[str]:
    """What an image runs in."""
    return ["auto", "chroot", "docker"]


def users() -> list[str]:
    """The users that an image has."""
    return ["drydock", "root"]


def _files(folder: str, pattern: str) -> Iterable[Path]:
    try:
        return (project_root() / folder).glob(pattern)
    except DrydockError:
        return ()

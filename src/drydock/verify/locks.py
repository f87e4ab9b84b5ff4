"""The locks that an image carries, against its manifest and against what is installed."""

from __future__ import annotations

import operator
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from drydock.verify.image import RECORDS
from drydock.verify.report import Finding
from drydock.verify.tree import Tree

Same = Callable[[str, str], bool]


def read_packages(tree: Tree, lock: str) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The `[[packages]]` of a lock."""
    path = f"{RECORDS}/{lock}"
    try:
        packages: list[dict[str, Any]] = tomllib.loads(tree.read(path).decode())["packages"]
        for package in packages:
            if not isinstance(package["name"], str) or not isinstance(package["version"], str):
                raise TypeError(f"{package['name']} has no version that is text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], [Finding(f"/{path}", f"cannot be read: {error}")]
    return packages, []


def compare_manifest(
    lock: str, locked: Mapping[str, str], manifest: Mapping[str, str], same: Same = operator.eq
) -> Iterator[Finding]:
    """Where a lock and the manifest do not say the same, by name; nothing for a lock that was not read."""
    for name in locked.keys() | manifest.keys() if locked else ():
        one, other = locked.get(name, "nothing"), manifest.get(name, "nothing")
        if not same(one, other):
            yield Finding(name, f"{lock} says {one}, manifest.json says {other}")


def compare_installed(
    locked: Mapping[str, str],
    installed: Mapping[str, Sequence[str]],
    same: Same = operator.eq,
    kind: str = "",
) -> Iterator[Finding]:
    """What is missing, extra or of another version; `kind` begins the message."""
    for name in locked.keys() | installed.keys():
        wanted, found = locked.get(name), installed.get(name, ())
        versions = ", ".join(found)
        if wanted is None:
            yield Finding(name, f"{kind}{versions} is installed, none is locked")
        elif len(found) > 1:
            yield Finding(name, f"{kind}{wanted} is locked, {versions} are installed over each other")
        elif not found or not same(found[0], wanted):
            yield Finding(name, f"{kind}{wanted} is locked, {versions or 'none'} is installed")

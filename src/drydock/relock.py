"""`drydock lock`: every lock of the named images, made anew or checked; and what changed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from drydock.apt import lock_base
from drydock.bytecode import toolchain
from drydock.definition import MACHINES, Architecture, DebianRequest, Image, debian_lock_path
from drydock.errors import DrydockError
from drydock.indexes import debian_mirrors, read_indexes
from drydock.locks import check_debian_lock, check_pylock, read_debian_lock, read_pylock
from drydock.published import read_records
from drydock.resolve import lock_image
from drydock.store import Store
from drydock.vendor import VARIABLE, lock_vendor, read_vendor_lock, unread_line

Change = dict[str, Any]


def versions(path: Path) -> dict[str, str]:
    """Package -> version of any lock of ours; nothing when there is none that can be read."""
    try:
        return versions_in(tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError):
        return {}


def versions_in(lock: Mapping[str, Any]) -> dict[str, str]:
    """Package -> version of a lock that is read; of a vendor's base, its repository -> what it is."""
    if "packages" not in lock and "manifest" in lock:
        return {lock["repository"]: f"{lock['version']} sha256:{lock['manifest'][:12]}"}
    return {package["name"]: package["version"] for package in lock["packages"]}


def lock(
    images: list[Image],
    store: Store,
    environ: Mapping[str, str],
    *,
    upgrade: tuple[str, ...] = (),
    refresh: bool = False,
    only_base: bool = False,
    only_packages: bool = False,
    named: bool = True,
) -> list[Change]:
    """Lock the bases and the Python environments of images.

    Parameters:
        only_base, only_packages: leave the other half as it is.
        named: whether somebody asked for these images, and not for all there are; then a vendor's image that nobody
            has read yet is read, or this fails.
        upgrade: packages (Debian's or Python's) that may move; all others keep their version where it
            still fits the definition.
        refresh: every package may move that the definitions let move.

    Returns:
        One entry a package that changed: lock, package, from, to (None for added and removed).

    Raises:
        DrydockError: something does not resolve, or a package to upgrade is in none of the locks.
    """
    before = {path: versions(path) for path in _paths(images, only_base, only_packages)}
    moving = {canonicalize_name(name) for name in upgrade} | set(upgrade)
    if refresh:
        moving |= {name for found in before.values() for name in found}
    unknown = [
        name
        for name in upgrade
        if not any({name, canonicalize_name(name)} & set(found) for found in before.values())
    ]
    if unknown:
        raise DrydockError(
            f"{unknown[0]} is in none of the locks: name a package of one, or ask for it in image.toml"
        )
    bases = {} if only_packages else {image.base_lock_path: image for image in images}
    for path, image in bases.items():
        if image.unread and (upgrade or not named) and not environ.get(VARIABLE):
            continue
        if image.vendor:
            # A digest does not move: what is locked of it stays right as long as it is the one asked for.
            if _vendor_problems(image):
                lock_vendor(image, environ)
            continue
        if upgrade and not moving & set(before[path]):
            continue
        lock_base(
            image.root,
            image.base,
            image.definition.architecture,
            debian_mirrors(environ),
            _kept(before[path], moving),
        )
    if not only_base:
        indexes = read_indexes(environ)
        for path, image in {image.pylock_path: image for image in images}.items():
            if upgrade and not moving & set(before[path]):
                continue
            lock_image(image, store, indexes, _kept(before[path], moving))
    return [change for path, old in before.items() for change in _changes(path, old, versions(path))]


def _paths(images: list[Image], only_base: bool, only_packages: bool) -> list[Path]:
    bases = [] if only_packages else [image.base_lock_path for image in images]
    packages = [] if only_base else [image.pylock_path for image in images]
    return list(dict.fromkeys([*bases, *packages]))


def _kept(found: dict[str, str], moving: set[str]) -> dict[str, str]:
    return {name: version for name, version in found.items() if name not in moving}


def _changes(path: Path, old: dict[str, str], new: dict[str, str]) -> list[Change]:
    return [
        {"lock": path.name, "package": name, "from": old.get(name), "to": new.get(name)}
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def check(images: list[Image]) -> dict[str, Any]:
    """Whether the locks are there, unedited, up to date with their definitions and complete; offline.

    A vendor's image that nobody has read yet has no lock. That is `open`, not wrong, as long as no image over it is
    recorded: what cannot be built can be reviewed.
    """
    rows: list[dict[str, Any]] = []
    bases: dict[tuple[int, Architecture], tuple[Path, DebianRequest]] = {
        (image.base.release, image.definition.architecture): (image.root, image.base)
        for image in images
        if not image.vendor
    }
    for (release, architecture), (root, request) in bases.items():
        rows.append(
            {
                "lock": f"debian-{release}-{architecture}",
                "problems": _base_problems(root, request, architecture),
            }
        )
    for path, image in {image.base_lock_path: image for image in images if image.vendor}.items():
        if image.unread and image.name not in read_records(image.root):
            rows.append({"lock": path.stem, "problems": [], "open": unread_line(image)})
        else:
            rows.append({"lock": path.stem, "problems": _vendor_problems(image)})
    for path, image in {image.pylock_path: image for image in images}.items():
        rows.append({"lock": path.stem, "problems": _image_problems(image)})
    return {"ok": not any(row["problems"] for row in rows), "locks": rows}


def _vendor_problems(image: Image) -> list[str]:
    try:
        read_vendor_lock(image)
    except DrydockError as error:
        return [str(error)]
    return []


def _base_problems(root: Path, request: DebianRequest, architecture: Architecture) -> list[str]:
    try:
        return check_debian_lock(request, read_debian_lock(root, request, architecture))
    except DrydockError as error:
        return [str(error)]


def _image_problems(image: Image) -> list[str]:
    try:
        problems = check_pylock(image, read_pylock(image))
        if image.vendor:
            return problems
        # A builder of either architecture must have the image's own Python, to compile for it.
        bases = [
            read_debian_lock(image.root, image.base, architecture)
            for architecture in MACHINES
            if debian_lock_path(image.root, image.base.release, architecture).is_file()
        ]
        for base in bases:
            toolchain(image.definition.python, bases[0], base)
        return problems
    except DrydockError as error:
        return [str(error)]

"""What two images differ in: packages, environment, and the layers that one who has the first pulls for the second.

An image is named as everywhere, or `IMAGE@REVISION` for what its lock was in a revision of git.
"""

from __future__ import annotations

import contextlib
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.locks import read_debian_lock, read_pylock
from drydock.naming import base_lock, definition_files, split_variant
from drydock.oci import Layer, read_image
from drydock.progress import amount
from drydock.relock import versions_in
from drydock.store import Store
from drydock.vendor import read_vendor_lock


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two: package -> version of both locks (a vendor's base is one package), variables, and its layers
    where it is built here."""

    name: str
    python: Mapping[str, str]
    base: Mapping[str, str]
    environment: Mapping[str, str]
    layers: tuple[Layer, ...] | None


def side(root: Path, store: Store, name: str) -> Side:
    """Read an image, or `IMAGE@REVISION`, whose layers are never here.

    Raises:
        DrydockError: there is no such image, lock or revision.
    """
    image_name, _, revision = name.partition("@")
    if revision:
        return _earlier(root, image_name, revision)
    image = Image.named(root, image_name)
    if image.vendor:
        vendor = read_vendor_lock(image)
        base = versions_in(vendor.model_dump())
    else:
        lock = read_debian_lock(root, image.base, image.definition.architecture)
        base = {package.name: package.version for package in lock.packages}
    layers: tuple[Layer, ...] | None = None
    with contextlib.suppress(DrydockError):  # it is not built here
        layers = read_image(store, image.name).layers
    return Side(
        name=image.name,
        python={package.name: package.version for package in read_pylock(image).packages},
        base=base,
        environment=image.engine.environment,
        layers=layers,
    )


def _earlier(root: Path, name: str, revision: str) -> Side:
    """An image as a revision had it, read loosely: a definition of then may have keys that none has now."""
    hardware, _, rest = name.partition("-")
    file, definition = _definition(root, revision, name)
    try:
        named = rest or definition["default-engine"]
        engine, variant = split_variant(named, definition["engine"])
        environment = definition["engine"][engine].get("environment", {})
        if definition["base"]["kind"] == "image":
            base = base_lock(file, hardware, engine, variant)
        else:
            base = f"lock/debian-{definition['base']['release']}-{definition['architecture']}.toml"
    except (KeyError, TypeError, AttributeError) as error:
        raise DrydockError(
            f"{name} is no image in {revision!r}: {error!r} is not in its definition"
        ) from error
    return Side(
        name=f"{hardware}-{named}@{revision}",
        python=versions_in(_toml(root, revision, f"lock/pylock.{hardware}-{engine}.toml")),
        base=versions_in(_toml(root, revision, base)),
        environment=environment,
        layers=None,
    )


def _definition(root: Path, revision: str, image: str) -> tuple[str, dict[str, Any]]:
    """The name of the file that defined an image in a revision, and what it said."""
    *own, common = definition_files(image)
    for file in own:
        with contextlib.suppress(DrydockError):  # there was none
            return Path(file).name, _toml(root, revision, file)
    return Path(common).name, _toml(root, revision, common)


def _toml(root: Path, revision: str, path: str) -> dict[str, Any]:
    return tomllib.loads(text_at(root, revision, path))


def text_at(root: Path, revision: str, path: str) -> str:
    """A file as a revision had it.

    Raises:
        DrydockError: it had none.
    """
    # What looks like an option is none after this word.
    shown = subprocess.run(
        ["git", "-C", str(root), "show", "--end-of-options", f"{revision}:{path}"],
        capture_output=True, check=False,
    )  # fmt: skip
    if shown.returncode:
        raise DrydockError(f"git has no {path} in {revision!r}: name a revision that has it")
    return shown.stdout.decode()


def diff(old: Side, new: Side) -> dict[str, Any]:
    """The differences as data.

    Of packages and variables: name -> [old, new], None for what is not there. Of layers, where both images are
    built: how many are in both and what is left to pull, with compressed bytes.
    """
    document: dict[str, Any] = {"old": old.name, "new": new.name}
    for what in ("python", "base", "environment"):
        before, after = getattr(old, what), getattr(new, what)
        document[what] = {
            name: [before.get(name), after.get(name)]
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        }
    document["layers"] = None
    if old.layers is not None and new.layers is not None:
        here = {layer.digest for layer in old.layers}
        # A layer that stands twice in an image is pulled once.
        wanted = {layer.digest: layer for layer in new.layers}
        shared = [layer for digest, layer in wanted.items() if digest in here]
        pulled = [layer for digest, layer in wanted.items() if digest not in here]
        document["layers"] = {
            "of": len(wanted),
            "shared": len(shared),
            "shared_bytes": sum(layer.size for layer in shared),
            "pulled_bytes": sum(layer.size for layer in pulled),
            "pulled": [{"title": layer.title, "bytes": layer.size} for layer in pulled],
        }
    return document


def text_lines(document: dict[str, Any]) -> Iterator[str]:
    """The differences for people."""
    yield f"{document['old']} -> {document['new']}"
    for what, title in (("python", "Python"), ("base", "Base")):
        changes = document[what]
        added = [name for name, (before, _) in changes.items() if before is None]
        removed = [name for name, (_, after) in changes.items() if after is None]
        moved = [name for name in changes if name not in {*added, *removed}]
        yield f"{title} packages: {len(moved)} moved, {len(added)} added, {len(removed)} removed"
        yield from (f"  {name} {changes[name][0]} -> {changes[name][1]}" for name in moved)
        yield from (f"  + {name} {changes[name][1]}" for name in added)
        yield from (f"  - {name} {changes[name][0]}" for name in removed)
    for name, (before, after) in document["environment"].items():
        yield f"environment: {name}: {_spelled(before)} -> {_spelled(after)}"
    layers = document["layers"]
    if layers is None:
        yield "layers: compared when both are built here: `drydock build`"
        return
    yield (
        f"layers: {layers['shared']} of {layers['of']} shared ({amount(layers['shared_bytes'])}), "
        f"{len(layers['pulled'])} to pull ({amount(layers['pulled_bytes'])})"
    )
    yield from (f"  {amount(layer['bytes']):>9}  {layer['title']}" for layer in layers["pulled"])


def _spelled(value: str | None) -> str:
    return "not set" if value is None else value

"""What a machine that holds an image pulls when its engine moves by a release, in layers and in one layer.

Both images, before and after, are built from locks that differ in the engine's wheel alone; dependencies are
kept, so a real bump that moves some of them pulls their layers as well. The one-layer image is what a
Dockerfile with one `pip install` makes: the whole venv, compressed by the same library at the same level.
"""

from __future__ import annotations

import zipfile
from argparse import Namespace
from email.parser import HeaderParser
from pathlib import Path
from typing import IO, cast

from common import (
    Document,
    Parser,
    as_one_layer,
    bumped_project,
    drydock,
    gigabytes,
    main,
    need_space,
    other_release,
    say,
    seed,
    seed_layers,
    venv_layers,
    work_folder,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from drydock.build import Inputs
from drydock.definition import Image
from drydock.locks import Artifact
from drydock.oci import Layer, read_image
from drydock.project import open_store, project_root
from drydock.store import Store

NOTES = {
    "layers": "bytes of the new image's layers that the old one does not have, config and manifest",
    "one-layer": "the venv of the new image, bytecode included, as one zstd layer; its base is not pulled",
    "dependencies": "kept as locked; `unmet` are those that the other release asks for in another version",
    "unchanged-bytes": (
        "of the engine's wheel, bytes of files that are the same in both releases: pulled again, "
        "since a layer is the smallest thing a registry hands out"
    ),
}


def measure(arguments: Namespace) -> Document:
    root = project_root()
    image = Image.named(root, arguments.image)
    source = open_store(root)
    locked = read_image(source, image.name)
    engine = image.engine.distribution
    with work_folder(arguments.work, source) as work:
        need_space(work, 3 * max(layer.size for layer in locked.layers))
        store = Store(work / "store")
        seed(source, store, Inputs(image).artifacts(), image.name)
        seed_layers(source, store, locked.layers)
        drydock(image.root, store.root, "build", image.name)
        locked = read_image(store, image.name)
        here = next(package.wheel for package in Inputs(image).lock.packages if package.name == engine)
        artifact = other_release(image, engine, store)
        say(f"building {image.name} with {engine} {artifact.version} in place of {here.version}")
        other = bumped_project(image, artifact, work / "project")
        drydock(other.root, store.root, "build", image.name)
        bumped = read_image(store, image.name)
        newer = Version(artifact.version) > Version(here.version)
        before, after = (locked, bumped) if newer else (bumped, locked)
        old, new = (here, artifact) if newer else (artifact, here)
        held = {layer.digest for layer in before.layers}
        layers = [layer for layer in after.layers if layer.digest not in held]
        documents = sum(store.path(digest).stat().st_size for digest in (after.digest, after.config_digest))
        pulled = sum(layer.size for layer in layers) + documents
        venv = venv_layers(other if newer else image, after)
        count = _Count()
        as_one_layer(store, venv, cast(IO[bytes], count))
        one = count.size
        return {
            "image": image.name,
            "engine": {
                "distribution": engine,
                "from": old.version,
                "to": new.version,
                "patch": Version(old.version).release[:2] == Version(new.version).release[:2],
            },
            "layers": {
                "pulled": pulled,
                "of": after.size + documents,
                "config-and-manifest": documents,
                "new": [
                    {"title": layer.title, "size": layer.size, "why": _why(layer, engine)} for layer in layers
                ],
                "kept": len(after.layers) - len(layers),
            },
            "one-layer": {
                "pulled": one + documents,
                "size": one,
                "unpacked": sum(layer.unpacked for layer in venv),
            },
            "ratio": round((one + documents) / pulled, 2),
            "wheel": _same_files(store, old, new),
            "dependencies": {"unmet": _unmet(store, image, artifact)},
            "notes": NOTES,
        }


def _why(layer: Layer, engine: str) -> str:
    if any(entry.partition(" ")[0] == engine for entry in layer.contents):
        others = len(layer.contents) - 1
        return "holds the engine, " + (
            f"and {others} small packages of its bucket" if others else "nothing else"
        )
    if not layer.contents:
        return "says what the image is made of, so it changes with every lock"
    return "its inputs changed"


class _Count:
    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept."""


def _same_files(store: Store, old: Artifact, new: Artifact) -> Document:
    """How much of a wheel is files that another release of it has too, by path, size and CRC."""

    def files(artifact: Artifact) -> dict[str, tuple[int, int]]:
        with zipfile.ZipFile(store.path(artifact.sha256)) as wheel:
            return {entry.filename: (entry.file_size, entry.CRC) for entry in wheel.infolist()}

    before, after = files(old), files(new)
    same = [name for name, facts in after.items() if before.get(name) == facts]
    return {
        "size": new.size,
        "files": len(after),
        "unchanged-files": len(same),
        "bytes": sum(size for size, _ in after.values()),
        "unchanged-bytes": sum(after[name][0] for name in same),
    }


def _unmet(store: Store, image: Image, wheel: Artifact) -> list[str]:
    """What a wheel asks for and the image's lock does not give."""
    locked = {package.name: package.version for package in Inputs(image).lock.packages}
    locked |= {wheel.name: wheel.version}
    environment = {
        "python_version": image.definition.python,
        "python_full_version": f"{image.definition.python}.0",
        "platform_machine": image.machine,
        "extra": "",
    }
    with zipfile.ZipFile(store.path(wheel.sha256)) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    unmet = []
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        found = locked.get(canonicalize_name(requirement.name))
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier} (locked: {found or 'no'})")
    return sorted(unmet)


def table(document: Document) -> str:
    engine, layers, one = document["engine"], document["layers"], document["one-layer"]
    wheel = document["wheel"]
    kind = "a patch" if engine["patch"] else "the nearest release, no patch of it being there"
    lines = [
        f"{document['image']}: {engine['distribution']} {engine['from']} -> {engine['to']}, {kind}, the rest kept",
        f"{'in layers':<12} {gigabytes(layers['pulled']):>10}  of {gigabytes(layers['of'])}",
        *(
            f"{'':<12} {gigabytes(layer['size']):>10}  {layer['title']}: {layer['why']}"
            for layer in layers["new"]
        ),
        f"{'':<12} {gigabytes(layers['config-and-manifest']):>10}  config and manifest",
        f"{'one layer':<12} {gigabytes(one['pulled']):>10}  {document['ratio']:.2f} times as much",
        f"of the wheel's {gigabytes(wheel['bytes'])} unpacked, {gigabytes(wheel['unchanged-bytes'])} are in "
        f"files that did not change ({wheel['unchanged-files']} of {wheel['files']})",
    ]
    if document["dependencies"]["unmet"]:
        lines.append(f"would move as well: {', '.join(document['dependencies']['unmet'])}")
    return "\n".join([*lines, "", *(f"{key}: {note}" for key, note in document["notes"].items())])


def _parser() -> Parser:
    parser = Parser(prog="pull.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", default="h100-vllm", help="a built image, as `drydock images` lists them")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where to work (default: the store's)")
    return parser


if __name__ == "__main__":
    main(_parser(), measure, table)

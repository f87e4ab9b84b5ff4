"""`drydock rebuild`: a published image made again from the locks that it carries, and compared bit for bit."""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import zstandard

from drydock.build import SHARE, Inputs, build, lock_files
from drydock.bytecode import builder_architecture
from drydock.debs import checked
from drydock.definition import DebianBase, Image, debian_lock_path, read_definition
from drydock.errors import DrydockError
from drydock.locks import Artifact
from drydock.oci import Built, Layer
from drydock.publish import Source, take_parts
from drydock.store import Store, sha256_file

LARGEST_FILE = 16 << 20
"""Bytes of a lock or definition that an image carries; ours have some 100,000."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A layer that is another: hex sha256 of its blob as published and as made here, None where there is none.

    `content` is whether the tar inside differs too, and not only its compression.
    """

    title: str
    published: str | None
    made: str | None
    content: bool


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """What came out of it: hex sha256 of both manifests, and the layers that differ."""

    published: Built
    made: Built
    differences: tuple[Difference, ...]
    seconds: float

    @property
    def same(self) -> bool:
        """Whether it is bit for bit the same."""
        return self.made.digest == self.published.digest


def rebuild(
    root: Path,
    store: Store,
    source: Source,
    digest: str,
    environ: Mapping[str, str],
    get: Callable[[list[Artifact]], object],
    *,
    jobs: int | None = None,
) -> Rebuilt:
    """Make every layer of a published image again, from nothing but artifacts, and compare.

    Parameters:
        root: a checkout; of it only the lock of this machine's architecture is read, for an image of another one.
        source: where the image is, if the store has not got its manifest, its config and its locks.
        digest: hex sha256 of its manifest.
        get: fetches artifacts that the store lacks.

    Raises:
        DrydockError: it is not to be had, does not carry what it was made of, or cannot be built.
    """
    began = time.monotonic()
    name = source.repository
    title = f"manifest of {name}"
    published = take_parts(store, source, digest, environ, lambda layer: layer.title == title)
    reference = f"{name}@sha256:{digest}"
    _check_name(store, published, reference)
    with store.scratch() as scratch:
        folder = scratch / "project"
        try:
            image = _project(folder, _files(store, published, title), name)
            _lend_lock(image, root)
            Inputs(image)
        except DrydockError as error:
            said = str(error).replace(f"{folder}/", "")
            raise DrydockError(
                f"{reference} carries what this drydock does not build: {said}; an older image takes the drydock of "
                "its time"
            ) from error
        # A store of its own: what was made before, by whatever assembler, proves nothing.
        empty = Store(scratch / "store")

        def bring(artifacts: list[Artifact]) -> None:
            get(artifacts)
            for artifact in artifacts:
                checked(store, artifact)
                store.link(artifact.sha256, empty.path(artifact.sha256))

        made, _ = build(image, empty, bring, jobs)
    return Rebuilt(
        published=published,
        made=made,
        differences=tuple(_differences(published, made)),
        seconds=time.monotonic() - began,
    )


def _check_name(store: Store, published: Built, reference: str) -> None:
    config = json.loads(store.path(published.config_digest).read_bytes())
    name = (config["config"].get("Labels") or {}).get("dev.drydock.image")
    if name != published.name:
        raise DrydockError(f"{reference} is {name or 'no image of drydock'}, by its label")


def _files(store: Store, published: Built, title: str) -> dict[str, bytes]:
    """The locks and definitions in an image's last layer, by name."""
    found: dict[str, bytes] = {}
    for layer in published.layers:
        if layer.title == title:
            if sha256_file(store.path(layer.digest)) != layer.digest:
                store.discard(layer.digest)
                raise DrydockError(
                    f"the layer with them was damaged in {store.root} and has been removed: try again"
                )
            try:
                found |= _definitions(store.path(layer.digest))
            except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
                raise DrydockError(f"the layer with them cannot be read ({error})") from error
    return found


def _definitions(layer: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with (
        layer.open("rb") as blob,
        zstandard.ZstdDecompressor().stream_reader(blob) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            path = PurePosixPath(member.name)
            if str(path.parent) == SHARE and path.suffix == ".toml" and member.isreg():
                if member.size > LARGEST_FILE:
                    raise DrydockError(f"{path.name} has {member.size} bytes")
                file = tar.extractfile(member)
                assert file
                found[path.name] = file.read()
    return found


def _project(folder: Path, files: Mapping[str, bytes], name: str) -> Image:
    """A checkout with nothing but what the image carries."""

    def write(file: str, path: Path) -> None:
        if file not in files:
            raise DrydockError(f"there is no {file}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[file])

    definition_path = folder / "images" / name.partition("-")[0] / "image.toml"
    write("image.toml", definition_path)
    base = read_definition(definition_path).base
    if isinstance(base, DebianBase):
        write("debian-request.toml", folder / "images" / f"debian-{base.release}.toml")
    image = Image.named(folder, name)
    for file, path in lock_files(image).items():
        write(file, path)
    return image


def _lend_lock(image: Image, root: Path) -> None:
    """For an image of another architecture, this machine's lock, whose Python compiles its bytecode.

    An image does not carry it; any with the same version of Python gives the same bytes.
    """
    builder = builder_architecture()
    if image.vendor or builder == image.definition.architecture:
        return
    ours = debian_lock_path(root, image.base.release, builder)
    if not ours.is_file():
        raise DrydockError(f"on {builder} that takes {ours}, which is missing")
    shutil.copyfile(ours, debian_lock_path(image.root, image.base.release, builder))


def _differences(published: Built, made: Built) -> list[Difference]:
    theirs, ours = ({layer.title: layer for layer in built.layers} for built in (published, made))
    found = []
    for title in theirs | ours:
        there, here = theirs.get(title), ours.get(title)
        if there is None or here is None or there.digest != here.digest:
            content = there is None or here is None or there.diff_id != here.diff_id
            found.append(Difference(title=title, published=_blob(there), made=_blob(here), content=content))
    return found


def _blob(layer: Layer | None) -> str | None:
    return layer.digest if layer else None

"""OCI images: config, manifest, layout directory and archive, from layers that lie in the store."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.store import CHUNK, Store, disk_errors

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
INDEX = "application/vnd.oci.image.index.v1+json"

VENDOR = "dev.drydock.layer.vendor"
"""Annotation of a layer that is a vendor's."""
EPOCH = 315532800
"""1980-01-01, the time of everything in an image: the first one that a zip file can hold, so that wheels
can still be built from files in the image."""
CREATED = "1980-01-01T00:00:00Z"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: `digest` and `size` (bytes) of the compressed blob, `diff_id` of the tar inside, all hex sha256.

    `title` says what is in it, `contents` names it piece by piece, `key` is the hash of what it was made
    from; `made` is whether this build made it or found it. `vendor` is one of a vendor's base, which a build does not
    have. Of a layer that was pulled, nobody here knows `unpacked` (0), `contents` and `key` (empty).
    """

    digest: str
    size: int
    diff_id: str
    unpacked: int
    title: str
    contents: tuple[str, ...]
    key: str
    made: bool = False
    media_type: str = LAYER
    vendor: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    """An image in the store: hex sha256 of its manifest and config, and its layers from the base up."""

    name: str
    architecture: str
    digest: str
    config_digest: str
    layers: tuple[Layer, ...]
    environment: dict[str, str]

    @property
    def reference(self) -> str:
        """The name under which Docker holds the image."""
        return f"drydock/{self.name}:{self.config_digest[:12]}"

    @property
    def size(self) -> int:
        """Compressed bytes of all layers."""
        return sum(layer.size for layer in self.layers)


def canonical(document: dict[str, Any]) -> bytes:
    """The one spelling of a JSON document: sorted keys, no spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def config_document(
    image: Image,
    layers: tuple[Layer, ...],
    labels: dict[str, str],
    environment: dict[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The OCI image config; `rootfs.diff_ids` makes its digest the image's identity.

    Parameters:
        settings: what it takes over from a vendor's base, as OCI spells it.
    """
    return {
        "architecture": image.definition.architecture,
        "os": "linux",
        "created": CREATED,
        "author": "drydock",
        "config": {
            "Cmd": ["/bin/bash"],
            "WorkingDir": "/",
            **settings,
            "Env": [f"{name}={value}" for name, value in sorted(environment.items())],
            "Labels": labels,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
        "history": [{"created": CREATED, "created_by": f"drydock: {layer.title}"} for layer in layers],
    }


def manifest_document(config: bytes, config_digest: str, layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The OCI manifest. Each layer carries the hash of its inputs, so a store can be seeded from the image."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": f"sha256:{config_digest}", "size": len(config)},
        "layers": [
            {
                "mediaType": layer.media_type,
                "digest": f"sha256:{layer.digest}",
                "size": layer.size,
                "annotations": {
                    "dev.drydock.layer.title": layer.title,
                    **({VENDOR: "true"} if layer.vendor else {}),
                },
            }
            for layer in layers
        ],
    }


def write_image(
    store: Store,
    image: Image,
    layers: tuple[Layer, ...],
    labels: dict[str, str],
    environment: dict[str, str],
    settings: Mapping[str, Any] | None = None,
) -> Built:
    """Put config and manifest into the store and record the image under its name."""
    config = canonical(config_document(image, layers, labels, environment, settings or {}))
    config_digest = store.put(config)
    manifest = canonical(manifest_document(config, config_digest, layers))
    built = Built(
        name=image.name,
        architecture=image.definition.architecture,
        digest=store.put(manifest),
        config_digest=config_digest,
        layers=layers,
        environment=environment,
    )
    record_image(store, built)
    return built


def record_image(store: Store, built: Built) -> None:
    """Note in the store that this is the image of its name."""
    store.write_record(
        "images",
        built.name,
        {
            "architecture": built.architecture,
            "digest": built.digest,
            "config-digest": built.config_digest,
            "environment": built.environment,
            "layers": [
                {
                    "digest": layer.digest,
                    "size": layer.size,
                    "diff-id": layer.diff_id,
                    "unpacked": layer.unpacked,
                    "title": layer.title,
                    "contents": list(layer.contents),
                    "key": layer.key,
                    "media-type": layer.media_type,
                    "vendor": layer.vendor,
                }
                for layer in built.layers
            ],
        },
    )


def read_image(store: Store, name: str, whole: bool = True) -> Built:
    """The image that was last built under this name.

    Parameters:
        whole: its layers' blobs must be there; unpacked ones are enough for the chroot runtime.

    Raises:
        DrydockError: it was not built in this store, or a blob of it is gone.
    """
    record = store.read_record("images", name)
    if record is None:
        raise DrydockError(f"{name} is not built in {store.root}: run `drydock build {name}`")
    built = Built(
        name=name,
        architecture=record["architecture"],
        digest=record["digest"],
        config_digest=record["config-digest"],
        environment=record["environment"],
        layers=tuple(
            Layer(
                digest=layer["digest"],
                size=layer["size"],
                diff_id=layer["diff-id"],
                unpacked=layer["unpacked"],
                title=layer["title"],
                contents=tuple(layer["contents"]),
                key=layer["key"],
                media_type=layer.get("media-type", LAYER),
                vendor=layer.get("vendor", False),
            )
            for layer in record["layers"]
        ),
    )
    if whole and not all(layer.vendor or store.has(layer.digest, layer.size) for layer in built.layers):
        raise DrydockError(f"layers of {name} are gone from {store.root}: run `drydock build {name}`")
    return built


def _index(built: Built, manifest_size: int, reference: str) -> bytes:
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [
                {
                    "mediaType": MANIFEST,
                    "digest": f"sha256:{built.digest}",
                    "size": manifest_size,
                    "platform": {"architecture": built.architecture, "os": "linux"},
                    "annotations": {
                        "io.containerd.image.name": f"docker.io/{reference}",
                        "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
                    },
                }
            ],
        }
    )


def _members(store: Store, built: Built) -> Iterator[tuple[str, bytes | Path]]:
    absent = [layer for layer in built.layers if layer.vendor and not store.has(layer.digest, layer.size)]
    if absent:
        raise DrydockError(
            f"{len(absent)} layers of {built.name} are its base's and not here: `drydock push` it, which needs none of "
            "them, or `drydock run` it, which brings them"
        )
    manifest = store.path(built.digest).read_bytes()
    yield "oci-layout", canonical({"imageLayoutVersion": "1.0.0"})
    yield "index.json", _index(built, len(manifest), built.reference)
    yield f"blobs/sha256/{built.digest}", manifest
    yield f"blobs/sha256/{built.config_digest}", store.path(built.config_digest)
    for digest in dict.fromkeys(layer.digest for layer in built.layers):
        yield f"blobs/sha256/{digest}", store.path(digest)


def read_manifest(name: str, digest: str, manifest: dict[str, Any], config: dict[str, Any]) -> Built:
    """The image that a manifest and its config describe, as `drydock` wrote them.

    Raises:
        DrydockError: they are not.
    """
    try:
        pairs = list(zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True))
        return Built(
            name=name,
            architecture=config["architecture"],
            digest=digest,
            config_digest=hex_of(manifest["config"]["digest"]),
            environment=dict(entry.split("=", 1) for entry in config["config"]["Env"]),
            layers=tuple(
                Layer(
                    digest=hex_of(layer["digest"]),
                    size=int(layer["size"]),
                    diff_id=hex_of(diff_id),
                    unpacked=0,
                    title=layer["annotations"]["dev.drydock.layer.title"],
                    contents=(),
                    key="",
                    media_type=layer["mediaType"],
                    vendor=VENDOR in layer["annotations"],
                )
                for layer, diff_id in pairs
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DrydockError(f"sha256:{digest} is no image that drydock wrote ({error!r})") from error


def hex_of(digest: str) -> str:
    """The hex part of a digest.

    Raises:
        ValueError: it is no sha256.
    """
    found = re.fullmatch("sha256:([0-9a-f]{64})", digest)
    if not found:
        raise ValueError(f"{digest!r} is no sha256")
    return found[1]


def write_layout(store: Store, built: Built, folder: Path) -> None:
    """Write the image as an OCI layout directory; blobs are hard links into the store where they can be."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "oci-layout").is_file():
        raise DrydockError(f"{folder} is not empty and not an OCI layout: name another folder")
    with disk_errors(folder):
        for name, content in _members(store, built):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                temporary = path.with_name(f".{path.name}")
                temporary.write_bytes(content)
                temporary.rename(path)
            else:
                store.link(content.name, path)


def write_archive(
    store: Store, built: Built, file: IO[bytes], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write the image as an OCI archive (one tar, the same bytes every time).

    `advance` is called with the number of bytes written since its last call.
    """
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT, bufsize=CHUNK) as tar:
        for name, content in _members(store, built):
            info = tarfile.TarInfo(name)
            info.mtime = EPOCH
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
                continue
            info.size = content.stat().st_size
            with content.open("rb") as blob:
                tar.addfile(info, _Counted(blob, advance))


class _Counted:
    """A reader that tells how much went through it."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data

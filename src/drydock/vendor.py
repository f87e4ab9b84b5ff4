"""A vendor's image as a base: its manifest and config, read from a registry once and locked; its layers stay there.

`lock/base-<hardware>.toml` holds what a build over it needs: the layers' digests, sizes and diff IDs, and what its
config says of environment, user and entry point. A build reads nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from pydantic import Field

from drydock.definition import Architecture, Image, Model, VendorBase
from drydock.errors import DrydockError
from drydock.locks import Sha256, Size, read_sealed, sha256_json, write_lock
from drydock.oci import CONFIG, INDEX, LAYER, MANIFEST, Built, Layer, hex_of
from drydock.publish import Source, take_blobs
from drydock.registry import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    LARGEST_CONFIG,
    Client,
    Refused,
    Registry,
    first_of,
    read_object,
)
from drydock.store import Store
from drydock.transfer import Patience

VARIABLE = "DRYDOCK_BASE_REGISTRY"
"""Registries that hold vendors' images, separated by spaces, in the order in which they are asked."""
MOST_LAYERS = 127
"""Of an image as a whole: containerd's limit."""
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYERS = {
    LAYER: LAYER,
    GZIP: GZIP,
    "application/vnd.oci.image.layer.v1.tar": "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": LAYER,
}
"""Media type of a layer as a manifest has it -> as OCI has it. Layers that may not be pushed are not among them."""
CONFIGS = (CONFIG, "application/vnd.docker.container.image.v1+json")


class VendorLayer(Model):
    """One layer of the base: `digest` of the compressed blob, `size` in bytes, `diff_id` of the tar inside."""

    digest: Sha256
    size: Size
    diff_id: Sha256
    media_type: str


class VendorLock(Model):
    """`lock/base-<hardware>.toml`. `manifest` is the digest of the platform's own manifest, which differs from the
    definition's where that is an index."""

    repository: str
    version: str
    architecture: Architecture
    manifest: Sha256
    inputs: Sha256
    content: Sha256
    environment: tuple[str, ...]
    user: str = ""
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default={})
    layers: Annotated[tuple[VendorLayer, ...], Field(min_length=1)]

    @property
    def settings(self) -> dict[str, Any]:
        """What an image over it takes over for its config, as OCI spells it."""
        named = {
            "User": self.user,
            "WorkingDir": self.working_dir or "/",
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.command),
        }
        return {name: value for name, value in named.items() if value}


def vendor_inputs(base: VendorBase, architecture: Architecture) -> dict[str, Any]:
    """What of a definition decides the lock of its base."""
    return {"repository": base.repository, "digest": base.digest, "architecture": architecture}


def read_vendor_lock(image: Image) -> VendorLock:
    """Read the lock of an image's base.

    Raises:
        DrydockError: missing, malformed, edited by hand, or out of date with the definition.
    """
    assert image.vendor
    remedy = f"run `drydock lock --base {image.name}`"
    lock: VendorLock = read_sealed(image.vendor_lock_path, VendorLock, remedy)
    if lock.inputs != sha256_json(vendor_inputs(image.vendor, image.definition.architecture)):
        where = image.definition_path.relative_to(image.root)
        raise DrydockError(f"{image.vendor_lock_path} is out of date with {where}: {remedy}")
    return lock


def unread_line(image: Image) -> str:
    """What is to be done about a base that nobody has read yet."""
    return f"its base is not read yet: run `drydock lock --base {image.name}` where a registry has it"


def vendor_layers(lock: VendorLock) -> tuple[Layer, ...]:
    """The base's layers, as an image over it names them."""
    return tuple(
        Layer(
            digest=layer.digest,
            size=layer.size,
            diff_id=layer.diff_id,
            unpacked=0,
            title=f"{lock.repository} {lock.version}, layer {number} of {len(lock.layers)}",
            contents=(),
            key="",
            media_type=layer.media_type,
            vendor=True,
        )
        for number, layer in enumerate(lock.layers, 1)
    )


def base_registries(environ: Mapping[str, str]) -> list[Registry]:
    """Where vendors' images are.

    Raises:
        DrydockError: nowhere, or one of them is none.
    """
    texts = environ.get(VARIABLE, "").split()
    if not texts:
        raise DrydockError(
            f"no registry of base images is named: set {VARIABLE} to HOST[:PORT][/PATH] of who publishes it, "
            "or of a mirror"
        )
    return [Registry.read(text) for text in texts]


def vendor_source(image: Image, environ: Mapping[str, str]) -> Source:
    """Where the base of an image is.

    Raises:
        DrydockError: as `base_registries`.
    """
    assert image.vendor
    return Source(
        repository=image.vendor.repository,
        places=base_registries(environ),
        remedy=f"set {VARIABLE} to a registry that has it",
    )


def lock_vendor(image: Image, environ: Mapping[str, str], patience: Patience | None = None) -> VendorLock:
    """Read an image's base from the first registry that has it, and write its lock. No layer is downloaded.

    Raises:
        DrydockError: no registry has exactly that digest for the image's platform, or it is no image for Linux.
    """
    base = image.vendor
    assert base
    source = vendor_source(image, environ)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Client.configured(place, environ, patience)) for place in source.places
        ]
        _, data = first_of(
            clients,
            lambda client: _read(client, client.registry.repository(base.repository), image),
            f"{base.repository}@{base.digest}",
            source.remedy,
        )
    write_lock(image.vendor_lock_path, data)
    return read_vendor_lock(image)


def have_layers(
    store: Store, image: Image, built: Built, environ: Mapping[str, str], patience: Patience | None = None
) -> None:
    """Bring the layers of an image's base into the store, which running it takes and building does not.

    Raises:
        OutOfSpace: they do not fit on the store's disk.
        DrydockError: no registry of bases has them.
    """
    missing = {
        layer.digest: layer.size
        for layer in built.layers
        if layer.vendor and not store.has(layer.digest, layer.size)
    }
    if not missing:
        return
    take_blobs(store, vendor_source(image, environ), missing, environ, patience=patience)


def _read(client: Client, repository: str, image: Image) -> dict[str, Any]:
    base = image.vendor
    assert base
    architecture = image.definition.architecture
    what = f"{repository}@{base.digest}"
    try:
        digest, manifest = _platform(client, repository, hex_of(base.digest), architecture)
        if manifest["config"]["mediaType"] not in CONFIGS:
            raise Refused(f"{what} is no container image: its config is {manifest['config']['mediaType']}")
        config = _config(client, repository, manifest["config"])
        if (config.get("os"), config.get("architecture")) != ("linux", architecture):
            found = f"{config.get('os')}/{config.get('architecture')}"
            raise Refused(f"{what} is for {found}, and {image.name} is for linux/{architecture}")
        layers = _layers(manifest["layers"], config["rootfs"]["diff_ids"], what)
        settings = config.get("config") or {}
        return {
            "repository": base.repository,
            "version": base.version,
            "architecture": architecture,
            "manifest": digest,
            "inputs": sha256_json(vendor_inputs(base, architecture)),
            "environment": list(settings.get("Env") or []),
            "user": settings.get("User") or "",
            "working-dir": settings.get("WorkingDir") or "",
            "entrypoint": list(settings.get("Entrypoint") or []),
            "command": list(settings.get("Cmd") or []),
            "labels": dict(settings.get("Labels") or {}),
            "layers": layers,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{what} is no image that can be read ({error!r})") from error


def _platform(
    client: Client, repository: str, digest: str, architecture: Architecture
) -> tuple[str, dict[str, Any]]:
    """The manifest of our platform behind a digest, which may be an index's; and its own digest."""
    data, kind = client.manifest(repository, digest)
    document = read_object(data, f"{repository}@sha256:{digest}")
    kind = document.get("mediaType", kind)
    if kind in (INDEX, DOCKER_INDEX):
        platforms: dict[str, str] = {}
        for entry in document.get("manifests") or []:
            platform = entry.get("platform") or {}
            # The first of an architecture: variants (arm64/v8) come in the publisher's order.
            platforms.setdefault(f"{platform.get('os')}/{platform.get('architecture')}", entry["digest"])
        if f"linux/{architecture}" not in platforms:
            there = ", ".join(sorted(name for name in platforms if name != "unknown/unknown")) or "none"
            raise Refused(
                f"{repository}@sha256:{digest} has no image for linux/{architecture}: it has {there}"
            )
        digest = hex_of(platforms[f"linux/{architecture}"])
        data, kind = client.manifest(repository, digest)
        document = read_object(data, f"{repository}@sha256:{digest}")
        kind = document.get("mediaType", kind)
    if kind not in (MANIFEST, DOCKER_MANIFEST):
        raise Refused(f"{repository}@sha256:{digest} is no image: it is {kind or 'of no media type'}")
    return digest, document


def _config(client: Client, repository: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    digest, size = hex_of(entry["digest"]), int(entry["size"])
    if not 0 < size <= LARGEST_CONFIG:
        raise Refused(f"{repository} has a config of {size} bytes")
    data = client.small_blob(repository, digest, size)
    return read_object(data, f"{repository}@sha256:{digest}")


def _layers(entries: Sequence[Mapping[str, Any]], diff_ids: Sequence[str], what: str) -> list[dict[str, Any]]:
    if len(entries) != len(diff_ids):
        raise Refused(f"{what} has {len(entries)} layers and its config names {len(diff_ids)}")
    if len(entries) >= MOST_LAYERS:
        raise Refused(f"{what} has {len(entries)} layers, which leaves no room for ours below {MOST_LAYERS}")
    layers = []
    for entry, diff_id in zip(entries, diff_ids, strict=True):
        if entry["mediaType"] not in LAYERS:
            raise Refused(f"{what} has a layer of {entry['mediaType']}, which cannot be mounted or pushed")
        layers.append(
            {
                "digest": hex_of(entry["digest"]),
                "size": int(entry["size"]),
                "diff-id": hex_of(diff_id),
                "media-type": LAYERS[entry["mediaType"]],
            }
        )
    return layers

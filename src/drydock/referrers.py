"""What is attached to an image at a registry: artifacts whose manifests name it as their subject (OCI 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from drydock.errors import DrydockError
from drydock.oci import INDEX, MANIFEST, Built, canonical
from drydock.registry import Client, Registry, read_object
from drydock.store import Store
from drydock.transfer import Patience

EMPTY = "application/vnd.oci.empty.v1+json"
"""The media type of a config that says nothing: `{}`."""
TITLE = "org.opencontainers.image.title"
ATTEMPTS = 5
"""Times that a list is written which somebody else overwrites meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Attached:
    """An artifact at a registry: hex sha256 of its manifest, and whether it was not there before."""

    digest: str
    added: bool


def attach(
    store: Store,
    built: Built,
    registry: Registry,
    environ: Mapping[str, str],
    *,
    kind: str,
    title: str,
    data: bytes,
    patience: Patience | None = None,
) -> Attached:
    """Attach a document to an image that the registry has.

    Parameters:
        kind: its media type, by which it is found.
        title: its file name.

    Raises:
        DrydockError: the registry denies it, or cannot be asked.
    """
    repository = registry.repository(built.name)
    empty, layer = store.put(b"{}"), store.put(data)
    subject = _descriptor(MANIFEST, built.digest, store.path(built.digest).stat().st_size)
    manifest = canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": _descriptor(EMPTY, empty, 2),
            "layers": [{**_descriptor(kind, layer, len(data)), "annotations": {TITLE: title}}],
            "subject": subject,
        }
    )
    digest = sha256(manifest).hexdigest()
    with Client.configured(registry, environ, patience) as client:
        added = client.tagged(repository, f"sha256:{digest}") is None
        for blob, size in ((empty, 2), (layer, len(data))):
            if added and not client.has_blob(repository, blob, size):
                client.put_blob(repository, blob, store.path(blob))
        if not client.put_manifest(repository, f"sha256:{digest}", manifest):
            entry = {**_descriptor(MANIFEST, digest, len(manifest)), "artifactType": kind}
            _list(client, repository, built.digest, entry)
    return Attached(digest=digest, added=added)


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _list(client: Client, repository: str, subject: str, entry: Mapping[str, Any]) -> None:
    """Have an artifact in the list of those of an image, where the registry keeps none: an index under the image's
    own tag (distribution-spec, "Referrers Tag Schema")."""
    tag = f"sha256-{subject}"
    what = f"{client.registry.host}/{repository}:{tag}"
    for _ in range(ATTEMPTS):
        index: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
        if found := client.tagged(repository, tag):
            data, kind = client.manifest(repository, found)
            index = read_object(data, what)
            if index.get("mediaType", kind) != INDEX or not isinstance(index.get("manifests"), list):
                raise DrydockError(f"{what} is no list of what is attached to the image: remove that tag")
        if any(each.get("digest") == entry["digest"] for each in index["manifests"]):
            return
        # It is read again afterwards: of two that write at the same time, one loses what it added.
        client.put_manifest(
            repository, tag, canonical({**index, "manifests": [*index["manifests"], entry]}), INDEX
        )
    raise DrydockError(f"{what} is written by others at the same time: push again")

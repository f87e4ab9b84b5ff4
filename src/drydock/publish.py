"""Images to a registry and from one: `drydock push` sends what it lacks, `drydock pull` takes what is recorded.

An image is named by the digest in `lock/images.toml`. A tag, `<image>:<date>-<n>`, is for people: it is made once and
never moved, and nothing here is pulled by it.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TextIO

from drydock.errors import DrydockError, OutOfSpace
from drydock.oci import MANIFEST, Built, hex_of, read_manifest, record_image
from drydock.progress import Progress, amount
from drydock.published import read_records
from drydock.registry import (
    LARGEST_CONFIG,
    Answer,
    Client,
    Refused,
    Registry,
    first_of,
    read_object,
)
from drydock.store import Store, sha256_file
from drydock.transfer import Crew, Patience, receiving, still_to_come

VARIABLE = "DRYDOCK_REGISTRY"
"""The user's registries and mirrors, separated by spaces, in the order in which they are asked."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An image's repository and the registries that may hold it; `remedy` is what to do if none of them does."""

    repository: str
    places: Sequence[Registry]
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did. `sent` is bytes, `mounted` blobs that another repository there had."""

    reference: str
    digest: str
    blobs: int
    there: int
    mounted: int
    uploaded: int
    sent: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull did. `received` is bytes read from registries, `resumed` bytes an earlier run had left."""

    source: str
    digest: str
    blobs: int
    present: int
    received: int
    resumed: int
    seconds: float


def registries(environ: Mapping[str, str], named: str | None = None) -> list[Registry]:
    """Where images are pushed to and pulled from.

    Raises:
        DrydockError: nowhere, or one of them is none.
    """
    texts = [named] if named else environ.get(VARIABLE, "").split()
    if not texts:
        raise DrydockError(f"no registry is named: give one, or set {VARIABLE} to HOST[:PORT][/PATH]")
    return [Registry.read(text) for text in texts]


def source_of(name: str, places: Sequence[Registry]) -> Source:
    """Where an image of ours is."""
    remedy = f"push {name} there, or set {VARIABLE} to who has it"
    return Source(repository=name, places=places, remedy=remedy)


def push(
    store: Store,
    built: Built,
    registry: Registry,
    environ: Mapping[str, str],
    *,
    others: Sequence[Built] = (),
    base: Source | None = None,
    stream: TextIO | None = None,
    patience: Patience | None = None,
    today: datetime | None = None,
) -> Pushed:
    """Bring an image's blobs and manifest to a registry, and give it a tag if it has none of today.

    Parameters:
        others: images that the registry may hold too; layers that they share are mounted from their repositories.
        base: where the layers of a vendor's base are: mounted if that is the same registry, else brought from there.

    Raises:
        DrydockError: the registry denies it, or breaks off for good; what arrived is not sent again.
    """
    began = time.monotonic()
    repository = registry.repository(built.name)
    if not (store.has(built.config_digest) and store.has(built.digest)):
        raise DrydockError(f"config or manifest of {built.name} is gone from {store.root}: build it again")
    sizes = {built.config_digest: store.path(built.config_digest).stat().st_size}
    sizes |= {layer.digest: layer.size for layer in built.layers}
    theirs = {layer.digest for layer in built.layers if layer.vendor}
    bases = [
        place.repository(base.repository)
        for place in (base.places if base else ())
        if base and (place.scheme, place.host) == (registry.scheme, registry.host)
    ]
    counts = {"there": 0, "mounted": 0, "uploaded": 0, "sent": 0}
    crew, guard = Crew("push"), threading.Lock()
    with Progress("push", sum(sizes.values()), stream) as progress, ExitStack() as stack:
        client = stack.enter_context(Client.configured(registry, environ, patience, crew.stop, progress.note))

        def count(what: str, by: int = 1) -> None:
            with guard:
                counts[what] += by

        def one(digest: str) -> None:
            title = digest[:12]
            key = sha256(f"{registry.url}{repository}@{digest}".encode()).hexdigest()[:32]
            progress.start(title)
            # Another push of the same would otherwise go on with this one's session.
            with store.lock(f"push-{key[:16]}"):
                send(digest, key)
            progress.done(title)

        def elsewhere(digest: str) -> list[str]:
            """Repositories of the same registry that may hold a blob already."""
            images = [other for other in others if any(layer.digest == digest for layer in other.layers)]
            return [
                *(bases if digest in theirs else ()),
                *(registry.repository(other.name) for other in images),
            ]

        def send(digest: str, key: str) -> None:
            size = sizes[digest]
            begun = (store.read_record("uploads", key) or {}).get("location")
            if client.has_blob(repository, digest, size):
                store.drop_record("uploads", key)
                progress.advance(size)
                count("there")
            elif not begun and client.mount_blob(repository, digest, size, elsewhere(digest)):
                progress.advance(size)
                count("mounted")
            else:
                if base and digest in theirs and not store.has(digest, size):
                    take_blobs(store, base, {digest: size}, environ, patience=patience)

                def keep(location: str | None) -> None:
                    if location:
                        store.write_record("uploads", key, {"location": location})
                    else:
                        store.drop_record("uploads", key)

                sent = client.put_blob(
                    repository,
                    digest,
                    store.path(digest),
                    begun=begun,
                    keep=keep,
                    advance=progress.advance,
                )
                count("uploaded")
                count("sent", sent)

        # The largest first, so that none of them ends alone.
        crew.run(sorted(sizes, key=lambda digest: -sizes[digest]), one)
        tag = _tag(client, repository, built.digest, today or datetime.now(UTC))
        if tag.new:
            client.put_manifest(repository, tag.name, store.path(built.digest).read_bytes())
            if client.tagged(repository, tag.name) != built.digest:
                raise DrydockError(
                    f"{registry.host}/{repository}:{tag.name} was taken by somebody else at the same time: push again"
                )
    return Pushed(
        reference=f"{registry.host}/{repository}:{tag.name}",
        digest=built.digest,
        blobs=len(sizes),
        seconds=time.monotonic() - began,
        **counts,
    )


@dataclass(frozen=True)
class _Tag:
    name: str
    new: bool


def _tag(client: Client, repository: str, digest: str, today: datetime) -> _Tag:
    """Today's tag of this digest, or the next one that is free."""
    date = today.strftime("%Y%m%d")
    numbers = [
        int(found[1])
        for name in client.tags(repository)
        if (found := re.fullmatch(rf"{date}-([1-9]\d*)", name))
    ]
    for number in sorted(numbers, reverse=True):
        if client.tagged(repository, f"{date}-{number}") == digest:
            return _Tag(f"{date}-{number}", new=False)
    number = max(numbers, default=0) + 1
    while client.tagged(repository, f"{date}-{number}") is not None:
        number += 1  # a list of tags may be older than a tag
    return _Tag(f"{date}-{number}", new=True)


def pull(
    root: Path,
    store: Store,
    name: str,
    places: Sequence[Registry],
    environ: Mapping[str, str],
    *,
    stream: TextIO | None = None,
    patience: Patience | None = None,
) -> tuple[Built, Pulled]:
    """Bring the image that `lock/images.toml` records into the store, as if it had been built there.

    Raises:
        OutOfSpace: it does not fit on the store's disk.
        DrydockError: no digest is recorded, or no registry has exactly that; what arrived whole is kept.
    """
    began = time.monotonic()
    recorded = read_records(root).get(name)
    if recorded is None:
        raise DrydockError(f"lock/images.toml records no digest of {name}: build it, or ask who publishes it")
    digest = str(recorded["digest"]).removeprefix("sha256:")
    source = source_of(name, places)
    with (
        Progress("pull", 0, stream) as progress,
        _Taker(store, source, environ, progress, patience) as taker,
    ):
        built, manifest = taker.image(digest)
        layers = {layer.digest: layer.size for layer in built.layers}
        missing = {blob: size for blob, size in layers.items() if not store.has(blob, size)}
        taker.all(missing)
    store.put(manifest)
    record_image(store, built)
    return built, Pulled(
        source=" ".join(dict.fromkeys(taker.sources)),
        digest=digest,
        blobs=len(layers) + 1,
        present=len(layers) - len(missing),
        received=taker.received,
        resumed=taker.resumed,
        seconds=time.monotonic() - began,
    )


def take_blobs(
    store: Store,
    source: Source,
    wanted: Mapping[str, int],
    environ: Mapping[str, str],
    *,
    stream: TextIO | None = None,
    patience: Patience | None = None,
) -> None:
    """Bring blobs (hex sha256 -> bytes) of one repository into the store, each from the first registry that has it.

    Raises:
        OutOfSpace: they do not fit on the store's disk.
        DrydockError: one is not to be had.
    """
    with (
        Progress(f"pull {source.repository}", 0, stream) as progress,
        _Taker(store, source, environ, progress, patience) as taker,
    ):
        taker.all(wanted)


class _Taker:
    """Takes blobs from the first registry that has them as their digest says."""

    def __init__(
        self,
        store: Store,
        source: Source,
        environ: Mapping[str, str],
        progress: Progress,
        patience: Patience | None,
    ) -> None:
        self.store = store
        self.source = source
        self.progress = progress
        self.sources: list[str] = []
        self.received = self.resumed = 0
        self._guard = threading.Lock()
        self._crew = Crew("pull")
        self._open = ExitStack()
        self._clients = [
            Client.configured(place, environ, patience, self._crew.stop, progress.note)
            for place in source.places
        ]

    def __enter__(self) -> _Taker:
        for client in self._clients:
            self._open.enter_context(client)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def image(self, digest: str) -> tuple[Built, bytes]:
        """The image and its manifest's bytes; its config is in the store then."""
        name = self.source.repository
        if self.store.has(digest) and sha256_file(self.store.path(digest)) == digest:
            return self._read(digest, self.store.path(digest).read_bytes())

        def one(client: Client) -> tuple[Built, bytes]:
            data, kind = client.manifest(client.registry.repository(name), digest)
            kind = read_object(data, f"sha256:{digest}").get("mediaType", kind)
            if kind != MANIFEST:
                raise Refused(f"{client.registry} has {kind} under that digest")
            return self._read(digest, data)

        return self._first(one, digest)

    def _read(self, digest: str, data: bytes) -> tuple[Built, bytes]:
        manifest = read_object(data, f"sha256:{digest}")
        try:
            config, size = hex_of(manifest["config"]["digest"]), int(manifest["config"]["size"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"sha256:{digest} is no image that drydock wrote ({error!r})") from error
        if not 0 < size <= LARGEST_CONFIG:
            raise Refused(f"sha256:{digest} has a config of {size} bytes")
        self.take(config, size)
        document = read_object(self.store.path(config).read_bytes(), f"sha256:{config}")
        return read_manifest(self.source.repository, digest, manifest, document), data

    def all(self, wanted: Mapping[str, int]) -> None:
        """Bring blobs (hex sha256 -> bytes) into the store, the largest first, several at a time."""
        needed, free = still_to_come(self.store, wanted), shutil.disk_usage(self.store.root).free
        if needed > free:
            raise OutOfSpace(
                f"{amount(needed)} are to be pulled to {self.store.root} and {amount(free)} are free: free some, or "
                "set DRYDOCK_STORE to a folder on another disk"
            )
        self.progress.expect(self.progress.seen + sum(wanted.values()))
        self._crew.run(
            sorted(wanted, key=lambda blob: -wanted[blob]), lambda blob: self.take(blob, wanted[blob])
        )

    def take(self, digest: str, size: int) -> None:
        """Bring one blob into the store."""
        title = digest[:12]
        self.progress.start(title)
        with receiving(self.store, digest, size) as part:
            if part is None:
                self.progress.advance(size)
            else:
                self.progress.advance(part.size)
                before = part.size
                self._first(
                    lambda client: client.get_blob(
                        client.registry.repository(self.source.repository), digest, size, part, self._received
                    ),
                    digest,
                )
                with self._guard:
                    self.resumed += before
        self.progress.done(title)

    def _received(self, by: int) -> None:
        self.progress.advance(by)
        with self._guard:
            self.received += max(by, 0)

    def _first(self, ask: Callable[[Client], Answer], digest: str) -> Answer:
        what = f"{self.source.repository} sha256:{digest}"
        client, answer = first_of(self._clients, ask, what, self.source.remedy, self.progress.note)
        with self._guard:
            self.sources.append(str(client.registry))
        return answer

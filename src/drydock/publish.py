"""Images to a registry and from one: `drydock push` sends what it lacks, `drydock pull` takes what is recorded.

An image is named by the digest in `lock/images.toml`. A tag, `<image>:<date>-<n>`, is for people: it is made once and
never moved, and nothing here is pulled by it.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO, TypeVar

from drydock.errors import DrydockError, OutOfSpace
from drydock.indexes import read_indexes
from drydock.oci import MANIFEST, Built, read_manifest, record_image
from drydock.progress import Progress, amount
from drydock.published import read_records
from drydock.registry import Client, Missing, Refused, Registry, credentials
from drydock.store import Store
from drydock.transfer import Crew, Part, Patience

VARIABLE = "DRYDOCK_REGISTRY"
"""The user's registries and mirrors, separated by spaces, in the order in which they are asked."""
Answer = TypeVar("Answer")
SMALL = 4 << 20
"""Bytes: no config of an image is larger, and it is read into memory."""


@dataclass(frozen=True)
class Base:
    """A vendor's image: its repository, and the registries that may hold it."""

    repository: str
    places: Sequence[Registry]


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


def push(
    store: Store,
    built: Built,
    registry: Registry,
    environ: Mapping[str, str],
    *,
    others: Sequence[Built] = (),
    base: Base | None = None,
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
        client = stack.enter_context(_client(registry, environ, patience, crew.stop, progress.note))

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

        def send(digest: str, key: str) -> None:
            if client.has_blob(repository, digest, sizes[digest]):
                store.drop_record("uploads", key)
                progress.advance(sizes[digest])
                count("there")
            elif base and digest in theirs and client.mount_blob(repository, digest, sizes[digest], bases):
                progress.advance(sizes[digest])
                count("mounted")
            else:
                if base and digest in theirs and not store.has(digest, sizes[digest]):
                    take_blobs(
                        store,
                        base.repository,
                        {digest: sizes[digest]},
                        base.places,
                        environ,
                        patience=patience,
                    )

                def keep(location: str | None) -> None:
                    if location:
                        store.write_record("uploads", key, {"location": location})
                    else:
                        store.drop_record("uploads", key)

                sent = client.put_blob(
                    repository,
                    digest,
                    store.path(digest),
                    mount=[
                        registry.repository(other.name)
                        for other in others
                        if any(layer.digest == digest for layer in other.layers)
                    ],
                    begun=(store.read_record("uploads", key) or {}).get("location"),
                    keep=keep,
                    advance=progress.advance,
                )
                if sent is None:
                    count("mounted")
                else:
                    count("uploaded")
                    count("sent", sent)

        # The largest first, so that none of them ends alone.
        crew.run(sorted(sizes, key=lambda digest: -sizes[digest]), one)
        last = stack.enter_context(_client(registry, environ, patience, threading.Event(), progress.note))
        tag = _tag(last, repository, built.digest, today or datetime.now(UTC))
        if tag.new:
            last.put_manifest(repository, tag.name, store.path(built.digest).read_bytes())
            if last.tagged(repository, tag.name) != built.digest:
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
    crew = Crew("pull")
    with Progress("pull", 0, stream) as progress, ExitStack() as stack:
        clients = [
            stack.enter_context(_client(place, environ, patience, crew.stop, progress.note))
            for place in places
        ]
        taker = _Taker(store, name, clients, progress)
        built, manifest = taker.image(digest)
        layers = {layer.digest: layer.size for layer in built.layers}
        missing = {blob: size for blob, size in layers.items() if not store.has(blob, size)}
        _check_room(store, missing)
        progress.expect(progress.seen + sum(missing.values()))
        crew.run(
            sorted(missing, key=lambda blob: -missing[blob]), lambda blob: taker.take(blob, missing[blob])
        )
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
    name: str,
    wanted: Mapping[str, int],
    places: Sequence[Registry],
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
    crew = Crew("pull")
    _check_room(store, wanted)
    with Progress(f"pull {name}", sum(wanted.values()), stream) as progress, ExitStack() as stack:
        clients = [
            stack.enter_context(_client(place, environ, patience, crew.stop, progress.note))
            for place in places
        ]
        taker = _Taker(store, name, clients, progress)
        crew.run(sorted(wanted, key=lambda blob: -wanted[blob]), lambda blob: taker.take(blob, wanted[blob]))


class _Taker:
    """Takes blobs from the first registry that has them as their digest says."""

    def __init__(self, store: Store, name: str, clients: Sequence[Client], progress: Progress) -> None:
        self.store = store
        self.name = name
        self.clients = clients
        self.progress = progress
        self.sources: list[str] = []
        self.received = self.resumed = 0
        self._guard = threading.Lock()

    def image(self, digest: str) -> tuple[Built, bytes]:
        """The image and its manifest's bytes; its config is in the store then."""

        def one(client: Client) -> tuple[Built, bytes]:
            data, kind = client.manifest(client.registry.repository(self.name), digest)
            manifest = _json(data)
            if manifest.get("mediaType", kind) != MANIFEST:
                raise Refused(f"{client.registry} has {manifest.get('mediaType', kind)} under that digest")
            config = manifest.get("config")
            if not isinstance(config, dict) or not 0 < int(config.get("size", 0)) <= SMALL:
                raise Refused(f"sha256:{digest} is no image that drydock wrote")
            config_digest = str(config.get("digest", "")).removeprefix("sha256:")
            if not re.fullmatch("[0-9a-f]{64}", config_digest):
                raise Refused(f"sha256:{digest} is no image that drydock wrote")
            self.take(config_digest, int(config["size"]))
            document = _json(self.store.path(config_digest).read_bytes())
            return read_manifest(self.name, digest, manifest, document), data

        if self.store.has(digest):
            data = self.store.path(digest).read_bytes()
            manifest = _json(data)
            config = str(manifest.get("config", {}).get("digest", "")).removeprefix("sha256:")
            if sha256(data).hexdigest() == digest and self.store.has(config):
                return read_manifest(
                    self.name, digest, manifest, _json(self.store.path(config).read_bytes())
                ), data
        return self._first(one, f"sha256:{digest}")

    def take(self, digest: str, size: int) -> None:
        """Bring one blob into the store."""
        title = digest[:12]
        self.progress.start(title)
        with self.store.lock(f"fetch-{digest[:16]}"):
            path = self.store.tmp / f"{digest}.part"
            if self.store.has(digest, size):
                self.progress.advance(size)
            else:
                part = Part(path, self.store.root)
                if part.size > size:
                    part.restart()
                before = part.size
                self.progress.advance(before)
                try:
                    self._first(
                        lambda client: client.get_blob(
                            client.registry.repository(self.name), digest, size, part, self._received
                        ),
                        f"sha256:{digest}",
                    )
                finally:
                    part.close()
                    if part.size == 0 < size:
                        path.unlink(missing_ok=True)
                with self._guard:
                    self.resumed += before
                self.store.adopt(path, digest)
        self.progress.done(title)

    def _received(self, by: int) -> None:
        self.progress.advance(by)
        with self._guard:
            self.received += max(by, 0)

    def _first(self, ask: Callable[[Client], Answer], what: str) -> Answer:
        failures: list[DrydockError] = []
        for client in self.clients:
            try:
                answer = ask(client)
            except OutOfSpace:
                raise
            except DrydockError as error:
                failures.append(error)
                if isinstance(error, Refused):
                    self.progress.note(f"refused: {error}")
            else:
                with self._guard:
                    self.sources.append(str(client.registry))
                return answer
        said = "; ".join(dict.fromkeys(str(error) for error in failures))
        if all(isinstance(error, Missing) for error in failures):
            said += f": push {self.name} there, or set {VARIABLE} to who has it"
        raise DrydockError(f"{self.name} {what} is not to be had: {said}")


def _client(
    registry: Registry,
    environ: Mapping[str, str],
    patience: Patience | None,
    stop: threading.Event,
    note: Callable[[str], None],
) -> Client:
    return Client(
        registry,
        login=credentials(registry.host, environ),
        tls=read_indexes(environ).tls(),
        patience=patience,
        stop=stop,
        note=note,
    )


def _json(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    return document if isinstance(document, dict) else {}


def _check_room(store: Store, missing: Mapping[str, int]) -> None:
    parts = {digest: store.tmp / f"{digest}.part" for digest in missing}
    there = 0
    for path in parts.values():
        with suppress(FileNotFoundError):  # another pull may just have completed it
            there += path.stat().st_size
    needed, free = sum(missing.values()) - there, shutil.disk_usage(store.root).free
    if needed > free:
        raise OutOfSpace(
            f"{amount(needed)} are to be pulled to {store.root} and {amount(free)} are free: free some, or set "
            "DRYDOCK_STORE to a folder on another disk"
        )

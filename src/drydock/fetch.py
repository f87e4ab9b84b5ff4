"""Get every artifact of a lock into the store by its sha256, from wherever the user's configuration says.

An artifact is named by its hash, so a place that offers other bytes under the same file name is refused and
the next place is asked. What a stopped run has downloaded stays as `tmp/<sha256>.part` and is resumed.
"""

from __future__ import annotations

import functools
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO
from urllib.parse import quote, unquote, urlsplit

import httpx
from packaging.utils import canonicalize_name
from pypi_simple import ACCEPT_ANY, ProjectPage, UnsupportedRepoVersionError

from drydock.errors import DrydockError, OutOfSpace
from drydock.indexes import MIRROR_VARIABLES, Auth, Indexes, Location, file_path, redact
from drydock.locks import Artifact
from drydock.progress import Progress
from drydock.store import CHUNK, Store
from drydock.transfer import (
    CONNECTIONS,
    Again,
    Crew,
    GaveUp,
    Part,
    Patience,
    Result,
    Stopped,
    host_of,
    insist,
    receiving,
    retry_after,
    still_to_come,
)

FAILURES_IN_A_ROW = 8
"""A host that failed that many requests for good, with no success between, is not asked again in this run."""

FAILURES_TOLD = 20
"""Artifacts beside the first that get a line of their own when many fail, as all do without a network."""


@dataclass(frozen=True, kw_only=True)
class FetchReport:
    """What a fetch did. `received` is bytes read from elsewhere, `resumed` bytes an earlier run had left."""

    present: int
    fetched: int
    received: int
    resumed: int
    retries: int
    seconds: float


def fetch(
    store: Store,
    artifacts: Iterable[Artifact],
    indexes: Indexes,
    mirrors: Mapping[str, Sequence[str]],
    *,
    stream: TextIO | None = None,
    patience: Patience | None = None,
) -> FetchReport:
    """Bring every artifact into the store, and each wheel also under `wheels/<file name>` beside the blobs.

    >>> fetch(Store(root), lock.artifacts(), read_indexes(os.environ), {})

    Parameters:
        artifacts: of any number of locks; those the store has are not asked for again.
        indexes: where wheels and sdists may be.
        mirrors: archive name -> base addresses, as `debian_mirrors` gives them; may be empty without debs.
        stream: where progress goes, standard error by default.

    Raises:
        OutOfSpace: they do not fit on the store's disk; where that can be known, before anything is fetched.
        DrydockError: one line about the artifacts that no place has, or only with another hash; the others
            are in the store.
    """
    began = time.monotonic()
    wanted = list({artifact.sha256: artifact for artifact in artifacts}.values())
    missing = [artifact for artifact in wanted if not store.has(artifact.sha256, artifact.size)]
    missing.sort(key=lambda artifact: (-artifact.size, artifact.filename))
    received = resumed = retries = 0
    if missing:
        _check_room(store, missing)
        total = sum(artifact.size for artifact in missing)
        with Progress("fetch", total, stream) as progress:
            fetcher = _Fetcher(store, indexes, mirrors, patience or Patience(), progress)
            fetcher.run(missing)
        received, resumed, retries = fetcher.received, fetcher.resumed, fetcher.retries
    for artifact in wanted:
        if artifact.kind == "wheel":
            store.link(artifact.sha256, store.root / "wheels" / artifact.filename)
    return FetchReport(
        present=len(wanted) - len(missing),
        fetched=len(missing),
        received=received,
        resumed=resumed,
        retries=retries,
        seconds=time.monotonic() - began,
    )


def _check_room(store: Store, missing: Sequence[Artifact]) -> None:
    needed = still_to_come(store, {artifact.sha256: artifact.size for artifact in missing})
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise OutOfSpace(
            f"{len(missing)} artifact(s) need {needed / 1e6:.1f} MB under {store.root} and "
            f"{free / 1e6:.1f} MB are free: free some, or set DRYDOCK_STORE to a folder on another disk"
        )


Kind = Literal["refused", "denied", "unreachable", "offline", "missing"]


class _Failure(Exception):
    """One place does not give the artifact; `reason` says why and names the place, without credentials."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class _File:
    """Where one artifact's bytes are, as a place lists it; `listed` is the sha256 it claims, if any."""

    place: str
    url: str
    auth: Auth | None = None
    listed: str | None = None


class _Fetcher:
    """One run: the threads, what they share, and where an artifact may be found."""

    def __init__(
        self,
        store: Store,
        indexes: Indexes,
        mirrors: Mapping[str, Sequence[str]],
        patience: Patience,
        progress: Progress,
    ) -> None:
        self.store = store
        self.indexes = indexes
        self.mirrors = mirrors
        self.patience = patience
        self.progress = progress
        self.received = self.resumed = self.retries = 0
        self._crew = Crew("fetch")
        self._lock = threading.Lock()
        self._dead: dict[str, str] = {}
        self._in_a_row: dict[str, int] = {}
        self._failed: list[tuple[Artifact, str]] = []
        self._client = httpx.Client(
            verify=indexes.tls(),
            follow_redirects=True,
            timeout=patience.timeout,
            limits=httpx.Limits(max_connections=2 * CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"User-Agent": "drydock"},
        )

    def run(self, artifacts: Sequence[Artifact]) -> None:
        try:
            self._crew.run(artifacts, self._work)
        finally:
            self._client.close()
        if self._failed:
            order = {artifact.sha256: place for place, artifact in enumerate(artifacts)}
            self._failed.sort(key=lambda failure: order[failure[0].sha256])
            (_, first), *others = self._failed
            for _, message in others[:FAILURES_TOLD]:
                self.progress.note(message)
            raise DrydockError(first + (f" (and {len(others)} more)" if others else ""))

    def _work(self, artifact: Artifact) -> None:
        self.progress.start(artifact.filename)
        try:
            self._get(artifact)
        except _Unavailable as error:
            with self._lock:
                self._failed.append((artifact, str(error)))
        finally:
            self.progress.done(artifact.filename)

    def _get(self, artifact: Artifact) -> None:
        """Bring one artifact into the store from the first place that has it."""
        with receiving(self.store, artifact.sha256, artifact.size) as part:
            if part is None:
                self.progress.advance(artifact.size)
                return
            if part.size:
                self.progress.note(f"{artifact.filename}: resumed at {part.size} of {artifact.size} bytes")
                self.progress.advance(part.size)
                with self._lock:
                    self.resumed += part.size
            failures: list[_Failure] = []
            if part.size < artifact.size and not self._from_places(artifact, part, failures):
                raise _Unavailable(_message(artifact, failures, self.mirrors))

    def _from_places(self, artifact: Artifact, part: Part, failures: list[_Failure]) -> bool:
        for find in self._places(artifact):
            try:
                self._take(artifact, find(), part)
                return True
            except _Failure as failure:
                failures.append(failure)
                if failure.kind == "refused":
                    self.progress.note(f"{artifact}: refused: {failure.reason}")
        return False

    # Where an artifact is

    def _places(self, artifact: Artifact) -> Iterator[Callable[[], _File]]:
        """Each place as a function that finds the artifact's file there or raises `_Failure`."""
        if artifact.kind == "deb":
            archive, _, path = artifact.source.partition("/")
            for base in self.mirrors.get(archive, ()):
                yield functools.partial(self._in_mirror, base, path)
        else:
            for place in self.indexes.places():
                yield functools.partial(self._in_place, place, artifact)

    def _in_mirror(self, base: str, path: str) -> _File:
        folder = file_path(base)
        if folder is None:
            self._check_online(base)
            return _File(redact(base), f"{base.rstrip('/')}/{path}", self.indexes.auth_for(base))
        for candidate in (folder / path, folder / path.rpartition("/")[2]):
            if candidate.is_file():
                return _File(str(folder), candidate.as_uri())
        raise _Failure("missing", f"not in {folder}")

    def _in_place(self, place: Location, artifact: Artifact) -> _File:
        name = canonicalize_name(artifact.name)
        flat = place in self.indexes.find_links
        if place.path and place.path.is_dir():
            for candidate in (place.path / artifact.filename, place.path / name / artifact.filename):
                if candidate.is_file():
                    return _File(str(place), candidate.absolute().as_uri())
            url = (place.path / name / "index.html").absolute().as_uri()
        else:
            url = place.url if flat else f"{place.url.rstrip('/')}/{quote(name)}/"
        for file in self._page(place, url, name).packages:
            if artifact.filename in (file.filename, unquote(urlsplit(file.url).path).rpartition("/")[2]):
                listed = file.digests.get("sha256")
                return _File(str(place), file.url, self.indexes.auth_for(file.url, place), listed)
        raise _Failure("missing", f"not on {place}")

    def _page(self, place: Location, url: str, name: str) -> ProjectPage:
        path = file_path(url)
        try:
            if path is not None:
                if not path.is_file():
                    raise _Failure("missing", f"not in {place}")
                return ProjectPage.from_html(name, path.read_bytes(), base_url=url)
            self._check_online(url)
            return self._retry(f"{name} on {place}", url, lambda: self._ask_page(place, url, name))
        except (ValueError, UnsupportedRepoVersionError, OSError) as error:
            reason = f"{place} has no readable page for {name} ({type(error).__name__})"
            raise _Failure("unreachable", reason) from error

    def _ask_page(self, place: Location, url: str, name: str) -> ProjectPage:
        auth = self.indexes.auth_for(url, place)
        response = self._client.get(url, auth=auth, headers={"Accept": ACCEPT_ANY})
        self._check_status(response, str(place))
        base = str(response.url)
        if "json" in response.headers.get("Content-Type", ""):
            return ProjectPage.from_json_data(response.json(), base_url=base)
        return ProjectPage.from_html(name, response.content, base, response.charset_encoding)

    def _check_online(self, url: str) -> None:
        if self.indexes.offline:
            raise _Failure("offline", f"{host_of(url)} not asked, offline")

    # Getting its bytes

    def _take(self, artifact: Artifact, file: _File, part: Part) -> None:
        """Complete the part from a file, or raise `_Failure` with the part empty or resumable."""
        if file.listed and file.listed != artifact.sha256:
            raise _wrong(file, f"lists sha256:{file.listed}", artifact)
        local = file_path(file.url)
        whole = part.size == 0 or local is not None
        while True:
            if local is not None:
                self._copy(artifact, file, local, part)
            else:
                self._check_online(file.url)
                once = functools.partial(self._download, artifact, file, part)
                self._retry(artifact.filename, file.url, once, lambda: part.size)
            if part.digest == artifact.sha256:
                return
            found = part.digest
            self._restart(part)
            if whole:
                raise _wrong(file, f"serves sha256:{found}", artifact)
            # What an earlier run or another place had left was wrong: the place is not to blame yet.
            whole = True

    def _restart(self, part: Part) -> None:
        self.progress.advance(-part.size)
        part.restart()

    def _add(self, part: Part, data: bytes) -> None:
        part.write(data)
        self.progress.advance(len(data))
        with self._lock:
            self.received += len(data)
        if self._crew.stop.is_set():
            raise Stopped

    def _copy(self, artifact: Artifact, file: _File, path: Path, part: Part) -> None:
        self._restart(part)
        try:
            size = path.stat().st_size
            source = path.open("rb")
        except OSError as error:
            raise _Failure("missing", f"{path} cannot be read ({error.strerror})") from error
        with source:
            if size != artifact.size:
                raise _wrong(file, f"serves {size} bytes", artifact)
            while data := source.read(CHUNK):
                self._add(part, data)

    def _download(self, artifact: Artifact, file: _File, part: Part) -> None:
        """One request for what the part lacks."""
        if part.size == artifact.size:
            return  # all came before the connection broke
        headers = {"Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
        with self._client.stream("GET", file.url, auth=file.auth, headers=headers) as response:
            if response.status_code == 416:
                self._restart(part)
                raise Again("the server cannot resume")
            self._check_status(response, file.place)
            if response.status_code == 206:
                expected = rf"bytes {part.size}-{artifact.size - 1}/({artifact.size}|\*)"
                if not re.fullmatch(expected, response.headers.get("Content-Range", "").strip()):
                    self._restart(part)
                    raise Again("the server resumed elsewhere than asked")
            else:
                self._restart(part)
                length = response.headers.get("Content-Length", "")
                if length.isdecimal() and int(length) != artifact.size:
                    raise _wrong(file, f"serves {length} bytes", artifact)
            for data in response.iter_raw():
                if part.size + len(data) > artifact.size:
                    self._restart(part)
                    raise _wrong(file, f"serves more than {artifact.size} bytes", artifact)
                self._add(part, data)
        if part.size < artifact.size:
            raise Again(f"broke off at {part.size} of {artifact.size} bytes")

    def _check_status(self, response: httpx.Response, place: str) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        host = host_of(str(response.url))
        if status in (404, 410):
            raise _Failure("missing", f"not on {place}")
        if status in (401, 403, 407):
            raise _Failure("denied", f"{host} denies access to {place} ({status})")
        if status in (408, 429) or status >= 500:
            raise Again(f"{host} answers {status}", retry_after(response.headers.get("Retry-After", "")))
        raise _Failure("unreachable", f"{host} answers {status} for {place}")

    def _retry(
        self, what: str, url: str, once: Callable[[], Result], reached: Callable[[], int] = lambda: 0
    ) -> Result:
        """Do something once, or again as long as there is hope; a host that failed often is not asked again."""
        host = host_of(url)

        def attempt() -> Result:
            if host in self._dead:
                raise _Failure("unreachable", self._dead[host])
            return once()

        def note(text: str) -> None:
            with self._lock:
                self.retries += 1
            self.progress.note(f"{what}: {text}")

        try:
            result = insist(attempt, url, self.patience, self._crew.stop, note, reached)
        except GaveUp as error:
            with self._lock:
                row = self._in_a_row[host] = self._in_a_row.get(host, 0) + (error.because == "broken")
                if error.because in ("certificate", "unreached") or row >= FAILURES_IN_A_ROW:
                    self._dead[host] = error.reason
            raise _Failure("unreachable", error.reason) from error
        self._in_a_row.pop(host, None)
        return result


class _Unavailable(DrydockError):
    """No place gives one artifact; the other artifacts are still worth fetching."""


def _wrong(file: _File, found: str, artifact: Artifact) -> _Failure:
    locked = f"locked is sha256:{artifact.sha256} of {artifact.size} bytes"
    return _Failure("refused", f"{file.place} {found}, {locked}")


def _message(artifact: Artifact, failures: Sequence[_Failure], mirrors: Mapping[str, Sequence[str]]) -> str:
    """One line: what is not to be had, what each place said, and what to do."""
    said = "; ".join(dict.fromkeys(failure.reason for failure in failures))
    kinds = {failure.kind for failure in failures}
    if artifact.kind == "deb":
        archive = artifact.source.partition("/")[0]
        variable = MIRROR_VARIABLES.get(archive, "DRYDOCK_DEBIAN_MIRROR")
        elsewhere = f"set {variable} to a mirror or a directory that has it"
    else:
        archive = variable = ""
        elsewhere = (
            "configure an index that has it, or put the file into a directory and set UV_FIND_LINKS or "
            "PIP_FIND_LINKS"
        )
    if "refused" in kinds:
        return f"{artifact} is refused, no place has it as locked: {said}: {elsewhere}"
    if "denied" in kinds:
        return (
            f"{artifact}: {said}: give the credentials (in the address, as UV_INDEX_<NAME>_USERNAME and "
            f"_PASSWORD, or in ~/.netrc), or {elsewhere}"
        )
    if "unreachable" in kinds:
        return f"{artifact} cannot be fetched: {said}: check the network and the proxy, or {elsewhere}"
    if "offline" in kinds:
        return f"{artifact} is not on this machine: {said}: unset UV_OFFLINE, or {elsewhere}"
    if artifact.kind != "deb":
        return f"{artifact} is {said or 'nowhere: no index is configured'}: {elsewhere}"
    if not mirrors.get(archive):
        return f"{artifact}: no mirror of {archive} is known: {elsewhere}"
    return (
        f"{artifact} is {said}: Debian mirrors drop a version once a newer one is out: set {variable} to the "
        f"base of a snapshot archive that still holds it, or run `drydock lock --upgrade {artifact.name}`"
    )

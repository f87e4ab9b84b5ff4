"""A client of OCI registries (distribution-spec 1.1): manifests, blobs and tags, with its patience and its distrust.

Every manifest and blob is asked for by digest and hashed on the way; a transfer that breaks goes on where it broke.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import ipaddress
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from drydock.errors import DrydockError, OutOfSpace
from drydock.indexes import read_indexes
from drydock.oci import INDEX, MANIFEST, hex_of
from drydock.store import CHUNK
from drydock.transfer import (
    CONNECTIONS,
    Again,
    GaveUp,
    Part,
    Patience,
    Result,
    Stopped,
    host_of,
    insist,
    plain,
    retry_after,
)

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPTED = (MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_INDEX)
LARGEST_MANIFEST = 4 << 20
"""Bytes; a registry need not take a larger one, and none is read further."""
LARGEST_CONFIG = 4 << 20
"""Bytes: no config of an image is larger, and it is read into memory."""
MOST_TAGS = 1000
"""Tags of one page; a registry may give fewer and says where to go on."""
PIECE = 64 << 20
"""Bytes of one request of an upload. Debian's registry forgets all of a request that breaks off."""
IDENTITY = "<token>"
"""The user of a login that is an identity token, as Docker's helpers write it: good for tokens, never a password."""
COMMIT_SECONDS = 1800.0
"""The answer to an upload's end may take as long as the registry's storage takes to copy and hash gigabytes."""


Answer = TypeVar("Answer")
Place = TypeVar("Place")


class Registry(NamedTuple):
    """A registry, and the path there that is in front of every image's name.

    >>> Registry.read("registry.example/team").repository("cpu-vllm")
    'team/cpu-vllm'
    """

    scheme: str
    host: str
    prefix: str

    @classmethod
    def read(cls, text: str) -> Registry:
        """`HOST[:PORT][/PATH]`, spoken to over TLS unless it is this machine, as Docker does, or begins with `http://`.

        Raises:
            DrydockError: it is none.
        """
        scheme, separator, rest = text.partition("://")
        rest = rest if separator else text
        host, _, prefix = rest.strip("/").partition("/")
        host = host.lower()
        scheme = scheme if separator else "http" if _loopback(host) else "https"
        known = scheme in ("http", "https") and re.fullmatch(r"[\w.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?", host)
        part = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"  # as the distribution specification has it
        if not known or (prefix and not re.fullmatch(f"{part}(/{part})*", prefix)):
            raise DrydockError(f"{text!r} is no registry: write HOST[:PORT][/PATH], the path in lower case")
        return cls(scheme, host, prefix)

    @property
    def url(self) -> str:
        """Where its API is."""
        return f"{self.scheme}://{self.host}/v2/"

    @property
    def local(self) -> bool:
        """Whether it is this machine, to which no proxy leads."""
        return _loopback(self.host)

    def repository(self, image: str) -> str:
        """The name of an image's repository there."""
        return f"{self.prefix}/{image}" if self.prefix else image

    def __str__(self) -> str:
        return f"{self.host}/{self.prefix}" if self.prefix else self.host


def _loopback(host: str) -> bool:
    name = host[1 : host.index("]")] if host.startswith("[") and "]" in host else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def credentials(host: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password for a registry as `docker login` keeps them, in its file or with the helper it names;
    or `IDENTITY` and the identity token.

    Raises:
        DrydockError: the file or the helper's answer cannot be read.
    """
    folder = Path(environ.get("DOCKER_CONFIG") or Path(environ.get("HOME") or "/") / ".docker")
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text())
        helper = document.get("credHelpers", {}).get(host) or document.get("credsStore")
        if helper and (found := _from_helper(helper, host)):
            return found
        auths = document.get("auths", {})
        entry = auths.get(host) or auths.get(f"https://{host}") or {}
        if entry.get("identitytoken"):
            return IDENTITY, entry["identitytoken"]
        if entry.get("auth"):
            user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            return user, password.strip("\0")
        if entry.get("username"):
            return entry["username"], entry.get("password", "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, binascii.Error) as error:
        raise DrydockError(f"{path} cannot be read ({error}): run `docker login {host}` again") from error
    return None


def _from_helper(helper: str, host: str) -> tuple[str, str] | None:
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=host, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DrydockError(
            f"{program}, which keeps the password of {host}, does not run ({error})"
        ) from error
    if done.returncode:
        return None  # it has none
    answer = json.loads(done.stdout)
    return answer["Username"], answer["Secret"]


class Missing(DrydockError):
    """The registry does not have it."""


class Rejected(DrydockError):
    """The registry does not take or give it, and says so; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Refused(DrydockError):
    """The registry serves other bytes than a digest names."""


class Client:
    """Speaks to one registry, from any number of threads.

    Parameters:
        login: user and password, if there are any; sent only where the registry asks for them.
        stop: when set, waiting ends.
        note: is told of every retry.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        login: tuple[str, str] | None = None,
        tls: ssl.SSLContext | bool = True,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.registry = registry
        self._login = login
        self._patience = patience or Patience()
        self._stop = stop or threading.Event()
        self._note = note
        self._authorization: dict[str, str] = {}
        self._dead: DrydockError | None = None
        self._client = httpx.Client(
            verify=tls,
            trust_env=not registry.local,
            timeout=self._patience.timeout,
            limits=httpx.Limits(max_connections=2 * CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"User-Agent": "drydock", "Accept-Encoding": "identity"},
        )

    @classmethod
    def configured(
        cls,
        registry: Registry,
        environ: Mapping[str, str],
        patience: Patience | None = None,
        stop: threading.Event | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> Client:
        """One with the user's login and certificates.

        Raises:
            DrydockError: the configuration cannot be read.
        """
        return cls(
            registry,
            login=credentials(registry.host, environ),
            tls=read_indexes(environ).tls(),
            patience=patience,
            stop=stop,
            note=note,
        )

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Manifests and tags

    def manifest(self, repository: str, digest: str) -> tuple[bytes, str]:
        """A manifest's bytes and media type, by its hex sha256.

        Raises:
            Missing: it is not there.
            Refused: what is there has another hash.
            DrydockError: the registry denies it or cannot be asked.
        """

        def once() -> tuple[bytes, str]:
            url = f"{self.registry.url}{repository}/manifests/sha256:{digest}"
            headers = {"Accept": ", ".join(ACCEPTED)}
            with self._ask("GET", url, pull(repository), headers=headers, follow=True) as response:
                self._expect(response, (200,), f"{repository}@sha256:{digest}")
                data = _small(response, LARGEST_MANIFEST)
                return data, response.headers.get("Content-Type", "").partition(";")[0]

        data, kind = self._insist(once)
        self._check(data, repository, digest)
        return data, kind

    def tagged(self, repository: str, tag: str) -> str | None:
        """The hex sha256 of the manifest that a tag names, or None for no such tag."""

        def once() -> str | None:
            url = f"{self.registry.url}{repository}/manifests/{tag}"
            headers = {"Accept": ", ".join(ACCEPTED)}
            with self._ask("HEAD", url, pull(repository), headers=headers, follow=True) as response:
                if response.status_code == 404:
                    return None
                self._expect(response, (200,), f"{repository}:{tag}")
                with contextlib.suppress(ValueError):  # the header is no duty
                    return hex_of(response.headers.get("Docker-Content-Digest", "").strip())
            with self._ask("GET", url, pull(repository), headers=headers, follow=True) as response:
                self._expect(response, (200,), f"{repository}:{tag}")
                return hashlib.sha256(_small(response, LARGEST_MANIFEST)).hexdigest()

        return self._insist(once)

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository; none where there is no repository."""
        found: list[str] = []
        url: str | None = f"{self.registry.url}{repository}/tags/list?n={MOST_TAGS}"
        seen: set[str] = set()
        while url and url not in seen:
            page = url
            seen.add(page)

            def once(page: str = page) -> tuple[list[str], str | None]:
                with self._ask("GET", page, pull(repository), follow=True) as response:
                    if response.status_code == 404:
                        return [], None
                    self._expect(response, (200,), f"the tags of {repository}")
                    try:
                        names = json.loads(response.read())["tags"] or []
                    except (ValueError, KeyError, TypeError) as error:
                        raise DrydockError(f"{self.registry} gives no readable list of tags") from error
                    following = response.links.get("next", {}).get("url")
                    return names, urljoin(page, following) if following else None

            names, url = self._insist(once)
            found += names
        return found

    def put_manifest(self, repository: str, reference: str, data: bytes, kind: str = MANIFEST) -> bool:
        """Put a manifest, whose blobs must be there, by its digest or under a tag.

        Returns:
            Whether the registry itself lists it among what refers to its subject (OCI-Subject).
        """

        def once() -> bool:
            url = f"{self.registry.url}{repository}/manifests/{reference}"
            headers = {"Content-Type": kind}
            with self._ask("PUT", url, push(repository), headers=headers, content=data) as response:
                self._expect(response, (201,), f"{repository}:{reference}", writing=True)
                return "OCI-Subject" in response.headers

        return self._insist(once)

    # Blobs

    def has_blob(self, repository: str, digest: str, size: int) -> bool:
        """Whether the repository holds a blob of that hex sha256 and size in bytes."""

        def once() -> bool:
            url = f"{self.registry.url}{repository}/blobs/sha256:{digest}"
            with self._ask("HEAD", url, pull(repository), follow=True) as response:
                if response.status_code == 404:
                    return False
                self._expect(response, (200,), f"{repository}@sha256:{digest}")
                # A proxy may leave the length out.
                return bool(response.headers.get("Content-Length", str(size)) == str(size))

        return self._insist(once)

    def get_blob(
        self, repository: str, digest: str, size: int, part: Part, advance: Callable[[int], None]
    ) -> None:
        """Complete a partial download; `advance` is told of bytes that came, and of lost ones as a negative number.

        Raises:
            Missing: it is not there.
            Refused: other bytes are.
            DrydockError: the registry denies it or cannot be asked.
        """
        what = f"{repository}@sha256:{digest}"
        resumed = part.size > 0

        def restart() -> None:
            advance(-part.size)
            part.restart()

        def once() -> None:
            if part.size == size:
                return  # all came before the connection broke
            headers = {"Range": f"bytes={part.size}-"} if part.size else {}
            url = f"{self.registry.url}{repository}/blobs/sha256:{digest}"
            with self._ask("GET", url, pull(repository), headers=headers, follow=True) as response:
                if response.status_code == 416:
                    restart()
                    raise Again("the registry cannot resume")
                self._expect(response, (200, 206), what)
                if response.status_code == 200:
                    restart()
                elif not response.headers.get("Content-Range", "").strip().startswith(f"bytes {part.size}-"):
                    restart()
                    raise Again("the registry resumed elsewhere than asked")
                for data in response.iter_raw():
                    if part.size + len(data) > size:
                        restart()
                        raise Refused(f"{self.registry} serves more than the {size} bytes of {what}")
                    part.write(data)
                    advance(len(data))
                    if self._stop.is_set():
                        raise Stopped
            if part.size < size:
                raise Again(f"{self.registry.host} broke off at {part.size} of {size} bytes")

        while True:
            self._insist(once, lambda: part.size)
            if part.digest == digest:
                return
            found = part.digest
            restart()
            if not resumed:
                raise Refused(f"{self.registry} serves sha256:{found} for {what}")
            # What an earlier run or another place had left was wrong: this one is not to blame yet.
            resumed = False

    def small_blob(self, repository: str, digest: str, size: int) -> bytes:
        """A blob that fits into memory; raises as `get_blob`."""

        def once() -> bytes:
            url = f"{self.registry.url}{repository}/blobs/sha256:{digest}"
            with self._ask("GET", url, pull(repository), follow=True) as response:
                self._expect(response, (200,), f"{repository}@sha256:{digest}")
                data = _small(response, size)
            if len(data) < size:
                raise Again(f"{self.registry.host} broke off at {len(data)} of {size} bytes")
            return data

        data = self._insist(once)
        self._check(data, repository, digest)
        return data

    def _check(self, data: bytes, repository: str, digest: str) -> None:
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused(f"{self.registry} serves other bytes for {repository}@sha256:{digest}")

    def mount_blob(self, repository: str, digest: str, size: int, sources: Sequence[str]) -> bool:
        """Have a blob of another repository of this registry; whether one has it and it could be mounted."""
        url = f"{self.registry.url}{repository}/blobs/uploads/"
        for other in sources:

            def once(other: str = other) -> bool:
                query = httpx.QueryParams({"mount": f"sha256:{digest}", "from": other})
                scopes = (*push(repository), *pull(other))
                with self._ask("POST", f"{url}?{query}", scopes, content=b"") as response:
                    # 202 opens an upload in its place, which nobody goes on with.
                    self._expect(response, (201, 202), f"{repository}@sha256:{digest}", writing=True)
                    return response.status_code == 201

            with contextlib.suppress(DrydockError):
                if self.has_blob(other, digest, size) and self._insist(once):
                    return True
        return False

    def put_blob(
        self,
        repository: str,
        digest: str,
        path: Path,
        *,
        begun: str | None = None,
        keep: Callable[[str | None], None] = lambda _: None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Bring a blob there; the bytes that were sent for it.

        Parameters:
            path: the file of that hex sha256.
            begun: where an earlier run had begun to send it, as `keep` was told.
            keep: is told where the upload goes on if this process ends, and None once there is nothing to go on with.
            advance: is told of bytes that are there, and of lost ones as a negative number.
        """
        return _Upload(self, repository, digest, path, begun, keep, advance).run()

    # One exchange

    @contextlib.contextmanager
    def _ask(
        self,
        method: str,
        url: str,
        scopes: Sequence[str],
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterator[bytes] | None = None,
        follow: bool = False,
        seconds: float | None = None,
    ) -> Iterator[httpx.Response]:
        """A response whose body is still to be read; authorized, if the registry asks for it and we can.

        Parameters:
            seconds: how long the answer may take; the patience's by default.
        """
        key = " ".join(scopes)
        if self.registry.scheme == "https" and urlsplit(url).scheme != "https":
            raise DrydockError(
                f"{self.registry.host} leads to {host_of(url)} without TLS: refused; a proxy in front of it may not "
                "tell it that it is asked over TLS (X-Forwarded-Proto)"
            )
        timeout = self._patience.timeout
        if seconds:
            timeout.read = seconds
        for again in (True, False):
            known = {"Authorization": self._authorization[key]} if key in self._authorization else {}
            # A host that an upload or a page leads to gets no password of this registry.
            known = known if self._ours(url) else {}
            request = self._client.build_request(
                method, url, headers={**(headers or {}), **known}, content=content, timeout=timeout
            )
            response = self._client.send(request, stream=True, follow_redirects=follow)
            try:
                # Not of the host that a redirect led to: what that one asks for is not for it to have.
                if response.status_code != 401 or not again or not self._ours(str(response.url)):
                    yield response
                    return
                # Unread, so that its connection is given up: a registry may close it without having read what was
                # sent, and what is asked next on it would be lost.
                response.close()
                self._authorize(response.headers.get("WWW-Authenticate", ""), scopes)
                if content is not None and not isinstance(content, bytes):
                    raise Again(f"{self.registry.host} asked for a new token")
            finally:
                response.close()

    def _ours(self, url: str) -> bool:
        """Whether an address is this registry's own: scheme, host and port."""
        here, there = httpx.URL(self.registry.url), httpx.URL(url)
        return (here.scheme, here.host, here.port) == (there.scheme, there.host, there.port)

    def _authorize(self, challenge: str, scopes: Sequence[str]) -> None:
        kind, _, rest = challenge.partition(" ")
        values = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        key = " ".join(scopes)
        if kind.lower() == "basic" and self._login and self._login[0] != IDENTITY:
            self._authorization[key] = f"Basic {base64.b64encode(':'.join(self._login).encode()).decode()}"
        elif kind.lower() == "bearer" and values.get("realm"):
            self._authorization[key] = f"Bearer {self._token(values, scopes)}"
        else:
            raise self._denied("asks for a password")

    def _token(self, challenge: Mapping[str, str], scopes: Sequence[str]) -> str:
        realm = urljoin(self.registry.url, challenge["realm"])
        if self._login and self.registry.scheme == "https" and urlsplit(realm).scheme != "https":
            raise DrydockError(
                f"{self.registry.host} wants its password sent to {realm} without TLS: refused"
            )
        service = {"service": challenge["service"]} if "service" in challenge else {}
        if self._login and self._login[0] == IDENTITY:
            grant = {"grant_type": "refresh_token", "refresh_token": self._login[1], "client_id": "drydock"}
            response = self._client.post(realm, data={**grant, **service, "scope": " ".join(scopes)})
        else:
            query = httpx.QueryParams({"scope": list(scopes), **service})
            response = self._client.get(realm, params=query, auth=self._login, follow_redirects=True)
        if response.status_code in (401, 403):
            raise self._denied("gives no token" if self._login else "gives no token without a password")
        self._expect(response, (200,), "a token")
        with contextlib.suppress(ValueError, AttributeError):
            answer = response.json()
            if token := answer.get("token") or answer.get("access_token"):
                return str(token)
        raise DrydockError(f"{host_of(realm)} gives no readable token for {self.registry.host}")

    def _denied(self, why: str) -> DrydockError:
        return DrydockError(
            f"{self.registry.host} {why}: run `docker login {self.registry.host}`, or ask who runs it for access"
        )

    def _expect(
        self, response: httpx.Response, statuses: Sequence[int], what: str, writing: bool = False
    ) -> None:
        """Nothing for one of these statuses, else what the other one means; `writing` is what a push does."""
        status = response.status_code
        if status in statuses:
            return
        host = host_of(str(response.url))
        if status in (408, 425, 429) or status >= 500:
            raise Again(f"{host} answers {status}", retry_after(response.headers.get("Retry-After", "")))
        if writing and status in (403, 404):
            raise Rejected(
                f"{host} answers {status} for {what}{_said(response)}: create the repository there, or get the right "
                f"to push (`docker login {self.registry.host}`)",
                status,
            )
        if status in (404, 410):
            raise Missing(f"{what} is not on {self.registry.host}")
        if status in (401, 403):
            raise self._denied(f"denies {what} ({status}){_said(response)}")
        raise Rejected(f"{host} answers {status} for {what}{_said(response)}", status)

    def _insist(self, once: Callable[[], Result], reached: Callable[[], int] = lambda: 0) -> Result:
        if self._dead:
            raise self._dead
        try:
            return insist(once, self.registry.url, self._patience, self._stop, self._note, reached)
        except GaveUp as error:
            advice = "check the address, the network and the proxy"
            failure = DrydockError(f"{self.registry}: {error.reason}: {advice}")
            if error.because in ("unreached", "certificate"):
                self._dead = failure  # it is not asked again for each of a hundred blobs
            raise failure from error


def first_of(
    places: Sequence[Place],
    ask: Callable[[Place], Answer],
    what: str,
    remedy: str,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Place, Answer]:
    """The first registry that gives what is asked, and what it gave.

    Parameters:
        places: registries, or clients of them, in the order in which they are asked.
        remedy: what to do where none of them has it.
        note: is told of a registry that serves something else.

    Raises:
        OutOfSpace: at once, since no other registry would help.
        DrydockError: none gives it; the line has what each said.
    """
    failures: list[DrydockError] = []
    for place in places:
        try:
            return place, ask(place)
        except OutOfSpace:
            raise
        except DrydockError as error:
            failures.append(error)
            if isinstance(error, Refused):
                note(f"refused: {error}")
    said = "; ".join(dict.fromkeys(str(error) for error in failures))
    if all(isinstance(error, Missing) for error in failures):
        said = f"{said}: {remedy}" if said else remedy
    raise DrydockError(f"{what} is not to be had: {said}")


def read_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON document that a registry or the store gave.

    Raises:
        Refused: it is none.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise Refused(f"{what} is not JSON") from error
    if not isinstance(document, dict):
        raise Refused(f"{what} is no JSON object")
    return document


class _Closed(Exception):
    """The blob is there: what is gone is only the session that brought it."""


@dataclass
class _Upload:
    """One blob on its way to a registry: a session there, which a broken connection does not end."""

    client: Client
    repository: str
    digest: str
    path: Path
    location: str | None
    keep: Callable[[str | None], None]
    advance: Callable[[int], None]
    there: int = 0
    """Bytes that the registry has of it, or that were sent to it and may have arrived."""
    confirmed: int = 0
    """Of these, what the registry said."""
    asked: bool = False
    """Whether that is all."""
    sent: int = 0
    resumed: bool = False
    """Whether the session is an earlier run's."""

    @property
    def what(self) -> str:
        return f"{self.repository}@sha256:{self.digest}"

    @property
    def scopes(self) -> list[str]:
        return push(self.repository)

    def run(self) -> int:
        self.resumed = self.location is not None
        with contextlib.suppress(_Closed):
            self.client._insist(self._go_on, lambda: self.confirmed)
        return self.sent

    def _at(self, response: httpx.Response) -> None:
        location = response.headers.get("Location", "")
        if not location:
            raise DrydockError(f"{self.client.registry.host} does not say where to send {self.what}")
        self.location = urljoin(str(response.url), location)
        self.keep(self.location)

    def _begin(self) -> None:
        """Open a session."""
        url = f"{self.client.registry.url}{self.repository}/blobs/uploads/"
        with self.client._ask("POST", url, self.scopes, content=b"") as response:
            self.client._expect(response, (202,), self.what, writing=True)
            self._at(response)
        self.asked = True

    def _go_on(self) -> None:
        """Send what the registry lacks, and close the session."""
        if self.location is None:
            self._begin()
        if not self.asked:
            self._status()
        size = self.path.stat().st_size
        assert self.location
        while self.there < size:
            end = min(self.there + PIECE, size)
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(end - self.there),
                "Content-Range": f"{self.there}-{end - 1}",
            }
            # Until the registry says otherwise, nobody knows how much of it arrived.
            self.asked = False
            with self.client._ask(
                "PATCH", self.location, self.scopes, headers=headers, content=self._piece(end)
            ) as response:
                self._accepted(response, (202, 204))
                self._at(response)
            self.confirmed, self.asked = self.there, True
        self.asked = False
        joint = "&" if urlsplit(self.location).query else "?"
        url = f"{self.location}{joint}{httpx.QueryParams({'digest': f'sha256:{self.digest}'})}"
        with self.client._ask("PUT", url, self.scopes, content=b"", seconds=COMMIT_SECONDS) as response:
            self._accepted(response, (201, 204))
        self.keep(None)

    def _accepted(self, response: httpx.Response, statuses: Sequence[int]) -> None:
        """Nothing for one of these statuses. A session that the registry rejects is not gone on with, by nobody."""
        status = response.status_code
        if status in (404, 410, 416) or (status == 400 and self.resumed):
            self._lost()
        try:
            self.client._expect(response, statuses, self.what, writing=True)
        except Rejected as error:
            self.keep(None)
            with self.path.open("rb") as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            if status == 400 and not right:
                raise DrydockError(
                    f"the blob sha256:{self.digest} is damaged in the store: remove {self.path} and build again"
                ) from error
            raise

    def _piece(self, end: int) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.there)
            while data := file.read(min(CHUNK, end - self.there)):
                if self.client._stop.is_set():
                    raise Stopped
                yield data
                self.there += len(data)
                self.sent += len(data)
                self.advance(len(data))

    def _status(self) -> None:
        """Ask how much has arrived."""
        assert self.location
        with self.client._ask("GET", self.location, self.scopes) as response:
            # Gone; or closed, since the answer that said so was lost on its way.
            if response.status_code in (400, 404, 405, 410):
                self._lost()
            self.client._expect(response, (204, 200), self.what)
            found = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", "").strip())
            self._at(response)
        there = int(found[1]) + 1 if found and found[1] != "0" else 0
        self.advance(there - self.there)
        self.there = self.confirmed = there
        self.asked = True

    def _lost(self) -> None:
        """The session is gone: from the beginning."""
        self.advance(-self.there)
        self.there, self.location, self.asked, self.resumed = 0, None, False, False
        self.keep(None)
        if self.client.has_blob(self.repository, self.digest, self.path.stat().st_size):
            self.advance(self.path.stat().st_size)
            raise _Closed
        raise Again(f"{self.client.registry.host} has forgotten the upload")


def pull(repository: str) -> list[str]:
    """The scope of a token that may read."""
    return [f"repository:{repository}:pull"]


def push(repository: str) -> list[str]:
    """The scope of a token that may read and write."""
    return [f"repository:{repository}:pull,push"]


def _small(response: httpx.Response, most: int) -> bytes:
    """A body that fits into memory; of a longer one a little more than that."""
    data = b""
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > most:
            break
    return data


def _said(response: httpx.Response) -> str:
    """What a registry's error document says, in one line."""
    try:
        document: Any = json.loads(response.read())
        first = document["errors"][0]
        return f": {plain(ValueError(first.get('message') or first.get('code') or ''))}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, httpx.HTTPError):
        return ""

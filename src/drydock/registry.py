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
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import httpx

from drydock.errors import DrydockError
from drydock.oci import INDEX, MANIFEST
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
MOST_TAGS = 1000
"""Tags of one page; a registry may give fewer and says where to go on."""


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
    """User and password for a registry as `docker login` keeps them, in its file or with the helper it names.

    Raises:
        DrydockError: the file or the helper's answer cannot be read.
    """
    folder = Path(environ.get("DOCKER_CONFIG") or Path(environ.get("HOME") or "/") / ".docker")
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text())
        helper = document.get("credHelpers", {}).get(host)
        auths = document.get("auths", {})
        entry = auths.get(host) or auths.get(f"https://{host}") or {}
        helper = helper or (document.get("credsStore") if host in auths else None)
        if helper:
            return _from_helper(helper, host)
        if entry.get("auth"):
            user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            return user, password.strip("\0")
        if entry.get("username"):
            return entry["username"], entry.get("password", "")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, binascii.Error) as error:
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
        self._client = httpx.Client(
            verify=tls,
            timeout=self._patience.timeout,
            limits=httpx.Limits(max_connections=2 * CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"User-Agent": "drydock", "Accept-Encoding": "identity"},
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
            with self._ask("GET", url, pull(repository), headers={"Accept": ", ".join(ACCEPTED)}) as response:
                self._expect(response, (200,), f"{repository}@sha256:{digest}")
                data = b""
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > LARGEST_MANIFEST:
                        break
                return data, response.headers.get("Content-Type", "").partition(";")[0]

        data, kind = self._insist(once)
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused(f"{self.registry} serves other bytes for {repository}@sha256:{digest}")
        return data, kind

    def tagged(self, repository: str, tag: str) -> str | None:
        """The hex sha256 of the manifest that a tag names, or None for no such tag."""

        def once() -> str | None:
            url = f"{self.registry.url}{repository}/manifests/{tag}"
            headers = {"Accept": ", ".join(ACCEPTED)}
            with self._ask("HEAD", url, pull(repository), headers=headers) as response:
                if response.status_code == 404:
                    return None
                self._expect(response, (200,), f"{repository}:{tag}")
                return _digest(response.headers.get("Docker-Content-Digest", ""))

        return self._insist(once)

    def tags(self, repository: str) -> list[str]:
        """All tags of a repository; none where there is no repository."""
        found: list[str] = []
        url: str | None = f"{self.registry.url}{repository}/tags/list?n={MOST_TAGS}"
        while url:
            page = url

            def once(page: str = page) -> tuple[list[str], str | None]:
                with self._ask("GET", page, pull(repository)) as response:
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

    def put_manifest(self, repository: str, tag: str, data: bytes, kind: str = MANIFEST) -> None:
        """Put a manifest, whose blobs must be there, and its tag."""

        def once() -> None:
            url = f"{self.registry.url}{repository}/manifests/{tag}"
            headers = {"Content-Type": kind}
            with self._ask("PUT", url, push(repository), headers=headers, content=data) as response:
                self._expect(response, (201,), f"{repository}:{tag}")

        self._insist(once)

    # Blobs

    def has_blob(self, repository: str, digest: str, size: int) -> bool:
        """Whether the repository holds a blob of that hex sha256 and size in bytes."""

        def once() -> bool:
            url = f"{self.registry.url}{repository}/blobs/sha256:{digest}"
            with self._ask("HEAD", url, pull(repository), follow=True) as response:
                if response.status_code == 404:
                    return False
                self._expect(response, (200,), f"{repository}@sha256:{digest}")
                return bool(response.headers.get("Content-Length") == str(size))

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

    def put_blob(
        self,
        repository: str,
        digest: str,
        path: Path,
        *,
        mount: Sequence[str] = (),
        begun: str | None = None,
        keep: Callable[[str | None], None] = lambda _: None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> int | None:
        """Bring a blob there; the bytes that were sent for it, or None where it was mounted.

        Parameters:
            path: the file of that hex sha256.
            mount: repositories of the same registry that may hold it already.
            begun: where an earlier run had begun to send it, as `keep` was told.
            keep: is told where the upload goes on if this process ends, and None once there is nothing to go on with.
            advance: is told of bytes that are there, and of lost ones as a negative number.
        """
        upload = _Upload(self, repository, digest, path, begun, keep, advance)
        return upload.run(mount)

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
    ) -> Iterator[httpx.Response]:
        """A response whose body is still to be read; authorized, if the registry asks for it and we can."""
        key = " ".join(scopes)
        for again in (True, False):
            known = {"Authorization": self._authorization[key]} if key in self._authorization else {}
            # A host that an upload or a page leads to gets no password of this registry.
            known = known if host_of(url) == self.registry.host else {}
            request = self._client.build_request(
                method, url, headers={**(headers or {}), **known}, content=content
            )
            response = self._client.send(request, stream=True, follow_redirects=follow)
            try:
                if response.status_code != 401 or not again or host_of(url) != self.registry.host:
                    yield response
                    return
                response.read()
                self._authorize(response.headers.get("WWW-Authenticate", ""), scopes)
                if content is not None and not isinstance(content, bytes):
                    raise Again(f"{self.registry.host} asked for a new token")
            finally:
                response.close()

    def _authorize(self, challenge: str, scopes: Sequence[str]) -> None:
        kind, _, rest = challenge.partition(" ")
        values = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        key = " ".join(scopes)
        login = base64.b64encode(":".join(self._login).encode()).decode() if self._login else ""
        if kind.lower() == "basic" and login:
            self._authorization[key] = f"Basic {login}"
        elif kind.lower() == "bearer" and values.get("realm"):
            self._authorization[key] = f"Bearer {self._token(values, scopes, login)}"
        else:
            raise self._denied("asks for a password")

    def _token(self, challenge: Mapping[str, str], scopes: Sequence[str], login: str) -> str:
        realm = urljoin(self.registry.url, challenge["realm"])
        if login and self.registry.scheme == "https" and urlsplit(realm).scheme != "https":
            raise DrydockError(
                f"{self.registry.host} wants its password sent to {realm} without TLS: refused"
            )
        service = {"service": challenge["service"]} if "service" in challenge else {}
        query = httpx.QueryParams({"scope": list(scopes), **service})
        headers = {"Authorization": f"Basic {login}"} if login else {}
        response = self._client.get(realm, params=query, headers=headers, follow_redirects=True)
        if response.status_code in (401, 403):
            raise self._denied("gives no token" if login else "gives no token without a password")
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

    def _expect(self, response: httpx.Response, statuses: Sequence[int], what: str) -> None:
        """Nothing for one of these statuses, else what the other one means."""
        status = response.status_code
        if status in statuses:
            return
        host = host_of(str(response.url))
        if status in (408, 425, 429) or status >= 500:
            raise Again(f"{host} answers {status}", retry_after(response.headers.get("Retry-After", "")))
        if status in (404, 410):
            raise Missing(f"{what} is not on {self.registry.host}")
        if status in (401, 403):
            raise self._denied(f"denies {what} ({status})")
        raise DrydockError(f"{host} answers {status} for {what}{_said(response)}")

    def _insist(self, once: Callable[[], Result], reached: Callable[[], int] = lambda: 0) -> Result:
        try:
            return insist(once, self.registry.url, self._patience, self._stop, self._note, reached)
        except GaveUp as error:
            advice = "check the address, the network and the proxy"
            raise DrydockError(f"{self.registry}: {error.reason}: {advice}") from error


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

    @property
    def what(self) -> str:
        return f"{self.repository}@sha256:{self.digest}"

    def run(self, mount: Sequence[str]) -> int | None:
        if self.location is None and self.client._insist(lambda: self._begin(mount)):
            return None
        self.client._insist(self._go_on, lambda: self.confirmed)
        return self.sent

    def _scopes(self, mount: Sequence[str] = ()) -> list[str]:
        return [*push(self.repository), *(scope for other in mount for scope in pull(other))]

    def _at(self, response: httpx.Response) -> None:
        location = response.headers.get("Location", "")
        if not location:
            raise DrydockError(f"{self.client.registry.host} does not say where to send {self.what}")
        self.location = urljoin(str(response.url), location)
        self.keep(self.location)

    def _begin(self, mount: Sequence[str]) -> bool:
        """Open a session; whether there is no need to, since another repository had the blob."""
        url = f"{self.client.registry.url}{self.repository}/blobs/uploads/"
        for other in mount:
            query = httpx.QueryParams({"mount": f"sha256:{self.digest}", "from": other})
            with self.client._ask("POST", f"{url}?{query}", self._scopes(mount)) as response:
                if response.status_code == 201:
                    self.advance(self.path.stat().st_size)
                    return True
                # 202: it has none there and opened a session. Anything else is about the other repository.
                if response.status_code == 202:
                    self._at(response)
                    self.asked = True
                    return False
        with self.client._ask("POST", url, self._scopes(), content=b"") as response:
            self.client._expect(response, (202,), self.what)
            self._at(response)
        self.asked = True
        return False

    def _go_on(self) -> None:
        """Send what the registry lacks, and close the session."""
        if self.location is None:
            self._begin(())
        if not self.asked:
            self._status()
        size = self.path.stat().st_size
        assert self.location
        # Until the registry says otherwise, nobody knows how much of what follows arrived.
        self.asked = False
        if self.there < size:
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(size - self.there),
                "Content-Range": f"{self.there}-{size - 1}",
            }
            with self.client._ask(
                "PATCH", self.location, self._scopes(), headers=headers, content=self._rest()
            ) as response:
                if response.status_code in (404, 416):
                    self._lost()
                self.client._expect(response, (202, 204), self.what)
                self._at(response)
        joint = "&" if urlsplit(self.location).query else "?"
        url = f"{self.location}{joint}{httpx.QueryParams({'digest': f'sha256:{self.digest}'})}"
        with self.client._ask("PUT", url, self._scopes(), content=b"") as response:
            if response.status_code == 404:
                self._lost()
            self.client._expect(response, (201, 204), self.what)
        self.keep(None)

    def _rest(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.there)
            while data := file.read(CHUNK):
                if self.client._stop.is_set():
                    raise Stopped
                yield data
                self.there += len(data)
                self.sent += len(data)
                self.advance(len(data))

    def _status(self) -> None:
        """Ask how much has arrived."""
        assert self.location
        with self.client._ask("GET", self.location, self._scopes()) as response:
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
        self.there, self.location, self.asked = 0, None, False
        self.keep(None)
        raise Again(f"{self.client.registry.host} has forgotten the upload")


def pull(repository: str) -> list[str]:
    """The scope of a token that may read."""
    return [f"repository:{repository}:pull"]


def push(repository: str) -> list[str]:
    """The scope of a token that may read and write."""
    return [f"repository:{repository}:pull,push"]


def _digest(text: str) -> str | None:
    found = re.fullmatch(r"sha256:([0-9a-f]{64})", text.strip())
    return found[1] if found else None


def _said(response: httpx.Response) -> str:
    """What a registry's error document says, in one line."""
    try:
        document: Any = json.loads(response.read())
        first = document["errors"][0]
        return f": {plain(ValueError(first.get('message') or first.get('code') or ''))}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, httpx.HTTPError):
        return ""

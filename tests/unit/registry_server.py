"""An OCI registry on loopback for tests, with faults to order.

>>> with RegistryServer() as server:
...     server.faults.append(Fault("PATCH", "", cut=1000))   # the next upload ends after 1,000 bytes
...     push(store, built, Registry.read(server.host), {})
...     server.repositories["cpu-vllm"].tags
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from loopback import LoopbackServer


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the next request of that method whose path holds `path`, once (`always`: each time).

    `status` answers so at once; `cut` closes the connection after so many bytes of the body, in either direction;
    `wrong` serves the body with one byte changed; `forget` loses the upload session; `silent` does what is asked and
    closes the connection without an answer.
    """

    method: str
    path: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1
    wrong: bool = False
    forget: bool = False
    silent: bool = False
    always: bool = False


@dataclass
class Repository:
    """What it holds: blobs and manifests by digest, tags."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    length: int
    """Bytes of the body that arrived."""


class RegistryServer(LoopbackServer):
    """`login` asks for that user and password: by `basic`, or for tokens that are good for `lifetime` requests, which
    `identity` gets too.

    `elsewhere` is the address that blobs are redirected to; `page` is how many tags a list has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytearray] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.login: tuple[str, str] | None = None
        self.basic = False
        self.identity = uuid.uuid4().hex
        self.lifetime = 1_000_000
        self.tokens: dict[str, int] = {}
        self.scopes: list[list[str]] = []
        self.elsewhere = ""
        self.page = 2
        self.digests = True
        self.mounts = True
        self.referrers = False
        """Whether it keeps track of what refers to a manifest, as OCI 1.1 has it."""
        self.steals = ""
        """An address that what is redirected to asks for a password at."""
        self._guard = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        _Exchange(self, handler).answer()

    def of(self, method: str, path: str = "") -> list[Request]:
        """The requests of a method whose path holds a text."""
        return [request for request in self.requests if request.method == method and path in request.path]

    def fault(self, method: str, path: str) -> Fault | None:
        with self._guard:
            for fault in self.faults:
                if fault.method == method and fault.path in path:
                    if not fault.always:
                        self.faults.remove(fault)
                    return fault
        return None


class _Exchange:
    """One request and its answer."""

    def __init__(self, server: RegistryServer, handler: BaseHTTPRequestHandler) -> None:
        self.server = server
        self.handler = handler
        self.method = handler.command
        parts = urlsplit(handler.path)
        self.path = parts.path
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.scopes = parse_qs(parts.query).get("scope", [])
        self.fault = server.fault(self.method, self.path)

    def answer(self) -> None:
        if self.path == "/token":
            self._token()
            return
        if self.fault and self.fault.status:
            self._body()
            self._send(self.fault.status, self.fault.headers)
            return
        if not self._allowed():
            self._challenge()
            # As registries do, without reading what follows and without saying so; late enough for a client that
            # trusts the connection to have asked its next question on it.
            self.handler.wfile.flush()
            time.sleep(0.02)
            self.handler.close_connection = True
            return
        found = re.fullmatch(r"/v2/(.+?)/(manifests|blobs|tags|uploads|referrers)/(.*)", self.path)
        if self.path.startswith("/elsewhere/") and self.server.steals:
            self._send(401, {"WWW-Authenticate": f'Bearer realm="{self.server.steals}",service="x"'})
        elif self.path.startswith("/elsewhere/"):
            self._blob(self.path.split("/")[2], self.path.split("/")[3], redirect=False)
        elif not found:
            self._send(404)
        elif found[2] == "tags":
            self._tags(found[1])
        elif found[2] == "referrers":
            self._referrers(found[1], found[3])
        elif found[2] == "manifests":
            self._manifest(found[1], found[3])
        elif found[3].startswith("uploads/"):
            self._upload(found[1], found[3].removeprefix("uploads/"))
        else:
            self._blob(found[1], found[3], redirect=bool(self.server.elsewhere))

    def _body(self) -> bytes:
        left = int(self.handler.headers.get("Content-Length", 0))
        if self.fault and self.fault.cut >= 0 and self.method in ("PATCH", "PUT"):
            left = min(left, self.fault.cut)
        data = self.handler.rfile.read(left)
        headers = {name.lower(): value for name, value in self.handler.headers.items()}
        self.server.requests.append(
            Request(method=self.method, path=self.handler.path, headers=headers, length=len(data))
        )
        return data

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        if self.method in ("GET", "HEAD"):
            self._body()
        if self.fault and self.fault.wrong:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.handler.send_response(status)
        for name, value in (headers or {}).items():
            self.handler.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        if self.method == "HEAD":
            return
        if self.fault and self.fault.cut >= 0 and self.method == "GET":
            self.handler.wfile.write(body[: self.fault.cut])
            self.handler.close_connection = True
            return
        self.handler.wfile.write(body)

    # Who may

    def _allowed(self) -> bool:
        server, given = self.server, self.handler.headers.get("Authorization", "")
        if server.login is None or self.path.startswith("/elsewhere/"):
            return True
        if server.basic:
            return given == _basic(server.login)
        token = given.removeprefix("Bearer ")
        with server._guard:
            left = server.tokens.get(token, 0)
            server.tokens[token] = left - 1
        return left > 0

    def _challenge(self) -> None:
        value = (
            'Basic realm="registry"'
            if self.server.basic
            else f'Bearer realm="http://{self.server.host}/token",service="drydock-test",scope="unused"'
        )
        self._send(401, {"WWW-Authenticate": value})

    def _token(self) -> None:
        assert self.server.login
        if self.method == "POST":
            form = {name: values[0] for name, values in parse_qs(self._body().decode()).items()}
            granted = form["grant_type"] == "refresh_token" and form["refresh_token"] == self.server.identity
            service, scopes, name = form["service"], form["scope"].split(), "access_token"
        else:
            granted = self.handler.headers.get("Authorization") == _basic(self.server.login)
            service, scopes, name = self.query["service"], self.scopes, "token"
        if not granted:
            self._send(401)
            return
        assert service == "drydock-test"
        self.server.scopes.append(scopes)
        token = uuid.uuid4().hex
        self.server.tokens[token] = self.server.lifetime
        self._send(200, body=json.dumps({name: token}).encode())

    # What is there

    def _repository(self, name: str) -> Repository | None:
        return self.server.repositories.get(name)

    def _tags(self, name: str) -> None:
        repository = self._repository(name)
        if repository is None:
            self._send(404)
            return
        tags = sorted(repository.tags)
        start = tags.index(self.query["last"]) + 1 if "last" in self.query else 0
        part = tags[start : start + self.server.page]
        more = start + self.server.page < len(tags)
        following = {"Link": f'</v2/{name}/tags/list?last={part[-1]}>; rel="next"'} if more else {}
        self._send(200, following, json.dumps({"name": name, "tags": part or None}).encode())

    def _manifest(self, name: str, reference: str) -> None:
        if self.method == "PUT":
            data = self._body()
            repository = self.server.repositories.setdefault(name, Repository())
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            document = json.loads(data)
            named = document.get("manifests") or [document["config"], *document["layers"]]
            needed = {entry["digest"] for entry in named}
            if needed - (repository.manifests if "manifests" in document else repository.blobs).keys():
                error = {"errors": [{"code": "MANIFEST_BLOB_UNKNOWN", "message": "blob unknown"}]}
                self._send(400, body=json.dumps(error).encode())
                return
            repository.manifests[digest] = data
            if reference != digest:
                repository.tags[reference] = digest
            subject = document.get("subject", {}).get("digest")
            known = {"OCI-Subject": subject} if subject and self.server.referrers else {}
            self._send(201, {"Docker-Content-Digest": digest, **known})
            return
        there = self._repository(name) or Repository()
        digest = there.tags.get(reference, reference)
        if digest not in there.manifests:
            self._send(404)
            return
        kind = json.loads(there.manifests[digest]).get("mediaType", "")
        headers = {"Content-Type": kind}
        if self.server.digests:
            headers["Docker-Content-Digest"] = digest
        self._send(200, headers, there.manifests[digest])

    def _referrers(self, name: str, subject: str) -> None:
        if not self.server.referrers:
            self._send(404)
            return
        entries = []
        for digest, data in (self._repository(name) or Repository()).manifests.items():
            document = json.loads(data)
            if document.get("subject", {}).get("digest") == subject:
                entry = {"digest": digest, "size": len(data), "artifactType": document["artifactType"]}
                entries.append({"mediaType": document["mediaType"], **entry})
        index = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": entries,
        }
        self._send(200, {"Content-Type": index["mediaType"]}, json.dumps(index).encode())

    def _blob(self, name: str, digest: str, *, redirect: bool) -> None:
        data = (self._repository(name) or Repository()).blobs.get(digest)
        if data is None:
            self._send(404)
        elif redirect:
            self._send(307, {"Location": f"{self.server.elsewhere}/elsewhere/{name}/{digest}"})
        elif self.method == "HEAD":
            self._send(200, {"Content-Length": str(len(data))})
        elif asked := re.fullmatch(r"bytes=(\d+)-", self.handler.headers.get("Range", "")):
            start = int(asked[1])
            self._send(206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])
        else:
            self._send(200, body=data)

    def _upload(self, name: str, session: str) -> None:
        server = self.server
        if self.method == "POST":
            self._body()
            source = server.repositories.get(self.query.get("from", ""))
            if source and server.mounts and self.query["mount"] in source.blobs:
                target = server.repositories.setdefault(name, Repository())
                target.blobs[self.query["mount"]] = source.blobs[self.query["mount"]]
                self._send(201)
                return
            session = uuid.uuid4().hex
            server.uploads[session] = bytearray()
            self._send(202, {"Location": f"/v2/{name}/blobs/uploads/{session}?state=1"})
            return
        if self.fault and self.fault.forget:
            server.uploads.pop(session, None)
        if session not in server.uploads:
            self._body()
            self._send(404)
            return
        have = server.uploads[session]
        where = {"Location": f"/v2/{name}/blobs/uploads/{session}?state=2"}
        if self.method == "PATCH":
            start = int(self.handler.headers["Content-Range"].partition("-")[0])
            if start != len(have):
                self._body()
                self._send(416)
                return
            have += self._body()
            if self.fault and self.fault.cut >= 0:
                self.handler.close_connection = True
                self.handler.connection.close()
                return
            self._send(202, {**where, "Range": f"0-{max(len(have) - 1, 0)}"})
        elif self.method == "GET":
            self._send(204, {**where, "Range": f"0-{max(len(have) - 1, 0)}"})
        else:
            have += self._body()
            digest = f"sha256:{hashlib.sha256(have).hexdigest()}"
            if digest != self.query["digest"]:
                self._send(400, body=b'{"errors":[{"code":"DIGEST_INVALID","message":"digest invalid"}]}')
                return
            server.repositories.setdefault(name, Repository()).blobs[digest] = bytes(have)
            del server.uploads[session]
            if self.fault and self.fault.silent:
                self.handler.close_connection = True
                self.handler.connection.close()
                return
            self._send(201)


def _basic(login: tuple[str, str]) -> str:
    return f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"

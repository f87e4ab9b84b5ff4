"""A package index and Debian mirror on loopback for tests, with faults to order.

>>> with IndexServer() as server:
...     server.add("six", "six-1.17.0-py2.py3-none-any.whl", data)
...     server.faults[filename] = [Truncate(1000), Status(503)]   # the first two requests for that file
...     fetch(..., indexes of server.simple)
...     server.ranges_of(filename)                                # [None, None, "bytes=1000-"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from loopback import LoopbackServer


@dataclass(frozen=True)
class Status:
    """Answer with this status instead."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Truncate:
    """Close the connection after so many bytes of the body."""

    after: int


@dataclass(frozen=True)
class Hang:
    """Send nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class WrongRange:
    """Answer a range request with 206, but from the beginning."""


@dataclass(frozen=True)
class NoEnd:
    """Send the whole body in chunks and close the connection without the chunk that ends it."""


Fault = Status | Truncate | Hang | WrongRange | NoEnd


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None
    authorization: str | None


class IndexServer(LoopbackServer):
    """Serves `/simple/<project>/`, `/files/<file name>` and whatever is in `raw` (path -> bytes).

    `ranges` off ignores Range headers; `html` off answers with PEP 691 JSON where it is asked for;
    `credentials` makes it deny everyone else; `rate` limits each body to that many bytes a second;
    `listed` puts another sha256 (or none, for "none") on the page for a file name; `steady` is the fault of
    every request for a name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projects: dict[str, dict[str, bytes]] = {}
        self.raw: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.steady: dict[str, Fault] = {}
        self.listed: dict[str, str] = {}
        self.requests: list[Request] = []
        self.ranges = True
        self.html = True
        self.credentials: tuple[str, str] | None = None
        self.rate: float | None = None
        self.url = f"http://{self.host}"
        self.simple = f"{self.url}/simple"

    def add(self, project: str, filename: str, data: bytes) -> None:
        self.projects.setdefault(project, {})[filename] = data

    def ranges_of(self, filename: str) -> list[str | None]:
        """The Range header of each request for that file."""
        return [request.range for request in self.requests if request.path.endswith(f"/{filename}")]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(handler.path)
        name = path.rstrip("/").rpartition("/")[2]
        authorization = handler.headers.get("Authorization")
        self.requests.append(Request(path, handler.headers.get("Range"), authorization))
        if self.credentials:
            word = base64.b64encode(":".join(self.credentials).encode()).decode()
            if authorization != f"Basic {word}":
                return self._send(handler, 401, b"who are you?")
        queue = self.faults.get(name)
        fault = queue.pop(0) if queue else self.steady.get(name)
        if isinstance(fault, Status):
            return self._send(handler, fault.code, b"fault", fault.headers)
        if isinstance(fault, Hang):
            time.sleep(fault.seconds)
            handler.close_connection = True
            return None
        if path.startswith("/simple/"):
            return self._page(handler, name)
        if path.startswith("/files/"):
            found = [files[name] for files in self.projects.values() if name in files]
            body = found[0] if found else None
        else:
            body = self.raw.get(path)
        if body is None:
            return self._send(handler, 404, b"not here")
        return self._send_file(handler, body, fault)

    def _page(self, handler: BaseHTTPRequestHandler, project: str) -> None:
        if project not in self.projects:
            return self._send(handler, 404, b"no such project")
        files = {
            name: self.listed.get(name) or hashlib.sha256(data).hexdigest()
            for name, data in self.projects[project].items()
        }
        if not self.html and "vnd.pypi.simple.v1+json" in handler.headers.get("Accept", ""):
            page = {
                "meta": {"api-version": "1.0"},
                "name": project,
                "files": [
                    {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": digest}}
                    for name, digest in files.items()
                ],
            }
            content_type = "application/vnd.pypi.simple.v1+json"
            return self._send(handler, 200, json.dumps(page).encode(), {"Content-Type": content_type})
        links = [
            f'<a href="../../files/{name}#sha256={digest}">{name}</a>'
            if digest != "none"
            else f'<a href="../../files/{name}">{name}</a>'
            for name, digest in files.items()
        ]
        text = f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>"
        return self._send(handler, 200, text.encode(), {"Content-Type": "text/html"})

    def _send_file(self, handler: BaseHTTPRequestHandler, body: bytes, fault: Fault | None) -> None:
        if isinstance(fault, NoEnd):
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
            handler.close_connection = True
            return None
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        headers, status, data = {}, 200, body
        if wanted and self.ranges:
            start = 0 if isinstance(fault, WrongRange) else int(wanted[1])
            if start >= len(body):
                return self._send(handler, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
            status, data = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = fault.after if isinstance(fault, Truncate) else None
        return self._send(handler, status, data, headers, cut)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        handler.send_response(status)
        for key, value in (headers or {}).items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        data = body[:cut]
        step = max(1, int(self.rate * 0.02)) if self.rate and status in (200, 206) else len(data) or 1
        for start in range(0, len(data), step):
            handler.wfile.write(data[start : start + step])
            if self.rate:
                handler.wfile.flush()
                time.sleep(0.02)
        if cut is not None:
            handler.close_connection = True

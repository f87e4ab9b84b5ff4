"""HTTP requests to a server on this machine whose time limit is for the whole of them.

The standard library's limit is for each wait: a server that sends a byte a second holds such a request for ever.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from drydock.server.ports import HOST

TICK = 0.1
"""Seconds between two looks at what else may have happened while a request waits."""


def ask(
    port: int, path: str, body: Mapping[str, Any] | None, *, timeout: float, meanwhile: Callable[[], None]
) -> tuple[int, str]:
    """GET, or POST a JSON body; the status and the text of the answer.

    Parameters:
        timeout: seconds until the answer is complete.
        meanwhile: called every `TICK` while there is nothing to read; what it raises ends the request.

    Raises:
        TimeoutError: no complete answer.
        OSError, http.client.HTTPException: no connection, or it broke.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Connection": "close"}
    with _Bounded(time.monotonic() + timeout, meanwhile) as bounded:
        bounded.settimeout(bounded.remaining())
        bounded.connect((HOST, port))
        connection = http.client.HTTPConnection(HOST, port)
        connection.sock = bounded
        connection.request("GET" if data is None else "POST", path, data, headers)
        # Closed here, or a connection that is given up stays open, and its request alive, for as long as an
        # exception refers to it.
        with connection.getresponse() as answer:
            return answer.status, answer.read().decode(errors="replace")


class _Bounded(socket.socket):
    """A socket whose reads and writes all end at one deadline."""

    def __init__(self, deadline: float, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._deadline = deadline
        self._meanwhile = meanwhile

    def remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        return remaining

    def sendall(self, *arguments: Any) -> None:
        self.settimeout(self.remaining())
        super().sendall(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        while True:
            self.settimeout(min(TICK, self.remaining()))
            try:
                return super().recv_into(*arguments)
            except TimeoutError:
                self._meanwhile()

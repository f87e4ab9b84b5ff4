"""Starts an inference server, knows when it really answers, and ends it with everything it started.

Used by the tiers inside an image, so: standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "DRYDOCK_SERVER"
"""Variable that every process a server starts inherits, by which those that left its group are found."""


class ServerError(Exception):
    """The server did not do what it must; the text ends with the last lines of its log."""


class Server:
    """One OpenAI-compatible server in a process group of its own.

    >>> with Server(["python", "-m", "vllm.entrypoints.openai.api_server", "--model", path], log=log) as server:
    ...     server.complete("1+1=", max_tokens=4)

    Parameters:
        command: program and arguments, without address and port.
        log: file that gets its output.
        environment: added to this process's.
        ready_timeout, stop_timeout: seconds.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        ready_timeout: float = 300.0,
        stop_timeout: float = 30.0,
    ) -> None:
        self.log = log
        self.ready_timeout = ready_timeout
        self.stop_timeout = stop_timeout
        self.ready_seconds = 0.0
        self.model = f"drydock-{uuid.uuid4().hex[:12]}"
        self._mark = uuid.uuid4().hex
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {}), MARK: self._mark}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and return when it generates.

        Raises:
            ServerError: it ended, or did not answer within `ready_timeout`; it is stopped.
        """
        # The kernel picks a port nobody has; that the answer comes from this server and no other is proven
        # by the model name, which is new for each.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        began = time.monotonic()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", self.model],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_ready(began + self.ready_timeout)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - began

    def _wait_ready(self, deadline: float) -> None:
        last = "it never answered"
        assert self._process
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise ServerError(f"the server ended with status {status} before it was ready\n{self.tail()}")
            try:
                self.complete("1", max_tokens=1, timeout=max(1.0, min(30.0, deadline - time.monotonic())))
                return
            except (OSError, ServerError, ValueError) as error:
                last = str(error).splitlines()[0]
            time.sleep(0.5)
        raise ServerError(f"the server was not ready after {self.ready_timeout:.0f} s: {last}\n{self.tail()}")

    def request(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0) -> Any:
        """GET, or POST a JSON body, and return the JSON answer (or text where it is not JSON).

        Raises:
            ServerError: an HTTP status of 400 and above, with the server's words.
            OSError: no connection, or no answer in `timeout` seconds.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        # No proxy: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ServerError(
                f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')[:500]}"
            ) from error
        try:
            return json.loads(text)
        except ValueError:
            return text

    def complete(self, prompt: str, timeout: float = 60.0, **options: Any) -> dict[str, Any]:
        """One completion through `/v1/completions`; the first choice.

        Raises:
            ServerError: as `request`, or the answer is another server's.
        """
        answer = self.request("/v1/completions", {"model": self.model, "prompt": prompt, **options}, timeout)
        if not isinstance(answer, dict) or answer.get("model") != self.model:
            raise ServerError(f"port {self.port} is answered by another server")
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def tail(self, lines: int = 25) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def survivors(self) -> dict[int, str]:
        """pid -> command line of every living process this server started, in its group or not."""
        return dict(_marked(f"{MARK}={self._mark}".encode()))

    def stop(self) -> dict[int, str]:
        """End the server and everything it started.

        Returns:
            What did not end on the polite signal within `stop_timeout` and had to be killed.
        """
        if self._process is None:
            return {}
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.stop_timeout
        while (left := self.survivors()) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        return left


def vllm_command(model: Path, *flags: str) -> list[str]:
    """The command that serves a model with vLLM.

    The module and not the `vllm` script: the script asks for a distribution named vllm, which the cpu
    image's build of it is not.
    """
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]


def _marked(mark: bytes) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            # A zombie holds nothing and cannot be killed again.
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            yield (
                int(folder.name),
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
            )

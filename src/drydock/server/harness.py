"""One inference server: started, ready only when it generates, asked, and ended with nothing left."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drydock.server import client, devices, ports, processes
from drydock.server.engines import Engine, Verdict
from drydock.server.errors import FlagError, NoAnswer, NoConnection, ServerError
from drydock.server.logs import Log
from drydock.server.ports import HOST
from drydock.server.processes import Kept, listed, owners, sockets
from drydock.tiers import phase

ATTEMPT_SECONDS = 30.0
"""How long one attempt at the first completion may take; the first may compile."""
MEMORY_SECONDS = 30.0
"""From the last process's end until the devices' memory must be back."""


class Server:
    """An OpenAI-compatible server of one engine, in a session of its own, on a port that is held for it.

    >>> with Server(VLLM, path, ["--dtype", "bfloat16"], log=log) as server:
    ...     server.complete("1+1=", max_tokens=4)

    It does not outlive this process, however that ends. `request` and `complete` may be called from many threads
    at once; `start` and `stop` from one.

    Parameters:
        engine: the engine.
        model: folder of the model.
        flags: the engine's own, without model, name, address and port.
        log: file that gets its output, appended below a heading.
        environment: added to this process's; TMPDIR is the server's own folder whatever it says.
        ready_timeout: seconds from the start until it must generate.
        stop_timeout: seconds from SIGTERM until what is left is killed.
        memory_timeout: seconds until the accelerators' memory must be back where it was.

    Attributes:
        model: the name it serves the model by, new for each `Server`.
        port: of 127.0.0.1; 0 before the start.
        accepted: what the engine's parser made of the flags, name -> value.
        seconds: of each phase: start (until the weights begin to load), load, ready (until it generates) and
            stop. An engine that does not log its loading has all of it in start.
        ready_seconds: start, load and ready together.
        memory: after `stop`, MiB by device before the start and after the stop; None where there is no
            accelerator, and nothing was waited for.
        leftovers: after `stop`, names of what the engine left in its temporary folder and elsewhere, see
            `Engine.leaves`; removed with it.
    """

    def __init__(
        self,
        engine: Engine,
        model: Path,
        flags: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        ready_timeout: float = 300.0,
        stop_timeout: float = 30.0,
        memory_timeout: float = MEMORY_SECONDS,
    ) -> None:
        self.engine = engine
        self.log = log
        self.ready_timeout = ready_timeout
        self.stop_timeout = stop_timeout
        self.memory_timeout = memory_timeout
        self.model = f"drydock-{uuid.uuid4().hex[:12]}"
        self.port = 0
        self.accepted: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.ready_seconds = 0.0
        self.memory: dict[str, dict[str, int]] | None = None
        self.leftovers: list[str] = []
        self._folder = model
        self._flags = list(flags)
        # Short: engines bind sockets of 37 bytes in it, and a socket's path has 107.
        self._temporary = Path(tempfile.gettempdir(), f"d-{self.model[-8:]}")
        self._environment = {
            # The numbers in CUDA_VISIBLE_DEVICES are then those of nvidia-smi.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            # What torch compiles is for the next server too.
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",
            **engine.environment,
            **os.environ,
            **(environment or {}),
            # Its own, and gone with it: at each stop vLLM 0.24 leaves the sockets between its processes there.
            "TMPDIR": str(self._temporary),
        }
        self._before: dict[str, int] | None = None
        self._held: socket.socket | None = None
        self._mapped: set[Path] = set()
        self._log: Log | None = None
        self._kept: Kept | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start the server and return when it generates.

        Raises:
            FlagError: the engine's parser refuses the flags; within seconds, and no server was started.
            ServerError: it ended, or does not generate within `ready_timeout`, or another server has its port.
                Whatever is raised, nothing of it is left.
        """
        if self._kept and not self._kept.closed:
            raise ServerError("the server was started before: stop it first")
        began = time.monotonic()
        self.seconds = {}
        self._kept, self.memory, self.leftovers = None, None, []
        try:
            with contextlib.ExitStack() as current:
                self._start(began + self.ready_timeout, current)
        except BaseException as error:
            try:
                self.stop()
            except ServerError as second:
                error.add_note(f"and when it was stopped: {second}")
            raise
        self.ready_seconds = time.monotonic() - began

    def _start(self, deadline: float, current: contextlib.ExitStack) -> None:
        current.enter_context(self._phase("start"))
        self._temporary.mkdir(mode=0o700)
        self._before = devices.used_mib(self._environment)
        self._held = ports.hold()
        self.port = self._held.getsockname()[1]
        if not self.engine.shares_port:
            # Somebody may take it before the server does, which then ends; what answers is looked at in any case.
            self._held.close()
        folder = self._named() if self.engine.named_by_folder else self._folder
        flags = self.engine.flags(self._flags, model=folder, name=self.model, host=HOST, port=self.port)
        log = self._log = Log(self.log, f"{self.engine.name} {' '.join(flags)}")
        with log.output, Verdict() as verdict:
            self._kept = Kept(
                self.engine.launch(verdict.handle, flags, serve=True),
                environment=self._environment, output=log.output, handles=[verdict.handle],
            )  # fmt: skip
            try:
                self.accepted = verdict.wait(self.engine, self._kept, deadline - time.monotonic())
            except FlagError:
                raise
            except ServerError as error:
                raise self._error(str(error)) from None
        self._wait_ready(deadline, current)

    def _wait_ready(self, deadline: float, current: contextlib.ExitStack) -> None:
        log = self._log
        assert log
        coming = [("load", self.engine.loading), ("ready", self.engine.loaded)]

        def look() -> None:
            while coming and log.appeared(coming[0][1]):
                current.close()
                current.enter_context(self._phase(coming.pop(0)[0]))
            self._check_alive("while starting")

        last = "nothing listens on its port"
        while True:
            look()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._error(f"the server was not ready after {self.ready_timeout:g} s: {last}")
            problem = None
            try:
                self._complete("1", min(ATTEMPT_SECONDS, remaining), look, max_tokens=1)
            except ServerError as error:
                problem = error
            self._check_port()
            if problem is None:
                look()
                self._check_name(min(ATTEMPT_SECONDS, remaining), look)
                return
            if not isinstance(problem.__cause__, ConnectionRefusedError):
                last = str(problem).splitlines()[0]
            time.sleep(max(0.0, min(client.TICK, deadline - time.monotonic())))

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            with phase(name):
                yield
        finally:
            self.seconds[name] = time.monotonic() - began

    def _check_alive(self, doing: str) -> None:
        if self._kept is None or self._kept.closed:
            raise NoConnection(f"{doing}: refused, the server is not running")
        if fate := self._kept.fate():
            raise NoConnection(f"{doing}: the server ended {fate}\n{self.tail()}")

    def _check_port(self) -> None:
        """See that nobody else listens on the port: the proof that an answer from it is this server's."""
        assert self._kept
        listening = ports.listeners(self.port)
        foreign = listening and listening - sockets(self._kept.living())
        # A socket that its owner closed while we looked is nobody's.
        if foreign and (foreign := foreign & ports.listeners(self.port)):
            raise self._error(
                f"port {self.port} is answered by another server\n"
                + (listed(owners(foreign)) or "  of a user whose processes cannot be seen")
            )

    def _named(self) -> Path:
        """The model's folder under the name that it is served by."""
        link = self._temporary / self.model
        link.symlink_to(self._folder.resolve())
        return link

    def _check_name(self, timeout: float, meanwhile: Callable[[], None]) -> None:
        """See that what answers is served by our name, where its answers repeat whatever name they are asked by."""
        if not self.engine.repeats_name:
            return
        answer = self._ask("/v1/models", None, timeout, meanwhile)
        match answer:
            case {"data": [{"id": name}]} if name == self.model:
                return
        raise self._error(f"port {self.port} is answered, but not by this server: {str(answer)[:200]}")

    def _error(self, text: str) -> ServerError:
        return ServerError(f"{text}\n{self.tail()}")

    def request(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60.0) -> Any:
        """GET, or POST a JSON body, and return the JSON answer (or text where it is not JSON).

        Parameters:
            timeout: seconds until the answer is complete, however it comes.

        Raises:
            NoAnswer: no complete answer in `timeout` seconds.
            NoConnection: the server ended (before, or while it was to answer), was stopped, or broke the connection.
            ServerError: an HTTP status that is not 2xx, with the server's words.
        """
        self._check_alive(path)
        return self._ask(path, body, timeout, lambda: self._check_alive(path))

    def _ask(
        self, path: str, body: Mapping[str, Any] | None, timeout: float, meanwhile: Callable[[], None]
    ) -> Any:
        try:
            status, text = client.ask(self.port, path, body, timeout=timeout, meanwhile=meanwhile)
        except ServerError:
            raise
        except TimeoutError as error:
            raise NoAnswer(f"{path}: no complete answer within {timeout:.3g} s\n{self.tail()}") from error
        except (OSError, http.client.HTTPException) as error:
            # The connection breaks a moment before the process can be seen to have ended.
            if self._kept and not isinstance(error, ConnectionRefusedError):
                self._kept.fate(wait=1.0)
            self._check_alive(path)
            raise NoConnection(f"{path}: {error or type(error).__name__}\n{self.tail()}") from error
        if not 200 <= status < 300:
            raise self._error(f"{path}: HTTP {status}: {text[:500]}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def complete(self, prompt: str | Sequence[int], timeout: float = 60.0, **options: Any) -> dict[str, Any]:
        """One completion through `/v1/completions`; the first choice.

        Raises:
            ServerError: as `request`, or the answer is another server's or has no completion in it.
        """
        path = "/v1/completions"
        self._check_alive(path)
        return self._complete(prompt, timeout, lambda: self._check_alive(path), **options)

    def _complete(
        self, prompt: str | Sequence[int], timeout: float, meanwhile: Callable[[], None], **options: Any
    ) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, **options}
        answer = self._ask("/v1/completions", body, timeout, meanwhile)
        if not isinstance(answer, dict) or answer.get("model") != self.model:
            raise self._error(f"port {self.port} is answered, but not by this server: {str(answer)[:200]}")
        # An engine that gave up on a request has been seen to answer with nothing in it. That is this request's
        # failure, and no reason to think less of the server.
        match answer.get("choices"):
            case [{"text": str()} as choice, *_]:
                return dict(choice)
        raise self._error(f"/v1/completions: an answer without a completion: {str(answer)[:200]}")

    def reload_weights(self, timeout: float = 120.0) -> None:
        """Have the engine load the weights from the model's folder again, with no request under way.

        Raises:
            ServerError: the engine cannot, or did not load all of them.
        """
        if self.engine.reload is None or self._log is None:
            raise ServerError(f"{self.engine.name} cannot load weights again, or was never started")
        for name, value in self.engine.development.items():
            if self._environment.get(name) != value:
                raise ServerError(
                    f"loading weights again takes environment={{{name!r}: {value!r}}} at the start"
                )
        deadline = time.monotonic() + timeout
        self._log.skip()
        self.engine.reload(
            lambda path, body: self.request(path, body, deadline - time.monotonic()), str(self._folder)
        )
        if self.engine.not_reloaded and self._log.appeared(self.engine.not_reloaded):
            raise self._error("not all weights were loaded again")

    def tail(self, lines: int = 25) -> str:
        """The last lines of this start's part of the log."""
        return self._log.tail(lines) if self._log else "(no log yet)"

    def survivors(self) -> dict[int, str]:
        """pid -> command line of every living process this server started, in its group or not."""
        return self._kept.living() if self._kept else {}

    def stop(self) -> dict[int, str]:
        """End the server and everything it started, and see that port and accelerators are free again.

        Also when it is interrupted: then what is left is killed at once. A second call does nothing. What a
        killed engine had in /dev/shm stays there, since other processes may use it too, but for what is known to be its
        own (`Engine.leaves`).

        Returns:
            pid -> command line of what did not end within `stop_timeout` of the polite signal, and was killed.

        Raises:
            ServerError: something survived SIGKILL, somebody else has the port, or a device's memory was not
                given back within `memory_timeout`.
        """
        kept = self._kept
        try:
            if kept is None or kept.closed:
                return {}
            with self._phase("stop"):
                return self._stop(kept)
        finally:
            # A budget's exception may come from anywhere, the phase itself included.
            if kept and not kept.closed:
                kept.kill()
            if self._held and (kept is None or kept.closed):
                self._held.close()
                self._held = None
            if self._temporary.is_dir() and (kept is None or kept.closed):
                elsewhere = {path for path in self._mapped if path.exists()}
                inside = {path.name for path in self._temporary.iterdir()} - {self.model}
                self.leftovers = sorted(inside | {path.name for path in elsewhere})
                shutil.rmtree(self._temporary)
                for path in elsewhere:
                    path.unlink()

    def _stop(self, kept: Kept) -> dict[int, str]:
        self._mapped = processes.mapped(kept.living(), self.engine.leaves)
        kept.interrupt()
        left = {} if kept.gone(self.stop_timeout) else kept.living()
        if not kept.kill():
            raise self._error(f"alive {processes.KILL_SECONDS:g} s after SIGKILL:\n{listed(kept.living())}")
        if listening := ports.listeners(self.port):
            raise self._error(f"port {self.port} is open after the stop\n{listed(owners(listening))}")
        if self._before is not None:
            try:
                after = devices.wait_returned(self._before, self._environment, self.memory_timeout)
            except ServerError as error:
                raise self._error(str(error)) from None
            self.memory = {
                name: {"before": used, "after": after[name]} for name, used in self._before.items()
            }
        return left

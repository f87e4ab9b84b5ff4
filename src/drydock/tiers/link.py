"""pytest's end of the line to its watchdog: makes the watchdog, tells it what happens, leaves when told to."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from drydock.errors import DrydockError
from drydock.tiers.processes import descendants, now
from drydock.tiers.wire import DUMP, OUT, WAKE, Lines, pack

PR_SET_PDEATHSIG = 1
PR_SET_PTRACER = 0x59616D61
ANY = ctypes.c_ulong(-1)
HELLO_SECONDS = 30.0
ALONE_SECONDS = 60
"""How long pytest outlives its watchdog at most."""
TWICE_SECONDS = 1.0
"""A signal that comes again within this is the same one: a terminal's, passed on by the watchdog too."""


ENDING: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""The signals that end pytest, and what Python makes of them by itself."""


class Link:
    """The line. Only the process that made it and, but for records, its main thread use it.

    Parameters:
        over: makes the exception that leaves an overrun test, of the line that says why.
        gone: makes the exception that ends pytest when the watchdog died.
    """

    def __init__(self, over: Callable[[str], BaseException], gone: Callable[[], BaseException]) -> None:
        self._over = over
        self._gone = gone
        self._armed = False
        self._busy = 0
        self._waiting: list[int] = []
        self._lock = threading.Lock()
        self._lines = Lines()
        self._received: list[dict[str, Any]] = []
        self._token = 0
        self._masks: list[set[int]] = []
        self._signalled = -TWICE_SECONDS
        self._dead = False
        self._raised: tuple[BaseException, str] | None = None
        self.by: str | None = None
        """The signal that is ending pytest."""
        self._fork()

    # ---------------------------------------------------------------- making the watchdog

    def _fork(self) -> None:
        """Turn this process into the watchdog; what goes on from here is its child.

        Raises:
            DrydockError: there is no watchdog.
        """
        # A file and no pipe: faulthandler's answer must not need a quick reader.
        fault = os.memfd_create("stacks")
        mine, its = socket.socketpair()
        came, coming = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            _become_watchdog(its, fault, child, came)
        its.close()
        # `came` stays open: when the watchdog is gone, each signal would be a complaint about a pipe without a reader.
        self._socket = mine
        self._pid, self._watchdog = os.getpid(), os.getppid()
        libc = ctypes.CDLL(None)
        # py-spy is the watchdog's child, not this process's ancestor: some kernels ask for this.
        libc.prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
        faulthandler.register(DUMP, file=fault, all_threads=True, chain=False)
        self._fault = fault
        # The watchdog is told of each signal as it comes, and wakes this process. Python's handlers run between
        # instructions: of what comes just before a call that blocks they would run when that is over.
        signal.set_wakeup_fd(coming, warn_on_full_buffer=False)
        signal.signal(WAKE, lambda *_: None)
        signal.signal(OUT, self._on_signal)
        libc.prctl(PR_SET_PDEATHSIG, int(OUT), 0, 0, 0)
        for number in ENDING:
            signal.signal(number, self._on_signal)
        # Blocked meanwhile: what ends a child must not find the handler of its parent in it and be lost.
        os.register_at_fork(
            before=self._before_fork, after_in_child=self._in_child, after_in_parent=self._after_fork
        )
        mine.settimeout(HELLO_SECONDS)
        try:
            hello = self._receive()
        except OSError as error:
            raise DrydockError(f"the tier's watchdog did not start: {error or 'it ended'}") from error
        assert "hello" in hello
        mine.settimeout(None)

    def _before_fork(self) -> None:
        self._masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ENDING))

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.pop())

    def _in_child(self) -> None:
        """What a test forks is no pytest: it has no line, and a signal ends it as any process."""
        if not self._dead:
            self._dead = True
            self._socket.close()
            signal.set_wakeup_fd(-1)
            for number in ENDING:
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, ENDING[number])
        self._after_fork()

    def order(self, **content: Any) -> None:
        """Say what is run; the first message."""
        self.tell("order", **content)

    # ---------------------------------------------------------------- leaving

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        __tracebackhide__ = True
        if os.getpid() != self._pid:
            return
        self._waiting.append(number)
        if not self._busy:
            self._act()

    def _act(self) -> None:
        """Do what the signals that came ask for; raises to leave."""
        __tracebackhide__ = True
        while self._waiting:
            number = self._waiting.pop(0)
            if number == OUT:
                if os.getppid() != self._watchdog:
                    self._die()
                elif self._armed:
                    self._leave()
            elif time.monotonic() - self._signalled > TWICE_SECONDS:
                self._signalled = time.monotonic()
                self._waiting = [other for other in self._waiting if other == OUT]
                self.by = signal.Signals(number).name
                raise KeyboardInterrupt(self.by)

    def _leave(self) -> None:
        __tracebackhide__ = True
        with self._held():
            self._socket.sendall(pack({"what": "raised", "at": time.monotonic()}))
            # The line was sent before the signal; nothing else is, while a test runs.
            message = self._receive()
        raise self._over(message["overrun"])

    def _die(self) -> None:
        if not self._dead:
            self._dead = True
            # Fixtures may clean up; a test that swallows what is raised here has nobody left to end it.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(ALONE_SECONDS)
            raise self._gone()

    # ---------------------------------------------------------------- saying

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Alone on the line: a signal's exception waits, or a message would be cut in two."""
        main = threading.current_thread() is threading.main_thread()
        self._busy += main
        try:
            with self._lock:
                yield
        finally:
            self._busy -= main
        if main and not self._busy:
            self._act()

    def _receive(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        while not messages:
            data = self._socket.recv(65536)
            if not data:
                raise OSError("it closed the line")
            messages = self._lines.feed(data)
        first, *rest = messages
        self._received += rest
        return first

    def tell(self, what: str, **content: Any) -> None:
        """Say what happened.

        Raises:
            What `gone` makes: nobody listens any more.
        """
        if self._dead or os.getpid() != self._pid:
            return
        try:
            with self._held():
                self._socket.sendall(pack({"what": what, "at": time.monotonic(), **content}))
        except OSError:
            self._die()

    def ask(self, what: str, **content: Any) -> dict[str, Any]:
        """Say what happened and wait for what the watchdog makes of it; empty where it is gone already."""
        if self._dead or os.getpid() != self._pid:
            return {}
        answer: dict[str, Any] = {}
        try:
            with self._held():
                self._socket.sendall(pack({"what": what, "at": time.monotonic(), **content}))
                # A word to leave a test that is over by now answers nothing.
                answer = self._receive()
                while "overrun" in answer:
                    answer = self._received.pop(0) if self._received else self._receive()
        except OSError:
            self._die()
        return answer

    # ---------------------------------------------------------------- phases and records

    def begin(self, name: str, outer: bool = False) -> int:
        """`drydock.tiers.Listener`; `outer`: whatever is still open is over."""
        if threading.current_thread() is not threading.main_thread():
            return 0
        self._token += 1
        token = self._token
        self.tell("phase", token=token, name=name, outer=outer)
        return token

    def end(self, token: int, name: str, error: BaseException | None) -> None:
        """`drydock.tiers.Listener`."""
        if token == 0:
            return
        if error is not None and (self._raised is None or self._raised[0] is not error):
            self._raised = error, name
        self.tell("phase-end", token=token)

    def record(self, name: str, value: Any) -> None:
        """`drydock.tiers.Listener`."""
        self.tell("record", name=name, value=value)

    def phase_of(self, error: BaseException | None, otherwise: str) -> str:
        """The innermost phase that an exception left."""
        return self._raised[1] if self._raised and self._raised[0] is error else otherwise

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One of pytest's stages of a test, as that phase.

        Only inside is a test left by an exception when it is over its budget: pytest is not disturbed.
        """
        token = self.begin(name, outer=True)
        error = None
        try:
            self._armed = True
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._armed = False
            self.end(token, name, error)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """What is started inside is for more tests than the running one and outlives its overrun."""
        began = now()
        yield
        if not self._dead:
            found = descendants(self._watchdog)
            self.tell(
                "shared",
                processes=[
                    process.key for process in found if process.born >= began and process.pid != self._pid
                ],
            )


def _become_watchdog(line: socket.socket, fault: int, pytest: int, came: int) -> None:
    """Replace this process's program; never returns."""
    try:
        for descriptor in (line.fileno(), fault, came):
            os.set_inheritable(descriptor, True)
        source = str(Path(__file__).parents[2])
        # Without site and the current folder: nothing that lies about there can keep it from starting.
        os.execve(
            sys.executable,
            [sys.executable, "-P", "-S", "-m", "drydock.tiers.watchdog",
             str(line.fileno()), str(fault), str(pytest), str(came)],
            {**os.environ, "PYTHONPATH": source, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except BaseException as error:
        os.write(2, f"drydock: the tier's watchdog did not start: {error}\n".encode())
        os._exit(2)

"""A command and everything it starts: kept together, seen, and ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from drydock.server.errors import ServerError

KEEPER = Path(__file__).with_name("keeper.py")
START_SECONDS = 60.0
"""For the keeper, which imports next to nothing."""
KILL_SECONDS = 10.0
"""From SIGKILL until a process must be gone. What hangs in a driver may not be."""
MARK = "DRYDOCK_SERVER"
"""Variable that every process of a server inherits.

It finds them even when their keeper was killed, but not all: a process that clears its environment has lost it,
and so has one that gave itself a long title, as vLLM's EngineCore and Worker do (setproctitle writes over it).
"""


class Kept:
    """A command, run by a keeper (`drydock.server.keeper`) in a session of its own.

    It does not outlive this object's process: when that ends, in whatever way, the keeper kills it all.

    Parameters:
        command: program and arguments.
        environment: all of it; the mark is added.
        output: gets standard output and error; standard input is empty.
        handles: more file handles for the command, by the same numbers.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        output: IO[bytes],
        handles: Sequence[int] = (),
    ) -> None:
        self.pid = 0
        if Path("/proc/self").readlink().name != str(os.getpid()):
            raise ServerError(
                "/proc shows the processes of another namespace, so what a server starts cannot be seen: "
                "mount a /proc of this one, or use --runtime docker"
            )
        self._mark = uuid.uuid4().hex
        self._fate: str | None = None
        self._lines = b""
        self._lock = threading.Lock()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            read, write = os.pipe()
            self._events = undo.enter_context(os.fdopen(read, "rb", buffering=0))
            theirs.callback(os.close, write)
            os.set_blocking(read, False)
            # Whatever interrupts the next lines: when this pipe closes, the keeper kills what it keeps.
            life, held = os.pipe()
            self._life = undo.enter_context(os.fdopen(held, "wb", buffering=0))
            theirs.callback(os.close, life)
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), str(life), str(write), *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**environment, MARK: self._mark},
                pass_fds=(life, write, *handles), start_new_session=True,
            )  # fmt: skip
            theirs.close()
            while not self.pid and self._fate is None:
                if not readable(read, START_SECONDS):
                    raise ServerError(f"{sys.executable} did not start within {START_SECONDS:g} s")
                self._hear()
            undo.pop_all()

    @property
    def closed(self) -> bool:
        """Whether it was ended, and nothing is left."""
        return self._events.closed

    def fate(self, wait: float = 0.0) -> str | None:
        """How the command ended ("with status 3", "by signal SIGSEGV"), or None while it runs.

        Parameters:
            wait: seconds to wait for it to end.
        """
        with self._lock:
            deadline = time.monotonic() + wait
            while self._fate is None and not self._events.closed:
                readable(self._events.fileno(), max(0.0, deadline - time.monotonic()))
                self._hear()
                if time.monotonic() >= deadline:
                    break
            return self._fate

    def _hear(self) -> None:
        data = self._events.read(4096)  # None: nothing yet
        *lines, self._lines = (self._lines + (data or b"")).split(b"\n")
        for line in lines:
            word, number = line.decode().split()
            if word == "began":
                self.pid = int(number)
            else:
                self._fate = _fate(int(number))
        if data == b"" and self._fate is None:
            self._fate = "when its keeper was killed"

    def living(self) -> dict[int, str]:
        """pid -> command line of every process of the command that is alive."""
        table = _table()
        # The number of a keeper that has ended may be somebody else's by now.
        below = {self._keeper.pid} if self._keeper.poll() is None else set()
        while more := {pid for pid, (parent, _) in table.items() if parent in below} - below:
            below |= more
        below.discard(self._keeper.pid)
        # A zombie holds nothing and cannot be killed again.
        found = sorted(pid for pid in below | self._marked(table) if table.get(pid, (0, "X"))[1] not in "ZX")
        return {pid: title for pid in found if (title := _title(pid))}

    def _marked(self, table: Mapping[int, tuple[int, str]]) -> set[int]:
        found = set()
        mark = f"{MARK}={self._mark}".encode()
        for pid in table:
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.add(pid)
        return found - {self._keeper.pid}

    def interrupt(self) -> None:
        """Ask the command's process group to end (SIGTERM)."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                # While a process is in the group, the group's number is nobody else's.
                if os.getpgid(pid) == self.pid:
                    os.killpg(self.pid, signal.SIGTERM)
                    return

    def gone(self, wait: float) -> bool:
        """Whether nothing is left of the command, waiting up to so many seconds for it."""
        deadline = time.monotonic() + wait
        with contextlib.suppress(subprocess.TimeoutExpired):
            # It ends when nobody is below it, and not before.
            if self._keeper.wait(wait) == 0:
                return True
        while self.living():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return self._keeper.returncode is not None

    def kill(self) -> bool:
        """Kill all that is left (SIGKILL); whether nothing is, `KILL_SECONDS` later. Then this is closed."""
        if not self._life.closed:
            # A byte, since a process that was forked from this one may hold the pipe open.
            with contextlib.suppress(BrokenPipeError):
                self._life.write(b"!")
            self._life.close()
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not self.gone(KILL_SECONDS) and self.living():
            return False
        self._keeper.kill()
        self._keeper.wait()
        self.fate()
        with self._lock:
            self._events.close()
        return True


def readable(handle: int, seconds: float) -> bool:
    """Whether a handle has something to read, or its other end is closed, within so many seconds."""
    # Not select(), which refuses handles above 1023: a process that runs ray has more.
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def sockets(pids: Iterable[int]) -> set[int]:
    """The inode numbers of the sockets that these processes have open."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    kind, _, inode = str(handle.readlink()).partition(":")
                    if kind == "socket":
                        found.add(int(inode.strip("[]")))
    return found


def mapped(pids: Iterable[int], patterns: Sequence[str]) -> set[Path]:
    """Files that these processes have mapped and that one of the patterns (glob's) is for.

    By their inodes too: glibc's sem_open maps a new semaphore under a name that is no more, and links it to its own.
    """
    paths: set[str] = set()
    inodes: set[tuple[str, int]] = set()
    for pid in pids if patterns else ():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                _, _, _, device, inode, *name = line.split(maxsplit=5)
                paths |= set(name)
                inodes.add((device, int(inode)))
    found = set()
    for path in (path for pattern in patterns for path in Path("/").glob(pattern.removeprefix("/"))):
        with contextlib.suppress(OSError):
            seen = path.stat()
            device = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"
            if str(path) in paths or (device, seen.st_ino) in inodes:
                found.add(path)
    return found


def owners(inodes: set[int]) -> dict[int, str]:
    """pid -> command line of the processes that have one of these sockets open, as far as this user may see."""
    return {pid: _title(pid) for pid in _table() if sockets([pid]) & inodes}


def listed(processes: Mapping[int, str]) -> str:
    """Processes for an error's text."""
    return "\n".join(f"  {pid} {command[:200]}" for pid, command in processes.items())


def _fate(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    with contextlib.suppress(ValueError):
        return f"by signal {signal.Signals(-status).name}"
    return f"by signal {-status}"


def _table() -> dict[int, tuple[int, str]]:
    """pid -> (parent's pid, state) of every process."""
    table = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # The name before the last parenthesis may hold anything.
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                table[int(folder.name)] = int(fields[1]), fields[0]
    return table


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return command.strip() or f"[{Path(f'/proc/{pid}/comm').read_text().strip()}]"
    return ""

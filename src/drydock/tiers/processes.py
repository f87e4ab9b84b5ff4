"""Processes as /proc shows them: who descends from whom, since when, and how to end them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
"""The kernel's units of a process's start time, in a second."""


class Process(NamedTuple):
    """A living process. `born` is in ticks since boot; with the pid it names a process for good."""

    pid: int
    parent: int
    born: int
    state: str

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.born

    def command(self) -> str:
        """Its command line, or its name where it has none; empty once it is gone."""
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{self.pid}")
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            return line or f"[{(folder / 'comm').read_text().strip()}]"
        return ""


def now() -> int:
    """This moment, as `Process.born` counts."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS)


TOLD = "DRYDOCK_TOLD"
"""Variable with what /proc/uptime said when a container that stood ready was told its command."""


def age() -> float:
    """Seconds since this process was started, or told what to run if that was later; 0 where /proc does not tell."""
    with contextlib.suppress(OSError):
        if _proc_is_ours():
            ages = [(now() - _read(str(os.getpid())).born) / TICKS]
            if told := os.environ.get(TOLD):
                ages.append(float(Path("/proc/uptime").read_text().split()[0]) - float(told))
            return max(0.0, min(ages))
    return 0.0


def _proc_is_ours() -> bool:
    # Where a container sees its host's /proc, the pids in it are not ours: then nobody is known.
    return Path("/proc/self").exists() and Path("/proc/self").readlink().name == str(os.getpid())


def _read(pid: str) -> Process:
    # After the name, which may hold anything: state, parent, and 19 fields on the start.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return Process(int(pid), int(fields[1]), int(fields[19]), fields[0])


def _all() -> Iterator[Process]:
    if not _proc_is_ours():
        return
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            yield _read(entry.name)


def descendants(root: int) -> list[Process]:
    """Every living process that descends from this one, parents before children; zombies are not living."""
    children: dict[int, list[Process]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process)
    found = []
    queue = list(children.get(root, ()))
    while queue:
        process = queue.pop(0)
        queue += children.get(process.pid, ())
        if process.state not in "ZX":
            found.append(process)
    return found


def send(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def end(root: int, keys: Collection[tuple[int, int]], grace: float) -> None:
    """End these descendants of `root`: SIGTERM, and SIGKILL for what still lives `grace` seconds later.

    `root` is the calling process or one of its ancestors. What they start meanwhile is not looked for.
    """

    def left() -> list[int]:
        return [process.pid for process in descendants(root) if process.key in keys]

    for pid in left():
        send(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (pids := left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in pids:
        send(pid, signal.SIGKILL)

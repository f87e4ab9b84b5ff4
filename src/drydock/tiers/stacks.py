"""Where every process of a tier is, written to a file: py-spy's stacks, faulthandler's, or the kernel's."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from drydock.tiers.processes import TICKS, Process, now, send
from drydock.tiers.wire import DUMP

ONE_SECONDS = 5.0
"""Given to one process."""
ALL_SECONDS = 20.0
"""Given to all; what comes after that is only named, with what the kernel says at once."""
THREADS = 64


def write_stacks(path: Path, title: str, processes: Iterable[Process], pytest: int, fault: int) -> None:
    """Write the stacks of processes, each under a heading, within `ALL_SECONDS` and a little.

    Parameters:
        pytest: its pid; it is the one that answers `DUMP`.
        fault: descriptor of the file that its faulthandler writes to.
    """
    deadline = time.monotonic() + ALL_SECONDS
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    with path.open("w") as file:
        print(title, file=file)
        for process in processes:
            age = (now() - process.born) / TICKS
            print(
                f"\n=== pid {process.pid}, child of {process.parent}, {age:.1f} s old: {process.command()}",
                file=file,
            )
            limit = min(ONE_SECONDS, deadline - time.monotonic())
            text = _spied(spy, process.pid, limit) if spy and limit > 0 else ""
            if not text and process.pid == pytest:
                text = _own(pytest, fault)
            print(text or _kernel(process.pid), file=file, flush=True)


def _spied(spy: str, pid: int, seconds: float) -> str:
    """py-spy's answer; empty where it cannot (no Python in there, no right to look)."""
    try:
        done = subprocess.run(
            [spy, "dump", "--pid", str(pid)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _own(pytest: int, fault: int) -> str:
    """What pytest's faulthandler writes; empty where it blocks the signal in every thread, or cannot be sent it."""
    began = os.fstat(fault).st_size
    try:
        send(pytest, DUMP)
    except OSError:
        return ""
    size, deadline = began, time.monotonic() + 1.0
    while time.monotonic() < deadline:
        time.sleep(0.05)
        previous, size = size, os.fstat(fault).st_size
        if size == previous > began:
            break
    return os.pread(fault, size - began, began).decode(errors="replace")


def _kernel(pid: int) -> str:
    """State, and for each thread where in the kernel it waits."""
    folder = Path(f"/proc/{pid}")
    lines = []
    with contextlib.suppress(OSError):
        wanted = ("State:", "Threads:", "SigBlk:", "SigIgn:")
        lines += [line for line in (folder / "status").read_text().splitlines() if line.startswith(wanted)]
        for task in sorted((folder / "task").iterdir(), key=lambda task: int(task.name))[:THREADS]:
            lines.append(
                f"thread {task.name} {_read(task / 'comm')}: waits in {_read(task / 'wchan') or '?'}"
            )
            lines += [f"    {line}" for line in _read(task / "stack").splitlines()]
    return "\n".join(lines) or "it is gone"


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""

"""Runs a command that may hang and that starts daemons, with a deadline, and says what it left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "DRYDOCK_TRAINER_CHILD"
"""Variable that all a child starts inherits: ray's daemons leave its group."""
DAEMONS_SECONDS = 5.0
"""Ray's daemons notice within a second or two that their driver has ended."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: its status, None where the deadline ended it; and what it had not ended itself."""

    status: int | None
    left: list[str]


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill(mark: str) -> list[psutil.Process]:
    """Kill what has the mark until nothing has, for ten seconds at most; what is then left."""
    until = time.monotonic() + 10
    while (living := _marked(mark)) and time.monotonic() < until:
        for process in living:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(living, timeout=1)
    return living


def run_child(
    command: Sequence[str], *, output: Path, errors: Path, deadline: float, environment: Mapping[str, str]
) -> Ended:
    """Run a command; nothing of it is alive when this returns, or raises, unless `left` says so.

    Parameters:
        output, errors: files that get what it writes.
        deadline: seconds until it is killed with all it started.
        environment: added to this process's.
    """
    mark = uuid.uuid4().hex
    with output.open("w") as out, errors.open("w") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            env={**os.environ, **environment, MARK: mark},
        )  # fmt: skip
    status, left = None, []
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(deadline)
            until = time.monotonic() + DAEMONS_SECONDS
            while (left := _marked(mark)) and time.monotonic() < until:
                time.sleep(0.2)
    finally:
        undead = _kill(mark)
        child.wait()
    return Ended(status=status, left=[" ".join(each.info["cmdline"] or [])[:200] for each in left or undead])

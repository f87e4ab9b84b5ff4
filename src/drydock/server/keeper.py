"""Runs one command and keeps hold of everything it starts, so that all of it can be seen and ended.

A program, `python -I -S keeper.py LIFE EVENTS COMMAND...`, that imports nothing of drydock. It is the parent of
the command and the subreaper (prctl(2)) of all that the command starts: what leaves its process group or
session, loses its parent or clears its environment is still below this process, and when there is nobody left to
wait for, the kernel has said that nothing is left. Two things get away: what another process starts when asked
(a running Ray head, a Docker engine, systemd), and what is left when this process is killed with SIGKILL,
which the command itself does not survive.

LIFE is the handle of a pipe that somebody holds for as long as the command may live: when it closes, for
whatever reason, everything is killed. EVENTS gets the lines `began PID` and `ended STATUS`, minus N for signal
N, and is closed when nothing is left. Output and environment are the command's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterator

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_prctl = ctypes.CDLL(None).prctl


def _begin(command: list[str]) -> int:
    keeper = os.getpid()
    waiting, running = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        # Until it has become the command, in a group of its own and open to signals, nobody shall hear of it.
        os.close(running)
        os.read(waiting, 1)
        os.close(waiting)
        return pid
    try:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(126)
        signal.set_wakeup_fd(-1)
        for number in (*ENDING, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _children() -> Iterator[int]:
    own = str(os.getpid())
    for name in os.listdir("/proc"):  # noqa: PTH208  # pathlib takes longer to import than all the rest
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", errors="replace") as file:  # noqa: PTH123
                if file.read().rpartition(")")[2].split()[1] == own:
                    yield int(name)


def keep(life: int, events: int, command: list[str]) -> None:
    """Return when nothing of the command is left."""
    os.set_inheritable(life, False)
    os.set_inheritable(events, False)
    # Who started this may have blocked some; the command would never see its SIGTERM.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    for number in (*ENDING, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    parent = os.getppid()
    leader = _begin(command)
    # Nobody may be left to read them.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _tell(events, f"began {leader}\n")
    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(life, select.POLLIN)
    killing = False
    while True:
        try:
            while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                if reaped[0] == leader:
                    _tell(events, f"ended {os.waitstatus_to_exitcode(reaped[1])}\n")
        except ChildProcessError:
            return
        # A parent that was killed may have left LIFE open in a process that it forked: so ask, too.
        ready = dict(poll.poll(20 if killing else 1000))
        numbers = os.read(woken, 512) if woken in ready else b""
        told = life in ready or os.getppid() != parent or any(number in numbers for number in ENDING)
        if told and not killing:
            killing = True
            poll.unregister(life)
        if killing:
            # Children only: what is below them becomes a child when they die.
            for pid in _children():
                with contextlib.suppress(PermissionError):  # another user's, by a set-user-id program
                    os.kill(pid, signal.SIGKILL)


def _tell(events: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(events, line.encode())


if __name__ == "__main__":
    keep(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

"""pytest's parent process: holds each test to its budget and writes the tier's result whatever happens.

The plugin forks: the first process becomes this program, its child goes on as pytest. So it learns how
pytest ended, its exit status is the run's, and no runtime takes the container away before the result is
written. Orphans of the tier come to it too. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from drydock.tiers.budgets import parse_tier
from drydock.tiers.ledger import DEFAULT_CEILING, Ledger, Test
from drydock.tiers.processes import descendants, end, send
from drydock.tiers.stacks import write_stacks
from drydock.tiers.wire import OUT, WAKE, Lines, pack

PR_SET_CHILD_SUBREAPER = 36
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end pytest."""
STRIKES = 2
"""Times that a test is told to leave before pytest is killed."""
END_SECONDS = 2.0
"""Between SIGTERM and SIGKILL for what an overrun test started."""
WAKE_SECONDS = 0.1
"""From a signal to pytest until it is woken."""
WRITE_SECONDS = 0.5
"""The document on disk is at most this much behind."""


class Watchdog:
    """One tier's run, watched.

    Parameters:
        line: socket to pytest.
        fault: descriptor of the file that pytest's faulthandler writes to.
        pytest: its pid, a child of this process.
        came: descriptor from which the numbers of the signals that pytest gets are read, as they come.
    """

    def __init__(self, line: socket.socket, fault: int, pytest: int, came: int) -> None:
        self._line = line
        self._fault = fault
        self._pytest = pytest
        self._came = came
        self._wake = math.inf
        self._lines = Lines()
        self._status: int | None = None
        self._killed = False
        self._wanted: list[int] = []
        self._written = 0.0
        self._dirty = True
        # Of the running test:
        self._before: set[tuple[int, int]] = set()
        self._still = math.inf
        self._mid_line = False
        self._strikes = 0
        self._struck = 0.0
        self._moved = False
        self._base = (0.0, 0.0)
        self._heard = time.monotonic()
        # For the tier:
        self._shared: set[tuple[int, int]] = set()
        self._stacks = 0
        self._stopping: float | None = None
        order = self._receive_order()
        budget = order["budget"]
        self._grace: float = order["grace"]
        self._every: float = order["still"]
        self._exit: float = order["exit"]
        self._results = Path(order["results"])
        self._ledger = Ledger(
            order["began"],
            tier=order["tier"],
            profile=order["profile"],
            image=order["image"],
            budget=None if budget is None else parse_tier(budget, "budget"),
            session_seconds=order["session_seconds"],
            profile_values=order["profile_values"],
        )
        self._ledger.refusal = order["refusal"]
        for path in self._results.glob(f"{self._ledger.tier}-stacks-*.txt"):
            path.unlink()
        self._write()

    def _receive_order(self) -> dict[str, Any]:
        self._line.sendall(pack({"hello": os.getpid()}))
        while data := self._line.recv(65536):
            messages = self._lines.feed(data)
            if messages:
                self._early = messages[1:]
                return messages[0]
        raise SystemExit("drydock: pytest ended before it said what it runs")

    def watch(self) -> int:
        """Until pytest has ended; the run's exit status."""
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in ENDING:
            signal.signal(number, lambda number, _: self._wanted.append(number))
        self._line.setblocking(False)
        for message in self._early:
            self._handle(message)
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            selector.register(self._came, selectors.EVENT_READ)
            selector.register(self._line, selectors.EVENT_READ)
            while True:
                self._reap()
                if self._hear() and self._status is None and self._line in selector.get_map():
                    selector.unregister(self._line)
                if self._status is not None:
                    break
                self._pass_on()
                if not self._rouse(time.monotonic()) and self._came in selector.get_map():
                    selector.unregister(self._came)
                self._tick(time.monotonic())
                if self._dirty and time.monotonic() - self._written >= WRITE_SECONDS:
                    self._write()
                selector.select(self._pause(time.monotonic()))
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
        return self._close()

    # ---------------------------------------------------------------- what pytest says

    def _hear(self) -> bool:
        """Take in what pytest has said; whether it has closed its end."""
        while True:
            try:
                data = self._line.recv(1 << 20)
            except BlockingIOError:
                return False
            except OSError:
                return True
            if not data:
                return True
            for message in self._lines.feed(data):
                self._handle(message)

    def _handle(self, message: dict[str, Any]) -> None:
        ledger, at = self._ledger, message["at"]
        self._heard = max(self._heard, at)
        self._dirty = True
        if self._strikes and not self._moved and at > self._struck:
            self._moved = True
            self._base = self._used(at)
        match message["what"]:
            case "phase" if ledger.running:
                if message["outer"]:
                    ledger.running.clock.clear(at)
                ledger.running.clock.begin(message["token"], message["name"], at)
            case "phase-end" if ledger.running:
                ledger.running.clock.end(message["token"], at)
            case "record" if ledger.running:
                ledger.running.records[message["name"]] = message["value"]
            case "report" if ledger.running:
                ledger.report(message["outcome"], message["phase"], message["message"], message["detail"])
            case "shared":
                self._shared |= {(pid, born) for pid, born in message["processes"]}
            case "test":
                self._strikes = 0
                # By name and not by the time of their start, of which the kernel tells hundredths of a second: what was
                # started at import would be taken for the first test's.
                self._before = {process.key for process in descendants(os.getpid())}
                self._still = at + self._every
                self._mid_line = message["mid_line"]
                self._answer({"refused": ledger.begin(message["id"], at)})
            case "done":
                row = ledger.finish(at)
                self._strikes = 0
                self._answer({"outcome": row.outcome, "message": row.message})
            case "collected":
                ledger.collect(message["tests"], message["not_selected"], message["whole"])
            case "broken":
                ledger.broken.append({key: message[key] for key in ("id", "message", "detail")})
            case "interrupted":
                self._interrupt(message["by"], at)
            case "finishing":
                self._stopping = self._stopping or at
            case "end":
                problems = ledger.close(message["unread"])
                self._answer({"problems": [problem.line for problem in problems]})

    def _answer(self, message: dict[str, Any]) -> None:
        # pytest reads each answer before it asks again, so it always fits; and it may be gone.
        with contextlib.suppress(OSError):
            self._line.sendall(pack(message))

    def _interrupt(self, by: str, at: float) -> None:
        ledger = self._ledger
        if ledger.interrupted or ledger.ended:
            return
        ledger.interrupted = f"interrupted by {by}"
        ledger.lose(f"interrupted by {by} while it ran", at, "not-run")
        self._stopping = at
        self._write()

    # ---------------------------------------------------------------- deadlines

    def _used(self, now: float) -> tuple[float, float]:
        """Seconds of the running test in stop, and in all other phases."""
        row = self._ledger.running
        if row is None:
            return 0.0, 0.0
        stop = row.clock.at("stop", now)
        return stop, sum(row.clock.at(phase, now) for phase in row.clock.seconds) - stop

    def _left(self, now: float) -> float:
        """Seconds until something must be done about pytest."""
        ledger, row = self._ledger, self._ledger.running
        if ledger.ended or ledger.refusal:
            return self._heard + self._exit - now
        if self._stopping is not None:
            return self._stopping + ledger.stop_ceiling() + self._grace - now
        if row is None or row.clock.phase is None:
            left = self._heard + DEFAULT_CEILING - now
            # Between tests the session's end only means that no other begins.
            return left if ledger.collected else min(left, ledger.session_left(now))
        if not self._strikes:
            return ledger.allowance(row.clock.phase, row, now).left
        if not self._moved:
            return self._struck + self._grace - now
        stop, others = self._used(now)
        if row.clock.phase == "stop":
            return ledger.stop_ceiling() - (stop - self._base[0])
        return self._grace - (others - self._base[1])

    def _tick(self, now: float) -> None:
        if self._killed or self._left(now) > 0:
            self._say_still(now)
            return
        ledger, row = self._ledger, self._ledger.running
        phase = row.clock.phase if row else None
        if ledger.ended:
            self._kill(f"pytest did not end within {self._exit:g} s of its last test")
        elif self._stopping is not None:
            self._kill("pytest did not end after it was interrupted")
        elif row is None or phase is None:
            self._kill(
                "overrun outside of tests" if ledger.collected else "overrun while tests were collected"
            )
        elif self._strikes and not (self._moved and self._strikes < STRIKES):
            self._kill(f"pytest did not come back from {row.id}", dump=False)
        else:
            self._strike(row, phase, now)

    def _strike(self, row: Test, phase: str, now: float) -> None:
        """Get the running test out: stacks first, then what it started ends, then it is told to leave."""
        ledger = self._ledger
        message = ledger.allowance(phase, row, now).line(phase)
        self._strikes += 1
        ledger.overrun(message, phase, self._dump(f"{row.id}: {row.message or message}"))
        self._write()
        mine = [process for process in descendants(os.getpid()) if process.pid != self._pytest]
        kept: set[int] = set()
        doomed = set()
        for process in mine:  # parents first
            if process.key in self._shared | self._before or process.parent in kept:
                kept.add(process.pid)
            else:
                doomed.add(process.key)
        end(os.getpid(), doomed, END_SECONDS)
        self._answer({"overrun": row.message})
        self._struck, self._moved = time.monotonic(), False
        send(self._pytest, OUT)

    def _kill(self, why: str, dump: bool = True) -> None:
        """End pytest; that it ended is noticed as any other end of it."""
        stacks = f", stacks in {self._dump(why)}" if dump else ""
        self._ledger.hung = f"{why}: killed{stacks}"
        self._killed = True
        self._write()
        send(self._pytest, signal.SIGKILL)

    def _dump(self, title: str) -> str:
        self._stacks += 1
        path = self._results / f"{self._ledger.tier}-stacks-{self._stacks}.txt"
        write_stacks(path, title, descendants(os.getpid()), self._pytest, self._fault)
        return path.name

    def _say_still(self, now: float) -> None:
        row = self._ledger.running
        if now < self._still:
            return
        self._still += self._every
        if row is None or row.clock.phase is None or sys.stdout.isatty():
            return
        allowance = self._ledger.allowance(row.clock.phase, row, now)
        text = (
            f"still in {row.id}, phase {row.clock.phase}, {allowance.used:.0f} s of {allowance.ceiling:g} s"
        )
        # pytest's dots leave the cursor in the middle of a line.
        self._print(f"\n{text}" if self._mid_line else text)
        self._mid_line = False

    def _pause(self, now: float) -> float:
        waits = [self._left(now), self._still - now, self._wake - now]
        if self._dirty:
            waits.append(self._written + WRITE_SECONDS - now)
        return min(5.0, max(0.01, min(waits)))

    # ---------------------------------------------------------------- the end

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pytest:
                    self._status = os.waitstatus_to_exitcode(status)

    def _pass_on(self) -> None:
        """Signals that were sent to this process are meant for pytest, which knows twice from once."""
        while self._wanted:
            number = self._wanted.pop(0)
            self._interrupt(signal.Signals(number).name, time.monotonic())
            send(self._pytest, number)

    def _rouse(self, now: float) -> bool:
        """Wake pytest, whose handler of a signal that came just before it went to sleep has not run.

        False if no more signals are told: its end has closed the pipe.
        """
        numbers: bytes | None = None
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self._came, 4096)
        if numbers and set(numbers) & {OUT, *ENDING}:
            self._wake = now + WAKE_SECONDS
        if self._wake <= now:
            self._wake = math.inf
            send(self._pytest, WAKE)
        return numbers != b""

    def _close(self) -> int:
        """pytest has ended: the last verdicts, what survived, the document."""
        assert self._status is not None
        ledger, status, at = self._ledger, self._status, time.monotonic()
        where = f" in {ledger.running.id}" if ledger.running else ""
        if status < 0 and not self._killed:
            ledger.crashed = f"pytest was ended by {_signal_name(-status)}{where}"
        elif not ledger.ended and (ledger.running or status == 0) and not self._killed:
            ledger.crashed = f"pytest's process left with status {status}{where}, before its end"
        why = ledger.crashed or ledger.hung or "pytest ended"
        ledger.lose(why, at, "overrun" if self._killed else "crashed")
        ledger.survivors = self._clear()
        code = 128 - status if status < 0 else status
        self._write(code)
        outcome, detail = ledger.verdict(code)
        if ledger.crashed or ledger.hung:
            self._print(f"\ndrydock: {ledger.tier}: {outcome}: {detail}")
        return code if outcome == "passed" else code or 1

    def _clear(self) -> list[str]:
        """End everything that pytest left; `pid command line` of what did not go by itself at once."""
        deadline = time.monotonic() + 0.5
        while (left := descendants(os.getpid())) and not self._killed and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.02)
        survivors = [f"{process.pid} {process.command()}" for process in left]
        # Bounded, since what waits for a device that is gone cannot be killed.
        deadline = time.monotonic() + 5.0
        while left and time.monotonic() < deadline:
            end(os.getpid(), {process.key for process in left}, 0.0 if self._killed else 1.0)
            self._reap()
            left = descendants(os.getpid())
        return survivors

    def _write(self, status: int | None = None) -> None:
        now = time.monotonic()
        path = self._results / f"{self._ledger.tier}.json"
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(self._ledger.document(status, now), indent=1) + "\n")
        temporary.replace(path)
        self._written, self._dirty = now, False

    @staticmethod
    def _print(text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"{signal.Signals(number).name} ({signal.strsignal(number)})"
    return f"signal {number}"


def main() -> int:
    """`python -m drydock.tiers.watchdog LINE FAULT PYTEST CAME`: two descriptors, a pid and a descriptor."""
    line, fault, pytest, came = (int(text) for text in sys.argv[1:])
    # What pytest starts and leaves comes to this process, so that it stays in sight.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        return Watchdog(socket.socket(fileno=line), fault, pytest, came).watch()
    except OSError as error:
        print(f"drydock: the result of the tier cannot be written: {error}", file=sys.stderr)
        send(pytest, signal.SIGKILL)
        return 2


if __name__ == "__main__":
    sys.exit(main())

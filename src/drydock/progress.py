"""What is running, in bytes and seconds: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines."""


class Progress:
    """The progress of one step, on standard error. Safe to use from several threads.

    >>> with Progress("fetch", total=3_400_000_000) as progress:
    ...     progress.start("torch-2.11.0"); progress.advance(1 << 20); progress.done("torch-2.11.0")

    Parameters:
        title: the step, in a word or two.
        total: bytes to expect.
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self.title = title
        self.total = total
        self.seen = 0
        self._stream = stream or sys.stderr
        self._running: list[str] = []
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._told = self._began
        self._bar: Bar | None = None
        if self._stream.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[running]}"),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, running="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self.seen:
            self._line(f"{'stopped' if kind else 'done'}: {amount(self.seen)} in {self.seconds:.1f} s")

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._began

    def start(self, what: str) -> None:
        """Something begins to run."""
        with self._lock:
            self._running.append(what)
            self._show()

    def done(self, what: str) -> None:
        """Something that ran has ended."""
        with self._lock:
            if what in self._running:
                self._running.remove(what)
            self._show()

    def advance(self, amount: int) -> None:
        """`amount` more bytes are through."""
        with self._lock:
            self.seen += amount
            self._show()

    def expect(self, total: int) -> None:
        """The bytes to expect, where they are known only after the step began."""
        with self._lock:
            self.total = total
            if self._bar:
                self._bar.update(self._task, total=total)

    def note(self, text: str) -> None:
        """A line that stays, such as a retry and its reason."""
        with self._lock:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(f"{self.title}: {text}", highlight=False, markup=False)
        else:
            print(f"{self.title}: {text}", file=self._stream, flush=True)

    def _show(self) -> None:
        names = ", ".join(self._running[:3]) + (
            f" and {len(self._running) - 3} more" if len(self._running) > 3 else ""
        )
        if self._bar:
            self._bar.update(self._task, completed=self.seen, running=names)
            return
        now = time.monotonic()
        if now - self._told >= PLAIN_INTERVAL:
            self._told = now
            self._line(
                f"{amount(self.seen)} of {amount(self.total)}, {self.seconds:.0f} s, running: {names or '-'}"
            )


def amount(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

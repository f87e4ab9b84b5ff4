"""What a tier's tests use: phases that are timed apart, and values kept in the result document.

    from drydock.tiers import phase, record

    with phase("load"):
        model = load(path)
    record("balance", {"before": 0.4, "after": 0.9})

Standard library only, and harmless without the plugin: then nobody listens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Protocol

PHASES = ("start", "load", "ready", "test", "stop")
"""What a test's time is spent on. pytest's setup, call and teardown are start, test and stop."""


class Listener(Protocol):
    """Who is told: the plugin's link to its watchdog."""

    def begin(self, name: str) -> int:
        """A phase begins; returns what `end` gets."""

    def end(self, token: int, name: str, error: BaseException | None) -> None:
        """The phase is over, with the exception that left it."""

    def record(self, name: str, value: Any) -> None:
        """A value for the running test."""


_listener: Listener | None = None


def install(listener: Listener | None) -> None:
    """Tell this listener of phases and records from now on; None: nobody."""
    global _listener
    _listener = listener


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time inside as that phase; what is inside and opens a phase itself pauses this one.

    Only the main thread of the process that pytest runs in is timed.

    Raises:
        ValueError: no such phase.
    """
    if name not in PHASES:
        raise ValueError(f"no phase {name!r}: there are {', '.join(PHASES)}")
    listener = _listener
    if listener is None:
        yield
        return
    token = listener.begin(name)
    try:
        yield
    except BaseException as error:
        listener.end(token, name, error)
        raise
    listener.end(token, name, None)


def record(name: str, value: Any) -> None:
    """Keep a JSON value in the result document, with the running test; the last one of a name counts.

    Raises:
        ValueError, TypeError: JSON has no such value (NaN, an array of numpy's).
    """
    json.dumps(value, allow_nan=False)
    if _listener is not None:
        _listener.record(name, value)

"""A worker of a build is stopped in its work and nowhere else: a lock that it left taken would stop all others."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, cast

import pytest

from drydock import build


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, as a worker that has nothing to do."""
    for name, value in {"_worker": None, "_stopping": False, "_interruptible": False}.items():
        monkeypatch.setattr(build, name, value)
    before = signal.signal(signal.SIGTERM, build._stop_worker)
    yield
    signal.signal(signal.SIGTERM, before)


def test_one_that_waits_for_work_is_not_stopped_there_and_takes_none_up() -> None:
    signal.raise_signal(signal.SIGTERM)
    for _ in range(2):
        with pytest.raises(SystemExit):
            build._make(cast(Any, None))
    assert not build._interruptible


def test_one_that_works_is_stopped_at_once() -> None:
    def work() -> None:
        with build._interrupted(True):
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")

    with pytest.raises(SystemExit):
        work()


def test_one_that_tells_how_far_it_is_has_told_before_it_is_stopped() -> None:
    told = []

    class Queue:
        def put(self, message: object) -> None:
            signal.raise_signal(signal.SIGTERM)
            told.append(message)

    class Worker:
        told = Queue()

    def work() -> None:
        with build._interrupted(True):
            build._tell(cast(Any, Worker), "advance", "a layer", 1)
            pytest.fail("it went on")

    with pytest.raises(SystemExit):
        work()
    assert told == [("advance", "a layer", 1)]

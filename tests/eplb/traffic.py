"""Requests to a server: many at once, and streams whose every token has its time."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from checks import Report, require

from drydock.server import Server


def complete_all(server: Server, prompts: Sequence[str], *, max_tokens: int, at_once: int = 16) -> list[str]:
    """Greedy completions, in the order of the prompts, `at_once` in flight."""

    def one(prompt: str) -> str:
        text: str = server.complete(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)["text"]
        return text

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, prompts))


def stream(
    server: Server, prompt: str, *, max_tokens: int, timeout: float = 60.0
) -> Iterator[tuple[str, float]]:
    """A greedy completion: each piece of text as it comes, with the seconds a reader waited for it.

    Raises:
        OSError: no connection, or silence for `timeout` seconds.
    """
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": max_tokens,
        "temperature": 0.0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    last = time.monotonic()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                last, before = time.monotonic(), last
                yield json.loads(line[6:])["choices"][0]["text"], last - before
    finally:
        connection.close()


def check_stall(gaps: Sequence[float], budget: float) -> None:
    """No reader waited longer than `budget` seconds for the next token, and one did wait."""
    require(gaps, "stall within its budget", "nobody waited for a token")
    require(max(gaps) <= budget, "stall within its budget", f"{max(gaps):.2f} s between tokens, not {budget}")


class Reader:
    """Reads one stream after another while something else goes on, and keeps every wait for a token."""

    def __init__(self, server: Server, prompt: str) -> None:
        self.waits: list[tuple[float, float]] = []
        """When each began and ended, by the monotonic clock."""
        self._server, self._prompt = server, prompt
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._error: BaseException | None = None

    def _read(self) -> None:
        try:
            while not self._over.is_set():
                for _, gap in stream(self._server, self._prompt, max_tokens=200):
                    now = time.monotonic()
                    self.waits.append((now - gap, now))
        except BaseException as error:
            self._error = error

    @property
    def gaps(self) -> list[float]:
        """Seconds of each wait."""
        return [ended - began for began, ended in self.waits]

    def gaps_during(self, moves: Iterable[Sequence[float]]) -> list[float]:
        """Those that overlap a rearrangement (began, ended), and the one after each: what a step made comes late."""
        spans = list(moves)
        hit = [
            place
            for place, (began, ended) in enumerate(self.waits)
            if any(began <= stop and start <= ended for start, stop in spans)
        ]
        gaps = self.gaps
        return [gaps[place] for place in sorted({*hit, *(place + 1 for place in hit)}) if place < len(gaps)]

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error:
            raise self._error


def last_moves(reports: Iterable[Report], count: int) -> list[list[float]]:
    """When the last rearrangements began and ended, on each rank.

    Of a reader's waits these are the ones to look at: under the first a server still compiles kernels for batches
    that it has not met, each for a second, with EPLB and without it.
    """
    return [move for report in reports for move in report["moves"][-count:]]


def skewed_traffic(
    server: Server,
    prompts: Sequence[str],
    ask: Callable[[], list[Report]],
    what: str,
    least: int,
    seconds: float,
) -> None:
    """Requests in waves until what every rank reports under that name is at least so much, or time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        complete_all(server, prompts, max_tokens=4, at_once=32)
        if min(report[what] for report in ask()) >= least:
            return


def settled(ask: Callable[[], list[Report]], timeout: float = 60.0) -> list[Report]:
    """What the ranks report when they stand still, all after the same step.

    Raises:
        TimeoutError: they go on stepping for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    before: list[int] = []
    while time.monotonic() < deadline:
        found = ask()
        now = [report["steps"] for report in found]
        if now == before:
            return found
        before = now
        time.sleep(1.0)
    raise TimeoutError(f"the ranks did not come to rest in {timeout:.0f} s, and are at steps {before}")

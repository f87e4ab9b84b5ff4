"""A few processes that are the ranks of one expert-parallel group on this machine, and run what they are told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any


class FleetError(Exception):
    """A rank failed or did not answer in time; the text has its traceback."""


class Fleet:
    """Ranks that stay, so that vLLM is imported once and not for each test; started again after a failure.

    >>> with Fleet(4) as fleet:
    ...     fleet.run("exchange", old, new, experts, "torch_gloo")
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._connections: list[Connection] = []

    def start(self) -> None:
        """Start the ranks, unless they run, and return when they have joined their groups."""
        if self._connections:
            return
        pairs = [multiprocessing.Pipe() for _ in range(self.ranks)]
        self._connections = [ours for ours, _ in pairs]
        self._folder = tempfile.TemporaryDirectory(prefix="fleet-")
        # A process of its own imports vLLM and then forks the ranks: spawned, each would import it again.
        self._launcher = multiprocessing.get_context("spawn").Process(
            target=_launch,
            args=([theirs for _, theirs in pairs], str(Path(self._folder.name) / "rendezvous")),
        )
        self._launcher.start()
        for _, theirs in pairs:
            theirs.close()
        self.run("joined", timeout=600)

    def run(self, job: str, *arguments: Any, timeout: float = 60.0, **options: Any) -> list[Any]:
        """Call a function of `ranks` in every rank at once, and return what each returns.

        Raises:
            FleetError: one of them raised, or not all answered within `timeout` seconds; the fleet is over.
        """
        self.start()
        deadline = time.monotonic() + timeout
        try:
            for connection in self._connections:
                connection.send((job, arguments, options))
            answers = []
            for rank, connection in enumerate(self._connections):
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise FleetError(f"{job}: rank {rank} of {self.ranks} did not answer in {timeout:.0f} s")
                failed, answer = connection.recv()
                if failed:
                    raise FleetError(f"{job}: rank {rank} of {self.ranks} failed\n{answer}")
                answers.append(answer)
        except (OSError, EOFError) as error:
            self.stop()
            raise FleetError(f"{job}: a rank ended: {error!r}") from error
        except BaseException:
            # Also when a budget ends the test: what is still on its way would be taken for the next answer.
            self.stop()
            raise
        return answers

    def stop(self) -> None:
        if not self._connections:
            return
        for connection in self._connections:
            connection.close()
        self._connections = []
        self._launcher.join(5)
        if self._launcher.is_alive():
            # A rank hangs in a collective whose partner is gone.
            self._launcher.terminate()
            self._launcher.join()
        self._folder.cleanup()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _launch(connections: list[Connection], rendezvous: str) -> None:
    import ranks  # noqa: F401  # imported here so that the forks find it there

    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=_serve, args=(rank, connections, rendezvous), daemon=True)
        for rank in range(len(connections))
    ]
    for process in started:
        process.start()
    signal.signal(signal.SIGTERM, lambda *_: [process.kill() for process in started])
    for connection in connections:
        connection.close()
    for process in started:
        process.join()
    # At once: the interpreter's own way out, past all that vLLM imported, takes seconds.
    os._exit(0)


def _serve(rank: int, connections: list[Connection], rendezvous: str) -> None:
    import ranks

    for other, connection in enumerate(connections):
        if other != rank:
            connection.close()
    own = connections[rank]
    ranks.join(rank, len(connections), rendezvous)
    while True:
        try:
            job, arguments, options = own.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            own.send((False, getattr(ranks, job)(*arguments, **options)))
        except Exception:
            own.send((True, traceback.format_exc()))

"""Moving bytes over a network that may fail: patience, partial files, threads that end when the run does.

What `fetch` (indexes and Debian mirrors) and `registry` (OCI registries) have in common.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import httpx

from drydock.indexes import redact
from drydock.store import CHUNK, Store, disk_errors

CONNECTIONS = 8
LONGEST_WAIT = 60.0
"""Seconds: no pause before another attempt is longer, whatever a server asks for."""
HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.TooManyRedirects)
UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to put up with a bad network, in seconds; `backoff` is the first pause, and doubles each time.

    `attempts` counts those that brought nothing new: a transfer that goes on after a break is not given up.
    """

    attempts: int = 5
    backoff: float = 0.5
    connect: float = 10.0
    read: float = 30.0

    @property
    def timeout(self) -> httpx.Timeout:
        """As a client's setting."""
        return httpx.Timeout(self.read, connect=self.connect, pool=None)


class Again(Exception):
    """An attempt failed in a way that may pass; `after` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Stopped(Exception):
    """The run ends because of something that happened elsewhere."""


class GaveUp(Exception):
    """No further attempt is made; `reason` names the host, without credentials.

    `because` is what kind of failure it was: an address nobody can ask, a certificate that is not trusted, a host
    that is not reached, or one that answers and does not deliver.
    """

    def __init__(
        self, reason: str, because: Literal["address", "certificate", "unreached", "broken"]
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.because = because


def insist(
    once: Callable[[], Result],
    url: str,
    patience: Patience,
    stop: threading.Event,
    note: Callable[[str], None],
    reached: Callable[[], int] = lambda: 0,
) -> Result:
    """Do something once, or again after a pause as long as there is hope.

    Parameters:
        once: raises `Again` or an error of httpx's transport for what may pass; all else ends it.
        url: what it asks, for messages.
        note: is told of every further attempt.
        reached: bytes that are through; attempts that got further do not count.

    Raises:
        GaveUp: the patience is over, or there was no hope.
        Stopped: `stop` was set.
    """
    host = host_of(url)
    tries, best = 0, reached()
    while True:
        if stop.is_set():
            raise Stopped
        after = None
        connected = True
        try:
            return once()
        except Again as again:
            reason, after = str(again), again.after
        except httpx.InvalidURL as error:
            raise GaveUp(f"{redact(url)} is not an address", "address") from error
        except HOPELESS as error:
            raise GaveUp(f"{redact(url)}: {type(error).__name__}", "address") from error
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                reason = f"{host} has an untrusted certificate: set SSL_CERT_FILE to its authority's"
                raise GaveUp(reason, "certificate") from error
            connected = not isinstance(error, UNREACHED)
            # A redirect or a token's address may have led to another host.
            asked = host_of(str(error.request.url)) if _has_request(error) else host
            reason = f"{asked} {'broke off' if connected else 'cannot be reached'} ({plain(error)})"
        if reached() >= best + CHUNK:
            tries, best = 0, reached()
        tries += 1
        if tries >= patience.attempts:
            raise GaveUp(reason, "broken" if connected else "unreached")
        pause = patience.backoff * 2 ** (tries - 1) * random.uniform(0.75, 1.25)
        pause = min(LONGEST_WAIT, pause if after is None else max(pause, after))
        note(f"{reason}; attempt {tries + 1} of {patience.attempts} in {pause:.1f} s")
        if stop.wait(pause):
            raise Stopped


class Part:
    """A partial download: the file, how much of it is there and the hash of that."""

    def __init__(self, path: Path, where: Path) -> None:
        self._where = where
        with disk_errors(where):
            self._file = path.open("ab+")
            self._hash = hashlib.sha256()
            self.size = 0
            self._file.seek(0)
            while data := self._file.read(CHUNK):
                self._hash.update(data)
                self.size += len(data)

    def write(self, data: bytes) -> None:
        with disk_errors(self._where):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def restart(self) -> None:
        with disk_errors(self._where):
            self._file.flush()
            self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        with disk_errors(self._where):
            self._file.close()


def still_to_come(store: Store, sizes: Mapping[str, int]) -> int:
    """Bytes that blobs (hex sha256 -> bytes) lack beside what stopped runs have left of them."""
    there = 0
    for digest in sizes:
        with contextlib.suppress(FileNotFoundError):  # another run may just have completed it
            there += _part_path(store, digest).stat().st_size
    return sum(sizes.values()) - there


@contextlib.contextmanager
def receiving(store: Store, digest: str, size: int) -> Iterator[Part | None]:
    """What there is of a blob, for one process at a time; whole at the end, it is in the store.

    None if the store has it. What is left of it when the block raises is there for the next run.
    """
    with store.lock(f"fetch-{digest[:16]}"):
        path = _part_path(store, digest)
        if store.has(digest, size):
            path.unlink(missing_ok=True)
            yield None
            return
        part = Part(path, store.root)
        try:
            if part.size > size or (part.size == size and part.digest != digest):
                part.restart()
            yield part
        finally:
            part.close()
            if part.size == 0 < size:
                path.unlink(missing_ok=True)
        store.adopt(path, digest)


def _part_path(store: Store, digest: str) -> Path:
    return store.tmp / f"{digest}.part"


class Crew:
    """Threads that work through a list until it is empty, one of them fails, or the run is interrupted.

    `stop` is set when the run ends before its time; whoever waits for a server looks at it.
    """

    def __init__(self, name: str) -> None:
        self.stop = threading.Event()
        self._name = name
        self._lock = threading.Lock()
        self._fatal: BaseException | None = None

    def run(self, items: Sequence[Item], work: Callable[[Item], None]) -> None:
        """Call `work` for each item; what it raises, other than `Stopped`, ends the run and is raised here."""
        waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in items:
            waiting.put(item)
        # Daemons: one that waits for a server or for another process must not keep an interrupted run alive.
        threads = [
            threading.Thread(
                target=self._work, args=(waiting, work), daemon=True, name=f"{self._name}-{number}"
            )
            for number in range(min(CONNECTIONS, len(items)))
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self.stop.is_set():
                for thread in threads:
                    thread.join(0.05)
        except BaseException:
            self.stop.set()
            raise
        finally:
            deadline = time.monotonic() + 2
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        if self._fatal:
            raise self._fatal

    def _work(self, waiting: queue.SimpleQueue[Item], work: Callable[[Item], None]) -> None:
        while not self.stop.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except Stopped:
                return
            except BaseException as error:
                with self._lock:
                    # What fails after the stop (a client that was closed, say) fails because of it.
                    if not self.stop.is_set():
                        self._fatal = error
                        self.stop.set()
                return


def host_of(url: str) -> str:
    """Host and port of an address, without credentials."""
    return urlsplit(redact(url)).netloc


def _has_request(error: httpx.TransportError) -> bool:
    return getattr(error, "_request", None) is not None


def plain(error: Exception) -> str:
    """An error's own text in a few words, without what may be a secret in an address."""
    text = re.sub(r"//[^/@\s]+@", "//", str(error)) or type(error).__name__
    return text.splitlines()[0]


def retry_after(text: str) -> float | None:
    """Seconds to wait by a Retry-After header, which has seconds or a date."""
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None

"""An image's tree of files, from which no link leads out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

WALKERS = 4
"""Processes that read folders."""
SPREAD = 100
"""Folders from which more than one process reads them."""


Listing = list[tuple[str, list[tuple[str, int, int]]]]
"""Folders with their files' names, modes and sizes: what costs little between processes."""


class Seen(NamedTuple):
    """What lstat says of a file: st_mode and size in bytes."""

    mode: int
    size: int

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


def _scan(root: str, folder: str) -> tuple[dict[str, Seen], list[str]]:
    """The files of one folder, and the folders in it; nothing of one that is missing or cannot be read."""
    found: dict[str, Seen] = {}
    folders = []
    try:
        entries = list(os.scandir(os.path.join(root, folder)))  # noqa: PTH118, this runs 10,000 times
    except OSError:
        return {}, []
    for entry in entries:
        path = f"{folder}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            folders.append(path)
            continue
        with contextlib.suppress(FileNotFoundError):  # a live system's temporary file
            status = entry.stat(follow_symlinks=False)
            found[path] = Seen(status.st_mode, status.st_size)
    return found, folders


def _walk_below(root: str, tops: Sequence[str]) -> Listing:
    """The listing of everything under these folders."""
    found = []
    folders = list(tops)
    while folders:
        folder = folders.pop()
        files, inner = _scan(root, folder)
        skip = len(folder) + 1
        found.append((folder, [(path[skip:], *seen) for path, seen in files.items()]))
        folders += inner
    return found


class Tree:
    """An image's files under `root`; all paths are relative to it, without a leading slash."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self._walked: dict[str, Seen] = {}
        self._resolved: dict[str, str | None] = {}

    def where(self, path: str) -> str:
        """The path for the system's calls."""
        return os.path.join(self.root, path)  # noqa: PTH118, this runs 150,000 times

    def walk(self, *tops: str) -> list[dict[str, Seen]]:
        """For each folder, everything under it but folders; a missing or unreadable one is empty."""
        return self.walking(*tops)()

    def walking(self, *tops: str) -> Callable[[], list[dict[str, Seen]]]:
        """Begin to walk; what is returned waits for the end and gives what `walk` does."""
        found: list[dict[str, Seen]] = []
        of: list[int] = []
        shares: list[list[str]] = []
        for number, top in enumerate(tops):
            files, folders = _scan(self.root, top)
            found.append(files)
            # Where nothing is in memory yet, the disk's answers take the time, and many can be asked for at once; where
            # all is, it is Python's own work, which threads would only hinder.
            while folders and len(folders) < SPREAD:
                inner = []
                for folder in folders:
                    files, below = _scan(self.root, folder)
                    found[number] |= files
                    inner += below
                folders = inner
            parts = min(8 * WALKERS, len(folders))
            of += [number] * parts
            shares += [folders[n::parts] for n in range(parts)]
        walk = partial(_walk_below, self.root)
        listings: Iterable[Listing] = map(walk, shares)
        # A few folders are not worth a process, and a process pool needs a /dev/shm.
        if shares and os.access("/dev/shm", os.W_OK):
            # One pool for all, whose end nobody waits for: both take as long as reading thousands of folders.
            pool = ProcessPoolExecutor(WALKERS, multiprocessing.get_context("fork"))
            listings = pool.map(walk, shares)
            pool.shutdown(wait=False)

        def end() -> list[dict[str, Seen]]:
            for number, listing in zip(of, listings, strict=True):
                for folder, files_in in listing:
                    found[number] |= {f"{folder}/{name}": Seen(mode, size) for name, mode, size in files_in}
            for files in found:
                self._walked |= files
            return found

        return end

    def look(self, path: str) -> Seen | None:
        """What lies at a path, or None for nothing.

        Raises:
            PermissionError: a folder above cannot be searched.
        """
        if path in self._walked:
            return self._walked[path]
        try:
            status = os.lstat(self.where(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Seen(status.st_mode, status.st_size)

    def link(self, path: str) -> str:
        """A symbolic link's target."""
        return os.readlink(self.where(path))  # noqa: PTH115, Path would respell it

    def resolve(self, path: str) -> str | None:
        """Follow every link inside the tree; None when the path leads nowhere."""
        if path not in self._resolved:
            self._resolved[path] = None  # where a loop of links leads
            self._resolved[path] = self._follow(path)
        return self._resolved[path]

    def _follow(self, path: str) -> str | None:
        above, _, name = path.rpartition("/")
        folder = self.resolve(above) if above else ""
        if folder is None or name in ("", "."):
            return folder
        if name == "..":
            return folder.rpartition("/")[0]
        here = f"{folder}/{name}" if folder else name
        try:
            seen = self.look(here)
            target = self.link(here) if seen and seen.is_link else None
        except OSError:
            return None
        if target is None:
            return here if seen else None
        return self.resolve(target if target.startswith("/") else f"{folder}/{target}")

    def canonical(self, path: str) -> str:
        """The path with the links above its last part followed, where they lead somewhere."""
        above, _, name = path.rpartition("/")
        folder = self.resolve(above)
        if folder is None:
            return os.path.normpath(f"/{path}").lstrip("/")
        return f"{folder}/{name}" if folder else name

    def read(self, path: str) -> bytes:
        """A small file's content, read inside the tree.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        found = self.resolve(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"/{path}")
        return Path(self.where(found)).read_bytes()

    def sha256(self, path: str) -> bytes | str:
        """A file's hash, or the reason it has none."""
        try:
            with open(self.where(path), "rb", buffering=0) as file:  # noqa: PTH123, as in `where`
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            return error.strerror or str(error)

    def sha256_all(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
        """Hash many files on all CPUs, in batches: a task per small file would cost more than its hash.

        Each batch has its share of large and small ones; the largest go first, so that none ends alone.
        """
        largest_first = sorted(paths, key=lambda path: -(self._walked.get(path) or Seen(0, 0)).size)
        workers = len(os.sched_getaffinity(0))
        batches = [largest_first[start :: 64 * workers] for start in range(64 * workers)]
        with ThreadPoolExecutor(workers) as pool:
            for batch in pool.map(lambda names: [(name, self.sha256(name)) for name in names], batches):
                yield from batch

"""The store: artifacts and image blobs by sha256, on disk, never half written.

A blob is written under `tmp/`, hashed on the way, and renamed to `blobs/sha256/<hex>` only when its hash
is the one in its name. A reader therefore never sees a partial blob, whatever kills the writer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from drydock.errors import DrydockError, OutOfSpace

CHUNK = 1 << 20
SETTLED = 10.0
"""Seconds after which a file under `tmp` that nobody has locked is a dead writer's."""


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line that names the folder.

    Raises:
        OutOfSpace: for ENOSPC and EDQUOT.
        DrydockError: for a folder that cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(
                f"no space left under {where}: free some, or set DRYDOCK_STORE to a folder on another disk; "
                "what is complete is kept and the next run goes on from there"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise DrydockError(
                f"cannot write under {where} ({error.strerror}): set DRYDOCK_STORE to a folder of yours"
            ) from error
        raise


class BlobWriter:
    """Writes one blob of unknown hash; `Store.writer` makes and finishes it.

    >>> with store.writer() as blob:
    ...     blob.write(b"...")
    >>> blob.digest, blob.size
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        """Hex sha256 of what was written so far."""
        return self._hash.hexdigest()


class Store:
    """A folder of blobs by sha256, with small records beside them.

    Parameters:
        root: the folder, made when missing; one store may serve any number of checkouts and processes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.blobs = self.root / "blobs" / "sha256"
        self.tmp = self.root / "tmp"
        with disk_errors(self.root):
            for folder in (self.blobs, self.tmp, self.root / "locks"):
                folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob with this hex sha256 lies, whether it is there or not."""
        return self.blobs / digest

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether the blob is there, with that size in bytes when one is given.

        The size is the cheap check: writers verify the hash before a blob gets its name, so only a fault
        of the disk or a foreign hand can make it wrong; readers that unpack a blob check its hash again.
        """
        try:
            found = self.path(digest).stat().st_size
        except FileNotFoundError:
            return False
        return size is None or found == size

    def discard(self, digest: str) -> None:
        """Remove a blob that turned out not to be what its name says."""
        self.path(digest).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writer(self) -> Iterator[BlobWriter]:
        """A blob whose hash is known only at the end, as a layer's is."""
        with disk_errors(self.root):
            handle, name = tempfile.mkstemp(dir=self.tmp, prefix=f"blob-{os.getpid()}-")
            try:
                # The lock tells `sweep` of another process that this file has a living owner.
                fcntl.flock(handle, fcntl.LOCK_EX)
                with os.fdopen(handle, "wb") as file:
                    blob = BlobWriter(file)
                    yield blob
                    self._publish(file, Path(name), blob.digest)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    def _publish(self, file: BinaryIO, path: Path, digest: str) -> None:
        file.flush()
        os.fsync(file.fileno())
        path.chmod(0o644)
        path.rename(self.path(digest))

    def put(self, data: bytes) -> str:
        """Store small bytes (a manifest, a config) and return their hex sha256."""
        with self.writer() as blob:
            blob.write(data)
        return blob.digest

    def adopt(self, path: Path, digest: str) -> None:
        """Move a complete file from `tmp` into the blobs, if its hash is the one promised.

        Raises:
            DrydockError: the bytes hash to something else; the file is removed.
        """
        found = sha256_file(path)
        if found != digest:
            path.unlink(missing_ok=True)
            raise DrydockError(f"{path.name} hashes to sha256:{found}, not to sha256:{digest}")
        with disk_errors(self.root), path.open("rb+") as file:
            self._publish(file, path, digest)

    def link(self, digest: str, target: Path) -> None:
        """Give a blob a second name by hard link, or by copy across file systems."""
        with disk_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and target.samefile(self.path(digest)):
                return
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.path(digest), temporary)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise
                shutil.copyfile(self.path(digest), temporary)
            temporary.rename(target)

    def read_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """A small JSON record of that kind, or None when there is none or it cannot be read."""
        try:
            record: dict[str, Any] = json.loads((self.root / kind / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return record

    def write_record(self, kind: str, key: str, record: dict[str, Any]) -> None:
        """Write a small JSON record so that a reader sees the old one or the new one, whole."""
        path = self.root / kind / f"{key}.json"
        with disk_errors(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_text(json.dumps(record, sort_keys=True))
                temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def drop_record(self, kind: str, key: str) -> None:
        """Remove a record, if there is one."""
        (self.root / kind / f"{key}.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a named lock among all processes that use this store; it ends with its process."""
        with disk_errors(self.root):
            handle = os.open(self.root / "locks" / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the store's disk, gone when the block ends; `sweep` leaves it alone until then."""
        with disk_errors(self.root):
            folder = Path(tempfile.mkdtemp(dir=self.tmp, prefix=f"scratch-{os.getpid()}-"))
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield folder
            finally:
                _remove(folder)
                os.close(handle)

    def sweep(self, ended: Collection[int] = ()) -> None:
        """Remove what dead writers left under `tmp`: whatever nobody holds a lock on.

        Partial downloads (`*.part`) stay: the next fetch resumes them.

        Parameters:
            ended: process identifiers of writers known to have ended; what is theirs goes at once. A writer
                that is ended while it cleans up, or killed, cannot do that itself.
        """
        for path in self.tmp.iterdir():
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                if path.suffix == ".part":
                    continue
                # A moment passes between the making of a file and its lock.
                if _writer(path) not in ended and time.time() - path.stat().st_mtime < SETTLED:
                    continue
                handle = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if path.is_dir():
                        _remove(path)
                    else:
                        path.unlink()
                finally:
                    os.close(handle)


def _writer(path: Path) -> int | None:
    """The process that made a file under `tmp`, by its name."""
    kind, _, rest = path.name.partition("-")
    pid = rest.partition("-")[0]
    return int(pid) if kind in ("blob", "scratch") and pid.isdigit() else None


def _remove(folder: Path) -> None:
    # A process that was killed a moment ago may still be writing its last file.
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)

"""Unpacking an image's layers, each once, into folders that an overlay mount can stack.

A layer's folder gets its name only when everything in it is there and both hashes, of the compressed blob
and of the tar inside, are the ones promised.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, cast

import zstandard

from drydock.errors import DrydockError
from drydock.oci import Layer
from drydock.progress import Progress
from drydock.store import CHUNK, Store, disk_errors, sha256_file

BUFFER = 64 << 10
"""Bytes that tarfile holds; it copies what is left of them for every header, so more takes longer."""

WORKERS = 2
"""Layers unpacked at once: hashing, decompressing and writing run outside Python's lock, parsing does not."""


class BadLayer(ValueError):
    """A layer holds what no layer of drydock's holds."""


def folder(store: Store, layer: Layer) -> Path:
    """Where the layer lies unpacked, whether it does or not.

    An ordinary user's copy has its own name: every file in it is that user's, so root must not run it, and
    root's copy is of no use in a user namespace, where its owners are unknown.
    """
    owner = "" if os.geteuid() == 0 else f"-{os.geteuid()}"
    return store.root / "unpacked" / f"{layer.diff_id[:16]}{owner}"


def missing(store: Store, layers: Sequence[Layer]) -> list[Layer]:
    """The layers that are not unpacked yet, each once."""
    unique = {layer.diff_id: layer for layer in layers}
    return [layer for layer in unique.values() if not folder(store, layer).is_dir()]


def unpack(store: Store, layers: Sequence[Layer]) -> None:
    """Unpack the layers that are not unpacked yet, with progress in compressed bytes.

    Raises:
        DrydockError: a blob is not what its name says; it has been removed, and so has what came out of it.
    """
    todo = sorted(missing(store, layers), key=lambda layer: layer.size, reverse=True)
    if not todo:
        return
    with disk_errors(store.root):
        (store.root / "unpacked").mkdir(exist_ok=True)
    stop = threading.Event()
    with (
        Progress("unpack", total=sum(layer.size for layer in todo)) as progress,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        try:
            futures = [pool.submit(_unpack_once, store, layer, progress, stop) for layer in todo]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _unpack_once(store: Store, layer: Layer, progress: Progress, stop: threading.Event) -> None:
    def advance(amount: int) -> None:
        if stop.is_set():
            raise CancelledError
        progress.advance(amount)

    target = folder(store, layer)
    # Beside the target and not in `tmp`, whose folders `Store.sweep` takes for a dead writer's; here the
    # lock says who lives, and its next holder clears what a killed one left.
    partial = target.with_name(f".{target.name}")
    with store.lock(f"unpack-{target.name}"), disk_errors(store.root):
        if target.is_dir():
            progress.advance(layer.size)
            return
        remove_tree(partial)
        partial.mkdir()
        progress.start(layer.title)
        try:
            _verified(store, layer, partial, advance)
            partial.rename(target)
        except BaseException:
            remove_tree(partial)
            raise
        finally:
            progress.done(layer.title)


def check_blobs(store: Store, layers: Sequence[Layer]) -> None:
    """Read the layers' blobs and remove the first that is not what its name says.

    Raises:
        DrydockError: there was one; the line says to build it anew.
    """
    for layer in layers:
        found = sha256_file(store.path(layer.digest))
        if found != layer.digest:
            raise _discarded(store, layer, f"it hashes to sha256:{found[:16]}")


def _discarded(store: Store, layer: Layer, reason: str) -> DrydockError:
    store.discard(layer.digest)
    return DrydockError(
        f"layer {layer.title!r} (sha256:{layer.digest[:16]}) was damaged in the store and has been removed: "
        f"run `drydock build` to make it anew ({reason})"
    )


def _verified(store: Store, layer: Layer, target: Path, advance: Callable[[int], None]) -> None:
    if not store.has(layer.digest):
        raise DrydockError(f"layer {layer.title!r} is gone from {store.root}: run `drydock build` again")
    try:
        with store.path(layer.digest).open("rb") as file:
            compressed = _Hashed(file, advance)
            tar = _Hashed(_decompressed(compressed, layer.media_type))
            extract(cast(IO[bytes], tar), target, foreign=layer.vendor)
            tar.drain()
            compressed.drain()
        if compressed.digest != layer.digest:
            raise _discarded(store, layer, f"it hashes to sha256:{compressed.digest[:16]}")
        if tar.digest != layer.diff_id:
            raise _discarded(store, layer, f"the tar inside hashes to sha256:{tar.digest[:16]}")
    except (BadLayer, tarfile.TarError, zstandard.ZstdError, zlib.error, EOFError, OSError) as error:
        # A damaged blob can fail as anything, a strange file name's OSError included: its hash tells.
        check_blobs(store, [layer])
        if isinstance(error, OSError):
            raise
        raise DrydockError(
            f"layer {layer.title!r} (sha256:{layer.digest[:16]}) cannot be unpacked: {error}"
        ) from error


def _decompressed(file: _Hashed, media_type: str) -> IO[bytes]:
    """A layer's tar, by its media type."""
    stream = cast(IO[bytes], file)
    if media_type.endswith("zstd"):
        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_size=CHUNK, read_across_frames=True)
        return cast(IO[bytes], reader)
    if media_type.endswith("gzip"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream, mode="rb"))
    return stream


def extract(stream: IO[bytes], target: Path, foreign: bool = False) -> None:
    """Write a layer's tar out under `target`, with modes, times, links and, as root, owners.

    Nothing is ever written outside `target`: a member's parents must be real folders made by this call.

    Parameters:
        foreign: a vendor's layer, which may remove what is below it (whiteouts, as overlayfs spells them).

    Raises:
        BadLayer: a path that leaves the layer, a device, a whiteout in a layer of ours or for an ordinary user.
    """
    as_root = os.geteuid() == 0
    root = str(target)
    folders: dict[str, tarfile.TarInfo | None] = {"": None}

    def place(name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if (name.startswith("/") and not foreign) or ".." in parts:
            raise BadLayer(f"{name!r} leads out of the layer")
        if parts and parts[-1].startswith(WHITEOUT) and not (foreign and as_root):
            raise BadLayer(f"{name!r} is a whiteout" + (", for which it takes root" if foreign else ""))
        parent = "/".join(parts[:-1])
        if parent not in folders:
            for depth in range(1, len(parts)):
                ancestor = "/".join(parts[:depth])
                if ancestor not in folders:
                    _make_folder(f"{root}/{ancestor}", ancestor)
                    folders[ancestor] = None
        return "/".join(parts)

    with tarfile.open(fileobj=stream, mode="r|", bufsize=BUFFER, errorlevel=2) as tar:
        for member in tar:
            name = place(member.name)
            path = f"{root}/{name}"
            if name.rpartition("/")[2].startswith(WHITEOUT):
                _remove_below(root, name)
                tar.members.clear()  # type: ignore[attr-defined]
                continue
            if not member.isdir() and os.path.lexists(path) and name not in folders:
                # Two wheels may own one path: the later one has it, as in a container engine.
                Path(path).unlink()
            if member.isdir():
                if name not in folders:
                    _make_folder(path, name)
                folders[name] = member
            elif name in folders:
                raise BadLayer(f"{name!r} is a folder and something else")
            elif member.isreg():
                _write_file(tar, member, path, as_root)
            elif member.issym():
                Path(path).symlink_to(member.linkname)
                if as_root:
                    os.lchown(path, member.uid, member.gid)
                os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)
            elif member.islnk():
                _link(f"{root}/{place(member.linkname)}", path, name)
            else:
                raise BadLayer(f"{name!r} is neither file, folder nor link")
            # Or tarfile keeps an object for every file.
            tar.members.clear()  # type: ignore[attr-defined]

    # Last, so that writing into a folder neither meets its final mode nor changes its time.
    for name, attributes in sorted(folders.items(), reverse=True):
        made = target / name
        if as_root and attributes is not None:
            os.chown(made, attributes.uid, attributes.gid)
        made.chmod(0o755 if attributes is None else attributes.mode & 0o7777)
        if attributes is not None:
            os.utime(made, (attributes.mtime, attributes.mtime))


WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
"""OCI image-spec, layer.md: a file's absence is an empty file of its name with a prefix; the second name is about all
that is below a folder."""


def _remove_below(root: str, name: str) -> None:
    """Say, as overlayfs does, that what is below is not there."""
    above, _, last = name.rpartition("/")
    if last == OPAQUE:
        os.setxattr(f"{root}/{above}", "trusted.overlay.opaque", b"y")
        return
    os.mknod(f"{root}/{above}/{last.removeprefix(WHITEOUT)}", stat.S_IFCHR, os.makedev(0, 0))


def _make_folder(path: str, name: str) -> None:
    try:
        Path(path).mkdir(0o700)
    except FileExistsError as error:
        raise BadLayer(f"{name!r} is a folder and something else") from error


def _link(source: str, path: str, name: str) -> None:
    if not os.path.lexists(source):
        raise BadLayer(f"{name!r} is a hard link to what did not come before it")
    os.link(source, path, follow_symlinks=False)


def _write_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, as_root: bool) -> None:
    content = tar.extractfile(member)
    assert content is not None
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while data := content.read(CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
        if as_root:
            os.fchown(handle, member.uid, member.gid)
        os.fchmod(handle, member.mode & 0o7777)
        os.utime(handle, (member.mtime, member.mtime))
    finally:
        os.close(handle)


class _Hashed:
    """A reader that hashes what goes through it."""

    def __init__(
        self,
        file: IO[bytes],
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        if self._advance:
            self._advance(len(data))
        return data

    def drain(self) -> None:
        """Read to the end: a tar's reader stops at its end mark."""
        while self.read(CHUNK):
            pass

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a folder whatever the modes in it are, as overlayfs leaves some that its owner cannot enter."""
    if not path.exists():
        return
    path.chmod(0o700)
    for parent, names, _ in os.walk(path):
        for name in names:
            child = Path(parent, name)
            if not child.is_symlink():
                child.chmod(0o700)
    shutil.rmtree(path)

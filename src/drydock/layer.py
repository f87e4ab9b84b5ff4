"""Writes one layer: a tar with fixed order, owners, modes and times, hashed and compressed on the way."""

from __future__ import annotations

import contextlib
import hashlib
import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, BinaryIO, NamedTuple, cast

import zstandard

from drydock.errors import DrydockError
from drydock.oci import EPOCH
from drydock.store import CHUNK, Store

LEVEL = 3
"""zstd's own default; see benchmarks/build.py for what it costs and gives."""


class Row(NamedTuple):
    """One file or link that a layer put into the image, as base.RECORD lists it."""

    path: str
    hash: str
    size: str
    owner: str


def overlap(first: Row, second: Row) -> DrydockError:
    """Two owners of one path do not agree on its content, and nobody has said which is right."""
    return DrydockError(
        f"{first.owner} and {second.owner} both ship {first.path}, with different content: say in the definition's "
        f"overlaps which one is over the other, and why"
    )


@dataclass
class LayerWriter:
    """Appends to the tar of one layer; `open_layer` makes and finishes it.

    Paths are relative to the image's root, without a leading slash. Folders that were not written are
    added before what lies in them, as root's with mode 755. `owner` names whose files come next.
    """

    _stream: zstandard.ZstdCompressionWriter
    _diff: hashlib._Hash = field(default_factory=hashlib.sha256)
    unpacked: int = 0
    owner: str = "drydock"
    rows: list[Row] = field(default_factory=list)
    _places: dict[str, Row] = field(default_factory=dict)
    _folders: set[str] = field(default_factory=set)

    def _write(self, data: bytes) -> None:
        self._diff.update(data)
        self._stream.write(data)
        self.unpacked += len(data)

    def _header(self, path: str, **attributes: object) -> None:
        info = tarfile.TarInfo(path)
        info.mtime = EPOCH
        for name, value in attributes.items():
            setattr(info, name, value)
        # GNU, not pax: the same few bytes from every version of Python.
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _parents(self, path: str) -> None:
        parent = posixpath.dirname(path)
        if parent and parent not in self._folders:
            self.folder(parent)

    def folder(self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
        """A folder. The first one of a path counts."""
        if path in self._folders:
            return
        self._parents(path)
        self._folders.add(path)
        self._header(path + "/", type=tarfile.DIRTYPE, mode=mode, uid=uid, gid=gid)

    def file(
        self,
        path: str,
        content: bytes | BinaryIO,
        size: int | None = None,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
    ) -> tuple[bytes, int]:
        """A file, from bytes or from a stream of `size` bytes; returns its sha256 (raw) and size.

        A path that the layer has already is left as it is, if the content is the same.

        Raises:
            DrydockError: the layer has the path with other content.
        """
        if isinstance(content, bytes):
            size = len(content)
            content = io.BytesIO(content)
        assert size is not None
        again = self._places.get(path)
        if not again:
            self._parents(path)
            self._header(path, size=size, mode=mode, uid=uid, gid=gid)
        digest = hashlib.sha256()
        left = size
        while left:
            data = content.read(min(CHUNK, left))
            if not data:
                raise EOFError(f"{path} is {left} bytes shorter than announced")
            digest.update(data)
            if not again:
                self._write(data)
            left -= len(data)
        if not again:
            self._write(b"\0" * (-size % tarfile.BLOCKSIZE))
        self._place(Row(path, f"sha256={digest.hexdigest()}", str(size), self.owner))
        return digest.digest(), size

    def _place(self, row: Row) -> bool:
        """Note what the layer holds at a path; whether it is new there."""
        self.rows.append(row)
        first = self._places.setdefault(row.path, row)
        if first.hash != row.hash:
            raise overlap(first, row)
        return first is row

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link."""
        if self._place(Row(path, f"symlink={target}", "", self.owner)):
            self._parents(path)
            self._header(path, type=tarfile.SYMTYPE, linkname=target, mode=0o777)

    def hardlink(self, path: str, target: str) -> None:
        """Another name for a file that this layer already holds at `target`."""
        if self._place(self._places[target]._replace(path=path, owner=self.owner)):
            self._parents(path)
            self._header(path, type=tarfile.LNKTYPE, linkname=target)


@dataclass
class Written:
    """What a finished layer is; hex sha256 and bytes."""

    digest: str = ""
    size: int = 0
    diff_id: str = ""
    unpacked: int = 0
    rows: list[Row] = field(default_factory=list)


@contextlib.contextmanager
def open_layer(store: Store) -> Iterator[tuple[LayerWriter, Written]]:
    """Write a layer into the store. The `Written` is filled when the block ends.

    >>> with open_layer(store) as (layer, written):
    ...     layer.file("etc/motd", b"hello\\n")
    >>> written.digest, written.diff_id
    """
    written = Written()
    with store.writer() as blob:
        # One thread a layer: layers are what runs in parallel, and zstd's bytes with and without
        # threads differ.
        with zstandard.ZstdCompressor(level=LEVEL).stream_writer(
            cast(IO[bytes], blob), closefd=False
        ) as stream:
            layer = LayerWriter(stream)
            yield layer, written
            layer._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        written.unpacked = layer.unpacked
        written.diff_id = layer._diff.hexdigest()
        written.rows = layer.rows
    written.digest, written.size = blob.digest, blob.size

"""Wheels as layers: pypa's installer with a destination that writes a tar, and bytecode beside the sources."""

from __future__ import annotations

import contextlib
import io
import posixpath
import warnings
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from installer import install
from installer.destinations import WheelDestination
from installer.records import Hash, RecordEntry
from installer.scripts import Script
from installer.sources import WheelFile
from installer.utils import Scheme, construct_record_file, fix_shebang

from drydock.bytecode import Compiler, Toolchain, compiled, pyc_path, read_pyc
from drydock.debs import checked
from drydock.errors import DrydockError
from drydock.layer import LayerWriter
from drydock.locks import Artifact
from drydock.store import Store

if TYPE_CHECKING:
    from installer.scripts import ScriptSection

PREFIX = "opt/venv"
"""The image's venv, relative to its root."""


def site_packages(series: str) -> str:
    """Where purelib and platlib go, relative to the image's root (`series` is 3.13 or the like)."""
    return f"{PREFIX}/lib/python{series}/site-packages"


@dataclass(frozen=True)
class Installed:
    """A distribution as an image holds it; `record` is the hex sha256 of its RECORD."""

    name: str
    version: str
    dist_info: str
    record: str


class LockedWheel(WheelFile):
    """A wheel whose contents come sorted by path, with their sizes."""

    @property
    def archive(self) -> zipfile.ZipFile:
        return self._zipfile

    def get_contents(self) -> Iterator[tuple[tuple[str, str, str], BinaryIO, bool]]:
        for item in sorted(self._zipfile.infolist(), key=lambda item: item.filename):
            if item.is_dir():
                continue
            executable = bool((item.external_attr >> 16) & 0o111)
            with self._zipfile.open(item) as stream:
                # The destination writes a tar header first and so needs the size before the bytes.
                yield (
                    (item.filename, "", str(item.file_size)),
                    cast(BinaryIO, _Sized(stream, item.file_size)),
                    executable,
                )


class _Sized:
    def __init__(self, stream: IO[bytes], size: int) -> None:
        self.read = stream.read
        self.tell = stream.tell
        self.seek = stream.seek
        self.size = size


class LayerDestination(WheelDestination):
    """Installs one wheel into a layer, under the image's venv.

    Parameters:
        layer: where the files go.
        name: the distribution's name, for the folder of its headers.
        series: the image's Python, as 3.13.
        bytecode: zip of .pyc by installed path of their source; None for none.
    """

    def __init__(self, layer: LayerWriter, name: str, series: str, bytecode: zipfile.ZipFile | None) -> None:
        self._layer = layer
        self._series = series
        self._bytecode = bytecode
        library = site_packages(series)
        self._folders = {
            "purelib": library,
            "platlib": library,
            "scripts": f"{PREFIX}/bin",
            "data": PREFIX,
            "headers": f"{PREFIX}/include/site/python{series}/{name}",
        }
        self.record_digest = ""

    def write_script(self, name: str, module: str, attr: str, section: ScriptSection) -> RecordEntry:
        """A console script that starts the image's own interpreter."""
        name, data = Script(name, module, attr, section).generate(f"/{PREFIX}/bin/python", "posix")
        return self._entry(Scheme("scripts"), name, data, len(data), executable=True)

    def write_file(
        self, scheme: Scheme, path: str | PathLike[str], stream: BinaryIO, is_executable: bool
    ) -> RecordEntry:
        """A file of the wheel, streamed."""
        path = fspath(path)
        if scheme == "scripts":
            source = io.BytesIO(stream.read())
            with fix_shebang(source, f"/{PREFIX}/bin/python") as fixed:
                data = fixed.read()
            return self._entry(scheme, path, data, len(data), executable=True)
        if isinstance(stream, _Sized):
            return self._entry(scheme, path, cast(BinaryIO, stream), stream.size, is_executable)
        data = stream.read()
        return self._entry(scheme, path, data, len(data), is_executable)

    def _entry(
        self, scheme: Scheme, path: str, content: bytes | BinaryIO, size: int, executable: bool
    ) -> RecordEntry:
        target = posixpath.normpath(f"{self._folders[scheme]}/{path}")
        if not target.startswith(f"{PREFIX}/"):
            raise DrydockError(f"{self._layer.owner}: the wheel wants to write {path!r}, outside /{PREFIX}")
        digest, size = self._layer.file(target, content, size, 0o755 if executable else 0o644)
        return RecordEntry(path, Hash("sha256", urlsafe_b64encode(digest).rstrip(b"=").decode()), size)

    def finalize_installation(
        self, scheme: Scheme, record_file_path: str, records: Iterable[tuple[Scheme, RecordEntry]]
    ) -> None:
        """Write the bytecode, then a RECORD that names every file that is there."""
        rows = [row for row in records if row[1].path != record_file_path]
        for kind, entry in list(rows):
            if kind not in ("purelib", "platlib") or not entry.path.endswith(".py"):
                continue
            if self._bytecode is None:
                continue
            code = read_pyc(self._bytecode, f"{self._folders[kind]}/{entry.path}")
            if code is not None:
                path = pyc_path(entry.path, self._series).lstrip("/")
                rows.append((kind, self._entry(kind, path, code, len(code), executable=False)))
        relative = [
            (scheme, RecordEntry(self._from_root(scheme, kind, entry.path), entry.hash_, entry.size))
            for kind, entry in rows
        ]
        relative.append((scheme, RecordEntry(record_file_path, None, None)))
        with construct_record_file(relative, prefix_for_scheme=lambda _: None) as stream:
            data = stream.read()
        digest, _ = self._layer.file(f"{self._folders[scheme]}/{record_file_path}", data)
        self.record_digest = digest.hex()

    def _from_root(self, root: Scheme, kind: Scheme, path: str) -> str:
        if self._folders[kind] == self._folders[root]:
            return path
        return posixpath.relpath(f"{self._folders[kind]}/{path}", self._folders[root])


def python_sources(wheel: zipfile.ZipFile, series: str) -> dict[str, str]:
    """The members of a wheel that are importable source -> their installed path."""
    found = {}
    for name in wheel.namelist():
        if not name.endswith(".py") or "__pycache__" in name.split("/"):
            continue
        top, _, rest = name.partition("/")
        if top.endswith(".data"):
            kind, _, rest = rest.partition("/")
            if kind not in ("purelib", "platlib"):
                continue
            found[name] = f"{site_packages(series)}/{rest}"
        else:
            found[name] = f"{site_packages(series)}/{name}"
    return found


def add_wheel(
    layer: LayerWriter,
    store: Store,
    wheel: Artifact,
    series: str,
    compiling: tuple[Compiler, Toolchain] | None,
) -> Installed:
    """Install a locked wheel from the store into a layer.

    Parameters:
        series: the image's Python, as 3.13.
        compiling: what makes its bytecode; None leaves it without.

    Raises:
        DrydockError: it is not in the store, or not the locked bytes.
    """
    checked(store, wheel)
    path = store.path(wheel.sha256)
    with zipfile.ZipFile(path) as archive:
        source = LockedWheel(_named(archive, wheel.filename))
        with contextlib.ExitStack() as stack:
            pycs = None
            if compiling:
                compiler, tools = compiling
                sources = python_sources(archive, series)
                pycs = stack.enter_context(
                    zipfile.ZipFile(compiled(store, compiler, tools.key, wheel, sources))
                )
            stack.enter_context(warnings.catch_warnings())
            # Bytecode that a wheel ships was made by another Python; installer leaves it out and says so.
            warnings.simplefilter("ignore", RuntimeWarning)
            destination = LayerDestination(layer, wheel.name, series, pycs)
            layer.owner = wheel.name
            install(source, destination, {"INSTALLER": b"drydock\n"})
        return Installed(wheel.name, wheel.version, source.dist_info_dir, destination.record_digest)


def _named(archive: zipfile.ZipFile, filename: str) -> zipfile.ZipFile:
    """installer reads name and version from the archive's file name, which in the store is a hash."""
    archive.filename = str(Path(filename))
    return archive

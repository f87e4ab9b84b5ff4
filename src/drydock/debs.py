"""Debian packages as layers: unpacked without maintainer scripts, with dpkg's own record of each."""

from __future__ import annotations

import hashlib
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from debian.debfile import DebError, DebFile, DebPart

from drydock.errors import DrydockError
from drydock.layer import LayerWriter
from drydock.locks import Artifact
from drydock.store import Store, sha256_file

INFO = "var/lib/dpkg/info"
MERGED = re.compile(r"^(bin|sbin|lib|lib32|lib64|libx32)/")
"""Top-level folders that base-files makes links into /usr."""


@contextmanager
def open_deb(store: Store, artifact: Artifact) -> Iterator[DebFile]:
    """A deb of the store, after its hash was checked.

    Raises:
        DrydockError: it is not there, or its bytes are not the locked ones (it is then discarded).
    """
    checked(store, artifact)
    deb = DebFile(str(store.path(artifact.sha256)))
    try:
        yield deb
    finally:
        deb.close()


def checked(store: Store, artifact: Artifact) -> None:
    """Raise unless the store holds the artifact, byte for byte."""
    if not store.has(artifact.sha256):
        raise DrydockError(f"{artifact} is not in {store.root}: run `drydock fetch`")
    if sha256_file(store.path(artifact.sha256)) != artifact.sha256:
        store.discard(artifact.sha256)
        raise DrydockError(
            f"{artifact} was corrupt in {store.root} and has been removed: run the build again"
        )


def status_paragraph(deb: DebFile) -> str:
    """What dpkg's status file says of the package once it is installed."""
    control = deb.debcontrol()
    lines = [f"Package: {control['Package']}", "Status: install ok installed"]
    conffiles = (
        deb.control.get_content("conffiles", encoding="utf-8") if deb.control.has_file("conffiles") else ""
    )
    for key, value in control.items():
        if key != "Package":
            lines.append(f"{key}: {value}")
    if conffiles:
        sums = {}
        if deb.control.has_file("md5sums"):
            sums = {_text(path): _text(digest) for path, digest in deb.md5sums(encoding="utf-8").items()}
        lines.append("Conffiles:")
        for path in str(conffiles).split("\n"):
            if path.startswith("/"):
                digest = sums.get(path[1:]) or _md5(deb, path)
                lines.append(f" {path} {digest}")
    return "\n".join(lines) + "\n\n"


def content(part: DebPart, path: str) -> bytes:
    """The bytes of one file of a deb's control or data part."""
    data = part.get_content(path)
    assert isinstance(data, bytes)
    return data


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _md5(deb: DebFile, path: str) -> str:
    try:
        return hashlib.md5(content(deb.data, path), usedforsecurity=False).hexdigest()
    except DebError:
        # A conffile that the package creates only when it is configured; dpkg writes the same word.
        return "newconffile"


def add_deb(layer: LayerWriter, deb: DebFile, name: str) -> None:
    """Unpack a deb into a layer, in the deb's own order, and write dpkg's info files for it."""
    control = deb.debcontrol()
    layer.owner = name
    listed = ["/."]
    with deb.data.tgz() as tar:
        for member in tar:
            path = posixpath.normpath(member.name.lstrip("/")).removeprefix("./")
            if path in (".", ""):
                continue
            listed.append("/" + path)
            _add_member(layer, tar, member, _merged(path))
    stem = f"{INFO}/{name}"
    if control.get("Multi-Arch") == "same":
        stem += f":{control['Architecture']}"
    layer.file(f"{stem}.list", ("\n".join(listed) + "\n").encode())
    for script in sorted(_control_files(deb)):
        if script == "control":
            continue
        mode = 0o755 if script in ("preinst", "postinst", "prerm", "postrm", "config") else 0o644
        layer.file(f"{stem}.{script}", content(deb.control, script), mode=mode)


def _control_files(deb: DebFile) -> list[str]:
    return [
        posixpath.normpath(_text(name)).lstrip("./") for name in deb.control if _text(name) not in (".", "./")
    ]


def _merged(path: str) -> str:
    return f"usr/{path}" if MERGED.match(path) else path


def _add_member(layer: LayerWriter, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    if member.isdir():
        layer.folder(path, member.mode, member.uid, member.gid)
    elif member.issym():
        layer.symlink(path, member.linkname)
    elif member.islnk():
        layer.hardlink(path, _merged(posixpath.normpath(member.linkname).lstrip("/")))
    elif member.isreg():
        stream = cast(BinaryIO, tar.extractfile(member))
        layer.file(path, stream, member.size, member.mode, member.uid, member.gid)
    else:
        raise DrydockError(
            f"{layer.owner}: {path} is a device or a pipe, which no package of a base should hold"
        )

"""What records say of files, RECORD of a wheel and base.RECORD alike, and what the files are."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from drydock.verify.report import Finding
from drydock.verify.tree import Tree


class Row(NamedTuple):
    """What a record says of one path. `source` is the record's name for messages; `hash` is as spelled there,
    `sha256=...`, or empty; `size` is in bytes; `target` is a symbolic link's."""

    source: str
    hash: str
    size: int | None
    target: str | None


Rows = dict[str, list[Row]]
"""Path -> every row that names it: two wheels may ship one path, and the later one's bytes are on disk."""


def add_rows(tree: Tree, record: str, rows: Rows, folder: str = "", source: str = "") -> list[Finding]:
    """Add a record's lines to the rows; a line that cannot be read becomes a finding about the record.

    Parameters:
        folder: what the record's paths are relative to.
        source: the record's name for messages, for a wheel's RECORD (PEP 376: path, base64 hash, size).
            Without it the record is base.RECORD: path, hex hash or `symlink=<target>`, size, owner.

    Raises:
        OSError: the record cannot be read.
    """
    findings = []
    text = io.StringIO(tree.read(record).decode("utf-8", "surrogateescape"), newline="")
    for line in filter(None, csv.reader(text)):
        try:
            path, digest, size, owner = [*line, source] if source else line
            row = Row(
                source or ("drydock" if owner == "drydock" else f"deb {owner}"),
                digest,
                int(size) if size else None,
                digest.removeprefix("symlink=") if digest.startswith("symlink=") else None,
            )
        except ValueError:
            findings.append(Finding(f"/{record}", f"has an unreadable row: {','.join(line)}"))
        else:
            path = path if path.startswith("/") else f"/{folder}/{path}"
            path = os.path.normpath(path).lstrip("/") if source else tree.canonical(path)
            rows.setdefault(path, []).append(row)
    return findings


def sources(rows: Iterable[Row]) -> str:
    """Who names a path, for messages."""
    return " and ".join(dict.fromkeys(row.source for row in rows))


def difference(tree: Tree, path: str, rows: list[Row]) -> str | None:
    """What lstat and readlink alone can tell: absent, another kind of file, another size or target."""
    try:
        seen = tree.look(path)
    except PermissionError:
        return f"cannot be looked at by uid {os.getuid()}: verify as root"
    if seen is None:
        return f"missing ({sources(rows)} names it)"
    if seen.is_link:
        target = tree.link(path)
        if any(row.target == target for row in rows):
            return None
        wanted = next((f"a link to {row.target}" for row in rows if row.target is not None), "a file")
        return f"is a link to {target}, and {wanted} by {sources(rows)}"
    files = [row for row in rows if row.target is None]
    if not files:
        return f"is no link, and one to {rows[0].target} by {sources(rows)}"
    if not seen.is_file:
        return f"is no regular file, and one by {sources(files)}"
    if any(row.size in (None, seen.size) for row in files):
        return None
    return f"has {seen.size} bytes, and {' or '.join(str(row.size) for row in files)} by {sources(files)}"


def compare(tree: Tree, rows: Rows, full: bool) -> Iterator[Finding]:
    """Compare files with the rows that name them, by hash too if `full`; a path that several rows name is
    right if one of them is."""
    to_hash = []
    for path, expected in rows.items():
        wrong = difference(tree, path, expected)
        if wrong:
            yield Finding(f"/{path}", wrong)
        elif full and all(row.hash and row.target is None for row in expected):
            to_hash.append(path)
    for path, digest in tree.sha256_all(to_hash):
        if isinstance(digest, str):
            yield Finding(f"/{path}", f"cannot be read ({digest}): verify as root")
            continue
        spelled = (base64.urlsafe_b64encode(digest).rstrip(b"=").decode(), digest.hex())
        if not any(row.hash.removeprefix("sha256=") in spelled for row in rows[path]):
            what = f"has other bytes than {sources(rows[path])} says (sha256 {spelled[1][:12]}...)"
            yield Finding(f"/{path}", what)


def compare_record(tree: Tree, record: str, sha256: str) -> Iterator[Finding]:
    """Compare a record itself with its hash in the manifest (hex)."""
    try:
        content = tree.read(record)
    except OSError as error:
        yield Finding(f"/{record}", f"cannot be read ({error.strerror})")
        return
    if hashlib.sha256(content).hexdigest() != sha256:
        yield Finding(f"/{record}", "has another hash than manifest.json says: it was rewritten")

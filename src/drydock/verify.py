"""Compares an image with what it was locked to be, from inside: `python -m drydock.verify`.

Standard library only, since it runs with the image's own Python and drydock itself is not in the image. What
an image is compared with lies in its /usr/share/drydock: `manifest.json`, the locks, and `base.RECORD`, which
names every file outside of the wheels. `verify` is the way in; each check is one function below it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import ctypes
import fnmatch
import hashlib
import io
import json
import operator
import os
import platform
import re
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from drydock.elf import MACHINES, ElfObject, MalformedElf, read_elf
from drydock.errors import DrydockError

RECORDS = "usr/share/drydock"
BASE_FOLDERS = ("usr/bin", "usr/lib", "usr/libexec", "usr/sbin")
"""Where only Debian's packages and drydock put files, so that any other file is a stray."""

DRIVER_FILES = ("lib*nvidia*", "libcuda*", "libnv*", "nvidia-*")
"""What container runtimes add to those folders for a GPU (libnvidia-container's list of driver files)."""

PRINTED_FINDINGS = 50
REWRITTEN = "has another hash than manifest.json says: it was rewritten"

State = Literal["ok", "failed", "not-run", "not-applicable"]


# The result.


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One difference: the thing (a path, a distribution, a package) and what is wrong with it."""

    subject: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found. `checked` counts the things looked at, `unused` are declarations (patterns of
    absent libraries and foreign objects) that nothing in the image needs any more."""

    name: str
    state: State
    checked: int
    seconds: float
    detail: str
    findings: tuple[Finding, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a verification; `full` is whether hashes were compared, not only sizes."""

    image: str
    full: bool
    seconds: float
    python: str
    machine: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Literal["ok", "drift"]:
        return "drift" if any(check.findings for check in self.checks) else "ok"

    def document(self) -> dict[str, Any]:
        """The JSON document of `--json`."""
        return {
            "schema": 1,
            "image": self.image,
            "verdict": self.verdict,
            "full": self.full,
            "seconds": self.seconds,
            "python": self.python,
            "machine": self.machine,
            "checks": [asdict(check) for check in self.checks],
        }


class Outcome(NamedTuple):
    """What a check's function returns; its state follows from the findings unless it says otherwise."""

    checked: int
    detail: str
    findings: Sequence[Finding] = ()
    unused: Sequence[str] = ()
    state: State | None = None


# The tree of files.


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


class Tree:
    """An image's files under `root`. All paths are relative to it, without a leading slash; links never
    lead out of it."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self._walked: dict[str, Seen] = {}
        self._links: dict[str, str | None] = {}
        self._folders: dict[str, str | None] = {}

    def where(self, path: str) -> str:
        """The path for the system's calls."""
        return os.path.join(self.root, path)  # noqa: PTH118, this runs 150,000 times

    def walk(self, top: str) -> dict[str, Seen]:
        """Everything under a folder but folders; a missing or unreadable folder is empty."""
        found: dict[str, Seen] = {}
        folders = [top]
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(self.where(folder)))
            except OSError:
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    continue
                with contextlib.suppress(FileNotFoundError):  # a live system's temporary file
                    status = entry.stat(follow_symlinks=False)
                    found[path] = Seen(status.st_mode, status.st_size)
        self._walked |= found
        return found

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

    def link(self, path: str) -> str | None:
        """A symbolic link's target, or None for anything else."""
        if path not in self._links:
            try:
                self._links[path] = os.readlink(self.where(path))  # noqa: PTH115, Path would respell it
            except OSError:
                self._links[path] = None
        return self._links[path]

    def resolve(self, path: str) -> str | None:
        """Follow every link inside the tree; None when the path leads nowhere."""
        done: list[str] = []
        left = path.split("/")[::-1]
        links = 0
        while left:
            part = left.pop()
            if part in ("", "."):
                continue
            if part == "..":
                del done[-1:]
                continue
            here = "/".join((*done, part))
            target = None if here in self._walked and not self._walked[here].is_link else self.link(here)
            if target is None:
                done.append(part)
                continue
            links += 1
            if links > 40:  # the kernel's own limit
                return None
            if target.startswith("/"):
                done = []
            left += target.split("/")[::-1]
        resolved = "/".join(done)
        return resolved if resolved in self._walked or os.path.lexists(self.where(resolved)) else None

    def folder(self, path: str) -> str | None:
        """`resolve` with a memory, for folders."""
        if path not in self._folders:
            self._folders[path] = self.resolve(path)
        return self._folders[path]

    def canonical(self, path: str) -> str:
        """The path with the links above its last part followed, where they lead somewhere."""
        above, _, name = path.rpartition("/")
        folder = self.folder(above) if above else ""
        return f"{folder}/{name}" if folder else path

    def read(self, path: str) -> bytes:
        """A small file's content, read inside the tree.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        return Path(self.where(self.resolve(path) or path)).read_bytes()

    def sha256(self, path: str) -> bytes | str:
        """A file's hash, or the reason it has none."""
        try:
            with open(self.where(path), "rb", buffering=0) as file:  # noqa: PTH123, as in `where`
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            return error.strerror or str(error)

    def sha256_all(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes | str]]:
        """Hash many files on all CPUs, the largest first so that none is left alone at the end."""
        largest_first = sorted(paths, key=lambda path: -(self._walked.get(path) or Seen(0, 0)).size)
        workers = len(os.sched_getaffinity(0))
        batches, position, step = [], 0, 1
        while position < len(largest_first):
            batches.append(largest_first[position : position + step])
            position += step
            step = min(256, position // 16 + 1)  # a task per small file would cost more than its hash
        with ThreadPoolExecutor(workers) as pool:
            for batch in pool.map(lambda names: [(name, self.sha256(name)) for name in names], batches):
                yield from batch


def mount_points(tree: Tree) -> set[str]:
    """Paths in the tree on which something is mounted (proc(5), mountinfo); none where /proc is not there."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    points = {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
    above = tree.root.rstrip("/") + "/"
    return {point.removeprefix(above) for point in points if point.startswith(above)} - {""}


# What the image says of itself.


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """An installed distribution as the manifest has it; `record` is the hex sha256 of its RECORD."""

    name: str
    version: str
    folder: str
    record: str


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The device an image is made for; `sm` are compute capabilities without the dot ("90")."""

    kind: str
    minimum_driver: str | None
    sm: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`/usr/share/drydock/manifest.json`. `prefix` and `site_packages` are without their leading slash,
    `debs` is name -> (version, architecture)."""

    image: str
    machine: str
    python: str
    prefix: str
    site_packages: str
    distributions: tuple[Distribution, ...]
    debs: Mapping[str, tuple[str, str]]
    base_record: str
    accelerator: Accelerator
    driver_libraries: tuple[str, ...]
    absent_libraries: Mapping[str, str]
    foreign_objects: Mapping[str, str]
    environment: Mapping[str, str]


def read_manifest(tree: Tree) -> Manifest:
    """Read the image's manifest.

    Raises:
        DrydockError: there is none, or it is not one that this verifier understands.
    """
    path = f"{RECORDS}/manifest.json"
    try:
        data = json.loads(tree.read(path))
    except FileNotFoundError:
        raise DrydockError(
            f"this is not a drydock image: /{path} is missing; run `drydock verify IMAGE`"
        ) from None
    except (OSError, ValueError) as error:
        raise DrydockError(f"/{path} cannot be read ({error}): build the image again") from error
    try:
        if data["schema"] != 1:
            raise DrydockError(f"/{path} has schema {data['schema']}, this verifier reads 1: use its drydock")
        accelerator = data["accelerator"]
        return Manifest(
            image=str(data["image"]),
            machine=str(data["machine"]),
            python=str(data["python"]),
            prefix=str(data["prefix"]).strip("/"),
            site_packages=str(data["site-packages"]).strip("/"),
            distributions=tuple(
                Distribution(
                    name=normalize_name(entry["name"]),
                    version=entry["version"],
                    folder=entry["dist-info"],
                    record=entry["record"],
                )
                for entry in data["distributions"]
            ),
            debs={entry["name"]: (entry["version"], entry["architecture"]) for entry in data["debs"]},
            base_record=str(data["base-record"]),
            accelerator=Accelerator(
                kind=accelerator["kind"],
                minimum_driver=accelerator["minimum-driver"],
                sm=tuple(accelerator["sm"]),
            ),
            driver_libraries=tuple(data["driver-libraries"]),
            absent_libraries=dict(data["absent-libraries"]),
            foreign_objects=dict(data["foreign-objects"]),
            environment=dict(data["environment"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DrydockError(f"/{path} cannot be read ({error!r}): build the image again") from error


class Row(NamedTuple):
    """What a record says of one path. `hash` is as spelled there, `sha256=...`, or empty; `size` is in bytes;
    `target` is a symbolic link's; `source` is the record's name for messages."""

    source: str
    hash: str
    size: int | None
    target: str | None = None


Rows = dict[str, list[Row]]
"""Path -> every row that names it: two wheels may ship one path, and the later one's bytes are on disk."""


def read_csv(content: bytes) -> list[list[str]]:
    """The rows of a RECORD."""
    text = content.decode("utf-8", "surrogateescape")
    return [row for row in csv.reader(io.StringIO(text, newline="")) if row]


def add_rows(
    rows: Rows, record: str, lines: Iterable[list[str]], make: Callable[[list[str]], tuple[str, Row]]
) -> list[Finding]:
    """Add a record's lines to the rows; a line that cannot be read becomes a finding about the record."""
    findings = []
    for line in lines:
        try:
            path, row = make(line)
        except (ValueError, IndexError):
            findings.append(Finding(subject=f"/{record}", what=f"has an unreadable row: {','.join(line)}"))
        else:
            rows.setdefault(path, []).append(row)
    return findings


def read_record(tree: Tree, record: str, site_packages: str, name: str, rows: Rows) -> list[Finding]:
    """Add a distribution's RECORD to the rows (PEP 376: path from site-packages, base64 hash, size)."""

    def row(line: list[str]) -> tuple[str, Row]:
        path, digest, size = line
        whole = f"{site_packages}/{path}" if not path.startswith("/") else path[1:]
        if "./" in path or "//" in path:
            whole = os.path.normpath(f"/{whole}").lstrip("/")
        return whole, Row(source, digest, int(size) if size else None)

    source = f"RECORD of {name}"
    try:
        lines = read_csv(tree.read(record))
    except (OSError, csv.Error):
        return []  # `check_distributions` reports it
    return add_rows(rows, record, lines, row)


class Base(NamedTuple):
    """`base.RECORD` as read: its rows by path, its hex sha256, and what is wrong with it."""

    rows: Rows
    sha256: str
    findings: list[Finding]


def read_base_record(tree: Tree) -> Base:
    """Read `base.RECORD`: path from the root, `sha256=<hex>` or `symlink=<target>`, size, owner."""

    def row(line: list[str]) -> tuple[str, Row]:
        path, digest, size, owner = line
        source = "drydock" if owner == "drydock" else f"deb {owner}"
        if digest.startswith("symlink="):
            return tree.canonical(path), Row(source, "", None, digest.removeprefix("symlink="))
        return tree.canonical(path), Row(source, digest, int(size))

    record = f"{RECORDS}/base.RECORD"
    rows: Rows = {}
    try:
        content = tree.read(record)
        lines = read_csv(content)
    except (OSError, csv.Error) as error:
        return Base(rows, "", [Finding(subject=f"/{record}", what=f"cannot be read: {error}")])
    return Base(rows, hashlib.sha256(content).hexdigest(), add_rows(rows, record, lines, row))


@dataclass(frozen=True, kw_only=True)
class Image:
    """All that the checks look at; `in_base` and `in_prefix` are the files found there."""

    tree: Tree
    manifest: Manifest
    base: Base
    in_base: Mapping[str, Seen]
    in_prefix: Mapping[str, Seen]


def open_image(root: Path) -> Image:
    """Walk the image under `root` and read what it says of itself; raises as `read_manifest`."""
    tree = Tree(root)
    manifest = read_manifest(tree)
    in_prefix = tree.walk(manifest.prefix)
    in_base = {path: seen for folder in BASE_FOLDERS for path, seen in tree.walk(folder).items()}
    return Image(
        tree=tree, manifest=manifest, base=read_base_record(tree), in_base=in_base, in_prefix=in_prefix
    )


# Rows against files, for wheels and debs alike.


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


def compare(tree: Tree, rows: Rows, full: bool, spell: Callable[[bytes], str]) -> list[Finding]:
    """Compare files with the rows that name them; a path that several rows name is right if one of them is.

    Parameters:
        full: compare hashes too.
        spell: a sha256 as the record writes it, with its `sha256=`.
    """
    findings = []
    to_hash = []
    for path, expected in rows.items():
        wrong = difference(tree, path, expected)
        if wrong:
            findings.append(Finding(subject=f"/{path}", what=wrong))
        elif full and all(row.hash for row in expected):
            to_hash.append(path)
    for path, digest in tree.sha256_all(to_hash):
        if isinstance(digest, str):
            findings.append(Finding(subject=f"/{path}", what=f"cannot be read ({digest}): verify as root"))
        elif spell(digest) not in (row.hash for row in rows[path]):
            what = f"has other bytes than {sources(rows[path])} says (sha256 {digest.hex()[:12]}...)"
            findings.append(Finding(subject=f"/{path}", what=what))
    return findings


# Check: Python.


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """The Python that runs this."""

    version: str
    implementation: str
    machine: str
    prefix: str

    @classmethod
    def running(cls) -> Interpreter:
        return cls(
            version=platform.python_version(),
            implementation=platform.python_implementation(),
            machine=platform.machine(),
            prefix=sys.prefix,
        )


def check_python(image: Image, interpreter: Interpreter | None) -> Outcome:
    """The interpreter: version to the patch, implementation, machine, prefix.

    In a tree that is not the running system (`interpreter` is None) the version is that of Debian's package,
    and the prefix has to lead to its executable.
    """
    manifest = image.manifest
    if interpreter is None:
        return _check_python_in_tree(image)
    facts = [
        ("version", interpreter.version, manifest.python),
        ("implementation", interpreter.implementation, "CPython"),
        ("machine", interpreter.machine, manifest.machine),
        ("prefix", interpreter.prefix, f"/{manifest.prefix}"),
    ]
    findings = [
        Finding(subject=f"Python's {name}", what=f"{wanted} is locked, {found} is running")
        for name, found, wanted in facts
        if found != wanted
    ]
    detail = f"{interpreter.implementation} {interpreter.version} in {interpreter.prefix}"
    return Outcome(len(facts), detail, findings)


def _check_python_in_tree(image: Image) -> Outcome:
    manifest = image.manifest
    package = f"python{'.'.join(manifest.python.split('.')[:2])}-minimal"
    findings = []
    deb = manifest.debs.get(package, ("no version", ""))[0]
    upstream = deb.rpartition(":")[2].partition("-")[0].replace("~", "")
    if upstream != manifest.python:
        findings.append(
            Finding(subject=package, what=f"Python {manifest.python} is locked, the deb is {deb}")
        )
    executable = f"{manifest.prefix}/bin/python"
    found = image.tree.resolve(executable)
    if found is None or not (image.tree.look(found) or Seen(0, 0)).is_file:
        findings.append(Finding(subject=f"/{executable}", what="leads to no interpreter in the image"))
    return Outcome(2, f"{manifest.python} by its deb; not started, since this tree is not running", findings)


# Check: distributions.


def normalize_name(name: str) -> str:
    """A project name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


_VERSION = re.compile(
    r"v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>alpha|a|beta|b|preview|pre|c|rc)[-_.]?(?P<pre_n>\d*))?"
    r"(?:-(?P<post_bare>\d+)|[-_.]?(?P<post>post|rev|r)[-_.]?(?P<post_n>\d*))?"
    r"(?:[-_.]?(?P<dev>dev)[-_.]?(?P<dev_n>\d*))?"
    r"(?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?"
)
_PRE = {"alpha": "a", "beta": "b", "preview": "rc", "pre": "rc", "c": "rc"}


def normalize_version(text: str) -> str:
    """A version as PEP 440 compares it: METADATA may say 2024.07.04 where the lock says 2024.7.4."""
    match = _VERSION.fullmatch(text.strip().lower())
    if match is None:
        return text
    part = match.groupdict()
    release = re.sub(r"(\.0)+$", "", ".".join(str(int(number)) for number in part["release"].split(".")))
    normal = f"{int(part['epoch'])}!{release}" if int(part["epoch"] or 0) else release
    if part["pre"]:
        normal += f"{_PRE.get(part['pre'], part['pre'])}{int(part['pre_n'] or 0)}"
    if part["post"] or part["post_bare"]:
        normal += f".post{int(part['post_bare'] or part['post_n'] or 0)}"
    if part["dev"]:
        normal += f".dev{int(part['dev_n'] or 0)}"
    if part["local"]:
        pieces = re.split(r"[-_.]", part["local"])
        normal += "+" + ".".join(str(int(piece)) if piece.isdigit() else piece for piece in pieces)
    return normal


def same_version(one: str, other: str) -> bool:
    """Whether two versions are equal by PEP 440, however they are spelled."""
    return one == other or normalize_version(one) == normalize_version(other)


class Installed(NamedTuple):
    """A `*.dist-info` folder and the name and version in its METADATA."""

    folder: str
    name: str
    version: str


def dist_info_folders(image: Image) -> list[str]:
    """The names of the `*.dist-info` folders in site-packages."""
    try:
        entries = list(Path(image.tree.where(image.manifest.site_packages)).iterdir())
    except OSError:
        return []
    return sorted(entry.name for entry in entries if entry.name.endswith(".dist-info"))


def read_installed(image: Image) -> tuple[list[Installed], list[Finding]]:
    """What is installed, as importlib.metadata would find it, and the folders that do not say."""
    installed, findings = [], []
    for folder in dist_info_folders(image):
        path = f"{image.manifest.site_packages}/{folder}/METADATA"
        try:
            header = image.tree.read(path).decode("utf-8", "replace").replace("\r", "").partition("\n\n")[0]
        except OSError as error:
            findings.append(Finding(subject=f"/{path}", what=f"cannot be read ({error.strerror})"))
            continue
        fields = dict(re.findall(r"^(Name|Version):[ \t]*(.*?)[ \t]*$", header, re.MULTILINE))
        if len(fields) != 2:
            findings.append(Finding(subject=f"/{path}", what="does not say both Name and Version"))
            continue
        installed.append(Installed(folder, normalize_name(fields["Name"]), fields["Version"]))
    return installed, findings


def read_packages(tree: Tree, name: str) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The `[[packages]]` of a lock that the image carries."""
    path = f"{RECORDS}/{name}"
    try:
        packages: list[dict[str, Any]] = tomllib.loads(tree.read(path).decode())["packages"]
        for package in packages:
            if not isinstance(package["name"], str) or not isinstance(package["version"], str):
                raise TypeError(f"{package['name']} has no version that is text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], [Finding(subject=f"/{path}", what=f"cannot be read: {error}")]
    return packages, []


def disagreements(
    lock: str,
    locked: Mapping[str, object],
    manifest: Mapping[str, object],
    same: Callable[[Any, Any], bool] = operator.eq,
) -> list[Finding]:
    """Where the lock and the manifest that an image carries do not say the same."""
    return [
        Finding(
            subject=name,
            what=f"{lock} says {_spoken(locked.get(name))}, manifest.json says {_spoken(manifest.get(name))}",
        )
        for name in sorted(locked.keys() | manifest.keys())
        if name not in locked or name not in manifest or not same(locked[name], manifest[name])
    ]


def _spoken(value: object) -> str:
    if value is None:
        return "nothing"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def check_distributions(image: Image) -> Outcome:
    """Every `*.dist-info` against pylock.toml: missing, extra, other version; every RECORD's own hash."""
    packages, findings = read_packages(image.tree, "pylock.toml")
    locked = {normalize_name(entry["name"]): entry["version"] for entry in packages}
    if packages:
        in_manifest = {entry.name: entry.version for entry in image.manifest.distributions}
        findings += disagreements("pylock.toml", locked, in_manifest, same_version)
    installed, unreadable = read_installed(image)
    findings += unreadable
    findings += _compare_distributions(locked, installed)
    findings += _compare_records(image, {entry.folder for entry in installed})
    return Outcome(len(locked), f"{len(installed)} installed, {len(locked)} locked", findings)


def _compare_distributions(locked: Mapping[str, str], installed: Sequence[Installed]) -> Iterator[Finding]:
    by_name: dict[str, list[Installed]] = {}
    for entry in installed:
        by_name.setdefault(entry.name, []).append(entry)
    for name, version in locked.items():
        found = by_name.get(name, [])
        if not found:
            yield Finding(subject=name, what=f"{version} is locked, none is installed")
        elif len(found) > 1:
            versions = ", ".join(entry.version for entry in found)
            yield Finding(subject=name, what=f"{version} is locked, {versions} are installed over each other")
        elif not same_version(found[0].version, version):
            yield Finding(subject=name, what=f"{version} is locked, {found[0].version} is installed")
    for name in by_name.keys() - locked.keys():
        yield Finding(subject=name, what=f"{by_name[name][0].version} is installed, none is locked")


def _compare_records(image: Image, folders: Collection[str]) -> Iterator[Finding]:
    for entry in image.manifest.distributions:
        if entry.folder not in folders:
            continue  # the distribution itself is a finding already
        record = f"{image.manifest.site_packages}/{entry.folder}/RECORD"
        digest = image.tree.sha256(record)
        if isinstance(digest, str):
            yield Finding(subject=f"/{record}", what=f"cannot be read ({digest})")
        elif digest.hex() != entry.record:
            yield Finding(subject=f"/{record}", what=REWRITTEN)


# Check: the distributions' files.


def check_files(image: Image, full: bool) -> Outcome:
    """Every file under the prefix against the RECORDs and base.RECORD, both ways.

    Bytecode counts: a stray .pyc would run in place of its module.
    """
    site_packages = image.manifest.site_packages
    rows: Rows = {}
    findings = []
    for folder in dist_info_folders(image):
        name = folder.removesuffix(".dist-info").partition("-")[0]
        findings += read_record(image.tree, f"{site_packages}/{folder}/RECORD", site_packages, name, rows)
    findings += compare(image.tree, rows, full, _spell_base64)
    findings += [
        Finding(subject=f"/{path}", what="stray: no RECORD names it")
        for path in image.in_prefix.keys() - rows.keys() - image.base.rows.keys()
    ]
    return Outcome(len(rows), f"{len(rows)} files, {'hashes' if full else 'sizes'} compared", findings)


def _spell_base64(digest: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


# Check: debs.


_STATUS_FIELD = re.compile(r"^(Package|Version|Architecture|Status): *(.*?) *$", re.MULTILINE)


def read_dpkg_status(tree: Tree) -> dict[str, tuple[str, str]]:
    """Installed packages, name -> (version, architecture), from dpkg's own record (deb-control(5)).

    Raises:
        OSError: the record cannot be read.
    """
    installed = {}
    for paragraph in tree.read("var/lib/dpkg/status").decode("utf-8", "replace").split("\n\n"):
        fields = dict(_STATUS_FIELD.findall(paragraph))
        if fields.get("Status", "").endswith(" installed"):
            version = (fields.get("Version", "no version"), fields.get("Architecture", "no architecture"))
            installed[fields.get("Package", "no name")] = version
    return installed


def check_debs(image: Image, full: bool) -> Outcome:
    """dpkg's status against debian.toml, and every file of base.RECORD; strays in `BASE_FOLDERS`."""
    packages, findings = read_packages(image.tree, "debian.toml")
    locked = {entry["name"]: (entry["version"], str(entry.get("architecture"))) for entry in packages}
    if packages:
        findings += disagreements("debian.toml", locked, image.manifest.debs)
    try:
        installed = read_dpkg_status(image.tree)
    except OSError as error:
        findings.append(Finding(subject="/var/lib/dpkg/status", what=f"cannot be read ({error.strerror})"))
    else:
        findings += _compare_debs(locked, installed)
    base = image.base
    findings += base.findings
    if base.sha256 and base.sha256 != image.manifest.base_record:
        findings.append(Finding(subject=f"/{RECORDS}/base.RECORD", what=REWRITTEN))
    findings += compare(image.tree, base.rows, full, lambda digest: f"sha256={digest.hex()}")
    if base.rows:
        findings += _base_strays(image)
    detail = f"{len(locked)} packages, {len(base.rows)} files, {'hashes' if full else 'sizes'} compared"
    return Outcome(len(locked) + len(base.rows), detail, findings)


def _compare_debs(
    locked: Mapping[str, tuple[str, str]], installed: Mapping[str, tuple[str, str]]
) -> Iterator[Finding]:
    for name in sorted(locked.keys() | installed.keys()):
        wanted, found = locked.get(name), installed.get(name)
        if wanted == found:
            continue
        if found is None:
            yield Finding(subject=name, what=f"deb {_spoken(wanted)} is locked, none is installed")
        elif wanted is None:
            yield Finding(subject=name, what=f"deb {_spoken(found)} is installed, none is locked")
        else:
            yield Finding(
                subject=name, what=f"deb {_spoken(wanted)} is locked, {_spoken(found)} is installed"
            )


def _base_strays(image: Image) -> list[Finding]:
    mounts = mount_points(image.tree)
    return [
        Finding(subject=f"/{path}", what="stray: no deb and not drydock put it there")
        for path in image.in_base.keys() - image.base.rows.keys()
        if not _put_by_runtime(image, path, mounts)
    ]


def _put_by_runtime(image: Image, path: str, mounts: Collection[str]) -> bool:
    """Whether a container runtime put this file there: the driver's, a mount, or what is left of one."""
    seen = image.in_base[path]
    names = [path.rpartition("/")[2]]
    if seen.is_link:
        names.append((image.tree.link(path) or "").rpartition("/")[2])
    return (
        seen.size == 0
        or any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in DRIVER_FILES)
        or any(path == mount or path.startswith(f"{mount}/") for mount in mounts)
    )


# Check: libraries.


class Loader:
    """Finds a needed library as ld.so(8) would, inside the tree: RPATH, LD_LIBRARY_PATH, RUNPATH, then
    ld.so.conf's and the default folders. Objects for another machine are passed over, as the loader does."""

    def __init__(self, tree: Tree, manifest: Manifest) -> None:
        self._tree = tree
        self._machine = manifest.machine
        self._multiarch = f"lib/{manifest.machine}-linux-gnu"
        self._objects: dict[str, ElfObject | None] = {}
        self._everywhere: dict[str, bool] = {}
        preset = manifest.environment.get("LD_LIBRARY_PATH", "").split(":")
        defaults = (self._multiarch, f"usr/{self._multiarch}", "lib", "usr/lib", "lib64", "usr/lib64")
        self._folders = [
            *(folder.lstrip("/") for folder in preset if folder.startswith("/")),
            *ld_so_conf_folders(tree, "etc/ld.so.conf"),
            *defaults,
        ]

    def read(self, path: str) -> ElfObject | None:
        """The object at a path without links, read once; None when it is not ELF.

        Raises:
            MalformedElf, OSError: as `read_elf`.
        """
        if path not in self._objects:
            self._objects[path] = read_elf(self._tree.where(path))
        return self._objects[path]

    def finds(self, name: str, path: str, needing: ElfObject) -> bool:
        """Whether the object at `path` gets its needed library `name`."""
        if "/" in name:
            return name.startswith("/") and self._loadable(name.lstrip("/"))
        if name not in self._everywhere:
            self._everywhere[name] = any(self._loadable(f"{folder}/{name}") for folder in self._folders)
        return self._everywhere[name] or any(
            self._loadable(f"{folder}/{name}") for folder in self._own_folders(path, needing)
        )

    def _own_folders(self, path: str, needing: ElfObject) -> Iterator[str]:
        origin = path.rpartition("/")[0]
        # RUNPATH makes the loader ignore RPATH.
        for entry in needing.runpath or needing.rpath:
            for token, value in (
                ("ORIGIN", f"/{origin}"),
                ("LIB", self._multiarch),
                ("PLATFORM", self._machine),
            ):
                entry = entry.replace(f"${{{token}}}", value).replace(f"${token}", value)
            if entry.startswith("/"):  # others depend on the working directory
                yield entry.lstrip("/")

    def _loadable(self, path: str) -> bool:
        above, _, name = path.rpartition("/")
        folder = self._tree.folder(above)
        found = None if folder is None else self._tree.resolve(f"{folder}/{name}")
        seen = None if found is None else self._tree.look(found)
        if found is None or seen is None or not seen.is_file:
            return False
        try:
            elf = self.read(found)
        except (MalformedElf, OSError):
            return False
        return elf is not None and elf.native and elf.machine == MACHINES.get(self._machine)


def ld_so_conf_folders(tree: Tree, path: str) -> list[str]:
    """The folders that ld.so.conf and what it includes name, in order (ldconfig(8)).

    It is read in place of ld.so.cache, which only says what these folders held when it was made.
    """
    try:
        lines = tree.read(path).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    folders = []
    for line in (line.partition("#")[0].strip() for line in lines):
        if line.startswith("include "):
            pattern = line.split(None, 1)[1]
            beside = "" if pattern.startswith("/") else path.rpartition("/")[0]
            above, _, name = f"{beside}/{pattern.lstrip('/')}".rpartition("/")
            above = above.lstrip("/")
            for included in sorted(Path(tree.where(tree.resolve(above) or above)).glob(name)):
                folders += ld_so_conf_folders(tree, f"{above}/{included.name}")
        elif line.startswith("/"):
            folders.append(line.strip("/"))
    return folders


def elf_candidates(image: Image) -> list[str]:
    """Regular files of the image that the loader may be given: named like a library, or executable.

    What a runtime added to the base is not the image's.
    """
    named = image.base.rows
    files = [(path, seen) for path, seen in image.in_base.items() if path in named or not named]
    files += image.in_prefix.items()
    return sorted(
        path
        for path, seen in files
        if seen.is_file and seen.size and (seen.mode & 0o111 or ".so" in path.rpartition("/")[2])
    )


def read_objects(image: Image, loader: Loader) -> tuple[dict[str, ElfObject], list[Finding], set[str]]:
    """The ELF objects for the image's machine by path, findings, and the foreign patterns that matched."""
    objects, findings, used = {}, [], set()
    for path in elf_candidates(image):
        try:
            elf = loader.read(path)
        except MalformedElf as error:
            findings.append(Finding(subject=f"/{path}", what=f"is a broken ELF object: {error}"))
            continue
        except OSError as error:
            findings.append(
                Finding(subject=f"/{path}", what=f"cannot be read ({error.strerror}): verify as root")
            )
            continue
        if elf is None:
            continue
        if elf.native and elf.machine == MACHINES.get(image.manifest.machine):
            objects[path] = elf
            continue
        patterns = [
            pattern for pattern in image.manifest.foreign_objects if fnmatch.fnmatchcase(path, pattern)
        ]
        used.update(patterns)
        if not patterns:
            what = f"is an ELF object for {elf.machine_name}, the image is {image.manifest.machine}"
            findings.append(Finding(subject=f"/{path}", what=what))
    return objects, findings, used


def check_libraries(image: Image) -> Outcome:
    """Every ELF object is for the image's machine, and every library it needs is somewhere it is looked for.

    A library that no search path leads to may still be one that Python code loads first (torch does so with
    CUDA's): the loader takes an object that is loaded already when its soname is the one needed.
    """
    manifest = image.manifest
    loader = Loader(image.tree, manifest)
    objects, findings, used = read_objects(image, loader)
    shipped = {
        elf.soname
        for path, elf in objects.items()
        if elf.soname and path.startswith(f"{manifest.prefix}/")
    }
    needed = preloaded = from_driver = absent = 0
    for path, elf in objects.items():
        for name in elf.needed:
            needed += 1
            if loader.finds(name, path, elf):
                continue
            patterns = [
                pattern for pattern in manifest.absent_libraries if fnmatch.fnmatchcase(name, pattern)
            ]
            if name in manifest.driver_libraries:
                from_driver += 1
            elif name in shipped:
                preloaded += 1
            elif patterns:
                absent += 1
                used.update(patterns)
            else:
                findings.append(Finding(subject=f"/{path}", what=f"needs {name}, which is not in the image"))
    detail = (
        f"{len(objects)} objects need {needed} libraries: "
        f"{preloaded} preloaded, {from_driver} from the driver, {absent} declared absent"
    )
    unused = [
        pattern for pattern in (*manifest.absent_libraries, *manifest.foreign_objects) if pattern not in used
    ]
    return Outcome(len(objects), detail, findings, unused)


# Check: the accelerator.


class Device(NamedTuple):
    """A GPU: its name and its compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]


class NvmlError(Exception):
    """NVML is not there or refuses; the text says which call and its code."""


def read_nvml() -> tuple[str, list[Device]]:
    """The driver's version and the devices, by NVML, which the driver itself brings (NVML API reference).

    Raises:
        NvmlError: it does not load, or a call fails.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise NvmlError(f"libnvidia-ml.so.1 does not load: {error}") from error

    def call(function: str, *arguments: Any) -> None:
        code = getattr(nvml, function)(*arguments)
        if code:
            raise NvmlError(f"{function} returned {code}")

    call("nvmlInit_v2")
    try:
        text = ctypes.create_string_buffer(96)
        call("nvmlSystemGetDriverVersion", text, 96)
        driver = text.value.decode()
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        devices = []
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
            call("nvmlDeviceGetName", handle, text, 96)
            call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            devices.append(Device(text.value.decode(), (major.value, minor.value)))
        return driver, devices
    finally:
        nvml.nvmlShutdown()


def torch_architectures() -> list[str]:
    """What torch is compiled for, as `sm_90`; asked in a process of its own, which may crash.

    Raises:
        DrydockError: it did not answer.
    """
    code = "import json, torch; print(json.dumps(torch.cuda.get_arch_list()))"
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
        )
        architectures: list[str] = json.loads(run.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise DrydockError(f"does not say what it is compiled for: {''.join(last)}") from error
    return architectures


def compare_devices(
    accelerator: Accelerator, driver: str, devices: Sequence[Device], architectures: Sequence[str] | None
) -> Iterator[Finding]:
    """The host's driver and devices against what the image declares and torch's kernels run on.

    `architectures` is None for an image without torch. A kernel compiled for sm_80 runs on 8.6 (CUDA C++
    programming guide, binary compatibility); PTX (`compute_80`) would run too after minutes of compiling
    at start, so it does not count.
    """
    minimum = accelerator.minimum_driver
    if minimum and _numbers(driver) < _numbers(minimum):
        yield Finding(subject="driver", what=f"{driver} is older than the image's minimum {minimum}")
    declared = {sm.rstrip("af") for sm in accelerator.sm}
    for device in dict.fromkeys(devices):
        major, minor = device.capability
        if f"{major}{minor}" not in declared:
            declared_sm = ", ".join(accelerator.sm)
            what = f"has compute capability {major}.{minor}, the image declares sm {declared_sm}"
            yield Finding(subject=device.name, what=what)
        if architectures is not None and not any(_runs_on(name, major, minor) for name in architectures):
            what = f"has compute capability {major}.{minor}, torch is compiled for {' '.join(architectures)}"
            yield Finding(subject=device.name, what=what)


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", architecture)
    if match is None or int(match[1]) != major:
        return False
    return int(match[2]) == minor if match[3] == "a" else int(match[2]) <= minor


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def check_accelerator(manifest: Manifest, live: bool) -> Outcome:
    """The driver's version and every device against the manifest; not run where there is no device."""
    if manifest.accelerator.kind == "none":
        return Outcome(0, "the image is made for none", state="not-applicable")
    if not live:
        return Outcome(0, "this tree is not running", state="not-run")
    try:
        driver, devices = read_nvml()
    except NvmlError as error:
        if not Path("/dev/nvidiactl").exists():
            return Outcome(0, f"no device: {error}", state="not-run")
        silent = Finding(subject="driver", what=str(error))
        return Outcome(0, "a device is there, its driver does not answer", [silent])
    if not devices:
        return Outcome(0, f"driver {driver} shows no device", state="not-run")
    findings = []
    architectures = None
    if any(entry.name == "torch" for entry in manifest.distributions):
        try:
            architectures = torch_architectures()
        except DrydockError as error:
            findings.append(Finding(subject="torch", what=str(error)))
    findings += compare_devices(manifest.accelerator, driver, devices, architectures)
    names = ", ".join(dict.fromkeys(device.name for device in devices))
    return Outcome(len(devices), f"driver {driver}, {len(devices)} x {names}", findings)


# All of it.


def verify(root: Path, full: bool) -> Report:
    """Verify the image under `root`; `/` is the one that runs this.

    Parameters:
        full: compare every file's hash, not only its size.

    Raises:
        DrydockError: it is not a drydock image, or its manifest cannot be read.

    >>> verify(Path("/"), full=False).verdict
    'ok'
    """
    started = time.perf_counter()
    image = open_image(root)
    live = image.tree.root == "/"
    checks = (
        timed("python", lambda: check_python(image, Interpreter.running() if live else None)),
        timed("distributions", lambda: check_distributions(image)),
        timed("files", lambda: check_files(image, full)),
        timed("debs", lambda: check_debs(image, full)),
        timed("libraries", lambda: check_libraries(image)),
        timed("accelerator", lambda: check_accelerator(image.manifest, live)),
    )
    return Report(
        image=image.manifest.image,
        full=full,
        seconds=round(time.perf_counter() - started, 3),
        python=platform.python_version() if live else image.manifest.python,
        machine=platform.machine() if live else image.manifest.machine,
        checks=checks,
    )


def timed(name: str, run: Callable[[], Outcome]) -> Check:
    """Run a check and take its time in seconds."""
    started = time.perf_counter()
    outcome = run()
    return Check(
        name=name,
        state=outcome.state or ("failed" if outcome.findings else "ok"),
        checked=outcome.checked,
        seconds=round(time.perf_counter() - started, 3),
        detail=outcome.detail,
        findings=tuple(sorted(outcome.findings, key=lambda finding: (finding.subject, finding.what))),
        unused=tuple(outcome.unused),
    )


def printable(text: str) -> str:
    """The text on one line of any terminal: file names may hold line ends and bytes that are not UTF-8."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def text_lines(report: Report) -> Iterator[str]:
    """The report for people: a table, a line a finding, the verdict."""
    table = [("check", "state", "checked", "seconds", "")]
    for check in report.checks:
        table.append((check.name, check.state, str(check.checked), f"{check.seconds:.2f}", check.detail))
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for name, state, checked, seconds, detail in table:
        numbers = f"{checked:>{widths[2]}}  {seconds:>{widths[3]}}"
        yield printable(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {numbers}  {detail}".rstrip())
    findings = [(check.name, finding) for check in report.checks for finding in check.findings]
    for name, finding in findings[:PRINTED_FINDINGS]:
        yield printable(f"{name}: {finding.subject}: {finding.what}")
    if len(findings) > PRINTED_FINDINGS:
        yield f"... and {len(findings) - PRINTED_FINDINGS} more"
    for check in report.checks:
        for pattern in check.unused:
            yield printable(f"note: {check.name}: the declaration {pattern!r} matches nothing in the image")
    compared = "sizes and presence; --full compares every hash" if not report.full else "every hash"
    if report.verdict == "ok":
        yield f"ok: {report.image} is what it was locked to be ({compared}), {report.seconds:.1f} s"
    else:
        places = "1 place" if len(findings) == 1 else f"{len(findings)} places"
        yield f"drift: {report.image} differs from its lock in {places}, {report.seconds:.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 for an image that is right, 1 for drift, 2 for what is no image."""
    parser = argparse.ArgumentParser(
        "python -m drydock.verify", description="Compare this image with its lock."
    )
    parser.add_argument("--full", action="store_true", help="compare every file's hash, not only its size")
    parser.add_argument("--json", action="store_true", help="print one JSON document on one line")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="an image unpacked in DIR"
    )
    options = parser.parse_args(arguments)
    try:
        report = verify(options.root, options.full)
    except DrydockError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_status
    if options.json:
        print(json.dumps(report.document()))
    else:
        print("\n".join(text_lines(report)))
    return 0 if report.verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())

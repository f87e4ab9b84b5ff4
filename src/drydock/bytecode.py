"""Bytecode for the image, made by the image's own Python on the machine that builds.

The interpreter is unpacked from the builder architecture's locked debs and started through its own loader,
so it runs on any Linux without root. Bytecode does not depend on the architecture, so an x86-64 builder
makes an aarch64 image's bytecode without emulation; both locks must hold the same Python.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from drydock.debs import open_deb
from drydock.definition import MACHINES, Architecture
from drydock.errors import DrydockError
from drydock.locks import Artifact, DebianLock, sha256_json
from drydock.store import Store, sha256_file

WORKER = Path(__file__).with_name("bytecode_worker.py")


def packages(series: str) -> tuple[str, ...]:
    """The debs the compiler needs to run (`series` is 3.13 or the like); the compression ones read archives."""
    python = (f"libpython{series}-minimal", f"libpython{series}-stdlib", f"python{series}-minimal")
    return (*python, "libc6", "zlib1g", "libexpat1", "liblzma5", "libbz2-1.0")


def builder_architecture() -> Architecture:
    """The architecture of the machine that builds.

    Raises:
        DrydockError: it is neither x86-64 nor aarch64 Linux.
    """
    for architecture, machine in MACHINES.items():
        if platform.system() == "Linux" and platform.machine() == machine:
            return architecture
    raise DrydockError(
        f"images are built on x86-64 or aarch64 Linux, this is {platform.system()} {platform.machine()}: "
        "use a Linux machine or container"
    )


@dataclass(frozen=True)
class Toolchain:
    """The debs an interpreter is unpacked from, its version (Debian's) and its series (3.13)."""

    python: str
    series: str
    debs: tuple[Artifact, ...]

    @property
    def key(self) -> str:
        """What bytecode depends on besides its source; not the architecture that compiled it."""
        return sha256_json([self.python, sha256_file(WORKER)])

    @property
    def folder_name(self) -> str:
        return sha256_json([deb.sha256 for deb in self.debs])[:16]


def toolchain(series: str, image: DebianLock, builder: DebianLock) -> Toolchain:
    """The compiler for an image, from the builder architecture's lock.

    Raises:
        DrydockError: the two locks hold different versions of Python.
    """
    package = f"python{series}-minimal"
    wanted, found = image.version_of(package), builder.version_of(package)
    if wanted != found:
        raise DrydockError(
            f"the locks of {image.architecture} and {builder.architecture} hold Python {wanted} and {found}, so one "
            "cannot compile for the other: run `drydock lock --base`"
        )
    artifacts = {entry.name: entry.artifact for entry in builder.packages}
    return Toolchain(wanted, series, tuple(artifacts[name] for name in packages(series)))


def unpack_toolchain(store: Store, tools: Toolchain) -> Path:
    """Have the interpreter's files in the store, as a folder."""
    folder = store.root / "toolchain" / tools.folder_name
    with store.lock(f"toolchain-{tools.folder_name}"):
        if folder.is_dir():
            return folder
        with store.scratch() as scratch:
            for artifact in tools.debs:
                with open_deb(store, artifact) as deb, deb.data.tgz() as tar:
                    tar.extractall(scratch / "tree", filter="tar")
            folder.parent.mkdir(exist_ok=True)
            (scratch / "tree").rename(folder)
    return folder


class Compiler:
    """A running interpreter of the image's version that compiles archives, one at a time."""

    def __init__(self, folder: Path, series: str) -> None:
        machine = platform.machine()
        libraries = folder / "usr/lib" / f"{machine}-linux-gnu"
        (loader,) = [
            path for path in (folder / "usr/lib64", folder / "usr/lib") for path in path.glob("ld-linux-*")
        ]
        self._process = subprocess.Popen(
            [
                loader,
                "--library-path",
                libraries,
                folder / f"usr/bin/python{series}",
                "-S",
                "-s",
                "-B",
                WORKER,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A group, so that `kill` reaches the process that works on a job too.
            process_group=0,
            # A fixed hash seed as a second guard: marshal sorts sets, so it should not matter.
            env={"PYTHONHOME": str(folder / "usr"), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        )

    def compile(self, archive: Path, sources: Mapping[str, str], output: Path) -> None:
        """Compile members of an archive (wheel or tar) into a zip of .pyc by installed path.

        Raises:
            DrydockError: the compiler died; a source that does not compile is left out instead.
            OSError: it could not read or write a file.
        """
        assert self._process.stdin
        assert self._process.stdout
        job = {"archive": str(archive), "sources": dict(sources), "output": str(output)}
        answer = "{}"
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline() or "{}"
        said = json.loads(answer)
        if said.get("errno"):
            # As if it had happened here: a full disk has a line of its own.
            raise OSError(said["errno"], os.strerror(said["errno"]), str(output))
        if "compiled" not in said:
            raise DrydockError(f"compiling {archive.name}: {said.get('error', 'the compiler stopped')}")

    def kill(self) -> None:
        """End it at once, whatever it does."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def compiled(
    store: Store, compiler: Compiler, tools_key: str, artifact: Artifact, sources: Mapping[str, str]
) -> Path:
    """The zip of .pyc for an artifact's sources, from the store when it was compiled before.

    Parameters:
        sources: member of the artifact -> path in the image, without a leading slash.
    """
    key = sha256_json([tools_key, artifact.sha256, sorted(sources.items())])
    record = store.read_record("bytecode", key)
    if record and store.has(record["digest"]):
        # The cache ends up in images: a byte that changed on disk must not.
        if sha256_file(store.path(record["digest"])) == record["digest"]:
            return store.path(record["digest"])
        store.discard(record["digest"])
    with store.scratch() as scratch:
        path = scratch / "pyc.zip"
        compiler.compile(store.path(artifact.sha256), sources, path)
        digest = sha256_file(path)
        store.adopt(path, digest)
    store.write_record("bytecode", key, {"digest": digest})
    return store.path(digest)


def pyc_path(source: str, series: str) -> str:
    """Where Python of that series looks for the bytecode of a source file."""
    folder, _, name = source.rpartition("/")
    return f"{folder}/__pycache__/{name.removesuffix('.py')}.cpython-{series.replace('.', '')}.pyc"


def read_pyc(archive: zipfile.ZipFile, source: str) -> bytes | None:
    """The bytecode of an installed source, or None when it did not compile."""
    try:
        return archive.read(source)
    except KeyError:
        return None

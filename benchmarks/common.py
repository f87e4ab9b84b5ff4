"""What the benchmarks share: facts of the machine, time and memory of a command, stores and projects."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import unquote, urlsplit

import tomli_w
import zstandard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from uv import find_uv_bin

from drydock.build import Inputs
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.fetch import fetch
from drydock.indexes import read_indexes, uv_arguments
from drydock.layer import LEVEL
from drydock.locks import (
    Artifact,
    platform_tags,
    resolution_inputs,
    sha256_json,
    wheel_rank,
    write_lock,
)
from drydock.locks import platform as uv_platform
from drydock.oci import Built, Layer
from drydock.plan import plan_layers
from drydock.store import CHUNK, Store
from drydock.unpack import remove_tree

TAR_END = 1024
"""Bytes of zeros that end a tar."""
SAMPLE_SECONDS = 0.2
"""Between two looks at a process tree's memory."""

Document = dict[str, Any]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Arguments of a benchmark; a wrong one is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}: see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


def main(
    parser: Parser, measure: Callable[[argparse.Namespace], Document], table: Callable[[Document], str]
) -> None:
    """Measure, then print one JSON document (`--json`) or a table.

    The exit status is 1 when the document names, under `failed`, what could not be measured.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    arguments = parser.parse_args()
    try:
        document = {"benchmark": parser.prog.removesuffix(".py"), "machine": machine(), **measure(arguments)}
    except DrydockError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(document, indent=1) if arguments.json else table(document))
    sys.exit(1 if document.get("failed") else 0)


def machine() -> Document:
    """What a number measured here depends on besides drydock."""
    git = ("git", "-C", str(Path(__file__).parents[1]))
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "zstd": ".".join(str(part) for part in zstandard.ZSTD_VERSION),
        "docker": output("docker", "version", "--format", "{{.Server.Version}}"),
        "buildx": output("docker", "buildx", "version"),
        "drydock": output(*git, "rev-parse", "HEAD"),
        "drydock-modified": bool(output(*git, "status", "--porcelain", "src", "images", "lock")),
    }


def output(*command: str) -> str | None:
    """What a command prints, or None when it is not here or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def work_folder(parent: Path | None, source: Store) -> Iterator[Path]:
    """A folder for stores, trees and outputs, removed afterwards; by default beside the blobs, to link them."""
    if parent and not parent.is_dir():
        raise DrydockError(f"--work {parent} is not a folder: make it, or name another")
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent or source.root))
    try:
        yield folder
    finally:
        remove_tree(folder)


def need_space(folder: Path, size: int) -> None:
    """Refuse to start what a disk cannot hold.

    Raises:
        DrydockError: it has less than `size` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DrydockError(
            f"this takes about {size / 1e9:.0f} GB and the disk of {folder} has {free / 1e9:.0f} GB free: "
            "make room, or name a folder of another disk with --work"
        )


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A finished command: its output, wall seconds, and peak bytes of its process tree.

    `pss` and `rss` are peaks of the sum over all processes; `pss` counts a page that several share once,
    `rss` as often as it is shared. `largest` is the peak rss of one process.
    """

    output: str
    seconds: float
    pss: int
    rss: int
    largest: int

    def numbers(self) -> Document:
        return {
            "seconds": round(self.seconds, 2),
            "peak-memory-pss": self.pss,
            "peak-memory-rss": self.rss,
            "largest-process-rss": self.largest,
        }


def run_measured(command: list[str], cwd: Path, environment: dict[str, str]) -> Ran:
    """Run a command, its standard error passed through, with an eye on its memory.

    Raises:
        DrydockError: it failed; it has said why.
    """
    os.sync()
    began = time.monotonic()
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True) as process:
        stop = threading.Event()
        peaks = [0, 0, 0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, stop))
        watcher.start()
        try:
            text, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
        finally:
            seconds = time.monotonic() - began
            stop.set()
            watcher.join()
    if process.returncode:
        raise DrydockError(f"`{' '.join(command[1:])}` failed with status {process.returncode}")
    return Ran(output=text, seconds=seconds, pss=peaks[0], rss=peaks[1], largest=peaks[2])


def _watch(root: int, peaks: list[int], stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        found = [_memory(pid) for pid in _family(root)]
        total = [sum(sizes) for sizes in zip(*found, strict=True)] or [0, 0]
        peaks[0] = max(peaks[0], total[0])
        peaks[1] = max(peaks[1], total[1])
        peaks[2] = max([peaks[2], *(rss for _, rss in found)])


def _family(root: int) -> list[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold spaces; the parent is the second field after it.
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
    family = [root]
    for pid in family:
        family += children[pid]
    return family


def _memory(pid: int) -> tuple[int, int]:
    """Pss and Rss of a process in bytes; nothing when it is gone."""
    sizes = {"Pss:": 0, "Rss:": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            if name in sizes:
                sizes[name] = int(rest[0]) * 1024
    return sizes["Pss:"], sizes["Rss:"]


def drydock(root: Path, store: Path, *arguments: str) -> tuple[Ran, Document]:
    """Run a drydock command with `--json` on a checkout, as a user does; what it took and what it said."""
    command = [sys.executable, "-m", "drydock.cli", *arguments, "--json"]
    ran = run_measured(command, root, {**os.environ, "DRYDOCK_STORE": str(store)})
    said: Document = json.loads(ran.output)
    return ran, said


def seed(source: Store, target: Store, artifacts: Iterable[Artifact], image: str) -> int:
    """Give a store the artifacts of another by hard link, and nothing else; returns their bytes.

    Raises:
        DrydockError: the other store lacks one.
    """
    total = 0
    for artifact in artifacts:
        if not source.has(artifact.sha256, artifact.size):
            raise DrydockError(f"{artifact} is not in the store: run `drydock fetch {image}`")
        source.link(artifact.sha256, target.path(artifact.sha256))
        total += artifact.size
    return total


def seed_layers(source: Store, target: Store, layers: Iterable[Layer]) -> None:
    """Give a store layers of another by hard link, with what it knows of them, so that they count as made."""
    for layer in layers:
        record = source.read_record("layers", layer.key)
        if record and source.has(record["digest"]) and source.has(record["facts"]):
            for digest in (record["digest"], record["facts"]):
                source.link(digest, target.path(digest))
            target.write_record("layers", layer.key, record)


def other_release(image: Image, name: str, store: Store) -> Artifact:
    """Fetch the release of a package that is nearest to the locked one, from the user's own indexes.

    That is the newest of the same minor version if there is a newer one there, else the one before.

    Raises:
        DrydockError: it is not locked, or the indexes have no other release for the image's platform.
    """
    locked = {package.name: package.version for package in Inputs(image).lock.packages}
    if name not in locked:
        raise DrydockError(f"{image.name} has no {name}: name a package of its lock")
    version = Version(locked[name])
    newer = f"{name}>{version},=={version.major}.{version.minor}.*"
    for requirement in (newer, f"{name}<{version}"):
        entry = _resolve(image, requirement)
        if entry:
            artifact = _artifact(image, entry)
            indexes = read_indexes(os.environ)
            fetch(store, [artifact], indexes, {})
            return artifact
    raise DrydockError(f"the indexes have only {name} {version} for {image.name}: name another package")


def _resolve(image: Image, requirement: str) -> Document | None:
    """What uv finds for one requirement on the image's platform, without its dependencies."""
    arguments, environment = uv_arguments(read_indexes(os.environ))
    with tempfile.TemporaryDirectory(prefix="drydock-benchmark-") as folder:
        answer = Path(folder) / "pylock.toml"
        command = [
            find_uv_bin(), "pip", "compile", "-", "--no-deps", "--quiet", "--only-binary", ":all:",
            "--prerelease", "disallow",
            "--python-version", image.definition.python, "--python-platform", uv_platform(image),
            "--format", "pylock.toml", "--output-file", answer.name, *arguments,
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            input=requirement,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return None
        entry: Document = tomllib.loads(answer.read_text())["packages"][0]
        return entry


def _artifact(image: Image, entry: Document) -> Artifact:
    tags = platform_tags(image)
    ranked = []
    for wheel in entry["wheels"]:
        filename = unquote(urlsplit(str(wheel.get("url") or wheel["path"])).path.rpartition("/")[2])
        rank = wheel_rank(filename, tags)
        if rank is not None and "size" in wheel:
            ranked.append((rank, filename, wheel))
    if not ranked:
        raise DrydockError(
            f"{entry['name']} {entry['version']} has no wheel of known size for {image.name} on the indexes: "
            "name another package, or use an index that serves PEP 700 metadata"
        )
    _, filename, wheel = min(ranked, key=lambda found: found[:2])
    return Artifact(
        kind="wheel",
        name=entry["name"],
        version=entry["version"],
        filename=filename,
        sha256=wheel["hashes"]["sha256"],
        size=wheel["size"],
    )


def bumped_project(image: Image, artifact: Artifact, target: Path) -> Image:
    """A copy of the image's definitions and locks in which one package has another wheel.

    A requirement of the definition that pins the package is moved with it; nothing else changes.
    """
    for folder in ("images", "lock"):
        shutil.copytree(image.root / folder, target / folder)
    definition = target / image.definition_path.relative_to(image.root)
    data = tomllib.loads(definition.read_text())
    requirements: list[str] = data["engine"][image.engine_name]["requirements"]
    pin = f"{artifact.name}=={artifact.version}"
    moved = [
        pin if canonicalize_name(Requirement(text).name) == artifact.name else text for text in requirements
    ]
    if moved != requirements:
        data["engine"][image.engine_name]["requirements"] = moved
        definition.write_text(tomli_w.dumps(data))
    copy = Image.named(target, image.name)
    lock = tomllib.loads(copy.pylock_path.read_text())
    for package in lock["packages"]:
        if package["name"] == artifact.name:
            package["version"] = artifact.version
            package["wheels"] = [
                {
                    "path": f"wheels/{artifact.filename}",
                    "size": artifact.size,
                    "hashes": {"sha256": artifact.sha256},
                }
            ]
    lock["tool"]["drydock"]["inputs"] = sha256_json(resolution_inputs(copy))
    write_lock(copy.pylock_path, lock)
    return copy


def venv_layers(image: Image, built: Built) -> list[Layer]:
    """The layers that a `pip install` would make at once."""
    inputs = Inputs(image)
    specs = plan_layers(image, inputs.lock, inputs.base, inputs.tools)
    wheels = {spec.key for spec in specs if spec.kind == "wheels"}
    return [layer for layer in built.layers if layer.key in wheels]


def as_one_layer(store: Store, layers: list[Layer], target: IO[bytes]) -> str:
    """Write layers as one, compressed as drydock does: their tars after each other, each without its end.

    Returns:
        Hex sha256 of the tar.
    """
    say(f"compressing {gigabytes(sum(layer.unpacked for layer in layers))} of venv as one layer")
    whole = hashlib.sha256()
    with zstandard.ZstdCompressor(level=LEVEL).stream_writer(target, closefd=False) as compressed:
        for layer in layers:
            left = layer.unpacked - TAR_END
            with store.path(layer.digest).open("rb") as file:
                tar = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                while left:
                    data = tar.read(min(CHUNK, left))
                    whole.update(data)
                    compressed.write(data)
                    left -= len(data)
        compressed.write(bytes(TAR_END))
    whole.update(bytes(TAR_END))
    return whole.hexdigest()


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"

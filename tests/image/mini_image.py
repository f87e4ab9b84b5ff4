"""A project with a small real image, for tests: Debian's locked base and a dozen wheels of the cpu image.

The locks, the artifacts and the command line are drydock's own; only the list of packages is short.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import docker
import pytest
import tomli_w
import zstandard

from drydock import locks
from drydock.build import Inputs
from drydock.definition import Architecture, Image
from drydock.locks import Artifact, Package
from drydock.oci import Built
from drydock.store import Store, sha256_file
from drydock.unpack import folder, unpack

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = "opt/venv/lib/python3.13/site-packages"

SOURCE_LOCKS: dict[Architecture, str] = {"amd64": "pylock.cpu-vllm.toml", "arm64": "pylock.gb200-vllm.toml"}
"""The lock of the repository from which the packages for an architecture are taken."""

PURE = (
    "antlr4-python3-runtime", "click", "distro", "iniconfig", "jmespath", "packaging", "pluggy", "pygments", "pytest",
)  # fmt: skip
"""An sdist to build (with a script in .data), one more .data/scripts, console scripts, and plain ones; pytest, for
tiers of a session."""
NATIVE = ("ninja", "numpy", "regex")
"""Extension modules, shared libraries with a RUNPATH, and an executable in .data/scripts."""
PACKAGES = (*PURE, *NATIVE, "setuptools")

DEFINITION = """
hardware = "{hardware}"
summary = "a small image for tests"
architecture = "{architecture}"
python = "3.13"
manylinux = "2_40"
default-engine = "mini"

[base]
kind = "debian"
release = 13

[accelerator]
kind = "none"

[engine.mini]
summary = "a few wheels"
distribution = "numpy"
requirements = {requirements}

[engine.mini.source-builds]
antlr4-python3-runtime = {{ build-requires = ["setuptools==80.9.0"], reason = "published as an sdist only" }}

[engine.mini.environment]
MINI = "1"
"""


def locked(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """The packages of the repository's lock for an architecture, by name."""
    data = tomllib.loads((REPOSITORY / "lock" / SOURCE_LOCKS[architecture]).read_text())
    return {package["name"]: package for package in data["packages"]}


@dataclass(frozen=True)
class Project:
    """A checkout that defines `<hardware>-mini` images; `write` adds one or changes its packages."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Project:
        (root / "images").mkdir(parents=True)
        (root / "lock").mkdir()
        for path in ("images/debian-13.toml", "lock/debian-13-amd64.toml", "lock/debian-13-arm64.toml"):
            shutil.copyfile(REPOSITORY / path, root / path)
        return cls(root)

    def copy(self, root: Path) -> Project:
        shutil.copytree(self.root, root)
        return Project(root)

    def write(self, hardware: str, architecture: Architecture, packages: Iterable[dict[str, Any]]) -> Image:
        packages = sorted(packages, key=lambda package: str(package["name"]))
        requirements = [f"{package['name']}=={package['version']}" for package in packages]
        path = self.root / "images" / hardware / "image.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            DEFINITION.format(
                hardware=hardware, architecture=architecture, requirements=json.dumps(requirements)
            )
        )
        image = self.image(f"{hardware}-mini")
        seal = {
            "image": image.name,
            "platform": locks.platform(image),
            "python": "3.13",
            "inputs": locks.sha256_json(locks.resolution_inputs(image)),
        }
        data = {
            "lock-version": "1.0",
            "created-by": "drydock",
            "requires-python": "==3.13.*",
            "environments": [locks.environment_marker(image)],
            "packages": packages,
            "tool": {"drydock": seal},
        }
        locks.write_lock(image.pylock_path, data)
        return image

    def image(self, name: str) -> Image:
        return Image.named(self.root, name)

    def packages(self, name: str) -> tuple[Package, ...]:
        return Inputs(self.image(name)).lock.packages

    def artifacts(self, name: str) -> list[Artifact]:
        return Inputs(self.image(name)).artifacts()


def setuptools_80_9(architecture: Architecture) -> dict[str, Any]:
    """Another version of setuptools than the lock's: the one that the sdist is built with."""
    (requirement,) = locked(architecture)["antlr4-python3-runtime"]["tool"]["drydock"]["build-requires"]
    return {"name": "setuptools", "version": requirement["version"], "wheels": [requirement["wheel"]]}


# Stores.


def seeded(root: Path, source: Store, artifacts: Iterable[Artifact]) -> Store:
    """A new store with nothing but artifacts, by hard link."""
    store = Store(root)
    for artifact in artifacts:
        os.link(source.path(artifact.sha256), store.path(artifact.sha256))
    return store


def twin(root: Path, source: Store) -> Store:
    """A new store with all that another one has, by hard link; change a file of it with `rewrite` only.

    But for layers that were unpacked, which no build reads.
    """
    unpacked = shutil.ignore_patterns("unpacked")
    shutil.copytree(source.root, root, symlinks=True, ignore=unpacked, copy_function=os.link)
    return Store(root)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file without changing the other names of it."""
    mode = path.stat().st_mode
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)
    path.chmod(mode)


def flipped(data: bytes, position: int | None = None) -> bytes:
    """The data with another byte in the middle, of the same size."""
    position = len(data) // 2 if position is None else position
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def forget(store: Store, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop layers and their records from a store, but those that `keep` says; returns what was dropped."""
    dropped = []
    for path in (store.root / "images").glob("*.json"):
        for layer in json.loads(path.read_text())["layers"]:
            if not keep(layer):
                store.discard(layer["digest"])
                (store.root / "layers" / f"{layer['key']}.json").unlink(missing_ok=True)
                dropped.append(layer)
    return dropped


def wrong_blobs(store: Store) -> list[str]:
    """The blobs that lie under a hash that is not their own."""
    return [path.name for path in store.blobs.iterdir() if sha256_file(path) != path.name]


def leftovers(store: Store) -> list[str]:
    """What lies in the store's `tmp`."""
    return sorted(path.name for path in store.tmp.iterdir())


# Running drydock.


def docker_engine() -> docker.DockerClient:
    """The engine that answers here. Skips where none does, or fails as CI wants."""
    try:
        engine = docker.from_env()
        engine.ping()
    except (docker.errors.DockerException, OSError) as error:
        if os.environ.get("DRYDOCK_REQUIRE_DOCKER"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")
    return engine


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line said; `document` is its one line of JSON."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        assert self.status == 0, self.stderr
        answer: dict[str, Any] = json.loads(self.stdout)
        return answer

    @property
    def made(self) -> list[str]:
        """The titles of the layers that were made, not found."""
        return [layer["title"] for layer in self.document["layers"] if layer["state"] == "made"]

    @property
    def identity(self) -> tuple[str, str]:
        return self.document["digest"], self.document["config-digest"]

    @property
    def error(self) -> str:
        """The one line of an error, after checking that it is one and the status is 2.

        Lines of progress, which begin with the step's name, may come before it.
        """
        lines = self.stderr.splitlines()
        assert "Traceback" not in self.stderr, self.stderr
        assert self.status == 2, (self.status, self.stderr)
        assert lines, "no line on standard error"
        assert lines[-1].startswith("drydock: "), self.stderr
        others = [line for line in lines[:-1] if not line.startswith(("build ", "fetch: ", "pull"))]
        assert not others, self.stderr
        return lines[-1]


def environment(store: Store | Path, **extra: str) -> dict[str, str]:
    """What a run gets: its store, and no index at all unless `extra` names one."""
    root = store.root if isinstance(store, Store) else store
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "DRYDOCK_STORE": str(root),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "UV_NO_CONFIG": "1",
        "UV_OFFLINE": "1",
        **extra,
    }


def command(*arguments: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "drydock.cli", *arguments]


def drydock(
    project: Project, store: Store | Path, *arguments: str, cwd: Path | None = None, **extra: str
) -> Outcome:
    """Run the command line to its end."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd or project.root,
        env=environment(store, **extra),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def build(
    project: Project, store: Store | Path, *options: str, name: str = "tiny-mini", **extra: str
) -> Outcome:
    return drydock(project, store, "build", name, "--json", *options, **extra)


def processes_of(store: Store) -> dict[int, str]:
    """Living processes that work on a store: its path is in their environment or command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            # `cmdline` and `environ` of a zombie are empty.
            line = (entry / "cmdline").read_bytes()
            if str(store.root).encode() in line + (entry / "environ").read_bytes():
                found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def wait_until(true: Callable[[], object], seconds: float, pause: float = 0.002) -> bool:
    """Wait for something to become true, and say whether it did."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(pause)
    return bool(true())


def end(process: subprocess.Popen[str]) -> None:
    """Kill a run and its whole session, if anything of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# Looking into images.


def layer_tar(store: Store, digest: str) -> tarfile.TarFile:
    """A layer's tar, read whole into memory."""
    data = zstandard.ZstdDecompressor().stream_reader(BytesIO(store.path(digest).read_bytes())).read()
    return tarfile.open(fileobj=BytesIO(data))


def pycs(store: Store, built: Built) -> Iterator[tuple[str, str]]:
    """Path and sha256 of every bytecode file of an image."""
    for layer in built.layers:
        with layer_tar(store, layer.digest) as tar:
            for member in tar:
                if member.name.endswith(".pyc"):
                    content = tar.extractfile(member)
                    assert content
                    yield member.name, hashlib.sha256(content.read()).hexdigest()


def unpacked(store: Store, built: Built, tree: Path) -> Path:
    """The image as one tree of files, hard links into the store's unpacked layers."""
    unpack(store, built.layers)
    tree.mkdir()
    for layer in built.layers:
        source = folder(store, layer)
        for path in source.rglob("*"):
            below = tree / path.relative_to(source)
            if below.is_dir() and not below.is_symlink() and (path.is_symlink() or not path.is_dir()):
                below.rmdir()  # as overlayfs would hide it; it fails for one that is not empty
        copy_tree(source, tree)
    return tree


def copy_tree(source: Path, target: Path) -> None:
    """A copy of a tree by hard links, into `target`, which may hold others."""
    subprocess.run(["cp", "-al", f"{source}/.", str(target)], check=True)


def edit_toml(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a TOML file's data, whatever its spelling was."""
    data = tomllib.loads(path.read_text())
    change(data)
    path.write_text(tomli_w.dumps(data))


def by_title(layers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Title -> digest of the layers in a build's JSON."""
    return {layer["title"]: layer["digest"] for layer in layers}

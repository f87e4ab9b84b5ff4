"""Killed builds, full disks, damaged files and rival builds: the next build gives the same digest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Made
from mini_image import (
    Outcome,
    Project,
    build,
    command,
    drydock,
    end,
    environment,
    flipped,
    forget,
    leftovers,
    processes_of,
    rewrite,
    seeded,
    twin,
    wait_until,
    wrong_blobs,
)

from drydock.errors import DrydockError
from drydock.locks import Artifact
from drydock.store import Store
from drydock.unpack import unpack


def base_only(layer: dict[str, Any]) -> bool:
    """Keeps the layers of debs; what is made again takes a few seconds."""
    title: str = layer["title"]
    made_again = ("python packages", "bytecode of", "manifest of")
    return not title.startswith(made_again)


@pytest.fixture
def half(warm: Store) -> Store:
    """A store in which a part of `tiny-mini` has to be made again, its compiler included."""
    assert len(forget(warm, base_only)) >= 8
    shutil.rmtree(warm.root / "toolchain")
    shutil.rmtree(warm.root / "bytecode")
    return warm


@contextlib.contextmanager
def building(project: Project, store: Store, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A build in a session of its own, which is over when the block ends."""
    process = subprocess.Popen(
        command("build", "tiny-mini", "--json", *options),
        cwd=project.root,
        env=environment(store),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        end(process)


def settle(store: Store, older_than: float = 0) -> None:
    """Make what lies in `tmp` look old, as it is when somebody comes back and builds again."""
    for path in store.tmp.iterdir():
        # The change of a file's times is itself a change, which ctime has and nobody can set.
        if time.time() - path.stat().st_ctime >= older_than:
            os.utime(path, (time.time() - 3600,) * 2)


# Killed.


def any_of(store: Store, pattern: str) -> Callable[[], bool]:
    def there() -> bool:
        try:
            return any(path.is_dir() or path.stat().st_size for path in store.tmp.glob(pattern))
        except FileNotFoundError:
            return False

    return there


def finished_layers(store: Store, count: int) -> Callable[[], bool]:
    before = set((store.root / "layers").iterdir())
    return lambda: len(set((store.root / "layers").glob("[!.]*")) - before) >= count


MOMENTS: dict[str, Callable[[Store], Callable[[], bool]]] = {
    "the compiler is being unpacked": lambda store: any_of(store, "scratch-*/tree/usr/lib"),
    "a layer is half written": lambda store: any_of(store, "blob-*"),
    "bytecode is being compiled": lambda store: any_of(store, "scratch-*/pyc.zip"),
    "three layers are finished": lambda store: finished_layers(store, 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_build(half: Store, project: Project, tiny: Made, moment: str) -> None:
    reached = MOMENTS[moment](half)
    with building(project, half) as process:
        assert wait_until(lambda: reached() or process.poll() is not None, 60)
        assert process.poll() is None, process.communicate()
        # Not its group: its workers have to notice for themselves.
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: not processes_of(half), 10, 0.05), processes_of(half)
    assert wrong_blobs(half) == []
    settle(half)
    again = build(project, half)
    assert again.identity == tiny.said.identity
    assert leftovers(half) == []
    assert wrong_blobs(half) == []
    assert build(project, half).made == []


def test_killed_worker(half: Store, project: Project, tiny: Made) -> None:
    """As by the kernel, when memory is short."""
    with building(project, half) as process:

        def workers() -> list[int]:
            return [pid for pid, line in processes_of(half).items() if "spawn_main" in line]

        assert wait_until(lambda: any_of(half, "blob-*")() and workers(), 60)
        os.kill(workers()[0], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
        assert "a build worker was killed" in Outcome(process.returncode, stdout, stderr).error
        assert wait_until(lambda: not processes_of(half), 10, 0.05), processes_of(half)
    assert wrong_blobs(half) == []
    assert build(project, half).identity == tiny.said.identity


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_build(half: Store, project: Project, tiny: Made, number: signal.Signals) -> None:
    with building(project, half) as process:
        assert wait_until(any_of(half, "blob-*"), 60)
        os.kill(process.pid, number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode in (130, 143, -signal.SIGTERM)
        assert "Traceback" not in stderr
        assert wait_until(lambda: not processes_of(half), 10, 0.05), processes_of(half)
    assert wrong_blobs(half) == []
    if number == signal.SIGINT:
        assert leftovers(half) == []
    assert build(project, half).identity == tiny.said.identity


# No room.


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes on a folder."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("needs to mount a small file system: root, and a container that lets it")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room", [100_000, 20_000_000, 36_000_000, 45_000_000])
def test_full_disk(half: Store, project: Project, tiny: Made, tmp_path: Path, room: int) -> None:
    """The disk is full at different moments: while the compiler is unpacked, while layers are written."""
    # What stays behind is not read again, so it need not take up memory here.
    needed = {artifact.sha256 for artifact in project.artifacts("tiny-mini")}
    files = [path for path in half.root.rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    assert needed <= {path.name for path in files}
    disk = tmp_path / "disk"
    with small_disk(disk, pages + room):
        shutil.copytree(half.root, disk / "store")
        store = Store(disk / "store")
        before = {path.name for path in store.blobs.iterdir()}
        line = build(project, store).error
        assert f"no space left under {store.root}" in line
        assert "set DRYDOCK_STORE" in line
        assert leftovers(store) == []
        assert before <= {path.name for path in store.blobs.iterdir()}
        assert wrong_blobs(store) == []
        subprocess.run(["mount", "-o", f"remount,size={pages + 500_000_000}", str(disk)], check=True)
        assert build(project, store).identity == tiny.said.identity
        assert leftovers(store) == []


# Damaged.

TOOLS = ("zlib1g",)
"""Here a deb of the compiler's, beside being one of the image's."""


def holds_not(name: str) -> Callable[[dict[str, Any]], bool]:
    """Keeps the layers in which a package is not."""

    def keep(layer: dict[str, Any]) -> bool:
        return not any(text.startswith(f"{name} ") for text in layer["contents"])

    return keep


def artifact(project: Project, name: str, kind: str = "") -> Artifact:
    return next(
        found for found in project.artifacts("tiny-mini") if found.name == name and kind in ("", found.kind)
    )


def folder_with(artifacts: Store, wanted: Artifact, folder: Path) -> Path:
    """A folder that has one artifact under its own file name, as a mirror for an air gap has."""
    folder.mkdir()
    artifacts.link(wanted.sha256, folder / wanted.filename)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [("click", "wheel"), ("numpy", "wheel"), ("mawk", "deb"), ("base-passwd", "deb"), ("zlib1g", "deb")],
)
def test_corrupt_artifact(
    warm: Store, project: Project, artifacts: Store, tiny: Made, tmp_path: Path, name: str, kind: str
) -> None:
    """A byte has changed: it is named and removed, and the next build fetches it anew."""
    wanted = artifact(project, name, kind)
    if name in TOOLS:
        shutil.rmtree(warm.root / "toolchain")
        forget(warm, holds_not("click"))
    else:
        forget(warm, holds_not(name))
    rewrite(warm.path(wanted.sha256), flipped)
    line = build(project, warm).error
    assert f"{wanted} was corrupt in" in line
    assert not warm.has(wanted.sha256)
    folder = str(folder_with(artifacts, wanted, tmp_path / "mirror"))
    mirrors = {"DRYDOCK_DEBIAN_MIRROR": folder, "DRYDOCK_DEBIAN_SECURITY_MIRROR": folder}
    again = build(project, warm, PIP_FIND_LINKS=folder, PIP_NO_INDEX="0", **mirrors)
    assert again.identity == tiny.said.identity
    assert wrong_blobs(warm) == []


@pytest.mark.parametrize(("name", "kind"), [("antlr4-python3-runtime", "sdist"), ("setuptools", "wheel")])
def test_corrupt_source_of_a_wheel(
    warm: Store, project: Project, artifacts: Store, tiny: Made, tmp_path: Path, name: str, kind: str
) -> None:
    """What a wheel is built from: the sdist, or a tool of its build environment."""
    (package,) = [package for package in project.packages("tiny-mini") if package.built_from]
    assert package.built_from
    forget(warm, holds_not(package.name))
    warm.discard(package.wheel.sha256)
    if kind == "sdist":
        wanted = package.built_from.sdist.artifact("sdist", package.name, package.version)
    else:
        wanted = package.built_from.build_requires[0].artifact
    assert wanted.name == name
    rewrite(warm.path(wanted.sha256), flipped)
    line = build(project, warm).error
    assert f"{wanted} was corrupt in" in line
    assert not warm.has(wanted.sha256)
    folder = str(folder_with(artifacts, wanted, tmp_path / "mirror"))
    assert build(project, warm, PIP_FIND_LINKS=folder).identity == tiny.said.identity


def test_truncated_artifact_is_fetched_anew(
    warm: Store, project: Project, artifacts: Store, tiny: Made, tmp_path: Path
) -> None:
    """Its size alone tells, so the first build already mends it."""
    wanted = artifact(project, "click")
    forget(warm, holds_not("click"))
    rewrite(warm.path(wanted.sha256), lambda data: data[:-1])
    folder = str(folder_with(artifacts, wanted, tmp_path / "mirror"))
    assert build(project, warm, PIP_FIND_LINKS=folder).identity == tiny.said.identity
    assert wrong_blobs(warm) == []


def test_corrupt_cached_bytecode_is_not_used(warm: Store, project: Project, tiny: Made) -> None:
    forget(warm, lambda layer: not layer["title"].startswith("python packages"))
    for record in (warm.root / "bytecode").iterdir():
        rewrite(warm.path(json.loads(record.read_text())["digest"]), flipped)
    assert build(project, warm).identity == tiny.said.identity
    assert wrong_blobs(warm) == []


def facts_of(store: Store, key: str) -> Path:
    record = store.read_record("layers", key)
    assert record
    return store.path(record["facts"])


@pytest.mark.parametrize("damage", ["a byte", "the end"])
def test_corrupt_facts_of_a_layer_are_not_used(
    warm: Store, project: Project, tiny: Made, damage: str
) -> None:
    """What the image's manifest says of a layer comes from a cached blob too."""
    forget(warm, lambda layer: not layer["title"].startswith("manifest of"))

    def changed(data: bytes) -> bytes:
        if damage == "the end":
            return data[: len(data) // 2]
        # The digit of some file's hash, so that it is still JSON.
        position = next(match.end() for match in re.finditer(rb"sha256=|\"record\": \"", data))
        return (
            data[:position] + (b"1" if data[position : position + 1] == b"0" else b"0") + data[position + 1 :]
        )

    debs = next(layer for layer in tiny.built.layers if "make " in " ".join(layer.contents))
    wheels = next(layer for layer in tiny.built.layers if "click" in " ".join(layer.contents))
    for layer in (debs, wheels):
        rewrite(facts_of(warm, layer.key), changed)
    again = build(project, warm)
    assert sorted(again.made) == sorted([debs.title, wheels.title, "manifest of tiny-mini"])
    assert again.identity == tiny.said.identity
    assert wrong_blobs(warm) == []


def test_truncated_layer_is_made_again(warm: Store, project: Project, tiny: Made) -> None:
    layer = next(layer for layer in tiny.built.layers if "click" in " ".join(layer.contents))
    rewrite(warm.path(layer.digest), lambda data: data[:-1])
    again = build(project, warm)
    assert again.made == [layer.title]
    assert again.identity == tiny.said.identity
    assert wrong_blobs(warm) == []


def test_corrupt_layer_is_not_unpacked(warm: Store, project: Project, tiny: Made) -> None:
    """A byte of the same size only shows when the layer is read: whoever reads it says so and removes it."""
    layer = next(layer for layer in tiny.built.layers if "click" in " ".join(layer.contents))
    rewrite(warm.path(layer.digest), flipped)
    with pytest.raises(
        DrydockError, match=r"was damaged in the store and has been removed: run `drydock build`"
    ):
        unpack(warm, [layer])
    again = build(project, warm)
    assert again.made == [layer.title]
    assert again.identity == tiny.said.identity
    unpack(warm, [layer])


def test_damaged_records_are_as_none(warm: Store, project: Project, tiny: Made) -> None:
    damaged = [layer for layer in tiny.built.layers if layer.contents][-3:]
    for layer in damaged:
        rewrite(warm.root / "layers" / f"{layer.key}.json", lambda data: data[:20])
    rewrite(warm.root / "images/tiny-mini.json", lambda _: b"")
    assert "is not built in" in drydock(project, warm, "verify", "tiny-mini").error
    again = build(project, warm)
    assert again.made == [layer.title for layer in damaged]
    assert again.identity == tiny.said.identity


# Rivals.


def test_two_builds_of_one_image_at_once(half: Store, project: Project, tiny: Made) -> None:
    with building(project, half) as one, building(project, half) as other:
        said = []
        for process in (one, other):
            stdout, stderr = process.communicate(timeout=300)
            said.append(Outcome(process.returncode, stdout, stderr))
    assert {outcome.identity for outcome in said} == {tiny.said.identity}
    assert wrong_blobs(half) == []
    assert leftovers(half) == []


def test_builds_that_begin_leave_a_running_one_s_files_alone(
    half: Store, project: Project, tiny: Made
) -> None:
    """Each build begins by sweeping `tmp`; here that is done without pause, and what has a lock looks old."""
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            # What is younger than a second may not have its lock yet: `store.SETTLED` is for that.
            with contextlib.suppress(FileNotFoundError):
                settle(half, older_than=1)
                half.sweep()
            time.sleep(0.01)

    with building(project, half) as process:
        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            over.set()
            sweeper.join()
    assert Outcome(process.returncode, stdout, stderr).identity == tiny.said.identity


def test_two_images_built_at_once_into_an_empty_store(
    project: Project, artifacts: Store, tiny: Made, far: Made, tmp_path: Path
) -> None:
    """They share pure layers, the compiler and its locks."""
    wanted = {found.sha256: found for name in ("tiny-mini", "far-mini") for found in project.artifacts(name)}
    store = seeded(tmp_path / "store", artifacts, wanted.values())
    # Without the debs' layers, which would only take time.
    for made in (tiny, far):
        for layer in made.built.layers:
            if base_only({"title": layer.title}):
                link_layer(made.store, store, layer.key)
    processes = [
        subprocess.Popen(
            command("build", name, "--json", "--jobs", "2"),
            cwd=project.root,
            env=environment(store),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in ("tiny-mini", "far-mini")
    ]
    said = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        said.append(Outcome(process.returncode, stdout, stderr))
    assert [outcome.identity for outcome in said] == [tiny.said.identity, far.said.identity]
    assert wrong_blobs(store) == []


def link_layer(source: Store, target: Store, key: str) -> None:
    record = source.read_record("layers", key)
    assert record
    for digest in (record["digest"], record["facts"]):
        source.link(digest, target.path(digest))
    target.write_record("layers", key, record)


def test_store_is_the_same_through_another_name(
    warm: Store, project: Project, tiny: Made, tmp_path: Path
) -> None:
    """A store that was moved, or is reached by a link, is still the store."""
    moved = twin(tmp_path / "moved", warm)
    (tmp_path / "link").symlink_to(moved.root)
    again = build(project, tmp_path / "link")
    assert again.made == []
    assert again.identity == tiny.said.identity

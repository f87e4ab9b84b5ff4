"""`tools/carry.py`: an image put together on a machine that holds part of its bytes already."""

from __future__ import annotations

import filecmp
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import Made
from mini_image import REPOSITORY, Project, environment

from drydock.store import Store
from drydock.unpack import folder, unpack

CARRY = REPOSITORY / "tools/carry.py"


@pytest.fixture
def machine(tiny: Made, tmp_path: Path) -> Path:
    """What a target holds: numpy's large library, and another build of the same length of its core."""
    unpack(tiny.store, tiny.built.layers)
    site = tmp_path / "machine/site-packages"
    site.mkdir(parents=True)
    for layer in tiny.built.layers:
        for path in folder(tiny.store, layer).rglob("*.so*"):
            if not path.is_symlink() and path.stat().st_size > 1 << 20:
                data = path.read_bytes()
                if "openblas" not in path.name:
                    data = data[:1000] + b"another build" + data[1013:]
                (site / path.name).write_bytes(data)
    assert {"openblas" in path.name for path in site.iterdir()} == {True, False}
    return site.parent


def carry(*arguments: object, cwd: Path, store: Store | Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(CARRY), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(store), capture_output=True, check=False)


def packed(project: Project, tiny: Made, machine: Path, out: Path, *more: str) -> list[Path]:
    have = out.parent / "have.json.gz"
    have.write_bytes(carry("probe", machine, cwd=project.root, store=tiny.store).stdout)
    arguments = ["pack", "tiny-mini", have, out, "--near", machine, "--megabytes", 20, "--level", 1, *more]
    done = carry(*arguments, cwd=project.root, store=tiny.store)
    assert done.returncode == 0, done.stderr.decode()
    return sorted(out.glob("part-*"))


def same(left: Path, right: Path) -> None:
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*"))
    assert names == sorted(str(path.relative_to(right)) for path in right.rglob("*"))
    for name in names:
        one, other = (left / name).lstat(), (right / name).lstat()
        assert (one.st_mode, one.st_uid) == (other.st_mode, other.st_uid), name
        if (left / name).is_symlink():
            assert (left / name).readlink() == (right / name).readlink()
        elif (left / name).is_file():
            # An import of bytecode does not ask for the time; a `make` in the image would.
            assert int(one.st_mtime) == int(other.st_mtime), name
            assert filecmp.cmp(left / name, right / name, shallow=False), name


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners")
def test_an_image_is_put_together_bit_for_bit(
    project: Project, tiny: Made, machine: Path, tmp_path: Path
) -> None:
    parts = packed(project, tiny, machine, tmp_path / "parts")
    assert len(parts) > 1
    store = Store(tmp_path / "there")
    done = carry("unpack", store.root, *parts, cwd=project.root, store=store)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(store.root.glob("carried/*")), "what it was made of is gone"
    for layer in tiny.built.layers:
        same(folder(tiny.store, layer), folder(store, layer))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners")
def test_layers_of_an_image_that_came_before_are_not_sent_again(
    project: Project, tiny: Made, machine: Path, tmp_path: Path
) -> None:
    first = packed(project, tiny, machine, tmp_path / "first")
    then = packed(project, tiny, machine, tmp_path / "then", "--after", "tiny-mini")
    assert sum(path.stat().st_size for path in then) < 1 << 20
    store = Store(tmp_path / "there")
    for parts in (first, then):
        done = carry("unpack", store.root, *parts, cwd=project.root, store=store)
        assert done.returncode == 0, done.stderr.decode()
    for layer in tiny.built.layers:
        same(folder(tiny.store, layer), folder(store, layer))


def test_a_machine_that_changed_and_a_cut_part_are_named(
    project: Project, tiny: Made, machine: Path, tmp_path: Path
) -> None:
    parts = packed(project, tiny, machine, tmp_path / "parts")
    changed = next(machine.rglob("*openblas*"))
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    done = carry("unpack", tmp_path / "there", *parts, cwd=project.root, store=tmp_path / "there")
    assert done.returncode == 1
    assert f"does not come out of {changed}" in done.stderr.decode()
    parts[-1].write_bytes(parts[-1].read_bytes()[:-10])
    shutil.rmtree(tmp_path / "there")
    done = carry("unpack", tmp_path / "there", *parts, cwd=project.root, store=tmp_path / "there")
    assert done.returncode == 1
    assert "a part is missing or cut off" in done.stderr.decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners")
def test_parts_are_put_together_as_they_come(
    project: Project, tiny: Made, machine: Path, tmp_path: Path
) -> None:
    parts = packed(project, tiny, machine, tmp_path / "parts")
    store = Store(tmp_path / "there")
    come = [tmp_path / "come" / part.name for part in parts]
    come[0].parent.mkdir()
    command = [sys.executable, str(CARRY), "unpack", str(store.root), *map(str, come), "--wait", "30"]
    process = subprocess.Popen(command, cwd=project.root, env=environment(store), stderr=subprocess.PIPE)
    try:
        for part, place in zip(parts, come, strict=True):
            time.sleep(0.5)
            assert process.poll() is None
            part.rename(place)
        assert process.wait(60) == 0, process.stderr and process.stderr.read().decode()
    finally:
        process.kill()
        process.communicate()
    for layer in tiny.built.layers:
        same(folder(tiny.store, layer), folder(store, layer))


def test_a_part_that_does_not_come_is_named(
    project: Project, tiny: Made, machine: Path, tmp_path: Path
) -> None:
    first, *_ = packed(project, tiny, machine, tmp_path / "parts")
    there = tmp_path / "there"
    missing = first.with_name("part-999")
    done = carry("unpack", there, first, missing, "--wait", "0.3", cwd=project.root, store=there)
    assert (done.returncode, done.stderr.decode()) == (1, f"carry: {missing} is not there: send it\n")


def pack_tools(archive: Path, root: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """For this Python and machine, and with the user's own index, as whoever packs it has."""
    version, machine = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine()
    target = ("--python", version, "--platform", f"{machine}-manylinux_2_28")
    command = [sys.executable, root / "tools/carry.py", "tools", archive, *target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_drydock_needs_there_is_held_to_the_hashes_of_its_lock(tmp_path: Path) -> None:
    for name in ("tools", "lock", "src"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    lock = tmp_path / "lock/drydock.txt"
    text, found = re.subn(
        r"(?m)^idna==.*(\n +--hash=.*)+",
        lambda entry: re.sub(r"sha256:\w+", f"sha256:{'0' * 64}", entry[0]),
        lock.read_text(),
    )
    assert found == 1
    lock.write_text(text)
    done = pack_tools(tmp_path / "tools.tar.gz", tmp_path)
    assert done.returncode == 1
    assert "Hash mismatch" in done.stderr
    assert "idna" in done.stderr
    assert not (tmp_path / "tools.tar.gz").exists()


def test_what_is_packed_of_drydock_s_own_needs_is_all_that_a_session_imports(tmp_path: Path) -> None:
    archive, site = tmp_path / "tools.tar.gz", tmp_path / "site"
    done = pack_tools(archive)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        tar.extractall(site, filter="data")
    modules = "session, publish, vendor, chroot_runtime, report, verify"
    code = f"import sys; sys.path[:0] = sys.argv[1:]; from drydock import {modules}"
    # Without this Python's own site-packages.
    bare = [sys.executable, "-I", "-S", "-c", code, str(site), str(REPOSITORY / "src")]
    done = subprocess.run(bare, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()

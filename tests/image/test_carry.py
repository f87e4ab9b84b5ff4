"""`tools/carry.py`: an image put together on a machine that holds part of its bytes already."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
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

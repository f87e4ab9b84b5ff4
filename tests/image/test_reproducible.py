"""The same locks give the same bytes, whatever machine, folder, time, umask, order or Python builds them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

import pytest
from conftest import Made
from mini_image import (
    PACKAGES,
    REPOSITORY,
    SITE,
    Outcome,
    Project,
    build,
    by_title,
    command,
    edit_toml,
    environment,
    forget,
    leftovers,
    locked,
    seeded,
    setuptools_80_9,
    twin,
    wrong_blobs,
)

from drydock.build import Inputs
from drydock.bytecode import Compiler, unpack_toolchain
from drydock.definition import Architecture
from drydock.layer import open_layer
from drydock.plan import WHEEL_BUCKETS, bucket
from drydock.store import Store
from drydock.wheels import python_sources


def run(process: subprocess.Popen[str]) -> Outcome:
    stdout, stderr = process.communicate(timeout=300)
    return Outcome(process.returncode, stdout, stderr)


# Two builds.


def test_two_builds_from_nothing_are_byte_identical(
    tiny: Made, project: Project, artifacts: Store, tmp_path: Path
) -> None:
    """The other build runs in another folder, umask, time zone, language, hash seed and number of jobs."""
    elsewhere = project.copy(tmp_path / "a folder, élsewhere")
    (elsewhere.root / "deep").mkdir()
    store = seeded(tmp_path / "second store", artifacts, reversed(elsewhere.artifacts("tiny-mini")))
    second = run(
        subprocess.Popen(
            command("build", "tiny", "--json", "--jobs", "1"),
            cwd=elsewhere.root / "deep",
            env=environment(
                store, TZ="Pacific/Kiritimati", LANG="tr_TR.UTF-8", PYTHONHASHSEED="7", HOME=str(tmp_path)
            ),
            umask=0o077,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    assert second.identity == tiny.said.identity
    assert len(second.made) == len(tiny.said.made) == len(tiny.built.layers)
    # Artifacts, layers, facts, config and manifest. (The zips of cached bytecode hold times.)
    assert blobs(store) == blobs(tiny.store)
    for one in (store, tiny.store):
        assert wrong_blobs(one) == []
        assert leftovers(one) == []


def blobs(store: Store) -> set[str]:
    bytecode = {json.loads(path.read_text())["digest"] for path in (store.root / "bytecode").iterdir()}
    return {path.name for path in store.blobs.iterdir()} - bytecode


def other_python() -> str | None:
    """An interpreter of another series than the one that runs the tests."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in (13, 12, 14, 11):
        if minor == sys.version_info.minor:
            continue
        found = shutil.which(f"python3.{minor}")
        candidates = [
            *([found] if found else []),
            *(str(path) for path in pyenv.glob(f"3.{minor}.*/bin/python")),
        ]
        for candidate in candidates:
            asked = subprocess.run(
                [candidate, "-c", "import sys; print(sys.version_info.minor)"],
                capture_output=True,
                text=True,
                check=False,
            )
            if asked.stdout.strip() == str(minor):
                return candidate
    return None


def test_another_python_builds_the_same(tiny: Made, project: Project, tmp_path: Path) -> None:
    """Every layer made again by another Python with its own zlib, tarfile and zipfile.

    Debian's own layers that only copy are the same code in every Python, and are left to the largest bucket.
    """
    python = other_python()
    if python is None:
        pytest.skip("needs a second Python on this machine")
    venv = tmp_path / "venv"
    ours = [
        f"{found.name}=={found.version}"
        for found in distributions()
        if found.name not in ("drydock", "pip")
        and "direct_url.json" not in {path.name for path in found.files or ()}
    ]
    uv = [sys.executable, "-m", "uv"]
    for step in (
        [*uv, "venv", "--quiet", "--python", python, str(venv)],
        [*uv, "pip", "install", "--quiet", "--no-deps", "--python", str(venv / "bin/python"), *ours],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no environment for {python}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    store = twin(tmp_path / "store", tiny.store)
    kept = (
        "debian packages, bucket 0",
        "debian packages, bucket 1",
        "debian packages, bucket 2",
        "g++",
        "gcc",
        "cpp",
    )
    dropped = forget(store, lambda layer: layer["title"].startswith(kept))
    shutil.rmtree(store.root / "bytecode")
    third = run(
        subprocess.Popen(
            command("build", "tiny", "--json", python=str(venv / "bin/python")),
            cwd=project.root,
            env=environment(store),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    assert third.identity == tiny.said.identity
    assert sorted(third.made) == sorted(layer["title"] for layer in dropped)
    assert len(third.made) > len(PACKAGES) / 2


def test_golden_layer(tmp_path: Path) -> None:
    """A layer of every kind of entry has the digests it had when this was written.

    It differs with another zstd, whose version drydock's own lock pins, or with another tar.
    """
    with open_layer(Store(tmp_path)) as (layer, written):
        layer.folder("tmp", 0o1777)
        layer.file("etc/motd", b"hello\n")
        layer.file("usr/bin/tool", b"#!/bin/sh\n" * 1000, mode=0o755)
        layer.symlink("usr/bin/link", "tool")
        layer.hardlink("usr/bin/again", "usr/bin/tool")
        layer.file(f"srv/{'long/' * 40}name", b"")
        layer.symlink("srv/far", "x" * 150)
        layer.file("srv/Ünïcödé-名前", b"\0" * 5000, uid=1000, gid=1000)
        layer.file("srv/not-\udcff-utf8", b"1")
    assert written.unpacked == GOLDEN["unpacked"]
    assert written.diff_id == GOLDEN["diff-id"]
    assert written.digest == GOLDEN["digest"]
    assert hashlib.sha256(Store(tmp_path).path(written.digest).read_bytes()).hexdigest() == written.digest


GOLDEN = {
    "unpacked": 68_096,
    "diff-id": "4c94c9489ca735215b65db961c04e889d8b2741b3f0a8b5183f858c04784cd2e",
    "digest": "ed102b8940d59ed02b427608fd4a5f6bb52e2b24c0ae2d022eb3da1fcf19c713",
}


# What is made again.


def test_nothing_changed_makes_nothing(warm: Store, project: Project, tiny: Made) -> None:
    again = build(project, warm)
    assert again.made == []
    assert again.identity == tiny.said.identity


def test_environment_and_labels_change_no_layer_but_the_manifest_s(
    warm: Store, project: Project, tiny: Made, tmp_path: Path
) -> None:
    own = project.copy(tmp_path / "checkout")
    path = own.root / "images/tiny/image.toml"
    path.write_text(path.read_text().replace('MINI = "1"', 'MINI = "2"'))
    again = build(own, warm)
    assert again.made == ["manifest of tiny-mini"]
    assert again.identity != tiny.said.identity


def test_another_engine_beside_it_and_comments_change_nothing(
    warm: Store, project: Project, tiny: Made, tmp_path: Path
) -> None:
    """What an image carries of its hardware's definition is its own part."""
    own = project.copy(tmp_path / "checkout")
    path = own.root / "images/tiny/image.toml"
    edit_toml(path, lambda data: data["engine"].update(other=data["engine"]["mini"] | {"summary": "Another"}))
    text = path.read_text().replace('default-engine = "mini"', 'default-engine = "other"')
    path.write_text(f"# A comment.\n{text}")
    again = build(own, warm)
    assert again.made == []
    assert again.identity == tiny.said.identity
    edit_toml(path, lambda data: data["engine"]["mini"].update(summary="Another"))
    assert build(own, warm).made == ["manifest of tiny-mini"]


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {title for title in before.keys() | after.keys() if before.get(title) != after.get(title)}


def test_bumping_a_package_makes_its_bucket_and_the_manifest(
    warm: Store, project: Project, tiny: Made, tmp_path: Path, architecture: Architecture
) -> None:
    own = project.copy(tmp_path / "checkout")
    packages = {name: locked(architecture)[name] for name in PACKAGES} | {
        "setuptools": setuptools_80_9(architecture)
    }
    own.write("tiny", architecture, packages.values())
    bumped = build(own, warm)
    bucket_of_it = f"python packages, bucket {bucket('setuptools', WHEEL_BUCKETS)} of {WHEEL_BUCKETS}"
    assert bumped.made == [bucket_of_it, "manifest of tiny-mini"]
    before, after = by_title(tiny.said.document["layers"]), by_title(bumped.document["layers"])
    assert changed(before, after) == set(bumped.made)
    # And back: nothing is made that was made before.
    assert build(project, warm).made == []
    assert build(project, warm).identity == tiny.said.identity


@pytest.mark.parametrize("name", ["six", "idna"])
def test_adding_a_package_makes_its_bucket_and_the_manifest(
    warm: Store,
    project: Project,
    artifacts: Store,
    tiny: Made,
    tmp_path: Path,
    architecture: Architecture,
    name: str,
) -> None:
    """six joins a bucket that others are in; idna's is a new layer."""
    own = project.copy(tmp_path / "checkout")
    package = locked(architecture)[name]
    digest = package["wheels"][0]["hashes"]["sha256"]
    artifacts.link(digest, warm.path(digest))
    own.write("tiny", architecture, [*(locked(architecture)[other] for other in PACKAGES), package])
    added = build(own, warm)
    bucket_of_it = f"python packages, bucket {bucket(name, WHEEL_BUCKETS)} of {WHEEL_BUCKETS}"
    assert added.made == [bucket_of_it, "manifest of tiny-mini"]
    before, after = by_title(tiny.said.document["layers"]), by_title(added.document["layers"])
    assert changed(before, after) == set(added.made)
    assert (bucket_of_it in before) == (name == "six")


# Bytecode.


def test_bytecode_does_not_depend_on_order_or_company(tiny: Made, project: Project, tmp_path: Path) -> None:
    inputs = Inputs(project.image("tiny-mini"))
    compiler = Compiler(unpack_toolchain(tiny.store, inputs.tools), inputs.tools.series)
    (wheel,) = [package.wheel for package in inputs.lock.packages if package.name == "setuptools"]
    path = tiny.store.path(wheel.sha256)

    def compiled(sources: Mapping[str, str]) -> dict[str, bytes]:
        output = tmp_path / "pyc.zip"
        compiler.compile(path, sources, output)
        with zipfile.ZipFile(output) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    with zipfile.ZipFile(path) as archive:
        sources = python_sources(archive, "3.13")
    try:
        together = compiled(sources)
        assert compiled(dict(reversed(list(sources.items())))) == together
        for member in list(sources)[::10]:
            alone = compiled({member: sources[member]})
            assert alone == {sources[member]: together[sources[member]]}
    finally:
        compiler.close()
    assert len(together) == len(sources) > 200


def test_bytecode_is_of_the_source_beside_it(tree: Path, tiny: Made, project: Project) -> None:
    """The image's own Python compiles each source and finds the code that the image ships."""
    inputs = Inputs(project.image("tiny-mini"))
    folder = unpack_toolchain(tiny.store, inputs.tools)
    code = (
        "import sys, marshal, pathlib, importlib.util as u\n"
        "count = 0\n"
        "for line in sys.stdin:\n"
        "    root, path = line.rstrip('\\n').split('\\t')\n"
        "    source = pathlib.Path(root, path).read_bytes()\n"
        "    pyc = pathlib.Path(u.cache_from_source(root + '/' + path)).read_bytes()\n"
        "    assert pyc[:4] == u.MAGIC_NUMBER and pyc[8:16] == u.source_hash(source), path\n"
        "    wanted = compile(source, '/' + path, 'exec', dont_inherit=True, optimize=0)\n"
        "    assert marshal.loads(pyc[16:]) == wanted, path\n"
        "    assert marshal.loads(pyc[16:]).co_filename == '/' + path, path\n"
        "    count += 1\n"
        "print(count)\n"
    )
    (loader,) = (folder / "usr").glob("lib*/ld-linux-*")
    (libraries,) = (folder / "usr/lib").glob("*-linux-gnu")
    sources = [str(path.relative_to(tree)) for path in (tree / SITE).rglob("*.py")]
    said = subprocess.run(
        [
            loader,
            "--library-path",
            libraries,
            folder / "usr/bin/python3.13",
            "-W",
            "ignore",
            "-S",
            "-B",
            "-c",
            code,
        ],
        input="".join(f"{tree}\t{path}\n" for path in sources),
        env={"PYTHONHOME": str(folder / "usr"), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) == len(sources) > 800


def test_no_path_of_this_machine_is_in_the_image(tree: Path) -> None:
    names = [str(REPOSITORY), str(tree)]
    for path in (tree / "opt/venv").rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            assert not any(name.encode() in data for name in names), path

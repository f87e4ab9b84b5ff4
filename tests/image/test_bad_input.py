"""Wrong definitions, locks, indexes and machines: one line that says what to do, exit status 2."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Made
from mini_image import Project, build, drydock, edit_toml, seeded, twin

from drydock.store import Store

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def empty(tmp_path: Path) -> Store:
    return Store(tmp_path / "empty")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, kept from others by a socket that is bound and does not listen."""
    with closing(socket.socket()) as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


# Names.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere-mini", "unknown image 'nowhere-mini': there are far-mini, tiny-mini"),
        ("tiny-sglang", "unknown image 'tiny-sglang': tiny has the engine(s) mini"),
        ("", "unknown image '': there are far-mini, tiny-mini"),
    ],
)
@pytest.mark.parametrize("arguments", [("build",), ("fetch",), ("lock", "--check"), ("verify",)])
def test_unknown_image(
    project: Project, empty: Store, arguments: tuple[str, ...], name: str, expected: str
) -> None:
    assert expected in drydock(project, empty, *arguments, name).error


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "tiny-mini", "--", "true"),
        ("verify", "tiny-mini"),
    ],
)
def test_image_that_is_not_built(project: Project, empty: Store, arguments: tuple[str, ...]) -> None:
    assert "tiny-mini is not built in" in drydock(project, empty, *arguments).error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("build",), "IMAGE"),
        (("bild", "tiny-mini"), "bild"),
        (("build", "tiny-mini", "--job", "2"), "--job"),
        (("build", "tiny-mini", "--jobs", "0"), "--jobs"),
        (("build", "tiny-mini", "--jobs", "many"), "--jobs"),
        (("run", "tiny-mini", "--runtime", "podman", "--", "true"), "unknown runtime 'podman'"),
        (("run", "tiny-mini", "--user", "nobody", "--", "true"), "unknown user 'nobody'"),
        (("run", "tiny-mini", "--env", "NAME", "--", "true"), "--env 'NAME' is not NAME=VALUE"),
    ],
)
def test_wrong_usage(project: Project, tiny: Made, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in drydock(project, tiny.store, *arguments).error


# Definitions.


@pytest.mark.parametrize(
    ("change", "key", "what"),
    [
        (lambda data: data.update(colour="red"), "colour", "unknown key"),
        (lambda data: data.pop("python"), "python", "required, and not there"),
        (lambda data: data.update(python=3.13), "python", "should be a valid string"),
        (lambda data: data.update(architecture="ppc64"), "architecture", "should be 'amd64' or 'arm64'"),
        (lambda data: data["base"].update(release="thirteen"), "base.release", "should be a valid integer"),
        (
            lambda data: data["engine"]["mini"].update(requirements=["numpy=2"]),
            "engine.mini.requirements.0",
            "is not a requirement",
        ),
        (lambda data: data["engine"]["mini"].update(override={}), "engine.mini.override", "unknown key"),
        (
            lambda data: data["engine"]["mini"].update(overrides={"numpy": {"version": "2", "reason": ""}}),
            "engine.mini.overrides.numpy.reason",
            "at least 10 characters",
        ),
        (lambda data: data.update({"default-engine": "maxi"}), "default-engine", "unknown engine 'maxi'"),
        (lambda data: data.update(hardware="huge"), "hardware", "in the folder 'tiny'"),
        (lambda data: data["accelerator"].update(kind="cuda"), "accelerator", "needs minimum-driver and sm"),
        (lambda data: data["base"].update(release=99), "base.release", "there is no images/debian-99.toml"),
    ],
)
def test_wrong_definition_names_file_and_key(
    own: Project, empty: Store, change: Change, key: str, what: str
) -> None:
    edit_toml(own.root / "images/tiny/image.toml", change)
    line = build(own, empty).error
    assert re.search(rf"images/tiny/image\.toml: {re.escape(key)}: ", line), line
    assert what in line


def test_definition_that_is_not_toml(own: Project, empty: Store) -> None:
    (own.root / "images/tiny/image.toml").write_text("hardware = \n")
    line = build(own, empty).error
    assert "images/tiny/image.toml is not TOML" in line
    assert "line 1" in line


# Locks.


def test_lock_out_of_date_with_its_definition(own: Project, empty: Store) -> None:
    edit_toml(
        own.root / "images/tiny/image.toml", lambda data: data["engine"]["mini"]["requirements"].append("six")
    )
    line = build(own, empty).error
    assert "pylock.tiny-mini.toml is out of date with images/tiny/image.toml" in line
    assert "drydock lock tiny-mini" in line


def test_base_lock_out_of_date_with_its_request(own: Project, empty: Store) -> None:
    edit_toml(
        own.root / "images/debian-13.toml", lambda data: data["packages"].update(vim="an editor for all")
    )
    assert "out of date with images/debian-13.toml: run `drydock lock --base`" in build(own, empty).error


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["packages"][0]["wheels"][0]["hashes"].update(sha256="0" * 64),
        lambda data: data["packages"][0].update(version="9.9"),
        lambda data: data["packages"].pop(),
    ],
)
def test_lock_edited_by_hand(own: Project, empty: Store, change: Change) -> None:
    edit_toml(own.root / "lock/pylock.tiny-mini.toml", change)
    line = build(own, empty).error
    assert "pylock.tiny-mini.toml was edited by hand" in line
    checked = drydock(own, empty, "lock", "--check", "tiny-mini")
    assert checked.status == 1
    assert "was edited by hand" in checked.stdout


def test_base_lock_edited_by_hand(own: Project, empty: Store, tiny: Made) -> None:
    path = own.root / f"lock/debian-13-{tiny.built.architecture}.toml"
    edit_toml(path, lambda data: data["packages"].pop())
    assert f"{path.name} was edited by hand" in build(own, empty).error


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data["packages"][0].pop("wheels"), "packages.0.wheels: Field required"),
        (lambda data: data["packages"][0]["wheels"][0].update(size="big"), "packages.0.wheels.0.size"),
        (lambda data: data.pop("tool"), "tool: Field required"),
    ],
)
def test_malformed_lock(own: Project, empty: Store, change: Change, expected: str) -> None:
    edit_toml(own.root / "lock/pylock.tiny-mini.toml", change)
    assert expected in build(own, empty).error


def test_missing_lock(own: Project, empty: Store) -> None:
    (own.root / "lock/pylock.tiny-mini.toml").unlink()
    assert "pylock.tiny-mini.toml is missing: run `drydock lock tiny-mini`" in build(own, empty).error


def test_lock_that_is_not_toml(own: Project, empty: Store) -> None:
    path = own.root / "lock/pylock.tiny-mini.toml"
    path.write_text(path.read_text()[:-20])
    assert "pylock.tiny-mini.toml is not TOML" in build(own, empty).error


def test_lock_for_another_platform(own: Project, empty: Store) -> None:
    """Sealed and in date, but with the other architecture's wheels."""
    own.write("tiny", own.image("tiny-mini").definition.architecture, own_packages(own, "far"))
    line = build(own, empty).error
    assert "does not fit the image's platform" in line
    assert "numpy" in line


def own_packages(project: Project, hardware: str) -> list[dict[str, Any]]:
    lock = tomllib.loads(project.image(f"{hardware}-mini").pylock_path.read_text())
    packages: list[dict[str, Any]] = lock["packages"]
    return packages


# The machine.


def test_no_checkout(tmp_path: Path, project: Project, tiny: Made) -> None:
    """Outside of a checkout drydock's own is meant, which defines no tiny-mini."""
    assert (
        "unknown image 'tiny-mini'" in drydock(project, tiny.store, "build", "tiny-mini", cwd=tmp_path).error
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "tiny-mini", "--load"),
        ("run", "tiny-mini", "--runtime", "docker", "--", "true"),
        ("verify", "tiny-mini", "--runtime", "docker"),
    ],
)
def test_no_docker(project: Project, tiny: Made, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    line = drydock(project, tiny.store, *arguments, DOCKER_HOST=f"unix://{tmp_path}/none.sock").error
    assert "no Docker engine answers" in line
    assert "--runtime chroot" in line


def one_wheel_short(artifacts: Store, project: Project, root: Path) -> Store:
    store = seeded(root, artifacts, project.artifacts("tiny-mini"))
    (click,) = [artifact for artifact in project.artifacts("tiny-mini") if artifact.name == "click"]
    store.discard(click.sha256)
    return store


def test_no_network(project: Project, artifacts: Store, tmp_path: Path, closed_port: int) -> None:
    store = one_wheel_short(artifacts, project, tmp_path / "store")
    index = {"DRYDOCK_INDEX_URL": f"http://127.0.0.1:{closed_port}/simple/", "UV_OFFLINE": "0"}
    line = build(project, store, **index).error
    assert re.search(rf"click \S+ \(click-\S+\.whl\) cannot be fetched: 127\.0\.0\.1:{closed_port} ", line), (
        line
    )
    assert "check the network and the proxy" in line


def test_index_without_the_artifact(project: Project, artifacts: Store, tmp_path: Path) -> None:
    store = one_wheel_short(artifacts, project, tmp_path / "store")
    index = tmp_path / "index"
    (index / "click").mkdir(parents=True)
    (index / "click/index.html").write_text(
        '<a href="click-1.0-py3-none-any.whl">click-1.0-py3-none-any.whl</a>'
    )
    line = build(project, store, DRYDOCK_INDEX_URL=str(index)).error
    assert re.search(r"click \S+ \(click-\S+\.whl\) is not (in|on) ", line), line
    assert "configure an index that has it" in line


def test_index_with_other_bytes(project: Project, artifacts: Store, tmp_path: Path) -> None:
    store = one_wheel_short(artifacts, project, tmp_path / "store")
    (click,) = [artifact for artifact in project.artifacts("tiny-mini") if artifact.name == "click"]
    links = tmp_path / "links"
    links.mkdir()
    data = artifacts.path(click.sha256).read_bytes()
    (links / click.filename).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    line = build(project, store, PIP_FIND_LINKS=str(links)).error
    assert f"({click.filename}) is refused" in line
    assert click.sha256 in line
    assert not store.has(click.sha256)


def test_mirror_without_a_deb(project: Project, artifacts: Store, tmp_path: Path) -> None:
    store = seeded(tmp_path / "store", artifacts, project.artifacts("tiny-mini"))
    deb = next(artifact for artifact in project.artifacts("tiny-mini") if artifact.name == "mawk")
    store.discard(deb.sha256)
    (tmp_path / "mirror").mkdir()
    line = build(project, store, DRYDOCK_DEBIAN_MIRROR=str(tmp_path / "mirror")).error
    assert deb.filename in line
    assert "set DRYDOCK_DEBIAN_MIRROR" in line


def read_only(folder: Path) -> bool:
    """Mount a read-only file system on a folder, as root; others take the write permission away."""
    if os.geteuid() == 0:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=False)
        return done.returncode == 0
    folder.chmod(0o555)
    return True


def test_store_on_a_read_only_folder(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir()
    if not read_only(folder):
        pytest.skip("this container may not mount")
    try:
        line = build(project, folder / "store").error
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)
        folder.chmod(0o755)
    assert "cannot write under" in line
    assert "set DRYDOCK_STORE" in line


def test_store_below_a_file(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set DRYDOCK_STORE" in build(project, tmp_path / "file" / "store").error


def test_image_without_what_the_tiers_use(own: Project, tiny: Made) -> None:
    """A new hardware may begin without a trainer: it is said, and the matrix has a dash for it."""
    for folder in ("tests/trainer", "docs"):
        (own.root / folder).mkdir(parents=True)
    (own.root / "tests/trainer/test_one.py").write_text("import verl\n")
    said = drydock(own, tiny.store, "matrix")
    assert said.status == 0, said.stderr
    (row,) = [line for line in said.stdout.splitlines() if line.startswith("| `tiny-mini` | numpy")]
    assert re.match(r"\| `tiny-mini` \| numpy \S+ \| - \| - \| - \| - \| - \| - \| 3.13.5 \|", row), row
    line = drydock(own, tiny.store, "contract", "tiny-mini").error
    assert "tests/trainer/test_one.py:1 uses verl, which the image does not have" in line


# Output.


def test_output_into_a_foreign_folder(project: Project, tiny: Made, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("")
    line = build(project, tiny.store, "--output", str(tmp_path / "photos")).error
    assert "photos is not empty and not an OCI layout" in line
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["one.jpg"]


def test_output_onto_a_file(project: Project, tiny: Made, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    assert "notes" in build(project, tiny.store, "--output", str(tmp_path / "notes")).error
    assert (tmp_path / "notes").read_text() == "mine"


def test_output_archive_below_a_file(project: Project, tiny: Made, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    assert "notes" in build(project, tiny.store, "--output", str(tmp_path / "notes/image.tar")).error


def test_recorded_digests_that_are_not_toml(own: Project, tiny: Made, tmp_path: Path) -> None:
    (own.root / "lock/images.toml").write_text("[tiny-mini\n")
    store = twin(tmp_path / "store", tiny.store)
    assert "images.toml is not TOML" in build(own, store).error


def test_a_build_is_checked_against_what_is_recorded(own: Project, tiny: Made, tmp_path: Path) -> None:
    store = twin(tmp_path / "store", tiny.store)
    outcome = build(own, store, "--check")
    assert outcome.status == 1
    assert "tiny-mini is not recorded in lock/images.toml" in outcome.stderr
    assert build(own, store, "--record").status == build(own, store, "--check").status == 0
    path = own.root / "lock/images.toml"
    digest = tomllib.loads(path.read_text())["tiny-mini"]["digest"]
    path.write_text(path.read_text().replace(digest, f"sha256:{'0' * 64}"))
    outcome = build(own, store, "--check")
    assert outcome.status == 1
    assert "tiny-mini is different in lock/images.toml" in outcome.stderr

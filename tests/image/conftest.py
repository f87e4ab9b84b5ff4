"""Session fixtures: the project, its artifacts, and the image built once into a store of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mini_image
import pytest
from mini_image import PACKAGES, PURE, Outcome, Project, locked

from drydock.bytecode import builder_architecture
from drydock.definition import Architecture
from drydock.fetch import fetch
from drydock.indexes import debian_mirrors, read_indexes
from drydock.locks import Artifact
from drydock.oci import Built, read_image
from drydock.store import Store


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    """This machine's."""
    return builder_architecture()


@pytest.fixture(scope="session")
def other_architecture(architecture: Architecture) -> Architecture:
    return "arm64" if architecture == "amd64" else "amd64"


@pytest.fixture(scope="session")
def project(
    tmp_path_factory: pytest.TempPathFactory, architecture: Architecture, other_architecture: Architecture
) -> Project:
    """`tiny-mini` for this machine and `far-mini` for the other architecture."""
    project = Project.make(tmp_path_factory.mktemp("project") / "checkout")
    project.write("tiny", architecture, [locked(architecture)[name] for name in PACKAGES])
    project.write("far", other_architecture, [locked(other_architecture)[name] for name in (*PURE, "numpy")])
    return project


@pytest.fixture(scope="session")
def artifacts(
    project: Project, tmp_path_factory: pytest.TempPathFactory, architecture: Architecture
) -> Store:
    """A store that holds every artifact of the project, and what the tests add to its images."""
    wanted = [*project.artifacts("tiny-mini"), *project.artifacts("far-mini")]
    for name in ("six", "idna"):
        package = locked(architecture)[name]
        file = package["wheels"][0]
        wanted.append(
            Artifact(
                kind="wheel",
                name=name,
                version=package["version"],
                filename=file["path"].rpartition("/")[2],
                sha256=file["hashes"]["sha256"],
                size=file["size"],
            )
        )
    store = Store(tmp_path_factory.mktemp("artifacts"))
    _have(store, wanted)
    return store


def _have(store: Store, wanted: Iterable[Artifact]) -> None:
    """Take artifacts from this user's store, or fetch them as this user's configuration says."""
    users = Path(os.environ.get("DRYDOCK_STORE") or mini_image.REPOSITORY / ".drydock")
    missing = []
    for artifact in wanted:
        source = users / "blobs" / "sha256" / artifact.sha256
        if source.is_file() and source.stat().st_size == artifact.size:
            if not store.has(artifact.sha256):
                _link_or_copy(source, store.path(artifact.sha256))
        else:
            missing.append(artifact)
    if missing:
        debs = any(artifact.kind == "deb" for artifact in missing)
        fetch(store, missing, read_indexes(os.environ), debian_mirrors(os.environ) if debs else {})


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


@dataclass(frozen=True)
class Made:
    """A finished build: its store, what it is, and what the command line said of it."""

    store: Store
    built: Built
    said: Outcome


def _made(project: Project, root: Path, artifacts: Store, name: str) -> Made:
    store = mini_image.seeded(root, artifacts, project.artifacts(name))
    said = mini_image.build(project, store, name=name)
    assert said.status == 0, said.stderr
    return Made(store, read_image(store, name), said)


@pytest.fixture(scope="session")
def tiny(project: Project, artifacts: Store, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`tiny-mini`, built from an empty layer cache. Its store is for all tests: change a `twin` of it."""
    return _made(project, tmp_path_factory.mktemp("tiny") / "store", artifacts, "tiny-mini")


@pytest.fixture(scope="session")
def far(project: Project, artifacts: Store, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`far-mini`, the other architecture's image, built on this machine."""
    return _made(project, tmp_path_factory.mktemp("far") / "store", artifacts, "far-mini")


@pytest.fixture(scope="session")
def tree(tiny: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny-mini` as one tree of files. It is for all tests: change a copy of it."""
    return mini_image.unpacked(tiny.store, tiny.built, tmp_path_factory.mktemp("tree") / "root")


@pytest.fixture
def warm(tiny: Made, tmp_path: Path) -> Store:
    """A store in which `tiny-mini` is built, for one test to harm."""
    return mini_image.twin(tmp_path / "warm", tiny.store)


@pytest.fixture
def own(project: Project, tmp_path: Path) -> Project:
    """A checkout for one test to harm."""
    return project.copy(tmp_path / "checkout")

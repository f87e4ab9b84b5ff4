"""An image over somebody else's, which is drydock's own base with a foreign layer, through a registry on loopback."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import docker
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from mini_image import (
    REPOSITORY,
    SITE,
    Outcome,
    Project,
    build,
    docker_engine,
    drydock,
    locked,
    seeded,
    unpacked,
)

sys.path.insert(0, str(REPOSITORY / "tests/unit"))

from debian_registry import debian_registry
from project import VENDOR_DEFINITION
from registry_server import RegistryServer

from drydock import locks
from drydock.definition import Architecture, Image
from drydock.oci import Built, Layer, canonical, manifest_document, read_image
from drydock.publish import push
from drydock.registry import Registry
from drydock.runtime import runs
from drydock.store import Store
from drydock.vendor import GZIP, read_vendor_lock
from drydock.verify import verify

PLACE = "usr/local/lib/python3.13/dist-packages"
NAME = "vendor/release"


@dataclass(frozen=True)
class Over:
    """An image over a vendor's: its checkout, the store it is built in, and the registry that has its base."""

    project: Project
    image: Image
    store: Store
    host: str
    vendor: Built

    def drydock(self, *arguments: str, store: Store | None = None) -> Outcome:
        registry = {"DRYDOCK_REGISTRY": self.host, "DRYDOCK_BASE_REGISTRY": self.host}
        return drydock(self.project, store or self.store, *arguments, **registry)


def foreign_layer(store: Store, wheel: Path) -> Layer:
    """A layer as others write them: gzip, a distribution where Debian's Python looks, and files that remove others."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive, zipfile.ZipFile(wheel) as files:
        for folder in ("usr", "usr/local", "usr/local/lib", "usr/local/lib/python3.13", PLACE, "opt"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        contents = {f"{PLACE}/{name}": files.read(name) for name in sorted(files.namelist())}
        contents |= {"etc/.wh.profile": b"", "home/drydock/.wh..wh..opq": b"", "entry.sh": b"#!/bin/sh\n"}
        for name, data in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    data = gzip.compress(tar.getvalue(), mtime=0)
    return Layer(
        digest=store.put(data), size=len(data), diff_id=hashlib.sha256(tar.getvalue()).hexdigest(), unpacked=0,
        title="foreign", contents=(), key="", media_type=GZIP,
    )  # fmt: skip


def vendor_image(store: Store, below: Built, foreign: Layer) -> Built:
    """The image of a vendor: the Debian part of one of ours, and a foreign layer."""
    last = next(n for n, layer in enumerate(below.layers) if layer.title.startswith("bytecode of Python"))
    layers = (*below.layers[: last + 1], foreign)
    config = canonical(
        {
            "architecture": below.architecture, "os": "linux",
            "config": {
                "Env": ["PATH=/vendor/bin:/usr/bin:/bin", "THEIRS=1"], "Labels": {"vendor": "yes"}, "User": "0",
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
        }
    )  # fmt: skip
    config_digest = store.put(config)
    manifest = store.put(canonical(manifest_document(config, config_digest, layers)))
    return replace(below, name=NAME, digest=manifest, config_digest=config_digest, layers=layers)


def over(root: Path, artifacts: Store, made: Any, architecture: Architecture, host: str) -> Over:
    """Publish a vendor's image, and define and build one over it."""
    packages = locked(architecture)
    seller = Store(root / "vendor")
    for layer in made.built.layers:
        os.link(made.store.path(layer.digest), seller.path(layer.digest))
    six = packages["six"]["wheels"][0]
    foreign = foreign_layer(seller, artifacts.path(six["hashes"]["sha256"]))
    vendor = vendor_image(seller, made.built, foreign)
    push(seller, vendor, Registry.read(host), {}, stream=io.StringIO())
    project = Project.make(root / "checkout")
    path = project.root / "images/over/image.toml"
    path.parent.mkdir()
    path.write_text(
        VENDOR_DEFINITION.format(
            hardware="over", architecture=architecture, repository=NAME, digest=f"sha256:{vendor.digest}",
            site_packages=f"/{PLACE}", provided="six", version=packages["six"]["version"],
            requirements='["click"]', more='[engine.mini.environment]\nOURS = "1"',
        )
    )  # fmt: skip
    image = project.image("over-mini")
    seal = {
        "image": image.name, "platform": locks.platform(image), "python": "3.13",
        "inputs": locks.sha256_json(locks.resolution_inputs(image)),
    }  # fmt: skip
    locks.write_lock(
        image.pylock_path,
        {
            "lock-version": "1.0", "created-by": "drydock", "requires-python": "==3.13.*",
            "environments": [locks.environment_marker(image)], "packages": [packages["click"]],
            "tool": {"drydock": seal},
        },
    )  # fmt: skip
    said = drydock(project, root / "store", "lock", "--base", "over", DRYDOCK_BASE_REGISTRY=host)
    assert said.status == 0, said.stderr
    store = seeded(root / "store", artifacts, project.artifacts("over-mini"))
    return Over(project, image, store, host, vendor)


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        yield server


@pytest.fixture
def ours(
    tmp_path: Path, artifacts: Store, tiny: Any, architecture: Architecture, server: RegistryServer
) -> Over:
    return over(tmp_path / "ours", artifacts, tiny, architecture, server.host)


def config_of(store: Store, built: Built) -> Mapping[str, Any]:
    document: Mapping[str, Any] = json.loads(store.path(built.config_digest).read_bytes())
    return document


def test_it_is_built_without_a_byte_of_its_base_and_keeps_its_settings(
    ours: Over, server: RegistryServer
) -> None:
    before = len(server.requests)
    said = build(ours.project, ours.store, name="over-mini")
    assert said.status == 0, said.stderr
    assert len(server.requests) == before, "a build asks no registry"
    built = read_image(ours.store, "over-mini")
    count = len(ours.vendor.layers)
    assert [layer.digest for layer in built.layers[:count]] == [layer.digest for layer in ours.vendor.layers]
    assert not any(ours.store.has(layer.digest) for layer in built.layers[:count])
    assert not any(layer.vendor for layer in built.layers[count:])
    config = config_of(ours.store, built)
    assert config["config"]["User"] == "0"
    assert {"THEIRS=1", "OURS=1", "PATH=/opt/venv/bin:/vendor/bin:/usr/bin:/bin"} <= set(
        config["config"]["Env"]
    )
    assert (
        config["config"]["Labels"]["org.opencontainers.image.base.digest"] == f"sha256:{ours.vendor.digest}"
    )
    other = seeded(ours.store.root.parent / "other", ours.store, ours.project.artifacts("over-mini"))
    assert build(ours.project, other, name="over-mini").identity == said.identity


def test_pushed_it_mounts_its_base_and_pulled_it_runs_and_verifies(
    ours: Over, server: RegistryServer, tmp_path: Path
) -> None:
    assert build(ours.project, ours.store, name="over-mini").status == 0
    assert (
        "are its base's and not here"
        in build(ours.project, ours.store, "--output", str(tmp_path / "layout"), name="over-mini").error
    )
    pushed = ours.drydock("push", "over-mini", "--json").document
    unique = len({layer.digest for layer in ours.vendor.layers})
    assert pushed["mounted"] == unique
    assert pushed["sent"] < 2_000_000
    assert not server.of("GET", "/blobs/sha256")[1:], "only the base's config was ever read"
    user = Store(tmp_path / "user")
    pulled = ours.drydock("pull", "over-mini", "--json", store=user).document
    assert pulled["digest"] == pushed["digest"]
    if os.geteuid() != 0:
        pytest.skip("a vendor's layers remove files, which takes root")
    run = ours.drydock(
        "run", "over-mini", "--runtime", "chroot", "--", "python", "-c",
        "import os, sys, six, click; print(six.__file__, click.__file__, sys.prefix, os.environ['THEIRS'],"
        " os.path.exists('/etc/profile'), os.path.exists('/home/drydock/.bashrc'), os.path.exists('/entry.sh'))",
        store=user,
    )  # fmt: skip
    assert run.status == 0, run.stderr
    assert run.stdout.split() == [
        f"/{PLACE}/six.py", f"/{SITE}/click/__init__.py", "/opt/venv", "1", "False", "False", "True",
    ]  # fmt: skip
    verified = ours.drydock("verify", "over-mini", "--runtime", "chroot", "--full", store=user)
    assert verified.status == 0, verified.stdout + verified.stderr
    assert "1 provided by vendor/release 1.2.1" in verified.stdout


def test_its_sbom_names_its_base_and_rebuilt_it_is_the_same(ours: Over, server: RegistryServer) -> None:
    assert build(ours.project, ours.store, name="over-mini").status == 0
    document = json.loads(ours.drydock("sbom", "over-mini").stdout)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None
    components = {each["name"]: each for each in document["components"]}
    assert components.keys() == {NAME, "click"}
    base, image = components[NAME], document["metadata"]["component"]
    assert ours.image.vendor
    digest = ours.image.vendor.digest
    assert base["hashes"] == [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]
    assert base["purl"] == f"pkg:oci/release@{digest}?tag=1.2.1"
    (six,) = base["components"]
    assert six["purl"] == f"pkg:pypi/six@{ours.image.provides['six']}"
    needs = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
    assert needs[image["bom-ref"]] == sorted([base["bom-ref"], components["click"]["bom-ref"]])
    assert needs[base["bom-ref"]] == [six["bom-ref"]]
    reference = f"over-mini@{image['version']}"
    before = len(server.requests)
    said = ours.drydock("rebuild", reference)
    assert said.status == 0, said.stderr
    assert "bit for bit the same" in said.stdout
    assert len(server.requests) == before


def test_the_layers_of_its_base_come_where_it_runs(ours: Over) -> None:
    assert build(ours.project, ours.store, name="over-mini").status == 0
    if os.geteuid() != 0:
        pytest.skip("a vendor's layers remove files, which takes root")
    command = ("run", "over-mini", "--runtime", "chroot", "--", "python", "-c", "import six")
    assert "set DRYDOCK_BASE_REGISTRY" in drydock(ours.project, ours.store, *command).error
    assert ours.drydock(*command).status == 0
    assert all(ours.store.has(layer.digest, layer.size) for layer in ours.vendor.layers)


def test_a_base_that_holds_something_else_is_drift(ours: Over) -> None:
    definition = ours.image.definition_path
    for wrong, said in (("9.9", "9.9 is to be in vendor/release 1.2.1, 1."), ("", "other")):
        text = definition.read_text()
        if wrong:
            now = ours.image.vendor.provides["six"]  # type: ignore[union-attr]
            definition.write_text(text.replace(f'six = "{now}"', f'six = "{wrong}"'))
        else:
            definition.write_text(text.replace("[base.provides]", '[base.provides]\nother = "1"'))
            said = "1 is to be in vendor/release 1.2.1, and is not in /usr/local"
        image = ours.project.image("over-mini")
        data = locks.tomllib.loads(image.pylock_path.read_text())
        data["tool"]["drydock"]["inputs"] = locks.sha256_json(locks.resolution_inputs(image))
        locks.write_lock(image.pylock_path, data)
        assert build(ours.project, ours.store, name="over-mini").status == 0
        if os.geteuid() != 0:
            pytest.skip("a vendor's layers remove files, which takes root")
        run = ours.drydock("verify", "over-mini", "--runtime", "chroot")
        assert run.status == 1
        assert said in run.stdout
        definition.write_text(text)


def test_an_image_for_npus_is_held_to_the_definition_that_it_carries(ours: Over) -> None:
    """Without CANN in its base: what is declared of it is in no manifest, and found missing all the same."""
    definition = ours.image.definition_path
    npu = 'kind = "npu"\nminimum-driver = "26.0.RC1"\nsoc = ["910B*"]\ncann = "9.1.0"'
    absent = '\n[engine.mini.absent-distributions]\nmindspeed = "no index has a wheel of it"\n'
    definition.write_text(definition.read_text().replace('kind = "none"', npu) + absent)
    assert build(ours.project, ours.store, name="over-mini").status == 0
    if os.geteuid() != 0:
        pytest.skip("a vendor's layers remove files, which takes root")
    run = ours.drydock("verify", "over-mini", "--runtime", "chroot", "--json")
    assert run.status == 1, run.stderr
    checks = {check["name"]: check for check in json.loads(run.stdout)["checks"]}
    assert [finding["subject"] for finding in checks["cann"]["findings"]] == ["CANN", "torch", "torch-npu"]
    assert checks["absent"]["state"] == "as-declared"
    assert checks["absent"]["detail"] == "mindspeed is missing, as declared: no index has a wheel of it"
    if not list(Path("/dev").glob("davinci[0-9]*")):
        assert checks["accelerator"]["state"] == "not-run"
    assert [name for name, check in checks.items() if check["findings"]] == ["cann"]


def test_the_other_architectures_is_built_and_its_tree_is_right(
    tmp_path: Path, artifacts: Store, far: Any, other_architecture: Architecture, server: RegistryServer
) -> None:
    there = over(tmp_path / "far", artifacts, far, other_architecture, server.host)
    assert build(there.project, there.store, name="over-mini").status == 0
    assert read_vendor_lock(there.image).architecture == other_architecture
    pushed = there.drydock("push", "over-mini", "--json").document
    assert pushed["mounted"] >= 1
    user = Store(tmp_path / "user")
    assert there.drydock("pull", "over-mini", store=user).status == 0
    if os.geteuid() != 0:
        pytest.skip("a vendor's layers remove files, which takes root")
    built = read_image(user, "over-mini")
    tree = unpacked(user, replace(built, layers=tuple(each for each in built.layers)), tmp_path / "tree")
    report = verify(tree, full=True)
    assert report.verdict == "ok", report
    assert report.machine == there.image.machine


@pytest.mark.parametrize("base", ["tiny", "far"], ids=["this-architecture", "the-other"])
def test_docker_pulls_it_from_debians_registry_and_it_verifies_there(
    tmp_path: Path, artifacts: Store, base: str, request: pytest.FixtureRequest
) -> None:
    engine = docker_engine()
    made = request.getfixturevalue(base)
    architecture = made.built.architecture
    if not runs(architecture, platform.machine()):
        message = f"this kernel has no emulator of {architecture} (qemu-user with binfmt_misc, flag F)"
        if os.environ.get("DRYDOCK_REQUIRE_EMULATION"):
            pytest.fail(message)
        pytest.skip(f"not run: {message}")
    with debian_registry(tmp_path) as host:
        there = over(tmp_path / "ours", artifacts, made, architecture, host)
        assert build(there.project, there.store, name="over-mini").status == 0
        pushed = there.drydock("push", "over-mini", "--json").document
        assert pushed["mounted"] == len({layer.digest for layer in there.vendor.layers})
        name = f"{host}/over-mini@sha256:{pushed['digest']}"
        try:
            engine.images.pull(name, platform=f"linux/{architecture}")
            said = engine.containers.run(
                name,
                ["python", "-m", "drydock.verify", "--full"],
                volumes={str(REPOSITORY / "src"): {"bind": "/drydock", "mode": "ro"}},
                environment={"PYTHONPATH": "/drydock", "PYTHONDONTWRITEBYTECODE": "1"},
                platform=f"linux/{architecture}",
                remove=True,
            )
        finally:
            with contextlib.suppress(docker.errors.DockerException):
                engine.images.remove(name, force=True)
        assert b"ok: over-mini is what it was locked to be" in said
        # And as the command line runs it, from the store.
        run = there.drydock(
            "run", "over-mini", "--runtime", "docker", "--", "python", "-c", "import six, click"
        )
        assert run.status == 0, run.stderr
        engine.images.remove(read_image(there.store, "over-mini").reference, force=True)

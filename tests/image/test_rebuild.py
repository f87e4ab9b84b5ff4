"""`drydock rebuild`: a published image is made again from what it carries, and any other bit is named by its layer."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zstandard
from conftest import Made
from mini_image import REPOSITORY, Project, drydock, flipped, layer_tar, leftovers, rewrite, seeded, twin

sys.path.insert(0, str(REPOSITORY / "tests/unit"))

from registry_server import RegistryServer

from drydock.build import SHARE
from drydock.oci import Built, Layer, canonical, manifest_document
from drydock.publish import push
from drydock.registry import Registry
from drydock.store import Store


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        yield server


def reference(built: Built) -> str:
    return f"{built.name}@sha256:{built.digest}"


def published(
    store: Store, built: Built, layers: tuple[Layer, ...], change: Callable[[Any], object]
) -> Built:
    """An image like another one, with other layers and another config."""
    config = json.loads(store.path(built.config_digest).read_bytes())
    config["rootfs"]["diff_ids"] = [f"sha256:{layer.diff_id}" for layer in layers]
    change(config)
    data = canonical(config)
    digest = store.put(data)
    manifest = store.put(canonical(manifest_document(data, digest, layers)))
    return replace(built, digest=manifest, config_digest=digest, layers=layers)


def edited(store: Store, layer: Layer, edit: Callable[[str, bytes], bytes | None]) -> Layer:
    """A layer in which files have another content, or are gone."""
    data = io.BytesIO()
    with layer_tar(store, layer.digest) as source, tarfile.open(fileobj=data, mode="w") as target:
        for member in source:
            file = source.extractfile(member) if member.isreg() else None
            content = edit(member.name, file.read()) if file else b""
            if content is not None:
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    blob = zstandard.compress(data.getvalue())
    diff_id = sha256(data.getvalue()).hexdigest()
    return replace(layer, digest=store.put(blob), size=len(blob), diff_id=diff_id)


def carrying(store: Store, built: Built, name: str, edit: Callable[[bytes], bytes | None]) -> Built:
    """The image with another content of one of the files that it was made of."""
    *others, last = built.layers
    path = f"{SHARE}/{name}"
    own = edited(store, last, lambda member, data: edit(data) if member == path else data)
    return published(store, built, (*others, own), lambda _: None)


def test_it_is_the_same_from_a_registry_and_artifacts_alone(
    tiny: Made, project: Project, artifacts: Store, server: RegistryServer, tmp_path: Path
) -> None:
    """In a checkout that does not define the image."""
    push(tiny.store, tiny.built, Registry.read(server.host), {}, stream=io.StringIO())
    server.requests.clear()
    store = seeded(tmp_path / "store", artifacts, project.artifacts("tiny-mini"))
    elsewhere = Project.make(tmp_path / "elsewhere")
    said = drydock(elsewhere, store, "rebuild", reference(tiny.built), "--registry", server.host)
    assert said.status == 0, said.stderr
    assert f"bit for bit the same, {len(tiny.built.layers)} layers made again" in said.stdout
    taken = {request.path.rpartition("sha256:")[2] for request in server.of("GET", "/blobs/")}
    assert taken == {tiny.built.config_digest, tiny.built.layers[-1].digest}
    assert leftovers(store) == []
    # No image of that name was built here: `run` and `push` would take it for the checkout's.
    assert not (store.root / "images").exists()


def test_a_fault_of_the_assembler_is_named_by_its_layers(
    warm: Store, tiny: Made, project: Project, tmp_path: Path
) -> None:
    """In a store that holds every layer as it should be."""
    source = tmp_path / "src"
    shutil.copytree(REPOSITORY / "src", source)
    path = source / "drydock" / "wheels.py"
    text = path.read_text()
    path.write_text(text.replace('b"drydock\\n"', 'b"another\\n"'))
    assert path.read_text() != text
    said = drydock(project, warm, "rebuild", reference(tiny.built), "--json", PYTHONPATH=str(source))
    assert said.status == 1, said.stderr
    document = json.loads(said.stdout)
    assert not document["same"]
    assert document["made"] != document["published"] == f"sha256:{tiny.built.digest}"
    wheels = {
        layer.title
        for layer in tiny.built.layers
        if layer.title.startswith(("python packages", "manifest of"))
        or layer.title.partition(" ")[0] in {package.name for package in project.packages("tiny-mini")}
    }
    assert {each["title"] for each in document["differences"]} == wheels
    assert all(each["content"] for each in document["differences"])
    assert f"{len(wheels)} of {len(tiny.built.layers)} layers differ" in said.stderr.splitlines()[-1]


def test_a_published_layer_that_is_not_what_its_lock_gives_is_named(
    far: Made, project: Project, tmp_path: Path
) -> None:
    """Of the other architecture's image, whose bytecode is compiled here; and one that is only compressed otherwise."""
    store = twin(tmp_path / "store", far.store)
    first, second, *others = far.built.layers
    spoiled = edited(store, first, lambda _, data: data.replace(b"Debian", b"Ubuntu"))
    assert spoiled.diff_id != first.diff_id
    with layer_tar(store, second.digest) as tar:
        assert tar.fileobj
        tar.fileobj.seek(0)
        blob = zstandard.compress(tar.fileobj.read(), 1)
    packed = replace(second, digest=store.put(blob), size=len(blob))
    bad = published(store, far.built, (spoiled, packed, *others), lambda _: None)
    said = drydock(project, store, "rebuild", reference(bad))
    assert said.status == 1, said.stderr
    assert said.stdout.splitlines() == [
        f"{first.title}: published {spoiled.digest}, made {first.digest}",
        f"{second.title}: published {packed.digest}, made {second.digest} (the same files, compressed otherwise)",
    ]
    last = said.stderr.splitlines()[-1]
    assert f"is not what its locks give here, sha256:{far.built.digest}: 2 of " in last


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("pylock.toml", lambda data: data.replace(b'name = "click"', b'name = "clock"'), "does not match its seal"),
        ("debian.toml", lambda data: data.replace(b'name = "git"', b'name = "got"'), "does not match its seal"),
        ("image.toml", lambda data: data.replace(b"==", b">="), "lock/pylock.tiny-mini.toml is out of date with"),
        ("image.toml", lambda data: data + b"[other]\n", "images/tiny/image.toml: other: unknown key"),
        ("debian-request.toml", lambda _: None, "there is no debian-request.toml"),
        ("image.toml", lambda _: None, "there is no image.toml"),
    ],
)  # fmt: skip
def test_what_an_image_carries_must_be_right(
    warm: Store, tiny: Made, project: Project, name: str, edit: Callable[[bytes], bytes | None], said: str
) -> None:
    bad = carrying(warm, tiny.built, name, edit)
    error = drydock(project, warm, "rebuild", reference(bad)).error
    assert f"{reference(bad)} carries what this drydock does not build: " in error
    assert said in error
    assert str(warm.root) not in error
    assert leftovers(warm) == []


def test_a_layer_of_locks_that_cannot_be_read_is_refused(warm: Store, tiny: Made, project: Project) -> None:
    *others, last = tiny.built.layers
    for blob in (b"no zstd", zstandard.compress(b"no tar" * 1000)):
        prose = replace(last, digest=warm.put(blob), size=len(blob))
        bad = published(warm, tiny.built, (*others, prose), lambda _: None)
        assert "the layer with them cannot be read" in drydock(project, warm, "rebuild", reference(bad)).error
    rewrite(warm.path(last.digest), flipped)
    assert "was damaged in" in drydock(project, warm, "rebuild", reference(tiny.built)).error
    assert not warm.has(last.digest)


def test_another_image_s_digest_and_none_are_refused(
    warm: Store, tiny: Made, project: Project, server: RegistryServer
) -> None:
    def error(*arguments: str) -> str:
        return drydock(project, warm, "rebuild", *arguments).error

    assert "tiny-mini, by its label" in error(f"far-mini@sha256:{tiny.built.digest}")
    unlabelled = published(warm, tiny.built, tiny.built.layers, lambda config: config["config"].pop("Labels"))
    assert "no image of drydock, by its label" in error(reference(unlabelled))
    assert "set DRYDOCK_REGISTRY" in error(f"tiny-mini@sha256:{'0' * 64}")
    assert "is not on" in error(f"tiny-mini@sha256:{'0' * 64}", "--registry", server.host)
    for wrong in ("tiny-mini", "tiny-mini@sha256:12", "tiny-mini:20261123-1"):
        assert "write IMAGE@sha256:" in error(wrong)


def test_push_attaches_what_sbom_prints(
    warm: Store, tiny: Made, own: Project, server: RegistryServer
) -> None:
    server.referrers = True
    for added in (True, False):
        pushed = drydock(own, warm, "push", "tiny-mini", server.host, "--json").document
        assert pushed["sbom"]["added"] is added
    repository = server.repositories["tiny-mini"]
    manifest = json.loads(repository.manifests[f"sha256:{pushed['sbom']['digest']}"])
    assert manifest["artifactType"] == "application/vnd.cyclonedx+json"
    assert manifest["subject"]["digest"] == f"sha256:{tiny.built.digest}"
    text = drydock(own, warm, "sbom", "tiny-mini").stdout
    assert repository.blobs[manifest["layers"][0]["digest"]] == text.encode()


def test_push_says_what_it_lacks_for_one_before_it_sends_anything(
    warm: Store, own: Project, server: RegistryServer
) -> None:
    click, *_ = (each for each in own.packages("tiny-mini") if each.name == "click")
    warm.discard(click.wheel.sha256)
    error = drydock(own, warm, "push", "tiny-mini", server.host).error
    assert error.startswith("drydock: no SBOM can be made of it: ")
    assert error.endswith("run `drydock fetch tiny-mini`; or push with --no-sbom")
    assert server.requests == []
    pushed = drydock(own, warm, "push", "tiny-mini", server.host, "--no-sbom", "--json").document
    assert pushed["sbom"] is None
    assert len(server.repositories["tiny-mini"].manifests) == 1

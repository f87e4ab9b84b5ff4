"""A document attached to an image, at registries that keep track of such and at those that do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from debian_registry import debian_registry
from registry_server import Fault, RegistryServer
from test_registry import QUICK, image, noise, refusal, send

from drydock.oci import INDEX, MANIFEST, Built, canonical
from drydock.referrers import Attached, attach
from drydock.registry import Client, Registry
from drydock.store import Store

KIND = "application/vnd.example+json"


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def built(store: Store) -> Built:
    return image(store, "cpu-vllm", noise(1), noise(2))


def give(store: Store, built: Built, host: str, data: bytes = b'{"a": 1}') -> Attached:
    registry = Registry.read(host)
    return attach(store, built, registry, {}, kind=KIND, title="a.json", data=data, patience=QUICK)


def listed(host: str, built: Built) -> tuple[dict[str, Any], str]:
    """The index under the image's own tag."""
    with Client(Registry.read(host), patience=QUICK) as client:
        tag = client.tagged("cpu-vllm", f"sha256-{built.digest}")
        assert tag
        data, kind = client.manifest("cpu-vllm", tag)
        return json.loads(data), kind


def test_a_registry_that_keeps_track_lists_it(server: RegistryServer, store: Store, built: Built) -> None:
    server.referrers = True
    send(store, built, server.host)
    attached = give(store, built, server.host)
    assert attached.added
    repository = server.repositories["cpu-vllm"]
    manifest = json.loads(repository.manifests[f"sha256:{attached.digest}"])
    size = store.path(built.digest).stat().st_size
    assert manifest["subject"] == {
        "mediaType": MANIFEST, "digest": f"sha256:{built.digest}", "size": size,
    }  # fmt: skip
    assert (manifest["artifactType"], manifest["config"]["mediaType"], manifest["config"]["size"]) == (
        KIND, "application/vnd.oci.empty.v1+json", 2,
    )  # fmt: skip
    (layer,) = manifest["layers"]
    assert (layer["mediaType"], repository.blobs[layer["digest"]]) == (KIND, b'{"a": 1}')
    assert layer["annotations"] == {"org.opencontainers.image.title": "a.json"}
    assert list(repository.tags) == ["20261123-1"], "it needs no tag there"


def test_twice_is_once(server: RegistryServer, store: Store, built: Built) -> None:
    send(store, built, server.host)
    repository = server.repositories["cpu-vllm"]
    for server.referrers in (True, False):
        first = give(store, built, server.host)
        before = dict(repository.manifests), dict(repository.tags), dict(repository.blobs)
        assert give(store, built, server.host) == Attached(digest=first.digest, added=False)
        assert (repository.manifests, repository.tags, repository.blobs) == before


def test_one_that_does_not_gets_the_list_under_the_image_s_tag(
    server: RegistryServer, store: Store, built: Built
) -> None:
    send(store, built, server.host)
    first, second = give(store, built, server.host), give(store, built, server.host, b"{}")
    index, kind = listed(server.host, built)
    assert kind == index["mediaType"] == INDEX
    manifests = server.repositories["cpu-vllm"].manifests
    assert index["manifests"] == [
        {
            "mediaType": MANIFEST, "digest": f"sha256:{each.digest}", "artifactType": KIND,
            "size": len(manifests[f"sha256:{each.digest}"]),
        }
        for each in (first, second)
    ]  # fmt: skip


def test_what_others_attached_stays(server: RegistryServer, store: Store, built: Built) -> None:
    send(store, built, server.host)
    repository = server.repositories["cpu-vllm"]
    signature = next(iter(repository.manifests))
    theirs = {"mediaType": MANIFEST, "digest": signature, "size": 1, "annotations": {"by": "them"}}
    data = canonical(
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [theirs], "annotations": {"x": "y"}}
    )
    repository.manifests[f"sha256:{hashlib.sha256(data).hexdigest()}"] = data
    repository.tags[f"sha256-{built.digest}"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
    attached = give(store, built, server.host)
    index, _ = listed(server.host, built)
    assert index["annotations"] == {"x": "y"}
    assert [each["digest"] for each in index["manifests"]] == [signature, f"sha256:{attached.digest}"]
    assert index["manifests"][0] == theirs


def test_a_list_that_somebody_else_overwrites_is_written_again(
    server: RegistryServer, store: Store, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(store, built, server.host)
    mine = give(store, built, server.host)
    put, lost = Client.put_manifest, []

    def and_lose(self: Client, repository: str, reference: str, *more: Any) -> bool:
        before = server.repositories[repository].tags.get(reference)
        answer = put(self, repository, reference, *more)
        if reference.startswith("sha256-") and len(lost) < times:
            assert before
            server.repositories[repository].tags[reference] = before
            lost.append(reference)
        return answer

    monkeypatch.setattr(Client, "put_manifest", and_lose)
    times = 2
    other = give(store, built, server.host, b"{}")
    index, _ = listed(server.host, built)
    assert [each["digest"] for each in index["manifests"]] == [
        f"sha256:{each.digest}" for each in (mine, other)
    ]
    assert len(lost) == 2
    times = 1000
    assert "written by others at the same time: push again" in refusal(give, store, built, server.host, b"[]")


def test_a_tag_that_is_something_else_is_left_alone(
    server: RegistryServer, store: Store, built: Built
) -> None:
    send(store, built, server.host)
    tags = server.repositories["cpu-vllm"].tags
    tags[f"sha256-{built.digest}"] = f"sha256:{built.digest}"
    assert "is no list of what is attached to the image" in refusal(give, store, built, server.host)
    assert tags[f"sha256-{built.digest}"] == f"sha256:{built.digest}"


def test_a_registry_that_denies_it_says_so(server: RegistryServer, store: Store, built: Built) -> None:
    send(store, built, server.host)
    server.faults.append(Fault(method="PUT", path="/manifests/", status=403))
    assert "answers 403" in refusal(give, store, built, server.host)
    server.faults.append(Fault(method="PUT", path="/manifests/", status=503))
    assert give(store, built, server.host).added, "busy is asked again"


def test_debians_registry_lists_it_under_the_image_s_tag(tmp_path: Path, store: Store, built: Built) -> None:
    with debian_registry(tmp_path) as host:
        send(store, built, host)
        attached = give(store, built, host)
        assert give(store, built, host) == Attached(digest=attached.digest, added=False)
        index, kind = listed(host, built)
        assert kind == INDEX
        assert [each["digest"] for each in index["manifests"]] == [f"sha256:{attached.digest}"]
        assert send(store, built, host).reference.endswith(":20261123-1"), "an image's tags are as before"

"""A vendor's image as a base: what is read of it from a registry, what is locked, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import VENDOR_DEFINITION, make_wheel
from registry_server import Fault, RegistryServer, Repository

from drydock import relock
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.locks import check_pylock, read_pylock
from drydock.oci import INDEX, LAYER, MANIFEST, Built
from drydock.registry import DOCKER_MANIFEST
from drydock.store import Store
from drydock.transfer import Patience
from drydock.vendor import GZIP, have_layers, lock_vendor, read_vendor_lock, vendor_layers

QUICK = Patience(attempts=2, backoff=0.01, connect=1.0, read=2.0)
REPOSITORY = "vendor/release"


def put(repository: Repository, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    repository.blobs[digest] = data
    return digest


def manifest(repository: Repository, document: dict[str, Any]) -> str:
    data = json.dumps(document).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    repository.manifests[digest] = data
    return digest


CONFIG = {
    "architecture": "amd64", "os": "linux", "created": "2026-01-01T00:00:00Z",
    "config": {
        "Env": ["PATH=/opt/vendor/bin:/usr/bin", "VENDOR=1", "EMPTY="], "User": "1000", "WorkingDir": "/work",
        "Entrypoint": ["/entry.sh"], "Cmd": ["serve"], "Labels": {"vendor": "yes"}, "ExposedPorts": {"80/tcp": {}},
    },
    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{number:064x}" for number in (1, 2)]},
}  # fmt: skip


def image(repository: Repository, config: dict[str, Any], /, **changes: Any) -> str:
    """A vendor's image in its registry, whose layers nobody can read: they are not there."""
    data = json.dumps(config).encode()
    document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": put(repository, data), "size": len(data),
        },
        "layers": [
            {
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "digest": f"sha256:{number:064x}", "size": 1000 * number,
            }
            for number in (3, 4)
        ],
    }  # fmt: skip
    return manifest(repository, document | changes)


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        server.repositories[REPOSITORY] = Repository()
        yield server


@pytest.fixture
def there(server: RegistryServer) -> Repository:
    return server.repositories[REPOSITORY]


def project(root: Path, digest: str, architecture: str = "amd64", more: str = "") -> Image:
    (root / "images/box").mkdir(parents=True, exist_ok=True)
    (root / "lock").mkdir(exist_ok=True)
    (root / "images/box/image.toml").write_text(
        VENDOR_DEFINITION.format(
            hardware="box", architecture=architecture, repository=REPOSITORY, digest=digest,
            site_packages="/usr/local/lib/python3.13/dist-packages", provided="torch", version="2.9.1",
            requirements='["alpha", "torch>=2"]', more=more,
        )
    )  # fmt: skip
    return Image.named(root, "box-mini")


def environ(*hosts: str) -> dict[str, str]:
    return {"DRYDOCK_BASE_REGISTRY": " ".join(hosts)}


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(DrydockError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_a_base_is_locked_without_its_layers(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    digest = image(there, CONFIG)
    box = project(tmp_path, digest)
    lock = lock_vendor(box, environ(server.host), QUICK)
    assert lock == read_vendor_lock(box)
    assert f"sha256:{lock.manifest}" == digest
    assert lock.environment == ("PATH=/opt/vendor/bin:/usr/bin", "VENDOR=1", "EMPTY=")
    assert lock.settings == {
        "User": "1000", "WorkingDir": "/work", "Entrypoint": ["/entry.sh"], "Cmd": ["serve"],
    }  # fmt: skip
    layers = vendor_layers(lock)
    assert [(layer.digest, layer.size, layer.diff_id, layer.media_type) for layer in layers] == [
        (f"{3:064x}", 3000, f"{1:064x}", GZIP),
        (f"{4:064x}", 4000, f"{2:064x}", GZIP),
    ]
    assert [request.path for request in server.of("GET", "/blobs/")] == [
        f"/v2/{REPOSITORY}/blobs/{next(iter(there.blobs))}"
    ], "of its blobs only the config was read"
    assert server.host not in box.vendor_lock_path.read_text(), "a lock names no registry"


def test_a_variant_of_a_base_has_a_lock_of_its_own(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    digests = [image(there, CONFIG), image(there, CONFIG | {"created": "2026-02-02T00:00:00Z"})]
    box = project(tmp_path, digests[0])
    path = box.definition_path
    variant = f'[base.variants.b2]\ndigest = "{digests[1]}"\nversion = "b2"\nsoc = ["Chip2"]\n[accelerator]'
    path.write_text(path.read_text().replace("[accelerator]", variant))
    images = [Image.named(tmp_path, name) for name in ("box-mini", "box-mini-b2")]
    for each in images:
        lock_vendor(each, environ(server.host), QUICK)
    assert [f"sha256:{read_vendor_lock(each).manifest}" for each in images] == digests
    assert [read_vendor_lock(each).version for each in images] == ["1.2.1", "b2"]
    # A variant that moves leaves the base's own lock as it is.
    path.write_text(path.read_text().replace(digests[1], digests[0]))
    assert read_vendor_lock(Image.named(tmp_path, "box-mini"))
    assert "out of date" in refusal(read_vendor_lock, Image.named(tmp_path, "box-mini-b2"))


def test_of_an_index_the_image_for_the_platform_is_taken(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    arm = copy.deepcopy(CONFIG) | {"architecture": "arm64"}
    digests = {"amd64": image(there, CONFIG), "arm64": image(there, arm)}
    entries = [
        {
            "digest": digest,
            "size": 1,
            "mediaType": MANIFEST,
            "platform": {"os": "linux", "architecture": name},
        }
        for name, digest in digests.items()
    ]
    attestation = {"digest": f"sha256:{0:064x}", "platform": {"os": "unknown", "architecture": "unknown"}}
    index = manifest(there, {"mediaType": INDEX, "manifests": [attestation, *entries]})
    for name, digest in digests.items():
        box = project(tmp_path / name, index, architecture=name)
        assert f"sha256:{lock_vendor(box, environ(server.host), QUICK).manifest}" == digest
    only = manifest(there, {"mediaType": INDEX, "manifests": [attestation, entries[1]]})
    message = refusal(lock_vendor, project(tmp_path / "none", only), environ(server.host), QUICK)
    assert "has no image for linux/amd64: it has linux/arm64" in message


def test_a_manifest_for_another_platform_is_refused(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    box = project(tmp_path, image(there, CONFIG), architecture="arm64")
    assert "is for linux/amd64, and box-mini is for linux/arm64" in refusal(
        lock_vendor, box, environ(server.host), QUICK
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": []}, "has 0 layers and its config names 2"),
        (
            {"config": {"mediaType": "application/x", "digest": "sha256:0", "size": 1}},
            "is no container image",
        ),
        ({"mediaType": "application/x"}, "is no image: it is application/x"),
        ({"layers": [{"mediaType": LAYER}] * 2}, "is no image that can be read"),
        (
            {"layers": [{"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}] * 2},
            "which cannot be mounted or pushed",
        ),
    ],
)
def test_what_is_no_image_to_build_on_is_refused(
    server: RegistryServer, there: Repository, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    box = project(tmp_path, image(there, CONFIG, **changes))
    assert said in refusal(lock_vendor, box, environ(server.host), QUICK)
    assert not box.vendor_lock_path.exists()


def test_a_base_with_too_many_layers_is_refused(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    many = copy.deepcopy(CONFIG)
    many["rootfs"]["diff_ids"] *= 64  # type: ignore[index]
    layers = [{"mediaType": GZIP, "digest": f"sha256:{3:064x}", "size": 1}] * 128
    box = project(tmp_path, image(there, many, layers=layers))
    assert "leaves no room" in refusal(lock_vendor, box, environ(server.host), QUICK)


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_other_bytes_than_the_digest_names_are_refused(
    server: RegistryServer, there: Repository, tmp_path: Path, what: str
) -> None:
    box = project(tmp_path, image(there, CONFIG))
    path = "/manifests/" if what == "manifest" else "/blobs/"
    server.faults += [Fault(method="GET", path=path, wrong=True, always=True)]
    assert "serves other bytes" in refusal(lock_vendor, box, environ(server.host), QUICK)


def test_a_mirror_is_asked_where_the_first_does_not_have_it(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    box = project(tmp_path, image(there, CONFIG))
    with RegistryServer() as empty:
        lock_vendor(box, environ(empty.host, server.host), QUICK)
        message = refusal(lock_vendor, box, environ(empty.host), QUICK)
    assert "set DRYDOCK_BASE_REGISTRY to a registry that has it" in message
    assert "set DRYDOCK_BASE_REGISTRY" in refusal(lock_vendor, box, {}, QUICK)


@pytest.mark.parametrize("digest", ["1.2.1", "sha256:12", "latest", "", "sha512:" + "0" * 64])
def test_a_tag_is_no_digest(tmp_path: Path, digest: str) -> None:
    message = refusal(project, tmp_path, digest)
    assert "base.digest" in message
    assert "a tag moves" in message


def test_a_lock_of_another_digest_is_out_of_date(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    lock_vendor(project(tmp_path, image(there, CONFIG)), environ(server.host), QUICK)
    other = copy.deepcopy(CONFIG) | {"created": "2026-01-02T00:00:00Z"}
    box = project(tmp_path, image(there, other))
    assert "is out of date with images/box/image.toml" in refusal(read_vendor_lock, box)
    text = box.vendor_lock_path.read_text().replace("VENDOR=1", "VENDOR=2")
    box.vendor_lock_path.write_text(text)
    assert "edited by hand" in refusal(read_vendor_lock, box)


def test_a_layer_that_no_registry_of_bases_has_names_their_variable(
    server: RegistryServer, there: Repository, tmp_path: Path
) -> None:
    box = project(tmp_path, image(there, CONFIG))
    layers = vendor_layers(lock_vendor(box, environ(server.host), QUICK))
    built = Built(
        name=box.name, architecture="amd64", digest="0" * 64, config_digest="0" * 64, layers=layers, environment={}
    )  # fmt: skip
    store = Store(tmp_path / "store")
    message = refusal(have_layers, store, box, built, environ(server.host), QUICK)
    assert message.endswith("set DRYDOCK_BASE_REGISTRY to a registry that has it")


# What it provides


@pytest.fixture
def links(tmp_path: Path) -> Path:
    return tmp_path / "links"


def locking(links: Path, host: str) -> dict[str, str]:
    return environ(host) | {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(links),
        "PIP_CONFIG_FILE": "/dev/null", "UV_NO_CONFIG": "1", "HOME": "/",
    }  # fmt: skip


def lock(box: Image, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return relock.lock([box], Store(tmp_path / "store"), environment)


def test_what_the_base_provides_is_taken_as_given_and_left_out(
    server: RegistryServer, there: Repository, tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(links, "alpha", "1.0", requires=("torch>=2.8", "beta"))
    make_wheel(links, "beta", "1.0")
    box = project(tmp_path, image(there, CONFIG))
    changes = lock(box, tmp_path, locking(links, server.host), monkeypatch)
    locked = read_pylock(box)
    assert [package.name for package in locked.packages] == ["alpha", "beta"]
    assert check_pylock(box, locked) == []
    assert {change["package"] for change in changes} == {"alpha", "beta", REPOSITORY}
    assert relock.check([box])["ok"]
    # A base whose digest did not move is not asked for again.
    before = len(server.requests)
    assert lock(box, tmp_path, locking(links, "127.0.0.1:1"), monkeypatch) == []
    assert len(server.requests) == before


def test_what_does_not_fit_what_the_base_holds_is_refused(
    server: RegistryServer, there: Repository, tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(links, "alpha", "1.0", requires=("torch>=2.10",))
    digest = image(there, CONFIG)
    box = project(tmp_path, digest)
    message = refusal(lock, box, tmp_path, locking(links, server.host), monkeypatch)
    assert "alpha 1.0 asks for torch>=2.10 and vendor/release 1.2.1 holds 2.9.1" in message
    assert "overrides" in message
    override = (
        '[engine.mini.overrides]\ntorch = { version = "2.9.1", reason = "tried with it in the image" }\n'
    )
    box = project(tmp_path, digest, more=override)
    lock(box, tmp_path, locking(links, server.host), monkeypatch)
    assert [package.name for package in read_pylock(box).packages] == ["alpha"]


def test_a_lock_with_what_the_base_provides_is_not_right(
    server: RegistryServer, there: Repository, tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(links, "alpha", "1.0")
    box = project(tmp_path, image(there, CONFIG))
    lock(box, tmp_path, locking(links, server.host), monkeypatch)
    read = read_pylock(box)
    twice = read.model_copy(
        update={"packages": (*read.packages, read.packages[0].model_copy(update={"name": "torch"}))}
    )
    assert any("torch is provided by the base and locked" in line for line in check_pylock(box, twice))
    assert tomllib.loads(box.vendor_lock_path.read_text())["repository"] == REPOSITORY

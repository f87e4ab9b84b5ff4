"""Pushing to and pulling from a registry on loopback, with what can go wrong on the way."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from debian_registry import debian_registry
from registry_server import Fault, RegistryServer, Repository

from drydock import publish, registry
from drydock.errors import DrydockError, OutOfSpace
from drydock.oci import INDEX, Built, Layer, canonical, manifest_document, read_image
from drydock.publish import Pulled, Pushed
from drydock.published import write_record
from drydock.registry import IDENTITY, Registry, credentials
from drydock.store import CHUNK, Store
from drydock.transfer import Part, Patience

QUICK = Patience(attempts=4, backoff=0.01, connect=1.0, read=2.0)
TODAY = datetime(2026, 11, 23, tzinfo=UTC)
LARGE = 3 * CHUNK + 17
SECRET = "hunter2"


def image(store: Store, name: str, *contents: bytes) -> Built:
    """An image in the store, each of whose layers is some bytes."""
    layers = tuple(
        Layer(
            digest=store.put(data), size=len(data), diff_id=hashlib.sha256(b"tar of " + data).hexdigest(),
            unpacked=0, title=f"layer {number}", contents=(), key="",
        )
        for number, data in enumerate(contents)
    )  # fmt: skip
    config = canonical(
        {
            "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/usr/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
        }
    )  # fmt: skip
    config_digest = store.put(config)
    return Built(
        name=name,
        architecture="amd64",
        digest=store.put(canonical(manifest_document(config, config_digest, layers))),
        config_digest=config_digest,
        layers=layers,
        environment={"PATH": "/usr/bin"},
    )


def noise(seed: int, size: int = 1000) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "builder")


@pytest.fixture
def built(store: Store) -> Built:
    return image(store, "cpu-vllm", noise(1), noise(2, LARGE), noise(3, 0))


@pytest.fixture
def checkout(tmp_path: Path, built: Built) -> Path:
    (tmp_path / "lock").mkdir()
    write_record(tmp_path, built)
    return tmp_path


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """Another machine's store, empty."""
    return Store(tmp_path / "user")


def send(store: Store, built: Built, host: str, environ: dict[str, str] | None = None, **more: Any) -> Pushed:
    more = {"patience": QUICK, "today": TODAY, "stream": io.StringIO()} | more
    return publish.push(store, built, Registry.read(host), environ or {}, **more)


def take(
    checkout: Path, store: Store, *hosts: str, environ: dict[str, str] | None = None, **more: Any
) -> tuple[Built, Pulled, str]:
    stream = io.StringIO()
    places = [Registry.read(host) for host in hosts]
    more = {"patience": QUICK, "stream": stream} | more
    built, report = publish.pull(checkout, store, "cpu-vllm", places, environ or {}, **more)
    return built, report, stream.getvalue()


def refusal(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(DrydockError) as caught:
        call(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message


def is_clean(store: Store) -> None:
    """No blob is other than its name says, and nothing waits under `tmp` but what can go on."""
    for path in store.blobs.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert {path.suffix for path in store.tmp.iterdir()} <= {".part"}


# There and back


def test_what_is_pushed_is_pulled_and_is_the_same_image(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    pushed = send(store, built, f"{server.host}/team")
    assert pushed.reference == f"{server.host}/team/cpu-vllm:20261123-1"
    assert (pushed.there, pushed.mounted, pushed.uploaded) == (0, 0, 4)
    assert pushed.sent == built.size + store.path(built.config_digest).stat().st_size
    pulled, report, _ = take(checkout, other, f"{server.host}/team")
    assert pulled == read_image(other, "cpu-vllm") == built
    assert report.received == pushed.sent
    for digest in (built.digest, built.config_digest, *(layer.digest for layer in built.layers)):
        assert other.path(digest).read_bytes() == store.path(digest).read_bytes()
    is_clean(other)
    again = take(checkout, other, f"{server.host}/team")[1]
    assert (again.present, again.received) == (3, 0)
    # What is there needs no network.
    assert take(checkout, other, "127.0.0.1:1")[0] == built


def test_a_second_push_sends_nothing_and_makes_no_tag(
    server: RegistryServer, store: Store, built: Built
) -> None:
    send(store, built, server.host)
    again = send(store, built, server.host)
    assert (again.there, again.uploaded, again.sent) == (4, 0, 0)
    assert server.repositories["cpu-vllm"].tags == {"20261123-1": f"sha256:{built.digest}"}
    assert len(server.of("PUT", "/manifests/")) == 1


def test_a_tag_is_never_moved(server: RegistryServer, store: Store, built: Built) -> None:
    older = [image(store, "cpu-vllm", noise(number)) for number in range(10, 14)]
    names = [send(store, each, server.host).reference.rpartition(":")[2] for each in (*older, built)]
    assert names == [f"20261123-{number}" for number in range(1, 6)], "the list of tags has several pages"
    tags = server.repositories["cpu-vllm"].tags
    assert [tags[name] for name in names] == [f"sha256:{each.digest}" for each in (*older, built)]
    assert send(store, older[1], server.host).reference.endswith(":20261123-2")
    tomorrow = datetime(2026, 11, 24, tzinfo=UTC)
    assert send(store, built, server.host, today=tomorrow).reference.endswith(":20261124-1")
    assert tags["20261123-5"] == tags["20261124-1"]


def test_a_tag_that_somebody_else_takes_at_the_same_time_is_said(
    server: RegistryServer, store: Store, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = publish.Client.put_manifest

    def late(self: Any, repository: str, tag: str, data: bytes) -> None:
        put(self, repository, tag, data)
        server.repositories[repository].tags[tag] = f"sha256:{'0' * 64}"
        server.repositories[repository].manifests[f"sha256:{'0' * 64}"] = b"{}"

    monkeypatch.setattr(publish.Client, "put_manifest", late)
    assert "was taken by somebody else" in refusal(send, store, built, server.host)


def test_layers_of_another_image_there_are_mounted(server: RegistryServer, store: Store) -> None:
    shared = noise(1, LARGE)
    first = image(store, "cpu-vllm", shared, noise(2))
    second = image(store, "cpu-sglang", shared, noise(3))
    send(store, first, f"{server.host}/team")
    pushed = send(store, second, f"{server.host}/team", others=[first])
    # The config has another list of layers.
    assert (pushed.mounted, pushed.uploaded) == (1, 2)
    assert pushed.sent < 10_000
    assert "from=team%2Fcpu-vllm" in server.of("POST", "mount=")[0].path
    # Where it turns out not to be there, it is sent.
    del server.repositories["team/cpu-vllm"]
    server.repositories["team/cpu-sglang"] = Repository()
    assert send(store, second, f"{server.host}/team", others=[first]).uploaded == 3


# What can go wrong with a push


def test_a_broken_upload_goes_on_where_it_broke(server: RegistryServer, store: Store, built: Built) -> None:
    large = f"sha256:{built.layers[1].digest}"
    send(store, built, server.host)
    sent = len(server.of("PATCH"))
    del server.repositories["cpu-vllm"].blobs[large]
    server.faults += [Fault(method="PATCH", cut=CHUNK + 5), Fault(method="PATCH", cut=CHUNK)]
    stream = io.StringIO()
    pushed = send(store, built, server.host, stream=stream)
    assert (pushed.there, pushed.uploaded) == (3, 1)
    starts = [int(request.headers["content-range"].partition("-")[0]) for request in server.of("PATCH")]
    assert starts[sent:] == [0, CHUNK + 5, 2 * CHUNK + 5]
    assert sum(request.length for request in server.of("PATCH")[sent:]) == LARGE, "nothing was sent twice"
    assert server.repositories["cpu-vllm"].blobs[large] == noise(2, LARGE)
    assert stream.getvalue().count("; attempt 2 of 4") == 2


def test_a_push_that_was_ended_is_gone_on_with(server: RegistryServer, store: Store) -> None:
    one = image(store, "one", noise(2, LARGE))
    send(store, one, server.host)
    del server.repositories["one"].blobs[f"sha256:{one.layers[0].digest}"]
    server.faults += [Fault(method="PATCH", cut=CHUNK)]
    message = refusal(send, store, one, server.host, patience=Patience(attempts=1, read=2.0))
    assert server.host in message
    again = send(store, one, server.host)
    begun = [request.headers["content-range"] for request in server.of("PATCH")]
    assert f"{CHUNK}-{LARGE - 1}" in begun
    assert again.sent == LARGE - CHUNK
    assert server.repositories["one"].blobs[f"sha256:{one.layers[0].digest}"] == noise(2, LARGE)
    assert not list((store.root / "uploads").iterdir()), "nothing is kept of uploads that ended"


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_forgotten_upload_begins_again(server: RegistryServer, store: Store, method: str) -> None:
    one = image(store, "one", noise(2, LARGE))
    server.faults += [Fault(method=method, path="/uploads/", forget=True)]
    send(store, one, server.host)
    assert server.repositories["one"].blobs[f"sha256:{one.layers[0].digest}"] == noise(2, LARGE)


def test_a_blob_that_arrived_before_its_answer_was_lost_is_not_sent_again(
    server: RegistryServer, store: Store
) -> None:
    one = image(store, "one", noise(2, LARGE))
    server.faults += [Fault(method="PUT", path="/uploads/", silent=True)]
    pushed = send(store, one, server.host)
    assert pushed.sent == one.size + store.path(one.config_digest).stat().st_size
    assert not list((store.root / "uploads").iterdir())


def test_a_session_with_other_bytes_is_not_gone_on_with(server: RegistryServer, store: Store) -> None:
    one = image(store, "one", noise(2, LARGE))
    server.faults += [Fault(method="PATCH", cut=CHUNK)] * 2
    refusal(send, store, one, server.host, patience=Patience(attempts=1, read=2.0))
    for session in server.uploads.values():
        session[:] = b"x" * len(session)
    send(store, one, server.host)
    assert server.repositories["one"].blobs[f"sha256:{one.layers[0].digest}"] == noise(2, LARGE)


def test_a_blob_that_is_damaged_here_is_named(server: RegistryServer, store: Store) -> None:
    one = image(store, "one", noise(2, LARGE))
    path = store.path(one.layers[0].digest)
    path.chmod(0o644)
    path.write_bytes(b"x" * LARGE)
    assert f"remove {path}" in refusal(send, store, one, server.host)
    path.write_bytes(noise(2, LARGE))
    send(store, one, server.host)


def test_two_pushes_at_once_send_each_blob_once(server: RegistryServer, store: Store) -> None:
    one = image(store, "one", noise(2, LARGE), noise(3, LARGE))
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: send(store, one, server.host), range(2)))
    assert sum(report.uploaded for report in reports) == 3
    assert sum(request.length for request in server.of("PATCH")) == sum(report.sent for report in reports)


def test_what_is_not_mounted_is_sent_once_and_with_a_token(
    server: RegistryServer, store: Store, tmp_path: Path
) -> None:
    server.login, server.mounts = ("ci", SECRET), False
    environ = logged_in(tmp_path / "docker", server.host)
    first = image(store, "first", *(noise(number, LARGE) for number in range(9)))
    send(store, first, server.host, environ)
    before = len(server.of("PATCH"))
    second = image(store, "second", *(noise(number, LARGE) for number in range(9)))
    never = image(store, "never", *(noise(number, LARGE) for number in range(9)))
    pushed = send(store, second, server.host, environ, others=[never, first])
    patches = server.of("PATCH")[before:]
    assert pushed.uploaded == len(patches) == 10
    assert all("authorization" in request.headers for request in patches)
    server.mounts = True
    third = image(store, "third", *(noise(number, LARGE) for number in range(9)))
    assert send(store, third, server.host, environ, others=[never, first]).mounted == 9


def test_a_registry_that_does_not_name_digests_is_asked_for_the_manifest(
    server: RegistryServer, store: Store, built: Built
) -> None:
    server.digests = False
    assert send(store, built, server.host).reference.endswith("-1")
    assert send(store, built, server.host).reference.endswith("-1")
    assert len(server.repositories["cpu-vllm"].tags) == 1


def test_a_repository_that_cannot_be_made_is_said(server: RegistryServer, store: Store, built: Built) -> None:
    for status in (403, 404):
        server.faults = [Fault(method="POST", status=status, always=True)]
        message = refusal(send, store, built, server.host)
        assert f"answers {status}" in message
        assert "create the repository" in message


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("method", "path"), [("HEAD", "/blobs/"), ("POST", ""), ("PATCH", ""), ("PUT", "")])
def test_a_busy_registry_is_asked_again(
    server: RegistryServer, store: Store, built: Built, status: int, method: str, path: str
) -> None:
    server.faults += [Fault(method=method, path=path, status=status)] * 2
    send(store, built, server.host)
    assert server.repositories["cpu-vllm"].tags
    assert not server.faults


def test_a_registry_says_how_long_to_wait(server: RegistryServer, store: Store, built: Built) -> None:
    server.faults += [Fault(method="PUT", path="/manifests/", status=429, headers={"Retry-After": "1"})]
    began = time.monotonic()
    send(store, built, server.host)
    assert time.monotonic() - began > 1


def test_a_registry_that_stays_broken_ends_the_push_and_makes_no_tag(
    server: RegistryServer, store: Store, built: Built
) -> None:
    server.faults += [Fault(method="PATCH", status=503, always=True)]
    message = refusal(send, store, built, server.host)
    assert "answers 503" in message
    assert not server.repositories.get("cpu-vllm", Repository()).tags
    server.faults.clear()
    send(store, built, server.host)


def test_what_a_registry_refuses_is_said_in_its_words(
    server: RegistryServer, store: Store, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish.Client, "has_blob", lambda *_: True)
    assert "answers 400" in (message := refusal(send, store, built, server.host))
    assert "blob unknown" in message


# What can go wrong with a pull


def test_a_broken_download_goes_on_where_it_broke(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    send(store, built, server.host)
    large = built.layers[1].digest
    server.faults += [
        Fault(method="GET", path=large, cut=CHUNK + 5),
        Fault(method="GET", path=large, cut=CHUNK),
    ]
    _, report, _ = take(checkout, other, server.host)
    ranges = [request.headers.get("range") for request in server.of("GET", large)]
    assert ranges == [None, f"bytes={CHUNK + 5}-", f"bytes={2 * CHUNK + 5}-"]
    assert report.received == built.size + store.path(built.config_digest).stat().st_size
    is_clean(other)


def test_a_pull_that_was_ended_is_gone_on_with(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    send(store, built, server.host)
    large = built.layers[1].digest
    server.faults += [Fault(method="GET", path=large, cut=2 * CHUNK)]
    refusal(take, checkout, other, server.host, patience=Patience(attempts=1, read=2.0))
    assert other.read_record("images", "cpu-vllm") is None, "half an image is none"
    is_clean(other)
    _, report, _ = take(checkout, other, server.host)
    assert report.resumed >= 2 * CHUNK
    # The small layer may have arrived before.
    assert 0 <= report.received - (LARGE - 2 * CHUNK) <= 1000
    is_clean(other)


def test_wrong_bytes_are_refused_and_a_mirror_is_asked(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    send(store, built, server.host)
    large = built.layers[1].digest
    server.faults += [Fault(method="GET", path=large, wrong=True, always=True)]
    message = refusal(take, checkout, other, server.host)
    assert f"for cpu-vllm@sha256:{large}" in message
    assert not other.has(large)
    is_clean(other)
    with RegistryServer() as mirror:
        send(store, built, mirror.host)
        _, report, said = take(checkout, other, server.host, mirror.host)
        assert f"refused: {server.host} serves sha256:" in said
        assert mirror.host in report.source
    is_clean(other)


def test_bytes_that_an_earlier_run_left_wrong_are_not_the_registrys_fault(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    send(store, built, server.host)
    large = built.layers[1].digest
    (other.tmp / f"{large}.part").write_bytes(noise(99, CHUNK))
    take(checkout, other, server.host)
    is_clean(other)


def test_a_manifest_with_other_bytes_is_refused(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    send(store, built, server.host)
    server.repositories["cpu-vllm"].manifests[f"sha256:{built.digest}"] += b" "
    assert "serves other bytes for cpu-vllm@sha256:" in refusal(take, checkout, other, server.host)
    assert not list(other.blobs.iterdir())


def test_only_what_is_recorded_is_pulled(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    newer = image(store, "cpu-vllm", noise(77))
    send(store, newer, server.host)
    message = refusal(take, checkout, other, server.host)
    assert built.digest in message
    assert "push cpu-vllm there" in message
    (checkout / "lock" / "images.toml").unlink()
    assert "records no digest of cpu-vllm" in refusal(take, checkout, other, server.host)
    assert not [
        request for request in server.requests if "20261123" in request.path and request.method == "GET"
    ]


@pytest.mark.parametrize("document", [{"mediaType": INDEX, "manifests": []}, {}, {"config": {"size": 5}}])
def test_what_is_no_image_of_ours_is_refused(
    server: RegistryServer, checkout: Path, other: Store, built: Built, document: Any
) -> None:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    server.repositories["cpu-vllm"] = Repository(manifests={f"sha256:{digest}": data})
    recorded = checkout / "lock" / "images.toml"
    recorded.write_text(recorded.read_text().replace(built.digest, digest))
    message = refusal(take, checkout, other, server.host)
    assert digest in message
    assert other.read_record("images", "cpu-vllm") is None


def test_a_disk_without_room_is_said_before_layers_are_asked_for(
    server: RegistryServer,
    store: Store,
    built: Built,
    checkout: Path,
    other: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send(store, built, server.host)
    usage = type(shutil.disk_usage(checkout))
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda _: usage(100, 100, 0))
    with pytest.raises(OutOfSpace, match=r"3\.1 MB are to be pulled"):
        take(checkout, other, server.host)
    assert not server.of("GET", built.layers[1].digest)


def test_a_disk_that_fills_up_leaves_what_can_be_gone_on_with(
    server: RegistryServer,
    store: Store,
    built: Built,
    checkout: Path,
    other: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send(store, built, server.host)
    write = Part.write

    def full(self: Any, data: bytes) -> None:
        if self.size > CHUNK:
            raise OutOfSpace("no space left")
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "write", full)
        with pytest.raises(OutOfSpace):
            take(checkout, other, server.host)
    assert other.read_record("images", "cpu-vllm") is None
    is_clean(other)
    assert take(checkout, other, server.host)[1].resumed > CHUNK


def test_a_mirror_that_is_gone_is_given_up_once(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    send(store, built, server.host)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _, _, said = take(checkout, other, f"127.0.0.1:{unused.getsockname()[1]}", server.host)
    assert said.count("; attempt ") == QUICK.attempts - 1


def test_nobody_there_is_said_with_the_address(checkout: Path, other: Store) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        assert f"{host} cannot be reached" in refusal(take, checkout, other, host)


# Who may


def logged_in(folder: Path, host: str, password: str = SECRET) -> dict[str, str]:
    """The environment of a user who has run `docker login`."""
    folder.mkdir(exist_ok=True)
    auth = base64.b64encode(f"ci:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return {"DOCKER_CONFIG": str(folder)}


@pytest.mark.parametrize("basic", [True, False], ids=["basic", "token"])
def test_a_password_is_used_where_one_is_asked_for(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store, basic: bool
) -> None:
    server.login, server.basic = ("ci", SECRET), basic
    environ = logged_in(checkout / "docker", server.host)
    send(store, built, server.host, environ)
    take(checkout, other, server.host, environ=environ)
    if not basic:
        assert ["repository:cpu-vllm:pull,push"] in server.scopes
        assert ["repository:cpu-vllm:pull"] in server.scopes
    for environ in ({}, logged_in(checkout / "docker", server.host, "wrong")):
        message = refusal(take, checkout, Store(checkout / "third"), server.host, environ=environ)
        assert f"docker login {server.host}" in message
        assert SECRET not in message


def test_expired_tokens_are_replaced(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    server.login, server.lifetime = ("ci", SECRET), 2
    environ = logged_in(checkout / "docker", server.host)
    send(store, built, server.host, environ, patience=Patience(attempts=20, backoff=0.01, read=2.0))
    take(checkout, other, server.host, environ=environ)
    assert len(server.scopes) > 4
    is_clean(other)


def test_an_identity_token_gets_tokens_and_is_no_password(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    server.login = ("ci", SECRET)
    folder = checkout / "docker"
    folder.mkdir()
    environ = {"DOCKER_CONFIG": str(folder), "HOME": str(checkout)}

    def log_in(token: str) -> None:
        document = {"auths": {server.host: {"auth": "MDA6", "identitytoken": token}}}
        (folder / "config.json").write_text(json.dumps(document))

    log_in(server.identity)
    send(store, built, server.host, environ)
    take(checkout, other, server.host, environ=environ)
    is_clean(other)
    assert not any("basic" in request.headers.get("authorization", "").lower() for request in server.requests)
    log_in("stale")
    assert "docker login" in refusal(take, checkout, Store(checkout / "third"), server.host, environ=environ)
    log_in(server.identity)
    server.basic = True
    assert "docker login" in refusal(take, checkout, Store(checkout / "third"), server.host, environ=environ)


def test_the_password_does_not_follow_a_redirect(
    server: RegistryServer, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    server.login = ("ci", SECRET)
    environ = logged_in(checkout / "docker", server.host)
    send(store, built, server.host, environ)
    with RegistryServer() as storage:
        storage.repositories = server.repositories
        server.elsewhere = f"http://{storage.host}"
        take(checkout, other, server.host, environ=environ)
        # An empty layer needs no bytes.
        assert len(storage.of("GET", "/elsewhere/")) == 3
        assert not any("authorization" in request.headers for request in storage.requests)
        # What storage asks for is not for it to have.
        storage.steals = f"http://{storage.host}/token"
        storage.login = ("ci", SECRET)
        refusal(take, checkout, Store(checkout / "third"), server.host, environ=environ)
        assert not storage.scopes


def test_a_password_is_not_sent_without_tls_for_a_registry_with_tls() -> None:
    client = publish.Client(Registry.read("registry.example"), login=("ci", SECRET))
    challenge = 'Bearer realm="http://registry.example/token",service="x"'
    assert "without TLS" in refusal(client._authorize, challenge, ["repository:a:pull"])


def test_dockers_own_logins_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "docker"
    environ = logged_in(folder, "registry.example")
    assert credentials("registry.example", environ) == ("ci", SECRET)
    assert credentials("other.example", environ) is None
    assert credentials("registry.example", {"HOME": str(tmp_path)}) is None
    helper = tmp_path / "docker-credential-vault"
    helper.write_text('#!/bin/sh\nread host; echo "{\\"Username\\": \\"$1\\", \\"Secret\\": \\"$host\\"}"\n')
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (folder / "config.json").write_text(json.dumps({"credHelpers": {"registry.example": "vault"}}))
    assert credentials("registry.example", environ) == ("get", "registry.example")
    (folder / "config.json").write_text(json.dumps({"credsStore": "vault"}))
    assert credentials("registry.example", environ) == ("get", "registry.example")
    token = {"auths": {"registry.example": {"auth": "MDA6", "identitytoken": "x"}}}
    (folder / "config.json").write_text(json.dumps(token))
    assert credentials("registry.example", environ) == (IDENTITY, "x")
    (folder / "config.json").write_text(json.dumps({"credHelpers": {"registry.example": "nobody"}}))
    assert "docker-credential-nobody" in refusal(credentials, "registry.example", environ)
    for broken in ("{", "[]", '{"auths": {"registry.example": {"auth": "%%%"}}}'):
        (folder / "config.json").write_text(broken)
        assert "docker login registry.example" in refusal(credentials, "registry.example", environ)


# Names


@pytest.mark.parametrize(
    ("text", "url", "repository"),
    [
        ("localhost:5000", "http://localhost:5000/v2/", "cpu-vllm"),
        ("127.0.0.1:5000/team", "http://127.0.0.1:5000/v2/", "team/cpu-vllm"),
        ("[::1]:5000", "http://[::1]:5000/v2/", "cpu-vllm"),
        ("Registry.Example", "https://registry.example/v2/", "cpu-vllm"),
        ("registry.example/a/b/", "https://registry.example/v2/", "a/b/cpu-vllm"),
        ("https://localhost/a", "https://localhost/v2/", "a/cpu-vllm"),
        ("http://registry.lan:80", "http://registry.lan:80/v2/", "cpu-vllm"),
    ],
)
def test_a_registry_is_host_and_path(text: str, url: str, repository: str) -> None:
    registry = Registry.read(text)
    assert (registry.url, registry.repository("cpu-vllm")) == (url, repository)


@pytest.mark.parametrize(
    "text", ["", "a b", "ftp://a", "host/Team", "host:port", "user:pw@host", "host/a//b/../c"]
)
def test_what_is_no_registry_is_said(text: str) -> None:
    assert "is no registry" in refusal(Registry.read, text)


def test_without_a_registry_the_variable_is_named() -> None:
    assert "DRYDOCK_REGISTRY" in refusal(publish.registries, {})
    places = publish.registries({"DRYDOCK_REGISTRY": "localhost:5000 mirror.example/x"})
    assert [str(place) for place in places] == ["localhost:5000", "mirror.example/x"]


# A registry that others use


@pytest.fixture
def distribution(tmp_path: Path) -> Iterator[str]:
    """Debian's docker-registry."""
    with debian_registry(tmp_path) as host:
        yield host


def test_debians_registry_takes_and_gives_images(
    distribution: str, store: Store, built: Built, checkout: Path, other: Store
) -> None:
    pushed = send(store, built, f"{distribution}/team")
    assert (pushed.uploaded, pushed.reference) == (4, f"{distribution}/team/cpu-vllm:20261123-1")
    assert send(store, built, f"{distribution}/team").there == 4
    pulled, _, _ = take(checkout, other, f"{distribution}/team")
    assert pulled == built
    is_clean(other)
    second = image(store, "cpu-sglang", noise(2, LARGE), noise(5))
    assert send(store, second, f"{distribution}/team", others=[built]).mounted == 1


def test_debians_registry_goes_on_with_an_upload(
    distribution: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = image(store, "one", noise(2, LARGE))
    broken: list[int] = []
    reads = iter([True, True, False])
    monkeypatch.setattr(registry, "PIECE", CHUNK)
    piece = registry._Upload._piece

    def broken_once(self: Any, end: int) -> Iterator[bytes]:
        for data in piece(self, end):
            if self.path.name == one.layers[0].digest and not broken and not next(reads):
                broken.append(self.sent)
                raise httpx.WriteError("the cable was pulled")
            yield data

    monkeypatch.setattr(registry._Upload, "_piece", broken_once)
    pushed = send(store, one, distribution)
    assert pushed.uploaded == 2
    assert broken
    assert pushed.sent == one.size + store.path(one.config_digest).stat().st_size, "no piece was sent twice"
    assert send(store, one, distribution).there == 2


def test_a_killed_push_and_pull_leave_nothing_half_done(
    distribution: str, store: Store, checkout: Path
) -> None:
    """The real program, ended in the middle."""
    large = image(store, "cpu-vllm", *(noise(number, 8 * CHUNK) for number in range(8)))
    write_record(checkout, large)
    script = (
        "import sys; from pathlib import Path; from drydock import publish; from drydock.oci import read_manifest;"
        "from drydock.store import Store; from drydock.registry import Registry; import json;"
        "what, host, root, digest, config = sys.argv[1:];"
        "store = Store(Path(root)); path = store.path;"
        "built = None if what == 'pull' else read_manifest('cpu-vllm', digest,"
        " json.loads(path(digest).read_bytes()), json.loads(path(config).read_bytes()));"
        "publish.push(store, built, Registry.read(host), {}) if what == 'push' else"
        " publish.pull(Path(root).parent, store, 'cpu-vllm', [Registry.read(host)], {})"
    )
    user = Store(checkout / "user")
    for what, place in (("push", store), ("pull", user)):
        for after in (0.35, 0.4, 0.45, 0.5, 60):
            command = [sys.executable, "-c", script, what, distribution, str(place.root), large.digest]
            process = subprocess.Popen([*command, large.config_digest], stderr=subprocess.PIPE)
            try:
                process.communicate(timeout=after)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            is_clean(place)
        assert process.returncode == 0
    assert read_image(user, "cpu-vllm") == large

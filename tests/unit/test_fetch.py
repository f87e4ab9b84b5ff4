"""Fetching from a real server on loopback, with what can go wrong on the way."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_server import Fault, Hang, IndexServer, NoEnd, Status, Truncate, WrongRange

from drydock import fetch as fetch_module
from drydock.errors import DrydockError, OutOfSpace
from drydock.fetch import FetchReport, fetch
from drydock.indexes import Indexes, Location, read_indexes
from drydock.locks import Artifact
from drydock.store import Store, sha256_file
from drydock.transfer import CONNECTIONS, Patience

QUICK = Patience(attempts=3, backoff=0.01, connect=1.0, read=0.5)
SECRET = "hunter2"


def payload(seed: str, size: int = 300_000) -> bytes:
    return random.Random(seed).randbytes(size)


def wheel(name: str, data: bytes, version: str = "1.0") -> Artifact:
    return Artifact(
        kind="wheel",
        name=name,
        version=version,
        filename=f"{name}-{version}-py3-none-any.whl",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
    )


def deb(name: str, data: bytes, archive: str = "debian") -> Artifact:
    filename = f"{name}_1.0+b1_amd64.deb"
    return Artifact(
        kind="deb",
        name=name,
        version="1.0+b1",
        filename=filename,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        source=f"{archive}/pool/main/{name[0]}/{name}/{filename}",
    )


def of(*addresses: str, tool: str = "pip", **more: Any) -> Indexes:
    places = tuple(Location(url=address, tool=tool, setting="test") for address in addresses)  # type: ignore[arg-type]
    return Indexes(indexes=places, **more)


def get(store: Store, artifacts: list[Artifact], indexes: Indexes, **more: Any) -> tuple[FetchReport, str]:
    """Fetch, and give the report and what progress said."""
    stream = io.StringIO()
    more = {"mirrors": {}, "patience": QUICK} | more
    return fetch(store, artifacts, indexes, stream=stream, **more), stream.getvalue()


def refusal(store: Store, artifacts: list[Artifact], indexes: Indexes, **more: Any) -> str:
    """Fetch what must fail, and give the one line."""
    with pytest.raises(DrydockError) as caught:
        get(store, artifacts, indexes, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message


def check_blobs(store: Store) -> None:
    """No blob is ever in the store under a hash that is not its own."""
    for path in store.blobs.iterdir():
        assert sha256_file(path) == path.name


@pytest.fixture
def server() -> Iterator[IndexServer]:
    with IndexServer() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    check_blobs(made)


@pytest.mark.parametrize("html", [True, False])
def test_a_lock_works_unchanged_through_mirrors_that_each_have_some(
    server: IndexServer, store: Store, html: bool
) -> None:
    server.html = html
    artifacts = []
    with IndexServer() as other:
        for number in range(12):
            data = payload(f"p{number}", 1000 + number)
            artifacts.append(wheel(f"p{number}", data))
            (server if number % 3 else other).add(f"p{number}", artifacts[-1].filename, data)
        report, _ = get(store, artifacts, of(server.simple, other.simple))
    assert (report.fetched, report.present) == (12, 0)
    assert report.received == sum(artifact.size for artifact in artifacts)
    for artifact in artifacts:
        assert sha256_file(store.root / "wheels" / artifact.filename) == artifact.sha256
    asked = len(server.requests)
    again, said = get(store, artifacts, of(server.simple))
    assert (again.fetched, again.present, len(server.requests), said) == (0, 12, asked, "")
    assert not list(store.tmp.iterdir())


def test_sdists_are_found_by_their_own_file_name(server: IndexServer, store: Store) -> None:
    data = payload("sdist")
    name = "antlr4-python3-runtime"
    artifact = Artifact(
        kind="sdist", name=name, version="4.9.3", filename=f"{name}-4.9.3.tar.gz",
        sha256=hashlib.sha256(data).hexdigest(), size=len(data),
    )  # fmt: skip
    server.add(name, artifact.filename, data)
    get(store, [artifact], of(server.simple))
    assert store.has(artifact.sha256, artifact.size)
    assert not (store.root / "wheels").exists()


def test_directories_are_asked_before_any_network(server: IndexServer, store: Store, tmp_path: Path) -> None:
    one, two, three = (payload(name) for name in ("one", "two", "three"))
    links, simple = tmp_path / "links", tmp_path / "simple"
    links.mkdir()
    (links / wheel("one", one).filename).write_bytes(one)
    (simple / "two").mkdir(parents=True)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / wheel("two", two).filename).write_bytes(two)
    name = wheel("two", two).filename
    (simple / "two" / "index.html").write_text(f'<a href="../../files/{name}#sha256=">{name}</a>')
    page = tmp_path / "links.html"
    page.write_text(f'<a href="files/{wheel("three", three).filename}">three</a>')
    (tmp_path / "files" / wheel("three", three).filename).write_bytes(three)
    environ = {
        "HOME": str(tmp_path),
        "UV_DEFAULT_INDEX": server.simple,
        "PIP_FIND_LINKS": f"{links} {page} {tmp_path / 'not-there'}",
        "PIP_EXTRA_INDEX_URL": f"{simple.as_uri()} {(tmp_path / 'nor-there').as_uri()}",
    }
    indexes = read_indexes(environ, etc=tmp_path)
    artifacts = [wheel("one", one), wheel("two", two), wheel("three", three)]
    get(store, artifacts, indexes)
    assert server.requests == []
    message = refusal(store, [wheel("four", b"4")], read_indexes(environ | {"UV_OFFLINE": "1"}, etc=tmp_path))
    assert server.requests == []
    assert "four 1.0 (four-1.0-py3-none-any.whl) is not on this machine" in message
    assert f"{server.host} not asked, offline" in message


def test_a_truncated_download_is_resumed_by_range(server: IndexServer, store: Store) -> None:
    artifact = wheel("big", data := payload("big"))
    server.add("big", artifact.filename, data)
    server.faults[artifact.filename] = [Truncate(100_000), Truncate(50_000)]
    report, said = get(store, [artifact], of(server.simple))
    assert server.ranges_of(artifact.filename) == [None, "bytes=100000-", "bytes=150000-"]
    assert (report.received, report.retries) == (artifact.size, 2)
    assert "attempt 2 of 3" in said


def test_a_break_after_the_last_byte_costs_nothing(server: IndexServer, store: Store) -> None:
    artifact = wheel("big", data := payload("big"))
    server.add("big", artifact.filename, data)
    server.faults[artifact.filename] = [NoEnd()]
    report, _ = get(store, [artifact], of(server.simple))
    assert (report.received, report.retries) == (artifact.size, 1)
    assert server.ranges_of(artifact.filename) == [None]


def test_a_part_that_is_complete_is_not_asked_for(server: IndexServer, store: Store) -> None:
    artifact = wheel("big", data := payload("big"))
    server.add("big", artifact.filename, data)
    (store.tmp / f"{artifact.sha256}.part").write_bytes(data)
    report, _ = get(store, [artifact], of(server.simple))
    assert (report.received, report.resumed) == (0, artifact.size)
    assert server.requests == []


@pytest.mark.parametrize("trick", ["ignores", "wrong"])
def test_a_server_that_cannot_resume_sends_all_again(server: IndexServer, store: Store, trick: str) -> None:
    artifact = wheel("big", data := payload("big"))
    server.add("big", artifact.filename, data)
    server.ranges = trick == "wrong"
    server.faults[artifact.filename] = [Truncate(100_000), *([WrongRange()] if trick == "wrong" else [])]
    report, _ = get(store, [artifact], of(server.simple))
    assert server.ranges_of(artifact.filename)[:2] == [None, "bytes=100000-"]
    assert report.received == artifact.size + 100_000


def test_a_part_of_other_bytes_is_thrown_away_once(server: IndexServer, store: Store) -> None:
    artifact = wheel("big", data := payload("big"))
    server.add("big", artifact.filename, data)
    for junk in (b"x" * 1000, b"x" * artifact.size, b"x" * (artifact.size + 1)):
        store.discard(artifact.sha256)
        (store.tmp / f"{artifact.sha256}.part").write_bytes(junk)
        get(store, [artifact], of(server.simple))
        assert store.has(artifact.sha256, artifact.size)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 5000),
    faults=st.lists(
        st.one_of(
            st.builds(Truncate, st.integers(0, 5000)),
            st.just(Status(503)),
            st.just(Status(429, {"Retry-After": "0"})),
            st.just(WrongRange()),
        ),
        max_size=4,
    ),
    ranges=st.booleans(),
    left=st.one_of(st.just(b""), st.binary(max_size=50)),
)
def test_whatever_the_server_does_the_blob_is_right(
    tmp_path: Path, size: int, faults: list[Fault], ranges: bool, left: bytes
) -> None:
    artifact = wheel("any", data := payload("any", size))
    store = Store(tmp_path / f"store-{time.monotonic_ns()}")
    with IndexServer() as server:
        server.ranges = ranges
        server.add("any", artifact.filename, data)
        server.faults[artifact.filename] = list(faults)
        if left:
            (store.tmp / f"{artifact.sha256}.part").write_bytes(left)
        get(store, [artifact], of(server.simple), patience=Patience(attempts=8, backoff=0.001))
    assert store.path(artifact.sha256).read_bytes() == data
    assert not list(store.tmp.iterdir())


def test_wrong_bytes_are_refused_by_name_and_the_next_place_asked(server: IndexServer, store: Store) -> None:
    artifact = wheel("six", data := payload("six"))
    tampered = payload("tampered")
    server.add("six", artifact.filename, tampered)
    server.listed[artifact.filename] = "none"
    with IndexServer() as other:
        other.add("six", artifact.filename, data)
        _, said = get(store, [artifact], of(server.simple, other.simple))
    found = hashlib.sha256(tampered).hexdigest()
    assert f"six 1.0 ({artifact.filename}): refused: {server.simple} serves sha256:{found}" in said
    assert f"locked is sha256:{artifact.sha256}" in said


@pytest.mark.parametrize("how", ["listed", "served", "longer", "directory"])
def test_if_nobody_has_the_right_bytes_the_line_says_what_was_found(
    server: IndexServer, store: Store, tmp_path: Path, how: str
) -> None:
    artifact = wheel("six", payload("six"))
    tampered = payload("tampered", artifact.size + (how == "longer"))
    found = hashlib.sha256(tampered).hexdigest()
    if how == "directory":
        (tmp_path / artifact.filename).write_bytes(tampered)
    else:
        server.add("six", artifact.filename, tampered)
    if how != "listed":
        server.listed[artifact.filename] = "none"
    place = str(tmp_path) if how == "directory" else server.simple
    message = refusal(store, [artifact], of(tmp_path.as_uri() if how == "directory" else server.simple))
    what = f"{artifact.size + 1} bytes" if how == "longer" else f"sha256:{found}"
    assert f"six 1.0 ({artifact.filename}) is refused" in message
    assert f"{place} {'lists' if how == 'listed' else 'serves'} {what}" in message
    assert f"locked is sha256:{artifact.sha256}" in message
    assert (server.ranges_of(artifact.filename) == []) == (how in ("listed", "directory"))
    assert not store.has(artifact.sha256)
    assert not list(store.tmp.iterdir())


@pytest.mark.parametrize("fault", [Status(503), Status(429, {"Retry-After": "0"}), Hang(0.7)])
def test_a_fault_that_passes_is_waited_for(server: IndexServer, store: Store, fault: Fault) -> None:
    artifact = wheel("six", data := payload("six"))
    server.add("six", artifact.filename, data)
    server.faults = {"six": [fault], artifact.filename: [fault]}
    report, said = get(store, [artifact], of(server.simple))
    assert report.retries == 2
    assert f"six on {server.simple}: {server.host}" in said
    assert "in 0.0 s" in said


def test_retry_after_is_heeded(server: IndexServer, store: Store) -> None:
    artifact = wheel("six", data := payload("six"))
    server.add("six", artifact.filename, data)
    server.faults[artifact.filename] = [Status(429, {"Retry-After": "1"})]
    report, said = get(store, [artifact], of(server.simple))
    assert report.seconds >= 1
    assert f"{server.host} answers 429; attempt 2 of 3 in 1.0 s" in said


def test_steady_faults_end_in_bounded_time_and_the_rest_is_fetched(server: IndexServer, store: Store) -> None:
    artifacts = []
    for number in range(3):
        data = payload(f"p{number}", 1000 + number)
        artifacts.append(wheel(f"p{number}", data))
        server.add(f"p{number}", artifacts[-1].filename, data)
    server.steady = {artifacts[0].filename: Status(503), artifacts[1].filename: Truncate(0)}
    began = time.monotonic()
    message = refusal(store, artifacts, of(server.simple))
    assert time.monotonic() - began < 5
    assert message.endswith("(and 1 more)")
    assert "cannot be fetched" in message
    assert len(server.ranges_of(artifacts[0].filename)) == QUICK.attempts
    assert store.has(artifacts[2].sha256)


def test_a_server_in_trouble_is_not_asked_for_everything(server: IndexServer, store: Store) -> None:
    artifacts = [wheel(f"p{number}", payload(str(number), 100)) for number in range(40)]
    server.steady = {artifact.name: Status(503) for artifact in artifacts}
    message = refusal(store, artifacts, of(server.simple))
    assert f"{server.host} answers 503" in message
    assert message.endswith("(and 39 more)")
    assert len(server.requests) <= 2 * fetch_module.FAILURES_IN_A_ROW * QUICK.attempts


def test_a_download_that_gets_on_is_not_given_up(server: IndexServer, store: Store) -> None:
    artifact = wheel("huge", data := payload("huge", 6 << 20))
    server.add("huge", artifact.filename, data)
    server.faults[artifact.filename] = [Truncate(1 << 20)] * 5
    report, _ = get(store, [artifact], of(server.simple), patience=Patience(attempts=2, backoff=0.01))
    assert report.received == artifact.size


def test_no_network_is_one_line_with_the_host(store: Store) -> None:
    with IndexServer() as server:
        gone = server.url
    artifacts = [wheel(f"p{number}", payload(str(number), 100)) for number in range(30)]
    address = gone.replace("//", f"//ann:{SECRET}@")
    stream = io.StringIO()
    with pytest.raises(DrydockError) as caught:
        fetch(store, artifacts, of(f"{gone}/simple"), {}, stream=stream, patience=QUICK)
    message = str(caught.value)
    # Only those that ran at the time tried again; the others know that the host is gone.
    assert stream.getvalue().count("; attempt ") <= CONNECTIONS * (QUICK.attempts - 1)
    assert f"{gone.removeprefix('http://')} cannot be reached" in message
    assert "check the network and the proxy" in message
    assert message.endswith("(and 29 more)")
    line = refusal(store, [deb("tini", b"x")], of(), mirrors={"debian": [address]})
    assert SECRET not in line
    assert "set DRYDOCK_DEBIAN_MIRROR to a mirror" in line


def test_an_index_without_the_artifact_says_who_was_asked_and_what_to_do(
    server: IndexServer, store: Store, tmp_path: Path
) -> None:
    server.add("six", "six-0.9-py3-none-any.whl", b"older")
    message = refusal(store, [wheel("six", b"x")], of(server.simple, tmp_path.as_uri()))
    assert "six 1.0 (six-1.0-py3-none-any.whl) is not" in message
    assert server.simple in message
    assert str(tmp_path) in message
    assert "UV_FIND_LINKS" in message
    assert "no index is configured" in refusal(store, [wheel("six", b"x")], Indexes())


def test_credentials_reach_the_server_and_never_a_message(
    server: IndexServer, store: Store, tmp_path: Path
) -> None:
    server.credentials = ("ann", SECRET)
    six, none = wheel("six", data := payload("six")), wheel("none", b"x")
    server.add("six", six.filename, data)
    server.faults[six.filename] = [Status(503)]
    environ = {"HOME": str(tmp_path), "UV_DEFAULT_INDEX": server.simple.replace("//", f"//ann:{SECRET}@")}
    _, said = get(store, [six], read_indexes(environ, etc=tmp_path))
    assert SECRET not in said
    for word in (SECRET, "wrong-" + SECRET):
        environ = {"HOME": str(tmp_path), "PIP_INDEX_URL": server.simple.replace("//", f"//ann:{word}@")}
        message = refusal(store, [none], read_indexes(environ, etc=tmp_path))
        assert SECRET not in message
        assert ("denies access" in message) == (word != SECRET)
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login ann password {SECRET}\n")
    store.discard(six.sha256)
    get(store, [six], read_indexes({"HOME": str(tmp_path), "UV_DEFAULT_INDEX": server.simple}, etc=tmp_path))
    # A mirror's credentials travel in its address.
    tini = deb("tini", data)
    server.raw[f"/{tini.source}"] = data
    with_secret = f"{server.url}/debian".replace("//", f"//ann:{SECRET}@")
    store.discard(six.sha256)
    get(store, [tini], of(), mirrors={"debian": [with_secret]})
    assert SECRET not in refusal(store, [deb("gone", b"g")], of(), mirrors={"debian": [with_secret]})


def test_an_index_of_a_private_authority(store: Store, tmp_path: Path) -> None:
    """TLS with a certificate that nobody trusts, until SSL_CERT_FILE names it."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    try:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", key, "-out", certificate),
            ],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate with")
    artifact = wheel("six", data := payload("six"))
    with IndexServer() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
        server.add("six", artifact.filename, data)
        simple = server.simple.replace("http:", "https:")
        environ = {"HOME": str(tmp_path), "UV_DEFAULT_INDEX": simple}
        message = refusal(store, [artifact], read_indexes(environ, etc=tmp_path))
        assert "untrusted certificate: set SSL_CERT_FILE" in message
        get(store, [artifact], read_indexes(environ | {"PIP_CERT": str(certificate)}, etc=tmp_path))
        assert store.has(artifact.sha256)


def test_debs_come_from_mirrors_and_pools_and_flat_directories(
    server: IndexServer, store: Store, tmp_path: Path
) -> None:
    debs = [deb("tini", payload("tini")), deb("libc6", payload("libc6")), deb("bash", payload("bash"))]
    server.raw[f"/{debs[0].source}"] = payload("tini")
    pool = tmp_path / "pool-mirror" / debs[1].source.removeprefix("debian/")
    pool.parent.mkdir(parents=True)
    pool.write_bytes(payload("libc6"))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / debs[2].filename).write_bytes(payload("bash"))
    mirrors = {
        "debian": [(tmp_path / "flat").as_uri(), (tmp_path / "pool-mirror").as_uri(), f"{server.url}/debian"]
    }
    get(store, debs, of(), mirrors=mirrors)
    assert all(store.has(each.sha256, each.size) for each in debs)


def test_a_deb_that_mirrors_dropped_names_the_two_ways_on(server: IndexServer, store: Store) -> None:
    message = refusal(store, [deb("libssl3", b"s")], of(), mirrors={"debian": [f"{server.url}/debian"]})
    assert message.startswith(f"libssl3 1.0+b1 (libssl3_1.0+b1_amd64.deb) is not on {server.url}/debian")
    assert "Debian mirrors drop a version once a newer one is out" in message
    assert "set DRYDOCK_DEBIAN_MIRROR to the base of a snapshot archive" in message
    assert "drydock lock --upgrade libssl3" in message
    security = deb("libssl3", b"s", "debian-security")
    message = refusal(store, [security], of(), mirrors={"debian": [f"{server.url}/debian"]})
    assert "no mirror of debian-security is known" in message
    assert "DRYDOCK_DEBIAN_SECURITY_MIRROR" in message


FETCHER = """
import signal
import sys
from pathlib import Path
from drydock.fetch import fetch; from drydock.transfer import Patience
from drydock.indexes import Indexes, Location
from drydock.locks import Artifact
from drydock.store import Store

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
root, simple, *words = sys.argv[1:]
artifacts = [
    Artifact(
        kind="wheel", name=n, version="1.0", filename=f"{n}-1.0-py3-none-any.whl", sha256=sha, size=int(size)
    )
    for n, sha, size in (word.split(":") for word in words)
]
indexes = Indexes(indexes=(Location(url=simple, tool="uv", setting="test"),))
report = fetch(Store(Path(root)), artifacts, indexes, {})
print(report.fetched, report.received)
"""


def other_process(store: Store, server: IndexServer, artifacts: list[Artifact]) -> subprocess.Popen[str]:
    words = [f"{artifact.name}:{artifact.sha256}:{artifact.size}" for artifact in artifacts]
    return subprocess.Popen(
        [sys.executable, "-c", FETCHER, str(store.root), server.simple, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_is_resumed(server: IndexServer, store: Store, sign: signal.Signals) -> None:
    artifacts = []
    for number in range(3):
        data = payload(f"p{number}", 2_000_000 + number)
        artifacts.append(wheel(f"p{number}", data))
        server.add(f"p{number}", artifacts[-1].filename, data)
    server.rate = 1_000_000
    process = other_process(store, server, artifacts)
    parts = [store.tmp / f"{artifact.sha256}.part" for artifact in artifacts]
    wait_until(lambda: all(part.exists() and part.stat().st_size > 300_000 for part in parts))
    process.send_signal(sign)
    began = time.monotonic()
    process.communicate(timeout=10)
    assert time.monotonic() - began < 3
    assert process.returncode != 0
    assert not any(store.has(artifact.sha256) for artifact in artifacts)
    left = sum(part.stat().st_size for part in parts)
    server.rate = None
    server.requests.clear()
    report, said = get(store, artifacts, of(server.simple))
    assert report.resumed == left
    assert report.received == sum(artifact.size for artifact in artifacts) - left
    assert all(str(server.ranges_of(artifact.filename)[0]).startswith("bytes=") for artifact in artifacts)
    assert "resumed at" in said
    assert all(store.has(artifact.sha256, artifact.size) for artifact in artifacts)


@pytest.mark.parametrize("what", ["server", "process"])
def test_an_interrupt_waits_for_nobody(server: IndexServer, store: Store, what: str) -> None:
    """Neither for a server that hangs nor for another process that holds an artifact."""
    six, other = wheel("six", payload("six")), wheel("other", payload("other"))
    server.steady = {"six": Hang(25)}
    with store.lock(f"fetch-{other.sha256[:16]}"):
        process = other_process(store, server, [six, *([other] if what == "process" else [])])
        wait_until(lambda: server.requests)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.communicate(timeout=10)
        assert time.monotonic() - began < 5
        assert process.returncode != 0


def test_two_fetches_at_once_share_the_work(server: IndexServer, store: Store) -> None:
    artifacts = []
    for number in range(12):
        data = payload(f"p{number}", 200_000 + number)
        artifacts.append(wheel(f"p{number}", data))
        server.add(f"p{number}", artifacts[-1].filename, data)
    server.rate = 1_000_000
    processes = [other_process(store, server, artifacts) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    received = [int(out.split()[1]) for out, _ in outputs]
    assert sum(received) == sum(artifact.size for artifact in artifacts)
    assert all(store.has(artifact.sha256, artifact.size) for artifact in artifacts)
    assert not list(store.tmp.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs root and the right to mount, for a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_too_small_is_said_before_anything_is_fetched(server: IndexServer, small_disk: Path) -> None:
    artifact = wheel("big", data := payload("big", 3_000_000))
    server.add("big", artifact.filename, data)
    with pytest.raises(OutOfSpace, match=r"1 artifact\(s\) need 3\.0 MB .* DRYDOCK_STORE"):
        get(Store(small_disk), [artifact], of(server.simple))
    assert server.requests == []


def test_a_disk_that_fills_up_on_the_way(
    server: IndexServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone else takes the space after the check; the next run, with room again, goes on from there."""
    artifacts = []
    for number in range(2):
        data = payload(f"p{number}", 460_000 + number)
        artifacts.append(wheel(f"p{number}", data))
        server.add(f"p{number}", artifacts[-1].filename, data)
    store = Store(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(600_000))
    monkeypatch.setattr(fetch_module, "_check_room", lambda *_: None)
    with pytest.raises(OutOfSpace, match="no space left under"):
        get(store, artifacts, of(server.simple))
    check_blobs(store)
    ballast.unlink()
    report, _ = get(store, artifacts, of(server.simple))
    assert all(store.has(artifact.sha256, artifact.size) for artifact in artifacts)
    assert report.resumed > 0
    check_blobs(store)


def test_a_blob_of_the_wrong_size_is_fetched_again(server: IndexServer, store: Store) -> None:
    artifact = wheel("six", data := payload("six"))
    server.add("six", artifact.filename, data)
    store.path(artifact.sha256).write_bytes(data[:100])
    get(store, [artifact], of(server.simple))
    assert store.path(artifact.sha256).read_bytes() == data


def test_a_fault_of_ours_is_raised_and_no_thread_hangs(
    server: IndexServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, bad = wheel("slow", data := payload("slow", 3_000_000)), wheel("bad", payload("bad"))
    server.add("slow", slow.filename, data)
    server.add("bad", bad.filename, payload("bad"))
    server.rate = 1_000_000
    adopt = store.adopt

    def broken(path: Path, digest: str) -> None:
        if digest == bad.sha256:
            raise RuntimeError("a fault of ours")
        adopt(path, digest)

    monkeypatch.setattr(store, "adopt", broken)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="a fault of ours"):
        get(store, [slow, bad], of(server.simple))
    assert time.monotonic() - began < 2.5
    wait_until(lambda: not [each for each in threading.enumerate() if each.name.startswith("fetch-")], 5)


def test_a_redirect_to_another_host_carries_no_credentials(server: IndexServer, store: Store) -> None:
    artifact = wheel("six", data := payload("six"))
    with IndexServer() as other:
        other.add("six", artifact.filename, data)
        server.credentials = ("ann", SECRET)
        server.add("six", artifact.filename, data)
        elsewhere = {"Location": f"{other.url}/files/{artifact.filename}"}
        server.faults[artifact.filename] = [Status(302, elsewhere)]
        place = Location(url=server.simple, tool="uv", setting="test", auth=("ann", SECRET))
        get(store, [artifact], Indexes(indexes=(place,)))
        assert [request.authorization for request in other.requests] == [None]


@pytest.mark.network
def test_the_users_own_index_has_six(store: Store) -> None:
    """The bytes of one small wheel from whatever index this machine is configured for."""
    artifact = Artifact(
        kind="wheel",
        name="six",
        version="1.17.0",
        filename="six-1.17.0-py2.py3-none-any.whl",
        sha256="4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274",
        size=11050,
    )
    try:
        get(store, [artifact], read_indexes(os.environ))
    except DrydockError as error:
        if "cannot be reached" in str(error) or "not asked, offline" in str(error):
            pytest.skip(str(error))
        raise
    assert store.has(artifact.sha256, artifact.size)

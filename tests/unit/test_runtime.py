"""Running an image: unpacking, the chroot runtime as root and as an ordinary user, Docker.

The image is made here of the Python that runs the tests, at the paths it has on this machine. Tests that
need a Docker engine are skipped without one, and fail where DRYDOCK_REQUIRE_DOCKER is set, as CI sets it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from docker.errors import APIError
from docker.models.containers import Container

from drydock import chroot_runtime, oci, runtime, unpack
from drydock import docker_runtime as docker_runtime_module
from drydock.chroot_runtime import ChrootRuntime
from drydock.errors import DrydockError
from drydock.namespaces import Bind
from drydock.oci import Built, Layer
from drydock.runtime import Runtime, Task
from drydock.store import Store

# A shell's background job, and what it starts, has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

SOURCE = Path(runtime.__file__).parents[1]
MACHINE_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners, other users")


# ---------------------------------------------------------------------------------- an image by hand


def member(name: str, content: bytes | None = None, **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mtime = oci.EPOCH
    info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    info.mode = 0o755 if content is None else 0o644
    info.size = len(content or b"")
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content or b""


def put_layer(store: Store, title: str, members: list[tuple[tarfile.TarInfo, bytes]]) -> Layer:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    blob = zstandard.ZstdCompressor(level=1).compress(plain.getvalue())
    return Layer(
        digest=store.put(blob),
        size=len(blob),
        diff_id=hashlib.sha256(plain.getvalue()).hexdigest(),
        unpacked=plain.tell(),
        title=title,
        contents=(),
        key="",
    )


def put_image(store: Store, *layers: Layer, architecture: str | None = None) -> Built:
    architecture = architecture or MACHINE_NAMES[os.uname().machine]
    environment = {"IMAGE": "yes", "PATH": "/usr/bin"}
    config = oci.canonical(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": [f"{name}={value}" for name, value in environment.items()]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
        }
    )
    config_digest = store.put(config)
    return Built(
        name="test-tiny",
        architecture=architecture,
        digest=store.put(oci.canonical(oci.manifest_document(config, config_digest, layers))),
        config_digest=config_digest,
        layers=layers,
        environment=environment,
    )


def python_members() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The interpreter, its standard library and its shared libraries, with `/usr/bin/python3` to start it; a shell."""
    program = Path(os.path.realpath(sys.executable))
    library = Path(sysconfig.get_paths()["stdlib"])
    tools = {name: Path(os.path.realpath(str(shutil.which(name)))) for name in ("sh", "env")}
    listed = subprocess.run(
        ["ldd", program, *tools.values()], capture_output=True, text=True, check=True
    ).stdout
    shared = {Path(word) for word in listed.split() if word.startswith("/") and not word.endswith(":")}
    unwanted = {"test", "site-packages", "dist-packages", "idlelib", "__pycache__", "lib2to3", "ensurepip"}
    sources: list[Path] = []
    for folder, names, files in os.walk(library):
        names[:] = sorted(name for name in names if name not in unwanted and not name.startswith("config-"))
        sources += [Path(folder, name) for name in sorted(files) if not name.endswith((".a", ".pyc"))]
    for name, mode in (("tmp", 0o1777), ("home/drydock", 0o755), ("usr/bin", 0o755), ("etc", 0o755)):
        yield member(name, mode=mode)
    for path in [program, *sorted(shared), *sources]:
        yield member(str(path)[1:], path.read_bytes(), mode=0o755)
    for name, path in tools.items():
        yield member(f"usr/bin/{name}", path.read_bytes(), mode=0o755)
    if program != Path("/usr/bin/python3"):
        yield member("usr/bin/python3", type=tarfile.SYMTYPE, linkname=str(program))
    # A resolver that an image brings is not the host's, and its link leads nowhere.
    yield member("etc/resolv.conf", type=tarfile.SYMTYPE, linkname="/run/nowhere/resolv.conf")


@pytest.fixture(scope="session")
def shared_folder() -> Iterator[Path]:
    """A folder that every user can reach, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="drydock-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    unpack.remove_tree(folder)


@pytest.fixture(scope="session")
def store(shared_folder: Path) -> Store:
    return Store(shared_folder / "store")


@pytest.fixture(scope="session")
def image(store: Store) -> Built:
    base = put_layer(store, "python", [*python_members(), member("etc/which", b"lower")])
    top = put_layer(store, "top", [member("etc"), member("etc/which", b"upper")])
    return put_image(store, base, top)


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    """A task that runs Python code in the image."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "hello").write_text("from the checkout")

    def make(code: str, *arguments: str, **more: object) -> Task:
        command = ("python3", "-S", "-c", code, *arguments)
        return Task(**{"command": command, "checkout": checkout, "results": tmp_path / "results", **more})  # type: ignore[arg-type]

    return make


@pytest.fixture
def docker_runtime() -> Runtime:
    try:
        return runtime.choose("docker")
    except DrydockError as error:
        if os.environ.get("DRYDOCK_REQUIRE_DOCKER"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")


@pytest.fixture(params=["chroot", "docker"])
def any_runtime(request: pytest.FixtureRequest, store: Store, image: Built) -> Runtime:
    chosen: Runtime = (
        ChrootRuntime() if request.param == "chroot" else request.getfixturevalue("docker_runtime")
    )
    chosen.prepare(store, image)
    return chosen


@pytest.fixture
def chroot(store: Store, image: Built) -> ChrootRuntime:
    chosen = ChrootRuntime()
    chosen.prepare(store, image)
    return chosen


# --------------------------------------------------------------------------------------- both runtimes


def test_exit_status_is_the_commands(
    any_runtime: Runtime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    assert any_runtime.run(store, image, task("raise SystemExit(7)")) == 7
    assert any_runtime.run(store, image, task("import os; os.kill(os.getpid(), 9)")) == 128 + 9
    assert any_runtime.run(store, image, task("", command=("no-such-program",))) == 127


def test_output_keeps_its_stream(
    any_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import sys; print('to out'); print('to err', file=sys.stderr)"
    assert any_runtime.run(store, image, task(code)) == 0
    captured = capfd.readouterr()
    assert captured.out == "to out\n"
    assert "to err\n" in captured.err


def test_inputs_are_seen_read_only_where_they_are_asked_for(
    any_runtime: Runtime, store: Store, image: Built, task: Callable[..., Task], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("a folder's")
    (tmp_path / "data").write_text("a file's")
    code = """
assert open("/inputs/model/config.json").read() == "a folder's"
assert open("/inputs/data").read() == "a file's"
for path in ("/inputs/data", "/inputs/model/new"):
    try:
        open(path, "w")
    except OSError as error:
        assert error.strerror == "Read-only file system", error
    else:
        raise AssertionError(path)
"""
    inputs = {"/inputs/model": tmp_path / "model", "/inputs/data": tmp_path / "data"}
    assert any_runtime.run(store, image, task(code, inputs=inputs)) == 0


def test_what_a_command_sees(
    any_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OF_THE_HOST", "1")
    code = """
import json, os, tempfile
def error(path):
    try:
        open(path, "w")
    except OSError as error:
        return error.strerror
json.dump({
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "hello": open("/drydock/hello").read(),
    "write": error("/drydock/new"),
    "which": open("/etc/which").read(),
    "resolver": len(open("/etc/resolv.conf").read()) >= 0,
    "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
    "shm": os.stat("/dev/shm").st_mode & 0o7777,
    "tmp": os.stat("/tmp").st_mode & 0o7777,
    "random": len(open("/dev/urandom", "rb").read(3)),
    "terminal": os.ttyname(os.openpty()[1]).startswith("/dev/pts/"),
    "root": sorted(os.listdir("/")),
    "user": os.getuid(),
}, open("/results/seen.json", "w"))
"""
    assert any_runtime.run(store, image, task(code, environment={"MORE": "of the task"})) == 0
    seen = json.loads((tmp_path / "results/seen.json").read_text())
    environment = seen.pop("environment")
    assert environment["IMAGE"] == "yes"
    assert environment["MORE"] == "of the task"
    assert environment["HOME"] == "/root"
    assert not {"OF_THE_HOST", "PYTHONPATH"} & set(environment)
    assert ".host" not in seen.pop("root")
    assert seen.pop("processes") <= 3
    assert seen == {
        "folder": "/results",
        "hello": "from the checkout",
        "write": "Read-only file system",
        "which": "upper",
        "resolver": True,
        "shm": 0o1777,
        "tmp": 0o1777,
        "random": 3,
        "terminal": True,
        "user": 0,
    }
    assert (tmp_path / "results/seen.json").stat().st_uid == os.geteuid()


@as_root
def test_the_ordinary_user_of_the_image(
    any_runtime: Runtime, store: Store, image: Built, task: Callable[..., Task], tmp_path: Path
) -> None:
    code = "import os; open('/results/mine', 'w').write(f'{os.getuid()} {os.getgid()} ' + os.environ['HOME'])"
    assert any_runtime.run(store, image, task(code, user="drydock")) == 0
    assert (tmp_path / "results/mine").read_text() == "1000 1000 /home/drydock"
    assert (tmp_path / "results/mine").stat().st_uid == 1000


def test_changes_stay_in_one_run(
    any_runtime: Runtime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    assert any_runtime.run(store, image, task("open('/etc/which', 'w').write('changed')")) == 0
    check = "raise SystemExit(open('/etc/which').read() != 'upper')"
    assert any_runtime.run(store, image, task(check)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_and_all_it_started(
    any_runtime: Runtime,
    number: signal.Signals,
    running: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    process = running(any_runtime.name)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    # The command was asked and not only killed: it had the time to say so.
    assert "asked to end" in output
    assert process.returncode in (128 + number, -number)
    assert not alive(tmp_path)


# ------------------------------------------------------------------------------------------ chroot only

HOST_PROGRAM = """
import sys
from pathlib import Path
from typing import Any
from drydock import oci, runtime
from drydock.store import Store
from drydock.errors import DrydockError
store = Store(Path(sys.argv[2]))
image = oci.read_image(store, "test-tiny")
chosen = runtime.choose(sys.argv[1])
task = runtime.Task(command=tuple(sys.argv[5:]), checkout=Path(sys.argv[3]), results=Path(sys.argv[4]))
try:
    chosen.prepare(store, image)
    status = chosen.run(store, image, task)
except DrydockError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
sys.exit(status)
"""

# Starts a daemon, says that it runs, and ends neatly when it is asked to.
LONG = """
import os, signal, subprocess, sys, time
def end(number, frame):
    print("asked to end", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
subprocess.Popen(["python3", "-S", "-c", "import time; time.sleep(600)", sys.argv[1]], start_new_session=True)
print("running", flush=True)
time.sleep(600)
"""


def record(store: Store, built: Built) -> None:
    keys = {"diff-id": "diff_id"}
    names = ("digest", "size", "diff-id", "unpacked", "title", "contents", "key")
    store.write_record(
        "images",
        built.name,
        {
            "architecture": built.architecture,
            "digest": built.digest,
            "config-digest": built.config_digest,
            "environment": built.environment,
            "layers": [
                {name: getattr(layer, keys.get(name, name)) for name in names} for layer in built.layers
            ],
        },
    )


def host_command(name: str, store: Store, folder: Path, *command: str) -> list[str]:
    arguments = [name, str(store.root), str(folder), str(folder / "results"), *command]
    return [sys.executable, "-c", HOST_PROGRAM, *arguments]


HOST_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}


@pytest.fixture
def running(store: Store, image: Built, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts LONG in another process of drydock's; the test's folder among its arguments marks it."""
    record(store, image)
    started: list[subprocess.Popen[str]] = []

    def start(name: str) -> subprocess.Popen[str]:
        command = host_command(name, store, tmp_path, "python3", "-S", "-c", LONG, str(tmp_path))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=HOST_ENVIRONMENT)
        started.append(process)
        assert process.stdout
        # Output is live: it is here although the command still runs.
        assert process.stdout.readline() == "running\n"
        assert alive(tmp_path)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def alive(mark: Path) -> list[str]:
    """The processes with this folder among their arguments, but for the test's own and what it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if str(mark) in words and "-S" in words and HOST_PROGRAM not in words:
                found.append(f"{path.parent.name}: {words}")
    return found


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_nothing_outlives_the_command(
    chroot: ChrootRuntime, store: Store, image: Built, task: Callable[..., Task], tmp_path: Path
) -> None:
    code = """
import subprocess, sys
subprocess.Popen(["python3", "-S", "-c", "import time; time.sleep(600)", sys.argv[1]], start_new_session=True)
"""
    assert chroot.run(store, image, task(code, str(tmp_path))) == 0
    assert not alive(tmp_path)
    assert not list((store.root / "run").iterdir())


def test_nothing_outlives_a_killed_drydock(
    chroot: ChrootRuntime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    running: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    process = running("chroot")
    process.kill()
    process.wait()
    assert eventually(lambda: not alive(tmp_path)), alive(tmp_path)
    assert str(store.root) not in Path("/proc/self/mountinfo").read_text()
    assert list((store.root / "run").iterdir()), "this test expects a scratch folder that nobody removed"
    assert chroot.run(store, image, task("")) == 0
    assert not list((store.root / "run").iterdir())


# -------------------------------------------------------------------------- a container made ahead


def containers(tmp_path: Path) -> dict[str, str]:
    """Those that see this test's results: id -> state."""
    format_ = "{{.ID}} {{.State}} {{.Mounts}}"
    rows = subprocess.run(
        ["docker", "ps", "--all", "--no-trunc", "--format", format_],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {row.split()[0]: row.split()[1] for row in rows if str(tmp_path) in row}


def test_what_was_made_ahead_is_used_and_takes_its_command_then(
    docker_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    docker_runtime.prepare(store, image)
    docker_runtime.ahead(image, task(""))
    assert eventually(lambda: list(containers(tmp_path).values()) == ["running"])
    (made,) = containers(tmp_path)
    time.sleep(1.5)
    code = """
import os, socket, sys
print(socket.gethostname(), sys.stdin.read(), os.environ["WORDS"], sys.argv[1:])
print(float(open("/proc/uptime").read().split()[0]) - float(os.environ["DRYDOCK_TOLD"]))
raise SystemExit(7)
"""
    words = 'it\'s $HOME; `a` "b" \\ ünï\tend'
    assert docker_runtime.run(store, image, task(code, "x y", "*", "", environment={"WORDS": words})) == 7
    first, seconds = capfd.readouterr().out.splitlines()
    assert first == f"{made[:12]}  {words} ['x y', '*', '']"
    # It is as old as its command is, which is what a budget is for.
    assert 0 <= float(seconds) < 1
    assert eventually(lambda: not containers(tmp_path))
    # And is used once.
    assert docker_runtime.run(store, image, task("import socket; print(socket.gethostname())")) == 0
    assert capfd.readouterr().out.strip() != made[:12]


def test_what_was_made_ahead_ends_with_its_command_s_signal(
    docker_runtime: Runtime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    docker_runtime.prepare(store, image)
    docker_runtime.ahead(image, task(""))
    assert docker_runtime.run(store, image, task("import os; os.kill(os.getpid(), 9)")) == 128 + 9


@pytest.mark.parametrize("change", ["surroundings", "killed", "dismissed"])
def test_what_was_made_ahead_and_is_not_used_is_removed(
    docker_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    tmp_path: Path,
    change: str,
) -> None:
    docker_runtime.prepare(store, image)
    docker_runtime.ahead(image, task(""))
    assert eventually(lambda: list(containers(tmp_path).values()) == ["running"])
    more: dict[str, object] = {}
    if change == "surroundings":
        more = {"user": "drydock", "results": tmp_path / "others"}
    elif change == "killed":
        subprocess.run(["docker", "kill", *containers(tmp_path)], capture_output=True, check=True)
    else:
        docker_runtime.dismiss()
    assert docker_runtime.run(store, image, task("raise SystemExit(3)", **more)) == 3
    assert eventually(lambda: not containers(tmp_path))


def test_what_was_made_ahead_is_used_over_tls(
    docker_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with an engine in a container of its own, beside a CI job's."""
    docker_runtime.prepare(store, image)
    with tls_engine(tmp_path / "certificates") as port:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{port}")
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        # requests prefers these to the authority that its caller names.
        monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
        monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path / "certificates"))
        over_tls = runtime.choose("docker")
        over_tls.ahead(image, task(""))
        assert eventually(lambda: list(containers(tmp_path).values()) == ["running"])
        (made,) = containers(tmp_path)
        code = "import socket; print(socket.gethostname()); raise SystemExit(3)"
        assert over_tls.run(store, image, task(code)) == 3
        assert capfd.readouterr().out == f"{made[:12]}\n"
        assert eventually(lambda: not containers(tmp_path))


@contextlib.contextmanager
def tls_engine(folder: Path) -> Iterator[int]:
    """The engine of this machine over TLS: its port on 127.0.0.1, with a client's files in the folder."""
    folder.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=engine",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        capture_output=True, check=True,
    )  # fmt: skip
    shutil.copy(folder / "cert.pem", folder / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as engine:
                engine.connect("/var/run/docker.sock")
                client = context.wrap_socket(self.request, server_side=True)
                back = threading.Thread(target=pump, args=(engine, client))
                back.start()
                pump(client, engine)
                back.join()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("reasons", "status"),
    [
        (["waiting for init preliminary setup: read init-p: connection reset by peer"], 3),
        (["waiting for init preliminary setup: read init-p: connection reset by peer"] * 2, None),
        (["exec: no such file or directory"], None),
    ],
)
def test_a_container_that_the_engine_did_not_set_up_is_started_once_more(
    docker_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reasons: list[str],
    status: int | None,
    ahead: bool,
) -> None:
    docker_runtime.prepare(store, image)
    capfd.readouterr()
    real = Container.start
    left = list(reasons)

    def start(container: Any) -> None:
        if left:
            raise APIError("Bad Request", explanation=f"runc create failed: {left.pop(0)}")
        real(container)

    monkeypatch.setattr(Container, "start", start)
    command = task("print('whole'); raise SystemExit(3)")
    if ahead:
        docker_runtime.ahead(image, task(""))
        made = status is not None
        assert eventually(lambda: not left and list(containers(tmp_path).values()) == ["running"] * made)
        left += reasons if not made else []
    if status is None:
        with pytest.raises(DrydockError, match=reasons[0]):
            docker_runtime.run(store, image, command)
    else:
        assert docker_runtime.run(store, image, command) == status
        said = capfd.readouterr()
        assert said.out == "whole\n"
        assert f"{reasons[0]}; once more" in said.err
    assert not left
    assert eventually(lambda: not containers(tmp_path))


def test_an_engine_that_makes_nothing_does_not_keep_a_process(
    docker_runtime: Runtime, image: Built, task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(docker_runtime_module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(docker_runtime, "_create", lambda *_, **__: answers.wait(60))
    docker_runtime.ahead(image, task(""))
    began = time.monotonic()
    docker_runtime.dismiss()
    assert time.monotonic() - began < 10
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "ahead")
    answers.set()


def test_ahead_twice_leaves_one(
    docker_runtime: Runtime, store: Store, image: Built, task: Callable[..., Task], tmp_path: Path
) -> None:
    docker_runtime.prepare(store, image)
    docker_runtime.ahead(image, task(""))
    docker_runtime.ahead(image, task(""))
    assert eventually(lambda: list(containers(tmp_path).values()) == ["running"])
    docker_runtime.dismiss()
    docker_runtime.dismiss()
    assert eventually(lambda: not containers(tmp_path))


def test_the_next_docker_run_ends_what_a_killed_drydock_left(
    docker_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    running: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    docker_runtime.prepare(store, image)
    survivor, victim = running("docker"), running("docker")
    victim.kill()
    victim.wait()
    before = len(alive(tmp_path))
    assert docker_runtime.run(store, image, task("")) == 0
    assert eventually(lambda: 0 < len(alive(tmp_path)) < before), "the dead one's, and not the living one's"
    survivor.terminate()
    survivor.wait()
    assert eventually(lambda: not alive(tmp_path)), alive(tmp_path)


def test_a_command_that_ignores_the_signal_is_killed(store: Store, image: Built, tmp_path: Path) -> None:
    record(store, image)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('running', flush=True)"
    code += "; time.sleep(600)"
    command = host_command("chroot", store, tmp_path, "python3", "-S", "-c", code, str(tmp_path))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=HOST_ENVIRONMENT)
    assert process.stdout
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    # A second one is impatience: it does not wait for the rest of the grace.
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signal.SIGTERM
    assert not alive(tmp_path)


def test_two_commands_at_once(
    chroot: ChrootRuntime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    code = """
import os, sys, time
open("/etc/which", "w").write(sys.argv[1])
open("/results/" + sys.argv[1], "w")
while len(os.listdir("/results")) < 2:
    time.sleep(0.01)
assert open("/etc/which").read() == sys.argv[1]
"""
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda name=name: statuses.append(chroot.run(store, image, task(code, name))))
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0]


@as_root
def test_the_checkout_is_read_only_all_the_way_down(
    chroot: ChrootRuntime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    """What is mounted in the checkout, as a store may be, is read-only too; `/dev` stands for one."""
    code = """
points = [line.split() for line in open("/proc/self/mountinfo")]
below = {point[4]: point[5].split(",") for point in points if point[4].startswith("/drydock")}
assert len(below) > 1, below
assert all("ro" in options for options in below.values()), below
"""
    assert chroot.run(store, image, task(code, checkout=Path("/dev"))) == 0


def test_gpus_that_are_not_there(
    chroot: ChrootRuntime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    if list(Path("/dev").glob("nvidia*")):
        assert chroot.run(store, image, task("open('/dev/nvidiactl')", accelerator="cuda")) == 0
        return
    with pytest.raises(DrydockError, match="no /dev/nvidia"):
        chroot.run(store, image, task("", accelerator="cuda"))


def test_npus_that_are_not_there(
    chroot: ChrootRuntime, store: Store, image: Built, task: Callable[..., Task]
) -> None:
    if list(Path("/dev").glob("davinci[0-9]*")):
        assert chroot.run(store, image, task("open('/dev/davinci_manager')", accelerator="npu")) == 0
        return
    with pytest.raises(DrydockError, match="no /dev/davinci"):
        chroot.run(store, image, task("", accelerator="npu"))


def test_an_npu_s_driver_is_seen_in_the_image(
    chroot: ChrootRuntime, store: Store, image: Built, task: Callable[..., Task],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With files of this machine in the place of the driver's, which may not be changed from inside."""
    library = tmp_path / "lib64"
    library.mkdir()
    (library / "libascend_hal.so").write_text("a library")
    files = [
        Bind(source="/dev/null", target="/dev/davinci0"),
        Bind(source=str(library), target="/usr/local/Ascend/driver/lib64", read_only=True),
    ]
    monkeypatch.setattr(chroot_runtime, "driver_files", lambda kind: (files, {}) if kind == "npu" else None)
    code = """
open("/dev/davinci0", "w").write("to nowhere")
library = "/usr/local/Ascend/driver/lib64/libascend_hal.so"
assert open(library).read() == "a library"
try:
    open(library, "w")
except OSError as error:
    assert error.errno == 30, error
else:
    raise SystemExit("it may be written")
"""
    assert chroot.run(store, image, task(code, accelerator="npu")) == 0


def test_an_image_for_another_machine(store: Store, image: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "arm64" if image.architecture == "amd64" else "amd64"
    # This kernel may have an emulator.
    monkeypatch.setattr(runtime, "EMULATORS", Path("/nowhere"))
    with pytest.raises(DrydockError, match=r"test-tiny is for .* and this machine is"):
        ChrootRuntime().prepare(store, put_image(store, *image.layers, architecture=other))


def store_of(user: int, store: Store, image: Built, folder: Path) -> Store:
    """A store of that user's own with the image in it."""
    own = Store(folder / "store")
    for path in store.blobs.iterdir():
        store.link(path.name, own.path(path.name))
    record(own, image)
    for path in (folder, *folder.rglob("*")):
        if path.parent != own.blobs:
            os.chown(path, user, user)
    return own


def run_as(user: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as that user, to whom the tests' Python may be out of reach (in root's home, say)."""
    open_up = ""
    for path in {Path(sys.executable), Path(sys.base_prefix), SOURCE}:
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                inner = parent / path.relative_to(parent).parts[0]
                open_up += f"""
                    set -e; kept=$(mktemp -d); mount --bind {parent} $kept
                    mount -t tmpfs -o mode=755 none {parent}
                    mkdir {inner}; mount --bind $kept/{inner.name} {inner}; umount $kept; rmdir $kept
                """
                break
    identity = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all"]
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{open_up}\nexec "$@"', "sh", *identity, *command],
        env={**HOST_ENVIRONMENT, "HOME": "/nowhere"},
        cwd="/",
        capture_output=True,
        text=True,
    )


@as_root
def test_an_ordinary_user(store: Store, image: Built, shared_folder: Path) -> None:
    """Runs as root of a user namespace, owns what it makes, and leaves nothing; or is told why it cannot."""
    home = shared_folder / "user"
    home.mkdir()
    own = store_of(1000, store, image, home)
    code = """
import os
assert os.getuid() == os.getgid() == 0
assert open("/etc/which").read() == "upper"
open("/etc/which", "w").write("changed")
os.mkdir("/etc/new")
open("/results/mine", "w").write("x")
try:
    open("/drydock/new", "w")
except OSError as error:
    assert error.errno == 30, error
else:
    raise AssertionError("/drydock is writable")
assert len([name for name in os.listdir("/proc") if name.isdigit()]) == 2
os.openpty()
raise SystemExit(5)
"""
    done = run_as(1000, host_command("chroot", own, home, "python3", "-S", "-c", code))
    if done.returncode == 2:
        assert "this user may not make namespaces here" in done.stderr or "overlayfs cannot" in done.stderr
        pytest.skip(f"the kernel does not let an ordinary user: {done.stderr.strip()}")
    assert done.returncode == 5, done.stderr
    assert (home / "results/mine").stat().st_uid == 1000
    assert not list((own.root / "run").iterdir())


@as_root
@pytest.mark.parametrize(
    ("user", "wrappers", "line"),
    [
        # As in a container without --privileged.
        (0, ["setpriv", "--bounding-set=-sys_admin"], "root may not make namespaces here"),
        # The limit is a user namespace's own: the outer one keeps the machine's.
        (
            1000,
            [
                *("unshare", "--user", "--map-current-user", "--keep-caps"),
                *("sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"),
                *("setpriv", "--ambient-caps=-all", "--inh-caps=-all"),
            ],
            "this user may not make namespaces here",
        ),
    ],
    ids=["root", "user"],
)
def test_a_machine_that_allows_no_namespaces(
    store: Store, image: Built, shared_folder: Path, user: int, wrappers: list[str], line: str
) -> None:
    folder = Path(tempfile.mkdtemp(dir=shared_folder))
    own = store_of(user, store, image, folder)
    done = run_as(user, [*wrappers, *host_command("chroot", own, folder, "python3")])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
    # It is said before the time that unpacking takes is spent.
    assert not (own.root / "unpacked").exists()
    assert not list((own.root / "run").iterdir())


def test_what_starts_for_every_command_imports_the_standard_library_alone() -> None:
    code = "import drydock.namespaces, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without = subprocess.run([sys.executable, "-c", code.replace("drydock.namespaces, ", "")],
                             capture_output=True, text=True, check=True)  # fmt: skip
    loaded = set(done.stdout.split()) - set(without.stdout.split()) - set(sys.stdlib_module_names)
    assert loaded == {"drydock"}


# ---------------------------------------------------------------------------------------------- unpacking


def test_unpack_keeps_what_a_layer_says(tmp_path: Path) -> None:
    store = Store(tmp_path)
    members = [
        member("opt", mode=0o555),
        member("opt/program", b"run me", mode=0o4755, uid=0),
        member("opt/again", type=tarfile.LNKTYPE, linkname="opt/program"),
        member("opt/link", type=tarfile.SYMTYPE, linkname="../nowhere"),
        member("opt/" + "long" * 40, b"x" * (3 << 20)),
        member("tmp", mode=0o1777),
        member("home/drydock", uid=1000, gid=1000),
        member("home/drydock/.profile", b"", uid=1000, gid=1000),
    ]
    layer = put_layer(store, "all kinds", members)
    unpack.unpack(store, [layer, layer])
    root = unpack.folder(store, layer)
    program = (root / "opt/program").stat()
    assert stat.S_IMODE(program.st_mode) == 0o4755
    assert program.st_nlink == 2
    assert (root / "opt/again").stat().st_ino == program.st_ino
    assert (root / "opt/link").readlink() == Path("../nowhere")
    assert (root / ("opt/" + "long" * 40)).stat().st_size == 3 << 20
    assert stat.S_IMODE((root / "opt").stat().st_mode) == 0o555
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert {path.lstat().st_mtime for path in (root / "opt").rglob("*")} == {oci.EPOCH}
    assert (root / "opt").stat().st_mtime == oci.EPOCH
    if os.geteuid() == 0:
        assert (root / "home/drydock/.profile").stat().st_uid == 1000
        assert program.st_uid == 0


@pytest.mark.parametrize(
    "members",
    [
        [member("../escaped", b"")],
        [member("/tmp/escaped", b"")],
        [member("a/../../escaped", b"")],
        [member("link", type=tarfile.SYMTYPE, linkname="/tmp"), member("link/escaped", b"")],
        [member("opt"), member("opt", b"")],
        [member("hard", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")],
        [
            member("link", type=tarfile.SYMTYPE, linkname="/etc"),
            member("hard", type=tarfile.LNKTYPE, linkname="link/passwd"),
        ],
        [member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
        [member(".wh.removed", b"")],
    ],
    ids=lambda members: members[-1][0].name,
)
def test_unpack_refuses_what_leaves_the_layer(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    store = Store(tmp_path)
    layer = put_layer(store, "hostile", members)
    with pytest.raises(DrydockError, match=r"layer 'hostile' .* cannot be unpacked"):
        unpack.unpack(store, [layer])
    assert not list((store.root / "unpacked").iterdir())
    assert not Path("/tmp/escaped").exists()


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    """Two wheels that own one path; what the earlier one was linked to, or is linked to, stays as it is."""
    store = Store(tmp_path / "store")
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    members = [
        member("twice", b"first"),
        member("same", type=tarfile.LNKTYPE, linkname="twice"),
        member("twice", b"second"),
        member("link", type=tarfile.SYMTYPE, linkname=str(outside)),
        member("link", b"file"),
    ]
    layer = put_layer(store, "twice", members)
    unpack.unpack(store, [layer])
    root = unpack.folder(store, layer)
    assert [(root / name).read_bytes() for name in ("twice", "same", "link")] == [
        b"second",
        b"first",
        b"file",
    ]
    assert outside.read_bytes() == b"outside"


def damage_flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [damage_flip, lambda data: data[:-100], lambda _: b"", lambda data: data + b"\0"],
    ids=["one bit", "truncated", "empty", "longer"],
)
def test_a_damaged_layer_is_refused_and_discarded(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = Store(tmp_path)
    layer = put_layer(store, "torch", [member("a", os.urandom(300_000)), member("b", b"0" * 300_000)])
    good = store.path(layer.digest).read_bytes()
    store.path(layer.digest).write_bytes(damage(good))
    with pytest.raises(DrydockError, match=r"'torch' .* damaged .* run `drydock build`") as caught:
        unpack.unpack(store, [layer])
    assert "\n" not in str(caught.value)
    assert not store.has(layer.digest)
    assert not list((store.root / "unpacked").iterdir())
    store.put(good)
    unpack.unpack(store, [layer])
    assert (unpack.folder(store, layer) / "b").stat().st_size == 300_000


def test_a_layer_that_is_not_what_its_record_says(tmp_path: Path) -> None:
    store = Store(tmp_path)
    layer = put_layer(store, "torch", [member("a", b"a")])
    other = Layer(**{**vars(layer), "diff_id": "0" * 64})
    with pytest.raises(DrydockError, match="the tar inside hashes to"):
        unpack.unpack(store, [other])
    assert not unpack.folder(store, other).exists()


def test_several_unpack_at_once(tmp_path: Path) -> None:
    """Four processes prepare the same layers; what the killed one leaves is not taken for whole."""
    store = Store(tmp_path)
    layers = [
        put_layer(store, f"layer {n}", [member(f"{n}/{m}", bytes([m]) * 5000) for m in range(200)])
        for n in range(6)
    ]
    built = put_image(store, *layers)
    record(store, built)
    code = """
import sys
from pathlib import Path
from typing import Any
from drydock import oci, unpack
from drydock.store import Store
store = Store(Path(sys.argv[1]))
unpack.unpack(store, oci.read_image(store, "test-tiny").layers)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    killed = subprocess.Popen(command, env=HOST_ENVIRONMENT)
    assert eventually(lambda: any((store.root / "unpacked").glob(".*")))
    killed.kill()
    others = [subprocess.Popen(command, env=HOST_ENVIRONMENT) for _ in range(3)]
    assert [process.wait(60) for process in others] == [0, 0, 0]
    killed.wait()
    assert {path.name for path in (store.root / "unpacked").iterdir()} == {
        unpack.folder(store, layer).name for layer in layers
    }
    for number, layer in enumerate(layers):
        assert len(list((unpack.folder(store, layer) / str(number)).iterdir())) == 200


# ---------------------------------------------------------------------------------------- choice, Docker


def test_auto_takes_docker_where_an_engine_answers(
    docker_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runtime.choose("auto").name == docker_runtime.name == "docker"
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert runtime.choose("auto").name == "chroot"
    with pytest.raises(
        DrydockError, match=r"^no Docker engine answers \(.*\): start one, .* --runtime chroot$"
    ):
        runtime.choose("docker")


def test_docker_holds_the_image_by_its_digest(
    docker_runtime: Runtime, store: Store, image: Built, capfd: pytest.CaptureFixture[str]
) -> None:
    import docker

    client = docker.from_env()
    with contextlib.suppress(docker.errors.ImageNotFound):
        client.images.remove(image.reference, force=True)
    docker_runtime.prepare(store, image)
    assert "load into docker: done" in capfd.readouterr().err
    assert client.images.get(image.reference).id in (
        f"sha256:{image.digest}",
        f"sha256:{image.config_digest}",
    )
    docker_runtime.prepare(store, image)
    assert capfd.readouterr().err == ""


def test_docker_refuses_a_damaged_layer(docker_runtime: Runtime, tmp_path: Path) -> None:
    store = Store(tmp_path)
    layer = put_layer(store, "torch", [member("a", os.urandom(300_000))])
    built = put_image(store, layer)
    blob = store.path(layer.digest)
    blob.write_bytes(damage_flip(blob.read_bytes()))
    with pytest.raises(DrydockError, match=r"'torch' .* damaged"):
        docker_runtime.prepare(store, built)
    assert not store.has(layer.digest)
    with pytest.raises(DrydockError, match=r"run `drydock build`"):
        docker_runtime.prepare(store, built)


def test_docker_leaves_no_container(
    docker_runtime: Runtime, store: Store, image: Built, tmp_path: Path
) -> None:
    import docker

    record(store, image)
    done = subprocess.run(
        host_command(docker_runtime.name, store, tmp_path, "python3", "-S", "-c", "print('ran')"),
        capture_output=True, text=True, check=True, env=HOST_ENVIRONMENT,
    )  # fmt: skip
    assert done.stdout == "ran\n"
    assert "is not removed" not in done.stderr
    ours: dict[str, str | list[str] | bool] = {"label": "dev.drydock=run", "ancestor": image.reference}
    assert not docker.from_env().containers.list(all=True, filters=ours)


def test_docker_takes_no_container_that_is_being_removed_for_an_orphan(
    docker_runtime: Runtime,
    store: Store,
    image: Built,
    task: Callable[..., Task],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from docker.api.client import APIClient

    docker_runtime.prepare(store, image)
    listed = threading.Event()
    inspect, remove = APIClient.inspect_container, docker_runtime_module._remove

    def later(container: Any) -> None:
        listed.wait(20)
        remove(container)

    def late(*arguments: Any) -> Any:
        """The list is there, and what it names is gone before anybody has looked at it."""
        listed.set()
        for thread in threading.enumerate():
            if thread.name == "removal":
                thread.join()
        return inspect(*arguments)

    monkeypatch.setattr(docker_runtime_module, "_remove", later)
    assert docker_runtime.run(store, image, task("")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(APIClient, "inspect_container", late)
        docker_runtime._remove_orphans()  # type: ignore[attr-defined]
    assert listed.is_set()


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_an_interactive_command_reads_what_is_typed(
    any_runtime: Runtime, store: Store, image: Built, tmp_path: Path, terminal: bool
) -> None:
    record(store, image)
    code = (
        "import os, sys; print(os.isatty(0), 'read', sys.stdin.readline().strip(), flush=True); sys.exit(3)"
    )
    program = HOST_PROGRAM.replace("results=", "interactive=True, results=")
    command = host_command(any_runtime.name, store, tmp_path, "python3", "-S", "-c", code)
    command[2] = program
    if not terminal:
        done = subprocess.run(command, input="typed\n", capture_output=True, text=True, env=HOST_ENVIRONMENT)
        assert (done.returncode, done.stdout) == (3, "False read typed\n"), done.stderr
        return
    child, screen = pty.fork()
    if child == 0:
        os.execve(command[0], command, HOST_ENVIRONMENT)
    os.write(screen, b"typed\n")
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(screen, 4096):
            shown += data
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, shown
    assert b"True read typed" in shown


def test_outside() -> None:
    assert not runtime.inside()

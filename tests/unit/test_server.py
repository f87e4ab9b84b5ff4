"""The server harness against fake servers: each fault gets the right verdict in time, and nothing is left.

Every test that plants a fault runs the same steps without it too (`works`), so that the verdict is the fault's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import fake_server
import npu_outputs
import pytest
from fake_server import Foreign

from drydock import server as server_package
from drydock.server import (
    SGLANG,
    Engine,
    FlagError,
    NoAnswer,
    NoConnection,
    Server,
    ServerError,
    devices,
    engines,
    harness,
    logs,
    ports,
    processes,
)
from drydock.tiers import device as device_module

HERE = Path(__file__).parent
SOURCE = Path(server_package.__file__).parents[2]
SLACK = 8.0
"""Seconds by which a verdict may be late on a loaded machine; every limit it is told from is far above."""
LONG = 90.0
"""A limit that no verdict may wait for."""


def reload_fake(post: engines.Post, model: str) -> None:  # noqa: ARG001
    if not post("/reload", RELOAD)["success"]:
        raise ServerError("the fake says that it did not load")


RELOAD: dict[str, object] = {}
FAKE = Engine(
    name="fake",
    module="fake_server",
    parser="fake_server:parse",
    own=("--model", "{model}", "--name", "{name}", "--host", "{host}", "--port", "{port}"),
    loading=("fake: weights have not loaded", fake_server.BEGIN),
    loaded=(fake_server.END,),
    development={"FAKE_DEVELOPMENT": "1"},
    reload=reload_fake,
    not_reloaded=("some weights were left out",),
)

Make = Callable[..., Server]


@pytest.fixture
def token() -> str:
    return f"token-{uuid.uuid4().hex}"


def left(token: str) -> dict[int, str]:
    """What is alive of a test's servers: they have the token in their environment or their command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and token.encode() in (folder / "environ").read_bytes() + command:
                    found[int(folder.name)] = command.replace(b"\0", b" ").decode()
    return found


@pytest.fixture
def make(tmp_path: Path, token: str) -> Iterator[Make]:
    """Makes servers with faults; in the end nothing of them is left, no handle of this process either."""
    # What earlier tests dropped is closed first, not between the two counts.
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    made: list[Server] = []

    def one(*faults: str, flags: tuple[str, ...] = (), **options: Any) -> Server:
        environment = {"PYTHONPATH": str(HERE), "FAKE_TOKEN": token, **options.pop("environment", {})}
        wanted = [flag for fault in faults for flag in ("--fault", fault)]
        options = {"log": tmp_path / "server.log", "ready_timeout": LONG, "stop_timeout": LONG, **options}
        made.append(Server(FAKE, tmp_path, [*wanted, *flags], environment=environment, **options))
        return made[-1]

    yield one
    for server in made:
        server.stop()
        assert not server._temporary.exists()
    assert left(token) == {}
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@contextlib.contextmanager
def takes(low: float, high: float | None = None) -> Iterator[None]:
    """That what is inside takes at least so long, and not much longer."""
    began = time.monotonic()
    yield
    assert low <= time.monotonic() - began < (low if high is None else high) + SLACK


def kept(server: Server) -> processes.Kept:
    assert server._kept
    return server._kept


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true in a few seconds."""
    deadline = time.monotonic() + SLACK
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def works(server: Server) -> float:
    """Start, ask and stop a server without a fault; the seconds that the start took."""
    with takes(0), server:
        assert server.complete("abc", max_tokens=9)["text"] == "cba"
        assert server.stop() == {}
    return server.ready_seconds


# ------------------------------------------------------------------------------------- a healthy server


def test_a_healthy_server_generates_in_phases_and_leaves_nothing(
    make: Make, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        opened.append(name)
        yield
        opened.append(f"{name} ends")

    monkeypatch.setattr(harness, "phase", phase)
    server = make("slow", flags=("--max-model-len", "64"))
    with server:
        assert server.complete("12345", max_tokens=2) == {"text": "54", "finish_reason": "length"}
        assert server.accepted["max_model_len"] == 64
        assert len(server.survivors()) == 1
        assert server.survivors().keys() < left(token).keys()
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.request("/text") == "plain words"
        assert len(server.request("/big")) == 3_000_000
    names = ["start", "load", "ready", "stop"]
    assert opened == [text for name in names for text in (name, f"{name} ends")]
    assert list(server.seconds) == names
    assert server.seconds["load"] >= 0.3
    assert server.seconds["ready"] >= 0.3
    assert server.ready_seconds == pytest.approx(sum(server.seconds[name] for name in names[:3]), abs=0.2)
    assert server.survivors() == left(token) == {}
    assert server.stop() == {}
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
        pass


def test_a_server_can_be_started_again_and_its_log_tells_the_starts_apart(make: Make, tmp_path: Path) -> None:
    server = make()
    works(server)
    first = server.port
    with server:
        with pytest.raises(ServerError, match="was started before: stop it first"):
            server.start()
        assert server.complete("ab", max_tokens=2)["text"] == "ba"
        assert server.port != first
        assert server.tail(100).count("fake: begins") == 1
    assert (tmp_path / "server.log").read_text().count("==== ") == 2
    assert (tmp_path / "server.log").read_text().count("fake: begins") == 2


def test_what_the_engine_leaves_in_its_temporary_folder_goes_with_it(make: Make) -> None:
    server = make("leave-files")
    for _ in range(2):
        with server:
            assert server.leftovers == []
            assert {path.name for path in server._temporary.iterdir()} == {"folder", "socket"}
        assert server.leftovers == ["folder", "socket"]
        assert not server._temporary.exists()
    with make() as clean:
        pass
    assert clean.leftovers == []


def test_what_the_engine_maps_and_never_removes_goes_with_it(make: Make, tmp_path: Path) -> None:
    own, others = tmp_path / "loads_1", tmp_path / "loads_2"
    others.write_text("another server's")
    server = make(environment={"FAKE_MAPS": str(own)})
    server.engine = replace(FAKE, leaves=(f"{tmp_path}/loads_*",))
    with server:
        assert own.exists()
    assert server.leftovers == ["loads_1"]
    assert not own.exists()
    assert others.exists(), "it is not this server's"


@pytest.mark.parametrize("leaves", [(), SGLANG.leaves], ids=["kept", "removed"])
def test_a_semaphore_that_the_engine_leaves_goes_with_it(
    make: Make, tmp_path: Path, leaves: tuple[str, ...]
) -> None:
    """Of Python's multiprocessing: who makes one has it mapped under a name that is no more."""
    others = Path(f"/dev/shm/sem.mp-{uuid.uuid4().hex}")
    others.touch()
    told = tmp_path / "semaphore"
    server = make(environment={"FAKE_SEMAPHORE": str(told)})
    server.engine = replace(FAKE, leaves=leaves)
    with server:
        own = Path(told.read_text())
        assert own.exists()
    if leaves:
        assert server.leftovers == [own.name]
        assert not own.exists()
    else:
        # Or there would be nothing to do.
        own.unlink()
    others.unlink()  # It was not the server's.


def test_what_torch_compiles_is_kept_from_one_server_to_the_next(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    one, other = make(), make()
    caches = [server._environment["TORCHINDUCTOR_CACHE_DIR"] for server in (one, other)]
    assert caches[0] == caches[1]
    assert not Path(caches[0]).is_relative_to(one._temporary)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert make()._environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_the_server_has_no_input_and_a_session_of_its_own(make: Make) -> None:
    ours, (read, write) = os.dup(0), os.pipe()
    os.dup2(read, 0)
    try:
        with make() as server:
            [pid] = server.survivors()
            assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
            assert os.getsid(pid) == os.getpgid(pid) == pid
    finally:
        os.dup2(ours, 0)
        for handle in (ours, read, write):
            os.close(handle)


def test_a_process_with_thousands_of_open_files_can_have_a_server(make: Make) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    handles = [os.dup(0) for _ in range(1100)]
    try:
        works(make())
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_servers_at_once_have_ports_of_their_own(make: Make) -> None:
    with make() as one, make() as two:
        assert one.port != two.port
        assert one.model != two.model
        assert not one.survivors().keys() & two.survivors().keys()
        one.stop()
        assert two.complete("ab", max_tokens=2)["text"] == "ba"


def test_requests_at_once_are_answered_at_once_and_each_with_its_own(make: Make) -> None:
    """Each answer waits until all the requests have come, so one after another they would get none."""
    bodies = [{"number": number, "together": 16} for number in range(16)]
    with make() as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda body: server.request("/meet", body), bodies)) == bodies


# ------------------------------------------------------------------------------- faults while it starts


@pytest.mark.parametrize(
    ("fault", "verdict", "words"),
    [
        ("exit-3", "ended with status 3", "no such device"),
        ("exit-0", "ended with status 0", "begins"),
        ("exit-after-load", "ended with status 0", "have loaded"),
        ("segv", "ended by signal SIGSEGV", "begins"),
    ],
)
def test_a_server_that_ends_is_an_error_at_once(
    make: Make, token: str, fault: str, verdict: str, words: str
) -> None:
    with takes(0), pytest.raises(ServerError, match=f"(?s)while starting: the server {verdict}.*{words}"):
        make(fault).start()
    assert left(token) == {}
    works(make())


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("503", "HTTP 503: .*still loading"),
        ("never-bind", "nothing listens on its port"),
        ("hang", "/v1/completions: no complete answer within"),
        ("drip", "/v1/completions: no complete answer within"),
        ("200", "answered, but not by this server: {}"),
    ],
)
def test_a_server_that_never_generates_is_an_error_at_the_limit(
    make: Make, token: str, fault: str, verdict: str
) -> None:
    limit = 1 + 3 * works(make())
    verdict = rf"(?s)not ready after {limit:g} s: .*{verdict}.*fake: begins"
    with takes(limit), pytest.raises(ServerError, match=verdict):
        make(fault, ready_timeout=limit).start()
    assert left(token) == {}


def test_a_limit_that_passes_while_the_parser_is_at_work_is_kept(make: Make, token: str) -> None:
    with (
        takes(1),
        pytest.raises(ServerError, match=r"fake's parser did not judge the flags within (1|0\.\d+) s"),
    ):
        make("parser-hangs", ready_timeout=1).start()
    assert left(token) == {}


# -------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--max-model-len", "many"], "argument --max-model-len: invalid int value: 'many'"),
        (["--fault", "parser-raises"], "TypeError: --this requires --that"),
        (["--help"], r"the parser ended by itself \(status 0\)"),
    ],
)
def test_refused_flags_end_it_in_the_parser_s_own_words_before_any_server(
    make: Make, tmp_path: Path, flags: list[str], words: str
) -> None:
    with takes(0), pytest.raises(FlagError, match=f"fake refuses the flags: {words}"):
        make(flags=tuple(flags)).start()
    assert "fake: begins" not in (tmp_path / "server.log").read_text()
    works(make(flags=("--max-model-len", "64")))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no-engine", "cannot be asked about its flags: ModuleNotFoundError: .*engine_that_is_not_there"),
        ("parser-crashes", "ended by signal SIGSEGV before its parser had judged the flags"),
    ],
)
def test_an_engine_that_cannot_judge_flags_has_not_refused_them(make: Make, fault: str, words: str) -> None:
    with takes(0), pytest.raises(ServerError, match=words) as error:
        make(fault).start()
    assert not isinstance(error.value, FlagError)


def test_the_parser_alone_can_be_asked(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("FAKE_TOKEN", token)
    assert FAKE.parse(["--max-model-len", "64"])["max_model_len"] == 64
    with pytest.raises(FlagError, match="unrecognized arguments: --no-such-flag"):
        FAKE.parse(["--no-such-flag"])
    with takes(3), pytest.raises(ServerError, match="did not judge the flags within 3 s\nfake: parses"):
        FAKE.parse(["--fault", "parser-hangs"], timeout=3)
    assert left(token) == {}


# ----------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("path", ["/hang", "/drip"])
def test_a_request_s_limit_is_for_all_of_it(make: Make, path: str) -> None:
    with make() as server:
        with takes(1), pytest.raises(NoAnswer, match=f"{path}: no complete answer within 1 s"):
            server.request(path, timeout=1)
        assert server.request("/echo", {"a": 1}, timeout=LONG) == {"a": 1}


def test_a_refusal_comes_with_the_server_s_words_and_its_log(make: Make) -> None:
    with make() as server:
        with pytest.raises(
            ServerError, match=r"(?s)/nowhere: HTTP 404: .*no path /nowhere.*fake: weights have loaded"
        ):
            server.request("/nowhere")
        with pytest.raises(ServerError, match=r"HTTP 400: .*prompt must be text"):
            server.complete([1, 2], max_tokens=1)
        with pytest.raises(NoConnection, match="/break: "):
            server.request("/break")
        assert server.complete("ab", max_tokens=2)["text"] == "ba"


@pytest.mark.parametrize(
    "choices", [[], None, {}, "text", [None], [[]], [{}], [{"text": None}], [{"text": 7}]]
)
def test_an_answer_without_a_completion_fails_its_request_and_not_the_server(
    make: Make, choices: Any
) -> None:
    with make() as server:
        with pytest.raises(ServerError, match="an answer without a completion"):
            server.complete("abc", choices=choices)
        assert server.complete("abc", max_tokens=9)["text"] == "cba"


@pytest.mark.parametrize("path", ["/exit", "/exit-held"])
def test_a_server_that_dies_in_a_request_is_named_and_asked_no_more(make: Make, path: str) -> None:
    with make(flags=("--reuse-port",)) as server:
        assert server.complete("ab", max_tokens=2)["text"] == "ba"
        with (
            takes(0),
            pytest.raises(NoConnection, match=f"(?s){path}: the server ended with status 7.*fake: begins"),
        ):
            server.request(path, timeout=LONG)
        # Not even sent: another server may have its port one day.
        with Foreign(server.port, name=server.model):
            for _ in range(2):
                with pytest.raises(NoConnection, match="the server ended with status 7"):
                    server.complete("ab", max_tokens=2)
    with pytest.raises(NoConnection, match="/echo: refused, the server is not running"):
        server.request("/echo")


def test_a_request_to_a_server_that_was_never_started_is_refused(make: Make) -> None:
    with pytest.raises(NoConnection, match="/echo: refused, the server is not running"):
        make().request("/echo")


# --------------------------------------------------------------------------------------- ends, and what stays


def test_what_ignores_the_polite_signal_is_killed_and_named(make: Make, token: str) -> None:
    with make("ignore-sigterm", "child", stop_timeout=0.7) as server:
        both = server.survivors()
        assert len(both) == 2
        with takes(0.7):
            survived = server.stop()
        assert [command for command in survived.values() if "launch.py" in command], (
            "the child ends, it does not"
        )
        assert len(survived) == 1
    assert left(token) == {}
    works(make("child"))


@pytest.mark.parametrize("fault", ["leave-group", "leave-environment", "leave-title"])
def test_what_left_the_group_is_found_named_and_killed(make: Make, token: str, fault: str) -> None:
    with make(fault, stop_timeout=0.7) as server:
        leader = kept(server).pid
        gone = [pid for pid in server.survivors() if pid != leader]
        assert len(gone) == 1, "the one that left"
        assert os.getsid(gone[0]) != leader, "it did not leave, and this test proves nothing"
        if fault != "leave-group":
            environment = Path(f"/proc/{gone[0]}/environ")
            assert soon(lambda: b"DRYDOCK_SERVER" not in environment.read_bytes())
        with takes(0.7):
            survived = server.stop()
        assert list(survived) == gone
        assert token in survived[gone[0]]
    assert left(token) == {}
    works(make())


def test_signals_that_are_blocked_here_are_not_blocked_in_the_server(make: Make) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        works(make())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def test_what_a_dead_server_left_behind_is_ended_too(make: Make, token: str) -> None:
    with make("child", "leave-environment", stop_timeout=0.7) as server:
        with pytest.raises(NoConnection, match="ended with status 7"):
            server.request("/exit")
        assert len(left(token)) >= 2
    assert left(token) == {}


def test_a_killed_keeper_takes_the_server_along_and_the_rest_is_found_by_its_mark(
    make: Make, token: str
) -> None:
    with make("leave-group", stop_timeout=1) as server:
        os.kill(kept(server)._keeper.pid, signal.SIGKILL)
        with takes(0), pytest.raises(NoConnection, match="the server ended when its keeper was killed"):
            server.request("/hang", timeout=LONG)
        assert soon(lambda: len(left(token)) == 1), "the server went, what left its group did not"
        assert len(server.stop()) == 1
    assert left(token) == {}


def test_what_survives_sigkill_is_an_error(make: Make, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that hangs in a driver does: here nobody kills, since the keeper is stopped."""
    with make("ignore-sigterm", stop_timeout=0.5) as server:
        keeper = kept(server)._keeper.pid
        os.kill(keeper, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(processes.os, "kill", lambda *_: None)
            patch.setattr(processes, "KILL_SECONDS", 0.5)
            with (
                takes(1.0, 1.5),
                pytest.raises(ServerError, match=r"(?s)alive 0.5 s after SIGKILL:\n.*launch.py"),
            ):
                server.stop()
        assert len(left(token)) >= 2
        os.kill(keeper, signal.SIGCONT)
        server.stop()
    assert left(token) == {}


def test_a_process_forked_from_the_harness_does_not_keep_a_server_alive(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the pipes open, whose closing is what the keeper waits for, and nobody but the keeper kills."""
    with make("ignore-sigterm", stop_timeout=0.2) as server:
        forked = os.fork()
        if forked == 0:
            time.sleep(600)
            os._exit(0)
        try:
            with monkeypatch.context() as patch, takes(0.2):
                patch.setattr(processes.os, "kill", lambda *_: None)
                assert len(server.stop()) == 1
        finally:
            os.kill(forked, signal.SIGKILL)
            os.waitpid(forked, 0)


def test_where_processes_cannot_be_seen_no_server_is_started(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.os, "getpid", lambda: 1)
    with pytest.raises(ServerError, match="/proc shows the processes of another namespace"):
        make().start()


HARNESS = """
import os, sys, time
from pathlib import Path
import test_server
from drydock.server import Server
server = Server(test_server.FAKE, Path("/"), ["--fault", "leave-environment"], log=Path(sys.argv[1]))
server.start()
if sys.argv[2] == "forked" and os.fork() == 0:
    time.sleep(600)  # has the harness's pipes open, as a data loader's worker has
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["alone", "forked"])
def test_a_server_does_not_outlive_a_harness_that_was_killed(tmp_path: Path, token: str, kind: str) -> None:
    environment = {**os.environ, "FAKE_TOKEN": token, "PYTHONPATH": f"{HERE}{os.pathsep}{SOURCE}"}
    command = [sys.executable, "-c", HARNESS, str(tmp_path / "log"), kind]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == b"ready\n"
        # The harness, its keeper, the server, what left it.
        assert len(left(token)) == 4 + (kind == "forked")
        process.kill()
        process.wait()
        assert soon(lambda: len(left(token)) == (kind == "forked"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


# --------------------------------------------------------------------------------------------- interruptions


class OverBudget(BaseException):
    """As the budget plugin raises it, from a signal's handler."""


@contextlib.contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    def handle(_: int, __: FrameType | None) -> None:
        raise OverBudget

    previous = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_command_is_heard_of_when_it_runs_and_can_be_ended(tmp_path: Path) -> None:
    """Not while its program is being looked for, here in forty thousand places: it would not hear the signal."""
    places = "/:" * 40_000 + os.environ["PATH"]
    with (tmp_path / "log").open("wb") as output:
        command = processes.Kept(["sleep", "600"], environment={"PATH": places}, output=output)
    assert command.living() == {command.pid: "sleep 600"}
    command.interrupt()
    assert command.gone(SLACK)
    assert command.fate() == "by signal SIGTERM"
    assert command.kill()


def test_ctrl_c_while_it_starts_ends_it(make: Make, token: str) -> None:
    timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with takes(0.5, 1.0), pytest.raises(KeyboardInterrupt):
        make("never-bind").start()
    timer.join()
    assert left(token) == {}


@pytest.mark.parametrize(
    ("seconds", "faults", "stop_timeout"),
    [(seconds, (), LONG) for seconds in (0.005, 0.02, 0.04, 0.06, 0.1, 0.2)]
    + [(seconds, ("leave-environment",), 0.3) for seconds in (0.2, 0.4, 0.8)],
)
def test_an_exception_at_any_moment_of_a_start_leaves_nothing(
    make: Make, token: str, seconds: float, faults: tuple[str, ...], stop_timeout: float
) -> None:
    server = make("never-bind", *faults, stop_timeout=stop_timeout)
    with takes(seconds), pytest.raises(OverBudget), interrupted(seconds), server:
        pytest.fail("it cannot be ready")
    # A keeper whose own start was interrupted ends by itself.
    assert soon(lambda: not left(token))
    assert server.stop() == {}


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.1, 0.5])
def test_an_exception_at_any_moment_of_a_stop_kills_what_is_left(
    make: Make, token: str, seconds: float
) -> None:
    server = make("ignore-sigterm", "leave-environment", stop_timeout=LONG)
    server.start()
    with takes(seconds), pytest.raises(OverBudget), interrupted(seconds):
        server.stop()
    assert left(token) == {}
    assert server.stop() == {}


def test_an_exception_of_the_stop_s_own_phase_does_not_keep_it_from_ending(
    make: Make, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        if name == "stop":
            raise OverBudget
        yield

    monkeypatch.setattr(harness, "phase", phase)
    with pytest.raises(OverBudget), make("ignore-sigterm"):
        pass
    assert left(token) == {}


def test_an_exception_of_the_test_s_own_stops_the_server(make: Make, token: str) -> None:
    with contextlib.suppress(OverBudget), make() as server:
        assert server.survivors()
        raise OverBudget
    assert left(token) == {}


# ------------------------------------------------------------------------------------------------- the port


def foreign_on(server: Server, **options: Any) -> contextlib.ExitStack:
    """A foreign server that comes as soon as the port is known, long before the server's own is up."""
    stack = contextlib.ExitStack()

    def come() -> None:
        while not server.port:
            time.sleep(0.001)
        stack.enter_context(Foreign(server.port, **options))

    thread = threading.Thread(target=come)
    thread.start()
    stack.callback(thread.join)
    return stack


@pytest.mark.parametrize("ours", [("--fault", "never-bind"), ("--reuse-port",)])
@pytest.mark.parametrize("faults", [(), ("200",), ("echo",)])
def test_another_server_on_the_port_is_told_from_ours(
    make: Make, token: str, ours: tuple[str, ...], faults: tuple[str, ...]
) -> None:
    """One of another model, one that says yes to everything, one that claims whatever name it is asked for."""
    server = make(flags=ours)
    verdict = rf"(?s)port \d+ is answered by another server\n  {os.getpid()} "
    with takes(0), pytest.raises(ServerError, match=verdict), foreign_on(server, faults=faults):
        server.start()
    assert left(token) == {}
    works(make(flags=("--reuse-port",)))


def test_a_port_that_another_server_has_after_the_stop_is_an_error(make: Make) -> None:
    with make(flags=("--reuse-port",)) as server, Foreign(server.port):
        with pytest.raises(
            ServerError, match=rf"port {server.port} is open after the stop\n  {os.getpid()} "
        ):
            server.stop()
        assert server.stop() == {}


@pytest.mark.parametrize(
    "options",
    [(), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)],
)
def test_the_kernel_gives_a_held_port_to_nobody(options: tuple[int, ...]) -> None:
    """Asked by a process that the kernel may give one port only, this one (IP_LOCAL_PORT_RANGE, Linux 6.3)."""

    def ask(port: int) -> int:
        with socket.socket() as other:
            for option in options:
                other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.setsockopt(socket.IPPROTO_IP, 51, struct.pack("HH", port, port))
            other.bind(("127.0.0.1", 0))
            return int(other.getsockname()[1])

    held = ports.hold()
    port = held.getsockname()[1]
    try:
        with pytest.raises(OSError, match="in use") as error:
            ask(port)
    finally:
        held.close()
    assert error.value.errno == errno.EADDRINUSE
    assert ask(port) == port, "without the hold it is given away, so the check above means something"


def test_the_port_is_held_before_the_server_has_it_and_free_after_the_stop(make: Make) -> None:
    server = make("never-bind", ready_timeout=1 + works(make()))
    refused: list[int] = []

    def bind() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", server.port))

    def intrude() -> None:
        while not server.port:
            time.sleep(0.001)
        time.sleep(0.5)
        try:
            bind()
        except OSError as error:
            refused.append(error.errno)

    thread = threading.Thread(target=intrude)
    thread.start()
    with pytest.raises(ServerError, match="not ready"):
        server.start()
    thread.join()
    assert refused == [errno.EADDRINUSE]
    bind()


# ---------------------------------------------------------------------------------------------------- the log


def test_a_log_that_grows_huge_is_followed_and_not_kept_in_memory(make: Make, tmp_path: Path) -> None:
    with make("log") as server:
        assert (tmp_path / "server.log").stat().st_size > 100_000_000
        assert list(server.seconds) == ["start", "load", "ready"]
        tracemalloc.start()
        try:
            assert server.tail(2).splitlines() == [fake_server.BEGIN, fake_server.END]
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()


def test_what_is_logged_a_moment_before_it_generates_still_makes_the_phases(make: Make) -> None:
    with make("late-log") as server:
        assert list(server.seconds) == ["start", "load", "ready"]


def test_a_text_across_two_blocks_of_the_log_is_found(tmp_path: Path) -> None:
    for split in range(1, 6):
        log = logs.Log(tmp_path / f"{split}.log", "title")
        with log.output:
            log.position = log.output.tell()
            log.output.write(b"." * (logs.BLOCK - split) + b"marker, and then the end of a mar")
            assert log.appeared(["no such text", "marker"])
            assert not log.appeared(["marker"])
            log.output.write(b"ker")
            assert log.appeared(["marker"])
            assert not log.appeared(["marker"])


# ------------------------------------------------------------------------------------- accelerators' memory

ONE, TWO = "GPU-11111111-2222-3333-4444-555555555555", "GPU-66666666-7777-8888-9999-000000000000"
SMI = """#!/bin/sh
cd {folder}
case $1 in
--query-compute-apps*) cat apps ;;
*)
    echo call >> calls
    output=gpus.$(wc -l < calls)
    [ -f $output ] || output=gpus.last
    cat $output ;;
esac
exit {status}
"""

Replay = Callable[..., Path]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replay:
    """Puts an nvidia-smi on PATH that says, call after call, how many MiB the two devices hold.

    In the form, and in part with the names and numbers, of a real one on an H100.
    """

    def replay(*calls: tuple[object, object], apps: str = "", status: int = 0) -> Path:
        folder = tmp_path / "smi"
        folder.mkdir()
        for number, (one, two) in enumerate(calls, 1):
            (folder / f"gpus.{number}").write_text(f"0, {ONE}, {one}\n1, {TWO}, {two}\n")
        (folder / f"gpus.{len(calls)}").rename(folder / "gpus.last")
        (folder / "apps").write_text(apps)
        (folder / "nvidia-smi").write_text(SMI.format(folder=folder, status=status))
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return folder

    return replay


def test_memory_that_comes_back_late_is_waited_for(make: Make, nvidia_smi: Replay) -> None:
    folder = nvidia_smi((3, 0), (70_000, 0), (70_000, 0), (10, 0))
    server = make()
    with takes(1.0), server:
        pass
    assert server.memory == {ONE: {"before": 3, "after": 10}, TWO: {"before": 0, "after": 0}}
    assert (folder / "calls").read_text() == "call\n" * 4


def test_memory_that_never_comes_back_is_an_error_with_who_holds_it(
    make: Make, token: str, nvidia_smi: Replay
) -> None:
    apps = f"{ONE}, 475, /opt/torch/.venv/bin/python3, 8710\n{TWO}, 1234, neighbour, 5\n"
    nvidia_smi((3, 5), (8_722, 5), apps=apps)
    server = make(memory_timeout=1.0)
    holder = f"{ONE}, 475, /opt/torch/.venv/bin/python3, 8710\n"
    verdict = f"1 s later GPU {ONE} holds 8719 MiB more than before.*: {holder}.*fake: begins"
    server.start()
    with takes(1.0), pytest.raises(ServerError, match=f"(?s){verdict}"):
        server.stop()
    assert left(token) == {}
    assert server.stop() == {}


@pytest.mark.parametrize("more", [64, 65])
def test_a_little_memory_more_is_within_the_tolerance(make: Make, nvidia_smi: Replay, more: int) -> None:
    nvidia_smi((100, 0), (100 + more, 0))
    refused = pytest.raises(ServerError, match="holds 65 MiB more than before")
    with refused if more > 64 else contextlib.nullcontext(), make(memory_timeout=0.1):
        pass


@pytest.mark.parametrize(
    ("visible", "watched"),
    [
        (None, {ONE, TWO}), ("1", {TWO}), ("0,1", {ONE, TWO}), (TWO, {TWO}), (TWO[:9], {TWO}), ("0", {ONE}),
        ("MIG-11111111-2222-3333-4444-555555555555", {ONE, TWO}), ("", None), ("-1", None),
    ],
)  # fmt: skip
def test_only_the_devices_that_the_server_can_use_are_watched(
    make: Make, nvidia_smi: Replay, visible: str | None, watched: set[str] | None
) -> None:
    """Meanwhile another's process takes memory on device 0, and keeps it."""
    nvidia_smi((0, 0), (5_000, 0))
    server = make(
        memory_timeout=0.1, environment={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    )
    refused = pytest.raises(ServerError, match=f"GPU {ONE} holds 5000 MiB more")
    with refused if watched and ONE in watched else contextlib.nullcontext(), server:
        pass
    if not watched:
        assert server.memory is None
    elif ONE not in watched:
        assert server.memory == {TWO: {"before": 0, "after": 0}}


def test_memory_is_waited_for_after_a_failed_start_too(make: Make, nvidia_smi: Replay) -> None:
    nvidia_smi((0, 0), (5_000, 0))
    with pytest.raises(ServerError, match="ended with status 3") as error:
        make("exit-3", memory_timeout=0.1).start()
    assert "GPU" in error.value.__notes__[0]
    assert "holds 5000 MiB more" in error.value.__notes__[0]


def test_a_device_that_is_lost_is_an_error(make: Make, nvidia_smi: Replay) -> None:
    folder = nvidia_smi((0, 0), (0, 0))
    with make(memory_timeout=0.1) as server:
        (folder / "gpus.last").write_text(f"0, {ONE}, 0\n")
        with pytest.raises(ServerError, match=f"GPU {TWO} is no longer seen"):
            server.stop()


@pytest.mark.parametrize(
    ("device", "program", "verdict"),
    [
        (False, "none", None),
        (False, "fails", None),
        (True, "none", "has GPUs and no nvidia-smi"),
        (True, "fails", r"nvidia-smi failed: 0, GPU-"),
        (True, "says N/A", r"does not tell how much memory GPU 0 uses: \[N/A\]"),
        (True, "hangs", r"nvidia-smi --query-gpu=index,uuid,memory.used did not answer in 0.2 s"),
    ],
)
def test_no_accelerator_means_no_memory_and_one_that_cannot_be_asked_is_an_error(
    make: Make, nvidia_smi: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    device: bool, program: str, verdict: str | None,
) -> None:  # fmt: skip
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "nvidiactl").touch()
    if device:
        (dev / "nvidia0").touch()
    monkeypatch.setattr(device_module, "DEV", dev)
    monkeypatch.setattr(devices, "NVIDIA_SMI_SECONDS", 0.2 if program == "hangs" else LONG)
    folder = nvidia_smi(("[N/A]" if program == "says N/A" else 0, 0), status=9 * (program == "fails"))
    if program == "none":
        monkeypatch.setenv("PATH", str(dev))
    if program == "hangs":
        (folder / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 600\n")
    server = make()
    if verdict is None:
        works(server)
        assert server.memory is None
    else:
        with takes(0), pytest.raises(ServerError, match=verdict):
            server.start()


NPU_SMI = """#!/bin/sh
cd {folder}
[ "$2" = -m ] && exec cat numbers
echo call >> calls
[ $(wc -l < calls) = 1 ] && exec cat before
exec cat after
"""


@pytest.fixture
def npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an npu-smi on PATH that prints a real A3's tables, and another text after the first call."""

    def replay(after: str) -> None:
        dev, folder = tmp_path / "dev", tmp_path / "smi"
        dev.mkdir()
        folder.mkdir()
        (dev / "davinci0").touch()
        for name, text in (("before", npu_outputs.A3), ("after", after), ("numbers", npu_outputs.A3_NUMBERS)):
            (folder / name).write_text(text)
        (folder / "npu-smi").write_text(NPU_SMI.format(folder=folder))
        (folder / "npu-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(device_module, "DEV", dev)

    return replay


def test_an_npu_s_memory_is_watched_too(make: Make, npu_smi: Callable[[str], None]) -> None:
    npu_smi(npu_outputs.A3.replace("3419 /", "3430 /"))
    with make() as server:
        pass
    assert server.memory == {"0.0": {"before": 3419, "after": 3430}, "0.1": {"before": 2874, "after": 2874}}


@pytest.mark.parametrize("visible", [None, "1", "0"])
def test_an_npu_s_memory_that_is_not_given_back_is_an_error(
    make: Make, npu_smi: Callable[[str], None], visible: str | None
) -> None:
    npu_smi(npu_outputs.A3.replace("3419 /", "9419 /"))
    server = make(
        memory_timeout=0.1, environment={} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible}
    )
    holder = "npu-smi shows there .*: 0.0, 632268, python3.1, 197"
    refused = pytest.raises(ServerError, match=f"(?s)NPU 0.0 holds 6000 MiB more.*{holder}")
    with contextlib.nullcontext() if visible == "1" else refused, server:
        pass


def test_npus_that_cannot_be_asked_are_an_error(
    make: Make, npu_smi: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu_smi("")
    monkeypatch.setenv("PATH", str(tmp_path / "dev"))
    with takes(0), pytest.raises(ServerError, match=r"has NPUs and .* put the driver's npu-smi on PATH"):
        make().start()


# ------------------------------------------------------------------------------------------- weights again


@pytest.mark.parametrize(
    "answer", [{"results": ["an error"]}, {"results": [None, {}]}, {"results": []}, {}, "", None]
)
def test_vllm_s_answer_to_a_reload_is_checked(answer: object) -> None:
    asked: list[tuple[str, Mapping[str, Any]]] = []

    def post(path: str, body: Mapping[str, Any]) -> object:
        asked.append((path, body))
        return {"results": [None, None]} if good else answer

    good = True
    engines.reload_vllm(post, "model")
    assert asked == [("/collective_rpc", {"method": "reload_weights"}), ("/reset_prefix_cache", {})]
    good = False
    with pytest.raises(ServerError, match="every worker should answer null"):
        engines.reload_vllm(post, "model")


@pytest.mark.parametrize("answer", [{"success": False, "message": "no such folder"}, {}, "", None])
def test_sglang_s_answer_to_a_reload_is_checked(answer: object) -> None:
    asked: list[tuple[str, Mapping[str, Any]]] = []

    def post(path: str, body: Mapping[str, Any]) -> object:
        asked.append((path, body))
        return {"success": True} if good else answer

    good = True
    engines.reload_sglang(post, "the/model")
    assert asked == [("/update_weights_from_disk", {"model_path": "the/model"})]
    good = False
    with pytest.raises(ServerError, match="should have succeeded"):
        engines.reload_sglang(post, "the/model")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"success": False}, "the fake says that it did not load"),
        ({"whole": False}, "(?s)not all weights were loaded again.*some weights were left out"),
    ],
)
def test_weights_that_were_not_loaded_again_are_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch, answer: dict[str, object], words: str
) -> None:
    with make(environment={"FAKE_DEVELOPMENT": "1"}) as server:
        monkeypatch.setattr(sys.modules[__name__], "RELOAD", answer)
        with pytest.raises(ServerError, match=words):
            server.reload_weights()
        # What an earlier one has logged does not count.
        server.request("/reload", {"whole": False})
        monkeypatch.setattr(sys.modules[__name__], "RELOAD", {"success": True})
        server.reload_weights()


def test_loading_weights_again_says_what_it_takes(make: Make) -> None:
    with (
        make() as server,
        pytest.raises(ServerError, match=r"takes environment=\{'FAKE_DEVELOPMENT': '1'\} at the start"),
    ):
        server.reload_weights()

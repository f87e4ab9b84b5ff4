"""The tiers' plugin and its watchdog, each verdict end to end: a real pytest in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drydock.tiers import PHASES, phase, record, stacks
from drydock.tiers.ledger import Clock
from drydock.tiers.processes import TOLD, age, descendants

pytest_plugins = ["pytester"]

HEADER = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
import pytest
from drydock.tiers import phase, record

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
"""
QUICK = """
import drydock.tiers.plugin as plugin
import drydock.tiers.link as link
link.ALONE_SECONDS = {alone}
plugin.GRACE_SECONDS = {grace}
plugin.STILL_SECONDS = {still}
plugin.EXIT_SECONDS = {exit}
"""


class Tier:
    """A checkout with one tier, `rollout`, and how its run went."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.results = pytester.path / "out"
        self.folder = pytester.path / "tests" / "rollout"
        self.folder.mkdir(parents=True)
        pytester.makepyprojecttoml('[tool.pytest.ini_options]\naddopts = "--strict-markers"\n')
        self.pace()
        self.budget("[each]\ntest = { ceiling = 20 }")

    def pace(self, grace: float = 5, still: float = 30, exit: float = 30, alone: int = 60) -> None:
        """The plugin's own patience, in seconds."""
        self.pytester.makepyfile(quick=QUICK.format(grace=grace, still=still, exit=exit, alone=alone))

    def budget(self, text: str) -> None:
        """The tier's table; headers are relative to it."""
        (self.pytester.path / "tests" / "budgets.toml").write_text(text.replace("[", "[cpu.fast.rollout."))

    def write(self, text: str, name: str = "test_it.py") -> None:
        (self.folder / name).write_text(HEADER + text)

    def command(self, *options: str, target: str = "tests/rollout") -> list[str]:
        return [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "-p", "drydock.tiers.plugin", "-p", "quick", f"--rootdir={self.pytester.path}", "--tier=rollout",
            "--profile=fast", "--image=cpu", f"--results={self.results}", *options, target,
        ]  # fmt: skip

    def run(self, text: str, *options: str, target: str = "tests/rollout") -> Run:
        self.write(text)
        return Run(self, self.pytester.run(*self.command(*options, target=target), timeout=40))


class Run:
    """An ended run: exit status, output, document."""

    def __init__(self, tier: Tier, result: pytest.RunResult) -> None:
        self.tier = tier
        self.status = int(result.ret)
        self.out = result.stdout.str()
        self.err = result.stderr.str()
        self.document = read(tier.results)

    @property
    def outcomes(self) -> dict[str, str]:
        return {row["id"].rpartition("::")[2]: row["outcome"] for row in self.document["tests"]}

    def row(self, name: str) -> dict[str, Any]:
        (found,) = [row for row in self.document["tests"] if row["id"].endswith(f"::{name}")]
        return found

    def stacks(self, name: str) -> str:
        return (self.tier.results / self.row(name)["stacks"]).read_text()

    def frames(self, name: str) -> str:
        """Without the title and pytest's own heading."""
        return self.stacks(name).split("\n", 3)[3]


def read(results: Path) -> dict[str, Any]:
    document = json.loads((results / "rollout.json").read_text())
    # Nothing half written lies about.
    assert [path.name for path in results.iterdir() if path.name.startswith(".")] == []
    return document


def gone(pid: int) -> bool:
    """Whether a process has ended, a moment granted."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def tier(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Tier:
    # A second less for each run: hypothesis comes as a plugin of its own.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return Tier(pytester)


# ---------------------------------------------------------------------------------- what passes


def test_a_tiers_time_begins_with_its_process(tier: Tier) -> None:
    """What is slow before the plugin counts too, and is nobody else's."""
    tier.pytester.makepyfile(late="import time\ntime.sleep(1.5)\n")
    tier.write("def test_a():\n    pass\n")
    command = [*tier.command()]
    command[command.index("-p") : command.index("-p")] = ["-p", "late"]
    run = Run(tier, tier.pytester.run(*command, timeout=40))
    assert run.status == 0
    assert run.document["seconds"] >= 1.5


def test_a_passing_tier_and_its_whole_document(tier: Tier) -> None:
    tier.budget(
        "[phases]\ntest = { floor = 0.1, ceiling = 30 }\n[each]\nstart = { ceiling = 9.5 }\n"
        '[tests."test_it.py::test_phases"]\nready = { floor = 0.05, ceiling = 20 }'
    )
    (tier.folder / "profile.toml").write_text('[length]\nfast = 3\nfull = 300\ngives-up = "long sequences"\n')
    run = tier.run(
        """
@pytest.fixture
def server():
    with phase("start"):
        time.sleep(0.05)
    with phase("load"):
        time.sleep(0.1)
        with phase("ready"):
            time.sleep(0.2)
        time.sleep(0.1)
    yield
    time.sleep(0.1)

def test_phases(server, profile, record, results):
    time.sleep(0.3)
    (results / "some.log").write_text("x")
    record("series", {"y": [profile["length"]]})

@pytest.mark.full("it takes an hour")
def test_long():
    pass

@pytest.mark.asked("gsm8k_model", "gsm8k_data")
def test_gsm8k():
    pass
""",
        "--gsm8k-model=/model",
        f"--junitxml={tier.pytester.path}/junit.xml",
    )
    assert run.status == 0
    assert "1 passed, 2 deselected" in run.out
    document = run.document
    assert set(document) == {
        "schema", "tier", "profile", "image", "began", "seconds", "outcome", "detail", "complete", "whole",
        "phases", "budget", "tests", "not_selected", "profile_values", "survivors",
    }  # fmt: skip
    (row,) = document["tests"]
    assert set(row) == {
        "id", "outcome", "phase", "message", "detail", "stacks", "seconds", "phases", "budget", "records",
    }  # fmt: skip
    assert (document["schema"], document["tier"], document["profile"]) == (1, "rollout", "fast")
    assert (document["image"], document["outcome"], document["detail"]) == ("cpu", "passed", None)
    assert document["complete"] is document["whole"] is True
    assert row["id"] == "tests/rollout/test_it.py::test_phases"
    assert row["outcome"] == "passed"
    assert row["records"] == {"series": {"y": [3]}}
    assert row["budget"] == {"ready": {"floor": 0.05, "ceiling": 20}}
    expected = {"start": 0.05, "load": 0.2, "ready": 0.2, "test": 0.3, "stop": 0.1}
    for name, seconds in expected.items():
        assert seconds <= row["phases"][name], name
    assert document["phases"] == row["phases"]
    assert sum(row["phases"].values()) <= row["seconds"] + 0.001 <= document["seconds"] + 0.002
    assert document["budget"] == {
        "phases": {"test": {"floor": 0.1, "ceiling": 30}},
        "each": {"start": {"ceiling": 9.5}},
        "tests": {"test_it.py::test_phases": {"ready": {"floor": 0.05, "ceiling": 20}}},
    }
    assert document["not_selected"] == [
        {"id": "tests/rollout/test_it.py::test_long", "reason": "it takes an hour"},
        {"id": "tests/rollout/test_it.py::test_gsm8k", "reason": "runs when --gsm8k-data is given"},
    ]
    assert document["profile_values"] == [
        {"name": "length", "value": 3, "fast": 3, "full": 300, "gives_up": "long sequences"}
    ]
    assert document["survivors"] == []
    assert (tier.results / "some.log").exists()
    assert (tier.pytester.path / "junit.xml").exists()


def test_the_full_profile_runs_what_fast_leaves_out(tier: Tier) -> None:
    (tier.folder / "profile.toml").write_text('[n]\nfast = 1\nfull = 8\ngives-up = "more than one"\n')
    run = tier.run(
        """
@pytest.mark.full("it takes an hour")
def test_long(profile):
    assert dict(profile) == {"n": 8}
""",
        "--profile=full",
        "--unbudgeted",
    )
    assert (run.status, run.outcomes, run.document["budget"]) == (0, {"test_long": "passed"}, None)
    assert run.document["profile_values"][0]["value"] == 8


# ---------------------------------------------------------------------------------- overrun


def test_every_way_to_wait_in_python_is_left_and_the_run_goes_on(tier: Tier) -> None:
    # Not less: a disk that writes back makes a test that does nothing take half a second.
    tier.budget("[each]\ntest = { ceiling = 0.9 }\nstop = { ceiling = 10 }")
    run = tier.run(
        """
from hypothesis import HealthCheck, given, settings, strategies

@pytest.fixture(autouse=True)
def torn_down(request):
    yield
    print("torn down", request.node.name, file=open("torn", "a"))

def test_sleep():
    time.sleep(60)

def test_socket():
    one, other = socket.socketpair()
    one.recv(1)

def test_lock():
    lock = threading.Lock()
    with lock:
        lock.acquire()

def test_join():
    thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    thread.start()
    thread.join()

def test_subprocess():
    subprocess.run(["sleep", "60"], check=True)

def test_a_loop():
    while True:
        pass

def test_swallows_exceptions():
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass

def test_swallows_it_once():
    with pytest.raises(BaseException):
        time.sleep(60)

def test_inner_phase():
    with phase("ready"):
        time.sleep(0.1)
    with phase("test"):
        time.sleep(60)

@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=100_000)
@given(strategies.integers())
def test_property(drawn):
    time.sleep(0.02)

def test_after_them():
    assert not alive(0)
"""
    )
    names = ["sleep", "socket", "lock", "join", "subprocess", "a_loop", "swallows_exceptions",
             "swallows_it_once", "inner_phase", "property"]  # fmt: skip
    assert run.outcomes == {f"test_{name}": "overrun" for name in names} | {"test_after_them": "passed"}
    assert run.status == 1
    assert run.document["outcome"] == "overrun"
    assert run.document["complete"] is True
    torn = (tier.pytester.path / "torn").read_text().split("\n")
    assert torn == [*(f"torn down test_{name}" for name in names), "torn down test_after_them", ""]
    for name in names:
        row = run.row(f"test_{name}")
        assert row["phase"] == "test"
        assert "s in phase test; 0.9 s of 0.9 s are used (the entry for any one test)" in row["message"]
        assert 0.9 <= row["phases"]["test"] < 10
        assert f"test_{name}" in run.frames(f"test_{name}")
    assert run.row("test_inner_phase")["phases"]["ready"] >= 0.1
    # Each was told once, hypothesis too.
    assert len(list(tier.results.glob("rollout-stacks-*.txt"))) == len(names)


@pytest.mark.parametrize("caught", ["BaseException", "a C function, signals blocked"])
def test_what_does_not_come_back_is_killed(tier: Tier, caught: str) -> None:
    tier.pace(grace=0.5)
    tier.budget("[each]\ntest = { ceiling = 0.3 }")
    hang = {
        "BaseException": "while True:\n        try:\n            time.sleep(60)\n"
        "        except BaseException:\n            pass",
        "a C function, signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "    ctypes.CDLL(None).pause()",
    }[caught]
    run = tier.run(
        f"""
def test_before():
    pass

def test_hang():
    child = subprocess.Popen(["sleep", "61"], start_new_session=True)
    Path("pid").write_text(str(child.pid))
    {hang}

def test_after():
    pass

def test_last():
    pass
"""
    )
    assert run.status == 137
    assert run.outcomes == {
        "test_before": "passed", "test_hang": "overrun", "test_after": "not-run", "test_last": "not-run",
    }  # fmt: skip
    document = run.document
    assert (document["outcome"], document["complete"]) == ("overrun", False)
    killed = "pytest did not come back from tests/rollout/test_it.py::test_hang: killed"
    assert run.row("test_after")["message"] == killed
    assert document["detail"].startswith(killed)
    assert f"drydock: rollout: overrun: {killed}" in run.out
    assert run.row("test_hang")["phases"]["test"] >= 0.3
    assert "=== pid " in run.stacks("test_hang")
    assert gone(int((tier.pytester.path / "pid").read_text()))


def test_overrun_in_setup_and_in_teardown(tier: Tier) -> None:
    tier.budget("[each]\nstart = { ceiling = 0.3 }\ntest = { ceiling = 10 }\nstop = { ceiling = 0.3 }")
    run = tier.run(
        """
@pytest.fixture(scope="module")
def shared():
    with phase("load"):
        pass
    time.sleep(60)

@pytest.fixture
def slow_to_go():
    yield
    time.sleep(60)

@pytest.fixture
def under_it():
    yield
    Path("under").touch()

def test_setup(under_it, shared):
    pass

def test_teardown(under_it, slow_to_go):
    Path("under").unlink()

def test_shared_again(shared):
    pass

def test_after():
    assert Path("under").exists()
"""
    )
    # A shared fixture that overran is not tried again: its time is spent once.
    assert run.outcomes == {
        "test_setup": "overrun", "test_teardown": "overrun", "test_shared_again": "error",
        "test_after": "passed",
    }  # fmt: skip
    assert (run.row("test_setup")["phase"], run.row("test_teardown")["phase"]) == ("start", "stop")
    assert (run.status, run.document["complete"]) == (1, True)
    assert "shared" in run.frames("test_setup")
    assert run.row("test_shared_again")["seconds"] < 0.3


def test_what_an_overrun_test_started_ends_and_what_is_shared_stays(tier: Tier) -> None:
    tier.budget(
        '[each]\ntest = { ceiling = 10 }\n[tests."test_it.py::test_overruns"]\ntest = { ceiling = 3 }'
    )
    run = tier.run(
        """
ECHO = '''
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    server.accept()[0].sendall(b"here")
'''
# It leaves its parent, its group and its session, and ignores the polite signal.
STRAY = '''
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    os._exit(0)
os.setsid()
open("stray", "w").write(str(os.getpid()))
def hangs_in_a_child():
    time.sleep(62)
hangs_in_a_child()
'''

since_import = subprocess.Popen(["sleep", "65"])

@pytest.fixture(scope="session")
def server():
    process = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
    port = int(process.stdout.readline())
    def ask():
        return socket.create_connection(("127.0.0.1", port)).recv(4)
    yield ask
    process.kill()
    process.wait()

def hangs_here():
    time.sleep(60)

def test_overruns(server):
    # The server is as young as this test: its fixture is set up for it, but not for it alone.
    subprocess.run([sys.executable, "-c", STRAY], check=True)
    hangs_here()

def test_after(server):
    assert server() == b"here"
    assert not alive(int(Path("stray").read_text()))
    assert since_import.poll() is None
    since_import.kill()
    since_import.wait()
"""
    )
    assert run.outcomes == {"test_overruns": "overrun", "test_after": "passed"}
    stray = int((tier.pytester.path / "stray").read_text())
    text = run.stacks("test_overruns")
    assert "hangs_here" in text
    assert f"=== pid {stray}, child of " in text
    # A child's own functions are py-spy's to know; without it there is what the kernel waits in.
    _, _, of_stray = text.partition(f"=== pid {stray}")
    assert ("hangs_in_a_child (<string>" if shutil.which("py-spy") else ": waits in ") in of_stray
    assert run.document["survivors"] == []


def test_a_tier_s_total_is_used_up(tier: Tier) -> None:
    tier.budget("[phases]\ntest = { ceiling = 0.6 }\n[each]\ntest = { ceiling = 0.5 }")
    run = tier.run(
        """
def test_first():
    time.sleep(0.4)
def test_second():
    time.sleep(0.4)
def test_third():
    pass
def test_fourth():
    pass
"""
    )
    used_up = "the tier's 0.6 s for phase test are used up"
    assert run.outcomes == {
        "test_first": "passed", "test_second": "overrun", "test_third": "not-run", "test_fourth": "not-run",
    }  # fmt: skip
    assert "0.6 s of 0.6 s are used (the tier's total)" in run.row("test_second")["message"]
    assert run.row("test_third")["message"] == used_up
    assert (run.status, run.document["outcome"], run.document["complete"]) == (1, "overrun", False)
    assert f"drydock: rollout: {used_up}: 2 of 4 tests not run" in run.out


def test_the_session_s_seconds_are_used_up(tier: Tier) -> None:
    run = tier.run(
        """
@pytest.fixture(scope="session", autouse=True)
def server():
    yield
    time.sleep(0.2)
    Path("stopped").touch()

def test_first():
    time.sleep(60)
def test_second():
    pass
""",
        "--session-seconds=1.2",
    )
    assert run.outcomes == {"test_first": "overrun", "test_second": "not-run"}
    assert "what the session had left as the tier began" in run.row("test_first")["message"]
    assert run.row("test_second")["message"] == "the session's 1.2 s are used up"
    assert (run.status, run.document["outcome"]) == (1, "overrun")
    assert (tier.pytester.path / "stopped").exists()


def test_a_session_without_time_begins_no_tier(tier: Tier) -> None:
    run = tier.run("Path('imported').touch()\ndef test_it():\n    pass\n", "--session-seconds=-3.5")
    assert (run.status, run.document["outcome"], run.document["complete"]) == (1, "failed", False)
    assert run.document["detail"] == "the session's budget was used up before the tier began"
    assert run.err == f"drydock: {run.document['detail']}"
    assert not (tier.pytester.path / "imported").exists()


def test_a_hang_while_tests_are_collected(tier: Tier) -> None:
    run = tier.run("time.sleep(60)", "--session-seconds=1")
    assert (run.status, run.document["outcome"], run.document["complete"]) == (137, "overrun", False)
    assert (
        "overrun while tests were collected: killed, stacks in rollout-stacks-1.txt" in run.document["detail"]
    )
    assert "test_it.py" in (tier.results / "rollout-stacks-1.txt").read_text()


@pytest.mark.parametrize(("options", "patience"), [((), "0.5"), (("--unbudgeted",), "3")])
def test_a_hang_after_the_last_test(tier: Tier, options: tuple[str, ...], patience: str) -> None:
    tier.pace(exit=0.5)
    run = tier.run(
        """
def test_leaves_a_thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
""",
        *options,
    )
    assert run.outcomes == {"test_leaves_a_thread": "passed"}
    assert (run.status, run.document["outcome"]) == (137, "overrun")
    assert f"pytest did not end within {patience} s of its last test: killed" in run.document["detail"]


def test_where_the_signal_for_stacks_cannot_be_sent_the_kernel_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under qemu, which has not all of them; the watchdog goes on."""

    def send(pid: int, number: int) -> None:
        raise OSError(errno.EINVAL, f"{number} cannot be sent to {pid}")

    monkeypatch.setattr(stacks, "send", send)
    monkeypatch.setattr(stacks.shutil, "which", lambda *_, **__: None)
    process = subprocess.Popen(["sleep", "60"])
    try:
        found = [each for each in descendants(os.getpid()) if each.pid == process.pid]
        stacks.write_stacks(tmp_path / "stacks.txt", "why", found, process.pid, os.memfd_create("none"))
    finally:
        process.kill()
        process.wait()
    assert re.search(
        r"(?s)why.*pid \d+, child of .*sleep 60.*State:\s+S", (tmp_path / "stacks.txt").read_text()
    )


# ---------------------------------------------------------------------------------- underrun


def test_a_test_under_its_floor(tier: Tier) -> None:
    tier.budget('[tests."test_it.py::test_quick"]\ntest = { floor = 0.5 }')
    run = tier.run("def test_quick():\n    pass\ndef test_other():\n    pass\n")
    assert run.outcomes == {"test_quick": "underrun", "test_other": "passed"}
    assert (run.status, run.document["outcome"], run.document["complete"]) == (1, "underrun", True)
    message = "s in phase test, under its floor of 0.5 s: has it tested what it says?"
    assert message in run.row("test_quick")["message"]
    assert message in run.out


def test_a_tier_under_its_floor_but_only_a_whole_one(tier: Tier) -> None:
    tier.budget("[phases]\ntest = { floor = 0.3 }")
    text = "def test_one():\n    time.sleep(0.2)\ndef test_two():\n    pass\n"
    run = tier.run(text)
    assert run.outcomes == {"test_one": "passed", "test_two": "passed"}
    assert (run.status, run.document["outcome"], run.document["whole"]) == (1, "underrun", True)
    assert "drydock: rollout: underrun: 0.2" in run.out
    run = tier.run(text, "-k", "one")
    assert (run.status, run.document["outcome"], run.document["whole"]) == (0, "passed", False)
    assert run.document["not_selected"] == [
        {"id": "tests/rollout/test_it.py::test_two", "reason": "left out on the command line"}
    ]
    run = tier.run(text, target="tests/rollout/test_it.py")
    assert (run.status, run.document["outcome"], run.document["whole"]) == (0, "passed", False)
    run = tier.run(text.replace("0.2", "0.35"))
    assert (run.status, run.document["outcome"]) == (0, "passed")


# ---------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("ctypes.string_at(0)", 139, "pytest was ended by SIGSEGV (Segmentation fault)"),
        ("os.abort()", 134, "pytest was ended by SIGABRT (Aborted)"),
        ("os._exit(0)", 1, "pytest's process left with status 0"),
        ("os._exit(7)", 7, "pytest's process left with status 7"),
    ],
)
def test_pytest_vanishes(tier: Tier, end: str, status: int, message: str) -> None:
    run = tier.run(
        f"""
def test_before():
    pass
def test_crash():
    child = subprocess.Popen(["sleep", "63"], start_new_session=True)
    Path("pid").write_text(str(child.pid))
    record("reached", True)
    with phase("ready"):
        time.sleep(0.1)
        {end}
def test_after():
    pass
"""
    )
    assert run.status == status
    assert run.outcomes == {"test_before": "passed", "test_crash": "crashed", "test_after": "not-run"}
    document = run.document
    assert (document["outcome"], document["complete"]) == ("crashed", False)
    assert document["detail"].startswith(f"{message} in tests/rollout/test_it.py::test_crash")
    assert f"drydock: rollout: crashed: {message}" in run.out
    row = run.row("test_crash")
    assert (row["phase"], row["records"]) == ("ready", {"reached": True})
    assert row["message"].startswith(message)
    assert row["phases"]["ready"] >= 0.1
    assert run.row("test_after")["message"].startswith(message)
    pid = int((tier.pytester.path / "pid").read_text())
    assert document["survivors"] == [f"{pid} sleep 63"]
    assert gone(pid)


def test_a_crash_after_the_last_test(tier: Tier) -> None:
    run = tier.run("import atexit\ndef test_it():\n    atexit.register(ctypes.string_at, 0)\n")
    assert (run.status, run.outcomes) == (139, {"test_it": "passed"})
    assert (run.document["outcome"], run.document["complete"]) == ("crashed", True)


def test_pytest_exit_is_no_pass(tier: Tier) -> None:
    run = tier.run("def test_it():\n    pytest.exit('enough', returncode=0)\ndef test_next():\n    pass\n")
    assert run.status == 1
    assert run.outcomes == {"test_it": "not-run", "test_next": "not-run"}
    assert (run.document["outcome"], run.document["complete"]) == ("interrupted", False)
    assert "enough" in run.document["detail"]


def test_the_watchdog_dies(tier: Tier) -> None:
    run = tier.run(
        """
@pytest.fixture
def cleaned():
    yield
    Path("cleaned").touch()

def test_it(cleaned):
    Path("pid").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)

def test_after():
    Path("went on").touch()
"""
    )
    assert run.status == -signal.SIGKILL
    assert gone(int((tier.pytester.path / "pid").read_text()))
    assert (tier.pytester.path / "cleaned").exists()
    assert not (tier.pytester.path / "went on").exists()
    said = tier.pytester.path.joinpath("stdout").read_text()
    assert "drydock: the tier's watchdog ended: no result is written" in said
    # Python's complaint about the pipe that nobody reads any more.
    assert "wakeup" not in said + tier.pytester.path.joinpath("stderr").read_text()
    # What lies there is the document as it last was, and it says so.
    assert (run.document["outcome"], run.document["complete"]) == ("crashed", False)
    assert "the watchdog was ended before pytest was" in run.document["detail"]


def test_the_watchdog_dies_and_nothing_else_ends_pytest(tier: Tier) -> None:
    tier.pace(alone=1)
    run = tier.run(
        """
def test_it():
    Path("pid").write_text(str(os.getpid()))
    threading.Timer(0.5, os.kill, (os.getppid(), signal.SIGKILL)).start()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""
    )
    assert run.status == -signal.SIGKILL
    assert gone(int((tier.pytester.path / "pid").read_text()))


# ---------------------------------------------------------------------------------- nothing ran, or not that


def test_zero_tests_are_no_pass(tier: Tier) -> None:
    run = tier.run("")
    assert (run.status, run.document["outcome"], run.document["detail"]) == (1, "failed", "no test ran")
    run = tier.run("@pytest.mark.full('slow')\ndef test_it():\n    pass\n")
    assert (run.status, run.document["outcome"], run.document["detail"]) == (1, "failed", "no test ran")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def test_it(:\n", "SyntaxError: invalid syntax"),
        ("pytest.importorskip('nothing_of_that_name')", "a tier skips nothing"),
        ("pytest.skip('not here', allow_module_level=True)", "Skipped: not here: a tier skips nothing"),
        ("@pytest.mark.nonsense\ndef test_it():\n    pass", "'nonsense' not found in `markers`"),
    ],
)
def test_a_collection_error(tier: Tier, text: str, message: str) -> None:
    tier.write("def test_good():\n    pass\n", "test_good.py")
    run = tier.run(text)
    assert run.status == 2
    document = run.document
    assert (document["outcome"], document["complete"]) == ("failed", False)
    assert message in document["detail"]
    assert run.row("test_good")["outcome"] == "not-run"
    (row,) = [row for row in document["tests"] if row["outcome"] == "error"]
    assert row["id"] == "tests/rollout/test_it.py"
    assert message in row["message"]


def test_a_conftest_that_does_not_import(tier: Tier) -> None:
    tier.write("import nothing_of_that_name", "conftest.py")
    run = tier.run("def test_it():\n    pass\n")
    assert (run.status, run.document["outcome"]) == (4, "failed")
    assert "No module named 'nothing_of_that_name'" in run.document["detail"]


def test_a_skip_and_an_expected_failure_are_failures(tier: Tier) -> None:
    run = tier.run(
        """
@pytest.fixture
def skips():
    pytest.skip("in setup")

def test_in_setup(skips):
    pass

def test_in_call():
    pytest.skip("in call")

@pytest.mark.skipif(True, reason="by mark")
def test_mark():
    pass

@pytest.mark.xfail
def test_xfail():
    assert 0

@pytest.mark.xfail
def test_xpass():
    pass
"""
    )
    assert run.status == 1
    assert run.outcomes == {
        "test_in_setup": "error", "test_in_call": "failed", "test_mark": "error", "test_xfail": "failed",
        "test_xpass": "failed",
    }  # fmt: skip
    assert "by mark: a tier skips nothing" in run.row("test_mark")["message"]
    assert "skipped" not in run.out.splitlines()[-1]


def test_missing_gpus_are_a_failure_that_names_them(tier: Tier) -> None:
    here = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    run = tier.run(
        f"""
@pytest.mark.needs(gpus=99)
def test_many():
    pass

@pytest.mark.needs(gpus={here})
def test_as_many_as_are_here():
    pass
"""
    )
    assert (run.status, run.document["outcome"]) == (1, "failed")
    assert run.outcomes == {"test_many": "missing", "test_as_many_as_are_here": "passed"}
    assert run.row("test_many")["message"] == f"needs 99 GPUs, {here} are here"
    assert f"needs 99 GPUs, {here} are here" in run.out


def test_in_an_image_for_npus_they_are_what_is_needed(tier: Tier) -> None:
    body = """
@pytest.mark.needs(gpus=99)
def test_many():
    pass

@pytest.mark.cuda("it is CUDA's")
@pytest.mark.needs(gpus=99)
def test_cuda():
    pass
"""
    here = len([path for path in Path("/dev").glob("davinci[0-9]*") if path.name[7:].isdigit()])
    run = tier.run(body, "--accelerator=npu")
    assert run.outcomes == {"test_many": "missing"}
    assert run.row("test_many")["message"] == f"needs 99 NPUs, {here} are here"
    assert [row["reason"] for row in run.document["not_selected"]] == ["it is CUDA's"]
    assert tier.run(body, "--accelerator=cuda").outcomes == {"test_many": "missing", "test_cuda": "missing"}
    run = tier.run(body, "--accelerator=npu", "--cpu-part", "--unbudgeted")
    reason = "needs 99 NPUs, and --cpu-part asks for what needs none"
    assert [row["reason"] for row in run.document["not_selected"]] == [reason, f"{reason}; it is CUDA's"]


@pytest.mark.parametrize("profile", ["fast", "full"])
@pytest.mark.parametrize(
    ("accelerator", "outcomes", "reasons"),
    [("none", {}, ["it is a kernel"]), ("cuda", {"test_kernel": "missing"}, [])],
)
def test_what_is_for_accelerators_is_left_out_in_an_image_that_is_made_for_none(
    tier: Tier, profile: str, accelerator: str, outcomes: dict[str, str], reasons: list[str]
) -> None:
    body = """
@pytest.mark.accelerated("it is a kernel")
@pytest.mark.needs(gpus=99)
def test_kernel():
    pass
"""
    run = tier.run(body, f"--accelerator={accelerator}", f"--profile={profile}", "--unbudgeted")
    assert run.outcomes == outcomes
    assert [row["reason"] for row in run.document["not_selected"]] == reasons


@pytest.mark.parametrize(
    ("engine", "accelerator", "ran"),
    [
        ("vllm", "cuda", set()),
        ("sglang", "cuda", {"test_one_s"}),
        ("vllm", "none", {"test_one_s", "test_any"}),
    ],
)
def test_what_starts_a_server_of_an_engine_needs_a_device_where_its_image_is_made_for_one(
    tier: Tier, engine: str, accelerator: str, ran: set[str]
) -> None:
    body = """
@pytest.mark.serves("vllm")
def test_one_s():
    pass

@pytest.mark.serves
def test_any():
    pass

def test_none():
    pass
"""
    run = tier.run(body, f"--engine={engine}", f"--accelerator={accelerator}", "--cpu-part", "--unbudgeted")
    assert set(run.outcomes) == {"test_none", *ran}
    assert len(run.document["not_selected"]) == 2 - len(ran)


@pytest.mark.parametrize(
    ("engine", "ran", "reasons"),
    [
        ("vllm", {"test_own", "test_all"}, ["what it tests is sglang's"]),
        ("sglang", {"test_all", "test_other"}, ["it has no sleep", "what it tests is vllm's"]),
        (None, {"test_own", "test_all", "test_lacking", "test_other"}, []),
    ],
)
def test_what_an_engine_lacks_is_not_run_in_its_image_and_says_why(
    tier: Tier, engine: str | None, ran: set[str], reasons: list[str]
) -> None:
    run = tier.run(
        """
@pytest.mark.engine("vllm")
def test_own():
    pass

@pytest.mark.lacks("sglang", "it has no sleep")
def test_lacking():
    pass

@pytest.mark.engine("sglang")
def test_other():
    pass

def test_all():
    pass
""",
        *([f"--engine={engine}"] if engine else []),
    )
    assert set(run.outcomes) == ran | ({"test_lacking"} if engine == "vllm" else set())
    assert sorted(row["reason"] for row in run.document["not_selected"]) == reasons


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("cuda", 'write cuda("why it is not for NPUs")'),
        ("accelerated", 'write accelerated("why it needs an accelerator")'),
        ("needs(2)", "write needs(gpus=NUMBER)"),
        ("needs(tpus=2)", "write needs(gpus=NUMBER)"),
        ("full", 'write full("why it is not in the fast profile")'),
        ("lacks('trtllm')", 'write lacks(ENGINE, "what it does not have")'),
        ("asked('nothing_of_that_name')", "asked('nothing_of_that_name'): pytest has no such option"),
    ],
)
def test_a_marker_that_says_it_wrongly(tier: Tier, marker: str, message: str) -> None:
    run = tier.run(f"@pytest.mark.{marker}\ndef test_it():\n    pass\n")
    assert (run.status, run.document["outcome"]) == (4, "failed")
    assert f"ERROR: tests/rollout/test_it.py::test_it: {message}" in run.err


def test_failures_keep_their_phase_and_words(tier: Tier) -> None:
    run = tier.run(
        """
@pytest.fixture
def breaks():
    yield
    raise OSError("no way back")

def test_assert():
    assert 1 + 1 == 3, "sum"

def test_in_ready():
    with phase("ready"):
        raise ValueError("not ready")

def test_teardown(breaks):
    pass
"""
    )
    assert (run.status, run.document["outcome"], run.document["complete"]) == (1, "failed", True)
    assert run.outcomes == {"test_assert": "failed", "test_in_ready": "failed", "test_teardown": "error"}
    assert [row["phase"] for row in run.document["tests"]] == ["test", "ready", "stop"]
    assert [row["message"] for row in run.document["tests"]] == [
        "AssertionError: sum", "ValueError: not ready", "OSError: no way back",
    ]  # fmt: skip
    assert "assert 1 + 1 == 3" in run.row("test_assert")["detail"]
    assert run.document["detail"].startswith("2 failed, 1 error; tests/rollout/test_it.py::test_assert: ")


def test_stopping_at_the_first_failure_is_not_complete(tier: Tier) -> None:
    run = tier.run("def test_bad():\n    assert 0\ndef test_next():\n    pass\n", "-x")
    assert run.outcomes == {"test_bad": "failed", "test_next": "not-run"}
    assert (run.status, run.document["complete"]) == (1, False)


# ---------------------------------------------------------------------------------- the profile


def test_a_profile_value_that_nothing_reads(tier: Tier) -> None:
    (tier.folder / "profile.toml").write_text(
        '[used]\nfast = 1\nfull = 2\ngives-up = "a"\n[unused]\nfast = 1\nfull = 2\ngives-up = "b"\n'
    )
    text = "def test_it(profile):\n    assert profile['used'] == 1\ndef test_other():\n    pass\n"
    run = tier.run(text)
    assert (run.status, run.document["outcome"]) == (1, "failed")
    assert run.document["detail"] == "tests/rollout/profile.toml: unused is read by no test"
    assert "drydock: rollout: tests/rollout/profile.toml: unused is read by no test" in run.out
    # A part of the tier cannot tell.
    assert tier.run(text, "-k", "other").status == 0
    # A test that is not selected now reads it by what is written.
    text += "@pytest.mark.full('slow')\ndef test_full(profile):\n    assert profile['unused']\n"
    assert tier.run(text).status == 0


def test_a_profile_value_that_there_is_not(tier: Tier) -> None:
    (tier.folder / "profile.toml").write_text('[used]\nfast = 1\nfull = 2\ngives-up = "a"\n')
    run = tier.run("def test_it(profile):\n    profile['used']\n    profile['other']\n")
    assert run.status == 1
    assert run.row("test_it")["message"].endswith("profile.toml has no 'other': it has used")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 3", "x is not a table with fast, full and gives-up"),
        ('[x]\nfast = 1\ngives-up = "a"', "x has no full"),
        ("[x]\nfast = 1\nfull = 2", "x has no gives-up"),
        ('[x]\nfast = 1\nfull = 2\ngives-up = " "', "gives-up must say what"),
        ('[x]\nfast = 1\nfull = 2\ngives-up = "a"\nslow = 3', "x has an unknown slow"),
        ("[x", "profile.toml: Expected"),
    ],
)
def test_a_wrong_profile_is_one_line(tier: Tier, text: str, message: str) -> None:
    (tier.folder / "profile.toml").write_text(text)
    run = tier.run("def test_it():\n    pass\n")
    assert run.status == 2
    (line,) = run.err.splitlines()
    assert line.startswith("drydock: ")
    assert message in line
    assert (run.document["outcome"], run.document["complete"]) == ("failed", False)
    assert message in run.document["detail"]


# ---------------------------------------------------------------------------------- budgets at the start


def test_without_a_table_the_run_is_refused_unless_it_measures(tier: Tier) -> None:
    text = "def test_it():\n    Path('ran').touch()\n"
    run = tier.run(text, "--image=other")
    assert run.status == 2
    (line,) = run.err.splitlines()
    assert "has no table [other.fast.rollout]: measure with --unbudgeted" in line
    assert "`drydock budget propose RUN...`" in line
    assert run.document["outcome"] == "failed"
    assert not (tier.pytester.path / "ran").exists()
    run = tier.run(text, "--image=other", "--unbudgeted")
    assert (run.status, run.document["budget"]) == (0, None)


def test_a_budget_for_a_test_that_there_is_not(tier: Tier) -> None:
    tier.budget('[tests."test_it.py::test_renamed"]\ntest = { ceiling = 5 }')
    run = tier.run("def test_it():\n    pass\n")
    assert (run.status, run.document["outcome"]) == (1, "failed")
    assert "'test_it.py::test_renamed' is for a test that there is not" in run.document["detail"]


def test_options_that_are_missing(tier: Tier) -> None:
    tier.write("def test_it():\n    pass\n")
    command = [word for word in tier.command() if not word.startswith(("--image", "--results"))]
    result = tier.pytester.run(*command, timeout=20)
    assert result.ret == 4
    assert "ERROR: a tier needs --image, --results" in result.stderr.str()
    result = tier.pytester.run(*tier.command("--session-seconds=soon"), timeout=20)
    assert result.ret == 4


def test_collecting_only_needs_no_budget_and_leaves_nothing(tier: Tier) -> None:
    tier.write("def test_it():\n    pass\n")
    result = tier.pytester.run(*tier.command("--collect-only", "--image=other"), timeout=20)
    assert result.ret == 0
    assert "test_it.py::test_it" in result.stdout.str()
    assert not tier.results.exists()


def test_a_process_is_as_old_as_what_it_was_told_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOLD, raising=False)
    began = age()
    assert began > 0.3
    up = float(Path("/proc/uptime").read_text().split()[0])
    monkeypatch.setenv(TOLD, f"{up - 0.1:.2f}")
    assert 0.09 < age() < began + 0.2
    # What it was told before it began is of another container.
    monkeypatch.setenv(TOLD, "0.00")
    assert age() == pytest.approx(began, abs=1)


# ---------------------------------------------------------------------------------- interruption, waiting


INTERRUPTED = """
@pytest.fixture(scope="session", autouse=True)
def server():
    process = subprocess.Popen(["sleep", "64"])
    yield
    process.kill()
    process.wait()
    Path("stopped").touch()

def test_first():
    pass

def test_it():
    Path("pids").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(60)

def test_next():
    pass
"""


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("pytest", signal.SIGTERM),
        ("the watchdog", signal.SIGTERM),  # as a container's runtime does
        ("the group", signal.SIGTERM),
        ("the group", signal.SIGINT),  # as a terminal does
    ],
)
def test_interrupted(tier: Tier, whom: str, number: signal.Signals) -> None:
    tier.write(INTERRUPTED)
    process = subprocess.Popen(
        tier.command(), cwd=tier.pytester.path, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tier.pytester.path), *sys.path])},
    )  # fmt: skip
    pids = tier.pytester.path / "pids"
    deadline = time.monotonic() + 20
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pytest_pid, watchdog_pid = map(int, pids.read_text().split())
    assert watchdog_pid == process.pid
    if whom == "the group":
        os.killpg(process.pid, number)
    else:
        os.kill(pytest_pid if whom == "pytest" else watchdog_pid, number)
    output = process.communicate(timeout=20)[0].decode()
    assert process.returncode == 2, output
    document = read(tier.results)
    assert (document["outcome"], document["complete"]) == ("interrupted", False)
    assert document["detail"] == f"interrupted by {number.name}"
    rows = {row["id"].rpartition("::")[2]: row for row in document["tests"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_first": "passed", "test_it": "not-run", "test_next": "not-run",
    }  # fmt: skip
    assert rows["test_it"]["message"] == f"interrupted by {number.name} while it ran"
    assert rows["test_next"]["message"] == f"interrupted by {number.name}"
    # Fixtures were torn down, once and undisturbed.
    assert (tier.pytester.path / "stopped").exists()
    assert document["survivors"] == []
    assert gone(pytest_pid)


def test_a_signal_that_did_not_wake_pytest_is_acted_on(tier: Tier) -> None:
    # As one does that comes between Python's last look and the call that sleeps; another thread's comes so every time.
    began = time.monotonic()
    run = tier.run(
        """
def test_it():
    other = threading.Thread(target=time.sleep, args=(30,), daemon=True)
    other.start()
    threading.Timer(0.3, signal.pthread_kill, (other.ident, signal.SIGTERM)).start()
    time.sleep(15)
"""
    )
    assert (run.status, run.outcomes) == (2, {"test_it": "not-run"})
    assert run.document["detail"] == "interrupted by SIGTERM"
    assert time.monotonic() - began < 12


def test_the_watchdog_waits_without_work_for_a_pytest_that_has_closed_everything(tier: Tier) -> None:
    # As one that ends does while it gives back a GPU's memory, for seconds.
    tier.run(
        """
def used():
    return sum(int(field) for field in Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[11:13])

def test_it():
    os.closerange(3, 256)
    before = used()
    time.sleep(2)
    Path("used").write_text(str((used() - before) / os.sysconf("SC_CLK_TCK")))
"""
    )
    assert float((tier.pytester.path / "used").read_text()) < 1


def test_an_interruption_that_is_swallowed_ends_pytest(tier: Tier) -> None:
    tier.pace(grace=0.2)
    tier.budget("[each]\nstop = { ceiling = 0.3 }")
    run = tier.run(
        """
def test_it():
    threading.Timer(0.5, os.kill, (os.getppid(), signal.SIGTERM)).start()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""
    )
    assert (run.status, run.outcomes) == (137, {"test_it": "not-run"})
    assert (run.document["outcome"], run.document["complete"]) == ("interrupted", False)
    assert "pytest did not end after it was interrupted: killed" in run.document["detail"]


def test_a_line_says_what_is_still_running(tier: Tier) -> None:
    tier.pace(still=0.3)
    tier.budget("[each]\nready = { ceiling = 9 }")
    run = tier.run("def test_it():\n    with phase('ready'):\n        time.sleep(0.8)\n")
    lines = [line for line in run.out.splitlines() if line.startswith("still in ")]
    assert lines == ["still in tests/rollout/test_it.py::test_it, phase ready, 0 s of 9 s",
                     "still in tests/rollout/test_it.py::test_it, phase ready, 1 s of 9 s"]  # fmt: skip


# ---------------------------------------------------------------------------------- phases and records


def test_phases_and_records_without_the_plugin() -> None:
    with phase("load"):
        record("x", [1, 2])
    with (
        pytest.raises(ValueError, match="no phase 'loading': there are start, load, ready"),
        phase("loading"),
    ):
        pass
    with pytest.raises(ValueError, match="JSON"):
        record("x", float("nan"))
    with pytest.raises(TypeError):
        record("x", object())


def test_phases_elsewhere_than_in_the_main_thread_disturb_nothing(tier: Tier) -> None:
    run = tier.run(
        """
import multiprocessing

def busy():
    with phase("load"):
        record("from elsewhere", 1)
        time.sleep(0.2)

@pytest.fixture
def left_open():
    with phase("ready"):
        yield

def test_thread():
    thread = threading.Thread(target=busy)
    thread.start()
    thread.join()

def test_fork():
    process = multiprocessing.get_context("fork").Process(target=busy)
    process.start()
    process.join()
    assert process.exitcode == 0

def test_forked_child_ends_on_sigterm():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM

def test_left_open(left_open):
    time.sleep(0.2)
"""
    )
    assert run.status == 0, run.out
    assert run.row("test_thread")["phases"]["load"] == run.row("test_fork")["phases"]["load"] == 0
    assert run.row("test_thread")["phases"]["test"] >= 0.2
    assert run.row("test_thread")["records"] == {"from elsewhere": 1}
    assert run.row("test_fork")["records"] == {}
    phases = run.row("test_left_open")["phases"]
    assert phases["test"] >= 0.2 > phases["ready"]


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 100),
            st.one_of(st.sampled_from(PHASES), st.integers(0, 10)),
        ),
        max_size=40,
    )
)
def test_exclusive_times_sum_to_the_time_that_any_phase_was_open(
    steps: list[tuple[float, str | int]],
) -> None:
    """Phases open (a name) and close (a token, in any order, known or not) after some seconds each."""
    clock = Clock()
    at = covered = 0.0
    expected = dict.fromkeys(PHASES, 0.0)
    opened: list[tuple[int, str]] = []
    token = 0
    for wait, step in steps:
        if opened:
            covered += wait
            expected[opened[-1][1]] += wait
        at += wait
        if isinstance(step, str):
            token += 1
            clock.begin(token, step, at)
            opened.append((token, step))
        else:
            clock.end(step, at)
            if step in [known for known, _ in opened]:
                del opened[[known for known, _ in opened].index(step) :]
        assert clock.phase == (opened[-1][1] if opened else None)
        assert sum(clock.seconds.values()) == pytest.approx(covered)
    assert clock.seconds == pytest.approx(expected)

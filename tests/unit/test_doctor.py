"""`drydock doctor` says what is here by trying it, and what to do about what is not."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import npu_outputs
import pytest
from index_server import IndexServer

from drydock import doctor, npu_smi
from drydock.doctor import Finding, examine, verdict
from drydock.errors import DrydockError
from drydock.store import Store
from drydock.tiers import device

REPOSITORY = Path(__file__).parents[2]


def look(tmp_path: Path) -> dict[str, Finding]:
    """What is found, offline."""
    return {finding.what: finding for finding in examine(REPOSITORY, Store(tmp_path), {}, offline=True)}


class Usage(NamedTuple):
    free: float


@pytest.mark.parametrize(("free", "state"), [(1e9, "missing"), (20e9, "limited"), (100e9, "ok")])
def test_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    found = look(tmp_path / "not/there/yet")
    assert found["disk"].state == state
    assert bool(found["disk"].advice) is (state != "ok")
    assert (verdict(list(found.values())) or "").startswith("disk: 1.00 GB free") is (state == "missing")


def no_docker() -> tuple[str, bool]:
    raise DrydockError(
        "no Docker engine answers (refused): start one, set DOCKER_HOST, or use --runtime chroot"
    )


def no_namespaces(_: Store) -> None:
    raise DrydockError("root may not make namespaces here")


def test_without_any_runtime_there_is_no_main_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("drydock.docker_runtime.engine_facts", no_docker)
    found = look(tmp_path)
    assert found["Docker"].state == "missing"
    assert found["Docker"].detail == "no Docker engine answers (refused)"
    monkeypatch.setattr("drydock.chroot_runtime.try_namespaces", no_namespaces)
    found = look(tmp_path)
    assert found["chroot"].state == "missing"
    assert "no runtime" in (verdict(list(found.values())) or "")
    monkeypatch.setattr("drydock.docker_runtime.engine_facts", lambda: ("26.1", True))
    found = look(tmp_path)
    assert found["Docker"].state == "ok"
    assert verdict(list(found.values())) is None


def test_dockers_classic_store_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("drydock.docker_runtime.engine_facts", lambda: ("26.1", False))
    found = look(tmp_path)["Docker"]
    assert found.state == "limited"
    assert "containerd-snapshotter" in found.advice


@pytest.mark.parametrize(
    ("gpus", "state"),
    [
        ([], "limited"),
        ([{"name": "H100", "driver": "570.10"}], "limited"),
        ([{"name": "H100", "driver": "580.65.06"}], "ok"),
        ([{"name": "H100", "driver": "590"}], "ok"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: list[Any], state: str) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "DEV", tmp_path)
    monkeypatch.setattr(doctor, "used_here", lambda _: {"gpus": gpus})
    found = look(tmp_path)["NVIDIA GPUs"]
    assert found.state == state
    assert bool(found.advice) is (state != "ok")


def test_gpus_that_the_environment_hides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "DEV", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor._gpu(REPOSITORY)
    assert (found.state, found.detail) == (
        "limited",
        "1 device files, CUDA_VISIBLE_DEVICES leaves none of them",
    )
    assert found.advice.startswith("unset CUDA_VISIBLE_DEVICES")


@pytest.fixture
def npus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Finding]:
    """What is said of a machine with an A3's two chips, with one text of its table put in place of another."""
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    monkeypatch.setattr(device, "DEV", tmp_path)
    monkeypatch.setattr(doctor, "missing_files", list)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    def said(old: str = "", new: str = "") -> Finding:
        assert old in npu_outputs.A3
        seen = npu_smi.read(npu_outputs.A3.replace(old, new), npu_outputs.A3_NUMBERS)
        monkeypatch.setattr(npu_smi, "look", lambda: seen)
        return doctor._npu(REPOSITORY)

    return said


def test_npus(npus: Callable[..., Finding]) -> None:
    found = npus()
    assert (found.state, found.detail, found.advice) == ("ok", "2 x Ascend910, driver 26.0.rc2", "")
    old = npus("26.0.rc2", "25.7.rc1")
    assert (old.state, old.advice) == ("limited", "images of ascend need a driver of 26.0.RC1 or newer")
    assert (
        npus("| OK   ", "| Alarm").advice
        == "see `npu-smi info`, which does not call these well: 0.0 (Alarm), 0.1 (Alarm)"
    )


def test_npus_without_their_files_or_their_driver(
    npus: Callable[..., Finding], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "missing_files", lambda: ["/usr/local/dcmi"])
    assert (
        npus().advice == "install the driver anew: /usr/local/dcmi is not there, which a container is given"
    )
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert npus().advice == "there is no image for NPUs on x86_64: for aarch64 there is"
    monkeypatch.undo()
    assert doctor._npu(REPOSITORY).state == "missing"
    monkeypatch.setattr(device, "DEV", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "2 device files, and npu-smi info does not run" in doctor._npu(REPOSITORY).detail


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """No configuration of this machine's."""
    return {"HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"}


def index(settings: dict[str, str]) -> Finding:
    return doctor._index(settings)


def test_a_folder_is_an_index(settings: dict[str, str], tmp_path: Path) -> None:
    settings |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    assert index(settings).state == "ok"
    settings["PIP_FIND_LINKS"] = str(tmp_path / "gone")
    assert index(settings).state == "missing"
    assert "is not there" in index(settings).detail


def test_an_index_that_answers_and_one_that_refuses(settings: dict[str, str]) -> None:
    with IndexServer() as server, IndexServer() as empty:
        server.add("packaging", "packaging-1.0-py3-none-any.whl", b"")
        settings["PIP_INDEX_URL"] = server.simple
        assert index(settings).state == "ok"
        assert server.simple in index(settings).detail
        settings["PIP_INDEX_URL"] = empty.simple
        assert "status 404" in index(settings).detail


def test_an_index_that_does_not_answer_is_named_without_its_password(
    settings: dict[str, str], tmp_path: Path
) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        settings["PIP_INDEX_URL"] = f"http://me:secret@127.0.0.1:{reserved.getsockname()[1]}/simple"
        found = index(settings)
        assert found.state == "missing"
        assert "does not answer (ConnectError)" in found.detail
        assert "secret" not in found.detail
        assert (verdict([ok("Docker"), ok("chroot"), found]) or "").startswith("package index: ")
        # With a folder beside it, fetching works, and waits.
        found = index(settings | {"PIP_FIND_LINKS": str(tmp_path)})
        assert found.state == "limited"
        assert found.advice


def ok(what: str) -> Finding:
    return Finding(what=what, state="ok", detail="")


def test_the_command_says_it_in_lines_and_as_json() -> None:
    def run(*more: str) -> str:
        command = [sys.executable, "-m", "drydock.cli", "doctor", "--offline", *more]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout

    document = json.loads(run("--json"))
    assert {row["what"] for row in document["findings"]} >= {"Docker", "chroot", "NVIDIA GPUs", "disk"}
    assert "package index" not in {row["what"] for row in document["findings"]}
    lines = run().splitlines()
    assert len([line for line in lines if not line.startswith(" ")]) == len(document["findings"])

"""The devices of GPUs, NPUs and the CPU alike: tested where there is none, against what real drivers printed."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import npu_outputs
import nvidia_outputs
import pytest
from project import REPOSITORY

from drydock import docker_runtime
from drydock.definition import Definition, Image
from drydock.docker_runtime import DockerRuntime
from drydock.drivers import NPU_FILES, NPU_MANAGERS, NPU_NETWORK, npu_files
from drydock.errors import DrydockError
from drydock.hardware import hardware_here, used_here, variant_here
from drydock.namespaces import Bind
from drydock.oci import Built
from drydock.runtime import Task
from drydock.server import devices
from drydock.tiers import device
from drydock.tiers.device import CPU, CUDA, NPU, device_for, device_here, hidden

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with these device files and the drivers' programs that are given, name -> script."""

    def make(*files: str, **programs: str) -> Path:
        dev = tmp_path / "dev"
        dev.mkdir(exist_ok=True)
        for path in dev.iterdir():
            path.unlink()
        for name in files:
            (dev / name).touch()
        for name, script in programs.items():
            program = tmp_path / name.replace("_", "-")
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(device, "DEV", dev)
        return tmp_path

    return make


def npu_smi(folder: Path, table: str, numbers: str) -> str:
    (folder / "info").write_text(table)
    (folder / "numbers").write_text(numbers)
    return f'[ "$2" = -m ] && cat {folder}/numbers || cat {folder}/info'


def an_a2(machine: Machine, tmp_path: Path) -> None:
    script = npu_smi(tmp_path, npu_outputs.A2, npu_outputs.A2_NUMBERS)
    machine("davinci5", "davinci_manager", npu_smi=script)


def an_a3(machine: Machine, tmp_path: Path) -> None:
    script = npu_smi(tmp_path, npu_outputs.A3, npu_outputs.A3_NUMBERS)
    machine("davinci0", "davinci1", "davinci_manager", npu_smi=script)


def an_h100(machine: Machine, tmp_path: Path) -> None:
    for query, said in nvidia_outputs.H100.items():
        (tmp_path / query).write_text(said)
    machine("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-caps", nvidia_smi=f"cat {tmp_path}/$1")


# What a tier's tests see.


def test_a_device_is_a_file_with_a_number(tmp_path: Path) -> None:
    for name in ("davinci0", "davinci12", "davinci_manager", "davinci0_log", "devmm_svm"):
        (tmp_path / name).touch()
    assert [path.name for path in NPU.files(tmp_path)] == ["davinci0", "davinci12"]
    assert NPU.files(tmp_path / "nothing") == []
    assert CPU.files(tmp_path) == []


def test_what_a_machine_has_is_counted(machine: Machine) -> None:
    machine()
    assert (device_here(), CUDA.here(), NPU.here(), CPU.here()) == (CPU, 0, 0, 0)
    machine("nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-modeset")
    assert (device_here(), CUDA.here()) == (CUDA, 3)
    machine("davinci0", "davinci7", "davinci_manager", "devmm_svm", "hisi_hdc")
    assert (device_here(), NPU.here(), CUDA.here()) == (NPU, 2, 0)


def test_each_has_its_own_words(machine: Machine) -> None:
    machine()
    assert [device_for(kind) for kind in ("none", "cuda", "npu")] == [CPU, CUDA, NPU]
    assert [each.backend for each in (CPU, CUDA, NPU)] == ["gloo", "nccl", "hccl"]
    assert [each.at(1) for each in (CPU, CUDA, NPU)] == ["cpu", "cuda:1", "npu:1"]
    assert hidden() == {"CUDA_VISIBLE_DEVICES": "", "ASCEND_RT_VISIBLE_DEVICES": ""}


def test_torch_is_asked_by_its_names_and_torch_npu_only_for_npus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins: neither is installed here, and the module that has these names must not need them."""
    memory = SimpleNamespace(mem_get_info=lambda number: (1000 + number, 4000))
    torch = ModuleType("torch")
    monkeypatch.setattr(torch, "cuda", memory, raising=False)
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(), raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert CUDA.free_bytes(2) == 1002
    assert CPU.module() is torch.cpu
    with pytest.raises(ImportError, match="torch_npu"):
        NPU.module()
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", memory, raising=False)
    assert NPU.free_bytes() == 1000


# What a run had, and which image fits.


def test_what_a_run_had_is_in_its_document(machine: Machine, tmp_path: Path) -> None:
    an_h100(machine, tmp_path)
    had = used_here(CUDA)
    one = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 << 20, "driver": "580.159.04"}
    assert (had["kind"], had["gpus"], had["npus"]) == ("cuda", [one], [])
    an_a3(machine, tmp_path)
    had = used_here(NPU)
    one = {"name": "Ascend910", "memory_bytes": 64 << 30, "driver": "26.0.rc2"}
    assert (had["kind"], had["gpus"], had["npus"]) == ("npu", [], [one, one])
    had = used_here(CPU)
    assert (had["kind"], had["gpus"], had["npus"]) == ("cpu", [], [])


def test_devices_that_the_environment_hides_are_not_of_the_run(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_h100(machine, tmp_path)
    for named, count in (("0", 1), (nvidia_outputs.UUID, 1), ("GPU-5a1a", 1), ("1", 0), ("", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert len(used_here(CUDA)["gpus"]) == count
    an_a3(machine, tmp_path)
    for named, count in (("0", 1), ("0, 1", 2), ("7", 0)):
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", named)
        assert len(used_here(NPU)["npus"]) == count


@pytest.mark.parametrize(
    ("named", "count"),
    [("", 0), ("0", 1), ("2,0", 2), (" 1 , 2 ", 2), ("0,3,1", 1), ("0,-1,1", 1), ("GPU-5a1a6a2e,GPU-77", 2)],
)
def test_how_many_a_process_may_use(machine: Machine, named: str, count: int) -> None:
    machine("nvidia0", "nvidia1", "nvidia2", "nvidiactl")
    assert CUDA.usable({"ASCEND_RT_VISIBLE_DEVICES": "0"}) == 3
    assert CUDA.usable({"CUDA_VISIBLE_DEVICES": named}) == count


def test_a_command_in_an_image_is_kept_to_the_devices_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Built(
        name="h100-vllm", architecture="amd64", digest="", config_digest="", layers=(), environment={}
    )

    def seen(accelerator: str, **environment: str) -> dict[str, str]:
        task = Task(
            command=("true",),
            checkout=tmp_path,
            results=tmp_path,
            accelerator=accelerator,
            environment=environment,
        )
        return {name: value for name, value in task.variables(built).items() if "DEVICE" in name}

    assert seen("cuda") == seen("npu") == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    assert seen("cuda") == {"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert seen("npu") == {"ASCEND_RT_VISIBLE_DEVICES": "1"}
    assert seen("none") == {}
    assert seen("cuda", CUDA_VISIBLE_DEVICES="0")["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_machine_that_was_emulated_is_in_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert [used_here(CPU, machine)["emulated"] for machine in ("", "x86_64", "aarch64")] == [
        "",
        "",
        "aarch64",
    ]


def test_memory_that_a_server_uses_is_read_of_either(machine: Machine, tmp_path: Path) -> None:
    an_h100(machine, tmp_path)
    assert devices.used_mib({}) == {"GPU-5a1a6a2e-7a5c-4c0e-9c39-4f0f6f0c2b11": 4}
    assert devices.used_mib({CUDA.visible: ""}) is None
    (tmp_path / "dev/nvidia0").unlink()
    an_a3(machine, tmp_path)
    assert devices.used_mib({}) == {"0.0": 3419, "0.1": 2874}
    assert devices.used_mib({NPU.visible: "1"}) == {"0.1": 2874}
    assert devices.used_mib({NPU.visible: ""}) is None


@pytest.mark.parametrize(
    ("put", "architecture", "expected"),
    [
        (an_h100, "x86_64", "h100"), (an_h100, "aarch64", "gb200"), (an_a2, "aarch64", "ascend"),
        (an_a3, "aarch64", "ascend"), (an_a3, "x86_64", "cpu"),
    ],
)  # fmt: skip
def test_the_hardware_that_fits(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    put: Callable[[Machine, Path], None], architecture: str, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    put(machine, tmp_path)
    assert hardware_here(REPOSITORY) == expected


def ascend() -> Definition:
    return Image.named(REPOSITORY, "ascend").definition


def test_the_variant_is_the_one_for_the_chips_that_are_here(machine: Machine, tmp_path: Path) -> None:
    machine()
    assert variant_here(ascend()) == ""
    an_a2(machine, tmp_path)
    assert variant_here(ascend()) == ""
    an_a3(machine, tmp_path)
    assert variant_here(ascend()) == "-a3"
    assert variant_here(Image.named(REPOSITORY, "cpu").definition) == ""
    machine("davinci0", npu_smi="exit 1")
    assert variant_here(ascend()) == ""


# What a container is given.


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with two chips and all that its driver brings."""
    root = tmp_path / "root"
    for name in ("davinci0", "davinci1", *NPU_MANAGERS):
        (root / "dev").mkdir(parents=True, exist_ok=True)
        (root / "dev" / name).touch()
    for name in NPU_FILES:
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix == ".info" else path.mkdir()
    program = root / "npu-smi"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(root))
    return root


def test_a_container_is_given_the_chips_and_the_driver_s_files(root: Path) -> None:
    binds = {bind.target: bind for bind in npu_files(root)}
    assert binds.keys() == {
        "/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc",
        "/usr/local/Ascend/driver/lib64", "/usr/local/Ascend/driver/version.info", "/usr/local/dcmi",
        "/etc/ascend_install.info", "/usr/local/bin/npu-smi",
    }  # fmt: skip
    assert {target for target, bind in binds.items() if not bind.read_only} == {
        target for target in binds if target.startswith("/dev/")
    }
    assert binds["/usr/local/dcmi"].source == str(root / "usr/local/dcmi")
    (root / "etc/hccn.conf").touch()
    assert npu_files(root)[-2].target == NPU_NETWORK


def test_a_driver_s_file_that_is_a_link_is_given_as_what_it_is(root: Path) -> None:
    folder = root / "usr/local/dcmi"
    folder.rmdir()
    (root / "opt").mkdir()
    folder.symlink_to(root / "opt")
    assert {bind.target: bind.source for bind in npu_files(root)}["/usr/local/dcmi"] == str(root / "opt")


def test_a_machine_without_chips_or_with_half_a_driver_says_so(root: Path) -> None:
    (root / "dev/hisi_hdc").unlink()
    (root / "usr/local/dcmi").rmdir()
    with pytest.raises(DrydockError, match="driver has no /dev/hisi_hdc, /usr/local/dcmi: install it anew"):
        npu_files(root)
    for number in (0, 1):
        (root / f"dev/davinci{number}").unlink()
    with pytest.raises(DrydockError, match="no /dev/davinci"):
        npu_files(root)


def test_docker_is_told_of_npus_what_its_toolkit_would_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own client in its place: there is no NPU here, and perhaps no engine."""
    asked: list[dict[str, object]] = []
    files = [
        Bind(source="/dev/davinci0", target="/dev/davinci0"),
        Bind(source="/opt/dcmi", target="/usr/local/dcmi", read_only=True),
    ]
    monkeypatch.setattr(docker_runtime, "driver_files", lambda _: (files, {}))
    runtime = DockerRuntime.__new__(DockerRuntime)
    containers = SimpleNamespace(create=lambda *_, **options: asked.append(options))
    monkeypatch.setattr(runtime, "_client", SimpleNamespace(containers=containers), raising=False)
    built = Built(
        name="x", architecture="arm64", digest="1" * 64, config_digest="2" * 64, layers=(), environment={}
    )
    for accelerator in ("npu", "cuda", "none"):
        task = Task(
            command=("true",), checkout=tmp_path, results=tmp_path / "results", accelerator=accelerator  # type: ignore[arg-type]
        )  # fmt: skip
        runtime._create(built, task)
    npu, cuda, none = asked
    assert npu["devices"] == ["/dev/davinci0:/dev/davinci0:rwm"]
    assert isinstance(npu["mounts"], list)
    mount = npu["mounts"][-1]
    assert (mount["Target"], mount["Source"], mount["ReadOnly"]) == ("/usr/local/dcmi", "/opt/dcmi", True)
    assert [len(each["device_requests"]) for each in asked] == [0, 1, 0]  # type: ignore[arg-type]
    for other in (cuda, none):
        assert other["devices"] == []
        assert isinstance(other["mounts"], list)
        assert len(other["mounts"]) == len(npu["mounts"]) - 1

"""The verifier on NPUs: npu-smi's tables as real ones printed them, and CANN's files as its images have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import npu_outputs
import pytest

from drydock import npu_smi
from drydock.tiers import device
from drydock.verify import npu
from drydock.verify.accelerator import check_devices
from drydock.verify.declared import Accelerator, locked_as, read_absent, read_accelerator
from drydock.verify.distributions import check_absent
from drydock.verify.npu import check_cann, compare_npus, read_version
from drydock.verify.report import Finding
from drydock.verify.tree import Tree

A2 = Accelerator(kind="npu", minimum_driver="25.5.0", sm=(), soc=("910B*",), cann="9.1.0")
A3 = Accelerator(kind="npu", minimum_driver="26.0.RC1", sm=(), soc=("Ascend910",), cann="9.1.0")

# Of a driver and of CANN, as people published them with their reports.
DRIVER_INFO = """\
Version=25.5.2
ascendhal_version=7.35.23
aicpu_version=1.0
Innerversion=V100R001C23SPC002B212
compatible_version=[V100R001C19],[V100R001C20],[V100R001C21],[V100R001C22],[V100R001C23]
compatible_version_fw=[7.0.0,8.9.9]
package_version=25.5.2
"""
CANN_INFO = """\
package_name=Ascend-cann-toolkit
version=9.1.0
innerversion=V100R001C23SPC002B210
compatible_version=[V100R001C15],[V100R001C18],[V100R001C19],[V100R001C20],[V100R001C21],[V100R001C23]
arch=aarch64
os=linux
path=/usr/local/Ascend/cann-9.1.0/aarch64-linux
"""
STACK = {"torch": "2.10.0+cpu", "torch-npu": "2.10.0.post4"}


def seen(table: str, numbers: str, **changes: str) -> npu_smi.Seen:
    for old, new in changes.items():
        assert old in table
        table = table.replace(old, new)
    return npu_smi.read(table, numbers)


def findings(
    accelerator: Accelerator, what: npu_smi.Seen, installed: str | None = None
) -> list[tuple[str, str]]:
    return [(finding.subject, finding.what) for finding in compare_npus(accelerator, what, installed)]


def test_the_chips_that_it_is_made_for_pass() -> None:
    assert findings(A2, seen(npu_outputs.A2, npu_outputs.A2_NUMBERS), "25.5.2") == []
    assert findings(A3, seen(npu_outputs.A3, npu_outputs.A3_NUMBERS)) == []


def test_each_difference_is_named() -> None:
    table = seen(npu_outputs.A2, npu_outputs.A2_NUMBERS)
    assert findings(A3, table) == [
        ("driver", "25.5.2 is older than the image's minimum 26.0.RC1"),
        ("910B4", "the image is made for Ascend910"),
    ]
    assert findings(A2, table, "25.3.rc1") == [
        ("driver", f"npu-smi says 25.5.2, {npu.DRIVER} says 25.3.rc1"),
    ]


@pytest.mark.parametrize(("driver", "enough"), [("26.0.rc1", True), ("26.0.0", True), ("25.7.rc1.7", False)])
def test_a_release_candidate_is_older_than_its_release(driver: str, enough: bool) -> None:
    table = npu_smi.read(npu_outputs.A3.replace("26.0.rc2", driver), npu_outputs.A3_NUMBERS)
    assert (findings(A3, table) == []) is enough


def test_a_driver_whose_version_is_none_is_not_taken_for_new_enough() -> None:
    table = npu_smi.read(npu_outputs.A3.replace("26.0.rc2", "V100R001"), npu_outputs.A3_NUMBERS)
    assert findings(A3, table) == [("driver", "'V100R001' is no version of Ascend's driver")]


@pytest.mark.parametrize("health", ["Warning", "Alarm", "Critical", "UNKNOWN"])
def test_a_chip_that_is_not_well_is_named(health: str) -> None:
    row = "| 0     Ascend910           | OK            | -  "
    assert row in npu_outputs.A3
    table = npu_smi.read(npu_outputs.A3.replace(row, row.replace("OK", health)), npu_outputs.A3_NUMBERS)
    assert findings(A3, table) == [("NPU 0.1", f"npu-smi says of its health: {health}")]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an A2 by its npu-smi and its driver's own file."""
    for name, text in {"info": npu_outputs.A2, "numbers": npu_outputs.A2_NUMBERS}.items():
        (tmp_path / name).write_text(text)
    program = tmp_path / "npu-smi"
    program.write_text(f'#!/bin/sh\n[ "$2" = -m ] && cat {tmp_path}/numbers || cat {tmp_path}/info\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "version.info").write_text(DRIVER_INFO)
    monkeypatch.setattr(npu, "DRIVER", tmp_path / "version.info")
    (tmp_path / "davinci5").touch()
    monkeypatch.setattr(device, "DEV", tmp_path)
    return tmp_path


def test_a_machine_is_asked(machine: Path) -> None:
    outcome = check_devices(A2, torch=True)
    assert outcome == (1, "driver 25.5.2, 1 x 910B4", [], (), None)
    (machine / "version.info").unlink()
    assert check_devices(A2, torch=True) == outcome
    (machine / "npu-smi").write_text("#!/bin/sh\necho dcmi module initialize failed; exit 1\n")
    outcome = check_devices(A2, torch=True)
    assert outcome.findings == [Finding("driver", "npu-smi info failed: dcmi module initialize failed")]


def test_without_a_chip_it_is_not_run_and_never_passed(machine: Path) -> None:
    (machine / "davinci5").unlink()
    assert check_devices(A2, torch=True) == (0, "no device: there is no /dev/davinci*", (), (), "not-run")


@pytest.mark.parametrize("file", npu.CANN_FILES)
@pytest.mark.parametrize(
    "environment", [{"ASCEND_HOME_PATH": "/opt/cann"}, {"ASCEND_TOOLKIT_HOME": "/opt/cann/"}, {}]
)
def test_cann_says_its_version_in_one_of_its_files(
    tmp_path: Path, file: str, environment: dict[str, str]
) -> None:
    """Through the links that CANN's own installer makes."""
    real = tmp_path / "usr/local/Ascend/cann-9.1.0/aarch64-linux"
    real.mkdir(parents=True)
    (real / file).write_text(CANN_INFO)
    for link in ("opt/cann", "usr/local/Ascend/ascend-toolkit/latest"):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to("/usr/local/Ascend/cann-9.1.0")
    outcome = check_cann(A2, Tree(tmp_path), "aarch64", environment, STACK)
    assert outcome == (2, "CANN 9.1.0, torch-npu 2.10.0.post4 on torch 2.10.0+cpu", [], (), None)


@pytest.mark.parametrize(
    ("info", "stack", "expected"),
    [
        (CANN_INFO.replace("=9.1.0", "=9.0.0"), STACK, ("CANN", "9.1.0 is declared, 9.0.0 is in /cann/aarch64-linux")),
        ("arch=aarch64\n", STACK,
         ("CANN", "9.1.0 is declared, and /cann/aarch64-linux does not say which is there")),
        (None, STACK, ("CANN", "9.1.0 is declared, and /cann/aarch64-linux does not say which is there")),
        (CANN_INFO, STACK | {"torch": "2.9.0"},
         ("torch-npu", "2.10.0.post4 belongs to torch 2.10.0, 2.9.0 is installed")),
        (CANN_INFO, {"torch": "2.10.0"}, ("torch-npu", "is not installed")),
        (CANN_INFO, {"torch-npu": "2.10.0"}, ("torch", "is not installed")),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_named(
    tmp_path: Path, info: str | None, stack: dict[str, str], expected: tuple[str, str]
) -> None:
    folder = tmp_path / "cann/aarch64-linux"
    folder.mkdir(parents=True)
    if info:
        (folder / npu.CANN_FILES[0]).write_text(info)
    outcome = check_cann(A2, Tree(tmp_path), "aarch64", {"ASCEND_HOME_PATH": "/cann"}, stack)
    assert outcome.findings == [Finding(*expected)]


def test_a_file_s_version_is_not_that_of_its_neighbours() -> None:
    assert read_version(DRIVER_INFO) == "25.5.2"
    assert read_version(CANN_INFO) == "9.1.0"
    assert read_version("ascendhal_version=7.35.23\ninnerversion=V1\n") is None


DEFINITION: dict[str, Any] = {
    "accelerator": {"kind": "npu", "minimum-driver": "26.0.RC1", "cann": "9.1.0", "soc": ["910B*"]},
    "base": {"variants": {"a3": {"soc": ["Ascend910"]}}},
    "engine": {"vllm": {"absent-distributions": {"mindspeed": "no wheel"}}, "vllm-omni": {}},
}


def test_a_definition_says_what_a_manifest_does_not() -> None:
    assert read_accelerator(DEFINITION, "ascend-vllm").soc == ("910B*",)
    assert read_accelerator(DEFINITION, "ascend-vllm-a3") == A3
    assert read_absent(DEFINITION, "ascend-vllm-a3") == {"mindspeed": "no wheel"}
    assert read_absent(DEFINITION, "ascend-vllm-omni") == {}
    names = ("ascend-vllm", "ascend-vllm-a3", "ascend-vllm-omni", "ascend-vllm-omni-a3")
    assert [locked_as(DEFINITION, name) for name in names] == [
        "ascend-vllm", "ascend-vllm", "ascend-vllm-omni", "ascend-vllm-omni",
    ]  # fmt: skip
    with pytest.raises(KeyError):
        read_accelerator(DEFINITION, "ascend-vllm-a5")


def test_what_is_declared_missing_is_said_and_is_no_difference() -> None:
    absent = {"mindspeed": "no index has a wheel of it"}
    outcome = check_absent(absent, {"torch": "2.10.0"})
    assert (outcome.state, outcome.findings) == ("as-declared", [])
    assert outcome.detail == "mindspeed is missing, as declared: no index has a wheel of it"
    outcome = check_absent(absent, {"mindspeed": "0.16"})
    assert outcome.state == "failed"
    assert [finding.what for finding in outcome.findings] == [
        "0.16 is installed, and declared as missing: take it out of absent-distributions"
    ]

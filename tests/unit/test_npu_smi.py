"""npu-smi's tables, read as real ones printed them."""

from __future__ import annotations

import itertools
from pathlib import Path

import npu_outputs
import pytest

from drydock import npu_smi
from drydock.npu_smi import Npu, NpuSmiError, Process, read, version_key


def test_an_a2_has_one_chip_a_card_and_its_number_is_not_the_card_s() -> None:
    seen = read(npu_outputs.A2, npu_outputs.A2_NUMBERS)
    assert seen.driver == "25.5.2"
    assert seen.npus == (Npu(5, 0, 0, "910B4", "0000:41:00.0", "OK", 2922, 32768),)
    assert seen.processes == ()


def test_memory_is_the_device_s_own_and_who_holds_it_is_read() -> None:
    seen = read(npu_outputs.WORKING, npu_outputs.WORKING_NUMBERS)
    assert [(npu.used_mib, npu.total_mib) for npu in seen.npus] == [(30711, 32768)]
    assert seen.processes == (Process(0, 0, 55115, "python", 30784),)


def test_an_a3_has_two_chips_a_card_and_a_column_more() -> None:
    seen = read(npu_outputs.A3, npu_outputs.A3_NUMBERS)
    assert [(npu.place, npu.number, npu.bus, npu.used_mib) for npu in seen.npus] == [
        ("0.0", 0, "0000:9D:00.0", 3419), ("0.1", 1, "0000:9F:00.0", 2874),
    ]  # fmt: skip
    assert seen.processes == (Process(0, 0, 632268, "python3.1", 197),)


def test_chips_that_share_a_bus_address_are_two() -> None:
    seen = read(npu_outputs.INFERENCE, npu_outputs.INFERENCE_NUMBERS)
    assert {npu.place: (npu.used_mib, npu.total_mib) for npu in seen.npus} == {
        "2.0": (1417, 44216), "2.1": (1516, 43757),
    }  # fmt: skip


def test_a_process_may_have_no_name() -> None:
    text = npu_outputs.WORKING.replace("| python  ", "|         ")
    assert read(text, npu_outputs.WORKING_NUMBERS).processes == (Process(0, 0, 55115, "", 30784),)


@pytest.mark.parametrize(
    ("info", "numbers", "why"),
    [
        ("", npu_outputs.A2_NUMBERS, "shows no device: it prints nothing"),
        ("dcmi model initialized failed\n", npu_outputs.A2_NUMBERS, "shows no device: dcmi model initialized failed"),
        (npu_outputs.A3, npu_outputs.A2_NUMBERS, "no logical number of card 0, chip 0"),
        (npu_outputs.A2.replace("2922 / 32768", "NA"), npu_outputs.A2_NUMBERS, "cannot be read: 0 | 0000:41"),
        (npu_outputs.A2.replace("0    / 0          2922 / 32768", "NA"), npu_outputs.A2_NUMBERS, "cannot be read: 0"),
    ],
)  # fmt: skip
def test_what_it_cannot_read_is_an_error(info: str, numbers: str, why: str) -> None:
    with pytest.raises(NpuSmiError, match=why.replace("|", r"\|")):
        read(info, numbers)


def test_a_driver_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NpuSmiError, match="put the driver's npu-smi on PATH"):
        npu_smi.look()
    program = tmp_path / "npu-smi"
    program.write_text("#!/bin/sh\necho dcmi module initialize failed; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(NpuSmiError, match="npu-smi info failed: dcmi module"):
        npu_smi.look()


def test_versions_of_drivers_in_the_order_of_their_release() -> None:
    """A release candidate comes before its release, and its own fixes after it."""
    released = [
        "23.0.rc1", "23.0.RC3", "23.0.0", "23.0.3", "24.1.RC3", "24.1.0", "25.0.rc1", "25.0.rc1.1", "25.2.0", "25.2.1",
        "25.5.2", "25.7.rc1.7", "26.0.RC1", "26.0.rc2", "26.0.0", "26.1.1",
    ]  # fmt: skip
    keys = [version_key(version) for version in released]
    assert all(one < other for one, other in itertools.pairwise(keys))
    assert version_key("26.0") == version_key("26.0.0")
    assert version_key("26.0.RC1") == version_key("26.0.rc1")


@pytest.mark.parametrize("version", ["", "26.0.", "26.0.RC", "26.0-beta.1", "V100R001", "unknown"])
def test_what_is_no_version_is_not_compared(version: str) -> None:
    with pytest.raises(ValueError, match="is no version of Ascend's driver"):
        version_key(version)

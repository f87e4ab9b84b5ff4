"""Check: the driver and the devices are what the image was made for."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drydock.errors import DrydockError
from drydock.verify.declared import Accelerator
from drydock.verify.image import Manifest
from drydock.verify.npu import check_npus
from drydock.verify.report import Finding, Outcome


class Device(NamedTuple):
    """A GPU: its name and its compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]


class NvmlError(Exception):
    """NVML is not there or refuses; the text says which call and its code."""


def read_nvml() -> tuple[str, list[Device]]:
    """The driver's version and the devices, by NVML, which the driver itself brings (NVML API reference).

    Raises:
        NvmlError: it does not load, or a call fails.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise NvmlError(f"libnvidia-ml.so.1 does not load: {error}") from error

    def call(function: str, *arguments: Any) -> None:
        code = getattr(nvml, function)(*arguments)
        if code:
            raise NvmlError(f"{function} returned {code}")

    call("nvmlInit_v2")
    try:
        text = ctypes.create_string_buffer(96)
        call("nvmlSystemGetDriverVersion", text, 96)
        driver = text.value.decode()
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        devices = []
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
            call("nvmlDeviceGetName", handle, text, 96)
            call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            devices.append(Device(text.value.decode(), (major.value, minor.value)))
        return driver, devices
    finally:
        nvml.nvmlShutdown()


def torch_architectures() -> list[str]:
    """What torch is compiled for, as `sm_90`; asked in a process of its own, which may crash.

    Raises:
        DrydockError: it did not answer.
    """
    code = "import json, torch; print(json.dumps(torch.cuda.get_arch_list()))"
    command = [sys.executable, "-c", code]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        architectures: list[str] = json.loads(run.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().rpartition("\n")[2]
        raise DrydockError(f"does not say what it is compiled for: {said}") from error
    return architectures


def compare_devices(
    accelerator: Accelerator, driver: str, devices: Sequence[Device], architectures: Sequence[str] | None
) -> Iterator[Finding]:
    """The host's driver and devices against what the image declares and torch's kernels run on.

    `architectures` is None for an image without torch. A kernel compiled for sm_80 runs on 8.6 (CUDA C++
    programming guide, binary compatibility); PTX (`compute_80`) would run too after minutes of compiling
    at start, so it does not count.
    """
    minimum = accelerator.minimum_driver
    if minimum and version_numbers(driver) < version_numbers(minimum):
        yield Finding("driver", f"{driver} is older than the image's minimum {minimum}")
    declared = {sm.rstrip("af") for sm in accelerator.sm}
    for device in dict.fromkeys(devices):
        major, minor = device.capability
        has = f"has compute capability {major}.{minor}"
        if f"{major}{minor}" not in declared:
            yield Finding(device.name, f"{has}, the image declares sm {', '.join(accelerator.sm)}")
        if architectures is not None and not any(_runs_on(name, major, minor) for name in architectures):
            yield Finding(device.name, f"{has}, torch is compiled for {' '.join(architectures)}")


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", architecture)
    if match is None or int(match[1]) != major:
        return False
    return int(match[2]) == minor if match[3] == "a" else int(match[2]) <= minor


def version_numbers(version: str) -> tuple[int, ...]:
    """A driver's version, to be compared."""
    return tuple(map(int, re.findall(r"\d+", version)))


def check_accelerator(manifest: Manifest, live: bool) -> Outcome:
    """The driver's version and every device against the manifest; not run where there is no device."""
    if manifest.accelerator.kind != "none" and not live:
        return Outcome(0, "this tree is not running", state="not-run")
    return check_devices(manifest.accelerator, any(entry.name == "torch" for entry in manifest.distributions))


def check_devices(accelerator: Accelerator, torch: bool) -> Outcome:
    """The same for what runs this; `torch` is whether its kernels are asked for too."""
    if accelerator.kind == "none":
        return Outcome(0, "the image is made for none", state="not-applicable")
    if accelerator.kind == "npu":
        return check_npus(accelerator)
    try:
        driver, devices = read_nvml()
    except NvmlError as error:
        if not Path("/dev/nvidiactl").exists():
            return Outcome(0, f"no device: {error}", state="not-run")
        return Outcome(0, "a device is there, its driver does not answer", [Finding("driver", str(error))])
    if not devices:
        return Outcome(0, f"driver {driver} shows no device", state="not-run")
    findings = []
    architectures = None
    if torch:
        try:
            architectures = torch_architectures()
        except DrydockError as error:
            findings.append(Finding("torch", str(error)))
    findings += compare_devices(accelerator, driver, devices, architectures)
    names = ", ".join(dict.fromkeys(device.name for device in devices))
    return Outcome(len(devices), f"driver {driver}, {len(devices)} x {names}", findings)

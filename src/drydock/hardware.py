"""Which hardware this machine is, as the images name it."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from drydock import npu_smi
from drydock.definition import MACHINES, Definition, Image, VendorBase, image_names
from drydock.tiers.device import CPU, CUDA, NPU, Device, device_here, is_named


def hardware_here(root: Path) -> str:
    """The hardware folder under `images/` that fits this machine; `cpu` where there is no accelerator.

    With GPUs, the CUDA image of this machine's architecture: x86-64 is h100, aarch64 is gb200. With NPUs, ascend.
    """
    device = device_here()
    definition = definition_for(root, device) if device is not CPU else None
    return definition.hardware if definition else "cpu"


def variant_here(definition: Definition) -> str:
    """The variant of a definition's base that is made for the chips of this machine, with the hyphen before it; nothing
    for the base's own, and where the driver does not say which chips there are."""
    base = definition.base
    if not isinstance(base, VendorBase) or not base.variants or not NPU.here():
        return ""
    with contextlib.suppress(npu_smi.NpuSmiError):
        names = {npu.name for npu in npu_smi.look().npus}
        for variant, built in base.variants.items():
            if any(fnmatchcase(name, pattern) for name in names for pattern in built.soc):
                return f"-{variant}"
    return ""


def definition_for(root: Path, device: Device) -> Definition | None:
    """The definition of images for a kind of accelerator and this machine's architecture, if there is one."""
    for name in image_names(root):
        definition = Image.named(root, name).definition
        if (
            definition.accelerator.kind == device.kind
            and MACHINES[definition.architecture] == platform.machine()
        ):
            return definition
    return None


def used_here(device: Device, machine: str = "") -> dict[str, Any]:
    """What tests ran on: the CPU's model, cores and bytes of memory, and the accelerators they could use.

    Parameters:
        machine: what the image's programs are made for (`x86_64`, `aarch64`): named where this machine emulates it.
    """
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "kind": device.kind,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "emulated": machine if machine != platform.machine() else "",
        "gpus": _gpus() if device is CUDA else [],
        "npus": _npus() if device is NPU else [],
    }


def _npus() -> list[dict[str, Any]]:
    try:
        seen = npu_smi.look()
    except npu_smi.NpuSmiError:
        return []
    named = os.environ.get(NPU.visible)
    return [
        {"name": npu.name, "memory_bytes": npu.total_mib << 20, "driver": seen.driver}
        for npu in seen.npus
        if is_named(str(npu.number), named)
    ]


def _gpus() -> list[dict[str, Any]]:
    query = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [
        {"name": name, "memory_bytes": int(mebibytes) << 20, "driver": driver}
        for index, uuid, name, mebibytes, driver in rows
        if is_named(index, os.environ.get(CUDA.visible), uuid)
    ]

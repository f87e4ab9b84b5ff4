"""Which hardware this machine is, as the images name it."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from drydock.definition import MACHINES, Definition, image_names, read_definition


def gpus_here() -> int:
    """How many NVIDIA GPUs the driver shows on this machine."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def npus_here() -> int:
    """How many Ascend NPUs the driver shows on this machine."""
    return len(list(Path("/dev").glob("davinci[0-9]*")))


def hardware_here(root: Path) -> str:
    """The hardware folder under `images/` that fits this machine; `cpu` where there is no accelerator.

    With GPUs, the CUDA image of this machine's architecture: x86-64 is h100, aarch64 is gb200.
    """
    definition = cuda_definition(root) if gpus_here() else None
    return definition.hardware if definition else "cpu"


def cuda_definition(root: Path) -> Definition | None:
    """The definition of CUDA images for this machine's architecture, if there is one."""
    for name in image_names(root):
        definition = read_definition(root / "images" / name.partition("-")[0] / "image.toml")
        if definition.accelerator.kind == "cuda" and MACHINES[definition.architecture] == platform.machine():
            return definition
    return None


def device_here(cuda: bool) -> dict[str, Any]:
    """What tests ran on: the CPU's model, cores and bytes of memory, and the GPUs where they were used."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "kind": "cuda" if cuda else "cpu",
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus() if cuda else [],
    }


def _gpus() -> list[dict[str, Any]]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [
        {"name": name, "memory_bytes": int(mebibytes) << 20, "driver": driver}
        for name, mebibytes, driver in rows
    ]

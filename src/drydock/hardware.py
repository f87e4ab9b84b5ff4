"""Which hardware this machine is, as the images name it."""

from __future__ import annotations

import platform
from pathlib import Path

from drydock.definition import MACHINES, image_names, read_definition


def gpus_here() -> int:
    """How many NVIDIA GPUs the driver shows on this machine."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def hardware_here(root: Path) -> str:
    """The hardware folder under `images/` that fits this machine; `cpu` where there is no accelerator.

    With GPUs, the CUDA image of this machine's architecture: x86-64 is h100, aarch64 is gb200.
    """
    if gpus_here():
        for name in image_names(root):
            definition = read_definition(root / "images" / name.partition("-")[0] / "image.toml")
            if (
                definition.accelerator.kind == "cuda"
                and MACHINES[definition.architecture] == platform.machine()
            ):
                return definition.hardware
    return "cpu"

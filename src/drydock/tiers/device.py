"""The accelerator that tests run on: what differs between NVIDIA's GPUs, Ascend's NPUs and the CPU, in one place.

The names are torch's: `torch.cuda`, and `torch.npu`, which importing torch_npu makes, have the same functions. Standard
library only: torch is imported when a test asks for it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

DEV = Path("/dev")


class Device(NamedTuple):
    """A kind of accelerator.

    Parameters:
        kind: torch's name of it, `cuda`, `npu` or `cpu`.
        maker: whose they are.
        word: what one is called.
        backend: torch.distributed's, for groups of processes with one each.
        visible: the variable that says which of them a process may use; an empty one hides all.
        file: what the driver calls their files under /dev, without the number.
    """

    kind: str
    maker: str
    word: str
    backend: str
    visible: str = ""
    file: str = ""

    def files(self, dev: Path | None = None) -> list[Path]:
        """The device file of each, as the driver makes them; none where there is no driver.

        Parameters:
            dev: the machine's /dev.
        """
        length = len(self.file)
        found = (DEV if dev is None else dev).glob(f"{self.file}[0-9]*") if self.file else ()
        return sorted(path for path in found if path.name[length:].isdigit())

    def here(self) -> int:
        """How many the driver shows."""
        return len(self.files())

    def at(self, number: int) -> str:
        """torch's name of one of them."""
        return f"{self.kind}:{number}" if self.file else self.kind

    def module(self) -> Any:
        """`torch.cuda`, `torch.npu` or `torch.cpu`.

        Raises:
            ImportError: torch, or torch_npu for an NPU, is not installed.
        """
        torch = importlib.import_module("torch")
        if self.kind == "npu":
            importlib.import_module("torch_npu")
        return getattr(torch, self.kind)

    def free_bytes(self, number: int = 0) -> int:
        """Bytes of one of them that nobody holds, by its driver; takes a context on it."""
        free: int = self.module().mem_get_info(number)[0]
        return free


CPU = Device("cpu", "", "CPU", "gloo")
CUDA = Device("cuda", "NVIDIA", "GPU", "nccl", "CUDA_VISIBLE_DEVICES", "nvidia")
NPU = Device("npu", "Ascend", "NPU", "hccl", "ASCEND_RT_VISIBLE_DEVICES", "davinci")
ACCELERATORS = (NPU, CUDA)
"""In the order in which they are looked for."""


def device_for(accelerator: str) -> Device:
    """The device that an image is made for; the CPU for `none`."""
    return next((device for device in ACCELERATORS if device.kind == accelerator), CPU)


def device_here() -> Device:
    """What this machine has."""
    return next((device for device in ACCELERATORS if device.here()), CPU)


def hidden() -> dict[str, str]:
    """Variables for a process that is to see no accelerator."""
    return {device.visible: "" for device in ACCELERATORS}

"""The accelerator that tests run on: what differs between NVIDIA's GPUs, Ascend's NPUs and the CPU, in one place.

The names are torch's: `torch.cuda`, and `torch.npu`, which importing torch_npu makes, have the same functions. Standard
library only: torch is imported when a test asks for it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
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

    def usable(self, environment: Mapping[str, str] | None = None) -> int:
        """How many of them a process may use.

        Parameters:
            environment: the process's; this one's by default.
        """
        named = (os.environ if environment is None else environment).get(self.visible)
        here = self.here()
        if named is None:
            return here
        count = 0
        for name in filter(None, map(str.strip, named.split(","))):
            # As the driver does: what stands behind the number of none is hidden too.
            if name.lstrip("-").isdigit() and not 0 <= int(name) < here:
                break
            count += 1
        return count

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


def is_named(number: str, named: str | None, uuid: str = "") -> bool:
    """Whether CUDA_VISIBLE_DEVICES or ASCEND_RT_VISIBLE_DEVICES lets a process use a device.

    Numbers in the first are nvidia-smi's, where CUDA_DEVICE_ORDER is PCI_BUS_ID. A MIG slice does not tell its device,
    so with one, every device counts.

    Parameters:
        number: the driver's of the device.
        named: the variable's value; None where it is not set.
        uuid: a GPU's, by which it may be named too, or by how that begins.
    """
    if named is None:
        return True
    names = [name.strip() for name in named.split(",")]
    return any(
        name == number or (name and uuid.startswith(name)) or name.startswith("MIG-") for name in names
    )


def chosen(accelerator: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep what runs elsewhere to the devices which an environment names, if it names any."""
    device = device_for(accelerator)
    named = environment.get(device.visible)
    if device is CPU or named is None:
        return {}
    # The numbers in CUDA_VISIBLE_DEVICES are then those of nvidia-smi, for all that read them.
    return {device.visible: named, **({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if device is CUDA else {})}


def hidden() -> dict[str, str]:
    """Variables for a process that is to see no accelerator."""
    return {device.visible: "" for device in ACCELERATORS}

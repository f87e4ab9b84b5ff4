"""The driver on this machine, NVIDIA's or Ascend's: what a container of ours must see of it to use its devices."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from drydock.errors import DrydockError
from drydock.namespaces import Bind
from drydock.tiers.device import NPU

DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")
DRIVER_LIBRARIES = (
    "libcuda.so*",
    "libcudadebugger.so*",
    "libnvcuvid.so*",
    "libnvidia-allocator.so*",
    "libnvidia-cfg.so*",
    "libnvidia-encode.so*",
    "libnvidia-gpucomp.so*",
    "libnvidia-ml.so*",
    "libnvidia-nvvm*.so*",
    "libnvidia-opencl.so*",
    "libnvidia-opticalflow.so*",
    "libnvidia-ptxjitcompiler.so*",
)
"""What NVIDIA's driver brings for computing; the rest of it is for displays."""
LDCONFIG_NAMES = {"x86_64": "x86-64", "aarch64": "AArch64"}


NPU_MANAGERS = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""Devices beside the chips' own, without which none of them can be used: management, memory, and messages to them."""
NPU_FILES = (
    "/usr/local/Ascend/driver/lib64",
    "/usr/local/Ascend/driver/version.info",
    "/usr/local/dcmi",
    "/etc/ascend_install.info",
)
"""What the images of vllm-ascend are to be given of the host's driver, by its documentation."""
NPU_NETWORK = "/etc/hccn.conf"
"""Addresses of the chips' own network ports, for HCCL across machines; where there is one machine it may not exist."""


def driver_files(accelerator: str) -> tuple[list[Bind], dict[str, str]]:
    """The devices, `cuda` or `npu`, and the driver's files, and the links among its libraries (link -> target).

    Raises:
        DrydockError: there is no such device, or its driver is not whole.
    """
    return (npu_files(), {}) if accelerator == "npu" else gpu_files()


def missing_files(root: Path = Path("/")) -> list[str]:
    """What this machine's Ascend driver should have and has not."""
    wanted = [*(f"/dev/{name}" for name in NPU_MANAGERS), *NPU_FILES]
    return [name for name in wanted if not (root / name.lstrip("/")).exists()]


def npu_files(root: Path = Path("/")) -> list[Bind]:
    """The NPUs' devices and the driver's files, under the folder that stands for the machine's root."""
    chips = NPU.files(root / "dev")
    if not chips:
        raise DrydockError("NPUs were asked for and this machine has no /dev/davinci*: load Ascend's driver")
    if lacking := missing_files(root):
        raise DrydockError(f"this machine's Ascend driver has no {', '.join(lacking)}: install it anew")
    devices = [*chips, *(root / "dev" / name for name in NPU_MANAGERS)]
    binds = [Bind(source=str(path), target=f"/dev/{path.name}") for path in devices]
    places = [root / name.lstrip("/") for name in (*NPU_FILES, NPU_NETWORK)]
    binds += [
        Bind(source=str(path.resolve()), target=f"/{path.relative_to(root)}", read_only=True)
        for path in places
        if path.exists()
    ]
    if smi := shutil.which("npu-smi", path=f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/local/sbin"):
        binds.append(Bind(source=str(Path(smi).resolve()), target="/usr/local/bin/npu-smi", read_only=True))
    return binds


def gpu_files() -> tuple[list[Bind], dict[str, str]]:
    """The GPUs' devices and the driver's files, and the links among its libraries (link -> target)."""
    devices = sorted(Path("/dev").glob("nvidia*"))
    if not devices:
        raise DrydockError("GPUs were asked for and this machine has no /dev/nvidia*: load NVIDIA's driver")
    if (infiniband := Path("/dev/infiniband")).is_dir():
        devices.append(infiniband)
    binds = [Bind(source=str(path), target=str(path)) for path in devices]
    machine = platform.machine()
    place = f"/usr/lib/{machine}-linux-gnu"
    libraries: dict[str, Bind] = {}
    links: dict[str, str] = {}
    for parent in _driver_folders(machine):
        for path in (path for pattern in DRIVER_LIBRARIES for path in sorted(parent.glob(pattern))):
            real = path.resolve()
            libraries.setdefault(real.name, Bind(source=str(real), target=f"{place}/{real.name}"))
            if path.name != real.name:
                links.setdefault(f"{place}/{path.name}", real.name)
    if smi := shutil.which("nvidia-smi", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/nvidia/bin"):
        binds.append(Bind(source=str(Path(smi).resolve()), target="/usr/bin/nvidia-smi"))
    return [*binds, *libraries.values()], links


def _driver_folders(machine: str) -> list[Path]:
    """Where the host may keep the driver's libraries, the one that its linker uses first."""
    folders = []
    if program := shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        cache = subprocess.run([program, "-p"], capture_output=True, text=True, check=False).stdout
        folders = [
            Path(line.rpartition(" => ")[2]).parent
            for line in cache.splitlines()
            if line.strip().startswith("libcuda.so.1 ") and LDCONFIG_NAMES[machine] in line
        ]
    return [*folders, *(Path(name.format(machine=machine)) for name in DRIVER_FOLDERS)]

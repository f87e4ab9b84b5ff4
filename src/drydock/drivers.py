"""NVIDIA's driver on this machine: what a container of ours must see of it to use the GPUs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from drydock.errors import DrydockError
from drydock.namespaces import Bind

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


def driver_files() -> tuple[list[Bind], dict[str, str]]:
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

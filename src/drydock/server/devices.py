"""The memory of the accelerators that a server uses: where it was, and whether it came back.

CUDA's, through nvidia-smi, which NVIDIA's runtime puts into every container that asks for `utility`. Another kind
(Ascend's `npu-smi` and ASCEND_RT_VISIBLE_DEVICES) is one more module with `used_mib` and `processes` of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from drydock.server.errors import ServerError

DEV = Path("/dev")
TOLERANCE_MIB = 64
"""By how much a device may differ from where it was: contexts of monitoring tools come and go."""
NVIDIA_SMI_SECONDS = 60.0
"""Without persistence mode the driver is loaded anew for each call, on eight GPUs that takes some seconds."""


def used_mib(environment: Mapping[str, str]) -> dict[str, int] | None:
    """UUID -> MiB in use, on the devices that a process with this environment can use; None without any.

    Raises:
        ServerError: there are devices and what they hold cannot be told.
    """
    present = bool(list(DEV.glob("nvidia[0-9]*")))
    if shutil.which("nvidia-smi") is None:
        if present:
            raise ServerError("this machine has GPUs and no nvidia-smi: whether a server gives their memory back "
                              "cannot be told; put the driver's nvidia-smi on PATH")  # fmt: skip
        return None
    done = _nvidia_smi("--query-gpu=index,uuid,memory.used")
    if done.returncode:
        if present:
            raise ServerError(f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[:300]}")
        return None  # the program without a driver
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    used = {}
    for index, uuid, memory in rows:
        if _visible(index, uuid, environment.get("CUDA_VISIBLE_DEVICES")):
            if not memory.isdigit():
                raise ServerError(f"nvidia-smi does not tell how much memory GPU {index} uses: {memory}")
            used[uuid] = int(memory)
    return used or None


def wait_returned(before: Mapping[str, int], environment: Mapping[str, str], limit: float) -> dict[str, int]:
    """Wait until no device holds more than before; what each holds then.

    Raises:
        ServerError: one still does after `limit` seconds; names it and the processes that the driver shows.
    """
    deadline = time.monotonic() + limit
    while True:
        after = used_mib(environment) or {}
        held = {uuid: after[uuid] - used for uuid, used in before.items() if uuid in after}
        held = {uuid: more for uuid, more in held.items() if more > TOLERANCE_MIB}
        if not held and before.keys() <= after.keys():
            return after
        if time.monotonic() >= deadline:
            break
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    parts = [f"GPU {uuid} holds {more} MiB more than before the start" for uuid, more in held.items()]
    parts += [f"GPU {uuid} is no longer seen" for uuid in before if uuid not in after]
    shown = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory").stdout.splitlines()
    processes = [line for line in shown if line.partition(",")[0].strip() in held]
    raise ServerError(
        f"the server has ended and {limit:g} s later " + "; ".join(parts) + "\n  processes that nvidia-smi shows there"
        " (gpu, pid, name, MiB): " + ("; ".join(processes) or "none, so the driver itself has not let go of it")
    )  # fmt: skip


def _nvidia_smi(query: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"nvidia-smi {query} did not answer in {NVIDIA_SMI_SECONDS:g} s") from error


def _visible(index: str, uuid: str, devices: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES lets a process use the device.

    Its numbers are nvidia-smi's, since the harness sets CUDA_DEVICE_ORDER=PCI_BUS_ID. A MIG slice does not tell
    its device, so with one, every device counts.
    """
    if devices is None:
        return True
    names = [name.strip() for name in devices.split(",")]
    return any(name == index or (name and uuid.startswith(name)) or name.startswith("MIG-") for name in names)

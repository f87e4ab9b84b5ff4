"""The memory of the accelerators that a server uses: where it was, and whether it came back.

CUDA's, through nvidia-smi, which NVIDIA's runtime puts into every container that asks for `utility`; Ascend's, through
the driver's npu-smi.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from drydock import npu_smi
from drydock.server.errors import ServerError
from drydock.tiers.device import CUDA, NPU, is_named

TOLERANCE_MIB = 64
"""By how much a device may differ from where it was: contexts of monitoring tools come and go."""
NVIDIA_SMI_SECONDS = 60.0
"""Without persistence mode the driver is loaded anew for each call, on eight GPUs that takes some seconds."""


class Kind(NamedTuple):
    """A kind of accelerator: what one is called, the driver's program, and how that is asked.

    `used` gives MiB in use by device, for those that a process with an environment can use, or None without any;
    `shown` gives a line for each process on some of them.
    """

    word: str
    program: str
    used: Callable[[Mapping[str, str]], dict[str, int] | None]
    shown: Callable[[Collection[str]], list[str]]


def kind_here() -> Kind:
    """What this machine has; a GPU's where it has none, which then says so."""
    return NPUS if NPU.here() else GPUS


def used_mib(environment: Mapping[str, str]) -> dict[str, int] | None:
    """Device (a GPU's UUID, an NPU's card and chip, "0.1") -> MiB in use, on those that a process with this environment
    can use; None without any.

    Raises:
        ServerError: there are devices and what they hold cannot be told.
    """
    return kind_here().used(environment)


def wait_returned(before: Mapping[str, int], environment: Mapping[str, str], limit: float) -> dict[str, int]:
    """Wait until no device holds more than before; what each holds then.

    Raises:
        ServerError: one still does after `limit` seconds; names it and the processes that the driver shows.
    """
    kind = kind_here()
    deadline = time.monotonic() + limit
    while True:
        after = kind.used(environment) or {}
        held = {device: after[device] - used for device, used in before.items() if device in after}
        held = {device: more for device, more in held.items() if more > TOLERANCE_MIB}
        if not held and before.keys() <= after.keys():
            return after
        if time.monotonic() >= deadline:
            break
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    parts = [
        f"{kind.word} {device} holds {more} MiB more than before the start" for device, more in held.items()
    ]
    parts += [f"{kind.word} {device} is no longer seen" for device in before if device not in after]
    raise ServerError(
        f"the server has ended and {limit:g} s later " + "; ".join(parts) + f"\n  processes that {kind.program} shows"
        f" there ({kind.word.lower()}, pid, name, MiB): "
        + ("; ".join(kind.shown(held)) or "none, so the driver itself has not let go of it")
    )  # fmt: skip


def _gpus_used(environment: Mapping[str, str]) -> dict[str, int] | None:
    present = CUDA.here() > 0
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
        if is_named(index, environment.get(CUDA.visible), uuid):
            if not memory.isdigit():
                raise ServerError(f"nvidia-smi does not tell how much memory GPU {index} uses: {memory}")
            used[uuid] = int(memory)
    return used or None


def _gpus_shown(devices: Collection[str]) -> list[str]:
    shown = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory").stdout.splitlines()
    return [line for line in shown if line.partition(",")[0].strip() in devices]


def _npus_used(environment: Mapping[str, str]) -> dict[str, int] | None:
    named = environment.get(NPU.visible)
    npus = [npu for npu in _npus().npus if is_named(str(npu.number), named)]
    return {npu.place: npu.used_mib for npu in npus} or None


def _npus_shown(devices: Collection[str]) -> list[str]:
    return [
        f"{process.place}, {process.pid}, {process.name}, {process.mib}"
        for process in _npus().processes
        if process.place in devices
    ]


def _npus() -> npu_smi.Seen:
    try:
        return npu_smi.look()
    except npu_smi.NpuSmiError as error:
        raise ServerError(
            f"this machine has NPUs and whether a server gives their memory back cannot be told: {error}"
        ) from error


def _nvidia_smi(query: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"nvidia-smi {query} did not answer in {NVIDIA_SMI_SECONDS:g} s") from error


GPUS = Kind(CUDA.word, "nvidia-smi", _gpus_used, _gpus_shown)
NPUS = Kind(NPU.word, "npu-smi", _npus_used, _npus_shown)

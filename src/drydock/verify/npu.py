"""Checks of an image for Ascend NPUs: the driver and the chips, and that CANN, torch-npu and torch belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from drydock import npu_smi
from drydock.tiers.device import NPU
from drydock.verify.declared import Accelerator
from drydock.verify.report import Finding, Outcome
from drydock.verify.tree import Tree

DRIVER = Path("/usr/local/Ascend/driver/version.info")
"""The installed driver's own word, which a container is given beside its libraries."""
CANN = "/usr/local/Ascend/ascend-toolkit/latest"
"""Where CANN is when its environment does not say."""
CANN_FILES = ("ascend_toolkit_install.info", "ascend_all_cann_install.info", "ascend_ops_install.info")
"""In CANN's folder for the architecture: what says its version, under the names that its releases have had."""


def check_npus(accelerator: Accelerator) -> Outcome:
    """The driver's version and every chip against what is declared; not run where there is no device."""
    if not NPU.here():
        return Outcome(0, "no device: there is no /dev/davinci*", state="not-run")
    try:
        seen = npu_smi.look()
    except npu_smi.NpuSmiError as error:
        return Outcome(0, "a device is there, its driver does not answer", [Finding("driver", str(error))])
    try:
        installed = read_version(DRIVER.read_text())
    except OSError:
        installed = None  # it is not given to every container, and npu-smi says the same
    names = ", ".join(dict.fromkeys(npu.name for npu in seen.npus))
    return Outcome(
        len(seen.npus),
        f"driver {seen.driver}, {len(seen.npus)} x {names}",
        list(compare_npus(accelerator, seen, installed)),
    )


def compare_npus(accelerator: Accelerator, seen: npu_smi.Seen, installed: str | None) -> Iterator[Finding]:
    """The host's driver and chips against what the image declares.

    Parameters:
        installed: the driver's version by its version.info; None without one.
    """
    minimum = accelerator.minimum_driver
    try:
        if minimum and npu_smi.version_key(seen.driver) < npu_smi.version_key(minimum):
            yield Finding("driver", f"{seen.driver} is older than the image's minimum {minimum}")
        if installed and npu_smi.version_key(seen.driver) != npu_smi.version_key(installed):
            yield Finding("driver", f"npu-smi says {seen.driver}, {DRIVER} says {installed}")
    except ValueError as error:
        yield Finding("driver", str(error))
    for name in dict.fromkeys(npu.name for npu in seen.npus):
        if not any(fnmatchcase(name, pattern) for pattern in accelerator.soc):
            yield Finding(name, f"the image is made for {', '.join(accelerator.soc)}")
    for npu in seen.npus:
        if npu.health != "OK":
            yield Finding(f"NPU {npu.place}", f"npu-smi says of its health: {npu.health or 'nothing'}")


def check_cann(
    accelerator: Accelerator,
    tree: Tree,
    machine: str,
    environment: Mapping[str, str],
    installed: Mapping[str, str],
) -> Outcome:
    """CANN's version against the declared one, and torch-npu's against torch's.

    Parameters:
        machine: as `platform.machine()` there.
        environment: of the image, which says where CANN is.
        installed: distributions by their normalized names -> version.
    """
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME") or CANN
    folder = f"{home.rstrip('/')}/{machine}-linux"
    found = None
    for name in CANN_FILES:
        try:
            found = found or read_version(
                tree.read(f"{folder}/{name}".lstrip("/")).decode("utf-8", "replace")
            )
        except OSError:
            continue
    findings = []
    if found is None:
        findings.append(
            Finding("CANN", f"{accelerator.cann} is declared, and {folder} does not say which is there")
        )
    elif found != accelerator.cann:
        findings.append(Finding("CANN", f"{accelerator.cann} is declared, {found} is in {folder}"))
    torch, npu = installed.get("torch"), installed.get("torch-npu")
    findings += [
        Finding(name, "is not installed")
        for name, version in (("torch", torch), ("torch-npu", npu))
        if not version
    ]
    if torch and npu and _release(torch) != _release(npu):
        findings.append(Finding("torch-npu", f"{npu} belongs to torch {_release(npu)}, {torch} is installed"))
    return Outcome(2, f"CANN {found or 'of no known version'}, torch-npu {npu} on torch {torch}", findings)


def read_version(text: str) -> str | None:
    """What a file of Ascend's says of its version; None where it does not. Drivers write `Version=`, CANN small."""
    match = re.search(r"^\s*version=\s*(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return match[1] if match else None


def _release(version: str) -> str:
    """A release without what was built later or elsewhere: 2.10.0 of 2.10.0.post4 and of 2.10.0+cpu."""
    match = re.match(r"\d+(\.\d+)*", version)
    return match[0] if match else version

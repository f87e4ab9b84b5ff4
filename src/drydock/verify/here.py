"""Compares the environment that runs this with an image's lock, where no image of ours is running.

A lent machine may have neither Docker nor namespaces, and the stack installed by hand. What can be compared
there is: the Python, the distributions that import would find, the driver and devices. Files, Debian's
packages and libraries have nothing to be compared with, and are reported as not run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from drydock.errors import DrydockError
from drydock.naming import definition_path
from drydock.verify.accelerator import check_devices
from drydock.verify.declared import locked_as, read_absent, read_accelerator
from drydock.verify.distributions import check_absent
from drydock.verify.interpreter import Interpreter
from drydock.verify.locks import compare_installed
from drydock.verify.npu import check_cann
from drydock.verify.report import Check, Finding, Outcome, Report
from drydock.verify.tree import Tree
from drydock.verify.versions import normalize_name, same_version


def verify_here(root: Path, name: str) -> Report:
    """Compare this environment with what an image of the checkout is locked to be.

    Parameters:
        root: the checkout.
        name: the image, `h100-vllm` or the like.

    Raises:
        DrydockError: its lock or its definition cannot be read.
    """
    started = time.perf_counter()
    definition = _read(definition_path(root, name))
    try:
        lock = _read(root / "lock" / f"pylock.{locked_as(definition, name)}.toml")
        locked = {normalize_name(entry["name"]): entry["version"] for entry in lock["packages"]}
        # Of a vendor's image that is not here, what it holds is to be here too.
        locked |= definition["base"].get("provides", {})
        series = definition["python"]
        accelerator = read_accelerator(definition, name)
        absent_distributions = read_absent(definition, name)
    except KeyError as error:
        raise DrydockError(f"the lock or definition of {name} has no {error}: run `drydock lock`") from None
    installed = cache(_installed)
    absent = Outcome(0, "not an image: nothing to compare with", state="not-run")
    checks = {
        "python": lambda: _check_python(series),
        "distributions": lambda: _check_distributions(locked, installed()),
        "files": lambda: absent,
        "debs": lambda: absent,
        "libraries": lambda: absent,
        "accelerator": lambda: check_devices(accelerator, "torch" in locked),
    }
    if accelerator.kind == "npu":
        checks["cann"] = lambda: check_cann(
            accelerator, Tree(Path("/")), platform.machine(), os.environ, installed()
        )
    if absent_distributions:
        checks["absent"] = lambda: check_absent(absent_distributions, installed())
    return Report(
        image=name,
        checks=tuple(Check.run(title, check) for title, check in checks.items()),
        full=False,
        seconds=round(time.perf_counter() - started, 3),
        python=platform.python_version(),
        machine=platform.machine(),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DrydockError(f"{path} cannot be read ({error}): is it an image's name?") from error


def _check_python(series: str) -> Outcome:
    running = Interpreter.running()
    findings = []
    if running.version.rpartition(".")[0] != series:
        findings.append(Finding("Python's version", f"{series} is locked, {running.version} is running"))
    if running.implementation != "CPython":
        findings.append(
            Finding("Python's implementation", f"CPython is locked, {running.implementation} is running")
        )
    return Outcome(2, f"{running.implementation} {running.version} in {running.prefix}", findings)


def _check_distributions(locked: dict[str, str], installed: dict[str, str]) -> Outcome:
    """Every distribution that is found first on the path, as import does."""
    versions = {name: [version] for name, version in installed.items()}
    findings = list(compare_installed(locked, versions, same_version))
    return Outcome(len(locked), f"{len(installed)} installed, {len(locked)} locked", findings)


def _installed() -> dict[str, str]:
    """Normalized name -> the version that import would find."""
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        # Of two on different folders of the path, the first is the one that is imported.
        if distribution.metadata["Name"]:
            installed.setdefault(normalize_name(distribution.metadata["Name"]), distribution.version)
    return installed

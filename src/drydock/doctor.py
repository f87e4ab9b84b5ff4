"""`drydock doctor`: what this machine can do for drydock, and what to do about what it cannot.

Each check tries the thing itself: the Docker engine is asked, namespaces are made, an index is read.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from drydock import npu_smi
from drydock.definition import MACHINES, Architecture
from drydock.drivers import missing_files
from drydock.errors import DrydockError
from drydock.hardware import definition_for, used_here
from drydock.progress import amount
from drydock.runtime import runs
from drydock.store import Store
from drydock.tiers.device import CUDA, NPU
from drydock.verify.accelerator import version_numbers

State = Literal["ok", "limited", "missing"]
NEEDED = {"cpu image": 12e9, "an image for a GPU": 32e9}
"""Bytes of disk that artifacts, layers and an unpacked tree take, rounded up."""
PROJECT = "packaging"
"""A small project that every index has."""
SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a machine has or lacks. `advice` is empty where nothing is to be done."""

    what: str
    state: State
    detail: str
    advice: str = ""


def examine(
    root: Path, store: Store, environ: Mapping[str, str], *, offline: bool = False
) -> Iterator[Finding]:
    """Look at this machine, one thing after the other.

    Parameters:
        root: the checkout.
        offline: leave out what asks a network.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        _docker,
        lambda: _chroot(store),
        lambda: _gpu(root),
        lambda: _npu(root),
        lambda: _disk(store),
    ]
    checks += [] if offline else [lambda: _index(environ), lambda: _mirror(environ)]
    checks += [_apt, _other_architecture]
    for check in checks:
        yield check()


def verdict(findings: list[Finding]) -> str | None:
    """Why drydock cannot do its main job here, if it cannot."""
    states = {finding.what: finding for finding in findings}
    if states["Docker"].state == states["chroot"].state == "missing":
        return "no runtime: neither a Docker engine nor namespaces, so images can be built and not run"
    return next(
        (
            f"{finding.what}: {finding.detail}"
            for finding in findings
            if finding.state == "missing" and finding.what in ("disk", "package index", "Debian mirror")
        ),
        None,
    )


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"
    if platform.machine() not in MACHINES.values():
        return Finding(
            what="Python",
            state="limited",
            detail=found,
            advice="images are for x86_64 and aarch64 and run there",
        )
    return Finding(what="Python", state="ok", detail=found)


def _docker() -> Finding:
    from drydock.docker_runtime import engine_facts

    try:
        version, containerd = engine_facts()
    except DrydockError as error:
        return Finding(
            what="Docker", state="missing", detail=str(error).partition(": start one")[0],
            advice="install and start an engine of version 25 or newer, or work with --runtime chroot",
        )  # fmt: skip
    if not containerd:
        return Finding(
            what="Docker", state="limited", detail=f"engine {version} with its classic image store",
            advice='set {"features": {"containerd-snapshotter": true}} in its daemon.json: it then loads OCI archives',
        )  # fmt: skip
    return Finding(what="Docker", state="ok", detail=f"engine {version} with the containerd image store")


def _chroot(store: Store) -> Finding:
    from drydock.chroot_runtime import try_namespaces

    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    try:
        try_namespaces(store)
    except DrydockError as error:
        return Finding(
            what="chroot", state="missing", detail=str(error), advice="run as root, or use --runtime docker"
        )
    return Finding(
        what="chroot", state="ok", detail=f"{who} may make namespaces and overlays in {store.root}"
    )


def _gpu(root: Path) -> Finding:
    if not CUDA.here():
        return Finding(
            what="NVIDIA GPUs", state="missing", detail="none that the driver shows",
            advice="--hardware cpu runs here; --cpu-part runs what needs no GPU in an image for one",
        )  # fmt: skip
    if not CUDA.usable():
        return Finding(
            what="NVIDIA GPUs", state="limited",
            detail=f"{CUDA.here()} device files, {CUDA.visible} leaves none of them",
            advice=f"unset {CUDA.visible}, or name one that is here",
        )  # fmt: skip
    gpus: list[dict[str, Any]] = used_here(CUDA)["gpus"]
    if not gpus:
        return Finding(
            what="NVIDIA GPUs", state="limited", detail=f"{CUDA.here()} device files, and nvidia-smi does not answer",
            advice="see whether the driver is loaded and of the same version as its libraries",
        )  # fmt: skip
    each = f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}"
    definition = definition_for(root, CUDA)
    minimum = definition.accelerator.minimum_driver if definition else None
    if definition and minimum and version_numbers(gpus[0]["driver"]) < version_numbers(minimum):
        return Finding(
            what="NVIDIA GPUs", state="limited", detail=each,
            advice=f"images of {definition.hardware} need a driver of {minimum} or newer",
        )  # fmt: skip
    return Finding(what="NVIDIA GPUs", state="ok", detail=each)


def _npu(root: Path) -> Finding:
    what = "Ascend NPUs"
    if not NPU.here():
        return Finding(what=what, state="missing", detail="none that the driver shows")
    try:
        seen = npu_smi.look()
    except npu_smi.NpuSmiError as error:
        return Finding(
            what=what, state="limited", detail=f"{NPU.here()} device files, and {error}",
            advice="see whether the driver is loaded",
        )  # fmt: skip
    each = f"{len(seen.npus)} x {seen.npus[0].name}, driver {seen.driver}"
    ill = [f"{npu.place} ({npu.health})" for npu in seen.npus if npu.health != "OK"]
    definition = definition_for(root, NPU)
    if definition is None:
        return Finding(
            what=what, state="limited", detail=each,
            advice=f"there is no image for NPUs on {platform.machine()}: for aarch64 there is",
        )  # fmt: skip
    wanted = []
    minimum = definition.accelerator.minimum_driver or ""
    with contextlib.suppress(ValueError):
        if npu_smi.version_key(seen.driver) < npu_smi.version_key(minimum):
            wanted.append(f"images of {definition.hardware} need a driver of {minimum} or newer")
    if lacking := missing_files():
        wanted.append(
            f"install the driver anew: {', '.join(lacking)} is not there, which a container is given"
        )
    if ill:
        wanted.append(f"see `npu-smi info`, which does not call these well: {', '.join(ill)}")
    return Finding(what=what, state="limited" if wanted else "ok", detail=each, advice="; ".join(wanted))


def _disk(store: Store) -> Finding:
    folder = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{amount(free)} free for {store.root}"
    short = [f"{what} takes {amount(int(needed))}" for what, needed in NEEDED.items() if free < needed]
    if len(short) == len(NEEDED):
        return Finding(
            what="disk",
            state="missing",
            detail=detail,
            advice=f"{short[0]}: free some, or set DRYDOCK_STORE elsewhere",
        )
    if short:
        return Finding(what="disk", state="limited", detail=detail, advice=short[0])
    return Finding(what="disk", state="ok", detail=detail)


def _index(environ: Mapping[str, str]) -> Finding:
    from pypi_simple import ACCEPT_ANY

    from drydock.indexes import read_indexes

    what, advice = "package index", "configure pip or uv for an index or a mirror that is reached from here"
    try:
        indexes = read_indexes(environ)
        tls = indexes.tls()
    except DrydockError as error:
        return Finding(what=what, state="missing", detail=str(error))
    answers: list[str] = []
    refusals: list[str] = []
    for place in indexes.places():
        name = f"{place} ({place.setting})"
        if place.path:
            (answers if place.path.exists() else refusals).append(
                name if place.path.exists() else f"{name} is not there"
            )
        elif place in indexes.indexes and not indexes.offline:
            url = f"{place.url.rstrip('/')}/{PROJECT}/"
            answer = _ask(url, tls, auth=indexes.auth_for(url, place), headers={"Accept": ACCEPT_ANY})
            if isinstance(answer, str):
                refusals.append(f"{name} does not answer ({answer})")
            elif not answer.is_success:
                refusals.append(f"{name} does not answer (status {answer.status_code})")
            else:
                answers.append(f"{name}, {answer.elapsed.total_seconds():.1f} s")
    if not answers:
        return Finding(
            what=what, state="missing", detail="; ".join(refusals) or "none is configured", advice=advice
        )
    return Finding(
        what=what, state="limited" if refusals else "ok", detail="; ".join([*answers, *refusals]),
        advice="remove from the configuration what does not answer: every fetch waits for it" if refusals else "",
    )  # fmt: skip


def _mirror(environ: Mapping[str, str]) -> Finding:
    from drydock.indexes import debian_mirrors, file_path, read_indexes, redact

    what = "Debian mirror"
    try:
        mirrors = debian_mirrors(environ)
        tls = read_indexes(environ).tls()
    except DrydockError as error:
        return Finding(what=what, state="missing", detail=str(error))
    answers: list[str] = []
    refusals: list[str] = []
    for archive, addresses in mirrors.items():
        for address in addresses:
            name = f"{archive} at {redact(address)}"
            if folder := file_path(address):
                (answers if folder.is_dir() else refusals).append(name)
                continue
            answer = _ask(f"{address}/dists/", tls)
            if isinstance(answer, str):
                refusals.append(f"{name} does not answer ({answer})")
            else:
                answers.append(name)
    state: State = "missing" if not answers else "limited" if refusals else "ok"
    advice = (
        "set DRYDOCK_DEBIAN_MIRROR and DRYDOCK_DEBIAN_SECURITY_MIRROR to ones that do" if refusals else ""
    )
    return Finding(what=what, state=state, detail="; ".join([*answers, *refusals]), advice=advice)


def _ask(url: str, tls: ssl.SSLContext, **options: Any) -> httpx.Response | str:
    """The answer of an address, or what kind of error came: its text may have the address with a password in it."""
    try:
        return httpx.get(url, verify=tls, timeout=SECONDS, follow_redirects=True, **options)
    except httpx.HTTPError as error:
        return type(error).__name__


def _apt() -> Finding:
    if shutil.which("apt-get"):
        return Finding(what="apt", state="ok", detail="for `drydock lock`; nothing else needs it")
    return Finding(
        what="apt", state="limited", detail="not here",
        advice="bases are locked on a Debian or Ubuntu machine; all else works without",
    )  # fmt: skip


def _other_architecture() -> Finding:
    other: Architecture = next(name for name, machine in MACHINES.items() if machine != platform.machine())
    if runs(other, platform.machine()):
        return Finding(what="emulation", state="ok", detail=f"{other} images run here, slowly")
    return Finding(
        what="emulation", state="missing", detail=f"{other} images are built and checked here, not run",
        advice="qemu-user-static with a binfmt entry of flag F would run them",
    )  # fmt: skip

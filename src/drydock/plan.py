"""Which layers an image has and what each is made of: a pure function of the locks.

Layers follow the lock. A large artifact has a layer to itself, so that bumping it moves nothing else; small
ones share a few buckets chosen by a hash of the name alone, so that adding a package never moves another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import zstandard

from drydock.bytecode import Toolchain
from drydock.definition import Image
from drydock.layer import LEVEL
from drydock.locks import Artifact, DebianLock, PyLock, sha256_json
from drydock.store import sha256_file
from drydock.wheels import PREFIX

LARGE_DEB = 4_000_000
LARGE_WHEEL = 24_000_000
DEB_BUCKETS = 6
WHEEL_BUCKETS = 8
"""Sizes in bytes and counts: some 60 layers for a GPU image, well below the 127 that containerd allows."""

CUDA = ("nvidia-", "cuda-")
TORCH = ("torch", "torchvision", "torchaudio", "triton")

Kind = Literal["debs", "base", "stdlib", "venv", "wheels", "manifest"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One layer to be: what kind, from which artifacts, under which cache key."""

    kind: Kind
    title: str
    artifacts: tuple[Artifact, ...]
    key: str

    @property
    def weight(self) -> int:
        """Bytes of artifacts to read, for progress and to begin with the largest."""
        return sum(artifact.size for artifact in self.artifacts)


ASSEMBLER = ("base", "build", "bytecode", "bytecode_worker", "debs", "layer", "oci", "plan", "wheels")
"""The modules of ours that decide a layer's bytes."""
LIBRARIES = ("installer", "python-debian", "tomli-w", "zstandard")
"""Distributions that decide them too, by their versions."""


def assembler_hash() -> str:
    """The hash of everything of ours that decides a layer's bytes.

    A change to it makes layers again, never makes them wrong: an unchanged layer comes out with the digest
    it had.
    """
    here = Path(__file__).parent
    return sha256_json(
        [
            [sha256_file(here / f"{name}.py") for name in ASSEMBLER],
            [version(name) for name in LIBRARIES],
            list(zstandard.ZSTD_VERSION),
            LEVEL,
        ]
    )


def bucket(name: str, buckets: int) -> int:
    """The bucket of a small package: by its name, so independent of what else is there."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % buckets


def plan_layers(image: Image, lock: PyLock, base: DebianLock | None, tools: Toolchain | None) -> list[Spec]:
    """The layers of ours below an image's manifest, from the base up: what changes least comes first.

    Parameters:
        base: of an image on Debian; over a vendor's image there is None.
        tools: what compiles bytecode; None for none.
    """
    assembler = assembler_hash()
    series = image.definition.python

    def spec(kind: Kind, title: str, artifacts: list[Artifact], *extra: object) -> Spec:
        hashes = [artifact.sha256 for artifact in artifacts]
        return Spec(
            kind=kind,
            title=title,
            artifacts=tuple(artifacts),
            key=sha256_json([assembler, kind, hashes, *extra]),
        )

    specs = [] if base is None or tools is None else _debian_specs(image, base, tools, spec)
    if image.vendor:
        vendor = image.vendor
        specs.append(spec("venv", "venv", [], series, PREFIX, vendor.python_version, vendor.interpreter))
    wheels = sorted((package.wheel for package in lock.packages), key=lambda artifact: artifact.name)
    ranked: list[list[tuple[str, list[Artifact]]]] = [[], [], [], [], [], []]
    # A distribution whose files replace another's comes after all others, in a layer of its own.
    winners = image.engine.overlaps
    for title, group in _grouped(
        [wheel for wheel in wheels if wheel.name not in winners], LARGE_WHEEL, WHEEL_BUCKETS, "python"
    ):
        ranked[_rank(group, image.engine.distribution)].append((title, group))
    ranked[5] = [(f"{wheel.name} {wheel.version}", [wheel]) for wheel in wheels if wheel.name in winners]
    bytecode = tools.key if tools else "no bytecode"
    for rank in ranked:
        specs += [spec("wheels", title, group, series, PREFIX, bytecode) for title, group in rank]
    return specs


def _debian_specs(image: Image, base: DebianLock, tools: Toolchain, spec: Callable[..., Spec]) -> list[Spec]:
    series = image.definition.python
    debs = [package.artifact for package in base.packages]
    specs = []
    for title, group in _grouped(debs, LARGE_DEB, DEB_BUCKETS, "debian"):
        specs.append(spec("debs", title, group))
    specs.append(
        spec(
            "base",
            "accounts, CA bundle, dpkg database, venv",
            debs,
            series,
            sorted(image.base.alternatives.items()),
        )
    )
    library = [artifact for artifact in debs if artifact.name.startswith(f"libpython{series}-")]
    specs.append(spec("stdlib", f"bytecode of Python {series}'s library", library, tools.key))
    return specs


def _rank(group: list[Artifact], engine: str) -> int:
    """CUDA libraries, torch, buckets of small packages, other large ones, the engine."""
    if len(group) > 1 or group[0].size < LARGE_WHEEL:
        return 2
    name = group[0].name
    if name.startswith(CUDA):
        return 0
    if name in TORCH:
        return 1
    return 4 if name == engine else 3


def _grouped(
    artifacts: list[Artifact], large: int, buckets: int, title: str
) -> list[tuple[str, list[Artifact]]]:
    """Buckets of small artifacts, then each large one alone."""
    small: dict[int, list[Artifact]] = {}
    alone = []
    for artifact in artifacts:
        if artifact.size >= large:
            alone.append((f"{artifact.name} {artifact.version}", [artifact]))
        else:
            small.setdefault(bucket(artifact.name, buckets), []).append(artifact)
    shared = [(f"{title} packages, bucket {number} of {buckets}", small[number]) for number in sorted(small)]
    return [*shared, *alone]

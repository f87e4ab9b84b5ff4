"""What an image's definition says beyond its manifest: of NPUs, and of distributions that no index has.

A manifest has the same form in every image, and an image's digest changes with it. The definition is carried beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drydock.naming import split_variant


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The device an image is made for; `sm` are compute capabilities without the dot ("90"), `soc` patterns of the
    names that npu-smi prints, `cann` the version of CANN in the image."""

    kind: str
    minimum_driver: str | None
    sm: tuple[str, ...]
    soc: tuple[str, ...] = ()
    cann: str | None = None


def read_accelerator(definition: Mapping[str, Any], image: str) -> Accelerator:
    """The accelerator of an image by its name, which may be a variant's with chips of its own.

    Raises:
        KeyError: the definition does not say, or has no such image.
    """
    declared = definition["accelerator"]
    _, variant = _engine(definition, image)
    soc = definition["base"]["variants"][variant]["soc"] if variant else declared.get("soc", ())
    return Accelerator(
        kind=declared["kind"],
        minimum_driver=declared.get("minimum-driver"),
        sm=tuple(declared.get("sm", ())),
        soc=tuple(soc),
        cann=declared.get("cann"),
    )


def read_absent(definition: Mapping[str, Any], image: str) -> dict[str, str]:
    """Distributions that the definition says are missing, normalized name -> reason; raises as `read_accelerator`."""
    return dict(_engine(definition, image)[0].get("absent-distributions", {}))


def locked_as(definition: Mapping[str, Any], image: str) -> str:
    """The image whose lock of Python packages an image has: the name without its variant; raises as
    `read_accelerator`."""
    variant = _engine(definition, image)[1]
    return image.removesuffix(f"-{variant}") if variant else image


def _engine(definition: Mapping[str, Any], image: str) -> tuple[Mapping[str, Any], str]:
    """The image's engine, and its variant or nothing."""
    engines = definition["engine"]
    name, variant = split_variant(image.partition("-")[2], engines)
    return engines[name], variant

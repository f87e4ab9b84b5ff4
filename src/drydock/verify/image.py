"""The image that is verified: its tree, its manifest, and which files are where."""

from __future__ import annotations

import contextlib
import csv
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from drydock.errors import DrydockError
from drydock.verify.declared import Accelerator, read_absent, read_accelerator
from drydock.verify.records import Rows, add_rows
from drydock.verify.report import Finding
from drydock.verify.tree import Seen, Tree

RECORDS = "usr/share/drydock"
BASE_FOLDERS = ("usr/bin", "usr/lib", "usr/libexec", "usr/sbin")
"""Where only Debian's packages and drydock put files, so that any other file is a stray."""


class Distribution(NamedTuple):
    """An installed distribution as the manifest has it; `record` is the hex sha256 of its RECORD."""

    name: str
    version: str
    folder: str
    record: str


@dataclass(frozen=True, kw_only=True)
class VendorBase:
    """The vendor's image that an image stands on; `site_packages` are without their leading slash, `provides` is
    normalized name -> version."""

    name: str
    site_packages: tuple[str, ...]
    provides: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`/usr/share/drydock/manifest.json`, and of the definition beside it what a manifest does not have.

    `prefix` and `site_packages` are without their leading slash, `debs` is name -> "version architecture",
    `absent_distributions` is normalized name -> reason."""

    image: str
    machine: str
    python: str
    prefix: str
    site_packages: str
    distributions: tuple[Distribution, ...]
    debs: Mapping[str, str]
    base_record: str
    accelerator: Accelerator
    driver_libraries: tuple[str, ...]
    absent_libraries: Mapping[str, str]
    foreign_objects: Mapping[str, str]
    environment: Mapping[str, str]
    vendor: VendorBase | None = None
    absent_distributions: Mapping[str, str] = field(default_factory=dict)


def read_manifest(tree: Tree) -> Manifest:
    """Read the image's manifest.

    Raises:
        DrydockError: there is none, or it is not one that this verifier understands.
    """
    path = f"{RECORDS}/manifest.json"
    try:
        data = json.loads(tree.read(path))
    except FileNotFoundError:
        raise DrydockError(
            f"this is not a drydock image: /{path} is missing; run `drydock verify IMAGE`"
        ) from None
    except (OSError, ValueError) as error:
        raise DrydockError(f"/{path} cannot be read ({error}): build the image again") from error
    try:
        if data["schema"] != 1:
            raise DrydockError(f"/{path} has schema {data['schema']}, this verifier reads 1: use its drydock")
        definition = _definition(tree)
        return Manifest(
            image=data["image"],
            machine=data["machine"],
            python=data["python"],
            prefix=data["prefix"].strip("/"),
            site_packages=data["site-packages"].strip("/"),
            distributions=tuple(
                Distribution(entry["name"], entry["version"], entry["dist-info"], entry["record"])
                for entry in data["distributions"]
            ),
            debs={entry["name"]: f"{entry['version']} {entry['architecture']}" for entry in data["debs"]},
            base_record=data["base-record"],
            accelerator=_accelerator(data, definition),
            driver_libraries=tuple(data["driver-libraries"]),
            absent_libraries=dict(data["absent-libraries"]),
            foreign_objects=dict(data["foreign-objects"]),
            environment=dict(data["environment"]),
            vendor=_vendor(data["base"]) if "base" in data else None,
            absent_distributions=read_absent(definition, data["image"]) if "engine" in definition else {},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DrydockError(f"/{path} cannot be read ({error!r}): build the image again") from error


def _accelerator(data: Mapping[str, Any], definition: Mapping[str, Any]) -> Accelerator:
    declared = data["accelerator"]
    if declared["kind"] == "npu":
        if not definition:
            raise DrydockError(
                f"/{RECORDS}/image.toml cannot be read, which says what NPUs it is made for: build the image again"
            )
        return read_accelerator(definition, data["image"])
    return Accelerator(
        kind=declared["kind"], minimum_driver=declared["minimum-driver"], sm=tuple(declared["sm"])
    )


def _definition(tree: Tree) -> dict[str, Any]:
    """The definition that the image carries; nothing where it cannot be read, which the check of files names."""
    try:
        return tomllib.loads(tree.read(f"{RECORDS}/image.toml").decode())
    except (OSError, ValueError):
        return {}


def _vendor(data: Mapping[str, Any]) -> VendorBase:
    return VendorBase(
        name=f"{data['repository']} {data['version']}",
        site_packages=tuple(path.strip("/") for path in data["site-packages"]),
        provides=dict(data["provides"]),
    )


@dataclass(frozen=True, kw_only=True)
class Image:
    """All that the checks look at; `in_base` and `in_prefix` are the files found there, `base` is what
    base.RECORD says, with what is wrong with it."""

    tree: Tree
    manifest: Manifest
    in_base: Mapping[str, Seen]
    in_prefix: Mapping[str, Seen]
    base: Rows
    base_findings: Sequence[Finding]


def open_image(root: Path) -> Image:
    """Walk the image under `root` and read what it says of itself; raises as `read_manifest`."""
    tree = Tree(root)
    manifest = read_manifest(tree)
    # Of a vendor's base nobody here knows the files.
    folders = () if manifest.vendor else BASE_FOLDERS
    walked = tree.walking(manifest.prefix, *folders)
    base: Rows = {}
    findings: list[Finding] = []
    with contextlib.suppress(OSError, csv.Error):  # `check_debs` reports it
        findings = add_rows(tree, f"{RECORDS}/base.RECORD", base)
    in_prefix, *below = walked()
    in_base = {path: seen for found in below for path, seen in found.items()}
    return Image(
        tree=tree,
        manifest=manifest,
        in_base=in_base,
        in_prefix=in_prefix,
        base=base,
        base_findings=findings,
    )

"""Check: every installed distribution is the locked one, and its RECORD is as it was installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from drydock.verify.image import Image
from drydock.verify.locks import compare_installed, compare_manifest, read_packages
from drydock.verify.records import compare_record
from drydock.verify.report import Finding, Outcome
from drydock.verify.versions import normalize_name, same_version


def dist_info_folders(image: Image, site_packages: str = "") -> list[str]:
    """The names of the `*.dist-info` folders in site-packages."""
    where = Path(image.tree.where(site_packages or image.manifest.site_packages))
    return sorted(folder.name for folder in where.glob("*.dist-info"))


def read_installed(image: Image, site_packages: str = "") -> tuple[dict[str, list[str]], list[Finding]]:
    """What is installed as importlib.metadata would find it, name -> versions, and what does not say.

    Parameters:
        site_packages: another folder than the image's own.
    """
    installed: dict[str, list[str]] = {}
    findings = []
    for folder in dist_info_folders(image, site_packages):
        path = f"{site_packages or image.manifest.site_packages}/{folder}/METADATA"
        try:
            header = image.tree.read(path).decode("utf-8", "replace").replace("\r", "").partition("\n\n")[0]
        except OSError as error:
            findings.append(Finding(f"/{path}", f"cannot be read ({error.strerror})"))
            continue
        fields = dict(re.findall(r"^(Name|Version):[ \t]*(.*?)[ \t]*$", header, re.MULTILINE))
        if len(fields) == 2:
            installed.setdefault(normalize_name(fields["Name"]), []).append(fields["Version"])
        else:
            findings.append(Finding(f"/{path}", "does not say both Name and Version"))
    return installed, findings


def check_distributions(image: Image) -> Outcome:
    """Every `*.dist-info` against pylock.toml: missing, extra, other version; every RECORD's own hash."""
    manifest = image.manifest
    packages, findings = read_packages(image.tree, "pylock.toml")
    locked = {normalize_name(entry["name"]): entry["version"] for entry in packages}
    in_manifest = {normalize_name(entry.name): entry.version for entry in manifest.distributions}
    installed, unreadable = read_installed(image)
    findings += unreadable
    findings += compare_manifest("pylock.toml", locked, in_manifest, same_version)
    findings += compare_installed(locked, installed, same_version)
    folders = set(dist_info_folders(image))
    for entry in manifest.distributions:
        if entry.folder in folders:  # one that is not there is a finding already
            record = f"{manifest.site_packages}/{entry.folder}/RECORD"
            findings += compare_record(image.tree, record, entry.record)
    count = sum(map(len, installed.values()))
    return Outcome(len(locked), f"{count} installed, {len(locked)} locked", findings)


def held_by_base(image: Image) -> dict[str, str]:
    """The distributions in a vendor's base, normalized name -> the version that Python finds first."""
    there: dict[str, str] = {}
    for folder in image.manifest.vendor.site_packages if image.manifest.vendor else ():
        for name, versions in read_installed(image, folder)[0].items():
            there.setdefault(name, versions[0])
    return there


def held(image: Image) -> dict[str, str]:
    """All distributions, ours before those of a vendor's base, normalized name -> version."""
    return held_by_base(image) | {name: versions[0] for name, versions in read_installed(image)[0].items()}


def check_absent(absent: Mapping[str, str], installed: Mapping[str, str]) -> Outcome:
    """What the definition says is missing, since no index has it: said, and no difference to the lock.

    Parameters:
        absent: normalized name -> reason.
        installed: normalized name -> version.
    """
    findings = [
        Finding(
            name,
            f"{installed[name]} is installed, and declared as missing: take it out of absent-distributions",
        )
        for name in absent
        if name in installed
    ]
    said = "; ".join(f"{name} is missing, as declared: {reason}" for name, reason in sorted(absent.items()))
    return Outcome(len(absent), said, findings, state="failed" if findings else "as-declared")


def check_provided(image: Image) -> Outcome:
    """What a vendor's base is said to hold: each distribution with its version, where Python finds it first."""
    vendor = image.manifest.vendor
    assert vendor
    there = held_by_base(image)
    findings = []
    for name, version in sorted(vendor.provides.items()):
        if name not in there:
            where = " or ".join(f"/{folder}" for folder in vendor.site_packages)
            findings.append(Finding(name, f"{version} is to be in {vendor.name}, and is not in {where}"))
        elif not same_version(version, there[name]):
            findings.append(Finding(name, f"{version} is to be in {vendor.name}, {there[name]} is"))
    detail = f"{len(vendor.provides)} provided by {vendor.name}, which holds {len(there)}"
    return Outcome(len(vendor.provides), detail, findings)

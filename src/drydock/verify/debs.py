"""Check: every Debian package is the locked one, and the base's files are as base.RECORD says."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from pathlib import Path

from drydock.verify.image import RECORDS, Image
from drydock.verify.locks import compare_installed, compare_manifest, read_packages
from drydock.verify.records import compare, compare_record
from drydock.verify.report import Finding, Outcome
from drydock.verify.tree import Tree

DRIVER_FILES = ("lib*nvidia*", "libcuda*", "libnv*", "nvidia-*")
"""What container runtimes add to the base for a GPU (libnvidia-container's list of driver files)."""

_STATUS_FIELD = re.compile(r"^(Package|Version|Architecture|Status): *(.*?) *$", re.MULTILINE)


def read_dpkg_status(tree: Tree) -> dict[str, list[str]]:
    """Installed packages, name -> "version architecture", from dpkg's own record (deb-control(5)).

    Raises:
        OSError: the record cannot be read.
    """
    installed: dict[str, list[str]] = {}
    for paragraph in tree.read("var/lib/dpkg/status").decode("utf-8", "replace").split("\n\n"):
        fields = {"Version": "no version", "Architecture": "no architecture"}
        fields |= dict(_STATUS_FIELD.findall(paragraph))
        if fields.get("Status", "").endswith(" installed"):
            version = f"{fields['Version']} {fields['Architecture']}"
            installed.setdefault(fields.get("Package", "no name"), []).append(version)
    return installed


def check_debs(image: Image, full: bool) -> Outcome:
    """dpkg's status against debian.toml, and every file of base.RECORD; strays in `BASE_FOLDERS`.

    Of a vendor's base only what drydock put there can be compared.
    """
    tree, base = image.tree, image.base
    if image.manifest.vendor:
        findings = [
            *image.base_findings,
            *compare_record(tree, f"{RECORDS}/base.RECORD", image.manifest.base_record),
            *compare(tree, base, full),
        ]
        detail = (
            f"{len(base)} files of ours, {'hashes' if full else 'sizes'} compared; the rest is the vendor's"
        )
        return Outcome(len(base), detail, findings)
    packages, findings = read_packages(tree, "debian.toml")
    locked = {entry["name"]: f"{entry['version']} {entry.get('architecture')}" for entry in packages}
    findings += compare_manifest("debian.toml", locked, image.manifest.debs)
    try:
        findings += compare_installed(locked, read_dpkg_status(tree), kind="deb ")
    except OSError as error:
        findings.append(Finding("/var/lib/dpkg/status", f"cannot be read ({error.strerror})"))
    findings += image.base_findings
    findings += compare_record(tree, f"{RECORDS}/base.RECORD", image.manifest.base_record)
    findings += compare(tree, base, full)
    mounts = mount_points(tree)
    for path in image.in_base.keys() - base.keys() if base else ():
        if not _put_by_runtime(image, path, mounts):
            findings.append(Finding(f"/{path}", "stray: no deb and not drydock put it there"))
    detail = f"{len(locked)} packages, {len(base)} files, {'hashes' if full else 'sizes'} compared"
    return Outcome(len(locked) + len(base), detail, findings)


def mount_points(tree: Tree) -> set[str]:
    """Paths in the tree on which something is mounted (proc(5), mountinfo); none where /proc is not there."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    points = {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}
    above = tree.root.rstrip("/") + "/"
    return {point.removeprefix(above) for point in points if point.startswith(above)} - {""}


def _put_by_runtime(image: Image, path: str, mounts: Collection[str]) -> bool:
    """Whether a container runtime put this file there: the driver's, a mount, or what is left of one."""
    seen = image.in_base[path]
    names = [path.rpartition("/")[2]]
    if seen.is_link:
        names.append(image.tree.link(path).rpartition("/")[2])
    return (
        seen.size == 0
        or any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in DRIVER_FILES)
        or any(path == mount or path.startswith(f"{mount}/") for mount in mounts)
    )

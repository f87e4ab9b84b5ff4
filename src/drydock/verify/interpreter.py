"""Check: the Python is the locked one."""

from __future__ import annotations

import platform
import sys
from typing import NamedTuple

from drydock.verify.image import Image
from drydock.verify.report import Finding, Outcome


class Interpreter(NamedTuple):
    """A Python."""

    version: str
    implementation: str
    machine: str
    prefix: str

    @classmethod
    def running(cls) -> Interpreter:
        """The one that runs this."""
        return cls(
            platform.python_version(), platform.python_implementation(), platform.machine(), sys.prefix
        )


def check_python(image: Image, interpreter: Interpreter | None) -> Outcome:
    """The interpreter: version to the patch, implementation, machine, prefix.

    In a tree that is not the running system (`interpreter` is None) the version is that of Debian's package,
    and the prefix has to lead to its executable.
    """
    manifest = image.manifest
    if interpreter is None:
        return _check_python_in_tree(image)
    locked = Interpreter(manifest.python, "CPython", manifest.machine, f"/{manifest.prefix}")
    findings = [
        Finding(f"Python's {name}", f"{wanted} is locked, {found} is running")
        for name, wanted, found in zip(Interpreter._fields, locked, interpreter, strict=True)
        if found != wanted
    ]
    detail = f"{interpreter.implementation} {interpreter.version} in {interpreter.prefix}"
    return Outcome(len(locked), detail, findings)


def _check_python_in_tree(image: Image) -> Outcome:
    manifest, tree = image.manifest, image.tree
    findings = []
    package = f"python{'.'.join(manifest.python.split('.')[:2])}-minimal"
    deb = manifest.debs.get(package, "no version").rpartition(" ")[0]
    if not manifest.vendor and deb.rpartition(":")[2].partition("-")[0].replace("~", "") != manifest.python:
        findings.append(Finding(package, f"Python {manifest.python} is locked, the deb is {deb}"))
    executable = f"{manifest.prefix}/bin/python"
    found = tree.resolve(executable)
    seen = tree.look(found) if found else None
    if seen is None or not seen.is_file:
        findings.append(Finding(f"/{executable}", "leads to no interpreter in the image"))
    by = "as declared of the vendor's base" if manifest.vendor else "by its deb"
    return Outcome(2, f"{manifest.python} {by}; not started, since this tree is not running", findings)

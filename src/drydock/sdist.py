"""A package that was published without a wheel becomes one, the same bytes on every machine.

The build runs in an environment that holds its hashed requirements and nothing else. What the backend
writes is then packed again with fixed order, modes and times and without compression, since zip bytes
depend on the umask and the zlib of the machine.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from drydock.errors import DrydockError
from drydock.locks import Artifact, Package
from drydock.oci import EPOCH
from drydock.store import Store

_BACKEND = """
import importlib, os, sys, tomllib
backend = {"build-backend": "setuptools.build_meta:__legacy__"}
if os.path.exists("pyproject.toml"):
    with open("pyproject.toml", "rb") as file:
        backend |= tomllib.load(file).get("build-system", {})
sys.path[:0] = backend.get("backend-path", [])
module, _, attribute = backend["build-backend"].partition(":")
hooks = importlib.import_module(module)
for name in filter(None, attribute.split(".")):
    hooks = getattr(hooks, name)
print(hooks.build_wheel(sys.argv[1]))
"""


def build_wheel(store: Store, sdist: Artifact, requires: Iterable[Artifact]) -> tuple[str, bytes]:
    """Build an sdist from the store with build requirements from the store.

    Returns:
        The wheel's file name and its normalized bytes.

    Raises:
        DrydockError: the backend failed, or made a wheel that is not pure (one that is not would depend on
            the machine's compiler).
    """
    with tempfile.TemporaryDirectory(prefix="drydock-sdist-") as folder:
        work = Path(folder)
        for requirement in requires:
            with zipfile.ZipFile(store.path(requirement.sha256)) as archive:
                archive.extractall(work / "env")
        with tarfile.open(store.path(sdist.sha256)) as archive:
            archive.extractall(work / "source", filter="data")
        (source,) = (work / "source").iterdir()
        (work / "dist").mkdir()
        # -I with an explicit path: nothing of the builder's own site-packages may take part.
        code = f"import sys; sys.path.insert(0, {str(work / 'env')!r}); " + f"exec({_BACKEND!r})"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(work / "dist")],
            cwd=source,
            env={
                "PATH": os.environ.get("PATH", ""),
                "SOURCE_DATE_EPOCH": str(EPOCH),
                "HOME": str(work),
                "LC_ALL": "C",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DrydockError(f"building {sdist} failed: {last[:300]}")
        (wheel,) = (work / "dist").glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            raise DrydockError(
                f"building {sdist} gave {wheel.name}: only pure wheels are the same everywhere"
            )
        return wheel.name, normalize(wheel)


def normalize(wheel: Path) -> bytes:
    """A wheel's bytes with fixed order, modes and times, uncompressed, and a RECORD that is true."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    del files[record]
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(files[name])))
    writer.writerow((record, "", ""))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [*sorted(files.items()), (record, rows.getvalue().encode())]:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o100644 << 16
            info.create_system = 3
            archive.writestr(info, data)
    return packed.getvalue()


def ensure_built(store: Store, package: Package) -> None:
    """Have the wheel of a source-built package in the store, building it when it is not there.

    Raises:
        DrydockError: the build gave other bytes than the lock names.
    """
    built = package.built_from
    wheel = package.wheel
    if built is None or store.has(wheel.sha256, wheel.size):
        return
    sdist = built.sdist.artifact("sdist", package.name, package.version)
    filename, data = build_wheel(store, sdist, [requirement.artifact for requirement in built.build_requires])
    digest = hashlib.sha256(data).hexdigest()
    if (filename, digest) != (wheel.filename, wheel.sha256):
        raise DrydockError(
            f"building {sdist} gave {filename} with sha256:{digest}, the lock has {wheel.filename} with "
            f"sha256:{wheel.sha256}: run `drydock lock --upgrade {package.name}` and review the difference"
        )
    store.put(data)
    store.link(digest, store.root / "wheels" / filename)

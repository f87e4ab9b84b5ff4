"""A small project of made-up packages in a folder, for tests that lock without a network."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def make_wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), tag: str = "py3-none-any"
) -> Path:
    """A wheel with one module, as an index or a find-links folder would serve it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": f"version = {version!r}\n".encode(),
        f"{info}/METADATA": (metadata + "".join(f"Requires-Dist: {entry}\n" for entry in requires)).encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    rows = ""
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows += f"{path},sha256={digest},{len(data)}\n"
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in {**files, f"{info}/RECORD": (rows + f"{info}/RECORD,,\n").encode()}.items():
            archive.writestr(path, data)
    return wheel


def make_project(root: Path, requirements: str, more: str = "") -> Path:
    """A checkout with one image, `box-mini`, and the repository's own Debian locks."""
    (root / "images/box").mkdir(parents=True)
    (root / "lock").mkdir()
    for name in ("images/debian-13.toml", "lock/debian-13-amd64.toml", "lock/debian-13-arm64.toml"):
        (root / name).write_bytes((REPOSITORY / name).read_bytes())
    (root / "images/box/image.toml").write_text(DEFINITION.format(requirements=requirements, more=more))
    return root


DEFINITION = """\
hardware = "box"
summary = "for tests"
architecture = "amd64"
python = "3.13"
manylinux = "2_40"
default-engine = "mini"
[base]
kind = "debian"
release = 13
[accelerator]
kind = "none"
[engine.mini]
summary = "made-up packages"
distribution = "alpha"
requirements = {requirements}
{more}
"""

VENDOR_DEFINITION = """\
hardware = "{hardware}"
summary = "over somebody else's image"
architecture = "{architecture}"
python = "3.13"
manylinux = "2_40"
default-engine = "mini"
[base]
kind = "image"
repository = "{repository}"
digest = "{digest}"
version = "1.2.1"
python-version = "3.13.5"
interpreter = "/usr/bin/python3.13"
site-packages = ["{site_packages}"]
[base.provides]
{provided} = "{version}"
[accelerator]
kind = "none"
[engine.mini]
summary = "a few wheels"
distribution = "{provided}"
requirements = {requirements}
{more}
"""
"""An image over a vendor's, which provides one distribution."""

"""Each kind of tampering with a real image is named by `python -m drydock.verify`, which exits with 1."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mini_image import REPOSITORY, SITE, copy_tree, flipped, locked, rewrite, setuptools_80_9

from drydock.definition import Architecture
from drydock.store import Store


@pytest.fixture
def own(tree: Path, tmp_path: Path) -> Path:
    """A copy of the image by hard links, for one test to harm with `rewrite`."""
    copy = tmp_path / "root"
    copy.mkdir()
    copy_tree(tree, copy)
    return copy


def verify(root: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "drydock.verify", "--root", str(root), "--json", *options],
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def findings(root: Path, *options: str) -> dict[str, str]:
    """Subject -> what is wrong, of a verification that must fail."""
    status, report = verify(root, *options)
    assert (status, report["verdict"]) == (1, "drift")
    return {entry["subject"]: entry["what"] for check in report["checks"] for entry in check["findings"]}


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_image_as_built_passes(tree: Path, options: tuple[str, ...]) -> None:
    status, report = verify(tree, *options)
    found = [entry for check in report["checks"] for entry in check["findings"]]
    assert (status, report["verdict"], found) == (0, "ok", [])
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states.pop("accelerator") == "not-applicable"
    assert set(states.values()) == {"ok"}
    checked = {check["name"]: check["checked"] for check in report["checks"]}
    assert checked["files"] > 2_000
    assert checked["debs"] > 10_000
    assert checked["libraries"] > 500


ONE_BYTE = [
    f"{SITE}/numpy/_core/numeric.py",
    f"{SITE}/click/__pycache__/core.cpython-313.pyc",
    "opt/venv/bin/jp.py",
    "usr/lib/python3.13/json/decoder.py",
    "usr/lib/python3.13/json/__pycache__/decoder.cpython-313.pyc",
    "usr/bin/git",
    "etc/ssl/certs/ca-certificates.crt",
    "etc/passwd",
]


@pytest.mark.parametrize("path", ONE_BYTE)
def test_one_byte_of_one_file(own: Path, path: str) -> None:
    rewrite(own / path, lambda data: flipped(data, len(data) - 2))
    assert verify(own)[0] == 0, "sizes alone cannot tell"
    found = findings(own, "--full")
    assert list(found) == [f"/{path}"]
    assert "has other bytes than" in found[f"/{path}"]


@pytest.mark.parametrize(
    "path", [f"{SITE}/numpy/version.py", "usr/bin/make", "usr/share/drydock/base.RECORD"]
)
def test_truncated_file(own: Path, path: str) -> None:
    rewrite(own / path, lambda data: data[:-1])
    assert f"/{path}" in findings(own)


@pytest.fixture
def click(architecture: Architecture) -> str:
    """The locked version of click."""
    version: str = locked(architecture)["click"]["version"]
    return version


def test_distribution_removed(own: Path, click: str) -> None:
    for folder in ("click", f"click-{click}.dist-info"):
        shutil.rmtree(own / SITE / folder)
    assert findings(own) == {"click": f"{click} is locked, none is installed"}


def test_files_of_a_distribution_removed(own: Path) -> None:
    """The metadata still says that it is installed."""
    shutil.rmtree(own / SITE / "pluggy/__pycache__")
    (own / SITE / "pluggy/_hooks.py").unlink()
    found = findings(own)
    assert "missing" in found[f"/{SITE}/pluggy/_hooks.py"]
    assert len(found) > 5
    assert all("missing" in what and "pluggy" in what for what in found.values())


def add_wheel(own: Path, artifacts: Store, package: dict[str, Any]) -> None:
    """Install a wheel as a careless `pip install --target` would: unpacked over what is there."""
    with zipfile.ZipFile(artifacts.path(package["wheels"][0]["hashes"]["sha256"])) as archive:
        for member in archive.namelist():
            (own / SITE / member).unlink(missing_ok=True)
            archive.extract(member, own / SITE)


def test_distribution_added(own: Path, artifacts: Store, architecture: Architecture) -> None:
    six = locked(architecture)["six"]
    add_wheel(own, artifacts, six)
    assert findings(own)["six"] == f"{six['version']} is installed, none is locked"


def test_distribution_replaced_by_another_version(
    own: Path, artifacts: Store, architecture: Architecture
) -> None:
    (before,) = (own / SITE).glob("setuptools-*.dist-info")
    shutil.rmtree(before)
    other = setuptools_80_9(architecture)
    add_wheel(own, artifacts, other)
    old = before.name.removeprefix("setuptools-").removesuffix(".dist-info")
    assert findings(own)["setuptools"] == f"{old} is locked, {other['version']} is installed"


def test_distribution_installed_over_another_version(
    own: Path, artifacts: Store, architecture: Architecture
) -> None:
    other = setuptools_80_9(architecture)
    add_wheel(own, artifacts, other)
    what = findings(own)["setuptools"]
    assert "are installed over each other" in what
    assert other["version"] in what


def test_distribution_that_says_another_version(own: Path, click: str) -> None:
    rewrite(
        own / SITE / f"click-{click}.dist-info/METADATA",
        lambda data: data.replace(f"\nVersion: {click}\n".encode(), b"\nVersion: 99.0\n", 1),
    )
    assert findings(own)["click"] == f"{click} is locked, 99.0 is installed"


def test_file_of_a_deb_replaced(own: Path) -> None:
    (own / "usr/bin/tini").unlink()
    (own / "usr/bin/tini").write_bytes(b"#!/bin/sh\n")
    found = findings(own)
    assert "deb tini" in found["/usr/bin/tini"]


def test_deb_of_another_version(own: Path) -> None:
    """What dpkg's status says after an `apt-get install` of one package."""
    status = own / "var/lib/dpkg/status"
    paragraphs = status.read_text().split("\n\n")
    (mine,) = [text for text in paragraphs if text.startswith("Package: make\n")]
    version = next(line for line in mine.splitlines() if line.startswith("Version: "))
    # Of the same length, so that only what it says is another.
    newer = version[:-1] + chr(ord(version[-1]) + 1)
    rewrite(status, lambda data: data.replace(mine.encode(), mine.replace(version, newer).encode()))
    found = findings(own)
    assert set(found) == {"make"}
    assert newer.removeprefix("Version: ") in found["make"]


def test_deb_removed_and_deb_added(own: Path) -> None:
    status = own / "var/lib/dpkg/status"
    rewrite(status, lambda data: data.replace(b"Package: numactl\n", b"Package: numbers\n"))
    found = findings(own)
    assert "is locked, none is installed" in found["numactl"]
    assert "is installed, none is locked" in found["numbers"]


def test_library_of_a_wheel_removed(own: Path) -> None:
    (library,) = (own / SITE / "numpy.libs").glob("libscipy_openblas64_*")
    library.unlink()
    found = findings(own)
    assert "missing" in found[f"/{library.relative_to(own)}"]
    (core,) = (own / SITE / "numpy/_core").glob("_multiarray_umath.*.so")
    assert found[f"/{core.relative_to(own)}"] == f"needs {library.name}, which is not in the image"


def test_library_of_a_deb_removed(own: Path) -> None:
    (library,) = (own / "usr/lib").glob("*-linux-gnu/libz.so.1")
    library.unlink()
    found = findings(own)
    assert "missing" in found[f"/{library.relative_to(own)}"]
    assert found["/usr/bin/git"] == "needs libz.so.1, which is not in the image"


@pytest.mark.parametrize(
    "path",
    [
        f"{SITE}/numpy/__pycache__/stray.cpython-313.pyc",
        f"{SITE}/click/core.pyc",
        f"{SITE}/sitecustomize.py",
        "usr/lib/python3.13/__pycache__/stray.cpython-313.pyc",
        "opt/venv/bin/pip",
        "usr/bin/curl",
    ],
)
def test_stray_file(own: Path, path: str) -> None:
    (own / path).write_bytes(b"stray")
    found = findings(own)
    assert list(found) == [f"/{path}"]
    assert found[f"/{path}"].startswith("stray")


def test_record_edited_together_with_its_file(own: Path) -> None:
    """The RECORD is then true; its own hash in the manifest is not."""
    changed = own / SITE / "packaging/version.py"
    rewrite(changed, lambda data: data + b"# mine\n")
    data = changed.read_bytes()
    (record,) = (own / SITE).glob("packaging-*.dist-info/RECORD")

    def edited(content: bytes) -> bytes:
        rows = list(csv.reader(io.StringIO(content.decode())))
        for row in rows:
            if row[0] == "packaging/version.py":
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                row[1:] = [f"sha256={digest}", str(len(data))]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    rewrite(record, edited)
    for options in ((), ("--full",)):
        assert list(findings(own, *options)) == [f"/{record.relative_to(own)}"]


def test_base_record_edited_together_with_its_file(own: Path) -> None:
    motd = own / "etc/passwd"
    before = motd.read_bytes()
    after = before.replace(b"drydock:x:1000", b"drydock:x:0000")
    rewrite(motd, lambda _: after)
    record = own / "usr/share/drydock/base.RECORD"
    digests = [hashlib.sha256(data).hexdigest().encode() for data in (before, after)]
    rewrite(record, lambda data: data.replace(*digests))
    assert list(findings(own, "--full")) == ["/usr/share/drydock/base.RECORD"]


def test_lock_in_the_image_edited(own: Path, click: str) -> None:
    lock = own / "usr/share/drydock/pylock.toml"
    rewrite(
        lock,
        lambda data: data.replace(f'"click"\nversion = "{click}"'.encode(), b'"click"\nversion = "99.0"'),
    )
    found = findings(own)
    # The manifest disagrees with it, and so do its own size and what is installed; one line stands for click.
    assert "click" in found
    assert "/usr/share/drydock/pylock.toml" in found


def test_link_turned(own: Path) -> None:
    (own / "opt/venv/bin/python").unlink()
    (own / "opt/venv/bin/python").symlink_to("/usr/bin/perl")
    assert "is a link to /usr/bin/perl" in findings(own)["/opt/venv/bin/python"]


def test_people_read_the_same(own: Path) -> None:
    (own / SITE / "distro/distro.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "drydock.verify", "--root", str(own)],
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"files: /{SITE}/distro/distro.py: missing (RECORD of distro names it)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("drift: tiny-mini differs from its lock in 1 place")

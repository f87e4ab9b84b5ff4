"""The verifier on small image trees: right ones pass, each kind of tampering is named."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import canonicalize_version

import drydock
from drydock import verify
from drydock.verify.accelerator import Device, NvmlError, check_accelerator, compare_devices
from drydock.verify.debs import mount_points
from drydock.verify.declared import Accelerator
from drydock.verify.elf import MACHINES, MalformedElf, read_elf
from drydock.verify.image import open_image, read_manifest
from drydock.verify.interpreter import Interpreter, check_python
from drydock.verify.report import Finding
from drydock.verify.tree import Tree
from drydock.verify.versions import normalize_version

SITE = "opt/venv/lib/python3.13/site-packages"
MULTIARCH = "usr/lib/x86_64-linux-gnu"
SOURCES = Path(drydock.__file__).parents[1]


# A small image.


def compile_library(folder: Path, name: str, *options: str) -> bytes:
    """A shared library with that soname, as bytes for x86_64 whatever machine compiled it."""
    path = folder / name
    command = f"gcc -shared -nostdlib -Wl,--no-as-needed -Wl,-soname,{name} -x c /dev/null -x none".split()
    subprocess.run([*command, "-o", str(path), *options], check=True, capture_output=True)
    return for_machine(path.read_bytes(), "x86_64")


def for_machine(elf: bytes, machine: str) -> bytes:
    return elf[:18] + MACHINES[machine].to_bytes(2, "little") + elf[20:]


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Compiled once: two libraries of the base, one of a wheel, and two extension modules that need them."""
    folder = tmp_path_factory.mktemp("elf")
    made = {
        name: compile_library(folder, name)
        for name in ("libc.so.6", "libz.so.1", "libalpha.so.1", "libcuda.so.1", "libavcodec.so.61")
    }
    needs = [str(folder / name) for name in made]
    made["_C.so"] = compile_library(folder, "_C.so", "-Wl,--enable-new-dtags,-rpath,$ORIGIN/lib", *needs)
    made["old.so"] = compile_library(
        folder,
        "old.so",
        "-Wl,--disable-new-dtags,-rpath,${ORIGIN}/../alpha/lib",
        str(folder / "libalpha.so.1"),
    )
    compile_library(folder, "libgtk.so.3")
    made["libnvidia-gtk3.so"] = compile_library(folder, "libnvidia-gtk3.so", str(folder / "libgtk.so.3"))
    made["preloads.so"] = compile_library(folder, "preloads.so", str(folder / "libalpha.so.1"))
    return made


class SmallImage:
    """An image tree as the assembler writes it; `seal` writes the manifest and the records last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.owners: dict[str, str] = {}
        self.distributions: dict[str, dict[str, str]] = {}
        self.debs: dict[str, dict[str, str]] = {}
        self.manifest: dict[str, Any] = {}

    def path(self, path: str) -> Path:
        return self.root / path

    def write(self, path: str, content: bytes | str, owner: str | None = None, mode: int = 0o644) -> None:
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        target.chmod(mode)
        if owner:
            self.owners[path] = owner

    def link(self, path: str, target: str, owner: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).symlink_to(target)
        self.owners[path] = owner

    def wheel(self, name: str, version: str, files: dict[str, bytes], locked: bool = True) -> None:
        """Install files (path from site-packages -> bytes) with METADATA and RECORD."""
        folder = f"{name}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n\nName: not this\n".encode()
        files = {**files, f"{folder}/METADATA": metadata}
        record = io.StringIO()
        writer = csv.writer(record, lineterminator="\n")
        for path, content in files.items():
            self.write(os.path.normpath(f"{SITE}/{path}"), content, mode=0o755 if "bin/" in path else 0o644)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            writer.writerow([path, f"sha256={digest}", len(content)])
        writer.writerow([f"{folder}/RECORD", "", ""])
        self.write(f"{SITE}/{folder}/RECORD", record.getvalue())
        if locked:
            self.distributions[name] = {
                "name": name,
                "version": version,
                "dist-info": folder,
                "record": hashlib.sha256(record.getvalue().encode()).hexdigest(),
            }

    def uninstall(self, name: str) -> None:
        """Remove a distribution as pip does: what its RECORD names, then the empty folder."""
        folder = self.path(f"{SITE}/{self.distributions[name]['dist-info']}")
        for path, *_ in csv.reader((folder / "RECORD").read_text().splitlines()):
            self.path(os.path.normpath(f"{SITE}/{path}")).unlink()
        folder.rmdir()

    def deb(self, name: str, version: str) -> None:
        self.debs[name] = {"name": name, "version": version, "architecture": "amd64"}

    def write_status(self) -> None:
        self.write(
            "var/lib/dpkg/status",
            "\n".join(
                f"Package: {deb['name']}\nStatus: install ok installed\nArchitecture: {deb['architecture']}\n"
                f"Version: {deb['version']}\nDescription: a package\n Version: of a description\n"
                for deb in self.debs.values()
            ),
        )

    def seal(self, **changes: Any) -> None:
        """Write the inputs, dpkg's status, base.RECORD and manifest.json."""
        packages = [
            {"name": entry["name"], "version": entry["version"]} for entry in self.distributions.values()
        ]
        self.write("usr/share/drydock/pylock.toml", tomli_w.dumps({"packages": packages}), "drydock")
        self.write(
            "usr/share/drydock/debian.toml", tomli_w.dumps({"packages": [*self.debs.values()]}), "drydock"
        )
        self.write_status()
        record = io.StringIO()
        writer = csv.writer(record, lineterminator="\n")
        for path, owner in sorted(self.owners.items()):
            file = self.path(path)
            if file.is_symlink():
                writer.writerow([path, f"symlink={file.readlink()}", "", owner])
            else:
                content = file.read_bytes()
                writer.writerow([path, f"sha256={hashlib.sha256(content).hexdigest()}", len(content), owner])
        self.write("usr/share/drydock/base.RECORD", record.getvalue())
        self.manifest = {
            "schema": 1,
            "image": "cpu-small",
            "architecture": "amd64",
            "machine": "x86_64",
            "python": "3.13.5",
            "prefix": "/opt/venv",
            "site-packages": f"/{SITE}",
            "distributions": [*self.distributions.values()],
            "debs": [*self.debs.values()],
            "base-record": hashlib.sha256(record.getvalue().encode()).hexdigest(),
            "accelerator": {"kind": "none", "minimum-driver": None, "sm": []},
            "driver-libraries": ["libcuda.so.1"],
            "absent-libraries": {"libavcodec.so.*": "no video is decoded"},
            "foreign-objects": {},
            "environment": {"PATH": "/opt/venv/bin:/usr/bin"},
        } | changes
        self.write("usr/share/drydock/manifest.json", json.dumps(self.manifest))


@pytest.fixture
def image(tmp_path: Path, objects: dict[str, bytes]) -> SmallImage:
    image = SmallImage(tmp_path / "image")
    image.deb("libc6", "2.41-12")
    image.deb("zlib1g", "1:1.3.1-1")
    image.deb("python3.13-minimal", "3.13.5-2")
    image.link("lib", "usr/lib", "drydock")
    image.write(f"{MULTIARCH}/libc.so.6", objects["libc.so.6"], "libc6")
    # Off the default path, so that ld.so.conf is needed.
    image.write("usr/lib/zlib/libz.so.1.3.1", objects["libz.so.1"], "zlib1g")
    image.link("usr/lib/zlib/libz.so.1", "libz.so.1.3.1", "zlib1g")
    image.write("etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n", "libc6")
    image.write("etc/ld.so.conf.d/zlib.conf", "# zlib\n/lib/zlib\n", "zlib1g")
    image.write("usr/bin/python3.13", objects["libc.so.6"], "python3.13-minimal", 0o755)
    image.write("opt/venv/pyvenv.cfg", "home = /usr/bin\n", "drydock")
    image.link("opt/venv/bin/python", "/usr/bin/python3.13", "drydock")
    image.wheel(
        "alpha",
        "1.0",
        {
            "alpha/__init__.py": b"ONE = 1\n",
            "alpha/__pycache__/__init__.cpython-313.pyc": b"bytecode",
            "alpha/_C.so": objects["_C.so"],
            "alpha/lib/libalpha.so.1": objects["libalpha.so.1"],
            "shared/notes.txt": b"alpha",
            "../../../bin/alpha": b"#!/opt/venv/bin/python\n",
        },
    )
    image.wheel(
        "beta",
        "2.0",
        {
            "beta/__init__.py": b"TWO = 2\n",
            "beta/old.so": objects["old.so"],
            "beta/preloads.so": objects["preloads.so"],
            "shared/notes.txt": b"beta!",
        },
    )
    image.seal()
    return image


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(image: SmallImage, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command on the image's tree; gives its exit status and JSON document."""

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        status = verify.main(["--json", "--root", str(image.root), *options])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        return status, json.loads(lines[0])

    return run


@pytest.fixture
def drift(run: Run) -> Callable[..., list[tuple[str, str, str]]]:
    """Verify, tamper, verify again: gives (check, subject, what) of the second, after a clean first."""

    def drift(tamper: Callable[[], object], *options: str) -> list[tuple[str, str, str]]:
        status, before = run(*options)
        assert (status, found(before)) == (0, [])
        tamper()
        status, after = run(*options)
        assert (status, after["verdict"]) == (1, "drift")
        return found(after)

    return drift


Drift = Callable[..., list[tuple[str, str, str]]]


def found(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (check["name"], finding["subject"], finding["what"])
        for check in document["checks"]
        for finding in check["findings"]
    ]


def flip_first_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


# Right images.


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_a_right_image_passes(run: Run, options: tuple[str, ...]) -> None:
    status, document = run(*options)
    assert (status, document["verdict"], document["full"]) == (0, "ok", bool(options))
    assert {check["name"]: check["state"] for check in document["checks"]} == {
        "python": "ok",
        "distributions": "ok",
        "files": "ok",
        "debs": "ok",
        "libraries": "ok",
        "accelerator": "not-applicable",
    }
    assert (document["image"], document["python"], document["machine"]) == ("cpu-small", "3.13.5", "x86_64")


def test_libraries_say_where_each_was_found(run: Run) -> None:
    _, document = run()
    (check,) = (check for check in document["checks"] if check["name"] == "libraries")
    assert check["checked"] == 7
    assert check["detail"] == "7 objects need 7 libraries: 1 preloaded, 1 from the driver, 1 declared absent"


def test_a_declaration_that_nothing_needs_is_noted(image: SmallImage, run: Run) -> None:
    patterns = {"libavcodec.so.*": "no video is decoded", "libgone.so.*": "was needed once"}
    image.seal(**{"absent-libraries": patterns, "foreign-objects": {"*/x86/*.so": "was shipped once"}})
    status, document = run()
    assert status == 0
    assert [check["unused"] for check in document["checks"] if check["unused"]] == [
        ["libgone.so.*", "*/x86/*.so"]
    ]


# Files of distributions.


def test_a_changed_byte_is_named_by_full_and_passes_without(
    image: SmallImage, run: Run, drift: Drift
) -> None:
    changed = f"{SITE}/alpha/__init__.py"
    ((check, subject, what),) = drift(lambda: flip_first_byte(image.path(changed)), "--full")
    assert (check, subject) == ("files", f"/{changed}")
    assert what.startswith("has other bytes than RECORD of alpha says")
    assert run()[0] == 0


def test_changed_bytecode_is_named(image: SmallImage, drift: Drift) -> None:
    changed = f"{SITE}/alpha/__pycache__/__init__.cpython-313.pyc"
    ((check, subject, _),) = drift(lambda: flip_first_byte(image.path(changed)), "--full")
    assert (check, subject) == ("files", f"/{changed}")


def test_a_truncated_file_is_named(image: SmallImage, drift: Drift) -> None:
    changed = f"{SITE}/beta/__init__.py"
    findings = drift(lambda: os.truncate(image.path(changed), 3))
    assert findings == [("files", f"/{changed}", "has 3 bytes, and 8 by RECORD of beta")]


def test_a_missing_script_outside_of_site_packages_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(image.path("opt/venv/bin/alpha").unlink)
    assert findings == [("files", "/opt/venv/bin/alpha", "missing (RECORD of alpha names it)")]


def test_a_file_replaced_by_a_link_to_the_same_bytes_is_named(image: SmallImage, drift: Drift) -> None:
    path = image.path(f"{SITE}/beta/__init__.py")

    def tamper() -> None:
        copy = image.path("tmp/copy.py")
        copy.parent.mkdir()
        path.rename(copy)
        path.symlink_to("/tmp/copy.py")

    ((check, subject, what),) = drift(tamper)
    assert (check, subject) == ("files", f"/{SITE}/beta/__init__.py")
    assert what == "is a link to /tmp/copy.py, and a file by RECORD of beta"


@pytest.mark.parametrize(
    "stray",
    [
        f"{SITE}/beta/__pycache__/__init__.cpython-313.pyc",
        f"{SITE}/evil.pth",
        "opt/venv/bin/evil",
        f"{SITE}/\udcff.py",
    ],
)
def test_a_stray_file_is_named(image: SmallImage, drift: Drift, stray: str) -> None:
    assert drift(lambda: image.write(stray, b"stray")) == [
        ("files", f"/{stray}", "stray: no RECORD names it")
    ]


def test_a_record_rewritten_with_its_file_is_named(image: SmallImage, drift: Drift) -> None:
    record = f"{SITE}/alpha-1.0.dist-info/RECORD"
    file = image.path(f"{SITE}/alpha/__init__.py")

    def tamper() -> None:
        file.write_bytes(b"ONE = 2\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(b"ONE = 2\n").digest()).rstrip(b"=").decode()
        lines = image.path(record).read_text().splitlines()
        lines[0] = f"alpha/__init__.py,sha256={digest},8"
        image.write(record, "\n".join(lines))

    rewritten = "has another hash than manifest.json says: it was rewritten"
    assert drift(tamper, "--full") == [("distributions", f"/{record}", rewritten)]


@pytest.mark.parametrize("content", [b"alpha", b"beta!"])
def test_a_path_of_two_wheels_may_have_the_bytes_of_either(
    image: SmallImage, run: Run, content: bytes
) -> None:
    image.write(f"{SITE}/shared/notes.txt", content)
    assert run("--full")[0] == 0


def test_a_path_of_two_wheels_may_not_have_other_bytes(image: SmallImage, drift: Drift) -> None:
    ((check, subject, what),) = drift(lambda: image.write(f"{SITE}/shared/notes.txt", b"gamma"), "--full")
    assert (check, subject) == ("files", f"/{SITE}/shared/notes.txt")
    assert "RECORD of alpha and RECORD of beta" in what


# Distributions.


def test_a_removed_distribution_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(lambda: image.uninstall("beta"))
    assert ("distributions", "beta", "2.0 is locked, none is installed") in findings


def test_an_added_distribution_is_named_once(image: SmallImage, drift: Drift) -> None:
    findings = drift(lambda: image.wheel("gamma", "3.0", {"gamma.py": b""}, locked=False))
    assert findings == [("distributions", "gamma", "3.0 is installed, none is locked")]


def test_a_distribution_replaced_by_another_version_is_named(image: SmallImage, drift: Drift) -> None:
    files = {"beta/__init__.py": b"TWO = 3\n", "shared/notes.txt": b"beta!"}

    def tamper() -> None:
        image.uninstall("beta")
        image.wheel("beta", "2.1", files, locked=False)

    assert drift(tamper, "--full") == [("distributions", "beta", "2.0 is locked, 2.1 is installed")]


def test_two_versions_over_each_other_are_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(lambda: image.wheel("beta", "2.1", {"beta/more.py": b""}, locked=False))
    assert findings == [("distributions", "beta", "2.0 is locked, 2.0, 2.1 are installed over each other")]


def test_spelling_of_names_and_versions_does_not_matter(image: SmallImage, run: Run) -> None:
    image.wheel("Zope_Like.Name", "2024.07.04", {"zope.py": b""})
    image.distributions["Zope_Like.Name"] |= {"name": "zope-like-name", "version": "2024.7.4"}
    image.seal()
    assert run()[0] == 0


def test_a_lock_that_disagrees_with_the_manifest_is_named(image: SmallImage, drift: Drift) -> None:
    path = "usr/share/drydock/pylock.toml"
    content = image.path(path).read_text().replace('"2.0"', '"2.9"')
    findings = drift(lambda: image.write(path, content))
    assert ("distributions", "beta", "pylock.toml says 2.9, manifest.json says 2.0") in findings


@pytest.mark.parametrize(
    "version",
    [
        "1.0",
        "1!2.0.0",
        "2.0.0-beta1",
        "1.0a",
        "v1.2.3rc04",
        "1.0-1",
        "1.0.post",
        "2024.07.04",
        "1.dev3",
        "1.0+CPU_01.a",
    ],
)
def test_versions_are_normalized_as_packaging_does(version: str) -> None:
    assert normalize_version(version) == canonicalize_version(version)


# Debs and the base.


def test_a_deb_of_another_version_is_named(image: SmallImage, drift: Drift) -> None:
    def tamper() -> None:
        image.debs["libc6"]["version"] = "2.41-13"
        image.write_status()

    what = "deb 2.41-12 amd64 is locked, 2.41-13 amd64 is installed"
    assert drift(tamper) == [("debs", "libc6", what)]


def test_a_removed_and_an_added_deb_are_named(image: SmallImage, drift: Drift) -> None:
    def tamper() -> None:
        del image.debs["zlib1g"]
        image.deb("curl", "8.14")
        image.write_status()

    assert drift(tamper) == [
        ("debs", "curl", "deb 8.14 amd64 is installed, none is locked"),
        ("debs", "zlib1g", "deb 1:1.3.1-1 amd64 is locked, none is installed"),
    ]


def test_a_changed_file_of_a_deb_is_named_with_the_deb(image: SmallImage, drift: Drift) -> None:
    ((check, subject, what),) = drift(
        lambda: image.write("etc/ld.so.conf.d/zlib.conf", "#_zlib\n/lib/zlib\n"), "--full"
    )
    assert (check, subject) == ("debs", "/etc/ld.so.conf.d/zlib.conf")
    assert what.startswith("has other bytes than deb zlib1g says")


def test_a_link_of_a_deb_that_leads_elsewhere_is_named(image: SmallImage, drift: Drift) -> None:
    def tamper() -> None:
        link = image.path("usr/lib/zlib/libz.so.1")
        link.unlink()
        link.symlink_to("../x86_64-linux-gnu/libc.so.6")

    what = "is a link to ../x86_64-linux-gnu/libc.so.6, and a link to libz.so.1.3.1 by deb zlib1g"
    assert drift(tamper) == [("debs", "/usr/lib/zlib/libz.so.1", what)]


def test_a_base_record_rewritten_with_its_file_is_named(image: SmallImage, drift: Drift) -> None:
    record = "usr/share/drydock/base.RECORD"

    def tamper() -> None:
        image.write("etc/ld.so.conf.d/zlib.conf", "/lib/zlib\n")
        manifest = image.path("usr/share/drydock/manifest.json").read_bytes()
        image.seal()
        image.write("usr/share/drydock/manifest.json", manifest)

    findings = drift(tamper, "--full")
    assert findings == [("debs", f"/{record}", "has another hash than manifest.json says: it was rewritten")]


def test_a_missing_base_record_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(image.path("usr/share/drydock/base.RECORD").unlink)
    assert ("debs", "/usr/share/drydock/base.RECORD") in [finding[:2] for finding in findings]


def test_a_debian_lock_that_disagrees_with_the_manifest_is_named(image: SmallImage, drift: Drift) -> None:
    debs = [{"name": "libc6", "version": "2.41-12", "architecture": "amd64"}]
    findings = drift(lambda: image.seal(debs=debs))
    what = "debian.toml says 1:1.3.1-1 amd64, manifest.json says nothing"
    assert ("debs", "zlib1g", what) in findings


def test_a_row_may_lead_through_a_link_of_the_base(image: SmallImage, run: Run) -> None:
    image.owners["lib/zlib/libz.so.1.3.1"] = image.owners.pop("usr/lib/zlib/libz.so.1.3.1")
    image.seal()
    assert run("--full")[0] == 0


def test_a_stray_in_the_base_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(lambda: image.write("usr/bin/evil", b"#!/bin/sh\n", mode=0o755))
    assert findings == [("debs", "/usr/bin/evil", "stray: no deb and not drydock put it there")]


def test_what_a_runtime_adds_for_a_gpu_is_no_stray(
    image: SmallImage, run: Run, objects: dict[str, bytes]
) -> None:
    for name in ("libcuda.so.580.65.06", "libnvidia-ml.so.1", "libvdpau_nvidia.so"):
        image.write(f"{MULTIARCH}/{name}", objects["libnvidia-gtk3.so"])
    image.path(f"{MULTIARCH}/libGLX_indirect.so.0").symlink_to("libGLX_nvidia.so.0")
    image.write("usr/bin/nvidia-smi", b"driver's", mode=0o755)
    image.write("usr/bin/mount-target", b"")
    assert run("--full")[0] == 0


def test_mount_points_are_those_under_the_root() -> None:
    assert "proc" in mount_points(Tree(Path("/")))
    assert "proc" not in mount_points(Tree(Path("/usr")))


# Libraries.


def test_a_removed_shared_library_is_named_with_what_needs_it(image: SmallImage, drift: Drift) -> None:
    library = f"{SITE}/alpha/lib/libalpha.so.1"
    missing = "needs libalpha.so.1, which is not in the image"
    assert drift(image.path(library).unlink) == [
        ("files", f"/{library}", "missing (RECORD of alpha names it)"),
        ("libraries", f"/{SITE}/alpha/_C.so", missing),
        ("libraries", f"/{SITE}/beta/old.so", missing),
        ("libraries", f"/{SITE}/beta/preloads.so", missing),
    ]


def test_a_removed_library_of_the_base_is_named(image: SmallImage, drift: Drift) -> None:
    assert drift(image.path("usr/lib/zlib/libz.so.1.3.1").unlink) == [
        ("debs", "/usr/lib/zlib/libz.so.1.3.1", "missing (deb zlib1g names it)"),
        ("libraries", f"/{SITE}/alpha/_C.so", "needs libz.so.1, which is not in the image"),
    ]


def test_a_needed_library_that_no_lock_brings_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(lambda: image.seal(**{"absent-libraries": {}, "driver-libraries": []}))
    assert findings == [
        ("libraries", f"/{SITE}/alpha/_C.so", "needs libavcodec.so.61, which is not in the image"),
        ("libraries", f"/{SITE}/alpha/_C.so", "needs libcuda.so.1, which is not in the image"),
    ]


def test_ld_library_path_of_the_image_counts(image: SmallImage, run: Run, objects: dict[str, bytes]) -> None:
    image.write("opt/codecs/libavcodec.so.61", objects["libavcodec.so.61"], "drydock")
    image.seal(**{"absent-libraries": {}, "environment": {"LD_LIBRARY_PATH": "/nowhere:/opt/codecs"}})
    assert run()[0] == 0


def test_an_object_for_another_machine_is_named(image: SmallImage, drift: Drift) -> None:
    changed = f"{SITE}/beta/preloads.so"
    content = for_machine(image.path(changed).read_bytes(), "aarch64")
    findings = drift(lambda: image.write(changed, content))
    assert findings == [("libraries", f"/{changed}", "is an ELF object for aarch64, the image is x86_64")]


def test_a_library_for_another_machine_does_not_count_as_found(image: SmallImage, drift: Drift) -> None:
    changed = f"{MULTIARCH}/libc.so.6"
    content = for_machine(image.path(changed).read_bytes(), "aarch64")
    findings = drift(lambda: image.write(changed, content))
    assert ("libraries", f"/{SITE}/alpha/_C.so", "needs libc.so.6, which is not in the image") in findings


def test_a_declared_object_for_another_machine_passes(
    image: SmallImage, run: Run, objects: dict[str, bytes]
) -> None:
    image.wheel("gamma", "3.0", {"gamma/arm/x.so": for_machine(objects["preloads.so"], "aarch64")})
    image.seal(**{"foreign-objects": {f"{SITE}/gamma/arm/*.so": "gamma ships every machine's"}})
    status, document = run()
    assert (status, [check["unused"] for check in document["checks"]]) == (0, [[]] * 6)


def test_a_broken_object_is_named(image: SmallImage, drift: Drift) -> None:
    changed = f"{SITE}/beta/preloads.so"
    findings = drift(lambda: os.truncate(image.path(changed), 80))
    assert [finding[:2] for finding in findings] == [("files", f"/{changed}"), ("libraries", f"/{changed}")]
    assert findings[1][2] == "is a broken ELF object: the file ends before the end of its program headers"


def test_elf_is_read_as_pyelftools_reads_it() -> None:
    paths = [path for path in sorted(Path("/usr/lib").glob("*-linux-gnu/lib*.so.*"))[:60] if path.is_file()]
    assert paths
    for path in paths:
        with path.open("rb") as file:
            section: Any = ELFFile(file).get_section_by_name(".dynamic")
            tags = list(section.iter_tags())
        elf = read_elf(path)
        assert elf is not None
        assert elf.needed == tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED")
        assert elf.soname == next((tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"), None)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "object"


@given(data=st.data())
def test_a_damaged_object_is_malformed_and_never_worse(
    objects: dict[str, bytes], scratch: Path, data: st.DataObject
) -> None:
    content = bytearray(objects["_C.so"])
    dynamic = content.find(b"\x01\0\0\0\0\0\0\0", 0x200)
    for position in data.draw(
        st.lists(st.integers(0, 0x200) | st.integers(dynamic, dynamic + 0x200), max_size=6)
    ):
        content[position % len(content)] = data.draw(st.integers(0, 255))
    scratch.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(MalformedElf):
        elf = read_elf(scratch)
        assert elf is None or 0 <= elf.machine < 1 << 16


# Python.


def test_the_interpreter_is_compared_to_the_patch(image: SmallImage) -> None:
    opened = open_image(image.root)
    right = Interpreter(version="3.13.5", implementation="CPython", machine="x86_64", prefix="/opt/venv")
    assert not check_python(opened, right).findings
    wrong = Interpreter(version="3.13.6", implementation="PyPy", machine="aarch64", prefix="/usr")
    assert [(finding.subject, finding.what) for finding in check_python(opened, wrong).findings] == [
        ("Python's version", "3.13.5 is locked, 3.13.6 is running"),
        ("Python's implementation", "CPython is locked, PyPy is running"),
        ("Python's machine", "x86_64 is locked, aarch64 is running"),
        ("Python's prefix", "/opt/venv is locked, /usr is running"),
    ]


def test_a_tree_without_its_interpreter_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(image.path("usr/bin/python3.13").unlink)
    assert ("python", "/opt/venv/bin/python", "leads to no interpreter in the image") in findings


def test_a_manifest_for_another_python_than_the_deb_is_named(image: SmallImage, drift: Drift) -> None:
    findings = drift(lambda: image.seal(python="3.13.6"))
    assert findings == [("python", "python3.13-minimal", "Python 3.13.6 is locked, the deb is 3.13.5-2")]


# The accelerator.

HOPPER = Device("NVIDIA H100", (9, 0))
CUDA = Accelerator(kind="cuda", minimum_driver="580.65.06", sm=("90",))


def test_a_device_that_everything_covers_passes() -> None:
    assert not list(compare_devices(CUDA, "580.65.06", [HOPPER], ["sm_80", "sm_90"]))
    assert not list(compare_devices(CUDA, "1000.0", [HOPPER], None))


@pytest.mark.parametrize(
    ("driver", "device", "architectures", "subject", "what"),
    [
        ("580.9.99", HOPPER, ["sm_90"], "driver", "580.9.99 is older than the image's minimum 580.65.06"),
        (
            "590.1",
            Device("NVIDIA A100", (8, 0)),
            ["sm_80"],
            "NVIDIA A100",
            "has compute capability 8.0, the image declares sm 90",
        ),
        (
            "590.1",
            HOPPER,
            ["sm_80", "compute_80"],
            "NVIDIA H100",
            "has compute capability 9.0, torch is compiled for sm_80 compute_80",
        ),
    ],
)
def test_a_device_that_something_does_not_cover_is_named(
    driver: str, device: Device, architectures: list[str], subject: str, what: str
) -> None:
    findings = list(compare_devices(CUDA, driver, [device, device], architectures))
    assert findings == [Finding(subject=subject, what=what)]


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_100", (10, 3), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_120", (12, 0), True),
        ("sm_100", (12, 0), False),
    ],
)
def test_kernels_run_within_their_major_version(
    architecture: str, capability: tuple[int, int], runs: bool
) -> None:
    declared = Accelerator(kind="cuda", minimum_driver=None, sm=(f"{capability[0]}{capability[1]}",))
    findings = compare_devices(declared, "580", [Device("GPU", capability)], [architecture])
    assert (not list(findings)) is runs


def test_without_a_device_the_accelerator_is_not_run_and_never_passed(
    image: SmallImage, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.seal(accelerator={"kind": "cuda", "minimum-driver": "580.65.06", "sm": ["90"]})
    accelerator = run()[1]["checks"][-1]
    assert (accelerator["state"], accelerator["detail"]) == ("not-run", "this tree is not running")

    def no_driver() -> tuple[str, list[Device]]:
        raise NvmlError("libnvidia-ml.so.1 does not load")

    monkeypatch.setattr("drydock.verify.accelerator.read_nvml", no_driver)
    manifest = read_manifest(Tree(image.root))
    if not Path("/dev/nvidiactl").exists():
        outcome = check_accelerator(manifest, live=True)
        assert (outcome.state, outcome.detail) == ("not-run", "no device: libnvidia-ml.so.1 does not load")
    monkeypatch.setattr("drydock.verify.accelerator.read_nvml", lambda: ("590.1", [HOPPER]))
    outcome = check_accelerator(manifest, live=True)
    assert (outcome.state, outcome.checked, outcome.detail) == (None, 1, "driver 590.1, 1 x NVIDIA H100")


def over_cann(image: SmallImage, **installed: str) -> None:
    """Make it an image over a vendor's, for NPUs, with what is not in its manifest in the definition beside it."""
    site = "usr/local/python3.13.5/lib/python3.13/site-packages"
    for name, version in {"torch": "2.10.0+cpu", "torch-npu": "2.10.0.post4", **installed}.items():
        folder = f"{site}/{name.replace('-', '_')}-{version}.dist-info"
        image.write(f"{folder}/METADATA", f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    image.write("usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info", "version=9.1.0\n")
    definition = {
        "accelerator": {"kind": "npu", "minimum-driver": "26.0.RC1", "soc": ["910B*"], "cann": "9.1.0"},
        "base": {"variants": {"a3": {"soc": ["Ascend910"]}}},
        "engine": {"small": {"absent-distributions": {"mindspeed": "no index has a wheel of it"}}},
    }
    image.write("usr/share/drydock/image.toml", tomli_w.dumps(definition), "drydock")
    image.seal(
        image="ascend-small-a3",
        accelerator={"kind": "npu", "minimum-driver": "26.0.RC1", "sm": []},
        environment={"PATH": "/opt/venv/bin:/usr/bin", "ASCEND_HOME_PATH": "/usr/local/Ascend/cann"},
        base={
            "repository": "vendor/release", "version": "v1", "site-packages": [f"/{site}"],
            "provides": {"torch": "2.10.0+cpu", "torch-npu": "2.10.0.post4"},
        },
    )  # fmt: skip


def test_an_image_for_npus_has_its_stack_compared_and_says_what_it_lacks(
    image: SmallImage, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    over_cann(image)
    assert read_manifest(Tree(image.root)).accelerator.soc == ("Ascend910",), "the variant's own"
    status, document = run()
    checks = {check["name"]: check for check in document["checks"]}
    states = {name: checks[name]["state"] for name in ("accelerator", "cann", "base", "absent")}
    assert states == {"accelerator": "not-run", "cann": "ok", "base": "ok", "absent": "as-declared"}
    assert (status, found(document)) == (0, [])
    assert verify.main(["--root", str(image.root)]) == 0
    assert "mindspeed is missing, as declared: no index has a wheel of it" in capsys.readouterr().out


def test_an_image_for_npus_that_is_not_what_it_says_is_named(image: SmallImage, drift: Drift) -> None:
    over_cann(image)

    def tamper() -> None:
        over_cann(image, mindspeed="0.16")
        image.write("usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info", "version=9.2.0\n")

    assert drift(tamper) == [
        ("cann", "CANN", "9.1.0 is declared, 9.2.0 is in /usr/local/Ascend/cann/x86_64-linux"),
        (
            "absent",
            "mindspeed",
            "0.16 is installed, and declared as missing: take it out of absent-distributions",
        ),
    ]


def test_an_image_for_npus_without_its_definition_is_not_verified_without_it(
    image: SmallImage, capsys: pytest.CaptureFixture[str]
) -> None:
    over_cann(image)
    image.path("usr/share/drydock/image.toml").unlink()
    assert verify.main(["--root", str(image.root)]) == 2
    assert capsys.readouterr().err == (
        "/usr/share/drydock/image.toml cannot be read, which says what NPUs it is made for: build the image again\n"
    )


# The command.


def test_what_is_no_image_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--root", str(tmp_path)]) == 2
    line = "/usr/share/drydock/manifest.json is missing; run `drydock verify IMAGE`"
    assert capsys.readouterr().err == f"this is not a drydock image: {line}\n"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "image": "x"}'])
def test_a_manifest_that_cannot_be_read_is_one_line_and_exit_2(
    image: SmallImage, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    image.write("usr/share/drydock/manifest.json", content)
    assert verify.main(["--root", str(image.root)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("/usr/share/drydock/manifest.json ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["pylock.toml", "debian.toml"])
@pytest.mark.parametrize("content", ["=", "packages = 3", "[[packages]]\nname = 'x'"])
def test_a_lock_that_cannot_be_read_is_named(
    image: SmallImage, drift: Drift, name: str, content: str
) -> None:
    path = f"usr/share/drydock/{name}"
    findings = drift(lambda: image.write(path, content))
    assert any(subject == f"/{path}" and what.startswith("cannot be read") for _, subject, what in findings)


def test_people_get_a_table_the_findings_and_a_verdict(
    image: SmallImage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--root", str(image.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "state", "checked", "seconds"]
    assert lines[-1].startswith(
        "ok: cpu-small is what it was locked to be (sizes and presence; --full compares"
    )
    for number in range(60):
        image.write(f"{SITE}/stray{number:02}\n.py", b"")
    assert verify.main(["--root", str(image.root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if "stray: no RECORD names it" in line]
    assert len(named) == 50
    assert named[0].startswith(f"files: /{SITE}/stray00\\n.py: ")
    assert lines[-2] == "... and 10 more"
    assert lines[-1].startswith("drift: cpu-small differs from its lock in 60 places, ")


def test_links_of_a_tree_do_not_lead_out_of_it(image: SmallImage, drift: Drift) -> None:
    """An absolute link is followed inside the tree: a host's library must not stand in for the image's."""
    outside = image.root.parent / "libc.so.6"

    def tamper() -> None:
        path = image.path(f"{MULTIARCH}/libc.so.6")
        path.rename(outside)
        path.symlink_to(outside)

    findings = drift(tamper)
    assert ("libraries", f"/{SITE}/alpha/_C.so", "needs libc.so.6, which is not in the image") in findings


def test_the_verifier_imports_nothing_but_the_standard_library() -> None:
    """-S leaves site-packages out, as in an image that has none of drydock's dependencies."""
    command = [sys.executable, "-S", "-m", "drydock.verify", "--help"]
    run = subprocess.run(
        command, env={"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")

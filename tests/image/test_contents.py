"""What is in a built image, checked with other tools than the ones that made it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import ssl
import stat
import subprocess
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import Made
from elftools.elf.elffile import ELFFile
from mini_image import NATIVE, PACKAGES, PURE, SITE, Project, drydock, layer_tar, pycs, unpacked

from drydock import oci
from drydock.definition import Architecture

EPOCH = 315532800
ELF_MACHINES = {"amd64": "EM_X86_64", "arm64": "EM_AARCH64"}


def layers(made: Made) -> list[tuple[str, tarfile.TarFile]]:
    return [(layer.title, layer_tar(made.store, layer.digest)) for layer in made.built.layers]


def test_every_record_is_true_and_complete(tree: Path) -> None:
    records = sorted((tree / SITE).glob("*.dist-info/RECORD"))
    named: set[str] = set()
    for record in records:
        for path, digest, size in csv.reader(record.read_text().splitlines()):
            file = Path(os.path.normpath(tree / SITE / path))
            named.add(str(file.relative_to(tree)))
            if file == record:
                assert (digest, size) == ("", "")
                continue
            data = file.read_bytes()
            found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={found}", str(len(data))), file
    assert len(records) == len(PACKAGES)
    there = {
        str(Path(folder, name).relative_to(tree))
        for folder, _, names in os.walk(tree / "opt/venv")
        for name in names
    }
    made_by_drydock = {
        "opt/venv/pyvenv.cfg",
        *(f"opt/venv/bin/{name}" for name in ("python", "python3", "python3.13")),
    }
    # os.walk counts lib64, a link to a folder, as a folder.
    assert there - named == made_by_drydock


def test_what_is_installed_is_what_is_locked(tree: Path, project: Project) -> None:
    lock = tomllib.loads(project.image("tiny-mini").pylock_path.read_text())
    found = {}
    for metadata in (tree / SITE).glob("*.dist-info/METADATA"):
        header = metadata.read_text().split("\n\n")[0].splitlines()
        fields = dict(line.split(": ", 1) for line in header if ": " in line)
        found[fields["Name"].lower()] = fields["Version"]
        assert (metadata.parent / "INSTALLER").read_text() == "drydock\n"
    assert found == {package["name"]: package["version"] for package in lock["packages"]}


def test_scripts_start_the_image_s_python(tree: Path) -> None:
    scripts = {path.name: path for path in (tree / "opt/venv/bin").iterdir() if not path.is_symlink()}
    assert {"distro", "f2py", "jp.py", "ninja", "pygrun"} <= scripts.keys()
    for name, path in scripts.items():
        mode = path.stat().st_mode
        assert stat.S_IMODE(mode) == 0o755, name
        first = path.read_bytes().split(b"\n")[0]
        if name == "ninja":
            assert first.startswith(b"\x7fELF")
        else:
            assert first == b"#!/opt/venv/bin/python", name
    assert str((tree / "opt/venv/bin/python").readlink()) == "/usr/bin/python3.13"
    assert (tree / "usr/bin/python3.13").is_file()


def test_every_member_of_every_layer_is_fixed_and_in_order(tiny: Made, tree: Path) -> None:
    users = {int(line.split(":")[2]) for line in (tree / "etc/passwd").read_text().splitlines()}
    groups = {int(line.split(":")[2]) for line in (tree / "etc/group").read_text().splitlines()}
    count = 0
    for title, tar in layers(tiny):
        seen: set[str] = set()
        folders = {""}
        for member in tar:
            count += 1
            where = f"{title}: {member.name}"
            assert member.mtime == EPOCH, where
            assert (member.uname, member.gname) == ("", ""), where
            assert member.uid in users, where
            assert member.gid in groups, where
            assert member.isreg() or member.isdir() or member.issym() or member.islnk(), where
            assert not member.name.startswith(("/", "./")), where
            assert ".." not in member.name.split("/"), where
            assert member.name.rpartition("/")[0] in folders, f"{where} comes before its folder"
            assert member.name not in seen, f"{where} is there twice"
            seen.add(member.name)
            if member.isdir():
                folders.add(member.name)
                assert not member.mode & 0o002 or member.mode & 0o1000, where
            elif member.isreg():
                assert not member.mode & 0o022, where
            elif member.islnk():
                assert member.linkname in seen, where
    assert count > 15_000


def test_no_layer_hides_what_another_one_brings(tiny: Made) -> None:
    """A path in two layers is a folder in both, with the same owner and mode.

    The exceptions are two empty folders of base-files, which its maintainer script makes links.
    """
    first: dict[str, tuple[str, bytes, int, int, int]] = {}
    for title, tar in layers(tiny):
        for member in tar:
            here = (title, member.type, member.mode, member.uid, member.gid)
            before = first.setdefault(member.name, here)
            if member.name in ("var/run", "var/lock"):
                continue
            if before[0] != title:
                assert member.isdir(), f"{member.name} is in {before[0]!r} and in {title!r}"
                assert before[1:] == here[1:], f"{member.name} differs in {before[0]!r} and in {title!r}"


def test_dpkg_accepts_its_database(tree: Path, project: Project, architecture: Architecture) -> None:
    if not shutil.which("dpkg-query"):
        pytest.skip("needs dpkg on this machine")
    lock = tomllib.loads((project.root / f"lock/debian-13-{architecture}.toml").read_text())
    said = subprocess.run(
        [
            *("dpkg-query", f"--admindir={tree}/var/lib/dpkg", "--show"),
            "--showformat=${db:Status-Abbrev}|${Package}|${Version}|${Architecture}\n",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stderr == ""
    locked = sorted(
        f"ii |{entry['name']}|{entry['version']}|{entry['architecture']}" for entry in lock["packages"]
    )
    assert sorted(said.stdout.splitlines()) == locked
    listed = subprocess.run(
        ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "--search", "/usr/bin/gcc"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.startswith("gcc: ")


def test_every_md5sum_of_the_debs_is_true(tree: Path) -> None:
    """What `dpkg --verify` does, without chroot: every file that a deb lists a sum of has it."""
    checked = 0
    for sums in sorted((tree / "var/lib/dpkg/info").glob("*.md5sums")):
        for line in sums.read_text().splitlines():
            digest, path = line.split(None, 1)
            found = hashlib.md5((tree / path).read_bytes(), usedforsecurity=False).hexdigest()
            assert found == digest, f"{sums.name}: {path}"
            checked += 1
    assert checked > 5_000


def test_dpkg_verify_is_silent(tree: Path) -> None:
    if not shutil.which("dpkg"):
        pytest.skip("needs dpkg on this machine")
    said = subprocess.run(["dpkg", f"--root={tree}", "--verify"], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_accounts(tree: Path) -> None:
    accounts = [line.split(":") for line in (tree / "etc/passwd").read_text().splitlines()]
    by_name = {fields[0]: fields for fields in accounts}
    assert all(len(fields) == 7 and fields[1] == "x" for fields in accounts)
    assert by_name["root"][2:4] == ["0", "0"]
    assert by_name["drydock"][2:] == ["1000", "1000", "drydock", "/home/drydock", "/bin/bash"]
    assert "drydock:x:1000:" in (tree / "etc/group").read_text().splitlines()
    shadow = [line.split(":") for line in (tree / "etc/shadow").read_text().splitlines()]
    assert [fields[0] for fields in shadow] == [fields[0] for fields in accounts]
    assert {fields[1] for fields in shadow} == {"!"}
    assert stat.S_IMODE((tree / "etc/shadow").stat().st_mode) == 0o640
    assert stat.S_IMODE((tree / "home/drydock").stat().st_mode) == 0o700
    if os.geteuid() == 0:
        assert (tree / "home/drydock").stat().st_uid == 1000


def test_ca_bundle_parses(tree: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(tree / "etc/ssl/certs/ca-certificates.crt"))
    certificates = context.cert_store_stats()["x509_ca"]
    assert certificates > 100
    assert certificates == len(list((tree / "usr/share/ca-certificates").rglob("*.crt")))
    assert (tree / "etc/ssl/cert.pem").samefile(tree / "etc/ssl/certs/ca-certificates.crt")


def test_folders_and_links(tree: Path) -> None:
    for name in ("tmp", "var/tmp"):
        assert stat.S_IMODE((tree / name).stat().st_mode) == 0o1777, name
    for name in ("bin", "lib", "sbin"):
        assert str((tree / name).readlink()) == f"usr/{name}"
    assert str((tree / "var/run").readlink()) == "/run"
    for name, target in {"cc": "/usr/bin/gcc", "awk": "/usr/bin/mawk"}.items():
        assert str((tree / "usr/bin" / name).readlink()) == f"/etc/alternatives/{name}"
        assert str((tree / "etc/alternatives" / name).readlink()) == target
        assert (tree / target[1:]).exists()
    configuration = dict(
        line.split(" = ") for line in (tree / "opt/venv/pyvenv.cfg").read_text().splitlines()
    )
    assert configuration.keys() == {"home", "include-system-site-packages", "version"}
    assert (configuration["home"], configuration["include-system-site-packages"]) == ("/usr/bin", "false")
    assert configuration["version"].startswith("3.13.")


def test_every_python_file_has_bytecode_that_is_never_checked(tree: Path) -> None:
    """Flags word 1: hash-based, unchecked (PEP 552); the source's hash is in it all the same."""
    sources = [*(tree / SITE).rglob("*.py"), *(tree / "usr/lib/python3.13").rglob("*.py")]
    sources = [path for path in sources if not path.is_symlink() or path.name == "sitecustomize.py"]
    assert len(sources) > 1_400
    for source in sources:
        header = (source.parent / "__pycache__" / f"{source.stem}.cpython-313.pyc").read_bytes()[:16]
        assert header[2:4] == b"\r\n", source
        assert int.from_bytes(header[4:8], "little") == 0b01, source


def test_the_image_carries_what_it_was_made_of(tree: Path, project: Project) -> None:
    share = tree / "usr/share/drydock"
    image = project.image("tiny-mini")
    assert (share / "pylock.toml").read_bytes() == image.pylock_path.read_bytes()
    theirs = tomllib.loads((share / "image.toml").read_text())
    assert theirs == tomllib.loads(image.definition_path.read_text())
    assert json.loads((share / "manifest.json").read_text())["image"] == "tiny-mini"


# OCI.


def check_layout(folder: Path) -> dict[str, Any]:
    """Follow every descriptor of a layout (image-spec, image-layout.md) and return the image's config."""
    assert json.loads((folder / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    blobs = {path.name for path in (folder / "blobs/sha256").iterdir()}
    used = set()

    def blob(descriptor: dict[str, Any]) -> bytes:
        algorithm, _, digest = descriptor["digest"].partition(":")
        data = (folder / "blobs" / algorithm / digest).read_bytes()
        assert len(data) == descriptor["size"], descriptor
        assert hashlib.sha256(data).hexdigest() == digest, descriptor
        used.add(digest)
        return data

    (entry,) = json.loads((folder / "index.json").read_text())["manifests"]
    manifest = json.loads(blob(entry))
    assert manifest["mediaType"] == entry["mediaType"]
    config: dict[str, Any] = json.loads(blob(manifest["config"]))
    assert (config["os"], config["architecture"]) == (
        entry["platform"]["os"],
        entry["platform"]["architecture"],
    )
    for descriptor in manifest["layers"]:
        assert descriptor["mediaType"] == "application/vnd.oci.image.layer.v1.tar+zstd"
        blob(descriptor)
    assert used == blobs
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == len(config["history"])
    return config


def test_layout_is_valid(tiny: Made, project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "layout"
    for _ in range(2):  # the second time into a layout that is there
        said = drydock(project, tiny.store, "build", "tiny-mini", "--json", "--output", str(folder))
        assert said.document["digest"] == f"sha256:{tiny.built.digest}"
        config = check_layout(folder)
    environment = dict(entry.split("=", 1) for entry in config["config"]["Env"])
    assert environment["MINI"] == "1"
    assert environment["PATH"].startswith("/opt/venv/bin:")
    assert config["config"]["Labels"]["dev.drydock.image"] == "tiny-mini"
    for layer, diff_id in zip(tiny.built.layers, config["rootfs"]["diff_ids"], strict=True):
        tar = layer_tar(tiny.store, layer.digest).fileobj
        assert tar
        tar.seek(0)
        assert diff_id == f"sha256:{hashlib.sha256(tar.read()).hexdigest()}"


def test_archive_is_the_same_bytes_twice(tiny: Made, project: Project, tmp_path: Path) -> None:
    archives = [tmp_path / "one.tar", tmp_path / "two.tar"]
    with archives[0].open("wb") as file:
        oci.write_archive(tiny.store, tiny.built, file)
    assert drydock(project, tiny.store, "build", "tiny-mini", "--output", str(archives[1])).status == 0
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in archives}
    assert len(digests) == 1
    with tarfile.open(archives[0]) as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    check_layout(tmp_path / "layout")


def test_skopeo_reads_the_layout(tiny: Made, tmp_path: Path) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("needs skopeo on this machine")
    oci.write_layout(tiny.store, tiny.built, tmp_path / "layout")
    said = subprocess.run(
        ["skopeo", "inspect", f"oci:{tmp_path / 'layout'}"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["Digest"] == f"sha256:{tiny.built.digest}"
    assert found["Layers"] == [f"sha256:{layer.digest}" for layer in tiny.built.layers]


# The other architecture.


def elf_machines(tree: Path) -> dict[str, str]:
    found = {}
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    found[str(path.relative_to(tree))] = ELFFile(file)["e_machine"]
    return found


def test_both_images_hold_their_own_architecture_only(
    tree: Path,
    far: Made,
    tmp_path: Path,
    architecture: Architecture,
    other_architecture: Architecture,
) -> None:
    for root, expected in (
        (tree, architecture),
        (unpacked(far.store, far.built, tmp_path / "far"), other_architecture),
    ):
        machines = elf_machines(root)
        assert len(machines) > 500
        assert any("numpy" in path for path in machines)
        wrong = {path: machine for path, machine in machines.items() if machine != ELF_MACHINES[expected]}
        assert wrong == {}
    assert far.built.architecture == other_architecture


def test_bytecode_does_not_depend_on_the_architecture(tiny: Made, far: Made) -> None:
    here, there = dict(pycs(tiny.store, tiny.built)), dict(pycs(far.store, far.built))
    both = here.keys() & there.keys()
    assert len(both) > 1_000
    # numpy's own record of how each of its wheels was compiled.
    assert {path for path in both if here[path] != there[path]} == {
        f"{SITE}/numpy/__pycache__/__config__.cpython-313.pyc"
    }


def test_pure_layers_are_shared_by_both_architectures(tiny: Made, far: Made) -> None:
    """Same wheels, same bytecode: the same blob, whichever machine's interpreter compiled it."""
    pure = {
        layer.digest
        for layer in tiny.built.layers
        if layer.contents and all(text.split()[0] in PURE for text in layer.contents)
    }
    assert pure
    assert pure <= {layer.digest for layer in far.built.layers}
    native = [
        layer for layer in tiny.built.layers if any(text.split()[0] in NATIVE for text in layer.contents)
    ]
    assert not {layer.digest for layer in native} & {layer.digest for layer in far.built.layers}

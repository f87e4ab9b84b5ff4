"""What wheels and debs say of their licences and requirements is what is read, and nothing is made up."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from project import make_project

from drydock.declared import Deb, licences_of, metadata_of, read_debs, requirements_of
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.locks import Artifact
from drydock.store import Store

FORMAT = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
COPYRIGHT = f"""{FORMAT}
Files: *
Copyright: someone
License: GPL-2+
 the text

Files: debian/*
Copyright: someone
License: Expat or GPL-2+
"""


def wheel(tmp_path: Path, metadata: str) -> Path:
    path = tmp_path / "blob"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/METADATA", "License: wrong\n")
        archive.writestr("box-1.dist-info/METADATA", f"Metadata-Version: 2.4\nName: box\n{metadata}")
    return path


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("License-Expression: MIT OR Apache-2.0\nLicense: BSD\n", ["MIT OR Apache-2.0"]),
        ("License: BSD\nClassifier: License :: OSI Approved :: MIT License\n", ["BSD"]),
        ("License: UNKNOWN\nClassifier: License :: Public Domain\n", ["License :: Public Domain"]),
        ("License: first\n        second\n", ["first\n        second"]),
        ("Classifier: License :: OSI Approved\nClassifier: Topic :: Software Development\n", []),
        ("License: \n", []),
        ("License-File: LICENSE\n\nLicense: in the description\n", []),
    ],
)
def test_a_wheel_s_licence_is_the_first_that_it_declares(
    tmp_path: Path, metadata: str, said: list[str]
) -> None:
    assert licences_of(metadata_of(wheel(tmp_path, metadata))) == said


def test_a_wheel_requires_what_its_markers_say_in_the_image(tmp_path: Path) -> None:
    image = Image.named(make_project(tmp_path, '["alpha==1.0"]'), "box-mini")
    metadata = metadata_of(
        wheel(
            tmp_path,
            "Requires-Dist: always\n"
            "Requires-Dist: old; python_version < '3.13'\n"
            "Requires-Dist: arm; platform_machine == 'aarch64'\n"
            "Requires-Dist: more; extra == 'more' and sys_platform == 'linux'\n",
        )
    )
    assert [each.name for each in requirements_of(metadata, image)] == ["always"]
    assert [each.name for each in requirements_of(metadata, image, ["more"])] == ["always", "more"]


def tar(files: Mapping[str, str], links: Mapping[str, str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for path, text in files.items():
            info = tarfile.TarInfo(f"./{path}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        for path, target in links.items():
            info = tarfile.TarInfo(f"./{path}")
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return data.getvalue()


def deb(store: Store, name: str, control: str = "", *, text: str = "", link: str = "") -> Artifact:
    """A package in the store with a copyright file, or a link in place of its folder of documents."""
    folder = f"usr/share/doc/{name}"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar": tar({"control": f"Package: {name}\nVersion: 1\n{control}"}, {}),
        "data.tar": tar({f"{folder}/copyright": text} if text else {}, {folder: link} if link else {}),
    }
    data = b"!<arch>\n"
    for member, content in members.items():
        data += f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        data += content + b"\n" * (len(content) % 2)
    digest = store.put(data)
    return Artifact(
        kind="deb", name=name, version="1", filename=f"{name}_1_all.deb", sha256=digest, size=len(data)
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def read(store: Store, *debs: Artifact) -> dict[str, Deb]:
    found = read_debs(store, debs)
    assert read_debs(store, debs) == found, "what was kept is what was read"
    return found


def test_a_machine_readable_copyright_names_its_licences(store: Store) -> None:
    found = read(
        store,
        deb(store, "named", text=COPYRIGHT),
        deb(store, "prose", text="This is free software: License: GPL-2+\n"),
        deb(store, "broken", text=f"{FORMAT}\nFiles *\n\n: what\nLicense\n"),
        deb(store, "none"),
    )
    assert {name: each.licences for name, each in found.items()} == {
        "named": ["Expat or GPL-2+", "GPL-2+"], "prose": [], "broken": [], "none": [],
    }  # fmt: skip


def test_a_folder_of_documents_that_is_another_package_s_has_its_licence(store: Store) -> None:
    found = read(
        store,
        deb(store, "base", text=COPYRIGHT),
        deb(store, "direct", link="base"),
        deb(store, "twice", link="direct"),
        deb(store, "gone", link="elsewhere"),
        deb(store, "round", link="about"),
        deb(store, "about", link="round"),
    )
    same = {name for name, each in found.items() if each.licences == found["base"].licences}
    assert same == {"base", "direct", "twice"}
    assert not any(found[name].licences for name in ("gone", "round", "about"))


def test_a_deb_s_relations(store: Store) -> None:
    control = "Depends: libc6 (>= 2.4), one | two:any\nPre-Depends: first\nProvides: virtual (= 1)\n"
    (found,) = read(store, deb(store, "box", control)).values()
    assert found.requires == [["first"], ["libc6"], ["one", "two"]]
    assert found.provides == ["virtual"]


def test_a_deb_that_is_not_the_locked_bytes_is_refused(store: Store) -> None:
    box = deb(store, "box", text=COPYRIGHT)
    path = store.path(box.sha256)
    path.write_bytes(path.read_bytes().replace(b"Expat", b"Other"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() != box.sha256
    with pytest.raises(DrydockError, match="was corrupt"):
        read_debs(store, [box])

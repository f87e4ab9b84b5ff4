"""What artifacts say about themselves: their licences, and what they require. Nothing is guessed.

A wheel says it in its METADATA, a deb in its control file and, where that is machine-readable (DEP-5), its copyright.
"""

from __future__ import annotations

import logging
import posixpath
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from debian.copyright import Copyright
from debian.copyright import Error as CopyrightError
from debian.deb822 import PkgRelation
from debian.debfile import DebFile
from packaging.requirements import Requirement

from drydock.debs import open_deb
from drydock.definition import Image
from drydock.locks import Artifact, marker_environment, sha256_json
from drydock.store import Store, sha256_file

DOCUMENTATION = "usr/share/doc/"
CLASSIFIER = "License :: "
VAGUE = "License :: OSI Approved"
"""A classifier that names no licence."""

# It says of a file what it put right in reading it, which is none of our user's business.
logging.getLogger("debian.copyright").setLevel(logging.ERROR)


def metadata_of(wheel: Path) -> Message:
    """The METADATA of a wheel, which is not unpacked for it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return HeaderParser().parsestr(archive.read(name).decode("utf-8", "replace"))


def requirements_of(metadata: Message, image: Image, extras: Iterable[str] = ()) -> list[Requirement]:
    """What a wheel requires in an image, of its own and of some of its extras."""
    environment = marker_environment(image)
    found = []
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        chosen = [{**environment, "extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(requirement.marker.evaluate(each) for each in chosen):
            found.append(requirement)
    return found


def licences_of(metadata: Message) -> list[str]:
    """What a wheel's METADATA says of its licence, by the first that says something: the expression (PEP 639), the
    free text, the classifiers."""
    for key in ("License-Expression", "License"):
        text = (metadata[key] or "").strip()
        if text and text.upper() not in ("UNKNOWN", "NONE"):
            return [text]
    classifiers = [str(each).strip() for each in metadata.get_all("Classifier") or []]
    return sorted({each for each in classifiers if each.startswith(CLASSIFIER) and each != VAGUE})


class Deb(NamedTuple):
    """What a deb says. `licences` are DEP-5 short names; they are `elsewhere`, in another package, where its folder of
    documents is that one's. Each of `requires` is a list of alternatives; all are names of packages."""

    licences: list[str]
    elsewhere: str
    requires: list[list[str]]
    provides: list[str]


def read_debs(store: Store, debs: Sequence[Artifact]) -> dict[str, Deb]:
    """Name -> what each of the debs, which are in the store, says; with the licences that are another's.

    Raises:
        DrydockError: one is not in the store, or not the locked bytes.
    """
    # What takes its time is xz, which other threads need not wait for.
    with ThreadPoolExecutor() as pool:
        found = dict(
            zip((deb.name for deb in debs), pool.map(lambda deb: _deb(store, deb), debs), strict=True)
        )
    return {name: deb._replace(licences=_followed(found, name)) for name, deb in found.items()}


def _followed(debs: Mapping[str, Deb], name: str) -> list[str]:
    seen: set[str] = set()
    while name in debs and name not in seen:
        seen.add(name)
        if not debs[name].elsewhere:
            return debs[name].licences
        name = debs[name].elsewhere
    return []


def _deb(store: Store, artifact: Artifact) -> Deb:
    """What a deb says, read once: some take a second to unpack as far as their copyright."""
    key = sha256_json([sha256_file(Path(__file__)), version("python-debian"), artifact.sha256])
    if record := store.read_record("declared", key):
        return Deb(**record)
    with open_deb(store, artifact) as deb:
        control = deb.debcontrol()
        requires = [*_relations(control, "Pre-Depends"), *_relations(control, "Depends")]
        provides = [name for names in _relations(control, "Provides") for name in names]
        read = Deb(*_copyright(deb, artifact.name), requires, provides)
    store.write_record("declared", key, read._asdict())
    return read


def _relations(control: Mapping[str, str], field: str) -> list[list[str]]:
    if not control.get(field):
        return []
    return [[each["name"] for each in names] for names in PkgRelation.parse_relations(control[field])]


def _copyright(deb: DebFile, name: str) -> tuple[list[str], str]:
    """The licences that a deb's copyright file names, and the package that has the file if this is a link to it."""
    folder = f"{DOCUMENTATION}{name}"
    with deb.data.tgz() as tar:
        for member in tar:
            path = posixpath.normpath(member.name.lstrip("/")).removeprefix("./")
            if path not in (folder, f"{folder}/copyright"):
                continue
            if member.issym():
                target = posixpath.normpath(posixpath.join("/", posixpath.dirname(path), member.linkname))
                return [], target.removeprefix(f"/{DOCUMENTATION}").partition("/")[0]
            if member.isreg():
                file = tar.extractfile(member)
                assert file
                return _short_names(file.read().decode("utf-8", "replace")), ""
    return [], ""


def _short_names(text: str) -> list[str]:
    try:
        document = Copyright(text.splitlines(keepends=True), strict=False)
        licences: list[Any] = [paragraph.license for paragraph in document.all_files_paragraphs()]
    except (CopyrightError, ValueError):
        return []
    return sorted({each.synopsis.strip() for each in licences if each and each.synopsis.strip()})

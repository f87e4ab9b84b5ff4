"""`drydock sbom` of a real image: a valid CycloneDX document with what its lock holds, the same bytes everywhere."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from conftest import Made
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from mini_image import Project, drydock, seeded

from drydock.build import Inputs
from drydock.definition import Architecture
from drydock.store import Store


@pytest.fixture(scope="module")
def text(tiny: Made, project: Project) -> str:
    said = drydock(project, tiny.store, "sbom", "tiny-mini")
    assert (said.status, said.stderr) == (0, "")
    return said.stdout


@pytest.fixture(scope="module")
def document(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in document["components"]}


def licences(component: dict[str, Any]) -> list[str]:
    entries = component.get("licenses", [])
    return [
        entry.get("expression") or entry["license"].get("id") or entry["license"]["name"] for entry in entries
    ]


def needs(document: dict[str, Any], component: dict[str, Any]) -> set[str]:
    """The names of what a component depends on."""
    names = {each["bom-ref"]: each["name"] for each in document["components"]}
    (entry,) = (each for each in document["dependencies"] if each["ref"] == component["bom-ref"])
    return {names[ref] for ref in entry.get("dependsOn", ())}


def test_it_is_valid_by_the_schema(text: str) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"SHA-256"', '"SHA-0"', 1)) is not None


def test_it_holds_what_the_lock_holds(document: dict[str, Any], project: Project, tiny: Made) -> None:
    inputs = Inputs(project.image("tiny-mini"))
    found = by_name(document)
    locked = {package.name: package.wheel for package in inputs.lock.packages}
    locked |= {package.name: package.artifact for package in inputs.base.packages}
    assert found.keys() == {*locked, "debian"}
    assert len(document["components"]) == len(found)
    for name, artifact in locked.items():
        assert found[name]["version"] == artifact.version
        assert found[name]["hashes"] == [{"alg": "SHA-256", "content": artifact.sha256}]
        values = {each["name"]: each["value"] for each in found[name]["properties"]}
        assert values == {
            "dev.drydock.filename": artifact.filename, "dev.drydock.size": str(artifact.size),
        }  # fmt: skip
    about = document["metadata"]["component"]
    assert (about["name"], about["version"]) == ("tiny-mini", f"sha256:{tiny.built.digest}")
    assert about["hashes"] == [{"alg": "SHA-256", "content": tiny.built.digest}]
    assert "timestamp" not in document["metadata"]


def test_package_urls_and_sources(document: dict[str, Any], architecture: Architecture) -> None:
    found = by_name(document)
    version = found["libstdc++6"]["version"]
    purl = f"pkg:deb/debian/libstdc%2B%2B6@{version}?arch={architecture}&distro=debian-13"
    assert found["libstdc++6"]["purl"] == purl
    assert found["click"]["purl"] == f"pkg:pypi/click@{found['click']['version']}"
    built = found["antlr4-python3-runtime"]
    (source,) = built["pedigree"]["ancestors"]
    assert source["purl"].endswith(
        f"@{built['version']}?file_name=antlr4-python3-runtime-{built['version']}.tar.gz"
    )
    assert source["hashes"] != built["hashes"]
    assert [name for name, each in found.items() if "pedigree" in each] == ["antlr4-python3-runtime"]


def test_licences_are_those_that_the_artifacts_declare(document: dict[str, Any]) -> None:
    found = by_name(document)
    assert licences(found["click"]) == ["BSD-3-Clause"]
    assert "AND" in licences(found["numpy"])[0]
    assert licences(found["distro"]) == ["Apache License, Version 2.0"]
    assert licences(found["setuptools"]) == ["License :: OSI Approved :: MIT License"]
    assert licences(found["adduser"]) == ["GPL-2+"]
    # Its folder of documents is libtinfo6's.
    assert licences(found["libncursesw6"]) == licences(found["libtinfo6"]) != []
    # Its copyright is prose.
    assert licences(found["gcc-14-base"]) == []


def test_dependencies_are_those_of_the_image(document: dict[str, Any]) -> None:
    found = by_name(document)
    assert needs(document, found["pytest"]) == {"iniconfig", "packaging", "pluggy", "pygments"}
    assert {"libc6", "perl"} <= needs(document, found["git"])
    debs = {name for name, each in found.items() if each.get("purl", "").startswith("pkg:deb/")}
    assert needs(document, found["debian"]) == debs
    assert needs(document, document["metadata"]["component"]) == found.keys() - debs


def test_another_machine_writes_the_same_bytes(
    text: str, tiny: Made, project: Project, artifacts: Store, tmp_path: Any
) -> None:
    elsewhere = project.copy(tmp_path / "élsewhere")
    store = seeded(tmp_path / "store", artifacts, reversed(elsewhere.artifacts("tiny-mini")))
    for blob in (tiny.built.digest, tiny.built.config_digest):
        tiny.store.link(blob, store.path(blob))
    shutil.copytree(tiny.store.root / "images", store.root / "images")
    file = tmp_path / "sbom.json"
    said = drydock(
        elsewhere, store, "sbom", "tiny", "--output", str(file),
        TZ="Pacific/Kiritimati", LANG="tr_TR.UTF-8", PYTHONHASHSEED="7",
    )  # fmt: skip
    assert said.status == 0, said.stderr
    assert file.read_text() == text
    components = len(json.loads(text)["components"])
    assert said.stdout.startswith(f"{file}: {components} components, ")


def test_an_artifact_that_is_gone_is_to_be_fetched(warm: Store, project: Project) -> None:
    click, *_ = (each for each in project.packages("tiny-mini") if each.name == "click")
    warm.discard(click.wheel.sha256)
    error = drydock(project, warm, "sbom", "tiny-mini").error
    assert f"{click.wheel} is not in {warm.root}: run `drydock fetch tiny-mini`" in error


def test_a_wheel_that_nobody_published_is_built(text: str, warm: Store, project: Project) -> None:
    built, *_ = (each for each in project.packages("tiny-mini") if each.built_from)
    warm.discard(built.wheel.sha256)
    assert drydock(project, warm, "sbom", "tiny-mini").stdout == text
    warm.discard(built.wheel.sha256)
    warm.discard(built.built_from.sdist.hashes["sha256"])
    assert "run `drydock fetch tiny-mini`" in drydock(project, warm, "sbom", "tiny-mini").error


def test_an_image_of_another_lock_is_not_described(warm: Store, own: Project) -> None:
    image = own.image("tiny-mini")
    kept = [
        package
        for package in Inputs(image).lock.model_dump(mode="json", by_alias=True, exclude_none=True)[
            "packages"
        ]
        if package["name"] != "click"
    ]
    own.write("tiny", image.definition.architecture, kept)
    error = drydock(own, warm, "sbom", "tiny-mini").error
    assert "was made from another lock/pylock.tiny-mini.toml: run `drydock build tiny-mini`" in error


def test_an_image_that_is_not_built_has_none(artifacts: Store, project: Project, tmp_path: Any) -> None:
    store = seeded(tmp_path / "store", artifacts, ())
    assert "run `drydock build tiny-mini`" in drydock(project, store, "sbom", "tiny-mini").error

"""What an image is made of, as a CycloneDX document: a function of its locks, their artifacts and its digest alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.exceptions import FactoryException
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import AttachedText, HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from drydock.build import Inputs
from drydock.debs import checked
from drydock.declared import licences_of, metadata_of, read_debs, requirements_of
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.locks import Artifact, Package
from drydock.oci import Built
from drydock.sdist import ensure_built
from drydock.store import Store, sha256_file

MEDIA_TYPE = "application/vnd.cyclonedx+json"
_licences = LicenseFactory()


@dataclass(frozen=True, kw_only=True)
class Sbom:
    """A document, and how many components it has and how many of them have a licence."""

    data: bytes
    components: int
    licensed: int


class _Graph(NamedTuple):
    """Components by name, and the names of those that each depends on."""

    components: dict[str, Component]
    edges: dict[str, set[str]]


def sbom(image: Image, built: Built, store: Store) -> Sbom:
    """The CycloneDX 1.6 document of an image in the store.

    Raises:
        DrydockError: the image was made from other locks, or an artifact is not in the store.
    """
    inputs = Inputs(image)
    about = _image(built, _labels(image, built, store))
    _check_there(inputs, store)
    base = _vendor(image) if image.vendor else _debian(image)
    provided = {each.name: each for each in base.components}
    wheels, debs = _wheels(inputs, store, provided), _debs(inputs, store)
    bom = Bom(
        serial_number=uuid5(NAMESPACE_URL, str(about.purl)),
        components=[base, *wheels.components.values(), *debs.components.values()],
        metadata=BomMetaData(component=about, tools=ToolRepository(components=[_drydock()])),
    )
    # The library's default is now; the same image has the same document at any time.
    bom.metadata.timestamp = None  # type: ignore[assignment]
    bom.register_dependency(about, [base, *wheels.components.values()])
    bom.register_dependency(base, [*provided.values(), *debs.components.values()])
    for graph, there in ((wheels, provided | wheels.components), (debs, debs.components)):
        for name, needed in graph.edges.items():
            bom.register_dependency(there[name], [there[each] for each in needed])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    listed = [*bom.components, *base.components]
    return Sbom(
        data=json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n",
        components=len(listed),
        licensed=sum(1 for each in listed if each.licenses),
    )


def _image(built: Built, labels: Mapping[str, str]) -> Component:
    """The image itself, which the document is about."""
    digest = f"sha256:{built.digest}"
    return _component(
        PackageURL("oci", None, built.name, digest, {"arch": built.architecture}),
        built.digest,
        type=ComponentType.CONTAINER,
        name=built.name,
        version=digest,
        description=labels.get("org.opencontainers.image.description"),
        properties=[Property(name=name, value=value) for name, value in labels.items()],
    )


def _labels(image: Image, built: Built, store: Store) -> dict[str, str]:
    """The image's labels, of which two say that it was made from the locks that are here."""
    if not store.has(built.config_digest):
        raise DrydockError(
            f"the config of {built.name} is gone from {store.root}: run `drydock build {built.name}`"
        )
    config = json.loads(store.path(built.config_digest).read_bytes())
    labels: dict[str, str] = config["config"]["Labels"]
    for label, path in (
        ("dev.drydock.lock", image.pylock_path),
        ("dev.drydock.base-lock", image.base_lock_path),
    ):
        if labels.get(label) != f"sha256:{sha256_file(path)}":
            raise DrydockError(
                f"{built.name} in {store.root} was made from another {path.relative_to(image.root)}: "
                f"run `drydock build {built.name}`"
            )
    return labels


def _check_there(inputs: Inputs, store: Store) -> None:
    """Have every wheel and deb of an image in the store; a wheel that nobody published is built.

    A wheel's bytes are not hashed again, which would take longer than all the rest: of it only METADATA is read, which
    the archive has a checksum of.
    """

    def need(artifacts: Iterable[Artifact]) -> None:
        missing = [each for each in artifacts if not store.has(each.sha256, each.size)]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DrydockError(
                f"{missing[0]}{more} is not in {store.root}: run `drydock fetch {inputs.image.name}`"
            )

    debs = inputs.debian.artifacts() if inputs.debian else []
    need([*debs, *(package.wheel for package in inputs.lock.packages if package.built_from is None)])
    for package in inputs.lock.packages:
        if package.built_from and not store.has(package.wheel.sha256, package.wheel.size):
            needed = [_sdist(package), *(tool.artifact for tool in package.built_from.build_requires)]
            need(needed)
            for artifact in needed:
                checked(store, artifact)
            ensure_built(store, package)


def _wheels(inputs: Inputs, store: Store, provided: Mapping[str, Component]) -> _Graph:
    """A component for each wheel, and what it requires of those that are there."""
    components, metadata = {}, {}
    for package in inputs.lock.packages:
        name, wheel = package.name, package.wheel
        metadata[name] = metadata_of(store.path(wheel.sha256))
        components[name] = _component(
            PackageURL("pypi", None, name, package.version),
            wheel.sha256,
            name=name,
            version=package.version,
            licenses=_wheel_licences(name, licences_of(metadata[name])),
            pedigree=Pedigree(ancestors=[_source(package)]) if package.built_from else None,
            properties=_properties(filename=wheel.filename, size=wheel.size),
        )
    edges: dict[str, set[str]] = {name: set() for name in components}
    extras: dict[str, set[str]] = {name: set() for name in components}
    waiting = set(components)
    for requirement in map(Requirement, inputs.image.engine.requirements):
        extras.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    while waiting:
        name = waiting.pop()
        for requirement in requirements_of(metadata[name], inputs.image, extras[name]):
            needed = canonicalize_name(requirement.name)
            if needed in components and not requirement.extras <= extras[needed]:
                extras[needed] |= requirement.extras
                waiting.add(needed)
            if needed in components or needed in provided:
                edges[name].add(needed)
    return _Graph(components, edges)


def _wheel_licences(name: str, texts: Iterable[str]) -> list[License]:
    """As METADATA says it: an SPDX identifier or expression where it is one, else a name, or the text itself."""
    declared = LicenseAcknowledgement.DECLARED
    found: list[License] = []
    for text in texts:
        if "\n" in text:
            title = f"declared license of {name}"
            found.append(
                _licences.make_with_name(title, text=AttachedText(content=text), acknowledgement=declared)
            )
        else:
            found.append(_licences.make_from_string(text, license_acknowledgement=declared))
    return found


def _sdist(package: Package) -> Artifact:
    assert package.built_from
    return package.built_from.sdist.artifact("sdist", package.name, package.version)


def _source(package: Package) -> Component:
    sdist = _sdist(package)
    return _component(
        PackageURL("pypi", None, sdist.name, sdist.version, {"file_name": sdist.filename}),
        sdist.sha256,
        name=sdist.name,
        version=sdist.version,
        properties=_properties(filename=sdist.filename, size=sdist.size),
    )


def _debs(inputs: Inputs, store: Store) -> _Graph:
    """A component for each Debian package, and what it depends on of those that are there."""
    if inputs.debian is None:
        return _Graph({}, {})
    said = read_debs(store, inputs.debian.artifacts())
    components = {}
    for package in inputs.debian.packages:
        qualifiers = {"arch": package.architecture, "distro": f"debian-{inputs.debian.release}"}
        components[package.name] = _component(
            PackageURL("deb", "debian", package.name, package.version, qualifiers),
            package.sha256,
            name=package.name,
            version=package.version,
            licenses=[_short_name(text) for text in said[package.name].licences],
            properties=_properties(filename=package.artifact.filename, size=package.size),
        )
    providers: dict[str, set[str]] = {name: {name} for name in components}
    for name, deb in said.items():
        for provided in deb.provides:
            providers.setdefault(provided, set()).add(name)
    edges = {
        name: {
            provider
            for alternatives in deb.requires
            for each in alternatives
            for provider in providers.get(each, ())
        }
        - {name}
        for name, deb in said.items()
    }
    return _Graph(components, edges)


def _short_name(text: str) -> License:
    """A short name of Debian's: an SPDX identifier where it is one, else a name."""
    declared = LicenseAcknowledgement.DECLARED
    try:
        return _licences.make_with_id(text, acknowledgement=declared)
    except FactoryException:
        return _licences.make_with_name(text, acknowledgement=declared)


def _debian(image: Image) -> Component:
    """The release that the packages are of."""
    return Component(
        type=ComponentType.OPERATING_SYSTEM,
        name="debian",
        version=str(image.base.release),
        bom_ref=f"debian-{image.base.release}",
        properties=_properties(suite=image.base.suite),
    )


def _vendor(image: Image) -> Component:
    """The vendor's image, and what it is said to provide."""
    vendor = image.vendor
    assert vendor
    name, tag = vendor.repository.rpartition("/")[2], {"tag": vendor.version}
    return _component(
        PackageURL("oci", None, name, vendor.digest, tag),
        vendor.digest.removeprefix("sha256:"),
        type=ComponentType.CONTAINER,
        name=vendor.repository,
        version=vendor.version,
        components=[
            _component(PackageURL("pypi", None, each, number), None, name=each, version=number)
            for each, number in vendor.provides.items()
        ],
    )


def _drydock() -> Component:
    return Component(type=ComponentType.APPLICATION, name="drydock", version=version("drydock"))


def _component(purl: PackageURL, sha256: str | None, **more: Any) -> Component:
    """A component that its package URL names."""
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []
    return Component(purl=purl, bom_ref=str(purl), hashes=hashes, **more)


def _properties(**values: object) -> list[Property]:
    return [Property(name=f"dev.drydock.{name}", value=str(value)) for name, value in values.items()]

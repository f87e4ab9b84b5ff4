"""The locks: what an image is made of, exactly. Reading, writing and checking them offline.

`lock/pylock.<image>.toml` is PEP 751 with one wheel a package, named by a path relative to the store;
`lock/debian-<release>-<architecture>.toml` is the closure of Debian packages. Neither names an index.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version
from pydantic import BaseModel, Field, ValidationError

from drydock.definition import Architecture, DebianRequest, Image, Model, debian_lock_path
from drydock.errors import DrydockError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(gt=0, description="bytes")]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One file that an image is made of, wherever it may be fetched from.

    `name` and `version` are the project's (a distribution or a Debian package), `filename` is the file's
    own, `sha256` and `size` (bytes) are what it must be. For a deb, `source` is its path in the archive.
    """

    kind: Literal["wheel", "sdist", "deb"]
    name: str
    version: str
    filename: str
    sha256: str
    size: int
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.filename})"


class File(Model):
    """A hashed file in a pylock: `path` is relative to the store."""

    path: str
    size: Size
    hashes: dict[Literal["sha256"], Sha256]

    @property
    def filename(self) -> str:
        return self.path.rpartition("/")[2]

    def artifact(self, kind: Literal["wheel", "sdist"], name: str, version: str) -> Artifact:
        return Artifact(
            kind=kind,
            name=name,
            version=version,
            filename=self.filename,
            sha256=self.hashes["sha256"],
            size=self.size,
        )


class BuildRequirement(Model):
    """A wheel that an isolated build environment holds."""

    name: str
    version: str
    wheel: File

    @property
    def artifact(self) -> Artifact:
        return self.wheel.artifact("wheel", self.name, self.version)


class BuiltFrom(Model):
    """How a package that has no wheel on the index becomes one: its sdist and the build environment."""

    sdist: File
    build_requires: tuple[BuildRequirement, ...]


class PackageTool(Model):
    drydock: BuiltFrom


class Package(Model):
    """One distribution of the image and its one wheel."""

    name: str
    version: str
    wheels: Annotated[tuple[File, ...], Field(min_length=1, max_length=1)]
    tool: PackageTool | None = None

    @property
    def wheel(self) -> Artifact:
        return self.wheels[0].artifact("wheel", self.name, self.version)

    @property
    def built_from(self) -> BuiltFrom | None:
        return self.tool.drydock if self.tool else None


class LockTool(Model):
    """What the lock was made for; `inputs` and `content` let `lock --check` work offline."""

    image: str
    platform: str
    python: str
    inputs: Sha256
    content: Sha256


class LockTools(Model):
    drydock: LockTool


class PyLock(Model):
    """`lock/pylock.<image>.toml`."""

    lock_version: Literal["1.0"]
    created_by: str
    requires_python: str
    environments: tuple[str, ...]
    packages: tuple[Package, ...]
    tool: LockTools

    def artifacts(self) -> list[Artifact]:
        """Every file the image needs from an index: wheels as they are, or the sdists and tools to build one."""
        found: dict[str, Artifact] = {}
        for package in self.packages:
            built = package.built_from
            if built is None:
                found[package.wheel.sha256] = package.wheel
                continue
            sdist = built.sdist.artifact("sdist", package.name, package.version)
            for artifact in (sdist, *(requirement.artifact for requirement in built.build_requires)):
                found[artifact.sha256] = artifact
        return list(found.values())


class DebianPackage(Model):
    """One package of the base. `filename` is its path in the archive `archive` (debian, debian-security)."""

    name: str
    version: str
    architecture: Literal["amd64", "arm64", "all"]
    archive: Literal["debian", "debian-security"]
    filename: str
    size: Size
    sha256: Sha256

    @property
    def artifact(self) -> Artifact:
        return Artifact(
            kind="deb",
            name=self.name,
            version=self.version,
            filename=self.filename.rpartition("/")[2],
            sha256=self.sha256,
            size=self.size,
            source=f"{self.archive}/{self.filename}",
        )


class DebianLock(Model):
    """`lock/debian-<release>-<architecture>.toml`: the closure of a base's packages."""

    release: int
    suite: str
    architecture: Architecture
    inputs: Sha256
    content: Sha256
    packages: tuple[DebianPackage, ...]

    def version_of(self, name: str) -> str:
        """The locked version of a package.

        Raises:
            DrydockError: the closure does not hold it.
        """
        for package in self.packages:
            if package.name == name:
                return package.version
        raise DrydockError(
            f"debian-{self.release}-{self.architecture} does not hold {name}: run `drydock lock`"
        )

    def artifacts(self) -> list[Artifact]:
        return [package.artifact for package in self.packages]


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def resolution_inputs(image: Image) -> dict[str, Any]:
    """Everything in the definition that decides what the resolver answers; environment and labels do not."""
    engine = image.engine
    return {
        **({"provides": image.provides} if image.vendor else {}),
        "python": image.definition.python,
        "platform": platform(image),
        "requirements": sorted(engine.requirements),
        "overrides": {name: entry.version for name, entry in engine.overrides.items()},
        "exclusions": sorted(engine.exclusions),
        "source-builds": {name: sorted(entry.build_requires) for name, entry in engine.source_builds.items()},
    }


def debian_inputs(request: DebianRequest, architecture: Architecture) -> dict[str, Any]:
    return {
        "release": request.release,
        "suite": request.suite,
        "architecture": architecture,
        "packages": sorted(request.packages),
    }


def platform(image: Image) -> str:
    """uv's name for the target, as `x86_64-manylinux_2_40`."""
    return f"{image.machine}-manylinux_{image.definition.manylinux}"


def environment_marker(image: Image) -> str:
    """The one environment a lock is for, as a PEP 508 marker."""
    return (
        f"python_version == '{image.definition.python}' and sys_platform == 'linux' "
        f"and platform_machine == '{image.machine}'"
    )


def marker_environment(image: Image) -> dict[str, str]:
    """What environment markers (PEP 508) are evaluated with, in the image."""
    return {
        "python_version": image.definition.python,
        "python_full_version": f"{image.definition.python}.0",
        "sys_platform": "linux",
        "platform_machine": image.machine,
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def platform_tags(image: Image) -> dict[Tag, int]:
    """The wheel tags the image takes, each with its rank (0 is best)."""
    major, minor = (int(part) for part in image.definition.python.split("."))
    newest = int(image.definition.manylinux.removeprefix("2_"))
    platforms = []
    for glibc in range(newest, 4, -1):
        platforms.append(f"manylinux_2_{glibc}_{image.machine}")
        legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}.get(glibc)
        if legacy:
            platforms.append(f"{legacy}_{image.machine}")
    platforms.append(f"linux_{image.machine}")
    interpreter = f"cp{major}{minor}"
    tags = [
        *cpython_tags((major, minor), platforms=platforms),
        *compatible_tags((major, minor), interpreter=interpreter, platforms=platforms),
    ]
    return {tag: rank for rank, tag in reversed(list(enumerate(tags)))}


def wheel_rank(filename: str, tags: dict[Tag, int]) -> int | None:
    """How well a wheel fits the tags (0 is best), or None when it does not."""
    try:
        *_, found = parse_wheel_filename(filename)
    except InvalidWheelFilename:
        return None
    return min((tags[tag] for tag in found if tag in tags), default=None)


def write_lock(path: Path, data: dict[str, Any]) -> None:
    """Write a lock as TOML, sealed: `content` becomes the hash of all the rest."""
    _sealed_table(data)["content"] = content_hash(data)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(tomli_w.dumps(data))
    temporary.rename(path)


def content_hash(data: dict[str, Any]) -> str:
    """The seal of a lock's content, without the seal itself."""
    copy = json.loads(json.dumps(data))
    _sealed_table(copy).pop("content", None)
    return sha256_json(copy)


def _sealed_table(data: dict[str, Any]) -> dict[str, Any]:
    """The table of a lock that has its seal: a pylock's own part of ours, or all of a lock that is only ours."""
    tool = data.get("tool")
    ours = tool.get("drydock") if isinstance(tool, dict) else None
    return ours if isinstance(ours, dict) else data


def read_sealed(path: Path, model: type[BaseModel], remedy: str) -> Any:
    """Read a lock into its model, and compare it with its seal.

    Parameters:
        remedy: what to do about one that is not right, for the message.

    Raises:
        DrydockError: missing, malformed or edited by hand.
    """
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise DrydockError(f"{path} is missing: {remedy}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DrydockError(f"{path} is not TOML ({error}): {remedy}") from error
    try:
        lock = model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DrydockError(f"{path}: {key}: {first['msg']}: {remedy}") from error
    if _sealed_table(data)["content"] != content_hash(data):
        raise DrydockError(
            f"{path} was edited by hand (its content does not match its seal): change the definition and {remedy}"
        )
    return lock


def own_part(definition: Mapping[str, Any], engine: str) -> bytes:
    """One engine's part of a definition, as TOML in one spelling: what an image carries.

    Without the other engines, so that no image is another when only its neighbour changed; and without comments and
    layout, which make none another either.

    Parameters:
        definition: the parsed file.
    """
    own = {**definition, "default-engine": engine, "engine": {engine: definition["engine"][engine]}}
    return tomli_w.dumps(own).encode()


def own_definition(image: Image) -> bytes:
    """What of its definition's file is an image's own."""
    return own_part(tomllib.loads(image.definition_path.read_text()), image.engine_name)


def read_pylock(image: Image) -> PyLock:
    """Read an image's Python lock.

    Raises:
        DrydockError: missing, malformed, edited by hand, or out of date with the definition.
    """
    remedy = f"run `drydock lock {image.name}`"
    lock: PyLock = read_sealed(image.pylock_path, PyLock, remedy)
    if lock.tool.drydock.inputs != sha256_json(resolution_inputs(image)):
        raise DrydockError(
            f"{image.pylock_path} is out of date with {image.definition_path.relative_to(image.root)}: {remedy}"
        )
    return lock


def read_debian_lock(root: Path, request: DebianRequest, architecture: Architecture) -> DebianLock:
    """Read a base's lock for an architecture; errors as `read_pylock`'s."""
    path = debian_lock_path(root, request.release, architecture)
    remedy = "run `drydock lock --base`"
    lock: DebianLock = read_sealed(path, DebianLock, remedy)
    if lock.inputs != sha256_json(debian_inputs(request, architecture)):
        raise DrydockError(f"{path} is out of date with images/debian-{request.release}.toml: {remedy}")
    return lock


def check_pylock(image: Image, lock: PyLock) -> list[str]:
    """What is wrong with a lock that could be read, a line each: names, tags, versions, what was asked for."""
    problems = []
    tags = platform_tags(image)
    versions = {package.name: Version(package.version) for package in lock.packages}
    if len(versions) != len(lock.packages):
        problems.append("a package is locked twice")
    for package in lock.packages:
        problems += _check_wheel(package.wheel, tags)
        if package.built_from is None and package.name in image.engine.source_builds:
            problems.append(f"{package.name}: the definition builds it from source, the lock does not")
        if package.wheels[0].path != f"wheels/{package.wheel.filename}":
            problems.append(f"{package.name}: path {package.wheels[0].path!r} is not in wheels/")
    marker = marker_environment(image)
    overrides = {
        name: Requirement(f"{name}=={entry.version}") for name, entry in image.engine.overrides.items()
    }
    provided = {name: Version(version) for name, version in image.provides.items()}
    problems += [f"{name} is provided by the base and locked" for name in sorted(versions.keys() & provided)]
    asked = [Requirement(text) for text in image.engine.requirements]
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate(marker):
            continue
        name = canonicalize_name(requirement.name)
        problems += _check_asked(overrides.get(name, requirement), name, versions | provided)
    problems += [
        line
        for name, requirement in overrides.items()
        if name in versions
        for line in _check_asked(requirement, name, versions)
    ]
    problems += [f"{name} is excluded and locked" for name in image.engine.exclusions if name in versions]
    return problems


def _check_asked(requirement: Requirement, name: str, versions: dict[str, Version]) -> Iterable[str]:
    if name not in versions:
        yield f"{requirement} is asked for and not locked"
    elif not requirement.specifier.contains(versions[name], prereleases=True):
        yield f"{requirement} is asked for, {versions[name]} is locked"


def _check_wheel(wheel: Artifact, tags: dict[Tag, int]) -> Iterable[str]:
    try:
        name, version, *_ = parse_wheel_filename(wheel.filename)
    except InvalidWheelFilename as error:
        yield f"{wheel.name}: {error}"
        return
    if name != canonicalize_name(wheel.name) or version != Version(wheel.version):
        yield f"{wheel.name} {wheel.version}: its wheel is {wheel.filename}"
    if wheel_rank(wheel.filename, tags) is None:
        yield f"{wheel.filename} does not fit the image's platform"


def check_debian_lock(request: DebianRequest, lock: DebianLock) -> list[str]:
    """What is wrong with a base's lock, a line each."""
    names = [package.name for package in lock.packages]
    problems = [f"{name} is locked twice" for name in {name for name in names if names.count(name) > 1}]
    problems += [f"{name} is asked for and not locked" for name in request.packages if name not in names]
    problems += [
        f"{package.name} is for {package.architecture}"
        for package in lock.packages
        if package.architecture not in (lock.architecture, "all")
    ]
    return problems

"""What an image is: `images/<hardware>/image.toml`, an engine's own file beside it, and `images/debian-<release>.toml`,
typed on reading."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from drydock.errors import DrydockError
from drydock.naming import COMMON, base_lock, definition_path, split_variant
from drydock.npu_smi import version_key


def _requirement(text: str) -> str:
    try:
        Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(f"{text!r} is not a requirement (PEP 508): {str(error).splitlines()[0]}") from error
    return text


def _version(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion as error:
        raise ValueError(f"{text!r} is not a version") from error
    return text


def _image_path(text: str) -> str:
    if not text.startswith("/") or text != os.path.normpath(text) or text.startswith(RESERVED):
        raise ValueError(f"{text!r} is not an absolute path of the image outside of {' and '.join(RESERVED)}")
    return text


RESERVED = ("/proc", "/sys", "/dev", "/usr/share/drydock")
"""Where no definition puts a link."""
ImagePath = Annotated[str, AfterValidator(_image_path)]
RequirementText = Annotated[str, AfterValidator(_requirement)]
VersionText = Annotated[str, AfterValidator(_version)]
Reason = Annotated[str, Field(min_length=10, description="why, for the reviewer of a lock")]
Architecture = Literal["amd64", "arm64"]

MACHINES: dict[Architecture, str] = {"amd64": "x86_64", "arm64": "aarch64"}
"""The kernel's and Python's name for what OCI and Debian call the architecture."""


class Model(BaseModel):
    """A frozen table of a TOML file in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda n: n.replace("_", "-"))


class Accelerator(Model):
    """The device an image is compiled for.

    `minimum_driver` is the host driver's lowest version; `sm` lists CUDA compute capabilities as NVIDIA
    writes them without the dot ("90" for Hopper). Of an Ascend NPU, `soc` lists what `npu-smi info` calls its chips
    (fnmatch patterns), and `cann` is the version of CANN in the image.
    """

    kind: Literal["none", "cuda", "npu"]
    minimum_driver: str | None = None
    sm: tuple[str, ...] = ()
    soc: tuple[str, ...] = ()
    cann: str | None = None


class DebianBase(Model):
    """A release of Debian, of which `images/debian-<release>.toml` says the packages."""

    kind: Literal["debian"]
    release: int


def _digest(text: str) -> str:
    if not re.fullmatch("sha256:[0-9a-f]{64}", text):
        raise ValueError(
            f"{text!r} is no digest: a tag moves, so write sha256: and the 64 digits that the registry gives for it"
        )
    return text


class Variant(Model):
    """Another build of the same base for other chips: its digest, its version, and what npu-smi calls the chips.

    What it provides is the same, so its images share one lock of Python packages with the base's own, and `verify`
    says where one of them holds something else.
    """

    digest: Annotated[str, AfterValidator(_digest)]
    version: str
    soc: Annotated[tuple[str, ...], Field(min_length=1)]


class VendorBase(Model):
    """Somebody else's image, by digest, for what has no wheels in reach: our layers go on top of its own.

    `repository` is its name at a registry, which the user's configuration names; `version` is what its publisher
    calls it. `provides` are distributions that it holds, normalized name -> version: the resolver takes them as
    given, the lock leaves them out, and `verify` looks for them in `site_packages`. Each of `variants` is an image
    of its own, `<hardware>-<engine>-<variant>`.
    """

    kind: Literal["image"]
    repository: Annotated[str, Field(pattern=r"^[a-z0-9]+([._/-]+[a-z0-9]+)*$")]
    digest: Annotated[str, AfterValidator(_digest)]
    version: str
    python_version: Annotated[str, Field(pattern=r"^3\.\d+\.\d+$", description="of its interpreter")]
    interpreter: ImagePath
    site_packages: Annotated[tuple[ImagePath, ...], Field(min_length=1)]
    provides: dict[str, VersionText] = {}
    variants: dict[Annotated[str, Field(pattern="^[a-z0-9]+$")], Variant] = {}


Base = Annotated[DebianBase | VendorBase, Field(discriminator="kind")]
"""What an image stands on."""


class Override(Model):
    """A version put in place of what packages ask for."""

    version: VersionText
    reason: Reason


class Exclusion(Model):
    """A package left out although something requires it."""

    reason: Reason


class Overlap(Model):
    """A distribution whose files replace those of others where they ship the same path."""

    over: Annotated[tuple[str, ...], Field(min_length=1)]
    reason: Reason


class SourceBuild(Model):
    """A package without a wheel, built once into one; `build_requires` are exact and hashed in the lock."""

    build_requires: tuple[RequirementText, ...]
    reason: Reason


class Engine(Model):
    """One engine's environment on a hardware: what is asked for, and what must be known about it."""

    summary: str
    requirements: tuple[RequirementText, ...]
    overrides: dict[str, Override] = {}
    exclusions: dict[str, Exclusion] = {}
    source_builds: dict[str, SourceBuild] = {}
    overlaps: dict[str, Overlap] = Field(
        default={},
        description="winner -> losers among distributions that ship one path with different content",
    )
    environment: dict[str, str] = {}
    links: dict[ImagePath, ImagePath] = Field(
        default={}, description="symbolic links, path -> what the image holds, for programs that look there"
    )
    labels: dict[str, str] = {}
    distribution: str = Field(description="the engine's own distribution name")
    absent_libraries: dict[str, Reason] = Field(
        default={}, description="the same, where only this engine's wheels ask for them"
    )
    foreign_objects: dict[str, Reason] = Field(
        default={}, description="paths (fnmatch patterns) of ELF objects for another architecture"
    )
    absent_distributions: dict[str, Reason] = Field(
        default={},
        description="what the stack is made with elsewhere and no index has: `verify` says it is missing",
    )


class Definition(Model):
    """`images/<hardware>/image.toml`, or one engine's own `images/<hardware>/<engine>.toml`."""

    hardware: str
    summary: str
    architecture: Architecture
    python: Annotated[str, Field(pattern=r"^3\.\d+$")]
    manylinux: Annotated[str, Field(pattern=r"^2_\d+$", description="newest glibc of the wheels taken")]
    accelerator: Accelerator
    base: Base
    default_engine: str
    labels: dict[str, str] = {}
    driver_libraries: tuple[str, ...] = Field(default=(), description="sonames that the host's driver brings")
    engine: dict[str, Engine]


class DebianRequest(Model):
    """`images/debian-<release>.toml`: the packages a base holds, each with its reason."""

    release: int
    suite: str
    python: Annotated[str, Field(pattern=r"^3\.\d+$")]
    packages: dict[str, Reason]
    alternatives: dict[str, str] = Field(
        default={}, description="link in /usr/bin -> target, which maintainer scripts would have made"
    )
    absent_libraries: dict[str, Reason] = Field(
        default={}, description="shared libraries (fnmatch patterns) that wheels ask for and the base lacks"
    )


class Image:
    """One image: a definition, one of its engines, and, on Debian, the request for its base.

    >>> Image.named(Path("."), "cpu-vllm").engine.requirements

    Parameters:
        variant: of the base; the base's own digest without.
    """

    def __init__(
        self,
        root: Path,
        path: Path,
        definition: Definition,
        engine: str,
        base: DebianRequest | None,
        variant: str = "",
    ) -> None:
        self.root = root
        self.definition_path = path
        self.definition = definition
        self.engine_name = engine
        self.engine = definition.engine[engine]
        self.variant = variant
        self._base = base

    @property
    def vendor(self) -> VendorBase | None:
        """The vendor's image that it stands on, or None for one on Debian."""
        base = self.definition.base
        if not isinstance(base, VendorBase):
            return None
        if not self.variant:
            return base
        variant = base.variants[self.variant]
        return base.model_copy(update={"digest": variant.digest, "version": variant.version})

    @property
    def soc(self) -> tuple[str, ...]:
        """What npu-smi calls the chips that it is made for (fnmatch patterns); none but of NPUs."""
        variants = _variants(self.definition)
        return variants[self.variant].soc if self.variant else self.definition.accelerator.soc

    @property
    def provides(self) -> dict[str, str]:
        """Distributions that its base holds, normalized name -> version."""
        return dict(self.vendor.provides) if self.vendor else {}

    @property
    def base(self) -> DebianRequest:
        """What its Debian base holds; only of an image on Debian."""
        assert self._base, f"{self.name} stands on a vendor's image"
        return self._base

    @property
    def vendor_lock_path(self) -> Path:
        """The lock of the vendor's image, which all engines of one definition share."""
        definition = self.definition_path.name
        return self.root / base_lock(definition, self.definition.hardware, self.engine_name, self.variant)

    @property
    def unread(self) -> bool:
        """Whether it stands on a vendor's image that nobody has read from a registry yet; without that it can be
        resolved, and not built."""
        return self.vendor is not None and not self.vendor_lock_path.is_file()

    @property
    def base_lock_path(self) -> Path:
        """The lock of what it stands on."""
        return self.vendor_lock_path if self.vendor else self.debian_lock_path

    @property
    def name(self) -> str:
        return f"{self.locked_as}-{self.variant}" if self.variant else self.locked_as

    @property
    def locked_as(self) -> str:
        """The image whose lock of Python packages it has: all variants of a base provide the same."""
        return f"{self.definition.hardware}-{self.engine_name}"

    @property
    def machine(self) -> str:
        """`platform.machine()` inside the image."""
        return MACHINES[self.definition.architecture]

    @property
    def pylock_path(self) -> Path:
        return self.root / "lock" / f"pylock.{self.locked_as}.toml"

    @property
    def debian_lock_path(self) -> Path:
        return debian_lock_path(self.root, self.base.release, self.definition.architecture)

    @classmethod
    def named(cls, root: Path, name: str) -> Image:
        """Find an image by its name, `<hardware>-<engine>` or `<hardware>` for the default engine; with `-<variant>`
        behind the engine, the one for those chips.

        Raises:
            DrydockError: there is no such hardware, engine or variant; the line lists those there are.
        """
        hardware, _, rest = name.partition("-")
        path = definition_path(root, name)
        if not path.is_file():
            raise DrydockError(f"unknown image {name!r}: there are {', '.join(image_names(root))}")
        definition = read_definition(path)
        engine, variant = split_variant(rest or definition.default_engine, definition.engine)
        variants = _variants(definition)
        if engine not in definition.engine or variant not in ("", *variants):
            raise DrydockError(
                f"unknown image {name!r}: {hardware} has the engine(s) {', '.join(sorted(definition.engine))} "
                f"(engine.* in {path.relative_to(root)}, or a file of its own beside it)"
                + (f", each as {', '.join(sorted(variants))} too (base.variants)" if variants else "")
            )
        if isinstance(definition.base, VendorBase):
            return cls(root, path, definition, engine, None, variant)
        request = root / "images" / f"debian-{definition.base.release}.toml"
        if not request.is_file():
            raise DrydockError(
                f"{path.relative_to(root)}: base.release: there is no {request.relative_to(root)}, "
                "which would say what that holds"
            )
        return cls(root, path, definition, engine, read_toml(request, DebianRequest))


def _variants(definition: Definition) -> dict[str, Variant]:
    return definition.base.variants if isinstance(definition.base, VendorBase) else {}


def debian_lock_path(root: Path, release: int, architecture: str) -> Path:
    return root / "lock" / f"debian-{release}-{architecture}.toml"


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def read_toml(path: Path, model: type[AnyModel]) -> AnyModel:
    """Read a TOML file into a typed model.

    Raises:
        DrydockError: the file is missing, is not TOML, or has a wrong key or type: one line with file and key.
    """
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise DrydockError(f"{path} is missing") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DrydockError(f"{path} is not TOML: {error}") from error
    try:
        return model.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic puts the kind of a base, which chose among the two models, into the path.
        kinds = {("base", "debian"), ("base", "image")}
        path_in = first["loc"]
        parts = [part for n, part in enumerate(path_in) if n == 0 or (path_in[n - 1], part) not in kinds]
        key = ".".join(str(part) for part in parts)
        what = {
            "extra_forbidden": "unknown key",
            "missing": "required, and not there",
            "union_tag_not_found": "its kind is required, and not there",
        }.get(first["type"], first["msg"].removeprefix("Value error, "))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise DrydockError(f"{path}: {key}: {what}{more}") from error


def read_definition(path: Path) -> Definition:
    """Read `images/<hardware>/image.toml`, or an engine's own file beside it, and check what the types cannot say."""
    definition = read_toml(path, Definition)
    engines = definition.engine.keys()
    if path.name != COMMON and engines != {path.stem}:
        raise DrydockError(f"{path}: engine: is {', '.join(sorted(engines))} in the file of {path.stem}")
    if path.name == COMMON and (
        twice := [name for name in engines if path.with_name(f"{name}.toml").is_file()]
    ):
        raise DrydockError(
            f"{path}: engine.{twice[0]}: has {twice[0]}.toml beside it: define it in one of them"
        )
    if definition.hardware != path.parent.name:
        raise DrydockError(f"{path}: hardware: is {definition.hardware!r} in the folder {path.parent.name!r}")
    if definition.default_engine not in definition.engine:
        raise DrydockError(
            f"{path}: default-engine: unknown engine {definition.default_engine!r}, "
            f"there are {', '.join(sorted(definition.engine))}"
        )
    if definition.accelerator.kind == "cuda" and not (
        definition.accelerator.minimum_driver and definition.accelerator.sm
    ):
        raise DrydockError(f"{path}: accelerator: kind cuda needs minimum-driver and sm")
    if definition.accelerator.kind == "npu" and not (
        definition.accelerator.minimum_driver and definition.accelerator.soc and definition.accelerator.cann
    ):
        raise DrydockError(f"{path}: accelerator: kind npu needs minimum-driver, soc and cann")
    if definition.accelerator.kind == "npu":
        try:
            version_key(definition.accelerator.minimum_driver or "")
        except ValueError as error:
            raise DrydockError(f"{path}: accelerator.minimum-driver: {error}") from error
    if definition.accelerator.kind != "npu" and (definition.accelerator.soc or definition.accelerator.cann):
        raise DrydockError(f"{path}: accelerator: soc and cann are of kind npu")
    named = {
        f"engine.{engine_name}.{table.replace('_', '-')}": getattr(engine, table)
        for engine_name, engine in definition.engine.items()
        for table in ("overrides", "exclusions", "source_builds", "overlaps", "absent_distributions")
    }
    if isinstance(definition.base, VendorBase):
        named = {"base.provides": definition.base.provides, **named}
        series = definition.base.python_version.rpartition(".")[0]
        if series != definition.python:
            raise DrydockError(
                f"{path}: base.python-version: {definition.base.python_version} is no {definition.python}"
            )
    for key, names in named.items():
        for name in names:
            if canonicalize_name(name) != name:
                raise DrydockError(
                    f"{path}: {key}.{name}: write the normalized name {canonicalize_name(name)!r}"
                )
    return definition


def image_names(root: Path) -> list[str]:
    """The names of all images that are defined, sorted."""
    names = []
    for path in (root / "images").glob("*/*.toml"):
        definition = read_definition(path)
        for engine in definition.engine:
            name = f"{definition.hardware}-{engine}"
            names += [name, *(f"{name}-{variant}" for variant in _variants(definition))]
    return sorted(names)

"""What the tiers use of an image's packages, looked up in the locked wheels: parsed, never imported, no GPU.

A bump that renames a flag or moves a class is found in seconds, with the line of ours that it breaks, and not after
an image and a server have been started. Looked up are: Python symbols that are imported, attributes of imported
modules, engine flags, environment variables and HTTP paths of the engine, and keys of verl's configuration. Not looked
up: what a call's parameters are called, attributes of objects, and a package of a vendor's base, which is in no wheel.
"""

from __future__ import annotations

import ast
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.indexes import read_indexes
from drydock.locks import read_pylock
from drydock.project import get_artifacts
from drydock.resolve import one_wheel
from drydock.store import Store

Kind = Literal["symbol", "flag", "variable", "path", "key"]

OURS = ("tests/rollout", "tests/trainer", "tests/eplb", "src/drydock/server")
PACKAGES = {"verl": "verl", "megatron": "megatron-core", "transfer_queue": "transferqueue"}
"""Import name -> distribution; the engine's own name comes from the image."""
IMPORTED_AS = {"trtllm": "tensorrt_llm"}
"""Engine -> its import name, where that is another."""
FLAG = re.compile(r"--[a-z][a-z0-9]*([-_][a-z0-9]+)*")
VARIABLE = re.compile(r"(VLLM|SGLANG|VERL)_[A-Z0-9_]+")
PATH = re.compile(r"/[a-z_]+(/[a-z_]+)*(\\?.*)?")
GROUPS = (
    "actor_rollout_ref", "algorithm", "critic", "data", "distillation", "ray_kwargs", "reward", "trainer",
    "transfer_queue",
)  # fmt: skip
"""What verl's configuration of PPO and GRPO has at its top."""
KEY = re.compile(rf"(\+{{0,2}}|~)((?:{'|'.join(GROUPS)})(?:\.[A-Za-z_]\w*)+)(\.$|=.*)?", re.DOTALL)
"""A key as hydra is given it; with a plus it is to be added, so that what it is added to must be there."""
CONFIGURED = "config"
"""The name under which our tests hold a composed configuration."""
COMPOSED = "verl/trainer/config/_generated_ppo_trainer.yaml"
"""verl's configuration with all its groups put together; its own checks keep it as hydra would compose it."""
REFUSED = "contract: refused"
"""In a comment on a line of ours: it names what must not be there."""
OWN = re.compile(r"^# contract: ([a-z]+)$", re.MULTILINE)
"""A comment on a line of its own: the file is that engine's, and nothing in it is another's."""


@dataclass(frozen=True, order=True)
class Use:
    """One thing that a line of ours needs of a package: `name` is `module:attribute` for a symbol."""

    file: str
    line: int
    package: str
    kind: Kind
    name: str

    def missing(self, version: str) -> str:
        """The line that says it is not there."""
        thing = {"symbol": "", "flag": "flag ", "variable": "variable ", "path": "path ", "key": "key "}[
            self.kind
        ]
        name = self.name.replace(":", ".").removesuffix(".")
        return f"{self.file}:{self.line}: {self.package} {version} has no {thing}{name}"


# ------------------------------------------------------------------------------------------- what we use


def uses(root: Path, engine: str) -> list[Use]:
    """Everything the tiers and the server harness use of an engine, verl and the others.

    Parameters:
        root: the checkout.
        engine: its name, as images have it.
    """
    found: set[Use] = set()
    for folder in OURS:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            lines = text.splitlines()
            of = OWN.search(text)
            if of is not None and of[1] != engine:
                continue
            reader = _Reader(str(path.relative_to(root)), engine)
            reader.visit(ast.parse(text))
            found |= {use for use in reader.found if REFUSED not in lines[use.line - 1]}
    return sorted(found)


class _Reader(ast.NodeVisitor):
    """Collects the uses of one file."""

    def __init__(self, file: str, engine: str) -> None:
        self.file, self.engine = file, engine
        self.package = IMPORTED_AS.get(engine, engine)
        self.packages = {*PACKAGES, self.package}
        self.found: list[Use] = []
        self.in_engine = False
        self.modules: dict[str, str] = {}
        """Name in the file -> module of a package that it stands for, or may."""

    def _use(self, node: ast.AST, package: str, kind: Kind, name: str) -> None:
        self.found.append(Use(self.file, getattr(node, "lineno", 1), package, kind, name))

    def _symbol(self, node: ast.AST, module: str, name: str) -> None:
        if module.partition(".")[0] in self.packages:
            self._use(node, module.partition(".")[0], "symbol", f"{module}:{name}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._symbol(node, alias.name, "")
            if alias.asname:
                self.modules[alias.asname] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for alias in node.names:
            self._symbol(node, module, alias.name)
            if module.partition(".")[0] in self.packages:
                self.modules[alias.asname or alias.name] = f"{module}.{alias.name}"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not any(self._left_out(each) for each in node.decorator_list):
            self._of_engine(node.name.rpartition("_")[2], node)

    def _left_out(self, decorator: ast.expr) -> bool:
        """Whether a mark says that a test is not for this engine: another's, or of what this one lacks."""
        if not isinstance(decorator, ast.Call) or _called(decorator) not in ("engine", "lacks"):
            return False
        return (_text(decorator.args[:1]) == self.engine) is (_called(decorator) == "lacks")

    def visit_Assign(self, node: ast.Assign) -> None:
        self._of_engine(node.targets[0].id if isinstance(node.targets[0], ast.Name) else "", node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        name = node.name.lower()
        self._of_engine(next((engine for engine in FLAG_FILES if name.startswith(engine)), ""), node)

    def _of_engine(self, name: str, node: ast.AST) -> None:
        """What stands in an engine's own class, function or constant is that engine's, and looked up for it alone."""
        if name.lower() in FLAG_FILES and name.lower() != self.engine:
            return
        outer, self.in_engine = self.in_engine, self.in_engine or name.lower() == self.engine
        self.generic_visit(node)
        self.in_engine = outer

    def visit_Call(self, node: ast.Call) -> None:
        if _called(node) in ("import_module", "importorskip") and (name := _text(node.args[:1])):
            self._symbol(node, name, "")
        if _called(node) in ("request", "post") and (name := _text(node.args[:1])) and PATH.fullmatch(name):
            self._use(node, self.package, "path", name.partition("?")[0])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = node.value
        if (
            isinstance(value, ast.Call)
            and _called(value) == "import_module"
            and (name := _text(value.args[:1]))
        ):
            self._symbol(node, name, node.attr)
        elif isinstance(value, ast.Name) and value.id in self.modules:
            # Of a class this says nothing: it is looked up only where it turns out to be a module.
            self._symbol(node, self.modules[value.id], node.attr)
        elif (key := _chain(node)) and KEY.fullmatch(key):
            self._use(node, "verl", "key", key)
            return  # what it is a part of is not used by itself
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str):
            return
        # A file of the harness names programs' options that are no engine's.
        if FLAG.fullmatch(node.value) and (self.in_engine or not self.file.startswith("src/")):
            self._use(node, self.package, "flag", node.value)
        elif (found := VARIABLE.fullmatch(node.value)) and found[1].lower() in self.packages:
            self._use(node, found[1].lower(), "variable", node.value)
        elif (found := KEY.fullmatch(node.value)) and (found[1] or found[3]):
            self._key(node, found)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key in node.keys:
            # Elsewhere a text without a value may as well be a file's name.
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                found = KEY.fullmatch(key.value)
                if found and not (found[1] or found[3]):
                    self._key(key, found)
        self.generic_visit(node)

    def _key(self, node: ast.Constant, found: re.Match[str]) -> None:
        # What is added must have somewhere to be added to; an f-string's text ends before the name that varies.
        whole = not found[1].startswith("+") or found[3] == "."
        self._use(node, "verl", "key", found[2] if whole else found[2].rpartition(".")[0])


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _chain(node: ast.expr) -> str:
    """`a.b` of `config.a.b`, where `config` is a composed configuration."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    # A dictionary's own methods are no keys.
    names = names[:-1] if names and names[-1] in ("get", "items", "keys", "pop", "values") else names
    return ".".join(names) if isinstance(node, ast.Name) and node.id == CONFIGURED else ""


def _text(nodes: list[ast.expr]) -> str:
    """The text that a node is, or that an f-string begins with: the path, where what varies is the query."""
    for node in nodes:
        first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            return first.value
    return ""


# ---------------------------------------------------------------------------------------- what a wheel has


@dataclass(eq=False)
class Wheel:
    """A wheel's Python files, looked into as they are asked for."""

    version: str
    path: Path
    _modules: dict[str, _Module | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._archive = zipfile.ZipFile(self.path)
        self._names = frozenset(self._archive.namelist())

    def source(self, name: str) -> str:
        """A file's text."""
        return self._archive.read(name).decode("utf-8", "replace")

    def files(self, folder: str) -> Iterator[str]:
        """The Python files below a folder."""
        return (name for name in sorted(self._names) if name.startswith(folder) and name.endswith(".py"))

    def module(self, name: str) -> _Module | None:
        """A module by its dotted name, or None."""
        if name not in self._modules:
            base = name.replace(".", "/")
            file = next((each for each in (f"{base}/__init__.py", f"{base}.py") if each in self._names), None)
            self._modules[name] = None if file is None else _read_module(name, file, self.source(file))
        return self._modules[name]

    def is_package(self, name: str) -> bool:
        """Whether a folder of that name is there, with or without an `__init__`; or a compiled module."""
        base = name.replace(".", "/")
        return any(each.startswith((f"{base}/", f"{base}.")) for each in self._names)

    def has(self, use: Use) -> bool:
        """Whether what is used is there."""
        if use.kind == "symbol":
            module, _, name = use.name.partition(":")
            return self._has_symbol(module, name, frozenset())
        if use.kind == "variable":
            return use.name in _words(self, use.package)
        if use.kind == "key":
            return use.name in _keys(self)
        if use.kind == "path":
            return use.name in _strings(self, f"{use.package}/")
        flags = _flags(self, use.package)
        return use.name in flags or (use.name.startswith("--no-") and f"--{use.name[5:]}" in flags)

    def _has_symbol(self, module: str, name: str, seen: frozenset[str]) -> bool:
        found = self.module(module)
        if found is None:
            parent, _, last = module.rpartition(".")
            if self.is_package(module):
                return not name or self.is_package(f"{module}.{name}")
            # A class, function or constant, whose own attributes are not looked up.
            return bool(parent) and self.module(parent) is not None and self._has_symbol(parent, last, seen)
        if not name or name in found.names or self.is_package(f"{module}.{name}"):
            return True
        if found.dynamic and name in found.words:
            return True
        return any(
            self._has_symbol(star, name, seen | {module})
            for star in found.stars
            if star not in seen | {module}
        )


class _Module(NamedTuple):
    """What a module binds at its top level; `stars` are modules it takes everything of."""

    names: frozenset[str]
    stars: tuple[str, ...]
    dynamic: bool
    words: frozenset[str]


def _read_module(name: str, file: str, text: str) -> _Module:
    names: set[str] = set()
    stars = []
    package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
    for node in _top_level(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.names[0].name == "*":
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                stars.append(".".join([*above, *([node.module] if node.module else [])]))
            else:
                names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {
                each.id
                for each in ast.walk(node)
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            }
    return _Module(
        frozenset(names), tuple(stars), "__getattr__" in names, frozenset(re.findall(r"\w+", text))
    )


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, also those under a condition."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            for part in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)
        yield node


FLAG_FILES = {
    "vllm": ("vllm/engine/arg_utils.py", "vllm/entrypoints/openai/cli_args.py", "vllm/entrypoints/utils.py"),
    "sglang": ("sglang/srt/server_args.py",),
    "trtllm": (),  # in no wheel
}
"""Where an engine adds its flags to a parser."""


@cache
def _flags(wheel: Wheel, package: str) -> frozenset[str]:
    """The flags of an engine: as they are written, and those it makes of the fields of its classes of arguments."""
    flags: set[str] = set()
    for file in FLAG_FILES.get(package, ()):
        if file not in wheel._names:
            continue
        tree = ast.parse(wheel.source(file))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and FLAG.fullmatch(node.value):
                flags.add(node.value)
            if isinstance(node, ast.ClassDef) and node.name.endswith(("FrontendArgs", "ServerArgs")):
                flags |= {
                    f"--{each.target.id.replace('_', '-')}"
                    for each in node.body
                    if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
                }
    return frozenset(flags)


@cache
def _strings(wheel: Wheel, folder: str) -> frozenset[str]:
    """Text between quotes in a wheel's Python files that could be an HTTP path."""
    found: set[str] = set()
    for file in wheel.files(folder):
        found |= set(re.findall(r"""["'](/[a-z0-9_]+(?:/[a-z0-9_]+)*)["']""", wheel.source(file)))
    return frozenset(found)


@cache
def _words(wheel: Wheel, package: str) -> frozenset[str]:
    """The environment variables a package names as text: what it reads, and nothing that only looks alike."""
    found: set[str] = set()
    for file in wheel.files(f"{package}/"):
        found |= set(re.findall(rf"""["']({package.upper()}_[A-Z0-9_]+)["']""", wheel.source(file)))
        # SGLang's are attributes of a class.
        found |= set(
            re.findall(rf"^\s+({package.upper()}_[A-Z0-9_]+)\s*[:=]", wheel.source(file), re.MULTILINE)
        )
    return frozenset(found)


@cache
def _keys(wheel: Wheel) -> frozenset[str]:
    """The keys of verl's composed configuration, groups and values alike."""
    if COMPOSED not in wheel._names:
        return frozenset()
    found: set[str] = set()
    waiting: list[tuple[str, Any]] = [("", yaml.safe_load(wheel.source(COMPOSED)))]
    while waiting:
        above, value = waiting.pop()
        if isinstance(value, dict):
            inner = [(f"{above}.{key}" if above else str(key), each) for key, each in value.items()]
            found |= {key for key, _ in inner}
            waiting += inner
    return frozenset(found)


# ------------------------------------------------------------------------------------------------- together


def check(found: Iterable[Use], wheels: Mapping[str, Wheel]) -> list[str]:
    """A line for every use that its package does not have, `wheels` by import name.

    Raises:
        DrydockError: a package that is used has no wheel there.
    """
    lines = []
    for use in found:
        wheel = wheels.get(use.package)
        if wheel is None:
            raise DrydockError(f"{use.file}:{use.line} uses {use.package}, which the image does not have")
        if not wheel.has(use):
            lines.append(use.missing(wheel.version))
    return lines


def imports_of(engine: str, distribution: str) -> dict[str, str]:
    """Import name -> distribution, for an image with that engine."""
    return {**PACKAGES, IMPORTED_AS.get(engine, engine): distribution}


def summary(found: Iterable[Use], wheels: Mapping[str, Wheel]) -> dict[str, Any]:
    """How much was looked up of each package."""
    counts: dict[str, int] = dict.fromkeys(wheels, 0)
    for use in found:
        counts[use.package] += 1
    return {name: {"version": wheel.version, "uses": counts[name]} for name, wheel in wheels.items()}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Of one image: how many uses were looked up, in which versions of which packages, and a line for each missing.

    `of_the_base` are packages of a vendor's base, by their import names, with the uses that were not looked up.
    """

    uses: int
    packages: dict[str, Any]
    missing: list[str]
    of_the_base: dict[str, int] = field(default_factory=dict)

    @property
    def aside(self) -> str:
        """What was not looked up, as the end of a line; nothing of an image without a vendor's base."""
        return "".join(
            f"; not looked up: {name} is the base's ({count} uses)"
            for name, count in self.of_the_base.items()
        )


def look_up(image: Image, store: Store, against: Iterable[str] = ()) -> Answer:
    """Look everything that the tiers use up in the image's locked wheels.

    Parameters:
        against: `PACKAGE==VERSION`, to look into that release instead.

    Raises:
        DrydockError: no package of the image is named so, or a wheel cannot be had.
    """
    locked = {package.name: package.wheel for package in read_pylock(image).packages}
    imports = imports_of(image.engine_name, image.engine.distribution)
    artifacts = {
        name: locked[distribution] for name, distribution in imports.items() if distribution in locked
    }
    for text in against:
        package, _, version = text.partition("==")
        names = [name for name, distribution in imports.items() if distribution == package]
        if not names or not version:
            raise DrydockError(f"--against {text}: write one of {', '.join(imports.values())} and ==VERSION")
        artifacts[names[0]] = one_wheel(image, read_indexes(os.environ), package, version)
    get_artifacts(store, list(artifacts.values()))
    wheels = {
        name: Wheel(artifact.version, store.path(artifact.sha256)) for name, artifact in artifacts.items()
    }
    found = uses(image.root, image.engine_name)
    given = [
        name
        for name, distribution in imports.items()
        if name not in wheels and distribution in image.provides
    ]
    used = [use for use in found if use.package not in given]
    # First, since it is what says of a package that the image has none.
    missing = check(used, wheels)
    return Answer(
        uses=len(used),
        packages=summary(used, wheels),
        missing=missing,
        of_the_base={name: sum(use.package == name for use in found) for name in given},
    )

"""Python locks: uv resolves for the image's platform, drydock keeps the one wheel that the image installs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import tomli_w
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name
from packaging.version import Version
from uv import find_uv_bin

from drydock.declared import metadata_of, requirements_of
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.fetch import fetch
from drydock.indexes import Indexes, file_path, redact, uv_arguments
from drydock.locks import (
    Artifact,
    File,
    environment_marker,
    platform,
    platform_tags,
    resolution_inputs,
    sha256_json,
    wheel_rank,
    write_lock,
)
from drydock.sdist import build_wheel
from drydock.store import Store

NO_PACKAGES: Mapping[str, str] = {}


def lock_image(
    image: Image,
    store: Store,
    indexes: Indexes,
    keep: Mapping[str, str] = NO_PACKAGES,
) -> dict[str, Any]:
    """Resolve an image and write its `lock/pylock.<image>.toml`.

    Parameters:
        keep: normalized name -> version that must not move if it still fits; what `lock` reads from the
            lock that is there, less what is upgraded.

    Returns:
        The lock as written.

    Raises:
        DrydockError: nothing satisfies what is asked for, or a package has no artifact for the platform.
    """
    resolved = _compile(
        image,
        indexes,
        requirements=[
            text
            for text in image.engine.requirements
            if canonicalize_name(Requirement(text).name) not in image.provides
        ],
        keep=keep,
        source_only=list(image.engine.source_builds),
    )
    tags = platform_tags(image)
    packages = []
    for entry in sorted(resolved, key=lambda entry: str(entry["name"])):
        if entry["name"] in image.engine.source_builds:
            packages.append(_built_package(image, store, indexes, entry))
        else:
            wheel = _file(_best_wheel(entry, tags, image.name), "wheels", indexes)
            packages.append({"name": entry["name"], "version": entry["version"], "wheels": [wheel]})
    if image.vendor:
        _check_given(image, store, indexes, packages)
    data = {
        "lock-version": "1.0",
        "created-by": "drydock",
        "requires-python": f"=={image.definition.python}.*",
        "environments": [environment_marker(image)],
        "packages": packages,
        "tool": {
            "drydock": {
                "image": image.locked_as,
                "platform": platform(image),
                "python": image.definition.python,
                "inputs": sha256_json(resolution_inputs(image)),
            }
        },
    }
    write_lock(image.pylock_path, data)
    return data


def _check_given(image: Image, store: Store, indexes: Indexes, packages: Sequence[Mapping[str, Any]]) -> None:
    """Compare what the locked packages ask for with what the vendor's image holds, which the resolver took as given.

    Raises:
        DrydockError: they do not fit, and no override says that this is meant.
    """
    assert image.vendor
    given = {name: Version(version) for name, version in image.provides.items()}
    wheels = [
        File.model_validate(entry["wheels"][0]).artifact("wheel", str(entry["name"]), str(entry["version"]))
        for entry in packages
    ]
    fetch(store, [wheel for wheel in wheels if not store.has(wheel.sha256, wheel.size)], indexes, {})
    extras: dict[str, set[str]] = {
        canonicalize_name(requirement.name): requirement.extras
        for requirement in map(Requirement, image.engine.requirements)
    }
    problems = []
    for wheel in wheels:
        for requirement in requirements_of(
            metadata_of(store.path(wheel.sha256)), image, extras.get(wheel.name, set())
        ):
            name = canonicalize_name(requirement.name)
            if name not in given or name in image.engine.overrides:
                continue
            if not requirement.specifier.contains(given[name], prereleases=True):
                problems.append(
                    f"{wheel.name} {wheel.version} asks for {requirement.name}{requirement.specifier} and "
                    f"{image.vendor.repository} {image.vendor.version} holds {given[name]}"
                )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DrydockError(
            f"{image.name}: {problems[0]}{more}: take another release, or add the package that is held to overrides "
            "with that version and a reason"
        )


def one_wheel(image: Image, indexes: Indexes, name: str, version: str) -> Artifact:
    """The wheel of one release that an image would take, whatever it requires.

    Raises:
        DrydockError: the index has no such release, or no wheel of it for the image.
    """
    wanted = f"{name}=={version}"
    (entry,) = _compile(image, indexes, [wanted], keep={}, source_only=[], alone=True)
    file = _file(_best_wheel(entry, platform_tags(image), image.name), "wheels", indexes)
    return File.model_validate(file).artifact("wheel", name, version)


def _compile(
    image: Image,
    indexes: Indexes,
    requirements: list[str],
    keep: Mapping[str, str],
    source_only: list[str],
    anything: bool = False,
    alone: bool = False,
) -> list[dict[str, Any]]:
    """Run `uv pip compile` for the image's platform and return the packages of the pylock it makes.

    `anything` resolves for any platform: a build environment runs on whatever machine builds. `alone` leaves out
    what the requirements require.
    """
    engine = image.engine
    with tempfile.TemporaryDirectory(prefix="drydock-resolve-") as folder:
        work = Path(folder)
        (work / "requirements.in").write_text("".join(f"{line}\n" for line in requirements))
        (work / "overrides.txt").write_text(
            "".join(f"{name}=={entry.version}\n" for name, entry in engine.overrides.items())
        )
        # What the base holds is not resolved: its versions are given, and `_check_given` says whether they fit.
        left_out = [*engine.exclusions, *image.provides]
        (work / "excludes.txt").write_text("".join(f"{name}\n" for name in left_out))
        output = work / "pylock.toml"
        arguments = [
            find_uv_bin(), "pip", "compile", "--no-header", "--no-annotate",
            # Any interpreter will do to resolve for another version; uv would look for that version first.
            "--python", sys.executable, "--no-python-downloads",
            "--python-version", image.definition.python,
            "--only-binary", ":all:",
            "--format", "pylock.toml", "--output-file", output.name, "--quiet",
        ]  # fmt: skip
        arguments += [] if anything else ["--python-platform", platform(image)]
        for name in source_only:
            arguments += ["--no-binary", name]
        arguments += ["--no-deps"] if alone else []
        if engine.overrides and not alone:
            arguments += ["--override", "overrides.txt"]
        if left_out:
            arguments += ["--excludes", "excludes.txt"]
        arguments += ["--prerelease", "if-necessary-or-explicit"]
        index_arguments, index_environment = uv_arguments(indexes)
        environment = {**os.environ, **index_environment}

        def run(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*arguments, *index_arguments, *more, "requirements.in"],
                cwd=work, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip

        done = None
        keep = still_asked_for(keep, requirements)
        if keep:
            (work / "kept.txt").write_text("".join(f"{name}=={version}\n" for name, version in keep.items()))
            done = run("--constraint", "kept.txt")
            if done.returncode:
                # A definition that changed may not fit all of what was locked: then uv keeps what it can,
                # as it does for the versions of an output file that is there already.
                pins = [{"name": name, "version": version} for name, version in sorted(keep.items())]
                output.write_text(
                    tomli_w.dumps({"lock-version": "1.0", "created-by": "drydock", "packages": pins})
                )
        if done is None or done.returncode:
            done = run()
        if done.returncode:
            raise DrydockError(f"{image.name} does not resolve: {_reason(done.stderr)}")
        packages: list[dict[str, Any]] = tomllib.loads(output.read_text())["packages"]
        return packages


def still_asked_for(keep: Mapping[str, str], requirements: list[str]) -> dict[str, str]:
    """What was locked, without the versions that the definition itself no longer takes."""
    asked: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, requirements):
        asked.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return {
        name: version
        for name, version in keep.items()
        if all(each.specifier.contains(version, prereleases=True) for each in asked.get(name, ()))
    }


def _reason(said: str) -> str:
    """uv's explanation on one line."""
    words = " ".join(said.replace("╰─▶", " ").replace("×", " ").split())
    return words.removeprefix("error: ")[:1500] or "uv gave no reason"


def _file(entry: Mapping[str, Any], folder: str, indexes: Indexes) -> dict[str, Any]:
    """A file of uv's pylock as drydock's: a path into the store where uv has the address of an index."""
    address = str(entry.get("url") or entry["path"])
    filename = unquote(urlsplit(address).path.rpartition("/")[2])
    size = entry["size"] if "size" in entry else _measure(address, indexes)
    return {"path": f"{folder}/{filename}", "size": size, "hashes": {"sha256": entry["hashes"]["sha256"]}}


def _measure(address: str, indexes: Indexes) -> int:
    """The size in bytes of a file whose index does not tell it (one without PEP 700, or a folder)."""
    local = file_path(address) or (None if "://" in address else Path(address))
    if local:
        return local.stat().st_size
    try:
        answer = httpx.head(
            address, verify=indexes.tls(), auth=indexes.auth_for(address), follow_redirects=True
        )
        return int(answer.raise_for_status().headers["content-length"])
    except (httpx.HTTPError, KeyError) as error:
        raise DrydockError(
            f"the index gives no size for {redact(address)} ({error}): lock against one that serves PEP 700 metadata"
        ) from error


def _best_wheel(entry: Mapping[str, Any], tags: dict[Tag, int], image: str) -> Mapping[str, Any]:
    ranked = []
    for wheel in entry.get("wheels", ()):
        filename = unquote(urlsplit(wheel.get("url") or wheel["path"]).path.rpartition("/")[2])
        rank = wheel_rank(filename, tags)
        if rank is not None:
            ranked.append((rank, filename, wheel))
    if not ranked:
        raise DrydockError(
            f"{entry['name']} {entry['version']} has no wheel for {image}: add it to source-builds with a reason, "
            "or override it with a version that has one"
        )
    best: Mapping[str, Any] = min(ranked, key=lambda found: found[:2])[2]
    return best


def _built_package(image: Image, store: Store, indexes: Indexes, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Lock a package without a wheel: fetch its sdist and build environment, build it, lock the result."""
    name, version = str(entry["name"]), str(entry["version"])
    if "sdist" not in entry:
        raise DrydockError(f"{name} {version} has no sdist to build from: remove it from source-builds")
    sdist = _file(entry["sdist"], "sdists", indexes)
    requires = [
        {
            "name": canonicalize_name(str(tool["name"])),
            "version": tool["version"],
            "wheel": _pure_wheel(tool, indexes),
        }
        for tool in _compile(
            image,
            indexes,
            list(image.engine.source_builds[name].build_requires),
            NO_PACKAGES,
            [],
            anything=True,
        )
    ]
    artifacts = [
        Artifact(
            kind="sdist",
            name=name,
            version=version,
            filename=sdist["path"].rpartition("/")[2],
            sha256=sdist["hashes"]["sha256"],
            size=sdist["size"],
        )
    ] + [
        Artifact(
            kind="wheel",
            name=tool["name"],
            version=tool["version"],
            filename=tool["wheel"]["path"].rpartition("/")[2],
            sha256=tool["wheel"]["hashes"]["sha256"],
            size=tool["wheel"]["size"],
        )
        for tool in requires
    ]
    fetch(store, artifacts, indexes, {})
    filename, data = build_wheel(store, artifacts[0], artifacts[1:])
    digest = store.put(data)
    store.link(digest, store.root / "wheels" / filename)
    return {
        "name": name,
        "version": version,
        "wheels": [{"path": f"wheels/{filename}", "size": len(data), "hashes": {"sha256": digest}}],
        "tool": {"drydock": {"sdist": sdist, "build-requires": requires}},
    }


def _pure_wheel(entry: Mapping[str, Any], indexes: Indexes) -> dict[str, Any]:
    for wheel in entry.get("wheels", ()):
        file = _file(wheel, "wheels", indexes)
        if file["path"].endswith("-none-any.whl"):
            return file
    raise DrydockError(f"the build requirement {entry['name']} has no pure wheel: choose another version")

"""What `nox -s <engine>_<profile>` does: the image for the hardware found, verified, then its tiers inside it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from drydock.definition import Image
from drydock.errors import CheckFailed, DrydockError
from drydock.hardware import gpus_here, hardware_here
from drydock.runtime import CHECKOUT, RESULTS, Task, choose, inside

TIERS = ("rollout",)
"""Folders under `tests/`, in the order they run."""


def run_tiers(root: Path, arguments: argparse.Namespace) -> None:
    """Build or reuse the image, verify it inside, run its tiers inside.

    Raises:
        CheckFailed: the image differs from its lock, or a test failed.
        DrydockError: the hardware asked for is not here, or the image cannot be built or run.
    """
    results = root / "results" / f"{arguments.engine}_{arguments.profile}"
    results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if inside():
        _run_here(root, results, arguments)
    else:
        _run_in_image(root, results, arguments)
    print(f"{arguments.engine}_{arguments.profile}: passed in {time.monotonic() - began:.0f} s", flush=True)


def _pytest(arguments: argparse.Namespace, checkout: str, results: str) -> list[str]:
    tiers = [arguments.tier] if arguments.tier else list(TIERS)
    return [
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider",
        f"--rootdir={checkout}", "-c", f"{checkout}/pyproject.toml",
        f"--junitxml={results}/junit.xml",
        *([] if not arguments.keyword else ["-k", arguments.keyword]),
        *(f"{checkout}/tests/{tier}" for tier in tiers),
    ]  # fmt: skip


def _environment(checkout: str, results: str) -> dict[str, str]:
    # No bytecode of ours beside the image's library: it would be a stray to the next verification.
    return {"PYTHONPATH": f"{checkout}/src", "PYTHONDONTWRITEBYTECODE": "1", "DRYDOCK_RESULTS": results}


def _run_here(root: Path, results: Path, arguments: argparse.Namespace) -> None:
    environment = {**os.environ, **_environment(str(root), str(results))}
    for step, command in (
        ("verification", ["python", "-m", "drydock.verify"]),
        ("the tiers", _pytest(arguments, str(root), str(results))),
    ):
        if subprocess.run(command, env=environment, check=False).returncode:
            raise CheckFailed(f"{step} failed")


def _run_in_image(root: Path, results: Path, arguments: argparse.Namespace) -> None:
    from drydock.build import build
    from drydock.cli import get_artifacts, open_store

    hardware = arguments.hardware or hardware_here(root)
    image = Image.named(root, f"{hardware}-{arguments.engine}")
    if image.definition.accelerator.kind == "cuda" and not gpus_here():
        raise DrydockError(
            f"{image.name} needs an NVIDIA GPU and this machine shows none: run it where there is one, "
            "or name --hardware cpu"
        )
    store = open_store(root)
    built, seconds = build(image, store, lambda artifacts: get_artifacts(store, artifacts))
    made = sum(layer.made for layer in built.layers)
    print(
        f"{image.name} sha256:{built.digest}, {made} of {len(built.layers)} layers made, {seconds:.1f} s",
        flush=True,
    )
    runtime = choose(arguments.runtime)
    began = time.monotonic()
    runtime.prepare(store, built)
    print(f"{runtime.name}: ready after {time.monotonic() - began:.1f} s", flush=True)
    gpus = image.definition.accelerator.kind == "cuda"
    for step, command in (
        ("verification", ["python", "-m", "drydock.verify"]),
        ("the tiers", _pytest(arguments, CHECKOUT, RESULTS)),
    ):
        task = Task(
            command=tuple(command),
            checkout=root,
            results=results,
            environment=_environment(CHECKOUT, RESULTS),
            gpus=gpus,
        )
        began = time.monotonic()
        status = runtime.run(store, built, task)
        print(f"{step} in {runtime.name}: {time.monotonic() - began:.1f} s, status {status}", flush=True)
        if status:
            raise CheckFailed(
                f"{step} of {image.name} failed in {runtime.name} (status {status}); see {results}"
            )


def main() -> None:
    """`python -m drydock.session ENGINE PROFILE [options]`."""
    from drydock.cli import project_root

    parser = argparse.ArgumentParser(
        prog="nox -s ENGINE_PROFILE --", description="Run an engine's tiers in its image."
    )
    parser.add_argument("engine", help=argparse.SUPPRESS)
    parser.add_argument("profile", choices=["fast"], help=argparse.SUPPRESS)
    parser.add_argument("--hardware", help="cpu, h100 or gb200; what this machine has by default")
    parser.add_argument("--runtime", choices=["auto", "docker", "chroot"], default="auto")
    parser.add_argument("--tier", choices=TIERS, help="one tier; all by default")
    parser.add_argument("-k", dest="keyword", help="pytest's -k")
    arguments = parser.parse_args()
    try:
        run_tiers(project_root(), arguments)
    except DrydockError as error:
        print(f"drydock: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()

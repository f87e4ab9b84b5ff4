"""`nox -s <engine>_<profile>`: the image for the hardware found, verified, its tiers run inside it, a report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from drydock.definition import Image
from drydock.errors import CheckFailed, DrydockError
from drydock.hardware import hardware_here, used_here, variant_here
from drydock.oci import Built, read_image
from drydock.project import get_artifacts, open_store, project_root
from drydock.runtime import CHECKOUT, MANIFEST, RESULTS, Runtime, Task, choose, ending_signals, inside
from drydock.store import Store
from drydock.tiers.budgets import session_ceiling
from drydock.tiers.device import CPU, Device, device_for
from drydock.tiers.profiles import kind_of

TIERS = ("rollout", "trainer", "eplb")
"""Folders under `tests/`, in the order they run."""
NOT_OF = {
    "trtllm": {
        "eplb": "TensorRT-LLM plans its experts in compiled code, which no wheel has and no test of ours knows"
    }
}
"""Engine -> a tier that it has not, and why."""
PROFILES = ("fast", "full")
INPUTS = {"gsm8k_model": "/inputs/gsm8k-model", "gsm8k_data": "/inputs/gsm8k-data"}
"""Option -> where what it names is seen in the image."""
PATIENCE = 60.0
"""Seconds past the session's ceiling after which its command is ended from outside. The tiers end by themselves
long before; this is for a watchdog that hangs itself."""
SOON = 0.5
"""Seconds into the verification before what the first tier runs in is made ready: as a rule it has its own by then."""
SETTLE = 5.0
"""Seconds into a tier before the report of what ran before it is written: its start is not to be slowed."""


class OutOfTime(SystemExit):
    """The session's command did not end in time; unwinds as ctrl-C does."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the session's commands run: an image in a runtime, or this very process's surroundings.

    `device` and `machine` are what the image is made for; no `machine` is this one. `checkout` and `results` are the
    folders as seen there, `inputs` the options' paths as seen there. `ahead` makes ready what the next command can use,
    `dismiss` takes it back.
    """

    runtime: str
    image: dict[str, Any]
    device: Device
    checkout: str
    results: str
    inputs: dict[str, str]
    verify: list[str]
    run: Callable[[list[str], dict[str, str]], int]
    ahead: Callable[[], None] = lambda: None
    dismiss: Callable[[], None] = lambda: None
    machine: str = ""


@dataclass(kw_only=True)
class Record:
    """What the session has seen so far; `document()` is the report's input at any time.

    `clock` is when the image was there and the session proper began: budgets are for what runs in the image,
    not for how much of it this machine had to build or load. `running` is the tier that has not ended.
    `commit` and `device` are asked once, since a document is made for each tier.
    """

    options: argparse.Namespace
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    tiers: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)
    verification: dict[str, Any] | None = None
    ceiling: float | None = None
    detail: str = ""
    running: str = ""
    commit: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.options.engine}_{self.kind.replace('-', '_')}"

    @property
    def kind(self) -> str:
        return kind_of(self.options.profile, self.options.cpu_part)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step of the session."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.steps.append({"name": name, "seconds": round(time.monotonic() - began, 3)})

    def failures(self) -> list[str]:
        """One line for everything that keeps this session from having passed."""
        lines = [self.detail] if self.detail else []
        lines += [f"this is not its end: the {self.running} tier was running"] if self.running else []
        lines += [f"{tier['tier']}: {tier['detail']}" for tier in self.tiers if tier["outcome"] != "passed"]
        if not lines and not any(
            test["outcome"] == "passed" for tier in self.tiers for test in tier["tests"]
        ):
            lines.append("no test ran")
        return lines

    def document(self, place: Place) -> dict[str, Any]:
        """The session's document, for the report."""
        seconds = time.monotonic() - self.clock
        tested = sum(tier["seconds"] for tier in self.tiers)
        failures = self.failures()
        return {
            "schema": 1,
            "session": self.name,
            "engine": self.options.engine,
            "profile": self.kind,
            "image": place.image,
            "drydock": self.commit,
            "began": self.began.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": round(seconds, 3),
            "outcome": "failed" if failures else "passed",
            "detail": "; ".join(failures),
            "runtime": place.runtime,
            "device": self.device,
            "verification": self.verification,
            "drift_allowed": self.options.allow_drift,
            "steps": self.steps,
            "overhead_seconds": round(seconds - tested, 3),
            "budget": None if self.ceiling is None else {"ceiling": self.ceiling},
            "tiers": self.tiers,
            "not_run": self.not_run,
        }


def run_session(root: Path, options: argparse.Namespace) -> None:
    """Build or reuse the image, verify it inside, run its tiers inside, write the report.

    Raises:
        CheckFailed: the image differs from its lock, a test failed, or a budget was not kept.
        DrydockError: the hardware asked for is not here, or the image cannot be built or run.
    """
    record = Record(options=options)
    manifest = json.loads(MANIFEST.read_text()) if inside() else None
    if options.digest and not manifest:
        raise DrydockError("--digest is of the image that this runs in, and this is none: leave it out")
    name = manifest["image"] if manifest else _image_name(root, options)
    if not options.unbudgeted:
        # Before minutes of building: without budgets nothing runs.
        budgets = root / "tests" / "budgets.toml"
        record.ceiling = session_ceiling(budgets, name, record.kind, _chosen(options))
    folder = _new_folder(root / "results" / record.name, record.began)
    if manifest:
        place = _inside(root, folder, manifest, options)
    elif options.runtime == "here":
        place = _in_place(root, folder, name, options)
    else:
        place = _place(root, name, folder, record)
    record.clock = time.monotonic()
    record.commit = _commit(root)
    record.device = used_here(CPU if options.cpu_part else place.device, place.machine)
    # Around all of it, and not just what a runtime runs: a signal between two tiers ends in a report too.
    with ending_signals():
        try:
            with _deadline(record.ceiling):
                _run(folder, place, record)
        except OutOfTime:
            record.detail = (
                f"ended from outside {PATIENCE:.0f} s after its ceiling of {record.ceiling:.0f} s: "
                "the tier's own watchdog did not end it"
            )
        except (KeyboardInterrupt, SystemExit):
            record.detail = "interrupted"
            raise
        finally:
            try:
                _report(folder, place, record)
            finally:
                place.dismiss()
    if failures := record.failures():
        raise CheckFailed(f"{record.name} failed: {failures[0]}")


def _image_name(root: Path, options: argparse.Namespace) -> str:
    """The engine's image for the hardware that is asked for or here; of a base in variants, the one for its chips."""
    name = f"{options.hardware or hardware_here(root)}-{options.engine}"
    return name + variant_here(Image.named(root, name).definition)


def _chosen(options: argparse.Namespace) -> list[str]:
    not_of = NOT_OF.get(options.engine, {})
    if options.tier in not_of:
        raise DrydockError(f"{options.engine} has no {options.tier} tier: {not_of[options.tier]}")
    return [options.tier] if options.tier else [tier for tier in TIERS if tier not in not_of]


def _run(folder: Path, place: Place, record: Record) -> None:
    chosen = _chosen(record.options)
    reasons = NOT_OF.get(record.options.engine, {})
    record.not_run += [
        {"what": f"the {tier} tier", "reason": reasons.get(tier, f"only {chosen[0]} was asked for (--tier)")}
        for tier in TIERS
        if tier not in chosen
    ]
    if record.options.cpu_part:
        record.not_run.append(
            {"what": "what needs an accelerator", "reason": "only the rest was asked for (--cpu-part)"}
        )
    with record.step("verification"), _later(SOON, place.ahead):
        document = f"{place.results}/verification.json"
        status = place.run(["python", "-m", "drydock.verify", *place.verify, "--document", document], {})
    with contextlib.suppress(OSError, ValueError):
        record.verification = json.loads((folder / "verification.json").read_text())
    differs = record.verification is not None and record.verification.get("verdict") == "drift"
    if status and not (differs and record.options.allow_drift):
        record.detail = f"the image is not what its lock says (verification ended with status {status})"
        record.not_run += [{"what": f"the {tier} tier", "reason": "verification failed"} for tier in chosen]
        return
    for tier in chosen:
        ended: int | None = None
        record.running = tier
        try:
            with record.step(tier), _meanwhile(folder, place, record, last=tier == chosen[-1]):
                ended = place.run(*_pytest(tier, place, record))
        finally:
            # Also of a tier that was broken off, and what of it ran.
            record.tiers.append(_tier_document(folder, tier, ended, record))
            record.running = ""


def _pytest(tier: str, place: Place, record: Record) -> tuple[list[str], dict[str, str]]:
    options = record.options
    command = [
        "python", "-m", "pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider",
        "-p", "drydock.tiers.plugin",
        f"--rootdir={place.checkout}", "-c", f"{place.checkout}/pyproject.toml",
        f"--tier={tier}", f"--profile={options.profile}", f"--image={place.image['name']}",
        f"--engine={options.engine}", f"--accelerator={'none' if place.device is CPU else place.device.kind}",
        f"--results={place.results}",
        *(["--cpu-part"] if options.cpu_part else []),
        *(["--unbudgeted"] if options.unbudgeted else []),
        *(f"--{name.replace('_', '-')}={path}" for name, path in place.inputs.items()),
        *(["-k", options.keyword] if options.keyword else []),
        f"{place.checkout}/tests/{tier}",
    ]  # fmt: skip
    if record.ceiling is not None:
        command.insert(-1, f"--session-seconds={record.ceiling - (time.monotonic() - record.clock):.1f}")
    # Of the image's packages, some bring plugins for pytest; which ones must not decide how a tier runs.
    return command, {"DRYDOCK_RESULTS": place.results, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _tier_document(folder: Path, tier: str, status: int | None, record: Record) -> dict[str, Any]:
    """The tier's document, made to tell the truth about a pytest that ended otherwise than it says."""
    ended = "was broken off" if status is None else f"ended with status {status}"
    try:
        document: dict[str, Any] = json.loads((folder / f"{tier}.json").read_text())
    except (OSError, ValueError):
        return {
            "schema": 1, "tier": tier, "profile": record.kind, "seconds": record.steps[-1]["seconds"],
            "outcome": "crashed", "detail": f"pytest {ended} and left no document",
            "complete": False, "phases": {}, "budget": None, "tests": [], "not_selected": [],
            "profile_values": [], "survivors": [],
        }  # fmt: skip
    if record.options.keyword and not document["tests"] and document["not_selected"]:
        record.not_run.append({"what": f"the {tier} tier", "reason": "-k selects nothing in it"})
        document |= {"outcome": "passed", "detail": ""}
    elif status != 0 and document["outcome"] == "passed":
        document |= {"outcome": "failed", "detail": f"pytest {ended}"}
    return document


@contextlib.contextmanager
def _meanwhile(folder: Path, place: Place, record: Record, last: bool) -> Iterator[None]:
    """While a tier runs, make ready what the next one runs in, and write the report of what ran before.

    The report is what is left of a session that is killed, can be read while a long one runs, and loads what takes a
    second (matplotlib) and draws what is known, which nobody then waits for at the end.
    """
    document = record.document(place)

    def beside() -> None:
        from drydock.report import write

        if not last:
            place.ahead()
        # What is wrong with the folder is said at the end.
        with contextlib.suppress(DrydockError):
            write(document, folder, quiet=True)

    with _later(SETTLE, beside):
        yield


@contextlib.contextmanager
def _later(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call it beside what is inside, if that takes so long."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _report(folder: Path, place: Place, record: Record) -> None:
    from drydock.report import summary, write

    with record.step("report"):
        write(record.document(place), folder)
    # Once more, with the report's own time in it; only the JSON, since the page takes most of it.
    document = record.document(place)
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    # In one step: another session may do the same now, on other devices of this machine.
    link = folder / ".latest"
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")
    summary(document, folder)


def _inputs(options: argparse.Namespace) -> dict[str, Path]:
    """The files and folders that options name, absolute, which must be there."""
    given = {name: getattr(options, name) for name in INPUTS if getattr(options, name)}
    for name, path in given.items():
        if not path.exists():
            raise DrydockError(f"--{name.replace('_', '-')}: {path} is not there")
    return {name: path.absolute() for name, path in given.items()}


def _place(root: Path, name: str, folder: Path, record: Record) -> Place:
    # Not at the top: an image, in which a session may run too, does not hold what speaks with registries.
    from drydock.vendor import have_layers

    given = _inputs(record.options)
    image = Image.named(root, name)
    kind = image.definition.accelerator.kind
    device = _need_device(image, record.options)
    store = open_store(root)
    runtime = choose(record.options.runtime)
    with record.step("image"):
        built = _prebuilt(image, store, runtime) if record.options.prebuilt else _built(image, store)
    print(f"{image.name} sha256:{built.digest}, {record.steps[-1]['seconds']:.1f} s", flush=True)
    with record.step("runtime"):
        have_layers(store, image, built, os.environ)
        runtime.prepare(store, built)
        # What was loaded or unpacked is gigabytes in memory that the kernel is still to write: on a slow disk that
        # takes a minute, in which a server's start waits for every file and is over its budget.
        os.sync()
    print(f"{runtime.name}: ready after {record.steps[-1]['seconds']:.1f} s", flush=True)

    def task(command: list[str], environment: dict[str, str]) -> Task:
        # Of an image for NPUs, CANN's own modules are there.
        ours = _environment(CHECKOUT, built.environment.get("PYTHONPATH", ""))
        return Task(
            command=tuple(command),
            checkout=root,
            results=folder,
            inputs={INPUTS[name]: path for name, path in given.items()},
            environment={**ours, **environment},
            accelerator="none" if record.options.cpu_part else kind,
        )

    return Place(
        runtime=runtime.name,
        image={
            "name": image.name,
            "digest": f"sha256:{built.digest}",
            "config_digest": f"sha256:{built.config_digest}",
        },
        device=device,
        checkout=CHECKOUT,
        results=RESULTS,
        inputs={name: INPUTS[name] for name in given},
        verify=[],
        run=lambda command, environment: runtime.run(store, built, task(command, environment)),
        ahead=lambda: runtime.ahead(built, task([], {})),
        dismiss=runtime.dismiss,
        machine=image.machine,
    )


def _prebuilt(image: Image, store: Store, runtime: Runtime) -> Built:
    """The image that is recorded, from where it is: the runtime, the store or a registry. One that nobody recorded
    is the store's.

    Raises:
        DrydockError: it is in none of them.
    """
    # Not at the top either.
    from drydock.publish import VARIABLE
    from drydock.published import read_records

    recorded = read_records(image.root).get(image.name)
    if recorded is None:
        return read_image(store, image.name, whole=False)
    if held := runtime.held(image.name, recorded):
        return held
    there = store.read_record("images", image.name)
    if there and f"sha256:{there['digest']}" == recorded["digest"]:
        return read_image(store, image.name, whole=False)
    if not os.environ.get(VARIABLE):
        holds = f"holds sha256:{there['digest'][:12]}" if there else "holds none"
        raise DrydockError(
            f"{image.name} is recorded as {recorded['digest'][:19]} and {store.root} {holds}: set {VARIABLE} to who "
            f"has it, or run `drydock build {image.name}`"
        )
    return runtime.pull(image, store, recorded)


def _built(image: Image, store: Store) -> Built:
    from drydock.build import build

    return build(image, store, lambda artifacts: get_artifacts(store, artifacts))[0]


def _inside(root: Path, folder: Path, manifest: dict[str, Any], options: argparse.Namespace) -> Place:
    """Already inside an image, as in a CI job that runs in its container."""
    device = device_for(manifest["accelerator"]["kind"])
    place = _surroundings(root, folder, "inside", manifest["image"], device, _inputs(options), [])
    return replace(place, image=place.image | {"digest": options.digest})


def _in_place(root: Path, folder: Path, name: str, options: argparse.Namespace) -> Place:
    """In an environment that somebody else made, compared with the image's lock as far as that goes."""
    image = Image.named(root, name)
    device = _need_device(image, options)
    return _surroundings(
        root, folder, "in place", name, device, _inputs(options), ["--here", str(root), name]
    )


def _surroundings(
    root: Path,
    folder: Path,
    runtime: str,
    name: str,
    device: Device,
    inputs: dict[str, Path],
    verify: list[str],
) -> Place:
    def run(command: list[str], environment: dict[str, str]) -> int:
        ours = _environment(str(root), os.environ.get("PYTHONPATH", ""))
        variables = {**os.environ, **ours, **environment}
        # In place there may be no `python` on the path.
        command = [sys.executable, *command[1:]] if command[0] == "python" else command
        return subprocess.run(command, env=variables, check=False).returncode

    return Place(
        runtime=runtime,
        image={"name": name, "digest": None, "config_digest": None},
        device=device,
        checkout=str(root),
        results=str(folder),
        inputs={name: str(path) for name, path in inputs.items()},
        verify=verify,
        run=run,
    )


def _need_device(image: Image, options: argparse.Namespace) -> Device:
    """What the image is made for, of which there is to be one here."""
    device = device_for(image.definition.accelerator.kind)
    if device is not CPU and not options.cpu_part and not device.usable():
        raise DrydockError(
            f"{image.name} needs an {device.maker} {device.word} and "
            f"{f'{device.visible} leaves' if device.here() else 'this machine shows'} none: run it where there "
            "is one, add --cpu-part for the tests that need none, or name --hardware cpu"
        )
    return device


def _environment(checkout: str, below: str) -> dict[str, str]:
    """What the session's commands get: ours before the PYTHONPATH that is there."""
    # No bytecode of ours beside the image's library: it would be a stray to the next verification.
    return {"PYTHONPATH": f"{checkout}/src{below and f':{below}'}", "PYTHONDONTWRITEBYTECODE": "1"}


def _new_folder(parent: Path, began: datetime) -> Path:
    """A folder of this run's own; two that begin in the same second get two."""
    parent.mkdir(parents=True, exist_ok=True)
    name = began.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{count}" for count in range(2, 100))):
        with contextlib.suppress(FileExistsError):
            (parent / f"{name}{suffix}").mkdir()
            return parent / f"{name}{suffix}"
    raise DrydockError(f"{parent} has a hundred runs that began at {name}: is the clock standing still?")


@contextlib.contextmanager
def _deadline(ceiling: float | None) -> Iterator[None]:
    if ceiling is None:
        yield
        return

    def end(_: int, __: FrameType | None) -> NoReturn:
        raise OutOfTime(1)

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, ceiling + PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _commit(root: Path) -> dict[str, Any]:
    def git(*words: str) -> str:
        # `safe.directory`: in a CI container the checkout belongs to another user.
        command = ["git", "-c", "safe.directory=*", "-C", str(root), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def _digest(text: str) -> str:
    if not re.fullmatch("sha256:[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not sha256: and 64 digits")
    return text


def main() -> None:
    """`python -m drydock.session ENGINE PROFILE [options]`."""
    parser = argparse.ArgumentParser(
        prog="nox -s ENGINE_PROFILE --", description="Run an engine's tiers in its image."
    )
    parser.add_argument("engine", help=argparse.SUPPRESS)
    parser.add_argument("profile", choices=PROFILES, help=argparse.SUPPRESS)
    parser.add_argument("--hardware", help="cpu, h100, gb200 or ascend; what this machine has by default")
    parser.add_argument(
        "--runtime", choices=["auto", "docker", "chroot", "here"], default="auto",
        help="what the image runs in; `here` takes the environment that runs this for the image",
    )  # fmt: skip
    parser.add_argument(
        "--cpu-part", action="store_true",
        help="what needs no accelerator, in the image of one: name it with --hardware",
    )  # fmt: skip
    parser.add_argument("--tier", choices=TIERS, help="one tier; all by default")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument(
        "--gsm8k-model", type=Path, metavar="FOLDER", help="a model, for GSM8K in the full profile"
    )
    parser.add_argument(
        "--gsm8k-data", type=Path, metavar="FILE", help="GSM8K's test set, JSON lines or parquet"
    )
    parser.add_argument(
        "--prebuilt", action="store_true",
        help="take the image that lock/images.toml records, from the engine, the store or a registry; never build",
    )  # fmt: skip
    parser.add_argument(
        "--digest", type=_digest, metavar="sha256:...",
        help="inside an image, which does not know it: what it was pulled by, for the report",
    )  # fmt: skip
    parser.add_argument(
        "--allow-drift", action="store_true",
        help="go on where versions differ from the lock; the report's first line says so",
    )  # fmt: skip
    parser.add_argument(
        "--unbudgeted", action="store_true",
        help="measure without budgets, for `drydock budget propose`; a hang still ends",
    )  # fmt: skip
    options = parser.parse_args()
    try:
        run_session(project_root(), options)
    except DrydockError as error:
        print(f"drydock: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("drydock: stopped; what ran is in the report", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

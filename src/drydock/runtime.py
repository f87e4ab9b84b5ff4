"""Running a command in an image: what is run, and which means this machine has for it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, cast

from drydock.definition import MACHINES, Architecture, Image
from drydock.errors import DrydockError
from drydock.namespaces import USER_ID
from drydock.oci import Built
from drydock.store import Store, disk_errors
from drydock.tiers.device import chosen

Choice = Literal["auto", "docker", "chroot"]
User = Literal["root", "drydock"]

CHECKOUT = "/drydock"
"""Where the checkout is in the image, read-only."""
RESULTS = "/results"
"""Where the results folder is in the image."""
MANIFEST = Path("/usr/share/drydock/manifest.json")
"""What every image of drydock's carries about itself."""
EMULATORS = Path("/proc/sys/fs/binfmt_misc")
"""Where the kernel shows what it runs other architectures' programs with."""
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to run in an image.

    Parameters:
        command: program and arguments; no shell is put around them.
        checkout: folder seen read-only at `/drydock`.
        results: folder seen read-write at `/results`, made when missing.
        inputs: path in the image -> file or folder of the host's, seen there read-only.
        environment: added to the image's own; nothing of the host's goes in but TERM and, with an accelerator, which of
            them may be used (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES).
        user: `root`, or the image's ordinary user `drydock` (uid and gid 1000).
        interactive: standard input goes to the command, as a terminal when it is one.
        accelerator: `cuda` for all of the host's NVIDIA GPUs, `npu` for all of its Ascend NPUs, each with what their
            driver there brings.
        workdir: where the command starts; made when missing.
    """

    command: tuple[str, ...]
    checkout: Path
    results: Path
    inputs: dict[str, Path] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    user: User = "root"
    interactive: bool = False
    accelerator: Literal["none", "cuda", "npu"] = "none"
    workdir: str = RESULTS

    def variables(self, built: Built) -> dict[str, str]:
        """The whole environment of the command, the same in every runtime."""
        return {
            "PATH": DEFAULT_PATH,
            "HOME": "/root" if self.user == "root" else f"/home/{self.user}",
            "TERM": os.environ.get("TERM", "dumb"),
            **built.environment,
            **chosen(self.accelerator, os.environ),
            **self.environment,
        }

    def make_results(self) -> Path:
        """Make the results folder, writable for the task's user, and return its absolute path."""
        results = self.results.absolute()
        with disk_errors(results):
            fresh = not results.is_dir()
            results.mkdir(parents=True, exist_ok=True)
            if self.user == "drydock" and os.geteuid() == 0 and results.stat().st_uid == 0:
                os.chown(results, USER_ID, USER_ID)
            elif self.user == "drydock" and fresh and os.geteuid() != USER_ID:
                results.chmod(0o1777)
        return results


class Runtime(Protocol):
    """A means of running commands in images."""

    name: str

    def held(self, name: str, recorded: Mapping[str, Any]) -> Built | None:
        """The image that `lock/images.toml` records, where the runtime keeps images of its own."""

    def pull(self, image: Image, store: Store, recorded: Mapping[str, Any]) -> Built:
        """Bring it from the user's registries to where the runtime takes it from.

        Raises:
            DrydockError: none of them gives exactly that.
        """

    def prepare(self, store: Store, built: Built) -> None:
        """Make the image ready to run, with progress; quick when it is already.

        Raises:
            DrydockError: this machine cannot, or a layer in the store is damaged.
        """

    def run(self, store: Store, built: Built, task: Task) -> int:
        """Run the task in a prepared image and return the command's exit status (128 + n for signal n).

        The command's output goes to standard output and error as it comes. A signal that ends drydock
        (SIGINT, SIGTERM, SIGHUP) ends the command first, and then goes on as KeyboardInterrupt or
        SystemExit. Nothing of the command is left running in any case.

        Raises:
            DrydockError: it could not be started.
        """

    def ahead(self, built: Built, task: Task) -> None:
        """Make ready, beside what runs now, what a later `run` of a task with other words and variables can use.

        Where that saves nothing, nothing is done. Never raises.
        """

    def dismiss(self) -> None:
        """Remove what was made ahead and is not used."""


def choose(name: Choice = "auto") -> Runtime:
    """The runtime of that name; `auto` is Docker where an engine answers, else chroot.

    Raises:
        DrydockError: Docker was asked for and no engine answers.
    """
    # Here, so that `chroot` does without the time it takes to load the Docker SDK.
    from drydock.chroot_runtime import ChrootRuntime

    if name == "chroot":
        return ChrootRuntime()
    from drydock.docker_runtime import DockerRuntime

    try:
        return DockerRuntime()
    except DrydockError:
        if name == "docker":
            raise
    return ChrootRuntime()


def inside() -> bool:
    """Whether this process already runs in an image of drydock's."""
    return MANIFEST.is_file()


def check_architecture(built: Built, machine: str) -> None:
    """Refuse an image whose programs a machine (`x86_64`, `aarch64`) cannot execute.

    Raises:
        DrydockError: another architecture, and the kernel has no emulator that works in a chroot.
    """
    if runs(cast(Architecture, built.architecture), machine):
        return
    wanted = MACHINES[cast(Architecture, built.architecture)]
    raise DrydockError(
        f"{built.name} is for {wanted} and this machine is {machine}: run it on {wanted}, "
        f"or register qemu-{wanted} with binfmt_misc (flag F)"
    )


def runs(architecture: Architecture, machine: str) -> bool:
    """Whether a machine (`x86_64`, `aarch64`) executes programs of an architecture, itself or by emulation."""
    wanted = MACHINES[architecture]
    if machine == wanted:
        return True
    entry = EMULATORS / f"qemu-{wanted}"
    with contextlib.suppress(OSError):
        for line in entry.read_text().splitlines():
            # F: the kernel opened the emulator when it was registered, so no image needs to hold it.
            if line.startswith("flags:") and "F" in line.partition(":")[2]:
                return True
    return False


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as ctrl-C does, so that `finally` clauses run."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {}
    # ValueError: only the main thread may, and elsewhere the main thread's owner decides.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

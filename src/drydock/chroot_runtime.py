"""Running images without Docker: unpacked, stacked by overlayfs and entered with Linux namespaces.

`drydock.namespaces` is what runs inside. Nothing outlives drydock, however it ends. This keeps a command's
files and processes apart; it does not confine root.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drydock.definition import Image
from drydock.drivers import driver_files
from drydock.errors import DrydockError
from drydock.namespaces import END_NOW, PASSED_ON, Bind, Entry, to_foreground
from drydock.oci import Built
from drydock.runtime import CHECKOUT, RESULTS, Task, check_architecture, ending_signals
from drydock.store import Store, disk_errors
from drydock.unpack import folder, missing, remove_tree, unpack

HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/hostname")
"""What the image takes from the host, so that names resolve in it."""


class ChrootRuntime:
    """Runs images on the machine's own kernel, as root or as a user who may make user namespaces."""

    name = "chroot"

    def held(self, name: str, recorded: Mapping[str, Any]) -> Built | None:
        """None: what it runs is in the store."""
        del name, recorded
        return None

    def pull(self, image: Image, store: Store, recorded: Mapping[str, Any]) -> Built:
        """Bring the recorded image from the user's registries into the store."""
        from drydock.publish import pull, registries

        del recorded
        return pull(image.root, store, image.name, registries(os.environ), os.environ)[0]

    def prepare(self, store: Store, built: Built) -> None:
        """Unpack the layers that are not unpacked yet."""
        check_architecture(built, platform.machine())
        if missing(store, built.layers):
            # Before minutes of unpacking, see whether it can be entered at all.
            try_namespaces(store)
            unpack(store, built.layers)

    def run(self, store: Store, built: Built, task: Task) -> int:
        """Run the task in namespaces of its own, over a scratch folder that is removed afterwards."""
        if task.user == "drydock" and os.geteuid() != 0:
            raise DrydockError(
                "the image's user drydock needs root or --runtime docker: here you are root in the image"
            )
        if missing(store, built.layers):
            raise DrydockError(f"{built.name} is not unpacked in {store.root}: prepare it first")
        check_architecture(built, platform.machine())
        devices, links = driver_files(task.accelerator) if task.accelerator != "none" else ([], {})
        layers = dict.fromkeys(folder(store, layer).name for layer in reversed(built.layers))
        entry = Entry(
            layers=list(layers),
            binds=_binds(task) + devices,
            links=links,
            command=list(task.command),
            environment=task.variables(built),
            workdir=task.workdir,
            ordinary_user=task.user == "drydock",
            interactive=task.interactive,
            terminal=task.interactive and sys.stdin.isatty(),
            drivers=task.accelerator != "none",
        )
        return _run(store, entry)

    def ahead(self, built: Built, task: Task) -> None:
        """Nothing: namespaces are made in a tenth of a second."""

    def dismiss(self) -> None:
        """Nothing was made ahead."""


def try_namespaces(store: Store) -> None:
    """Make namespaces and end.

    Raises:
        DrydockError: this user or kernel cannot.
    """
    _run(store, Entry())


def _run(store: Store, entry: Entry) -> int:
    with _scratch(store) as (scratch, lock), disk_errors(store.root):
        (scratch / "entry.json").write_text(json.dumps(asdict(entry)))
        with ending_signals():
            status = _wait(scratch, lock, entry)
        refusal = scratch / "refusal"
        if refusal.exists() and (text := refusal.read_text()):
            raise DrydockError(text)
        return status


def _wait(scratch: Path, lock: int, entry: Entry) -> int:
    search = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The process inherits the mask, so that a signal waits until there is somebody to pass it on to.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "drydock.namespaces", str(scratch), str(lock)],
            stdin=None if entry.interactive else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
            # What is alive in the namespaces holds the scratch folder's lock.
            pass_fds=(lock,),
            # Or a terminal's ctrl-C would come twice, from the terminal and from here.
            start_new_session=not entry.terminal,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        status = process.wait()
    except (KeyboardInterrupt, SystemExit) as ending:
        process.send_signal(signal.SIGINT if isinstance(ending, KeyboardInterrupt) else signal.SIGTERM)
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.send_signal(END_NOW)
            process.wait()
        if entry.terminal:
            to_foreground(os.getpgrp())
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _scratch(store: Store) -> Iterator[tuple[Path, int]]:
    """A new folder `run/<id>` and the handle of its lock; clears those whose owner is dead."""
    runs = store.root / "run"
    with disk_errors(store.root):
        runs.mkdir(exist_ok=True)
        with store.lock("run"):
            for path in runs.iterdir():
                with contextlib.suppress(OSError), _locked(path):
                    remove_tree(path)
            scratch = Path(tempfile.mkdtemp(dir=runs, prefix=""))
            lock = os.open(scratch, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("upper", "work", "root", "memory"):
            (scratch / name).mkdir()
            (scratch / name).chmod(0o755)
    try:
        yield scratch, lock
    finally:
        remove_tree(scratch)
        os.close(lock)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _binds(task: Task) -> list[Bind]:
    files = [
        Bind(source=str(Path(name).resolve()), target=name) for name in HOST_FILES if Path(name).exists()
    ]
    return [
        *files,
        Bind(source=str(task.checkout.resolve()), target=CHECKOUT, read_only=True),
        Bind(source=str(task.make_results().resolve()), target=RESULTS),
        *(
            Bind(source=str(source.resolve()), target=target, read_only=True)
            for target, source in task.inputs.items()
        ),
    ]

"""Running images without Docker: unpacked, stacked by overlayfs and entered with Linux namespaces.

Three processes stand between drydock and the command. The entering one (this module, run as a program, so
that no thread of drydock's is in it) makes the namespaces; the first one in them, their pid 1, mounts what
the image needs, reaps orphans and passes signals on; the command is its child. Each is killed when its
parent dies, and the kernel ends all that is in the namespaces with pid 1, so nothing outlives drydock.

It keeps a command's files and processes apart; it does not confine root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings  # noqa: F401  # os.execvpe imports it, which it could not do in the image
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from drydock.errors import DrydockError
from drydock.oci import Built
from drydock.runtime import CHECKOUT, RESULTS, USER_ID, Task, check_architecture, ending_signals
from drydock.store import Store, disk_errors
from drydock.unpack import folder, missing, remove_tree, unpack

GRACE_SECONDS = 10
"""From SIGTERM to SIGKILL when drydock is told to end."""
END_NOW = signal.SIGALRM
"""What tells the entering process to kill everything; its own alarm clock sends it when grace is over."""
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
HOST = Path("/.host")
"""Where the host's root is in the image while the image is being mounted."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/hostname")
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")
DRIVER_LIBRARIES = (
    "libcuda.so*",
    "libcudadebugger.so*",
    "libnvcuvid.so*",
    "libnvidia-allocator.so*",
    "libnvidia-cfg.so*",
    "libnvidia-encode.so*",
    "libnvidia-gpucomp.so*",
    "libnvidia-ml.so*",
    "libnvidia-nvvm*.so*",
    "libnvidia-opencl.so*",
    "libnvidia-opticalflow.so*",
    "libnvidia-ptxjitcompiler.so*",
)
"""What NVIDIA's driver brings for computing; the rest of it is for displays."""
LDCONFIG_NAMES = {"x86_64": "x86-64", "aarch64": "AArch64"}


@dataclass(frozen=True, kw_only=True)
class Bind:
    """A file or folder of the host's (an absolute path without links) and where it is in the image."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """All that the entering process is told; `layers` are folder names, the topmost first.

    Without a command it ends as soon as it knows that the image could be entered.
    """

    parent: int = field(default_factory=os.getpid)
    layers: list[str] = field(default_factory=list)
    binds: list[Bind] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    ordinary_user: bool = False
    interactive: bool = False
    terminal: bool = False
    drivers: bool = False


class ChrootRuntime:
    """Runs images on the machine's own kernel, as root or as a user who may make user namespaces."""

    name = "chroot"

    def prepare(self, store: Store, built: Built) -> None:
        """Unpack the layers that are not unpacked yet."""
        check_architecture(built, platform.machine())
        if missing(store, built.layers):
            # Before minutes of unpacking, see whether it can be entered at all.
            _run(store, Entry())
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
        devices, links = _drivers() if task.gpus else ([], {})
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
            drivers=task.gpus,
        )
        return _run(store, entry)


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
            [sys.executable, "-m", "drydock.chroot_runtime", str(scratch), str(lock)],
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
            _to_foreground(os.getpgrp())
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
    ]


def _drivers() -> tuple[list[Bind], dict[str, str]]:
    """The GPUs' devices and the driver's files, and the links among its libraries (link -> target)."""
    devices = sorted(Path("/dev").glob("nvidia*"))
    if not devices:
        raise DrydockError("GPUs were asked for and this machine has no /dev/nvidia*: load NVIDIA's driver")
    if (infiniband := Path("/dev/infiniband")).is_dir():
        devices.append(infiniband)
    binds = [Bind(source=str(path), target=str(path)) for path in devices]
    machine = platform.machine()
    place = f"/usr/lib/{machine}-linux-gnu"
    libraries: dict[str, Bind] = {}
    links: dict[str, str] = {}
    for parent in _driver_folders(machine):
        for path in (path for pattern in DRIVER_LIBRARIES for path in sorted(parent.glob(pattern))):
            real = path.resolve()
            libraries.setdefault(real.name, Bind(source=str(real), target=f"{place}/{real.name}"))
            if path.name != real.name:
                links.setdefault(f"{place}/{path.name}", real.name)
    if smi := shutil.which("nvidia-smi", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/nvidia/bin"):
        binds.append(Bind(source=str(Path(smi).resolve()), target="/usr/bin/nvidia-smi"))
    return [*binds, *libraries.values()], links


def _driver_folders(machine: str) -> list[Path]:
    """Where the host may keep the driver's libraries, the one that its linker uses first."""
    folders = []
    if program := shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        cache = subprocess.run([program, "-p"], capture_output=True, text=True, check=False).stdout
        folders = [
            Path(line.rpartition(" => ")[2]).parent
            for line in cache.splitlines()
            if line.strip().startswith("libcuda.so.1 ") and LDCONFIG_NAMES[machine] in line
        ]
    return [*folders, *(Path(name.format(machine=machine)) for name in DRIVER_FOLDERS)]


# ---------------------------------------------------------------- in the entering process and after it

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1 << 5, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """What the kernel does not let this user do, and what would help."""


def _call(function: str, *arguments: int | str | Path | None) -> None:
    values = [ctypes.c_ulong(one) if isinstance(one, int) else one and os.fsencode(one) for one in arguments]
    if getattr(_libc, function)(*values) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(arguments[1]) if function == "mount" else function)


def _mount(source: str | Path, target: str | Path, kind: str | None, flags: int, options: str = "") -> None:
    _call("mount", source, target, kind, flags, options)


def _namespaces() -> bool:
    """Move this process into new namespaces; returns whether it is root on the host."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
        _call("unshare", flags | (CLONE_NEWUSER if uid else 0))
        if uid:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        _mount("none", "/", None, MS_REC | MS_PRIVATE)
    except OSError as error:
        if uid == 0:
            raise Refused(
                f"root may not make namespaces here ({error.strerror}): in a container, start it with "
                "--privileged, or use --runtime docker"
            ) from error
        raise Refused(
            f"this user may not make namespaces here ({error.strerror}): run as root, or let users make them "
            "(sysctl user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container, start it with --privileged), "
            "or use --runtime docker"
        ) from error
    return uid == 0


def _overlay(entry: Entry, scratch: Path, as_root: bool) -> None:
    """Mount the layers, and a place for what the command changes, at `scratch/root`."""
    # Names relative to the layers' folder: all options together may take no more than a page, 4096 bytes.
    os.chdir(scratch.parents[1] / "unpacked" if entry.layers else scratch)
    lower = ":".join(entry.layers or ["root"])
    run = f"../run/{scratch.name}" if entry.layers else "."
    user = "" if as_root else ",userxattr"

    def mount(place: str) -> None:
        options = f"lowerdir={lower},upperdir={place}/upper,workdir={place}/work{user}"
        _mount("overlay", scratch / "root", "overlay", 0, options)

    try:
        try:
            mount(run)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENODEV):
                raise
            # Some file systems, overlayfs itself among them, cannot hold an overlay's changes.
            _mount("tmpfs", scratch / "memory", "tmpfs", 0, "mode=755")
            for name in ("upper", "work"):
                (scratch / "memory" / name).mkdir(mode=0o755)
            mount(f"{run}/memory")
            if entry.command:
                _note("the store's disk cannot hold an overlay's changes, they are kept in memory")
    except OSError as error:
        raise Refused(
            f"overlayfs cannot be mounted ({error.strerror}): it takes "
            + (
                "the kernel's overlay module (modprobe overlay)"
                if as_root
                else "Linux 5.11 or later, or root"
            )
            + "; or use --runtime docker"
        ) from error


def _make_target(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        target.touch()


def _bind(source: Path, target: Path, read_only: bool = False) -> None:
    _make_target(source, target)
    # With all mounts below it: an ordinary user may not have a part of the host's tree without them.
    _mount(source, target, None, MS_BIND | MS_REC)
    if not read_only:
        return
    for point in _mounts_below(target):
        try:
            # What a mount forbids already must be said again, or an ordinary user's call is refused.
            kept = os.statvfs(point).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            _mount("none", point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)
        except PermissionError:
            if point == target:
                raise


def _mounts_below(folder: Path) -> list[Path]:
    """The mount points at and below a folder, from the kernel's own table."""
    table = (HOST / "proc/self/mountinfo").read_text(errors="surrogateescape")
    fields = [line.split()[4] for line in table.splitlines()]
    points = [Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)) for point in fields]
    return [point for point in points if point.is_relative_to(folder)]


def _populate(entry: Entry, as_root: bool) -> None:
    """Mount what a program expects, with the host's root at `HOST` and the image's at `/`."""
    for name, options in (("/dev", "mode=755"), ("/run", "mode=755"), ("/dev/shm", "mode=1777")):
        Path(name).mkdir(exist_ok=True)
        _mount("tmpfs", name, "tmpfs", MS_NOSUID, options)
    _bind(HOST / "sys", Path("/sys"), read_only=True)
    for name in DEVICES:
        _bind(HOST / "dev" / name, Path("/dev", name))
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        Path("/dev", name).symlink_to(f"/proc/self/fd{target}")
    Path("/dev/pts").mkdir()
    group = ",gid=5" if as_root else ""
    _mount(
        "devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"newinstance,ptmxmode=0666,mode=0620{group}"
    )
    Path("/dev/ptmx").symlink_to("pts/ptmx")
    for bind in entry.binds:
        _bind(HOST / bind.source.lstrip("/"), Path(bind.target), bind.read_only)
    for link, linked in entry.links.items():
        Path(link).unlink(missing_ok=True)
        Path(link).symlink_to(linked)
    Path("/proc").mkdir(exist_ok=True)
    try:
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except PermissionError:
        _note("a /proc of its own is not allowed here, the command sees the host's")
        _mount(HOST / "proc", "/proc", None, MS_BIND | MS_REC)


def _first(entry: Entry, scratch: Path, as_root: bool) -> int:
    """Pid 1 of the namespaces: make the image's root this process's, run the command, reap till it ends."""
    _overlay(entry, scratch, as_root)
    if not entry.command:
        return 0
    host = scratch / "root" / HOST.name
    host.mkdir()
    _call("pivot_root", scratch / "root", host)
    os.chdir("/")
    _populate(entry, as_root)
    Path(entry.workdir).mkdir(parents=True, exist_ok=True)
    _call("umount2", HOST, MNT_DETACH)
    HOST.rmdir()
    if entry.drivers:
        _update_library_cache()
    command = os.fork()
    if command == 0:
        _become(entry)
    _pass_on(lambda number: os.killpg(command, number))
    while True:
        pid, status = os.wait()
        if pid == command:
            return _exit_status(status)


def _update_library_cache() -> None:
    for program in ("/usr/sbin/ldconfig", "/sbin/ldconfig"):
        if Path(program).exists():
            subprocess.run([program], env={}, check=False)
            return


def _become(entry: Entry) -> None:
    """Turn this process into the command; never returns."""
    status = 126
    try:
        os.setpgid(0, 0)
        if entry.terminal:
            _to_foreground(os.getpid())
        os.chdir(entry.workdir)
        if entry.ordinary_user:
            os.setgroups([USER_ID])
            os.setgid(USER_ID)
            os.setuid(USER_ID)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execvpe(entry.command[0], entry.command, entry.environment)
    except FileNotFoundError:
        _note(f"{entry.command[0]}: not found in the image")
        status = 127
    except OSError as error:
        _note(f"{entry.command[0]}: {error.strerror}")
    finally:
        os._exit(status)


def _note(text: str) -> None:
    print(f"drydock: {text}", file=sys.stderr, flush=True)


def _to_foreground(group: int) -> None:
    """Make a process group the one that the terminal on standard input listens to."""
    previous = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        os.tcsetpgrp(0, group)
    finally:
        signal.signal(signal.SIGTTOU, previous)


def _pass_on(send: Callable[[signal.Signals], None]) -> None:
    def handle(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            send(signal.Signals(number))

    for number in PASSED_ON:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def enter(scratch: Path) -> int:
    """The entering process: make the namespaces and wait for what runs in them."""
    document = json.loads((scratch / "entry.json").read_text())
    entry = Entry(**{**document, "binds": [Bind(**bind) for bind in document["binds"]]})
    os.umask(0o022)
    with (scratch / "refusal").open("w") as refusal:
        try:
            as_root = _namespaces()
        except Refused as error:
            refusal.write(str(error))
            return 1
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != entry.parent:
            return 1
        alive, held = os.pipe()
        first = os.fork()
        if first == 0:
            os.close(held)
            _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            # At its end is closed: the parent died before this process asked to be taken along.
            if select.select([alive], [], [], 0)[0]:
                os._exit(1)
            _first_and_exit(entry, scratch, as_root, refusal)

    def send(number: signal.Signals) -> None:
        os.kill(first, number)
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.alarm(GRACE_SECONDS)

    signal.signal(END_NOW, lambda *_: os.kill(first, signal.SIGKILL))
    _pass_on(send)
    return _exit_status(os.waitpid(first, 0)[1])


def _first_and_exit(entry: Entry, scratch: Path, as_root: bool, refusal: TextIO) -> NoReturn:
    status = 1
    try:
        status = _first(entry, scratch, as_root)
    except Refused as error:
        refusal.write(str(error))
    except Exception as error:
        refusal.write(f"the image cannot be entered: {error}")
    finally:
        refusal.flush()
        os._exit(status)


if __name__ == "__main__":
    # The scratch folder's lock is for the processes of drydock's, not for the command.
    os.set_inheritable(int(sys.argv[2]), False)
    os._exit(enter(Path(sys.argv[1])))

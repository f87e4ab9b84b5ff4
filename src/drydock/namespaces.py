"""The inside half of the chroot runtime: makes the namespaces, mounts the image, becomes the command.

Run as a program, so that no thread of drydock's is in the process that makes namespaces. Three processes
stand between drydock and the command: the entering one, the first one in the namespaces (their pid 1, which
mounts what the image needs, reaps orphans and passes signals on), and the command, its child. Each is killed
when its parent dies, and the kernel ends all that is in the namespaces with pid 1.

Standard library only: it starts once for every command, and drydock's own dependencies take 0.2 s to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
import warnings  # noqa: F401  # os.execvpe imports it, which it could not do in the image
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

USER_ID = 1000
"""uid and gid of the image's user `drydock`."""
GRACE_SECONDS = 10
"""From SIGTERM to SIGKILL when drydock is told to end."""
END_NOW = signal.SIGALRM
"""What tells the entering process to kill everything; its own alarm clock sends it when grace is over."""
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
HOST = Path("/.host")
"""Where the host's root is in the image while the image is being mounted."""
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


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
            to_foreground(os.getpid())
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


def to_foreground(group: int) -> None:
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

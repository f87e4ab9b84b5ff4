"""What maintainer scripts would have made and an image needs: accounts, CA bundle, links, the venv."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence

from debian.debfile import DebFile

from drydock.debs import content, open_deb, status_paragraph
from drydock.definition import Image
from drydock.layer import LayerWriter
from drydock.locks import DebianLock
from drydock.store import Store
from drydock.wheels import PREFIX

ENVIRONMENT = ("LANG=C.UTF-8",)
"""Of every image on Debian, as a vendor's image has it in its config."""
USER = "drydock"
USER_ID = 1000
"""The ordinary user of an image, for those who do not want to be root in it."""


def add_base_files(layer: LayerWriter, store: Store, image: Image, lock: DebianLock) -> None:
    """Write the layer of files that belong to no deb."""
    layer.owner = "drydock"
    debs = {package.name: package.artifact for package in lock.packages}
    for path in ("tmp", "var/tmp", "run/lock"):
        layer.folder(path, 0o1777)
    for path in (
        "media",
        "mnt",
        "opt",
        "srv",
        "usr/local/bin",
        "usr/local/include",
        "usr/local/lib",
        "usr/local/sbin",
    ):
        layer.folder(path)
    with open_deb(store, debs["base-passwd"]) as deb:
        _add_accounts(
            layer,
            _text(deb, "usr/share/base-passwd/passwd.master"),
            _text(deb, "usr/share/base-passwd/group.master"),
        )
    with open_deb(store, debs["base-files"]) as deb:
        layer.file("etc/profile", _bytes(deb, "usr/share/base-files/profile"))
        for home, uid in (("root", 0), (f"home/{USER}", USER_ID)):
            layer.folder(home, 0o700, uid, uid)
            layer.file(f"{home}/.bashrc", _bytes(deb, "usr/share/base-files/dot.bashrc"), uid=uid, gid=uid)
            layer.file(f"{home}/.profile", _bytes(deb, "usr/share/base-files/dot.profile"), uid=uid, gid=uid)
    with open_deb(store, debs["libc-bin"]) as deb:
        layer.file("etc/nsswitch.conf", _bytes(deb, "usr/share/libc-bin/nsswitch.conf"))
    if "ca-certificates" in debs:
        with open_deb(store, debs["ca-certificates"]) as deb:
            _add_certificates(layer, deb)
    layer.symlink("etc/dpkg/origins/default", "debian")
    layer.symlink("var/run", "/run")
    layer.symlink("var/lock", "/run/lock")
    for name, target in sorted(image.base.alternatives.items()):
        layer.symlink(f"usr/bin/{name}", f"/etc/alternatives/{name}")
        layer.symlink(f"etc/alternatives/{name}", target)
    # A login shell's /etc/profile sets PATH anew and then reads this.
    layer.file("etc/profile.d/drydock.sh", f"PATH=/{PREFIX}/bin:$PATH\n".encode())
    series = image.definition.python
    add_venv(layer, f"/usr/bin/python{series}", python_version(series, lock))


def _text(deb: DebFile, path: str) -> str:
    return _bytes(deb, path).decode()


def _bytes(deb: DebFile, path: str) -> bytes:
    return content(deb.data, path)


def _add_accounts(layer: LayerWriter, passwd: str, group: str) -> None:
    """Debian's own accounts, all locked, and the ordinary user."""
    passwd += f"{USER}:x:{USER_ID}:{USER_ID}:drydock:/home/{USER}:/bin/bash\n"
    passwd = "".join(
        ":".join([name, "x", *rest]) + "\n"
        for name, _, *rest in (line.split(":") for line in passwd.splitlines())
    )
    layer.file("etc/passwd", passwd.encode())
    layer.file("etc/group", (group + f"{USER}:x:{USER_ID}:\n").encode())
    names = [line.split(":")[0] for line in passwd.splitlines()]
    # "!" locks the password; 3652 days is 1980-01-01, when everything in an image happened.
    layer.file(
        "etc/shadow", "".join(f"{name}:!:3652:0:99999:7:::\n" for name in names).encode(), mode=0o640, gid=42
    )
    layer.file("etc/shells", b"/bin/sh\n/bin/bash\n/usr/bin/bash\n/usr/bin/sh\n")


def _add_certificates(layer: LayerWriter, deb: DebFile) -> None:
    """The CA bundle where OpenSSL, GnuTLS and Go look for it: Debian's path, and OpenSSL's default file."""
    folder = "usr/share/ca-certificates/"
    names = sorted(
        name
        for name in (posixpath.normpath(str(member)).lstrip("/") for member in deb.data)
        if name.startswith(folder) and name.endswith(".crt")
    )
    bundle = b"".join(_bytes(deb, name).rstrip(b"\n") + b"\n" for name in names)
    layer.file("etc/ssl/certs/ca-certificates.crt", bundle)
    layer.file(
        "etc/ca-certificates.conf", "".join(f"{name.removeprefix(folder)}\n" for name in names).encode()
    )
    layer.symlink("etc/ssl/cert.pem", "certs/ca-certificates.crt")


def add_venv(layer: LayerWriter, interpreter: str, version: str, *, system: bool = False) -> None:
    """An empty venv at the image's prefix, as `python -m venv --without-pip` would make it.

    Parameters:
        interpreter: the image's own, an absolute path.
        version: the interpreter's, as `platform.python_version()` has it.
        system: whether its own distributions are seen, after ours.
    """
    series = version.rpartition(".")[0]
    settings = {
        "home": posixpath.dirname(interpreter),
        "include-system-site-packages": str(system).lower(),
        "version": version,
    }
    text = "".join(f"{key} = {value}\n" for key, value in settings.items())
    layer.file(f"{PREFIX}/pyvenv.cfg", text.encode())
    layer.symlink(f"{PREFIX}/bin/python", interpreter)
    for name in ("python3", f"python{series}"):
        layer.symlink(f"{PREFIX}/bin/{name}", "python")
    layer.symlink(f"{PREFIX}/lib64", "lib")


def image_environment(base: Sequence[str], extra: Mapping[str, str]) -> dict[str, str]:
    """The base's environment (NAME=value) with our venv before its programs, and what the definition adds."""
    below = dict(entry.split("=", 1) for entry in base if "=" in entry)
    path = below.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**below, "PATH": f"/{PREFIX}/bin:{path}", "VIRTUAL_ENV": f"/{PREFIX}", **extra}


def python_version(series: str, lock: DebianLock) -> str:
    """`platform.python_version()` in the image, from the locked package's version."""
    return lock.version_of(f"python{series}-minimal").partition("-")[0]


def dpkg_status(store: Store, lock: DebianLock) -> bytes:
    """dpkg's record of what is installed, as if it had unpacked and configured every package."""
    paragraphs = []
    for package in lock.packages:
        with open_deb(store, package.artifact) as deb:
            paragraphs.append(status_paragraph(deb))
    return "".join(paragraphs).encode()


def add_dpkg_database(layer: LayerWriter, store: Store, lock: DebianLock) -> None:
    """dpkg's status, and the empty files it expects beside it."""
    layer.owner = "drydock"
    layer.file("var/lib/dpkg/status", dpkg_status(store, lock))
    layer.file("var/lib/dpkg/info/format", b"1\n")
    for name in (
        "available",
        "diversions",
        "statoverride",
        "lock",
        "lock-frontend",
        "triggers/Unincorp",
        "triggers/Lock",
    ):
        layer.file(f"var/lib/dpkg/{name}", b"")
    layer.folder("var/lib/dpkg/updates")


def stdlib_sources(names: Iterable[str], series: str) -> dict[str, str]:
    """Members of a deb that are the standard library's sources -> their path in the image."""
    prefix = f"usr/lib/python{series}/"
    found = {}
    for name in names:
        path = posixpath.normpath(name).lstrip("/")
        if path.startswith(prefix) and path.endswith(".py"):
            found[name] = path
        elif path == f"etc/python{series}/sitecustomize.py":
            # The library has a link to it, and Python keeps bytecode beside the link.
            found[name] = f"{prefix}sitecustomize.py"
    return found

"""The closure of a base's Debian packages, as apt resolves it in a root of its own.

apt does the resolving and checks the archive's signatures; nothing of the machine's own packages takes
part, so the answer is the same for a foreign architecture and on any Debian or Ubuntu that has the keyring.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from debian.deb822 import Packages
from debian.debian_support import Version

from drydock.definition import Architecture, DebianRequest, debian_lock_path
from drydock.errors import DrydockError
from drydock.locks import debian_inputs, sha256_json, write_lock

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def lock_base(
    root: Path,
    request: DebianRequest,
    architecture: Architecture,
    mirrors: Mapping[str, list[str]],
    keep: Mapping[str, str],
) -> dict[str, Any]:
    """Resolve a base for one architecture and write `lock/debian-<release>-<architecture>.toml`.

    Parameters:
        mirrors: base addresses by archive name (`debian`, `debian-security`); the first of each is asked.
        keep: package -> version that must not move, while the mirror still has it.

    Raises:
        DrydockError: no apt, no keyring, no mirror, or a request that apt cannot satisfy.
    """
    for tool in ("apt-get", "apt-cache"):
        if not shutil.which(tool):
            raise DrydockError(f"locking a Debian base needs {tool}: run it on a Debian or Ubuntu machine")
    if not KEYRING.is_file():
        raise DrydockError(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    with tempfile.TemporaryDirectory(prefix="drydock-apt-") as folder:
        apt = Apt(Path(folder), architecture)
        apt.sources(request.suite, mirrors)
        apt.run("apt-get", "update", "-q")
        available = apt.available()
        pins = [f"{name}={version}" for name, version in keep.items() if (name, version) in available]
        essential = sorted(
            {name for (name, _), entry in available.items() if entry.get("Essential") == "yes"}
        )
        wanted = {name.partition("=")[0]: name for name in (*essential, *request.packages, *pins)}
        chosen = apt.simulate(sorted(wanted.values()))
        packages = []
        for name, version in sorted(chosen.items()):
            entry = available[name, version]
            packages.append(
                {
                    "name": name,
                    "version": version,
                    "architecture": entry["Architecture"],
                    "archive": apt.archives[name, version],
                    "filename": entry["Filename"],
                    "size": int(entry["Size"]),
                    "sha256": entry["SHA256"],
                }
            )
    data = {
        "release": request.release,
        "suite": request.suite,
        "architecture": architecture,
        "inputs": sha256_json(debian_inputs(request, architecture)),
        "packages": packages,
    }
    write_lock(debian_lock_path(root, request.release, architecture), data)
    return data


class Apt:
    """apt with a root, sources, lists and an empty set of installed packages of its own."""

    def __init__(self, root: Path, architecture: Architecture) -> None:
        self.root = root
        self.archives: dict[tuple[str, str], str] = {}
        for folder in ("etc/apt/preferences.d", "lists/partial", "cache/archives/partial", "dpkg"):
            (root / folder).mkdir(parents=True)
        (root / "dpkg/status").touch()
        # apt's downloads run as the user _apt, who must be able to reach the folder.
        root.chmod(0o755)
        options = {
            "Dir::Etc": root / "etc/apt",
            "Dir::Etc::Parts": "-",
            "Dir::Etc::SourceParts": "-",
            "Dir::Etc::SourceList": root / "etc/apt/sources.list",
            "Dir::State::Lists": root / "lists",
            "Dir::State::Status": root / "dpkg/status",
            "Dir::Cache": root / "cache",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "APT::Get::AllowUnauthenticated": "false",
            "Acquire::Languages": "none",
            "Acquire::GzipIndexes": "false",
            "Acquire::Retries": "3",
        }
        self.options = [f"-o{name}={value}" for name, value in options.items()]

    def sources(self, suite: str, mirrors: Mapping[str, list[str]]) -> None:
        """Write the sources: the release, its updates, and its security fixes."""
        suites = {"debian": (suite, f"{suite}-updates"), "debian-security": (f"{suite}-security",)}
        lines = []
        self.bases: dict[str, str] = {}
        for archive, names in suites.items():
            if not mirrors.get(archive):
                variable = f"DRYDOCK_{archive.upper().replace('-', '_')}_MIRROR"
                raise DrydockError(f"no mirror of the archive {archive} is configured: set {variable}")
            base = mirrors[archive][0].rstrip("/")
            self.bases[archive] = base
            lines += [f"deb [signed-by={KEYRING} check-valid-until=no] {base} {name} main" for name in names]
        (self.root / "etc/apt/sources.list").write_text("\n".join(lines) + "\n")

    def run(self, tool: str, *arguments: str) -> str:
        """Run one of apt's tools against this root and return what it printed."""
        done = subprocess.run([tool, *self.options, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [
                done.stderr.strip()
            ]
            raise DrydockError(f"{tool} {arguments[0]}: {said[0][:300]}")
        return done.stdout

    def available(self) -> dict[tuple[str, str], Packages]:
        """Every package the mirrors offer, by name and version; `archives` gets where each comes from."""
        found: dict[tuple[str, str], Packages] = {}
        for index in sorted((self.root / "lists").glob("*_Packages")):
            archive = next(
                name
                for name, base in sorted(self.bases.items(), key=lambda item: -len(item[1]))
                if index.name.startswith(_list_prefix(base) + "_dists")
            )
            with index.open() as file:
                for entry in Packages.iter_paragraphs(file, use_apt_pkg=False):
                    key = (entry["Package"], entry["Version"])
                    if key not in found:
                        found[key] = entry
                        self.archives[key] = archive
        return found

    def simulate(self, wanted: list[str]) -> dict[str, str]:
        """What `apt-get install` would install into the empty root: package -> version."""
        chosen: dict[str, str] = {}
        for line in self.run("apt-get", "install", "-s", "-y", *wanted).splitlines():
            if line.startswith("Inst "):
                _, name, version, *_ = line.split()
                chosen[name.partition(":")[0]] = version.lstrip("(")
        return chosen


def _list_prefix(base: str) -> str:
    """How apt begins the name of an index it fetched from this base."""
    parts = urlsplit(base)
    return (parts.netloc.rpartition("@")[2] + parts.path).strip("/").replace("_", "%5f").replace("/", "_")


def upstream_version(version: str) -> str:
    """The upstream part of a Debian version, as `3.13.5` in `3.13.5-2+deb13u1`."""
    return str(Version(version).upstream_version)

"""Finds needed libraries as the dynamic loader would, ld.so(8), inside an image's tree."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from drydock.verify.elf import ElfObject, MalformedElf, read_elf
from drydock.verify.image import Manifest
from drydock.verify.tree import Tree


class Loader:
    """RPATH, LD_LIBRARY_PATH, RUNPATH, then ld.so.conf's and the default folders. Objects for another machine
    are passed over, as the loader does."""

    def __init__(self, tree: Tree, manifest: Manifest) -> None:
        self._tree = tree
        self._machine = manifest.machine
        self._multiarch = multiarch = f"lib/{manifest.machine}-linux-gnu"
        preset = manifest.environment.get("LD_LIBRARY_PATH", "").split(":")
        self._folders = [
            *(folder for folder in preset if folder.startswith("/")),
            *ld_so_conf_folders(tree, "etc/ld.so.conf"),
            *(multiarch, f"usr/{multiarch}", "lib", "usr/lib", "lib64", "usr/lib64"),
        ]
        self._everywhere: dict[str, bool] = {}
        self.read = cache(lambda path: read_elf(tree.where(path)))  # most objects are also needed ones

    def finds(self, name: str, path: str, needing: ElfObject) -> bool:
        """Whether the object at `path` gets its needed library `name`."""
        if "/" in name:
            return name.startswith("/") and self._loadable(name)
        if name not in self._everywhere:
            self._everywhere[name] = any(self._loadable(f"{folder}/{name}") for folder in self._folders)
        return self._everywhere[name] or any(
            self._loadable(f"{folder}/{name}") for folder in self._own_folders(path, needing)
        )

    def _own_folders(self, path: str, needing: ElfObject) -> Iterator[str]:
        origin = f"/{path.rpartition('/')[0]}"
        tokens = {"ORIGIN": origin, "LIB": self._multiarch, "PLATFORM": self._machine}
        for entry in needing.search:
            for token, value in tokens.items():
                entry = entry.replace(f"${{{token}}}", value).replace(f"${token}", value)
            if entry.startswith("/"):  # others depend on the working directory
                yield entry

    def _loadable(self, path: str) -> bool:
        found = self._tree.resolve(path)
        seen = self._tree.look(found) if found else None
        if not found or not seen or not seen.is_file:
            return False
        try:
            elf = self.read(found)
        except (MalformedElf, OSError):
            return False
        return elf is not None and elf.is_for(self._machine)


def ld_so_conf_folders(tree: Tree, path: str) -> list[str]:
    """The folders that ld.so.conf and what it includes name, in order (ldconfig(8)).

    It is read in place of ld.so.cache, which only says what these folders held when it was made.
    """
    try:
        lines = tree.read(path).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    folders = []
    for line in (line.partition("#")[0].strip() for line in lines):
        if line.startswith("include "):
            pattern = line.split(None, 1)[1]
            beside = "" if pattern.startswith("/") else path.rpartition("/")[0]
            above, _, name = f"{beside}/{pattern.lstrip('/')}".rpartition("/")
            folder = tree.resolve(above)
            found = [] if folder is None else sorted(Path(tree.where(folder)).glob(name))
            for included in found:
                folders += ld_so_conf_folders(tree, f"{above}/{included.name}")
        elif line.startswith("/"):
            folders.append(line)
    return folders

"""Check: every ELF object is for the image's machine, and the libraries it needs are there."""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Iterable

from drydock.verify.elf import ElfObject, MalformedElf
from drydock.verify.image import Image
from drydock.verify.loader import Loader
from drydock.verify.report import Finding, Outcome


def elf_candidates(image: Image) -> list[str]:
    """Regular files of the image that the loader may be given: named like a library, or executable.

    What a runtime added to the base is not the image's.
    """
    files = [(path, seen) for path, seen in image.in_base.items() if path in image.base or not image.base]
    return sorted(
        path
        for path, seen in (*files, *image.in_prefix.items())
        if seen.is_file and seen.size and (seen.mode & 0o111 or ".so" in path.rpartition("/")[2])
    )


def matching(patterns: Iterable[str], text: str) -> list[str]:
    """The declarations that a text matches."""
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(text, pattern)]


def read_objects(image: Image, loader: Loader) -> tuple[dict[str, ElfObject], list[Finding], set[str]]:
    """The ELF objects for the image's machine by path, findings, and the foreign patterns that matched."""
    manifest = image.manifest
    objects, findings, used = {}, [], set()
    for path in elf_candidates(image):
        try:
            elf = loader.read(path)
        except MalformedElf as error:
            findings.append(Finding(f"/{path}", f"is a broken ELF object: {error}"))
            continue
        except OSError as error:
            findings.append(Finding(f"/{path}", f"cannot be read ({error.strerror}): verify as root"))
            continue
        if elf is None:
            continue
        if elf.is_for(manifest.machine):
            objects[path] = elf
        elif patterns := matching(manifest.foreign_objects, path):
            used.update(patterns)
        else:
            what = f"is an ELF object for {elf.machine_name}, the image is {manifest.machine}"
            findings.append(Finding(f"/{path}", what))
    return objects, findings, used


def _vendors(image: Image) -> set[str]:
    """Libraries in the distributions of a vendor's base: by name, since its torch has as many objects as we have."""
    folders = image.manifest.vendor.site_packages if image.manifest.vendor else ()
    return {path.rpartition("/")[2] for found in image.tree.walk(*folders) for path in found if ".so" in path}


def check_libraries(image: Image) -> Outcome:
    """Every ELF object is for the image's machine, and every library it needs is somewhere it is looked for.

    A library that no search path leads to may still be one that Python code loads first (torch does so with
    CUDA's): the loader takes an object that is loaded already when its soname is the one needed.
    """
    manifest = image.manifest
    loader = Loader(image.tree, manifest)
    objects, findings, used = read_objects(image, loader)
    shipped = {elf.soname for path, elf in objects.items() if path.startswith(f"{manifest.prefix}/")}
    vendors = functools.cache(lambda: _vendors(image))  # walked only where one is missing
    found: Counter[str] = Counter()
    for path, elf in objects.items():
        for name in elf.needed:
            if loader.finds(name, path, elf):
                found["by the loader"] += 1
            elif name in manifest.driver_libraries:
                found["from the driver"] += 1
            elif name in shipped or name in vendors():
                found["preloaded"] += 1
            elif patterns := matching(manifest.absent_libraries, name):
                found["declared absent"] += 1
                used.update(patterns)
            else:
                findings.append(Finding(f"/{path}", f"needs {name}, which is not in the image"))
    needed = sum(len(elf.needed) for elf in objects.values())
    detail = f"{len(objects)} objects need {needed} libraries: " + ", ".join(
        f"{found[how]} {how}" for how in ("preloaded", "from the driver", "declared absent")
    )
    declared = (*manifest.absent_libraries, *manifest.foreign_objects)
    return Outcome(len(objects), detail, findings, [pattern for pattern in declared if pattern not in used])

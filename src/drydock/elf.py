"""Reads of an ELF object what the dynamic loader reads: machine, soname, needed libraries, search paths.

Standard library only, since `drydock.verify` runs with the image's own Python. Field names and numbers are
those of elf(5) and of the System V gABI, chapter 5. Like the loader it goes by segments, never by sections,
so that stripped and patched objects read the same.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MACHINES = {"x86_64": 62, "aarch64": 183}
"""`platform.machine()` -> e_machine."""

_HEADER_SIZE = 64
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC_ENTRY = struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29
_LARGEST_DYNAMIC = 1 << 20
_LARGEST_STRING = 1 << 16


class MalformedElf(ValueError):
    """A file begins as an ELF object does, and its headers do not hold together."""


@dataclass(frozen=True, kw_only=True)
class ElfObject:
    """An executable, shared library, extension module or relocatable object.

    `machine` is e_machine; `native` is whether it is ELF64 little-endian, the only kind whose dynamic section
    is read. `rpath` and `runpath` are split at colons, with $ORIGIN and the like as they stand in the file.
    """

    machine: int
    native: bool = True
    soname: str | None = None
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()

    @property
    def machine_name(self) -> str:
        """The kernel's name of the machine where this module knows it, for messages."""
        names = {number: name for name, number in MACHINES.items()} | {3: "i386", 40: "arm", 190: "CUDA"}
        return names.get(self.machine, f"e_machine {self.machine}")


def read_elf(path: str | Path) -> ElfObject | None:
    """Read an object's headers and dynamic section, a few small reads whatever its size.

    Returns:
        None when the file does not begin with the ELF magic.

    Raises:
        MalformedElf: it begins so, and cannot be read on.
        OSError: the file cannot be opened.

    >>> read_elf("/bin/true").needed
    ('libc.so.6',)
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = os.pread(descriptor, _HEADER_SIZE, 0)
        if header[:4] != b"\x7fELF":
            return None
        if len(header) < 20:
            raise MalformedElf(f"{len(header)} bytes are too few for an ELF header")
        machine = int.from_bytes(header[18:20], "big" if header[5] == 2 else "little")
        if header[4:6] != b"\x02\x01":
            return ElfObject(machine=machine, native=False)
        if len(header) < _HEADER_SIZE:
            raise MalformedElf(f"{len(header)} bytes are too few for an ELF header")
        return _read_dynamic(descriptor, machine, header)
    finally:
        os.close(descriptor)


def _read_dynamic(descriptor: int, machine: int, header: bytes) -> ElfObject:
    loads, dynamic = _segments(descriptor, header)
    if dynamic is None:
        return ElfObject(machine=machine)
    entries = list(_dynamic_entries(_read(descriptor, *dynamic, "dynamic section")))
    values = dict(entries)
    if _DT_STRTAB not in values or _DT_STRSZ not in values:
        raise MalformedElf("the dynamic section names no string table")
    strings = _StringTable(descriptor, _file_offset(loads, values[_DT_STRTAB]), values[_DT_STRSZ])
    return ElfObject(
        machine=machine,
        soname=strings.at(values[_DT_SONAME]) if _DT_SONAME in values else None,
        needed=tuple(strings.at(value) for tag, value in entries if tag == _DT_NEEDED),
        rpath=tuple(strings.at(values[_DT_RPATH]).split(":")) if _DT_RPATH in values else (),
        runpath=tuple(strings.at(values[_DT_RUNPATH]).split(":")) if _DT_RUNPATH in values else (),
    )


def _segments(descriptor: int, header: bytes) -> tuple[list[tuple[int, int, int]], tuple[int, int] | None]:
    """The loaded segments as (address, file offset, size), and the dynamic one as (file offset, size)."""
    (offset,) = struct.unpack_from("<Q", header, 32)
    entry_size, count = struct.unpack_from("<HH", header, 54)
    if count == 0:
        return [], None
    if entry_size != _PROGRAM_HEADER.size:
        raise MalformedElf(f"program headers of {entry_size} bytes")
    table = _read(descriptor, offset, count * entry_size, "program headers")
    loads: list[tuple[int, int, int]] = []
    dynamic = None
    for kind, _flags, where, address, _physical, size, _memory, _align in _PROGRAM_HEADER.iter_unpack(table):
        if kind == _PT_LOAD:
            loads.append((address, where, size))
        elif kind == _PT_DYNAMIC and size:  # detached debug files have it without content
            dynamic = (where, size)
    if dynamic is not None and dynamic[1] > _LARGEST_DYNAMIC:
        raise MalformedElf(f"a dynamic section of {dynamic[1]} bytes")
    return loads, dynamic


def _dynamic_entries(section: bytes) -> Iterator[tuple[int, int]]:
    usable = len(section) - len(section) % _DYNAMIC_ENTRY.size
    for tag, value in _DYNAMIC_ENTRY.iter_unpack(section[:usable]):
        if tag == _DT_NULL:
            return
        yield tag, value


def _file_offset(loads: list[tuple[int, int, int]], address: int) -> int:
    for start, where, size in loads:
        if start <= address < start + size:
            return where + address - start
    raise MalformedElf(f"no segment holds the string table's address {address:#x}")


def _read(descriptor: int, offset: int, size: int, what: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except (OverflowError, OSError) as error:
        raise MalformedElf(f"{what} at offset {offset:#x}: {error}") from error
    if len(data) < size:
        raise MalformedElf(f"the file ends before the end of its {what}")
    return data


@dataclass(frozen=True)
class _StringTable:
    """Strings by offset. Only those asked for are read: the table of a large library is tens of MB."""

    descriptor: int
    offset: int
    size: int

    def at(self, index: int) -> str:
        if index >= self.size:
            raise MalformedElf(f"string {index} is outside of the string table of {self.size} bytes")
        text = b""
        while b"\0" not in text:
            try:
                more = os.pread(self.descriptor, 256, self.offset + index + len(text))
            except (OverflowError, OSError) as error:
                raise MalformedElf(f"string {index}: {error}") from error
            if not more or len(text) > _LARGEST_STRING:
                raise MalformedElf(f"string {index} has no end")
            text += more
        return os.fsdecode(text.partition(b"\0")[0])

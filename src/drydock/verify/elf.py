"""Reads of an ELF object what the dynamic loader reads: machine, soname, needed libraries, search paths.

Field names and numbers are those of elf(5) and of the System V gABI, chapter 5. Like the loader it goes by
segments, never by sections, so that stripped and patched objects read the same.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

MACHINES = {"x86_64": 62, "aarch64": 183}
"""`platform.machine()` -> e_machine."""

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_LARGEST_DYNAMIC = 1 << 20
_LARGEST_STRING = 1 << 14


class MalformedElf(ValueError):
    """A file begins as an ELF object does, and its headers do not hold together."""


@dataclass(frozen=True, kw_only=True)
class ElfObject:
    """An executable, shared library, extension module or relocatable object.

    `machine` is e_machine; `native` is whether it is ELF64 little-endian, the only kind whose dynamic section
    is read. `search` is RUNPATH, or without one RPATH, with $ORIGIN and the like as they stand in the file.
    """

    machine: int
    native: bool = True
    soname: str | None = None
    needed: tuple[str, ...] = ()
    search: tuple[str, ...] = ()

    def is_for(self, machine: str) -> bool:
        """Whether the loader of this `platform.machine()` takes it."""
        return self.native and self.machine == MACHINES.get(machine)

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
        header = os.pread(descriptor, 64, 0)
        if header[:4] != b"\x7fELF":
            return None
        if len(header) < 64:
            raise MalformedElf(f"{len(header)} bytes are too few for an ELF header")
        machine = int.from_bytes(header[18:20], "big" if header[5] == 2 else "little")
        if header[4:6] != b"\x02\x01":
            return ElfObject(machine=machine, native=False)
        return _read_dynamic(descriptor, machine, header)
    finally:
        os.close(descriptor)


def _read_dynamic(descriptor: int, machine: int, header: bytes) -> ElfObject:
    (offset,) = struct.unpack_from("<Q", header, 32)
    entry_size, count = struct.unpack_from("<HH", header, 54)
    if count and entry_size != _PROGRAM_HEADER.size:
        raise MalformedElf(f"program headers of {entry_size} bytes")
    headers = _read(descriptor, offset, count * _PROGRAM_HEADER.size, "program headers")
    segments = list(_PROGRAM_HEADER.iter_unpack(headers))
    dynamic = [(segment[2], segment[5]) for segment in segments if segment[0] == _PT_DYNAMIC and segment[5]]
    if not dynamic:  # a static or relocatable object; in detached debug files it has no content
        return ElfObject(machine=machine)
    where, size = dynamic[-1]
    if size > _LARGEST_DYNAMIC:
        raise MalformedElf(f"a dynamic section of {size} bytes")
    section = _read(descriptor, where, size, "dynamic section")
    pairs = struct.iter_unpack("<qQ", section[: size & ~15])
    entries = list(takewhile(lambda entry: entry[0] != _DT_NULL, pairs))
    values = dict(entries)
    if _DT_STRTAB not in values or _DT_STRSZ not in values:
        raise MalformedElf("the dynamic section names no string table")
    address, table_size = values[_DT_STRTAB], values[_DT_STRSZ]
    for kind, _, where, start, _, size, _, _ in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            table = where + address - start
            break
    else:
        raise MalformedElf(f"no segment holds the string table's address {address:#x}")

    def strings(tag: int) -> tuple[str, ...]:
        return tuple(_string(descriptor, table, table_size, value) for key, value in entries if key == tag)

    return ElfObject(
        machine=machine,
        soname=next(iter(strings(_DT_SONAME)), None),
        needed=strings(_DT_NEEDED),
        search=tuple(
            folder for folders in strings(_DT_RUNPATH) or strings(_DT_RPATH) for folder in folders.split(":")
        ),
    )


def _read(descriptor: int, offset: int, size: int, what: str) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except (OverflowError, OSError) as error:
        raise MalformedElf(f"{what} at offset {offset:#x}: {error}") from error
    if len(data) < size:
        raise MalformedElf(f"the file ends before the end of its {what}")
    return data


def _string(descriptor: int, table: int, table_size: int, index: int) -> str:
    """One string of the table, which is tens of MB in a large library."""
    if index >= table_size:
        raise MalformedElf(f"string {index} is outside of the string table of {table_size} bytes")
    try:
        data = os.pread(descriptor, min(_LARGEST_STRING, table_size - index), table + index)
    except (OverflowError, OSError) as error:
        raise MalformedElf(f"string {index}: {error}") from error
    text, end, _ = data.partition(b"\0")
    if not end:
        raise MalformedElf(f"string {index} has no end")
    return os.fsdecode(text)

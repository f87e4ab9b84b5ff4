"""Ascend NPUs, as the driver's `npu-smi` shows them: their numbers, memory and processes, and the driver's version.

`npu-smi info` prints tables for people, of two forms: of an Atlas A2, with one chip a card, and of an A3, with two and
their physical numbers. `npu-smi info -m` has each chip's logical number, by which ASCEND_RT_VISIBLE_DEVICES names it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

SECONDS = 60.0
"""It asks every card, one after the other."""
BUS = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")
PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")
NUMBERS = 6
"""Of a driver's version, to be compared: more than any has."""


class NpuSmiError(Exception):
    """npu-smi is not there, fails, or prints what cannot be read."""


class Npu(NamedTuple):
    """One chip: card and number on it, logical number, name, bus address; memory in MiB, the device's own (HBM)."""

    card: int
    chip: int
    number: int
    name: str
    bus: str
    health: str
    used_mib: int
    total_mib: int

    @property
    def place(self) -> str:
        """Card and chip in one word."""
        return f"{self.card}.{self.chip}"


class Process(NamedTuple):
    """A process on a chip, and the MiB that it holds there; a name may be empty."""

    card: int
    chip: int
    pid: int
    name: str
    mib: int

    @property
    def place(self) -> str:
        """Card and chip in one word."""
        return f"{self.card}.{self.chip}"


class Seen(NamedTuple):
    """What there is, and the driver's version."""

    driver: str
    npus: tuple[Npu, ...]
    processes: tuple[Process, ...]


def version_key(version: str) -> tuple[tuple[int, int], ...]:
    """A driver's version, to be compared: 24.1.RC3, 24.1.0, 25.0.RC1, 25.0.rc1.1, 25.2.1, 26.0.RC1, 26.0.0.

    A release candidate has "RC" and its number where its release has its last one, and comes before it. npu-smi and
    version.info write it in small letters.

    Raises:
        ValueError: it is no such version.
    """
    key = []
    for part in version.split("."):
        match = re.fullmatch(r"(rc)?(\d+)", part, re.IGNORECASE)
        if match is None:
            raise ValueError(f"{version!r} is no version of Ascend's driver")
        key.append((0 if match[1] else 1, int(match[2])))
    return tuple(key + [(1, 0)] * (NUMBERS - len(key)))


def look() -> Seen:
    """Ask the driver.

    Raises:
        NpuSmiError: it is not there, or does not say.
    """
    return read(_run("info"), _run("info", "-m"))


def read(info: str, numbers: str) -> Seen:
    """Read what `npu-smi info` and `npu-smi info -m` print.

    Raises:
        NpuSmiError: it is not what they print, or a chip has no number.
    """
    driver = re.search(r"npu-smi\s.*Version:\s*(\S+)", info)
    logical = _logical(numbers)
    npus = tuple(_npus(info, logical))
    if driver is None or not npus:
        raise NpuSmiError(
            f"npu-smi info shows no device: {' '.join(info.split())[:200] or 'it prints nothing'}"
        )
    return Seen(driver[1], npus, tuple(_processes(info)))


def _npus(info: str, logical: dict[tuple[int, int], int]) -> Iterator[Npu]:
    """Two rows a chip: card, name, health; then chip, bus address, memory."""
    card: tuple[int, str, str] | None = None
    for cells in _rows(info):
        if len(cells) != 3:
            continue
        first = cells[0].split()
        if not BUS.fullmatch(cells[1]):
            named = len(first) == 2 and first[0].isdigit()
            card = (int(first[0]), first[1], cells[1]) if named else None
            continue
        # The last one: an inference card has no HBM, and one memory only. None is of nothing.
        used, total = map(int, (PAIR.findall(cells[2]) or [(0, 0)])[-1])
        if card is None or not first or not first[0].isdigit() or not total:
            raise NpuSmiError(f"npu-smi info has a row that cannot be read: {' | '.join(cells)}")
        chip = int(first[0])
        if (card[0], chip) not in logical:
            raise NpuSmiError(f"npu-smi info -m has no logical number of card {card[0]}, chip {chip}")
        yield Npu(card[0], chip, logical[card[0], chip], card[1], cells[1], card[2], used, total)


def _processes(info: str) -> Iterator[Process]:
    for cells in _rows(info):
        # The newest driver has a column more, of the number in a container.
        where = cells[0].split()
        if len(cells) in (4, 5) and len(where) == 2 and cells[1].isdigit() and cells[3].isdigit():
            yield Process(int(where[0]), int(where[1]), int(cells[1]), cells[2], int(cells[3]))


def _rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def _logical(numbers: str) -> dict[tuple[int, int], int]:
    """(card, chip) -> logical number. A card's own controller ("Mcu") has none."""
    found = {}
    for line in numbers.splitlines():
        words = line.split()
        if len(words) >= 4 and all(word.isdigit() for word in words[:3]):
            found[int(words[0]), int(words[1])] = int(words[2])
    return found


def _run(*arguments: str) -> str:
    what = f"npu-smi {' '.join(arguments)}"
    try:
        done = subprocess.run(
            ["npu-smi", *arguments], capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except OSError as error:
        raise NpuSmiError(
            f"{what} does not run ({error.strerror}): put the driver's npu-smi on PATH"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise NpuSmiError(f"{what} did not answer in {SECONDS:g} s") from error
    if done.returncode:
        raise NpuSmiError(f"{what} failed: {(done.stdout + done.stderr).strip()[:300]}")
    return done.stdout

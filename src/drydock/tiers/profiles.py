"""A tier's profile values, from its `profile.toml`: what fast and full use, side by side.

    [max_model_len]
    fast = 256
    full = 4096
    gives-up = "one sentence: what the fast value does not prove"

Read in the image, so: standard library only.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drydock.errors import DrydockError

PROFILES = ("fast", "full")
KEYS = {"fast", "full", "gives-up"}


def kind_of(profile: str, cpu_part: bool) -> str:
    """What a run of a profile is in budgets and documents: `fast`, or `fast-cpu-part`, which has budgets of its own."""
    return f"{profile}-cpu-part" if cpu_part else profile


@dataclass(frozen=True, kw_only=True)
class Value:
    """One parameter: its value in each profile, and what the fast one gives up."""

    name: str
    fast: Any
    full: Any
    gives_up: str

    def document(self, profile: str) -> dict[str, Any]:
        """As the result document has it; `value` is the running profile's."""
        value = getattr(self, profile)
        return {"name": self.name, "value": value, "fast": self.fast, "full": self.full,
                "gives_up": self.gives_up}  # fmt: skip


class Profile(Mapping[str, Any]):
    """Parameter -> its value in the running profile; knows which ones were read.

    Parameters:
        name: `fast` or `full`.
        path: the file, for errors.
        rows: in the file's order.
    """

    def __init__(self, name: str, path: Path, rows: Mapping[str, Value]) -> None:
        self.name = name
        self.path = path
        self._rows = rows
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self._rows:
            raise DrydockError(f"{self.path} has no {key!r}: it has {', '.join(self._rows) or 'nothing'}")
        self._read.add(key)
        return getattr(self._rows[key], self.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def unread(self) -> list[str]:
        """The parameters nobody asked for."""
        return [name for name in self._rows if name not in self._read]

    def document(self) -> list[dict[str, Any]]:
        """As the result document has it."""
        return [value.document(self.name) for value in self._rows.values()]


def read_profile(path: Path, name: str) -> Profile:
    """The values of one profile; none where there is no file.

    Raises:
        DrydockError: a parameter without fast, full or gives-up, or with something else; or not TOML.
    """
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        document = {}
    except (OSError, ValueError) as error:
        raise DrydockError(f"{path}: {error}") from error
    rows = {}
    for key, row in document.items():
        if not isinstance(row, dict):
            raise DrydockError(f"{path}: {key} is not a table with fast, full and gives-up")
        if missing := KEYS - row.keys():
            raise DrydockError(f"{path}: {key} has no {' and no '.join(sorted(missing))}")
        if unknown := row.keys() - KEYS:
            raise DrydockError(f"{path}: {key} has an unknown {', '.join(sorted(unknown))}")
        if not isinstance(row["gives-up"], str) or not row["gives-up"].strip():
            raise DrydockError(f"{path}: {key}: gives-up must say what the fast value does not prove")
        rows[key] = Value(name=key, fast=row["fast"], full=row["full"], gives_up=row["gives-up"])
    return Profile(name, path, rows)

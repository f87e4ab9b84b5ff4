"""Names and versions of distributions, however they are spelled."""

from __future__ import annotations

import re

_WORD = re.compile(r"[-_.]?(alpha|a|beta|b|preview|pre|rc|c|post|rev|r|dev)[-_.]?(\d*)")
_SPELLED = {"alpha": "a", "beta": "b", "preview": "rc", "pre": "rc", "c": "rc"}
_SPELLED |= {"post": ".post", "rev": ".post", "r": ".post", "dev": ".dev"}


def normalize_name(name: str) -> str:
    """A project name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def normalize_version(text: str) -> str:
    """A version as PEP 440 compares it: METADATA may say 2024.07.04 where the lock says 2024.7.4."""
    public, _, local = text.strip().lower().removeprefix("v").partition("+")
    public = _WORD.sub(lambda word: _SPELLED.get(word[1], word[1]) + (word[2] or "0"), public)
    public = re.sub(r"-(\d)", r".post\1", public)
    public = re.sub(r"\d+", lambda number: str(int(number[0])), public).removeprefix("0!")
    public = re.sub(r"^((?:\d+!)?\d+(?:\.\d+)*?)(?:\.0)+(?!\.?\d)", r"\1", public)
    pieces = [str(int(piece)) if piece.isdigit() else piece for piece in re.split(r"[-_.]", local)]
    return f"{public}+{'.'.join(pieces)}" if local else public


def same_version(one: str, other: str) -> bool:
    """Whether two versions are equal by PEP 440."""
    return one == other or normalize_version(one) == normalize_version(other)

"""What images are called (`<hardware>-<engine>`, a `-<variant>` behind it), and which files of a checkout are theirs.

Standard library only: it is asked inside of images too, and about earlier revisions.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

COMMON = "image.toml"
"""The definition that the engines of a hardware share."""


def definition_files(image: str) -> list[str]:
    """Where an image may be defined, as paths in the checkout, of which the first that is there counts.

    An engine has a file of its own where it has a base or a Python that others of its hardware have not; it may have a
    variant behind it.
    """
    hardware, _, engine = image.partition("-")
    own = [name for name in (engine, engine.rpartition("-")[0]) if name]
    return [*(f"images/{hardware}/{name}.toml" for name in own), f"images/{hardware}/{COMMON}"]


def definition_path(root: Path, image: str) -> Path:
    """The file that defines an image; its hardware's common one where none does."""
    *own, common = (root / file for file in definition_files(image))
    return next((path for path in own if path.is_file()), common)


def split_variant(engine: str, engines: Container[str]) -> tuple[str, str]:
    """An engine's name and the variant behind it, or nothing; a name that is neither comes back whole.

    >>> split_variant("vllm-a3", {"vllm"})
    ('vllm', 'a3')
    """
    name, _, variant = engine.rpartition("-")
    return (name, variant) if engine not in engines and name and variant else (engine, "")


def base_lock(definition: str, hardware: str, engine: str, variant: str) -> str:
    """The lock of a vendor's image, which all engines of one definition (its file's name) share."""
    of = (hardware, "" if definition == COMMON else engine, variant)
    return f"lock/base-{'-'.join(filter(None, of))}.toml"

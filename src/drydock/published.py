"""`lock/images.toml`: the digests that each image came out with, for everybody to reproduce."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w

from drydock.errors import DrydockError
from drydock.locks import sha256_json
from drydock.oci import Built

RECORDS = "lock/images.toml"
Verdict = Literal["same", "different", "not recorded"]


def read_records(root: Path) -> dict[str, Any]:
    """Image name -> digest, config digest, lock hash and diff IDs, as recorded.

    Raises:
        DrydockError: the file is not TOML.
    """
    path = root / RECORDS
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise DrydockError(f"{path} is not TOML ({error}): restore it, or build with --record") from error


def record(built: Built) -> dict[str, Any]:
    """What is recorded of an image: its identity, and what each layer unpacks to."""
    return {
        "digest": f"sha256:{built.digest}",
        "config-digest": f"sha256:{built.config_digest}",
        "size": built.size,
        "diff-ids": [f"sha256:{layer.diff_id}" for layer in built.layers],
    }


def compare(root: Path, built: Built) -> Verdict:
    """Whether a build gave what is recorded."""
    recorded = read_records(root).get(built.name)
    if recorded is None:
        return "not recorded"
    return "same" if sha256_json(recorded) == sha256_json(record(built)) else "different"


def write_record(root: Path, built: Built) -> None:
    """Record a build, leaving other images' records as they are."""
    records = read_records(root) | {built.name: record(built)}
    path = root / RECORDS
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(tomli_w.dumps(dict(sorted(records.items()))))
    temporary.rename(path)

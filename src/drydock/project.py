"""The checkout that is worked on, its store, and where its artifacts come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drydock.errors import DrydockError
from drydock.store import Store

if TYPE_CHECKING:
    from drydock.locks import Artifact


def project_root() -> Path:
    """The checkout to work on: the nearest folder upward that has `images/` and `lock/`, else drydock's own.

    Raises:
        DrydockError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).parents[2]):
        if (folder / "images").is_dir() and (folder / "lock").is_dir():
            return folder
    raise DrydockError("no checkout here: run drydock in a folder that has images/ and lock/")


def open_store(root: Path) -> Store:
    """The store: `DRYDOCK_STORE`, or `.drydock` in the checkout."""
    return Store(Path(os.environ.get("DRYDOCK_STORE") or root / ".drydock"))


def get_artifacts(store: Store, artifacts: list[Artifact]) -> Any:
    """Fetch artifacts from wherever this user's configuration says."""
    from drydock.fetch import fetch
    from drydock.indexes import debian_mirrors, read_indexes

    missing = [artifact for artifact in artifacts if not store.has(artifact.sha256, artifact.size)]
    mirrors = debian_mirrors(os.environ) if any(artifact.kind == "deb" for artifact in missing) else {}
    return fetch(store, artifacts, read_indexes(os.environ), mirrors)

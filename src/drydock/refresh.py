"""A refresh of the locks, for its pull request: what was recorded anew, and what its reviewer wants to know."""

from __future__ import annotations

from pathlib import Path

from drydock.ci import records_at, touched
from drydock.contract import look_up
from drydock.definition import Image
from drydock.diff import diff, side, text_lines
from drydock.errors import DrydockError
from drydock.matrix import held
from drydock.oci import Built
from drydock.progress import amount
from drydock.project import get_artifacts
from drydock.published import read_records, write_record
from drydock.store import Store

MOST = 60_000
"""Characters of the text; GitHub takes 65,536 of a pull request."""


def record(root: Path, store: Store, base: str) -> list[Built]:
    """Build every image that the changes since a revision touch, and record its digests.

    Raises:
        DrydockError: one cannot be built; those before it are recorded.
    """
    from drydock.build import build

    made = []
    for name in touched(root, base).images:
        built, _ = build(Image.named(root, name), store, lambda artifacts: get_artifacts(store, artifacts))
        write_record(root, built)
        made.append(built)
    return made


def notes(root: Path, store: Store, base: str) -> str:
    """The pull request's text, in Markdown; empty where no image is touched.

    Of every image that is touched: the contract's verdict and the size of what one pulls. Then what all images hold
    now, and each package that moved.

    Raises:
        DrydockError: git does not know the revision, or a lock cannot be read.
    """
    names = list(touched(root, base).images)
    if not names:
        return ""
    before, now = records_at(root, base), read_records(root)
    lines, moved = ["The locks, with every package moved that the definitions let move.", ""], []
    for name in names:
        lines += [f"## {name}", ""]
        lines += [f"- {_contract(Image.named(root, name), store)}"]
        lines += [f"- size: {_size(before.get(name))} -> {_size(now.get(name))}", ""]
        moved += [f"## What moved in {name}", "", "```", *_changes(root, store, name, base), "```", ""]
    # First what a reviewer decides by: a host may take a text of limited length only.
    return _within("\n".join([*lines, "## What images hold now", "", *held(root), "", *moved]) + "\n")


def _within(text: str) -> str:
    if len(text) <= MOST:
        return text
    kept = text[:MOST].rpartition("\n")[0]
    # An odd number of fences: the cut is in a list of changes, which is to end.
    fence = "\n```" if kept.count("```") % 2 else ""
    return f"{kept}{fence}\n\nThe rest did not fit: `drydock diff IMAGE@REVISION IMAGE` has it.\n"


def _changes(root: Path, store: Store, name: str, base: str) -> list[str]:
    try:
        old = side(root, store, f"{name}@{base}")
    except DrydockError as error:
        return [f"new: {error}"]
    document = diff(old, side(root, store, name))
    # Of layers, nothing is kept of a revision.
    return [line for line in text_lines(document) if not line.startswith("layers:")]


def _contract(image: Image, store: Store) -> str:
    answer = look_up(image, store)
    if not answer.missing:
        return f"contract: all {answer.uses} uses are there{answer.aside}"
    listed = "".join(f"\n  - `{line}`" for line in answer.missing)
    return f"**contract: {len(answer.missing)} of {answer.uses} uses are missing**{listed}"


def _size(record: dict[str, object] | None) -> str:
    return amount(int(str(record["size"]))) if record else "none recorded"

"""`docs/matrix.md`: what each image holds and how far it has been proven, from definitions, locks and runs alone.

A mark is made for what a file shows: a lock, a recorded digest, or a run's own document under `docs/runs`. No
document, no mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drydock.build import Inputs
from drydock.definition import Image, image_names
from drydock.locks import read_pylock
from drydock.published import read_records
from drydock.report import Report, read

HEADER = """# What there is, and how far it has been proven

Made by `drydock matrix --write` from definitions, locks and the runs in [runs](runs/README.md); a test keeps it so.
"""
HELD = (
    "image",
    "engine",
    "trainer",
    "torch",
    "CUDA or CANN",
    "NCCL or HCCL",
    "driver",
    "sm or SoC",
    "Python",
    "digest",
    "GB",
)
PROVEN = ("image", "locked", "built", "verified", "run on a CPU", "run on its device")


def matrix(root: Path) -> str:
    """The page's text.

    Raises:
        DrydockError: a definition, a lock or a run's document cannot be read.
    """
    return "\n".join([HEADER, *held(root), "", "## Proven", "", *proven(root), "", FOOTER])


FOOTER = """A run is named with the tests that passed in it, and with those that failed. "Earlier" is a run of an image
of that name with another digest than the one recorded now, "emulated" one on a CPU of another architecture. Of a base
that is not read yet, the versions are what its definition says of it.
"""


def proven(root: Path) -> list[str]:
    """The lines of its second table: how far each image has been proven, and by which runs."""
    records = read_records(root)
    runs = [(path, read(path)) for path in sorted((root / "docs/runs").glob("*.json"))]
    rows = []
    for name in image_names(root):
        image = Image.named(root, name)
        record = records.get(name)
        own = [(path, run) for path, run in runs if run.image.name == name]
        rows.append(
            (
                f"`{name}`",
                _locked(image),
                f"`{record['digest'][:19]}`" if record else "",
                _marks(own, record, "verified"),
                _marks(own, record, "cpu"),
                _marks(own, record, image.definition.accelerator.kind),
            )
        )
    return table(PROVEN, rows)


def held(root: Path) -> list[str]:
    """The lines of its first table: what each image holds."""
    records = read_records(root)
    return table(HELD, [_held(Image.named(root, name), records.get(name)) for name in image_names(root)])


def _held(image: Image, record: dict[str, object] | None) -> tuple[str, ...]:
    definition = image.definition
    # Nothing of a vendor's image but what its definition says, which may be all that is known of it.
    versions = image.provides | {package.name: package.version for package in read_pylock(image).packages}
    python = image.vendor.python_version if image.vendor else Inputs(image).python_version
    kind = definition.accelerator.kind
    toolkit = collectives = "-"
    if kind == "cuda":
        held_by = "the base's" if image.vendor else "-"
        toolkit = versions.get("nvidia-cuda-runtime", held_by)
        collectives = versions.get("nvidia-nccl-cu13", held_by)
    elif kind == "npu":
        toolkit, collectives = f"CANN {definition.accelerator.cann}", "HCCL, in CANN"

    def of(*names: str) -> str:
        return ", ".join(f"{name} {versions[name]}" for name in names if name in versions) or "-"

    return (
        f"`{image.name}`",
        of(image.engine.distribution),
        of("verl", "megatron-core"),
        ", ".join([versions.get("torch", "-"), *([of("torch-npu")] if "torch-npu" in versions else [])]),
        toolkit,
        collectives,
        definition.accelerator.minimum_driver or "-",
        ", ".join(definition.accelerator.sm or image.soc) or "-",
        python,
        f"`{str(record['digest'])[:19]}`" if record else "-",
        f"{int(str(record['size'])) / 1e9:.2f}" if record else "-",
    )


def _locked(image: Image) -> str:
    if not image.pylock_path.is_file():
        return ""
    return "packages; its base is not read yet" if image.unread else "yes"


def _marks(runs: list[tuple[Path, Report]], record: dict[str, object] | None, kind: str) -> str:
    """Links to the documents that show it."""
    marks = []
    for path, run in runs:
        if kind == "verified":
            if not (run.verification and run.verification.verdict == "ok"):
                continue
            text = path.stem
        elif run.device.kind != kind:
            continue
        else:
            outcomes = [test.outcome for _, test in run.tests]
            passed = outcomes.count("passed")
            failed = len(outcomes) - passed
            what = ", ".join(tier.tier for tier in run.tiers)
            text = f"{what}, {run.profile}: {passed} passed" + (f", {failed} failed" if failed else "")
            text += ", emulated" if run.device.emulated else ""
        earlier = "" if record and run.image.digest == record["digest"] else " (earlier)"
        marks.append(f"[{text}](runs/{path.name}){earlier}")
    return "<br>".join(marks)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]

"""Compares an image with what it was locked to be, from inside: `python -m drydock.verify`.

Standard library only, since it runs with the image's own Python and drydock itself is not in the image. What
an image is compared with lies in its /usr/share/drydock: `manifest.json`, the locks, and `base.RECORD`, which
names every file outside of the wheels. Each check is one module; the order of the checks is here.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from drydock.errors import DrydockError
from drydock.verify.accelerator import check_accelerator
from drydock.verify.debs import check_debs
from drydock.verify.distributions import check_absent, check_distributions, check_provided, held
from drydock.verify.files import check_files
from drydock.verify.here import verify_here
from drydock.verify.image import open_image
from drydock.verify.interpreter import Interpreter, check_python
from drydock.verify.libraries import check_libraries
from drydock.verify.npu import check_cann
from drydock.verify.report import Check, Outcome, Report, printable, text_lines

__all__ = ["main", "verify"]


def verify(root: Path, full: bool) -> Report:
    """Verify the image under `root`; `/` is the one that runs this.

    Parameters:
        full: compare every file's hash, not only its size.

    Raises:
        DrydockError: it is not a drydock image, or its manifest cannot be read.

    >>> verify(Path("/"), full=False).verdict
    'ok'
    """
    started = time.perf_counter()
    image = open_image(root)
    live = image.tree.root == "/"
    checks: dict[str, Callable[[], Outcome]] = {
        "python": lambda: check_python(image, Interpreter.running() if live else None),
        "distributions": lambda: check_distributions(image),
        "files": lambda: check_files(image, full),
        "debs": lambda: check_debs(image, full),
        "libraries": lambda: check_libraries(image),
        "accelerator": lambda: check_accelerator(image.manifest, live),
    }
    manifest = image.manifest
    installed = cache(lambda: held(image))
    if manifest.accelerator.kind == "npu":
        checks["cann"] = lambda: check_cann(
            manifest.accelerator, image.tree, manifest.machine, manifest.environment, installed()
        )
    if manifest.vendor:
        checks["base"] = lambda: check_provided(image)
    if manifest.absent_distributions:
        checks["absent"] = lambda: check_absent(manifest.absent_distributions, installed())
    return Report(
        image=image.manifest.image,
        checks=tuple(Check.run(name, check) for name, check in checks.items()),
        full=full,
        seconds=round(time.perf_counter() - started, 3),
        python=platform.python_version() if live else image.manifest.python,
        machine=platform.machine() if live else image.manifest.machine,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 for an image that is right, 1 for drift, 2 for what is no image."""
    parser = argparse.ArgumentParser(
        "python -m drydock.verify", description="Compare this image with its lock."
    )
    parser.add_argument("--full", action="store_true", help="compare every file's hash, not only its size")
    parser.add_argument("--json", action="store_true", help="print one JSON document on one line")
    parser.add_argument("--document", type=Path, metavar="FILE", help="also write the JSON document there")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="an image unpacked in DIR"
    )
    parser.add_argument(
        "--here", nargs=2, metavar=("CHECKOUT", "IMAGE"),
        help="compare the environment that runs this, which is no image, with that image's lock",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.here:
            report = verify_here(Path(options.here[0]), options.here[1])
        else:
            report = verify(options.root, options.full)
    except DrydockError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_status
    if options.document:
        options.document.write_text(json.dumps(report.document()) + "\n")
    print(json.dumps(report.document()) if options.json else "\n".join(text_lines(report)))
    return 0 if report.verdict == "ok" else 1

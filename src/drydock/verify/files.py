"""Check: every file of the distributions is as its RECORD says, and no other file is among them."""

from __future__ import annotations

import contextlib
import csv

from drydock.verify.distributions import dist_info_folders
from drydock.verify.image import Image
from drydock.verify.records import Rows, add_rows, compare
from drydock.verify.report import Finding, Outcome


def check_files(image: Image, full: bool) -> Outcome:
    """Every file under the prefix against the RECORDs and base.RECORD, both ways.

    Bytecode counts: a stray .pyc would run in place of its module.
    """
    site_packages = image.manifest.site_packages
    rows: Rows = {}
    findings = []
    for folder in dist_info_folders(image):
        record, name = f"{site_packages}/{folder}/RECORD", folder.partition("-")[0]
        with contextlib.suppress(OSError, csv.Error):  # `check_distributions` reports it
            findings += add_rows(image.tree, record, rows, site_packages, f"RECORD of {name}")
    findings += compare(image.tree, rows, full)
    for path in image.in_prefix.keys() - rows.keys() - image.base.keys():
        findings.append(Finding(f"/{path}", "stray: no RECORD names it"))
    return Outcome(len(rows), f"{len(rows)} files, {'hashes' if full else 'sizes'} compared", findings)

"""The page of runs says what the documents beside it say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drydock.report import read

RUNS = Path(__file__).parents[2] / "docs/runs"
DOCUMENTS = sorted(RUNS.glob("*.json"))
PAGE = (RUNS / "README.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_the_row_of_a_run_is_its_documents(path: Path) -> None:
    run = read(path)
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| [{path.name}]")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    tests = [test.outcome for _, test in run.tests]
    gpus = json.loads(path.read_text())["device"]["gpus"]
    assert cells[2] == f"{run.image.name} `{(run.image.digest or '')[:19]}`"
    assert cells[3] == f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}"
    assert cells[4] == ("as locked" if run.verification and run.verification.verdict == "ok" else "differ")
    assert cells[5] == ("passed" if run.ok else "failed")
    assert cells[6:] == [
        str(tests.count("passed")),
        str(len(tests) - tests.count("passed")),
        f"{run.seconds:.1f}",
    ]


def test_the_figures_of_the_eplb_table_are_the_documents() -> None:
    run = read(RUNS / "2026-11-23-eplb-2xh200.json")
    rows = {}
    for line in PAGE.splitlines():
        if found := re.match(r"\| (sync|async) \| (\d) \|(.*)\|$", line):
            rows[f"{found[1]}-{found[2]}"] = [cell.strip() for cell in found[3].split("|")]
    assert len(rows) == 4
    for _, test in run.tests:
        if found := re.search(r"keeps_the_answers\[(.*)\]", test.id):
            records = test.records
            loads = records["expert_load"]
            before, after = (re.search(rf"([\d.]+) {when}", loads["title"]) for when in ("before", "after"))
            assert before
            assert after
            longest = records["longest wait for a token, seconds"]["with"]
            equal = records["equal to the server without EPLB"]
            assert rows[found[1]] == [
                str(records["rearrangements"]),
                before[1],
                after[1],
                f"{longest:.2f} s",
                f"{equal:.0%}",
                f"{test.seconds:.0f}",
            ]

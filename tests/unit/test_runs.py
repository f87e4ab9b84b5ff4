"""The page of runs says what the documents beside it say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from struct import unpack

import pytest

from drydock.matrix import matrix
from drydock.report import read

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "docs/runs"
DOCUMENTS = sorted(RUNS.glob("*.json"))
PAGE = (RUNS / "README.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_the_row_of_a_run_is_its_documents(path: Path) -> None:
    run = read(path)
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| [{path.name}]")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    tests = [test.outcome for _, test in run.tests]
    device = json.loads(path.read_text())["device"]
    gpus = device["gpus"]
    assert cells[2] == f"{run.image.name} `{(run.image.digest or '')[:19]}`"
    assert cells[3] == (
        f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}"
        if gpus
        else f"{device['cpu']}, {device['cores']} cores"
        + (", aarch64 emulated" if device.get("emulated") else "")
    )
    assert cells[4] == ("as locked" if run.verification and run.verification.verdict == "ok" else "differ")
    assert cells[5] == ("passed" if run.ok else "failed")
    assert cells[6:] == [
        str(tests.count("passed")),
        str(len(tests) - tests.count("passed")),
        f"{run.seconds:.1f}",
    ]


def test_the_figures_of_the_eplb_table_are_the_documents() -> None:
    rows = {}
    for line in PAGE.splitlines():
        if found := re.match(r"\| (?:vLLM, (sync|async)|SGLang) \| (\d) \|(.*)\|$", line):
            key = f"{found[1]}-{found[2]}" if found[1] else found[2]
            rows[key] = [cell.strip() for cell in found[3].split("|")]
    assert len(rows) == 6
    names = ("2026-11-28-eplb-2xh100", "2026-11-27-sglang-eplb-2xh100")
    seen = set()
    for _, test in [each for name in names for each in read(RUNS / f"{name}.json").tests]:
        if found := re.search(r"keeps_the_answers\[(.*)\]", test.id):
            seen.add(found[1])
            records = test.records
            loads = records["expert_load"]
            before, after = (re.search(rf"([\d.]+) {when}", loads["title"]) for when in ("before", "after"))
            assert before
            assert after
            longest = records["longest wait for a token, seconds"]
            equal = records["equal to the server without EPLB"]
            assert rows[found[1]] == [
                str(records["rearrangements"]),
                before[1],
                after[1],
                f"{longest['with']:.2f} s",
                f"{longest['while experts moved']:.2f} s",
                f"{equal:.0%}",
                f"{test.seconds:.0f}",
            ]
    assert seen == rows.keys()


def test_the_matrix_is_what_locks_and_runs_say() -> None:
    assert (ROOT / "docs/matrix.md").read_text() == matrix(ROOT), "run `drydock matrix --write`"


def test_no_mark_in_the_matrix_without_its_run(tmp_path: Path) -> None:
    for name in ("images", "lock"):
        shutil.copytree(ROOT / name, tmp_path / name)
    text = matrix(tmp_path)
    rows = {line.split("`")[1]: line for line in text.partition("## Proven")[2].splitlines() if "`" in line}
    assert len(rows) > 3
    for row in rows.values():
        assert row.endswith("|  |  |  |")

    # A run of the recorded digest is marked in its image's row and nowhere else.
    document = json.loads((RUNS / "2026-11-23-eplb-2xh200.json").read_text())
    digest = re.search(r'\[h100-vllm\]\ndigest = "(.*)"', (tmp_path / "lock/images.toml").read_text())
    assert digest
    document["image"]["digest"] = digest[1]
    (tmp_path / "docs/runs").mkdir(parents=True)
    (tmp_path / "docs/runs/one.json").write_text(json.dumps(document))
    marked = [line for line in matrix(tmp_path).splitlines() if "runs/one.json" in line]
    assert len(marked) == 1
    assert marked[0].startswith("| `h100-vllm` |")
    assert "(earlier)" not in marked[0]
    assert "emulated" not in marked[0]
    document["device"] |= {"kind": "cpu", "emulated": "aarch64"}
    (tmp_path / "docs/runs/one.json").write_text(json.dumps(document))
    (row,) = [line for line in matrix(tmp_path).splitlines() if "runs/one.json" in line]
    assert "11 passed, emulated]" in row


def test_the_readmes_short_matrix_says_what_the_long_one_does() -> None:
    """Engines, and how many tests passed; whoever has not run has no mark in the long one either."""
    long = (ROOT / "docs/matrix.md").read_text()
    held, _, proven = long.partition("## Proven")
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] != []
    for row in rows:
        name, _, engine, mark, command = (cell.strip() for cell in row.strip("|").split("|"))
        hardware, _, engine_name = name.strip("`").partition("-")
        (line,) = [line for line in proven.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {name} | {engine} |" in held
        assert command.strip("`") == f"make image-{hardware}" + (
            "" if engine_name == "vllm" else f" ENGINE={engine_name}"
        )
        if passed := re.search(r"\d+ passed", mark):
            # Of the image as it is recorded, not of an earlier one.
            runs = re.findall(
                r"\[rollout, trainer, eplb, (\S+): (\d+ passed)(, emulated)?\]\(\S+\)(?! \(earlier\))", line
            )
            profile = "fast" if "all tiers, fast" in mark else "fast-cpu-part"
            assert (profile, passed[0], ", emulated" if "emulated" in mark else "") in runs
        elif "its base is not read yet" in line:
            assert mark == "locked; not built: its base could not be read here"
        else:
            unread = "its base is not read yet" in line
            assert mark == (
                "locked; not built: its base could not be read here" if unread else "built, not run yet"
            )
            assert "passed" not in line
    assert {row.split("`")[1] for row in rows} == set(re.findall(r"^\| `(\S+)` \|", held, re.MULTILINE))


def test_the_picture_of_a_report_is_of_a_run_that_is_kept_here() -> None:
    """Its text in the README is the run's, and it is small enough for a first screen."""
    run = read(RUNS / "2026-11-24-cpu.json")
    words = re.search(r"!\[(.*)\]\(docs/report.png\)", (ROOT / "README.md").read_text())
    assert words
    assert (
        f"on {run.image.name}: {'passed' if run.ok else 'failed'}, all {len(list(run.tests))} tests"
        in words[1]
    )
    assert f"{run.seconds:.0f} s of" in words[1]
    picture = (ROOT / "docs/report.png").read_bytes()
    assert len(picture) < 200_000
    assert unpack(">II", picture[16:24]) == (1200, 705)

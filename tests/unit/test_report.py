"""The report of a run: its page, its JUnit file, its history and its table for a terminal.

What a page looks like is measured in Chromium, by a page around it. Those tests are skipped where there is no
Chromium, and fail where DRYDOCK_REQUIRE_BROWSER is set, as CI sets it.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import report_documents as documents
from report_documents import Document, build, crashed, empty, failing, find, hostile, huge, save_runs

from drydock import report
from drydock.errors import DrydockError
from drydock.report import documents as typed
from drydock.report.charts import drawing, waterfall
from drydock.report.junit import junit
from drydock.report.page import page
from drydock.report.past import History
from drydock.report.terminal import plain_lines, show

PACKAGE = Path(report.__file__).parent
KINDS: dict[str, Callable[[], Document]] = {
    "passing": build,
    "failing": failing,
    "crashed": crashed,
    "empty": empty,
    "huge": huge,
    "hostile": hostile,
}


@functools.cache
def page_of(kind: str) -> str:
    """The page of a kind of run, with an earlier run in its history."""
    return rendered(KINDS[kind](), build(seed=2, began="2026-11-20T00:00:00Z"))


def rendered(document: Document, *earlier: Document) -> str:
    return page(typed.parse(document), History(runs=tuple(map(typed.parse, earlier))))


# ------------------------------------------------------------------------------------------ reading


class Elements(HTMLParser):
    """A page as its elements and its text, by the parser of the standard library, which runs no script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).replace("\N{NO-BREAK SPACE}", " ").split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_run_has_three_files_and_its_own_document_back(tmp_path: Path) -> None:
    document = failing()
    made = report.write(document, tmp_path / "runs/now")
    assert sorted(path.name for path in (tmp_path / "runs/now").iterdir()) == [
        "junit.xml", "report.html", "report.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "runs/now/report.json").read_text()) == document
    assert not made.ok
    again = report.write(tmp_path / "runs/now/report.json", tmp_path / "copy")
    assert again == made
    for name in ("junit.xml", "report.html", "report.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "runs/now" / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_makes_a_page(kind: str) -> None:
    made = Elements(page_of(kind))
    assert made.open == [], "an element is left open"
    assert made.all("html") == [{"lang": "en"}]
    assert len(made.all("h1")) == len(made.all("title")) == len(made.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in made.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    ids = [attributes["id"] for _, attributes in made.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id is used twice"
    for tag, attributes in made.elements:
        for name, value in attributes.items():
            if name == "href" or (targets := re.findall(r"url\(#([^)]*)\)", value)):
                target = value.removeprefix("#") if name == "href" else targets[0]
                assert target in ids, f"<{tag} {name}={value}> leads nowhere"
    for picture in made.all("svg"):
        assert picture["role"] == "img"
        assert len(picture["aria-label"]) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_asks_for_nothing_and_runs_nothing(kind: str) -> None:
    made = Elements(page_of(kind))
    assert {tag for tag, _ in made.elements}.isdisjoint(
        {
            "script",
            "img",
            "link",
            "iframe",
            "object",
            "embed",
            "form",
            "base",
            "image",
            "foreignobject",
            "audio",
        }
    )
    policy = next(row["content"] for row in made.all("meta") if row.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in made.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action"), tag
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "xlink:href") or value.startswith("#"), (tag, name, value)
            assert name != "style" or not re.search(r"url\((?!#)|expression|@import", value), (tag, value)
    style = (PACKAGE / "page.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_what_tests_say_is_text_and_nothing_else() -> None:
    text = page_of("hostile")
    text.encode()  # no half of a surrogate pair
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028\ufffe\uffff]", text)
    made = Elements(text)
    assert "<script>document.title = 'pwned'</script>" in made.text
    assert "{{ 7*7 }}" in made.text
    assert "\\x1b[31mred" in made.text
    assert "\\udcff\\ud800\\ufffe\\uffff\\u202e\\u2028" in made.text
    assert "日本語" in made.text


def test_the_style_leaves_no_color_of_matplotlib_behind() -> None:
    pictures = re.findall(r"<svg.*?</svg>", page_of("passing"), flags=re.DOTALL)
    assert len(pictures) == 3 + 4 + 2 + 1
    colors = set(
        (PACKAGE / "page.css").read_text().split(":root {")[1].split("}")[0].replace("\n", " ").split()
    )
    for picture in pictures:
        assert not re.search(r"#[0-9a-f]{6}", picture)
        for name in re.findall(r"var\((--[a-z]+)\)", picture):
            assert f"{name}:" in colors, name
        ElementTree.fromstring(picture)


# ----------------------------------------------------------------------------------- what it tells


def heading(document: Document) -> str:
    match = re.search(r"<h1>(.*?)</h1>", rendered(document), flags=re.DOTALL)
    assert match
    return " ".join(re.sub("<[^>]+>", "", match[1]).split())


def test_the_page_opens_with_the_verdict_in_one_sentence() -> None:
    count = sum(len(tests) for tests in documents.TESTS.values())
    assert heading(build()) == f"vllm_fast passed: all {count} tests of 3 tiers passed"
    assert heading(failing()) == (
        f"vllm_fast failed: 4 of {count - 3} tests failed (rollout 1, trainer 2, eplb 1); 3 tests did not run"
    )
    assert heading(crashed()) == "vllm_fast failed: pytest ended with status -9 and left no document"
    assert heading(empty()) == (
        "vllm_fast failed: the image is not what its lock says (verification ended with status 1)"
    )
    assert len(heading(crashed() | {"detail": "long " * 1000})) < 350


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document["tiers"][1].update(outcome="failed", detail="over its budget"),
        lambda document: document["tiers"][2].update(complete=False),
        lambda document: find(document, "test_gae")[1].update(outcome="missing"),
        lambda document: find(document, "test_gae")[1].update(outcome="not-run"),
        lambda document: document["verification"].update(verdict="drift"),
        lambda document: document.update(outcome="failed"),
    ],
)
def test_no_part_that_failed_hides_behind_an_outcome(spoil: Callable[[Document], object]) -> None:
    document = build()
    assert typed.parse(document).ok
    assert ElementTree.fromstring(junit(typed.parse(document))).find(".//failure") is None
    spoil(document)
    assert heading(document).startswith("vllm_fast failed: ")
    assert Elements(rendered(document)).text.count("Nothing.") == 0
    assert ElementTree.fromstring(junit(typed.parse(document))).find(".//failure") is not None
    assert next(plain_lines(typed.parse(document), None)).endswith(": failed")


def test_drift_that_was_allowed_is_said_first_and_fails_nothing() -> None:
    document = build()
    check = document["verification"]["checks"][0]
    check["findings"] = [{"subject": "torch", "what": "2.11.0 is locked, 2.10.0 is installed"}]
    document["verification"]["verdict"] = "drift"
    document["drift_allowed"] = True
    run = typed.parse(document)
    assert run.ok
    first = next(plain_lines(run, None))
    assert "not the locked image: it differs from the lock in 1 place" in first
    assert first.endswith(": passed")
    text = Elements(rendered(document)).text
    assert -1 < text.find("Not the locked image") < text.find("Versions")
    assert "2.11.0 is locked, 2.10.0 is installed" in text
    assert ElementTree.fromstring(junit(run)).find(".//failure") is None
    # Allowed and not there: nothing to say.
    assert typed.parse(build() | {"drift_allowed": True}).drift == ""


def test_where_no_page_can_be_made_the_document_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an image, which has the stack's packages and none of ours."""
    monkeypatch.setitem(sys.modules, "drydock.report.page", None)  # its import fails
    report.write(build(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "junit.xml"}
    assert "`drydock report" in capsys.readouterr().err
    report.summary(build(), tmp_path)
    assert "report.html" not in capsys.readouterr().out


def test_the_page_says_what_failed_and_where() -> None:
    text = Elements(page_of("failing")).text
    for said in (
        "tests/rollout/test_serving.py::test_log_probabilities_agree_with_transformers[moe]",
        "AssertionError: assert 0.4811 < 0.05",
        "where 0.4811 = max(abs(",
        "in its ready phase",
        "stacks-test_what_is_put_is_got.txt",
        "2417 raylet --session-dir",
        "Its document is not complete",
        "0.04 s in test, under its floor of 1.0 s",
        "needs 2 GPUs and there are none",
    ):
        assert said in text, said


def test_of_a_very_long_detail_the_page_has_both_ends() -> None:
    document = failing()
    find(document, "agree_with_transformers[moe]")[1]["detail"] = f"first{'x' * 1_000_000}last"
    text = rendered(document)
    assert len(text) < 500_000
    assert "980,009 characters are left out here" in text
    assert "firstxxx" in text
    assert "xxxlast" in text
    assert "x" * 1_000_000 in junit(typed.parse(document)).decode()


def test_the_page_says_what_did_not_run_and_why() -> None:
    made = page_of("failing")
    part = made[made.index('id="absent"') : made.index('id="budgets"')]
    text = Elements(f"<h2 {part[: part.rindex('</section>')]}").text
    assert "not selected rollout tests/rollout/test_gsm8k.py::test_accuracy needs --gsm8k-model and" in text
    assert "missing eplb tests/eplb/test_ranks.py::test_all_ranks_compute_the_same_map needs 2 GPUs" in text
    assert "not run eplb 3 tests" in text
    assert "test_planner_time the tier had been interrupted" in text
    assert "not run session the throughput benchmark the session's ceiling was near" in text


def test_fast_says_that_it_is_not_full_and_what_it_gives_up() -> None:
    made = Elements(page_of("passing"))
    assert "this is not full" in made.text
    assert "max_model_len 256 instead of 4096 : sequences that need more" in made.text.replace(
        "4096:", "4096 :"
    )
    assert "seed 17" not in made.text, "a value that both profiles share gives nothing up"
    full = Elements(rendered(build(session="vllm_full", profile="full"))).text
    assert "not full" not in full
    assert "instead of" not in full


def test_the_page_names_the_run() -> None:
    document = build()
    document["drydock"]["dirty"] = True
    document["device"]["gpus"] = [{"name": "NVIDIA H100", "memory_bytes": 80 << 30, "driver": "580.159"}] * 2
    text = Elements(rendered(document)).text
    for said in (
        document["image"]["digest"], document["image"]["config_digest"], document["drydock"]["commit"][:12],
        "with uncommitted changes", "2 × NVIDIA H100, 80 GiB each, driver 580.159", "2026-11-22 23:50 UTC",
        "cpu-vllm is as locked (222 distributions, 51,873 files, 151 debs, 688 libraries)", "Python 3.13.5",
    ):  # fmt: skip
        assert said in text, said


def test_the_page_names_npus_and_what_is_missing_as_declared() -> None:
    document = build()
    document["device"] |= {
        "kind": "npu",
        "npus": [{"name": "Ascend910", "memory_bytes": 64 << 30, "driver": "26.0.rc2"}] * 2,
    }
    document["verification"]["checks"].append(
        {"name": "absent", "state": "as-declared", "checked": 1, "seconds": 0.0, "findings": [],
         "detail": "mindspeed is missing, as declared: no index has it"}
    )  # fmt: skip
    page = rendered(document)
    text = Elements(page).text
    assert "2 × Ascend910, 64 GiB each, driver 26.0.rc2" in text
    assert "mindspeed is missing, as declared: no index has it" in text
    assert '<span class="outcome quiet">as-declared</span>' in page


def test_the_page_says_what_was_emulated() -> None:
    document = build()
    document["device"] |= {"cpu": "A CPU", "emulated": "aarch64"}
    assert "A CPU, 2 cores, 24 GiB; aarch64 emulated" in Elements(rendered(document)).text
    assert "emulated" not in Elements(rendered(build())).text


def test_differences_from_the_lock_are_listed() -> None:
    text = Elements(page_of("empty")).text
    assert "differs from the lock in 1 place" in text
    assert "torch : 2.11.1 is installed, 2.11.0 is locked" in text
    assert "The image was not verified." in Elements(page_of("crashed")).text


def test_the_slowest_twenty_are_the_slowest_in_order() -> None:
    document, made = huge(), page_of("huge")
    part = made[made.index('id="slowest"') : made.index('id="history"')]
    shown = re.findall(r'<code title="([^"]*)"', part)
    times = {test["id"]: test["seconds"] for tier in document["tiers"] for test in tier["tests"]}
    assert len(shown) == 20
    assert [times[name] for name in shown] == sorted(times.values(), reverse=True)[:20]


def test_a_phase_is_as_long_as_its_seconds_and_its_mark_is_at_its_ceiling() -> None:
    document = build()
    tier = document["tiers"][0] | {
        "tests": [], "seconds": 40.0, "phases": {"load": 10.0, "test": 30.0},
        "budget": {"phases": {"load": {"ceiling": 20.0}, "test": {"ceiling": 60.0, "floor": 1.0}}},
    }  # fmt: skip
    made = typed.Tier.model_validate(tier)
    with drawing():
        chart = waterfall("tier", made)
    paths = re.findall(r'<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) [^"]*"[^>]*var\(--(\w+)\)', chart.svg)
    spans = {color: sorted((float(a), float(b))) for a, b, color in paths if color in ("load", "test")}
    (load, load_end), (test, test_end) = spans["load"], spans["test"]
    unit = (load_end - load) / 10
    assert test_end - test == pytest.approx(30 * unit)
    assert test == pytest.approx(load_end), "the second phase begins where the first ended"
    marks = [float(a) for a, b, color in paths if color == "ink" and a == b]
    assert sorted(marks) == pytest.approx([load + 20 * unit, load + 70 * unit])
    for said in ("load 10.0 s of 20.0 s, 50% left", "test 30.0 s of 60.0 s, 50% left"):
        assert said in chart.svg
    assert "10.0 s · 50% left" in chart.svg


def test_a_tests_phases_follow_each_other_and_its_name_is_no_formula() -> None:
    tier = build()["tiers"][0]
    test = tier["tests"][0] | {"id": "tests/rollout/test_a.py::test_$x^{$", "budget": None}
    test |= {"seconds": 50.0, "phases": {"load": 10.0, "test": 30.0, "stop": 5.0}}
    tier |= {"tests": [test], "seconds": 50.0, "phases": {}, "budget": None}
    with drawing():
        chart = waterfall("tier", typed.Tier.model_validate(tier))
    assert "test_$x^{$" in chart.svg
    bars = re.findall(
        r'<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) [^"]*"[^>]*var\(--(load|test|stop|other)\)', chart.svg
    )
    assert [color for *_, color in bars] == ["load", "test", "stop", "other"]
    edges = [(float(left), float(right)) for left, right, _ in bars]
    unit = (edges[0][1] - edges[0][0]) / 10
    assert [right - left for left, right in edges] == pytest.approx(
        [unit * length for length in (10, 30, 5, 5)]
    )
    assert [right for _, right in edges[:-1]] == pytest.approx([left for left, _ in edges[1:]])


def test_headroom_is_never_rounded_in_favour() -> None:
    def of(seconds: float) -> str:
        return typed.Use(name="test", seconds=seconds, limit=typed.Limit(ceiling=100, floor=1)).headroom

    assert of(99.99) == "0% left"
    assert of(100.01) == "1% over"
    assert of(100.0) == "0% left"
    assert of(50.4) == "49% left"
    assert of(0.99) == "below the floor of 1.0 s"


# --------------------------------------------------------------------------------------- records


def test_loads_and_series_are_drawn_and_told() -> None:
    text = Elements(page_of("passing")).text
    assert "balance 0.30 → 0.98; 1 layer, 7,400 tokens before, 7,400 tokens after" in text
    assert "threshold 0.4 (dashed)" in text
    assert '"moved": 870' in text


def test_balance_is_over_ranks() -> None:
    assert typed.balance((8.0, 0.0, 0.0, 0.0)) == 0.25
    assert typed.balance((2.0, 2.0)) == 1.0
    assert typed.balance((0.0, 0.0)) is None


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("expert_load", {"before": [1.0, 2.0], "after": [1.0]}, "the same ranks"),
        ("expert_load", {"before": [[1.0, 2.0], [1.0]], "after": [[1.0, 2.0], [1.0]]}, "the same ranks"),
        ("expert_load", {"before": [], "after": []}, "at least 1 item"),
        ("expert_load", {"before": [-1.0], "after": [float("nan")]}, "greater than or equal to 0"),
        ("expert_load", "text", "valid dictionary"),
        ("series", {"x": [1, 2], "y": [1]}, "the same length"),
        ("series", {"x": [1], "y": [float("inf")]}, "finite"),
        ("series", {"y": [1]}, "Field required"),
    ],
)
def test_a_record_that_cannot_be_drawn_is_listed_with_its_reason(name: str, value: Any, problem: str) -> None:
    document = build()
    find(document, "test_flags")[1]["records"] = {name: value}
    text = Elements(rendered(document)).text
    assert "not drawn" in text
    assert problem in text


def test_odd_loads_and_series_are_drawn() -> None:
    document = build()
    tests = [test for tier in document["tiers"] for test in tier["tests"]]
    for test in tests:
        test["records"] = {}
    tests[0]["records"] = {
        "expert_load": [
            {"before": [[0.0, 0.0], [4.0, 0.0]], "after": [[0.0, 0.0], [2.0, 2.0]], "title": "a layer without load"},
            {"before": [0.0], "after": [0.0], "title": "one rank and no load at all"},
            {"before": [[1.0] * 64] * 58, "after": [[1.0] * 64] * 58, "title": "many"},
        ],
        "series": [
            {"x": [1], "y": [0.5], "title": "one step"},
            {"x": [1, 2, 3], "y": [0.5, float("nan"), 0.5], "title": "a gap", "threshold": 0.5},
            {"x": list(range(3000)), "y": [0.0] * 3000, "title": "long and flat at zero"},
        ],
    }  # fmt: skip
    made = Elements(rendered(document))
    assert len(made.all("svg")) == 3 + 6
    assert "balance 0.50 → 1.00, worst layer 0.50 → 1.00; 2 layers" in made.text
    assert "balance unknown" in made.text
    assert "not drawn" not in made.text


# --------------------------------------------------------------------------------------- history


def test_history_is_of_the_same_session_and_image_before_this_run(tmp_path: Path) -> None:
    save_runs(tmp_path)
    now = build()
    (tmp_path / "now").mkdir()
    (tmp_path / "now/report.json").write_text(json.dumps(now))
    other = build(began="2026-11-20T00:00:00Z")
    other["image"]["name"] = "h100-vllm"
    for name, document in (
        ("other-image", other),
        ("other-session", build(began="2026-11-20T00:00:00Z", session="vllm_full", profile="full")),
        ("later", build(began="2026-11-23T00:00:00Z")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(document))
    made = report.history(tmp_path, typed.parse(now))
    assert [run.began.day for run in made.runs] == [17, 18, 19, 20, 21], (
        "each once, though `latest` names one again"
    )
    assert made.notes == ()
    # Made again, an old run shows what was before it, not what came after.
    assert len(report.history(tmp_path, made.runs[2]).runs) == 2


def test_broken_and_foreign_documents_are_a_line_each(tmp_path: Path) -> None:
    save_runs(tmp_path, 2)
    bad = {
        "cut": '{"schema": 1, "session"', "old": '{"schema": 0}', "list": "[]", "bytes": "\udcff",
        "deep": "[" * 100_000, "fields": '{"schema": 1, "session": "vllm_fast"}',
    }  # fmt: skip
    for name, text in bad.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/report.json").symlink_to("nowhere")
    (tmp_path / "folder/report.json").mkdir(parents=True)
    report.write(build(), tmp_path / "now")
    made = Elements((tmp_path / "now/report.html").read_text())
    assert "in 3 runs of vllm_fast" in made.text
    assert made.text.count("left out: ") == len(bad) + 1
    assert "has schema 0 and this drydock reads 1" in made.text


def test_a_first_run_says_that_it_is_the_first(tmp_path: Path) -> None:
    report.write(build(), tmp_path / "now")
    assert (
        "No earlier run of vllm_fast in cpu-vllm" in Elements((tmp_path / "now/report.html").read_text()).text
    )


def test_the_trend_marks_this_run_and_its_share() -> None:
    text = rendered(build(), build(seed=3, began="2026-11-20T00:00:00Z"))
    share = typed.parse(build()).use.share
    assert share
    assert "Share of its ceiling used by session: 2026-11-20 00:00 UTC" in text
    assert f"2026-11-22 23:50 UTC {share * 100:.0f}%." in text
    assert ">this run<" in text


def test_what_ran_in_part_is_not_compared() -> None:
    document = build()
    tier = document["tiers"][0]
    tier |= {"whole": False, "tests": tier["tests"][:1], "phases": {"test": 0.5}}
    assert tier["budget"]["phases"]["test"]["floor"] > 0.5
    text = rendered(document, build(seed=3, began="2026-11-20T00:00:00Z"))
    assert "used by trainer" in text
    assert "used by rollout" not in text
    assert "used by session" not in text
    assert "asked for in part" in text
    assert "below the floor" not in text
    document["tiers"] = [tier]
    document["not_run"] = [{"what": "the eplb tier", "reason": "only rollout was asked for (--tier)"}]
    assert "nothing in this one compares" in rendered(document, build(seed=3, began="2026-11-20T00:00:00Z"))


# ----------------------------------------------------------------------------------------- JUnit


def test_junit_has_a_suite_a_tier_and_a_case_a_test() -> None:
    root = ElementTree.fromstring(junit(typed.parse(failing())))
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["rollout", "trainer", "eplb", "session"]
    assert [suites["rollout"].get(name) for name in ("tests", "failures", "errors", "skipped")] == [
        "21", "1", "0", "3",
    ]  # fmt: skip
    case = next(case for case in suites["trainer"] if case.get("name") == "test_what_is_put_is_got")
    assert case.get("classname") == "tests.trainer.test_transferqueue"
    assert float(case.get("time", 0)) > 60
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("type") == "overrun"
    assert "in its ready phase" in (failure.text or "")
    assert "stacks-test_what_is_put_is_got.txt" in (failure.text or "")
    kinds = {failure.get("type") for failure in root.iter("failure")}
    assert kinds == {"failed", "overrun", "underrun", "missing", "not-run"}
    skipped = [case.find("skipped") for case in suites["eplb"].findall("testcase")]
    assert [row.get("message") for row in skipped if row is not None] == [
        "not selected: full profile only: EPLB runs on GPUs only"
    ] * 3
    properties = {row.get("name"): row.get("value") for row in suites["eplb"].iter("property")}
    assert properties["image.digest"] == failing()["image"]["digest"]
    assert properties["versions"] == "ok"
    assert root.get("tests") == str(len(list(root.iter("testcase"))))


@pytest.mark.parametrize("kind", KINDS)
def test_junit_is_readable_and_fails_when_the_run_does(kind: str) -> None:
    made = typed.parse(KINDS[kind]())
    root = ElementTree.fromstring(junit(made))
    bad = list(root.iter("failure")) + list(root.iter("error"))
    assert bool(bad) is not made.ok
    assert int(root.get("failures", 0)) + int(root.get("errors", 0)) == len(bad)
    assert all(row.get("message") for row in bad)


def test_junit_has_a_case_for_a_tier_that_failed_as_a_whole() -> None:
    document = build()
    document["tiers"][1] |= {"outcome": "overrun", "detail": "ready took longer than its ceiling"}
    root = ElementTree.fromstring(junit(typed.parse(document)))
    case = next(case for case in root.iter("testcase") if case.find("failure") is not None)
    assert (case.get("classname"), case.get("name")) == ("tests.trainer", "tier")
    assert [row.get("type") for row in root.iter("failure")] == ["overrun"]


def test_junit_splits_names_as_pytest_does() -> None:
    document = build()
    find(document, "test_flags")[1]["id"] = "tests/rollout/test_a.py::TestB::test_c[d::e/f.py]"
    find(document, "test_serving")[1]["outcome"] = "error"
    root = ElementTree.fromstring(junit(typed.parse(document)))
    case = next(root.iter("testcase"))
    assert (case.get("classname"), case.get("name")) == ("tests.rollout.test_a.TestB", "test_c[d::e/f.py]")
    assert len(list(root.iter("error"))) == 1


# -------------------------------------------------------------------------------------- terminal


def test_plain_lines_for_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").touch()
    report.summary(failing(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vllm_fast on cpu-vllm (fast: this is not full): failed"
    assert lines[1].split() == [
        "tier",
        "outcome",
        "passed",
        "failed",
        "not",
        "run",
        "seconds",
        "ceiling",
        "headroom",
    ]
    assert lines[3].split()[:5] == ["trainer", "overrun", "15", "2", "1"]
    assert lines[3].endswith("over (ready)")
    assert lines[5].split()[:5] == ["session", "failed", "47", "4", "10"]
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"
    name = "tests/rollout/test_serving.py::test_log_probabilities_agree_with_transformers[moe]"
    assert f"failed in test: {name}: AssertionError: assert 0.4811 < 0.05" in lines
    assert "eplb: 3 tests did not run" in lines
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_a_terminal_gets_colors_of_ours_only(kind: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    show(typed.parse(KINDS[kind]()), Path("report.html"), stream)
    text = stream.getvalue()
    assert "report: report.html" in text
    text.encode()
    assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]", text)
    # What hostile text there is came out as text, not as a color or as markup.
    if kind == "hostile":
        assert "\\x1b[31mred\\x1b[0m" in text


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1", "it is not JSON"),
        ("[]", "it names no schema"),
        ("{}", "it names no schema"),
        ('{"schema": 7}', "has schema 7 and this drydock reads 1"),
        ('{"schema": 1}', "session: Field required"),
        (json.dumps(build() | {"outcome": "fine"}), "outcome: Input should be 'passed' or 'failed'"),
        (json.dumps(build() | {"seconds": float("nan")}), "seconds: Input should be a finite number"),
        (json.dumps(build() | {"began": "yesterday"}), "began: Input should be a valid datetime"),
    ],
)
def test_what_is_not_a_report_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text(text)
    assert_fails(["report", str(tmp_path)], said, capsys, monkeypatch)
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_fails(["report", str(tmp_path / "none")], "name the folder of a run", capsys, monkeypatch)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DrydockError, match="cannot write the report in"):
        report.write(build(), file / "folder")


def assert_fails(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from drydock.cli import main

    monkeypatch.setattr(sys, "argv", ["drydock", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("drydock: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_the_command_makes_the_page_again(tmp_path: Path) -> None:
    report.write(failing(), tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    for name in ("report.html", "junit.xml"):
        (tmp_path / name).unlink()
    command = [sys.executable, "-m", "drydock.cli", "report", str(tmp_path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["outcome"] == "failed"
    assert Path(answer["html"]).read_bytes() == before
    assert ElementTree.parse(answer["junit"])
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[0] == "vllm_fast on cpu-vllm (fast: this is not full): failed"


# ----------------------------------------------------------------------------------- the surroundings


def test_the_users_own_settings_of_matplotlib_change_nothing() -> None:
    expected = rendered(build())
    mine = {"font.size": 40.0, "svg.fonttype": "path", "axes.facecolor": "red", "text.usetex": True}
    with matplotlib.rc_context(mine):
        assert rendered(build()) == expected
        assert all(matplotlib.rcParams[name] == value for name, value in mine.items())


def test_five_hundred_tests_are_reported_in_little_time(tmp_path: Path) -> None:
    """Processor seconds of a fresh process, imports included; drydock's whole overhead must stay under five."""
    (tmp_path / "report.json").write_text(json.dumps(huge()))
    code = (
        "import sys, time; from pathlib import Path; from drydock.report import write; folder = Path(sys.argv[1]);"
        "write(folder / 'report.json', folder); print(time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert float(done.stdout) < 5


def scheme(text: str) -> dict[str, tuple[float, float, float]]:
    """Names of colours -> linear red, green and blue, from one block of the style sheet."""

    def linear(part: str) -> float:
        value = int(part, 16) / 255
        return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)

    found = re.findall(r"--([a-z-]+): #([0-9a-f]{6});", text)
    return {name: (linear(color[:2]), linear(color[2:4]), linear(color[4:])) for name, color in found}


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""
    light, dark = sorted(
        (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05 for r, g, b in (one, other)), reverse=True
    )
    return light / dark


@pytest.mark.parametrize("block", ["light", "dark"])
def test_text_and_bars_stand_out_from_their_grounds(block: str) -> None:
    style = (PACKAGE / "page.css").read_text()
    light, dark, *_ = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colors = scheme(light if block == "light" else dark)
    for text, *grounds in (
        ("ink", "page", "card", "warn-soft", "track"), ("muted", "page", "card", "warn-soft"), ("link", "page", "card"),
        ("good", "page", "card", "good-soft"), ("bad", "page", "card", "bad-soft"), ("warn", "warn-soft"),
    ):  # fmt: skip
        for ground in grounds:
            assert contrast(colors[text], colors[ground]) >= 4.5, f"{text} on {ground}: WCAG AA for text"
    for bar in ("start", "load", "ready", "test", "stop", "other", "before", "after"):
        assert contrast(colors[bar], colors["card"]) >= 3, f"{bar}: WCAG AA for graphics"


# ------------------------------------------------------------------------------------ in a browser

PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>probe</title><body style="margin:0">
<iframe id="frame" src="%s" style="border:0;height:900px;width:390px"></iframe><pre id="answer"></pre>
<script>
function measure(page, width) {
  const root = page.documentElement, wide = [], unseen = [], outside = [], over = [];
  let smallest = 99;
  for (const part of page.querySelectorAll("header, main, section, h1, h2, figure, footer, nav, .card"))
    if (!part.getBoundingClientRect().height) unseen.push(part.tagName + " " + part.textContent.slice(0, 40));
  for (const part of page.body.querySelectorAll("*")) {
    const box = part.getBoundingClientRect();
    if (box.right > width + 1 && !part.closest(".box, pre")) wide.push(part.tagName + "." + part.className);
  }
  for (const picture of page.querySelectorAll("figure svg")) {
    const frame = picture.getBoundingClientRect(), scale = frame.width / picture.viewBox.baseVal.width;
    const labels = [...picture.querySelectorAll("text")].map(label => [label, label.getBoundingClientRect()]);
    for (const [label, box] of labels) {
      const name = picture.getAttribute("aria-label").slice(0, 40) + ": " + label.textContent;
      smallest = Math.min(smallest, parseFloat(getComputedStyle(label).fontSize) * scale);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
          box.bottom > frame.bottom + 1) outside.push(name);
      for (const [other, its] of labels)
        if (other !== label && Math.min(box.right, its.right) - Math.max(box.left, its.left) > 1 &&
            Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top) > 4) over.push(name);
    }
  }
  return {width: width, scroll: root.scrollWidth, wide: wide.slice(0, 5), unseen, outside, over, smallest,
          height: root.scrollHeight};
}
window.onload = () => {
  const frame = document.getElementById("frame"), page = frame.contentDocument, answer = {title: page.title, seen: []};
  for (const width of [360, 390, 800, 1600])
    for (const open of [false, true]) {
      frame.style.width = width + "px";
      for (const part of page.querySelectorAll("details")) part.open = open;
      answer.seen.push({open, ...measure(page, width)});
    }
  document.getElementById("answer").textContent = JSON.stringify(answer);
};
</script>
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("DRYDOCK_REQUIRE_BROWSER"):
        pytest.fail("DRYDOCK_REQUIRE_BROWSER is set and there is no Chromium: apt-get install chromium")
    pytest.skip("not run: no Chromium on this machine (Debian: apt-get install chromium)")


@pytest.fixture
def look(chromium: str, tmp_path: Path) -> Iterator[Callable[[str, str], tuple[dict[str, Any], list[str]]]]:
    """Renders a page and returns what the probe measured and what the browser's console said."""

    def run(text: str, scheme: str = "light") -> tuple[dict[str, Any], list[str]]:
        (tmp_path / "page.html").write_text(text)
        (tmp_path / "probe.html").write_text(PROBE % "page.html")
        done = subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
                "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1700,1000",
                f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
                f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "probe.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, flags=re.DOTALL)
        assert answer, f"the probe did not answer: {done.stdout[-500:]} {done.stderr[-2000:]}"
        assert answer[1], f"the probe did not answer: {done.stderr[-2000:]}"
        unescaped = answer[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return json.loads(unescaped), re.findall(r"CONSOLE[^\n]*", done.stderr)

    yield run
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)


Look = Callable[..., tuple[dict[str, Any], list[str]]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_shows_all_of_it_at_any_width(kind: str, look: Look) -> None:
    answer, console = look(page_of(kind))
    assert console == []
    assert answer["title"].startswith("vllm_fast ")
    assert len(answer["seen"]) == 8
    for seen in answer["seen"]:
        assert seen["scroll"] <= seen["width"], f"scrolls sideways at {seen['width']} px: {seen['wide']}"
        assert seen["wide"] == []
        assert seen["unseen"] == []
        assert seen["smallest"] >= 8.5, "px of a chart's smallest text"
        if kind != "hostile":
            assert seen["outside"] == [], "text of a chart is cut"
            assert seen["over"] == [], "text of a chart lies on other text"


def test_a_browser_has_nothing_to_say_about_the_dark_scheme(look: Look) -> None:
    answer, console = look(page_of("failing"), "dark")
    assert console == []
    assert all(seen["scroll"] <= seen["width"] and not seen["unseen"] for seen in answer["seen"])


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ('<div style="width:2000px">wide</div>', "wide"),
        ("<section style='display:none'>gone</section>", "unseen"),
        ("<figure><svg viewBox='0 0 100 20' aria-label='a'><text x='90' y='9'>cut</text></svg></figure>", "outside"),
        ("<figure><svg viewBox='0 0 320 20' aria-label='a'><text y='15'>aa</text><text y='15'>bb</text></svg></figure>",
         "over"),
    ],
)  # fmt: skip
def test_the_probe_sees_a_planted_fault(fault: str, place: str, look: Look) -> None:
    answer, _ = look(page_of("passing").replace("</main>", f"{fault}</main>"))
    assert any(seen[place] for seen in answer["seen"])
    if place == "wide":
        assert [seen["scroll"] > seen["width"] for seen in answer["seen"]] == [True] * 8


@pytest.mark.parametrize(
    "fault", ['<img src="https://example.invalid/x.png">', "<script>document.title = 'ran'</script>"]
)
def test_the_pages_own_policy_stops_a_planted_request_and_a_planted_script(fault: str, look: Look) -> None:
    answer, console = look(page_of("passing").replace("</main>", f"{fault}</main>"))
    assert any("Content Security Policy" in line for line in console)
    assert answer["title"].startswith("vllm_fast ")


def test_the_readmes_picture_is_made_by_its_tool(chromium: str, tmp_path: Path) -> None:
    """As large as the one that is kept; its pixels depend on a machine's fonts."""
    root = Path(__file__).parents[2]
    tool = [sys.executable, root / "tools/picture.py"]
    environment = {**os.environ, "PATH": f"{Path(chromium).parent}:{os.environ['PATH']}"}
    run = root / "docs/runs/2026-11-24-cpu.json"
    subprocess.run([*tool, run, tmp_path / "report.png"], env=environment, check=True)
    made, kept = ((folder / "report.png").read_bytes() for folder in (tmp_path, root / "docs"))
    assert made[:24] == kept[:24], "a PNG's signature, width and height"
    assert len(made) > 20_000, "bytes of a page that shows nothing are few"
    (tmp_path / "empty.json").write_text("{}")
    refused = subprocess.run(
        [*tool, tmp_path / "empty.json", tmp_path / "no.png"], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert not (tmp_path / "no.png").exists()

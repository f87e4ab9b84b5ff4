"""Accuracy of a real model on GSM8K through the server's API; and that the numbers are read and counted right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import gsm8k
import pytest
from client import at_once
from conftest import Launch

from drydock.server import Server

EXAMPLES = 5
"""Worked examples before each question, from the head of the file; they are not asked."""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 6*7 = 42\n#### 42", "42"),
        ("#### 42.", "42"),
        ("#### 42.0", "42"),
        ("#### $1,234.50 in all", "1234.5"),
        ("#### -3", "-3"),
        ("First 3, then 4.\n#### 7\n\nQuestion: and 9?\nAnswer: #### 9", "7"),
        ("#### 7\n#### 9", "7"),
        ("So it is 12 + 30 = 42 apples.", "42"),
        ("It is 5. Question: 6", "5"),
        ("####", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_answer_is_found(text: str, number: str | None) -> None:
    assert gsm8k.answer(text) == (None if number is None else Decimal(number))


def problem(question: str, number: int) -> dict[str, str]:
    return {"question": question, "answer": f"It is {number}, or {number + 1} less 1.\n#### {number:,}"}


ROWS = [problem("One and one?", 2), problem("A thousand and one?", 1001), problem("Two and two?", 4)]


def test_both_forms_of_the_file_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines, table = tmp_path / "lines" / "test.jsonl", tmp_path / "main" / "test-00000-of-00001.parquet"
    for path in (lines, table):
        path.parent.mkdir()
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    problems = gsm8k.read(lines)
    assert [found.answer for found in problems] == [2, 1001, 4]
    assert gsm8k.read(table) == problems
    assert gsm8k.read(table.parent) == problems, "the folder does for its only file"
    with pytest.raises(ValueError, match="2 files"):
        gsm8k.read(tmp_path)


@pytest.mark.parametrize(
    "row",
    [{"question": "1?"}, {"question": "1?", "answer": "one"}, {"question": "1?", "answer": "#### x"}, [1]],
)
def test_another_file_is_refused(tmp_path: Path, row: Any) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="row 2"):
        gsm8k.read(tmp_path / "test.jsonl")


def test_right_answers_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    problems = gsm8k.read(tmp_path / "test.jsonl")
    assert gsm8k.accuracy(problems, [found.worked for found in problems]) == 1
    assert gsm8k.accuracy(problems, ["#### 2", "#### 1000", "no idea"]) == pytest.approx(1 / 3)


def test_a_prompt_shows_how_to_answer(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first, second, third = gsm8k.read(tmp_path / "test.jsonl")
    text = gsm8k.prompt([first, second], third.question)
    assert text.count("#### ") == 2
    assert text.endswith("Question: Two and two?\nAnswer:")
    assert "#### 4" not in text, "the answer must not be given away"


@pytest.mark.serves
@pytest.mark.asked("gsm8k_model", "gsm8k_data")
def test_accuracy(
    request: pytest.FixtureRequest, launch: Launch, profile: Mapping[str, Any], results: Path, record: Any
) -> None:
    words = launch.words
    model, data = (Path(request.config.getoption(f"--gsm8k-{name}")) for name in ("model", "data"))
    problems = gsm8k.read(data)
    examples, asked = problems[:EXAMPLES], problems[EXAMPLES:][: profile["gsm8k_questions"]]
    assert len(asked) >= profile["gsm8k_questions"] - EXAMPLES, f"{data} has {len(problems)} problems only"
    flags = [words.length, "2048"]
    log = results / f"{words.engine.name.lower()}-gsm8k.log"
    with Server(words.engine, model, flags, log=log, environment=launch.environment) as server:

        def solve(problem: gsm8k.Problem) -> str:
            text = gsm8k.prompt(examples, problem.question)
            options = {"max_tokens": 512, "temperature": 0.0, "stop": ["Question:"]}
            return server.complete(text, timeout=3600, **options)["text"]

        texts = at_once(solve, asked)
    found = gsm8k.accuracy(asked, texts)
    record("accuracy", found)
    assert found >= profile["gsm8k_accuracy"]

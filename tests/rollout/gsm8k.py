"""GSM8K: problems from a file, prompts with worked examples, and the number in what a model answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, its worked answer, and the number that the answer ends in."""

    question: str
    worked: str
    answer: Decimal


def read(path: Path) -> list[Problem]:
    """The problems of a JSON-lines or Parquet file with `question` and `answer`, as openai/gsm8k has them.

    Parameters:
        path: the file, or a folder with one whose name begins with `test`, at any depth.

    Raises:
        ValueError: no such file or more than one; a row without question and answer; an answer without
            `#### number`.
    """
    if path.is_dir():
        files = [file for file in path.rglob("test*") if file.suffix in (".jsonl", ".parquet")]
        if len(files) != 1:
            raise ValueError(
                f"{path} has {len(files)} files test*.jsonl or test*.parquet: name the one to take"
            )
        path = files[0]
    problems = []
    for place, row in enumerate(_rows(path), 1):
        if not isinstance(row, dict) or not {"question", "answer"} <= row.keys():
            raise ValueError(f"{path}: row {place} has no question and answer; is it openai/gsm8k?")
        marked = re.search(r"####\s*\$?(\S+)\s*$", row["answer"])
        if not marked or not NUMBER.fullmatch(marked[1]):
            raise ValueError(f"{path}: the answer of row {place} does not end in '#### number'")
        problems.append(Problem(question=row["question"], worked=row["answer"], answer=_value(marked[1])))
    return problems


def prompt(examples: Sequence[Problem], question: str) -> str:
    """The question after worked examples, in the form that the answer is wanted in."""
    shown = [f"Question: {example.question}\nAnswer: {example.worked}\n\n" for example in examples]
    return "".join(shown) + f"Question: {question}\nAnswer:"


def answer(text: str) -> Decimal | None:
    """The number after the first `####`, or the last one where there is no such mark; None without any."""
    # A model that goes on with a question of its own has answered before.
    text = text.split("Question:")[0]
    marked = text.split("####", 1)
    numbers = NUMBER.findall(marked[1]) if len(marked) == 2 else NUMBER.findall(text)[-1:]
    return _value(numbers[0]) if numbers else None


def accuracy(problems: Sequence[Problem], texts: Sequence[str]) -> float:
    """The share of texts whose number is the problem's."""
    right = [answer(text) == problem.answer for problem, text in zip(problems, texts, strict=True)]
    return sum(right) / len(right)


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

"""The rollout tier's words for SGLang: what its server answers is a generation, or one request's clear failure."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from drydock.server import ServerError

sys.path += [str(Path(__file__).parents[1] / "rollout"), str(Path(__file__).parents[1])]
SPEECH = importlib.import_module("speech")
WORDS = SPEECH.SPEECHES["sglang"]
ROW = [[-float(token), token, None] for token in range(SPEECH.VOCABULARY)]


def answer(**changed: Any) -> dict[str, Any]:
    meta = {
        "prompt_tokens": 2, "completion_tokens": 2, "output_top_logprobs": [ROW, ROW],
        "finish_reason": {"type": "stop", "matched": 1},
    }  # fmt: skip
    return {"text": "7", "output_ids": [10, 1], "meta_info": meta | changed}


class Answers:
    """A server that says one thing to whatever it is asked."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def request(self, path: str, *_: Any, **__: Any) -> Any:
        assert path in ("/generate", "/metrics")
        return self.said


def test_an_answer_is_a_generation() -> None:
    (made,) = WORDS.generate(Answers([answer()]), (5, 6), 2)
    assert (made.tokens, made.text, made.finish_reason, made.stop_reason) == ((10, 1), "7", "stop", 1)
    assert made.log_probs == (tuple(-float(token) for token in range(SPEECH.VOCABULARY)),) * 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([], "1 samples were asked for"),
        ({"error": {"message": "no"}}, "1 samples were asked for"),
        ([{}], "an answer without a generation"),
        ([answer() | {"output_ids": []}], "an answer without a generation"),
        ([answer() | {"text": None}], "an answer without a generation"),
        ([answer(finish_reason=None)], "an answer without a generation"),
        ([answer(finish_reason={"type": "abort", "message": "Aborted"})], "ended by the server: .*Aborted"),
        ([answer(output_top_logprobs=[ROW])], "not as many log-probabilities as tokens"),
        ([answer(completion_tokens=3)], "not as many log-probabilities as tokens"),
    ],
)
def test_an_empty_or_malformed_answer_is_that_request_s_failure(said: Any, words: str) -> None:
    with pytest.raises(ServerError, match=words):
        WORDS.generate(Answers(said), (5, 6), 2)


METRICS = """# TYPE sglang:http_requests_active gauge
sglang:http_requests_active{endpoint="/generate",method="POST"} 20.0
sglang:http_requests_active{endpoint="/v1/completions",method="POST"} 1.0
sglang:http_requests_active{endpoint="/metrics",method="GET"} 1.0
"""


def test_what_a_paused_frontend_keeps_waiting_is_unanswered() -> None:
    assert WORDS.unanswered(Answers(METRICS)) == 21


def test_of_the_cache_nothing_is_told_before_it_was_used() -> None:
    assert WORDS.cached(Answers(METRICS)) == 0
    assert WORDS.cached(Answers(f'{METRICS}sglang:cached_tokens_total{{cache_source="device"}} 39.0\n')) == 39

"""vLLM in the image serves a model through the OpenAI API, and nothing of it is left when it is stopped."""

from __future__ import annotations

import math

import pytest

from drydock.server import Server, ServerError


def test_the_api_lists_the_model(server: Server) -> None:
    assert [model["id"] for model in server.request("/v1/models")["data"]] == [server.model]


def test_greedy_completions_repeat_with_their_log_probabilities(server: Server) -> None:
    options = {"max_tokens": 16, "temperature": 0.0, "logprobs": 2, "ignore_eos": True}
    first, second = (server.complete("12+34=", **options) for _ in range(2))
    assert first["text"] == second["text"]
    assert first["finish_reason"] == "length"
    chosen = first["logprobs"]["token_logprobs"]
    assert len(chosen) == 16
    assert all(math.isfinite(value) and value <= 0 for value in chosen)
    for value, ranked in zip(chosen, first["logprobs"]["top_logprobs"], strict=True):
        assert value == pytest.approx(max(ranked.values())), "greedy must take the likeliest token"


def test_another_prompt_gives_another_distribution(server: Server) -> None:
    options = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1}
    values = {
        server.complete(prompt, **options)["logprobs"]["token_logprobs"][0]
        for prompt in ("1+1=", "zebra", "9*9")
    }
    assert len(values) == 3


def test_too_long_a_prompt_is_refused_and_the_next_one_answered(server: Server) -> None:
    with pytest.raises(ServerError, match="HTTP 400"):
        server.complete("1" * 400, max_tokens=1)
    assert server.complete("1+1=", max_tokens=2)["text"] is not None


def test_stopping_leaves_no_process_behind(server: Server) -> None:
    assert server.survivors(), "a running server must be seen, or the check below proves nothing"
    assert server.stop() == {}, "the server had to be killed"
    assert server.survivors() == {}
    with pytest.raises(OSError, match="refused"):
        server.request("/health", timeout=5)

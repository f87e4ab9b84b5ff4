"""How long a rollout waits for its first token, and what many at once gain over one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import pytest
from client import at_once, random_prompt, stream

from drydock.server import Server

pytestmark = [
    pytest.mark.full("on two cores that the client shares, the time is the machine's, not the engine's"),
    pytest.mark.needs(gpus=1),
]
STREAMS = 20


def first_token(server: Server, seed: int) -> float:
    """Seconds from a request until its first token is here."""
    began = time.monotonic()
    with stream(server, prompt=random_prompt(20, seed=seed), max_tokens=2, ignore_eos=True) as chunks:
        next(chunks)
        return time.monotonic() - began


def test_requests_at_once_share_the_steps(server: Server, profile: Mapping[str, Any], record: Any) -> None:
    """A batch of the profile's size must come at a multiple of the tokens per second that one request has."""
    length, count = profile["rollout_tokens"], profile["max_num_seqs"]
    waits = [first_token(server, 1000 + number) for number in range(STREAMS)]

    def made(prompt: tuple[int, ...]) -> int:
        body = {"model": server.model, "prompt": prompt, "max_tokens": length, "ignore_eos": True}
        tokens: int = server.request("/v1/completions", body, timeout=600)["usage"]["completion_tokens"]
        return tokens

    def rate(requests: int) -> float:
        prompts = [random_prompt(20, seed=1100 + number) for number in range(requests)]
        began = time.monotonic()
        tokens = at_once(made, prompts)
        seconds = time.monotonic() - began
        assert tokens == [length] * requests
        return requests * length / seconds

    rate(count)  # what is compiled or allocated on first use
    alone, together = (statistics.median(rate(requests) for _ in range(3)) for requests in (1, count))
    record(
        "speed",
        {
            "first token, seconds, median": statistics.median(waits),
            "first token, seconds, longest": max(waits),
            "tokens a second, one request": alone,
            f"tokens a second, {count} requests": together,
        },
    )
    assert together > profile["batching_gain"] * alone

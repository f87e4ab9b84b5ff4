"""Requests as a rollout worker makes them: tokens in, tokens with their log-probabilities out, many at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from drydock.server import Server
from tiny_models import ALPHABET

VOCABULARY = 3 + len(ALPHABET)
"""Tokens that a tiny model knows; the first three are special."""

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation; two are equal when tokens and log-probabilities are the same to the last bit."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    log_probs: tuple[tuple[float, ...], ...]
    """For each of `tokens`, of the whole vocabulary, in nats."""
    finish_reason: str
    stop_reason: str | int | None


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Ordinary tokens, the same for the same seed."""
    draw = random.Random(seed)
    return tuple(draw.randrange(3, VOCABULARY) for _ in range(length))


def generate(server: Server, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> list[Generation]:
    """One request to `/v1/completions`; a list of `n` continuations, greedy unless told otherwise."""
    answer = server.request(
        "/v1/completions",
        {
            "model": server.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": VOCABULARY,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **options,
        },
        timeout=600,
    )
    return [
        Generation(
            prompt=tuple(choice["prompt_token_ids"]),
            tokens=tuple(choice["token_ids"]),
            text=choice["text"],
            log_probs=tuple(
                tuple(row[f"token_id:{token}"] for token in range(VOCABULARY))
                for row in choice["logprobs"]["top_logprobs"]
            ),
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
        )
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
    ]


def prefill(server: Server, tokens: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    """Log-probabilities of the whole vocabulary for every token but the first, computed as a prompt."""
    body = {"model": server.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": VOCABULARY}
    rows = server.request("/v1/completions", body, timeout=600)["choices"][0]["prompt_logprobs"]
    assert rows[0] is None, "the first token has nothing before it"
    return tuple(tuple(row[str(token)]["logprob"] for token in range(VOCABULARY)) for row in rows[1:])


def at_once(call: Callable[[Argument], Result], arguments: Iterable[Argument]) -> list[Result]:
    """Make all the calls at the same time; their results in the order of the arguments."""
    return [future.result() for future in begin(call, arguments)]


def begin(call: Callable[[Argument], Result], arguments: Iterable[Argument]) -> list[Future[Result]]:
    """Begin all the calls at the same time."""
    arguments = list(arguments)
    pool = ThreadPoolExecutor(len(arguments))
    futures = [pool.submit(call, argument) for argument in arguments]
    # Not a `with` block: a test that is stopped over its budget would wait there for its requests.
    pool.shutdown(wait=False)
    return futures


@contextlib.contextmanager
def frozen(server: Server) -> Iterator[None]:
    """No request goes on within the block, and new ones wait: so it does not depend on who is faster."""
    server.request("/pause?mode=keep", {})
    try:
        yield
    finally:
        server.request("/resume", {})


def wait_for_load(server: Server, requests: int, seconds: float = 30) -> None:
    """Wait until the server has so many requests that are not answered."""
    deadline = time.monotonic() + seconds
    while (found := server.request("/load")["server_load"]) != requests:
        assert time.monotonic() < deadline, f"it has {found} requests after {seconds} s, not {requests}"
        time.sleep(0.02)


def metric(server: Server, name: str) -> float:
    """The sum of a Prometheus metric over its labels."""
    lines = [line for line in server.request("/metrics").splitlines() if line.startswith(f"{name}{{")]
    assert lines, f"/metrics has no {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def post(server: Server, body: bytes) -> tuple[int, str]:
    """Status and text of the answer to any bytes sent to `/v1/completions`."""
    with _connection(server, body) as answer:
        return answer.status, answer.read().decode()


@contextlib.contextmanager
def stream(server: Server, **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """A streamed completion's chunks; leaving the block drops the connection."""
    body = {"model": server.model, "stream": True, **options}
    with _connection(server, json.dumps(body).encode()) as answer:
        lines = (line.removeprefix(b"data: ").strip() for line in answer)
        yield (json.loads(line) for line in lines if line not in (b"", b"[DONE]"))


@contextlib.contextmanager
def _connection(server: Server, body: bytes) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()

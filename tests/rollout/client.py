"""Requests as a rollout worker makes them: tokens in, tokens with their log-probabilities out, many at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from speech import VOCABULARY, Generation, speech

from drydock.server import Server

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Ordinary tokens, the same for the same seed."""
    draw = random.Random(seed)
    return tuple(draw.randrange(3, VOCABULARY) for _ in range(length))


def generate(server: Server, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> list[Generation]:
    """A list of `n` continuations, greedy unless told otherwise; options as OpenAI's API calls them."""
    return speech(server).generate(server, prompt, max_tokens, **options)


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


def frozen(server: Server) -> contextlib.AbstractContextManager[None]:
    """No request goes on within the block, and new ones wait: so it does not depend on who is faster."""
    return speech(server).frozen(server)


def wait_for_load(server: Server, requests: int, seconds: float = 30) -> None:
    """Wait until the server has so many requests that are not answered."""
    deadline = time.monotonic() + seconds
    while (found := speech(server).unanswered(server)) != requests:
        assert time.monotonic() < deadline, f"it has {found} requests after {seconds} s, not {requests}"
        time.sleep(0.02)


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

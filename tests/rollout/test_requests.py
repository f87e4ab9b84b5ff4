"""What the server does with requests that end early, make no sense, or reach its limits."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from client import begin, frozen, generate, post, random_prompt, stream, wait_for_load
from speech import VOCABULARY, speech

from drydock.server import Server, ServerError

pytestmark = pytest.mark.parametrize("served", ["dense"], indirect=True)
"""None of this depends on the model."""


@pytest.mark.lacks(
    "trtllm",
    "trtllm-serve looks once a second whether a client has left, by when a tiny model has ended, and cannot be held",
)
def test_a_request_whose_client_leaves_is_aborted(server: Server, profile: Mapping[str, Any]) -> None:
    """Its samples end unfinished, and requests that come behind it get the answers that they get alone."""
    prompts = [random_prompt(20, seed=500 + number) for number in range(4)]
    alone = [generate(server, prompt, 8)[0].tokens for prompt in prompts]
    words = speech(server)
    samples, length = 4 if words.aborts_samples else 1, profile["max_model_len"] - 8
    options = {"prompt": [5, 6], "max_tokens": length, "n": samples, "temperature": 1.0, "ignore_eos": True}

    def made_for_a_client_that_leaves() -> tuple[float, float]:
        """Tokens, and steps of the engine, whose frontend no longer counts the tokens of what it has aborted."""
        before, step = words.made(server), words.steps(server)
        with contextlib.ExitStack() as freezing:
            with stream(server, **options) as chunks:
                next(chunks)
                freezing.enter_context(frozen(server))
                load = words.unanswered(server)
                behind = begin(lambda prompt: generate(server, prompt, 8), prompts)
                wait_for_load(server, load + len(prompts))
            wait_for_load(server, len(prompts))
        assert [future.result()[0].tokens for future in behind] == alone
        deadline = time.monotonic() + 30
        while words.busy(server):
            assert time.monotonic() < deadline, "the server still computes what nobody will read"
        return words.made(server) - before - 8 * len(prompts), words.steps(server) - step

    # vLLM's frontend, when it has fallen behind the engine, sends nothing before it has caught up: on two busy
    # cores, in one case of six, after the last token of a tiny model. Then there was nothing to abort.
    found = []
    for _ in range(6):
        tokens, steps = made_for_a_client_that_leaves()
        found.append((tokens, steps))
        if tokens < samples * length and steps < length:
            return
    pytest.fail(f"it was not aborted: six times it came to its end; tokens and steps: {found}")


REFUSED: dict[str, tuple[bytes | dict[str, Any], int]] = {
    "broken JSON": (b'{"prompt": ', 400),
    "no UTF-8": (b"\xff\xfe{", 400),
    "nothing": (b"", 400),
    "prompt is an object": ({"prompt": {"text": "1+1="}}, 400),
    "prompt is empty": ({"prompt": ""}, 400),
    # Not the first one outside: vLLM 0.24 takes the id that is the vocabulary's size, one too many.
    "a token outside the vocabulary": ({"prompt": [VOCABULARY + 1]}, 400),
    "a negative token": ({"prompt": [-1]}, 400),
    "max_tokens is a word": ({"max_tokens": "many"}, 400),
    "max_tokens is negative": ({"max_tokens": -1}, 400),
    "max_tokens is zero": ({"max_tokens": 0}, 400),
    "temperature is negative": ({"temperature": -1}, 400),
    "n is zero": ({"n": 0}, 400),
    "more log-probabilities than allowed": ({"logprobs": VOCABULARY + 1}, 400),
    "a model of another name": ({"model": "somebody-else"}, 404),
}


UNSEEN = (
    "SGLang 0.5.14 looks at no id (its check is called nowhere): one beyond its embedding ends the server"
)
ENDED_BY = {
    "a token outside the vocabulary": UNSEEN,
    "a negative token": UNSEEN,
    "more log-probabilities than allowed": "SGLang 0.5.14 has no limit: its scheduler ends in topk, the server with it",
}
"""What ends SGLang's server and not just the request."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.lacks("sglang", ENDED_BY[name])] if name in ENDED_BY else [])
        for name in REFUSED
    ],
)
def test_a_malformed_request_is_refused_and_the_next_one_served(server: Server, name: str) -> None:
    body, expected = REFUSED[name]
    expected = speech(server).statuses.get(name, expected)
    good = {"model": server.model, "prompt": "1+1=", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    status, text = post(server, body if isinstance(body, bytes) else json.dumps({**good, **body}).encode())
    assert status == expected, text
    assert json.loads(text), "the refusal says nothing"
    status, text = post(server, json.dumps(good).encode())
    assert status == 200, text
    assert json.loads(text)["usage"]["completion_tokens"] == 2


def test_the_context_is_used_to_its_last_token(server: Server, profile: Mapping[str, Any]) -> None:
    limit = profile["max_model_len"]
    for room in (1, 7):
        found = generate(server, random_prompt(limit - room, seed=600), max_tokens=room)[0]
        assert len(found.tokens) == room
        assert found.finish_reason == "length"


@pytest.mark.parametrize("prompt_over", [1, 0, -6])
def test_one_token_more_than_the_context_is_refused(
    server: Server, profile: Mapping[str, Any], prompt_over: int
) -> None:
    """By the prompt alone, and together with what is to be generated."""
    length = profile["max_model_len"] + speech(server).beyond + prompt_over
    prompt = random_prompt(length, seed=601)
    if prompt_over < 0 and speech(server).shortens:
        found = generate(server, prompt, max_tokens=1 - prompt_over)[0]
        assert (len(found.tokens), found.finish_reason) == (-prompt_over, "length")
    else:
        with pytest.raises(ServerError, match=speech(server).over_length):
            generate(server, prompt, max_tokens=max(1, 1 - prompt_over))
    assert len(generate(server, random_prompt(4, seed=602), max_tokens=2)[0].tokens) == 2


def test_generation_stops_at_a_token_or_a_text(server: Server) -> None:
    prompt = random_prompt(6, seed=603)
    free = generate(server, prompt, max_tokens=12)[0]
    assert (free.finish_reason, len(free.tokens)) == ("length", 12)
    # The first token that was not there before, so that nothing stops earlier.
    place = next(place for place in range(3, 12) if free.tokens[place] not in free.tokens[:place])
    token, text = free.tokens[place], free.text[place]

    by_token = generate(server, prompt, max_tokens=12, stop_token_ids=[token])[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    by_text = generate(server, prompt, max_tokens=12, stop=[text])[0]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", text)
    kept = place + speech(server).keeps_stop
    for stopped in (by_token, by_text):
        assert stopped.tokens == free.tokens[:kept]
        assert stopped.text == free.text[:place]
        assert stopped.log_probs == free.log_probs[:kept]


def test_the_end_token_ends_a_sample(server: Server) -> None:
    end = 1
    options = {"max_tokens": 12, "logit_bias": {str(end): 100}}
    found = generate(server, random_prompt(6, seed=604), ignore_eos=False, **options)[0]
    assert (found.tokens, found.text, found.finish_reason) == ((end,), "", "stop")
    ignored = generate(server, random_prompt(6, seed=604), ignore_eos=True, **options)[0]
    assert (ignored.tokens, ignored.finish_reason) == ((end,) * 12, "length")


@pytest.mark.engine("sglang")
def test_the_engine_is_well_only_while_it_can_generate(server: Server) -> None:
    """`/health_generate` makes a token, which a server that answers and computes nothing does not."""
    assert server.request("/health_generate") == ""
    with frozen(server), pytest.raises(ServerError, match="/health_generate: HTTP 503"):
        server.request("/health_generate")
    assert server.request("/health_generate") == ""

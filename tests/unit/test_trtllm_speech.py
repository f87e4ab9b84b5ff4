"""The rollout tier's words for TensorRT-LLM, against a server that speaks its API."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_trtllm
import pytest
from fake_trtllm import WORDS, log_softmax, logits

from drydock import server as server_package
from drydock.server import TRTLLM, Server, ServerError

HERE = Path(__file__).parent
SOURCE = Path(server_package.__file__).parents[2]
sys.path += [str(HERE.parent / "rollout"), str(HERE.parent)]
client = importlib.import_module("client")
speech = client.speech
VOCABULARY: int = client.VOCABULARY
SPEECHES = importlib.import_module("speech").SPEECHES
WORDS_OF_IT = SPEECHES["trtllm"]
PROFILE = {"max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 24, "compile": False}
PROMPT = client.random_prompt(40, seed=1)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    folder = tmp_path / "model"
    folder.mkdir()
    packages = fake_trtllm.install(tmp_path / "packages")
    made: list[Server] = []

    def one(*flags: str, **variables: str) -> Server:
        flags = (*WORDS_OF_IT.flags(PROFILE, "bfloat16", tmp_path), *flags)
        environment = {"PYTHONPATH": f"{SOURCE}:{packages}:{HERE}:{HERE.parent}", **variables}
        made.append(Server(TRTLLM, folder, flags, log=tmp_path / "server.log", environment=environment))
        made[-1].start()
        return made[-1]

    yield one
    for server in made:
        server.stop()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


def generate(server: Server, prompt: tuple[int, ...] = PROMPT, tokens: int = 6, **options: Any) -> list[Any]:
    generations: list[Any] = client.generate(server, prompt, tokens, **options)
    return generations


def test_the_profile_arrives_in_flags_and_in_the_file(server: Server) -> None:
    assert speech(server) is WORDS_OF_IT
    assert {theirs: server.accepted[theirs] for theirs in WORDS_OF_IT.names.values()} == {
        "max_seq_len": 96, "max_batch_size": 8, "max_num_tokens": 24,
    }  # fmt: skip
    assert WORDS_OF_IT.accepted(PROFILE).items() <= server.accepted.items()
    assert server.accepted["dtype"] == "bfloat16"


def test_a_generation_is_the_model_s_with_its_likeliest_log_probabilities(server: Server) -> None:
    [found] = generate(server)
    context = list(PROMPT)
    for token, row in zip(found.tokens, found.log_probs, strict=True):
        expected = log_softmax(logits(context, "the first"))
        assert token == max(range(VOCABULARY), key=expected.__getitem__)
        told = {place: value for place, value in enumerate(row) if value is not None}
        assert len(row) == VOCABULARY == len(WORDS)
        assert len(told) == 20
        assert told == {place: expected[place] for place in told}
        context.append(token)
    assert (found.prompt, len(found.tokens)) == (PROMPT, 6)
    assert (found.finish_reason, found.stop_reason) == ("length", None)
    assert found.text == "".join(WORDS[token] for token in found.tokens if token > 2)


def test_n_samples_are_distinct_and_repeat_with_their_seed(server: Server) -> None:
    found, again, other = (generate(server, n=3, temperature=1.0, seed=seed) for seed in (7, 7, 100))
    assert len({each.tokens for each in found}) == 3
    assert found == again
    assert not {each.tokens for each in found} & {each.tokens for each in other}


def test_a_prompt_has_the_log_probabilities_of_the_whole_vocabulary(server: Server) -> None:
    rows = WORDS_OF_IT.prefill(server, PROMPT)
    assert len(rows) == len(PROMPT) - 1
    for end, row in enumerate(rows, 1):
        assert row == pytest.approx(log_softmax(logits(PROMPT[:end], "the first")))
        assert math.fsum(math.exp(value) for value in row if value is not None) == pytest.approx(1)


def test_logits_that_are_missing_for_cached_tokens_are_not_taken_for_the_prompt_s(
    serve: Callable[..., Server],
) -> None:
    server = serve(FAKE_FAULT="logits of the rest")
    assert len(WORDS_OF_IT.prefill(server, PROMPT)) == len(PROMPT) - 1
    with pytest.raises(AssertionError, match="of what came from the cache there are no logits"):
        WORDS_OF_IT.prefill(server, PROMPT)


def test_the_context_is_used_to_its_end_and_not_beyond(server: Server) -> None:
    limit = PROFILE["max_model_len"]
    for room in (1, 7):
        [found] = generate(server, client.random_prompt(limit - room, seed=2), room)
        assert (len(found.tokens), found.finish_reason) == (room, "length")
    # More is asked for than there is room: it is shorter. Without room for one token it is refused.
    [found] = generate(server, client.random_prompt(limit - 3, seed=2), 9)
    assert (len(found.tokens), found.finish_reason) == (3, "length")
    for over in (0, 1):
        with pytest.raises(ServerError, match=WORDS_OF_IT.over_length):
            generate(server, client.random_prompt(limit + over, seed=2), 1)


def test_a_prompt_longer_than_a_step_is_refused_unless_it_is_cut(tmp_path: Path) -> None:
    """As it would be without the flag that our words have."""
    words = WORDS_OF_IT.flags(PROFILE, "bfloat16", tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    packages = fake_trtllm.install(tmp_path / "packages")
    environment = {"PYTHONPATH": f"{SOURCE}:{packages}:{HERE}:{HERE.parent}"}
    flags = [flag for flag in words if flag != "--enable_chunked_prefill"]
    with Server(TRTLLM, folder, flags, log=tmp_path / "server.log", environment=environment) as server:
        assert len(generate(server, PROMPT[:24])) == 1
        with pytest.raises(ServerError, match=r"\(25.0\), .* should not exceed max_num_tokens \(24\)"):
            generate(server, PROMPT[:25])
        with pytest.raises(ServerError, match=WORDS_OF_IT.over_length):
            generate(server, PROMPT[:25])


def test_a_batch_that_does_not_divide_is_computed_together(server: Server) -> None:
    prompts = [client.random_prompt(3 + number, seed=number) for number in range(13)]
    before = WORDS_OF_IT.steps(server)
    found = client.at_once(lambda prompt: generate(server, prompt, 8, n=2, temperature=1.0), prompts)
    assert [[each.prompt for each in group] for group in found] == [[prompt] * 2 for prompt in prompts]
    assert all(len(each.tokens) == 8 for group in found for each in group)
    steps = WORDS_OF_IT.steps(server) - before
    # 26 samples in batches of 8: four rounds at least, and fewer steps than tokens.
    assert 4 * 8 <= steps < 26 * 8


def test_what_the_iterations_say_is_kept_when_none_follow(server: Server) -> None:
    prompt = client.random_prompt(70, seed=3)
    generate(server, prompt)
    first = (WORDS_OF_IT.steps(server), WORDS_OF_IT.cached(server))
    assert (WORDS_OF_IT.steps(server), WORDS_OF_IT.cached(server)) == first
    assert first[0] > 0
    generate(server, prompt)
    assert WORDS_OF_IT.steps(server) > first[0]
    assert WORDS_OF_IT.cached(server) == first[1] + 64


def test_what_stops_an_answer_is_cut_from_it(server: Server) -> None:
    [free] = generate(server, tokens=12)
    place = next(place for place in range(1, 12) if free.tokens[place] not in free.tokens[:place])
    [stopped] = generate(server, tokens=12, stop_token_ids=[free.tokens[place]])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", free.tokens[place])
    assert stopped.tokens == free.tokens[: place + WORDS_OF_IT.keeps_stop]
    assert stopped.log_probs == free.log_probs[: place + WORDS_OF_IT.keeps_stop]
    [ended] = generate(server, logit_bias={"1": 100}, ignore_eos=False)
    assert (ended.tokens, ended.text, ended.finish_reason) == ((1,), "", "stop")


def test_what_1_2_1_does_not_know_is_refused_as_it_refuses_it(server: Server) -> None:
    good = {"model": "whoever", "prompt": "1+1=", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    for body in ({"logprobs": 5}, {"prompt": [VOCABULARY]}, {"prompt": ""}, {"max_tokens": "many"}, {"n": 0}):
        status, text = client.post(server, json.dumps({**good, **body}).encode())
        assert (status, bool(json.loads(text))) == (400, True), body
    assert client.post(server, b"\xff{")[0] == 400
    assert WORDS_OF_IT.statuses == {"a model of another name": 200}
    assert client.post(server, json.dumps(good).encode())[0] == 200


def test_a_client_that_leaves_ends_its_request(server: Server) -> None:
    options = {"prompt": [5, 6], "max_tokens": 94, "n": 4, "temperature": 1.0, "ignore_eos": True}
    with client.stream(server, **options) as chunks:
        assert next(chunks)["model"] == server.model
    # As long as its 94 steps would take, three times.
    time.sleep(3 * 94 * fake_trtllm.STEP)
    assert 0 < WORDS_OF_IT.steps(server) < 94

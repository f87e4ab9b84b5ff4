"""What the tier asks of an engine's server, in that engine's own words: vLLM's, SGLang's and TensorRT-LLM's.

A test asks for a generation, a prefill or the number of steps; each engine has another endpoint, or a log line, for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from weakref import WeakKeyDictionary

from drydock.server import SGLANG, TRTLLM, VLLM, Engine, Server, ServerError
from tiny_models import ALPHABET, EXACT

VOCABULARY = 3 + len(ALPHABET)
"""Tokens that a tiny model knows; the first three are special."""
LONGEST = 600
"""Seconds that one request may take."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation; two are equal when tokens and log-probabilities are the same to the last bit."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    log_probs: Rows
    """For each of `tokens`."""
    finish_reason: str
    stop_reason: str | int | None


Rows = tuple[tuple[float | None, ...], ...]
"""Log-probabilities in nats, of the whole vocabulary; None for those that an engine does not tell."""


class Speech(Protocol):
    """One engine's words.

    `environment` is its servers'; `names` is what its parser calls a parameter of the profile. What an engine has no
    words for raises NotImplementedError: the tests that ask for it are marked as lacking in it.
    """

    engine: Engine
    environment: Mapping[str, str]
    names: Mapping[str, str]
    length: str
    """The flag for the longest context."""
    over_length: str
    """What a refusal of too long a request says, as a regular expression."""
    wrong_choice: tuple[str, str]
    """A flag with a value that is none of its choices."""
    aborts_samples: bool
    """Whether several samples of a request end when its client leaves, as a single one does."""
    beyond: int
    """Tokens that its context is given beyond the profile's, since it fills none to its end."""
    freezes: bool
    """Whether it can be frozen."""
    keeps_stop: bool
    """Whether the tokens of an answer have what stopped it; the text has not."""
    shortens: bool
    """Whether an answer that has not as much room as was asked for is shorter, and not refused."""
    statuses: Mapping[str, int]
    """What it answers to a malformed request where that differs from the other engines', by the name of the request."""

    def flags(self, profile: Mapping[str, Any], dtype: str, folder: Path) -> list[str]:
        """For a server that the tier's tests share; a file that they name goes into the folder."""

    def accepted(self, profile: Mapping[str, Any]) -> dict[str, Any]:
        """What its parser must have made of those flags."""

    def generate(
        self, server: Server, prompt: Sequence[int], max_tokens: int, *, n: int = 1, seed: int | None = None,
        **options: Any,
    ) -> list[Generation]: ...  # fmt: skip

    def prefill(self, server: Server, tokens: Sequence[int]) -> Rows:
        """Log-probabilities of the whole vocabulary for every token but the first, computed as a prompt."""

    def frozen(self, server: Server) -> contextlib.AbstractContextManager[None]: ...

    def unanswered(self, server: Server) -> int:
        """Requests that it has and has not answered."""

    def busy(self, server: Server) -> bool:
        """Whether it computes anything."""

    def steps(self, server: Server) -> float:
        """How many steps it has made since it was started."""

    def made(self, server: Server) -> float:
        """How many tokens it has made since it was started, whoever reads them."""

    def cached(self, server: Server) -> float:
        """How many tokens of prompts came from the cache since it was started."""

    def sleep_flags(self, cache: int, token: int) -> list[str]:
        """For a server that can sleep, whose cache has so many bytes; `token` is one token's."""

    def flush(self, server: Server) -> None:
        """Forget what is cached of prompts, as an engine that goes to sleep does."""

    def sleep(self, server: Server, *, forget: bool) -> None:
        """Give the accelerator's memory back; the weights stay in the host's memory or are forgotten."""

    def wake(self, server: Server, what: Literal["weights", "cache"] | None = None) -> None:
        """Take the memory again: all of it, or one part."""


def metric(server: Server, name: str, label: str = "") -> float:
    """The sum of a Prometheus metric over its labels, or over those that have this one."""
    lines = [line for line in server.request("/metrics").splitlines() if line.startswith(f"{name}{{")]
    assert lines, f"/metrics has no {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if label in line)


class VllmSpeech:
    """vLLM 0.24: OpenAI's API with token ids, and the endpoints that VLLM_SERVER_DEV_MODE opens."""

    engine = VLLM
    environment: ClassVar = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        **VLLM.development, **EXACT,
    }  # fmt: skip
    names: ClassVar = {name: name for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")}
    length = "--max-model-len"
    over_length = r"HTTP 400.*maximum context length"
    wrong_choice = ("--dtype", "float12")
    aborts_samples = True
    beyond = 0
    freezes = True
    keeps_stop = True
    shortens = False
    statuses: ClassVar = {}

    def flags(self, profile: Mapping[str, Any], dtype: str, folder: Path) -> list[str]:  # noqa: ARG002
        return [
            "--dtype", dtype,
            "--max-model-len", str(profile["max_model_len"]),
            "--max-num-seqs", str(profile["max_num_seqs"]),
            "--max-num-batched-tokens", str(profile["max_num_batched_tokens"]),
            "--max-logprobs", str(VOCABULARY),
            "--enable-server-load-tracking",
            *([] if profile["compile"] else ["--enforce-eager"]),
        ]  # fmt: skip

    def accepted(self, profile: Mapping[str, Any]) -> dict[str, Any]:
        return {"enforce_eager": not profile["compile"], "max_logprobs": VOCABULARY}

    def generate(
        self, server: Server, prompt: Sequence[int], max_tokens: int, *, n: int = 1, seed: int | None = None,
        **options: Any,
    ) -> list[Generation]:  # fmt: skip
        # vLLM gives sample i of a request the seed + i.
        answer = server.request(
            "/v1/completions",
            {
                "model": server.model, "prompt": prompt, "max_tokens": max_tokens, "n": n, "seed": seed,
                "temperature": 0.0, "ignore_eos": True, "logprobs": VOCABULARY,
                "return_token_ids": True, "return_tokens_as_token_ids": True, **options,
            },
            timeout=LONGEST,
        )  # fmt: skip
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

    def prefill(self, server: Server, tokens: Sequence[int]) -> Rows:
        body = {"model": server.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": VOCABULARY}
        rows = server.request("/v1/completions", body, timeout=LONGEST)["choices"][0]["prompt_logprobs"]
        assert rows[0] is None, "the first token has nothing before it"
        return tuple(tuple(row[str(token)]["logprob"] for token in range(VOCABULARY)) for row in rows[1:])

    @contextlib.contextmanager
    def frozen(self, server: Server) -> Iterator[None]:
        server.request("/pause?mode=keep", {})
        try:
            yield
        finally:
            server.request("/resume", {})

    def unanswered(self, server: Server) -> int:
        return int(server.request("/load")["server_load"])

    def busy(self, server: Server) -> bool:
        return bool(
            metric(server, "vllm:num_requests_running") or metric(server, "vllm:num_requests_waiting")
        )

    def steps(self, server: Server) -> float:
        return metric(server, "vllm:iteration_tokens_total_count")

    def made(self, server: Server) -> float:
        return metric(server, "vllm:generation_tokens_total")

    def cached(self, server: Server) -> float:
        return metric(server, "vllm:prefix_cache_hits_total")

    def sleep_flags(self, cache: int, token: int) -> list[str]:  # noqa: ARG002, SGLang counts in tokens
        return ["--enable-sleep-mode", "--kv-cache-memory-bytes", str(cache)]

    def flush(self, server: Server) -> None:
        server.request("/reset_prefix_cache", {})

    def sleep(self, server: Server, *, forget: bool) -> None:
        assert not self._sleeping(server)
        # Level 1 keeps the weights in the host's memory, 2 forgets them.
        server.request(f"/sleep?level={2 if forget else 1}", {})
        assert self._sleeping(server)

    def wake(self, server: Server, what: Literal["weights", "cache"] | None = None) -> None:
        tags = {"weights": "?tags=weights", "cache": "?tags=kv_cache", None: ""}
        server.request(f"/wake_up{tags[what]}", {})
        assert self._sleeping(server) is (what == "weights")

    def _sleeping(self, server: Server) -> bool:
        found: bool = server.request("/is_sleeping")["is_sleeping"]
        return found


class SglangSpeech:
    """SGLang 0.5.14: its own `/generate`, and its scheduler's log, which has a line for every step when asked to."""

    engine = SGLANG
    environment: ClassVar = {
        "HF_HUB_OFFLINE": "1",
        # A sample's log-probability is the model's own, as vLLM's is; SGLang's default is after the temperature.
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        # A prompt that is cut into chunks is cut at multiples of it. Its default, 4096, is more than a chunk has here,
        # and the scheduler then never begins the prompt, without a word. The profiles' chunks are multiples of this.
        "SGLANG_TRITON_PREFILL_TRUNCATION_ALIGN_SIZE": "128",
        # Its products are then Triton's for 16 bits too, as for float32: DeepGEMM has nvcc compile a kernel for each
        # shape when it is first met, within a request, and is not made for ones as small.
        "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_DEEPGEMM": "0",
        # Seconds that `/health_generate` waits for its token.
        "SGLANG_HEALTH_CHECK_TIMEOUT": "5",
        **EXACT,
    }
    names: ClassVar = {
        "max_num_seqs": "max_running_requests", "max_num_batched_tokens": "chunked_prefill_size",
    }  # fmt: skip
    length = "--context-length"
    over_length = r"HTTP 400.*context length"
    wrong_choice = ("--dtype", "float12")
    # Its frontend gives samples names of their own and, when their client leaves, aborts by the first names: all but a
    # single one go on to their end (tokenizer_manager.py of 0.5.14: _handle_batch_request, create_abort_task).
    aborts_samples = False
    # Its scheduler takes prompts that leave 7 tokens of the context, and shortens an answer to leave 2, without a word.
    beyond = 7
    freezes = True
    keeps_stop = True
    shortens = False
    # It answers under whatever name it is asked by.
    statuses: ClassVar = {"a model of another name": 200}

    def flags(self, profile: Mapping[str, Any], dtype: str, folder: Path) -> list[str]:  # noqa: ARG002
        return [
            "--dtype", dtype,
            "--context-length", str(profile["max_model_len"] + self.beyond),
            "--max-running-requests", str(profile["max_num_seqs"]),
            "--chunked-prefill-size", str(profile["max_num_batched_tokens"]),
            # Without it a seed is not looked at.
            "--enable-deterministic-inference",
            # What it would choose takes 16 bits only (FlashAttention 3, on Hopper), or goes without a cache of prompts
            # (FlashInfer, on Blackwell). Triton's takes float32, and multiplies it as such when told to: see EXACT.
            "--attention-backend", "triton",
            "--enable-metrics",
            "--decode-log-interval", "1",
            "--mem-fraction-static", "0.3",
            *([] if profile["compile"] else ["--disable-cuda-graph"]),
        ]  # fmt: skip

    def accepted(self, profile: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "context_length": profile["max_model_len"] + self.beyond, "attention_backend": "triton",
            "disable_cuda_graph": not profile["compile"], "enable_deterministic_inference": True,
        }  # fmt: skip

    def generate(
        self, server: Server, prompt: Sequence[int], max_tokens: int, *, n: int = 1, seed: int | None = None,
        **options: Any,
    ) -> list[Generation]:  # fmt: skip
        # With `ignore_eos` it stops at no token at all.
        ignore = not options.get("stop_token_ids")
        sampling = {"max_new_tokens": max_tokens, "temperature": 0.0, "ignore_eos": ignore, **options}
        # A seed is all samples' of a request, which would then be one sample n times: each gets a request of its own.
        answers = server.request(
            "/generate",
            {
                "input_ids": [list(prompt)] * n,
                "sampling_params": [
                    {**sampling, **({} if seed is None else {"sampling_seed": seed + number})} for number in range(n)
                ],
                "return_logprob": True, "top_logprobs_num": VOCABULARY, "logprob_start_len": -1,
            },
            timeout=LONGEST,
        )  # fmt: skip
        if not isinstance(answers, list) or len(answers) != n:
            raise ServerError(f"/generate: {n} samples were asked for, got {str(answers)[:300]}")
        return [self._generation(prompt, answer) for answer in answers]

    def _generation(self, prompt: Sequence[int], answer: Any) -> Generation:
        # verl met an engine's empty result with an assert in its server (verl#5936), which ended all requests. It is
        # one request's failure.
        match answer:
            case {
                "output_ids": [_, *_],
                "text": str(),
                "meta_info": {"finish_reason": {"type": "stop" | "length"}} as meta,
            }:
                pass
            case {"meta_info": {"finish_reason": {"type": "abort"} as reason}}:
                raise ServerError(f"/generate: ended by the server: {reason}")
            case _:
                raise ServerError(f"/generate: an answer without a generation: {str(answer)[:300]}")
        if not len(answer["output_ids"]) == len(meta["output_top_logprobs"]) == meta["completion_tokens"]:
            raise ServerError(f"/generate: not as many log-probabilities as tokens: {str(answer)[:300]}")
        assert meta["prompt_tokens"] == len(prompt)
        reason = meta["finish_reason"]
        return Generation(
            prompt=tuple(prompt),
            tokens=tuple(answer["output_ids"]),
            text=answer["text"],
            log_probs=_whole_rows(meta["output_top_logprobs"]),
            finish_reason=reason["type"],
            stop_reason=reason.get("matched"),
        )

    def prefill(self, server: Server, tokens: Sequence[int]) -> Rows:
        answer = server.request(
            "/generate",
            {
                "input_ids": list(tokens), "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True, "top_logprobs_num": VOCABULARY, "logprob_start_len": 0,
            },
            timeout=LONGEST,
        )  # fmt: skip
        rows = answer["meta_info"]["input_top_logprobs"]
        assert rows[0] is None, "the first token has nothing before it"
        return _whole_rows(rows[1:])

    @contextlib.contextmanager
    def frozen(self, server: Server) -> Iterator[None]:
        # The scheduler stops where it is; requests that come now wait in the frontend.
        server.request("/pause_generation", {"mode": "in_place"})
        try:
            yield
        finally:
            server.request("/continue_generation", {})

    def unanswered(self, server: Server) -> int:
        # Not `/v1/loads`, which is the scheduler's: what waits in a paused frontend has not come there. One whose
        # client left is counted until its abort has been sent.
        return sum(
            int(metric(server, "sglang:http_requests_active", f'endpoint="{path}"'))
            for path in ("/generate", "/v1/completions")
        )

    def busy(self, server: Server) -> bool:
        # Deprecated for `/v1/loads`, which is not to be had with --enable-metrics: its counter of requests asks the
        # route for a path that FastAPI's included ones have not, and answers 500 (seen on an H100).
        return any(rank["num_reqs"] for rank in server.request("/get_load"))

    def steps(self, server: Server) -> float:
        return len(_BATCH.findall(server.log.read_text(errors="replace")))

    def made(self, server: Server) -> float:
        return sum(int(found) for found in _RUNNING.findall(server.log.read_text(errors="replace")))

    def cached(self, server: Server) -> float:
        name = "sglang:cached_tokens_total"
        # Told from the first one on.
        return metric(server, name) if name in server.request("/metrics") else 0.0

    def sleep_flags(self, cache: int, token: int) -> list[str]:
        # The weights' copy in the host's memory is made whenever they are let go.
        return [
            "--enable-memory-saver",
            "--enable-weights-cpu-backup",
            "--max-total-tokens",
            str(cache // token),
        ]

    def flush(self, server: Server) -> None:
        server.request("/flush_cache?timeout=10", {})

    def sleep(self, server: Server, *, forget: bool) -> None:  # noqa: ARG002, see sleep_flags
        server.request("/release_memory_occupation", {})

    def wake(self, server: Server, what: Literal["weights", "cache"] | None = None) -> None:
        tags = {"weights": ["weights"], "cache": ["kv_cache", "cuda_graph"]}
        server.request("/resume_memory_occupation", {"tags": tags[what]} if what else {})


_BATCH = re.compile(r"\b(?:Decode|Prefill) batch\b")
_RUNNING = re.compile(r"\bDecode batch\b.*?#running-req: (\d+)")


class TrtllmSpeech:
    """TensorRT-LLM 1.2.1: OpenAI's API. Its completions have the logits of a prompt and no log-probabilities; its chat
    takes token ids too, and tells the log-probabilities of the likeliest tokens, which it names by their text.

    Not seen running: read from its source, and held against a fake that was written from it.
    """

    engine = TRTLLM
    environment: ClassVar = {"HF_HUB_OFFLINE": "1", **EXACT}
    names: ClassVar = {
        "max_model_len": "max_seq_len", "max_num_seqs": "max_batch_size", "max_num_batched_tokens": "max_num_tokens",
    }  # fmt: skip
    length = "--max_seq_len"
    over_length = r"HTTP 400.*(`default_max_tokens`|should not exceed max_num_tokens)"
    wrong_choice = ("--backend", "float12")
    aborts_samples = True
    beyond = 0
    freezes = False
    keeps_stop = False
    shortens = True
    # It answers under whatever name it is asked by.
    statuses: ClassVar = {"a model of another name": 200}
    most_log_probs = 20

    def __init__(self) -> None:
        self._told: WeakKeyDictionary[Server, Counter[str]] = WeakKeyDictionary()

    def flags(self, profile: Mapping[str, Any], dtype: str, folder: Path) -> list[str]:
        options = folder / f"trtllm-{dtype}.json"
        # JSON is YAML too. No flag is for these.
        options.write_text(
            json.dumps(
                {
                    "dtype": dtype,
                    "enable_iter_perf_stats": True,
                    **({} if profile["compile"] else {"cuda_graph_config": None}),
                }
            )
        )
        return [
            "--max_seq_len", str(profile["max_model_len"]),
            "--max_batch_size", str(profile["max_num_seqs"]),
            "--max_num_tokens", str(profile["max_num_batched_tokens"]),
            # Without it, no prompt may be longer than a step.
            "--enable_chunked_prefill",
            "--kv_cache_free_gpu_memory_fraction", "0.3",
            "--extra_llm_api_options", str(options),
        ]  # fmt: skip

    def accepted(self, profile: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "enable_chunked_prefill": True, "enable_iter_perf_stats": True,
            **({} if profile["compile"] else {"cuda_graph_config": None}),
        }  # fmt: skip

    def generate(
        self, server: Server, prompt: Sequence[int], max_tokens: int, *, n: int = 1, seed: int | None = None,
        **options: Any,
    ) -> list[Generation]:  # fmt: skip
        # A parameter that it does not know, and null for one that it does, are refused.
        answer = server.request(
            "/v1/chat/completions",
            {
                "model": server.model, "messages": [{"role": "user", "content": ""}], "prompt_token_ids": list(prompt),
                "max_tokens": max_tokens, "n": n, **({} if seed is None else {"seed": seed}),
                "temperature": 0.0, "ignore_eos": True, "logprobs": True, "top_logprobs": self.most_log_probs,
                **options,
            },
            timeout=LONGEST,
        )  # fmt: skip
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        return [
            self._generation(prompt, choice)
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]

    def _generation(self, prompt: Sequence[int], choice: Mapping[str, Any]) -> Generation:
        content = choice["logprobs"]["content"]
        rows = []
        for entry in content:
            told = {_TOKENS[each["token"]]: each["logprob"] for each in entry["top_logprobs"]}
            assert len(told) >= self.most_log_probs
            rows.append(tuple(told.get(token) for token in range(VOCABULARY)))
        return Generation(
            prompt=tuple(prompt),
            tokens=tuple(_TOKENS[entry["token"]] for entry in content),
            text=choice["message"]["content"],
            log_probs=tuple(rows),
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
        )

    def prefill(self, server: Server, tokens: Sequence[int]) -> Rows:
        body = {
            "model": server.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0.0,
            "return_context_logits": True,
        }  # fmt: skip
        rows = server.request("/v1/completions", body, timeout=LONGEST)["choices"][0]["context_logits"]
        assert len(rows) == len(tokens), "of what came from the cache there are no logits"
        return tuple(_log_softmax(row[:VOCABULARY]) for row in rows[:-1])

    def frozen(self, server: Server) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError("trtllm-serve cannot be paused")

    def unanswered(self, server: Server) -> int:
        raise NotImplementedError("trtllm-serve tells of requests with its iterations only")

    def busy(self, server: Server) -> bool:
        raise NotImplementedError("trtllm-serve tells of requests with its iterations only")

    def steps(self, server: Server) -> float:
        return self._iterations(server)["iter"]

    def made(self, server: Server) -> float:
        raise NotImplementedError("trtllm-serve does not count its tokens")

    def cached(self, server: Server) -> float:
        return self._iterations(server)["cached"]

    def _iterations(self, server: Server) -> Counter[str]:
        """What the last iteration said. Each is told once, and none where none was since: the last is kept."""
        told = self._told.setdefault(server, Counter())
        for stats in server.request("/metrics"):
            cache = stats["kvCacheStats"]
            told["iter"] = stats["iter"]
            told["cached"] = cache["reusedBlocks"] * cache["tokensPerBlock"]
        return told

    def sleep_flags(self, cache: int, token: int) -> list[str]:
        raise NotImplementedError("trtllm-serve keeps its memory")

    def flush(self, server: Server) -> None:
        raise NotImplementedError("trtllm-serve keeps its memory")

    def sleep(self, server: Server, *, forget: bool) -> None:
        raise NotImplementedError("trtllm-serve keeps its memory")

    def wake(self, server: Server, what: Literal["weights", "cache"] | None = None) -> None:
        raise NotImplementedError("trtllm-serve keeps its memory")


_TOKENS = {word: token for token, word in enumerate(("<pad>", "<eos>", "<unk>", *ALPHABET))}


def _log_softmax(row: Sequence[float]) -> tuple[float, ...]:
    top = max(row)
    total = top + math.log(math.fsum(math.exp(value - top) for value in row))
    return tuple(value - total for value in row)


def _whole_rows(rows: Sequence[Sequence[Sequence[Any]]]) -> Rows:
    """Rows of [log-probability, token, text] in the order of tokens."""
    found = []
    for row in rows:
        known = {token: log_prob for log_prob, token, *_ in row}
        found.append(tuple(known[token] for token in range(VOCABULARY)))
    return tuple(found)


SPEECHES: dict[str, Speech] = {"vllm": VllmSpeech(), "sglang": SglangSpeech(), "trtllm": TrtllmSpeech()}
"""The engine's name in an image's -> its words."""


def speech(server: Server) -> Speech:
    """The words of a server's engine."""
    return next(each for each in SPEECHES.values() if each.engine is server.engine)

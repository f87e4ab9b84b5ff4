"""A `trtllm-serve` with no engine behind it: the flags and the HTTP API of TensorRT-LLM 1.2.1, read from its source.

`install` puts it where `tensorrt_llm` is imported from, and the harness starts it by the real one's names. Its language
model draws logits from the last tokens; its engine makes a step for all requests at a time, as one with in-flight
batching does. Under FAKE_ASYNC_LLM it is what verl starts in place of `trtllm-serve`, whose model runs under Ray: the
only one that lets weights and memory be controlled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

import click
import yaml

sys.path.append(str(Path(__file__).parents[1]))
ALPHABET = importlib.import_module("tiny_models").ALPHABET
SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS = [*SPECIAL, *ALPHABET]
END = 1
STEP = 0.002
"""Seconds of an engine's step."""
MOST_LOG_PROBS = 20
"""More are refused."""
BLOCK = 32
"""Tokens of a block of the KV cache."""
OPTIONS = (
    "dtype", "cuda_graph_config", "enable_iter_perf_stats", "kv_cache_config", "max_batch_size", "max_num_tokens",
    "max_seq_len", "return_perf_metrics",
)  # fmt: skip


def install(folder: Path) -> Path:
    """A folder to import `tensorrt_llm` from, as far as it is faked."""
    for path, text in {
        "__init__.py": "",
        "commands/__init__.py": "",
        "commands/serve.py": "from fake_trtllm import main, serve\nif __name__ == '__main__':\n    main()\n",
        "llmapi/__init__.py": "",
        "llmapi/llm_args.py": "from fake_trtllm import TorchLlmArgs\n",
    }.items():
        file = folder / "tensorrt_llm" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


class TorchLlmArgs:
    """The names of the options that the file may have; the real one is a pydantic model with some hundred."""

    model_fields = dict.fromkeys(OPTIONS)


@click.group()
def main() -> None:
    """The real group takes any first word that is no command of its own for the model of `serve`."""


@main.command("serve")
@click.argument("model", type=str)
@click.option("--tokenizer", type=str)
@click.option("--host", type=str, default="localhost")
@click.option("--port", type=int, default=8000)
@click.option("--backend", type=click.Choice(["pytorch", "tensorrt", "_autodeploy"]), default="pytorch")
@click.option("--max_batch_size", type=int, default=2048)
@click.option("--max_num_tokens", type=int, default=8192)
@click.option("--max_seq_len", type=int)
@click.option("--tensor_parallel_size", "--tp_size", type=int, default=1)
@click.option("--free_gpu_memory_fraction", "--kv_cache_free_gpu_memory_fraction", type=float, default=0.9)
@click.option("--trust_remote_code", is_flag=True)
@click.option("--enable_chunked_prefill", is_flag=True)
@click.option("--config", "--extra_llm_api_options", "extra_llm_api_options", type=str)
def serve(model: str, host: str, port: int, extra_llm_api_options: str | None, **options: Any) -> None:
    if extra_llm_api_options:
        options |= yaml.safe_load(Path(extra_llm_api_options).read_text())
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # As the real one: no SO_REUSEADDR, and before the model loads.
    listener = Listener((host, port), Handler, bind_and_activate=False)
    listener.server_bind()
    for line in (
        "Loading safetensors weights in parallel: 100%|##########| 1/1 [00:00<00:00, 81.92it/s]",
        "Loading weights: 100%|##########| 29/29 [00:00<00:00, 17.29it/s]",
        "Model init total -- 0.01s",
    ):
        print(line, file=sys.stderr, flush=True)
    # The name of the folder as it is given: a link is not followed.
    folder = Path(model).resolve() if "resolves" in os.environ.get("FAKE_FAULT", "") else Path(model)
    listener.start(folder, options)
    listener.server_activate()
    listener.serve_forever(0.05)


# ------------------------------------------------------------------------------------------------ the engine


def logits(context: Sequence[int], weights: str) -> list[float]:
    """Of the whole vocabulary, after these tokens."""
    draw = random.Random(f"{weights} {tuple(context[-3:])}")
    return [draw.gauss(0, 2) for _ in WORDS]


def log_softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


class Sample:
    """One sample of one request, on its way."""

    def __init__(self, prompt: Sequence[int], body: Mapping[str, Any], index: int) -> None:
        self.prompt, self.body, self.index = list(prompt), body, index
        self.tokens: list[int] = []
        self.rows: list[list[float]] = []
        self.finish: str | None = None
        self.stop_reason: str | int | None = None
        self.draw = random.Random((body.get("seed") or 0) + index)

    def step(self, weights: str) -> None:
        """One token more."""
        body = self.body
        values = logits([*self.prompt, *self.tokens], weights)
        for token, bias in (body.get("logit_bias") or {}).items():
            values[int(token)] += bias
        temperature = 1.0 if body.get("temperature") is None else body["temperature"]
        if temperature == 0:
            token = max(range(len(values)), key=values.__getitem__)
        else:
            chances = [math.exp(value) for value in log_softmax([value / temperature for value in values])]
            [token] = self.draw.choices(range(len(values)), chances)
        self.tokens.append(token)
        self.rows.append(log_softmax(values))
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        if token == END and not body.get("ignore_eos"):
            self.finish = "stop"
        elif token in (body.get("stop_token_ids") or []):
            self.finish, self.stop_reason = "stop", token
        elif found := next((text for text in stops if self._text(self.tokens).endswith(text)), None):
            self.finish, self.stop_reason = "stop", found
        elif len(self.tokens) >= body["max_tokens"]:
            self.finish = "length"

    @staticmethod
    def _text(tokens: Sequence[int]) -> str:
        return "".join(WORDS[token] for token in tokens if token >= len(SPECIAL))

    @property
    def told(self) -> list[int]:
        """The tokens that an answer has: without a stop token or those of a stop text, but with the model's end."""
        stop = self.stop_reason
        cut = len(stop) if isinstance(stop, str) else int(stop is not None)
        return self.tokens[: len(self.tokens) - cut]

    @property
    def text(self) -> str:
        return self._text(self.told)


class Listener(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def start(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.name = folder.name
        self.options = options
        self.weights = "the first"
        self.asleep: set[str] = set()
        self.updates: list[Any] = []
        self.running: list[Sample] = []
        self.waiting: list[Sample] = []
        self.stats: list[dict[str, Any]] = []
        self.iteration, self.reused = 0, 0
        self.seen: set[tuple[int, ...]] = set()
        self.changed = threading.Condition()
        threading.Thread(target=self.steps, daemon=True).start()

    def steps(self) -> None:
        """A step for all that run, one after the other."""
        while True:
            with self.changed:
                room = int(self.options["max_batch_size"]) - len(self.running)
                self.running += self.waiting[:room]
                del self.waiting[:room]
                for sequence in self.running:
                    sequence.step(self.weights)
                if self.running:
                    self._count()
                self.running = [sequence for sequence in self.running if sequence.finish is None]
                self.changed.notify_all()
            time.sleep(STEP)

    def _count(self) -> None:
        self.iteration += 1
        if self.options.get("enable_iter_perf_stats"):
            starting = sum(len(sequence.tokens) == 1 for sequence in self.running)
            self.stats.append(
                {
                    "iter": self.iteration, "iterLatencyMS": STEP * 1000, "numActiveRequests": len(self.running),
                    "numQueuedRequests": len(self.waiting),
                    "kvCacheStats": {"reusedBlocks": self.reused, "tokensPerBlock": BLOCK},
                    "inflightBatchingStats": {
                        "numContextRequests": starting, "numGenRequests": len(self.running) - starting,
                    },
                }
            )  # fmt: skip

    def reuse(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens are cached already; all of it is, afterwards."""
        blocks = [tuple(prompt[:end]) for end in range(BLOCK, len(prompt), BLOCK)]
        known = sum(block in self.seen for block in blocks)
        self.seen.update(blocks)
        self.reused += known
        return known * BLOCK

    def run(self, sequences: Sequence[Sample]) -> Iterator[Sample]:
        """Each sequence whenever it has a token more, until all are finished; given up, they are aborted."""
        told = {sequence.index: 0 for sequence in sequences}
        try:
            with self.changed:
                self.waiting += sequences
                while True:
                    self.changed.wait(0.05)
                    news = [each for each in sequences if len(each.tokens) > told[each.index]]
                    for sequence in news:
                        told[sequence.index] = len(sequence.tokens)
                        yield sequence
                    if all(each.finish and told[each.index] == len(each.tokens) for each in sequences):
                        return
                    if not news:
                        yield sequences[0]  # so that the caller looks whether its client is there
        finally:
            with self.changed:
                for sequence in sequences:
                    sequence.finish = sequence.finish or "cancelled"
                self.waiting = [each for each in self.waiting if each not in sequences]


# --------------------------------------------------------------------------------------------------- the API

COMPLETION = {
    "model", "prompt", "max_tokens", "n", "seed", "temperature", "ignore_eos", "stop", "stop_token_ids", "stream",
    "logit_bias", "detokenize", "return_context_logits", "top_k", "top_p", "user",
}  # fmt: skip
"""What a completion may be asked with: log-probabilities are not among it in 1.2.1, and what is not is refused."""
CHAT = COMPLETION - {"prompt", "detokenize", "return_context_logits"} | {
    "messages", "prompt_token_ids", "logprobs", "top_logprobs", "max_completion_tokens",
}  # fmt: skip


class Refusal(Exception):
    """An answer of status 400."""

    def __init__(self, words: str, *, of_validation: bool = False) -> None:
        self.document = (
            {"error": words}
            if of_validation
            else {"object": "error", "message": words, "type": "BadRequestError", "param": None, "code": 400}
        )


def validate(body: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(body, dict):
        raise Refusal("Input should be a valid dictionary", of_validation=True)
    if unknown := sorted(body.keys() - known):
        raise Refusal(f"[{{'type': 'extra_forbidden', 'loc': ('body', '{unknown[0]}')}}]", of_validation=True)
    if missing := sorted(needed - body.keys()):
        raise Refusal(f"[{{'type': 'missing', 'loc': ('body', '{missing[0]}')}}]", of_validation=True)
    for name in ("max_tokens", "n", "seed", "top_logprobs"):
        if body.get(name) is not None and not isinstance(body[name], int):
            raise Refusal(f"[{{'type': 'int_parsing', 'loc': ('body', '{name}')}}]", of_validation=True)
    if body.get("max_tokens", 1) < 1 or body.get("n", 1) < 1 or (body.get("temperature") or 0) < 0:
        raise Refusal("a sampling parameter is out of range")


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, document: object, status: int = 200) -> None:
        text = document if isinstance(document, str) else json.dumps(document)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(document, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        match self.path:
            case "/health":
                self.answer("")
            case "/health_generate":
                self.answer("Generation health check OK")
            case "/version":
                self.answer({"version": "1.2.1"})
            case "/v1/models":
                card = {"id": self.server.name, "object": "model", "created": 1, "owned_by": "tensorrt_llm"}
                self.answer({"object": "list", "data": [card]})
            case "/metrics":
                # Each iteration is told once. The real one waits for two seconds for more.
                with self.server.changed:
                    stats, self.server.stats = self.server.stats, []
                self.answer(stats)
            case "/fake/state":
                self.answer({"asleep": sorted(self.server.asleep), "updates": self.server.updates})
            case _:
                self.answer({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            try:
                body = json.loads(data)
            except ValueError:
                raise Refusal("[{'type': 'json_invalid'}]", of_validation=True) from None
            self.route(body)
        except Refusal as refusal:
            self.answer(refusal.document, 400)

    def route(self, body: Any) -> None:
        match self.path:
            case "/v1/completions":
                validate(body, COMPLETION, {"model", "prompt"})
                self.complete(body)
            case "/v1/chat/completions":
                validate(body, CHAT, {"model", "messages"})
                self.chat(body)
            case "/release_memory" | "/resume_memory" | "/update_weights":
                self.control(body)
            case "/kv_cache_events":
                self.answer([])
            case _:
                self.answer({"detail": "Not Found"}, 404)

    def control(self, body: Any) -> None:
        """What is for reinforcement learning alone."""
        if not os.environ.get("FAKE_ASYNC_LLM"):
            # An assertion fails, which nobody catches.
            self.answer("Internal Server Error", 500)
            return
        needed = {"weights"} if self.path == "/update_weights" else {"tags"}
        validate(body, needed, needed)
        if self.path == "/update_weights":
            self.server.updates.append(body["weights"])
            if body["weights"]:
                self.server.weights = json.dumps(body["weights"], sort_keys=True)
        elif self.path == "/release_memory":
            self.server.asleep |= set(body["tags"])
        else:
            self.server.asleep -= set(body["tags"])
        self.answer({"status": "success"})

    def admit(self, prompt: Sequence[int], body: dict[str, Any]) -> list[Sample]:
        """The samples of a request, when there is room for one token at least."""
        options = self.server.options
        if not prompt or min(prompt) < 0 or max(prompt) >= len(WORDS):
            raise Refusal("Token ID out of range")
        if not options["enable_chunked_prefill"] and len(prompt) > options["max_num_tokens"]:
            raise Refusal(
                f"The sum of prompt length ({len(prompt):.1f}), query length (0) should not exceed "
                f"max_num_tokens ({options['max_num_tokens']})"
            )
        room = options["max_seq_len"] - len(prompt)
        if room <= 0:
            raise Refusal(
                f"`default_max_tokens` ({room}) must be greater than 0, `default_max_tokens` ({room}) = max_seq_len "
                f"({options['max_seq_len']}) - `splited_prompt_len` ({len(prompt)}) - `query_token_len` (0)"
            )
        # What has no room is left out, with a warning in the log.
        body = {**body, "max_tokens": min(body.get("max_tokens") or room, room)}
        return [Sample(prompt, body, index) for index in range(body.get("n", 1))]

    def gone(self) -> bool:
        """Whether the client has left."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def generate(self, sequences: list[Sample]) -> bool:
        """Whether all came to their end before the client left."""
        with contextlib.closing(self.server.run(sequences)) as steps:
            return not any(self.gone() for _ in steps)

    def complete(self, body: dict[str, Any]) -> None:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = [WORDS.index(letter) if letter in ALPHABET else 2 for letter in prompt]
        if not isinstance(prompt, list):
            raise Refusal("[{'type': 'list_type', 'loc': ('body', 'prompt')}]", of_validation=True)
        sequences = self.admit(prompt, body)
        cached = self.server.reuse(prompt)
        if body.get("stream"):
            self.stream(body, sequences)
            return
        if not self.generate(sequences):
            return
        context = None
        if body.get("return_context_logits"):
            first = cached if os.environ.get("FAKE_FAULT") == "logits of the rest" else 0
            context = [logits(prompt[: end + 1], self.server.weights) for end in range(first, len(prompt))]
        plain = body.get("detokenize", True)
        self.answer(
            {
                "id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"],
                "choices": [
                    {
                        "index": each.index, "text": each.text if plain else "",
                        "token_ids": None if plain else each.told, "logprobs": None, "context_logits": context,
                        "finish_reason": each.finish, "stop_reason": each.stop_reason, "disaggregated_params": None,
                    }
                    for each in sequences
                ],
                "usage": self.usage(prompt, sequences, cached), "prompt_token_ids": None,
            }
        )  # fmt: skip

    def stream(self, body: Mapping[str, Any], sequences: list[Sample]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        sent = dict.fromkeys(range(len(sequences)), 0)
        # A client that is gone is noticed by what is sent to it.
        with contextlib.suppress(OSError), contextlib.closing(self.server.run(sequences)) as steps:
            for each in steps:
                if self.gone():
                    return
                new = each.tokens[sent[each.index] :]
                sent[each.index] += len(new)
                if new:
                    choice = {"index": each.index, "text": each._text(new), "finish_reason": each.finish}
                    chunk = json.dumps({"model": body["model"], "choices": [choice]})
                    self.wfile.write(f"data: {chunk}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    def chat(self, body: dict[str, Any]) -> None:
        if body.get("top_logprobs", 0) > MOST_LOG_PROBS:
            raise Refusal(f"top_logprobs must be at most {MOST_LOG_PROBS}")
        body = {**body, "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens")}
        prompt = body["prompt_token_ids"]
        sequences = self.admit(prompt, body)
        cached = self.server.reuse(prompt)
        if self.generate(sequences):
            self.answer(
                {
                    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
                    "choices": [
                        {
                            "index": each.index,
                            "message": {
                                "role": "assistant", "content": each.text, "reasoning_content": "", "tool_calls": [],
                            },
                            "logprobs": self.log_probs(each, body) if body.get("logprobs") else None,
                            "finish_reason": each.finish, "stop_reason": each.stop_reason,
                        }
                        for each in sequences
                    ],
                    "usage": self.usage(prompt, sequences, cached), "prompt_token_ids": None,
                }
            )  # fmt: skip

    @staticmethod
    def log_probs(sequence: Sample, body: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens by their text; the likeliest first, and the one that was taken in any case."""

        def entry(token: int, row: Sequence[float]) -> dict[str, Any]:
            return {"token": WORDS[token], "logprob": row[token], "bytes": list(WORDS[token].encode())}

        content = []
        for token, row in zip(sequence.told, sequence.rows, strict=False):
            best = sorted(range(len(row)), key=row.__getitem__, reverse=True)[: body.get("top_logprobs", 0)]
            likely = [*best, *([] if token in best else [token])]
            content.append({**entry(token, row), "top_logprobs": [entry(each, row) for each in likely]})
        return {"content": content}

    @staticmethod
    def usage(prompt: Sequence[int], sequences: Sequence[Sample], cached: int) -> dict[str, Any]:
        made = sum(len(each.tokens) for each in sequences)
        return {
            "prompt_tokens": len(prompt), "completion_tokens": made, "total_tokens": len(prompt) + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

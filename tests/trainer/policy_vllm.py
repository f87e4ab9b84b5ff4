"""The policy as a vLLM server serves it: OpenAI's API with token ids and log-probabilities."""

# contract: vllm
from __future__ import annotations

from pathlib import Path

import torch
from grpo import Completion, Policy

from drydock.server import VLLM, Server
from tiny_models import EXACT

FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "32", "--max-num-seqs", "256"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1", "TORCH_COMPILE_DISABLE": "1", **EXACT,
}  # fmt: skip


def server(folder: Path, log: Path) -> Server:
    """Serves the model in the folder."""
    return Server(VLLM, folder, FLAGS, log=log, environment=ENVIRONMENT)


class ServedPolicy(Policy):
    """With VLLM_SERVER_DEV_MODE=1, for the pushes."""

    def server_log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        answer = self.server.request(
            "/v1/completions",
            {"model": self.server.model, "prompt": tokens.tolist(), "max_tokens": 1, "prompt_logprobs": 0},
        )
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor(
            [row[str(token)]["logprob"] for row, token in zip(rows, tokens[1:].tolist(), strict=True)]
        )

    def complete(self, prompt: str, samples: int, seed: int) -> list[Completion]:
        answer = self.server.request(
            "/v1/completions",
            {
                "model": self.server.model, "prompt": prompt, "n": samples, "max_tokens": self.longest,
                "temperature": 1.0, "logprobs": 0, "return_token_ids": True,
                # vLLM gives sample k of a request the seed + k.
                "seed": seed,
            },
        )  # fmt: skip
        return [
            Completion(
                tokens=choice["token_ids"],
                log_probs=choice["logprobs"]["token_logprobs"],
                text=choice["text"],
                finished=choice["finish_reason"] == "stop",
            )
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]

"""The policy as an SGLang server serves it: its own `/generate`, weights through `/update_weights_from_disk`."""

# contract: sglang
from __future__ import annotations

from pathlib import Path

import torch
from grpo import Completion, Policy

from drydock.server import SGLANG, Server
from tiny_models import EXACT

FLAGS = [
    "--dtype", "float32",
    # The only one of its attentions that takes float32 and multiplies it as such, see EXACT.
    "--attention-backend", "triton",
    # Without it a seed is not looked at; its products are then Triton's.
    "--enable-deterministic-inference",
    "--disable-cuda-graph",
    # 32, and the 7 that its scheduler keeps from a prompt.
    "--context-length", "39",
    "--max-running-requests", "256",
    "--mem-fraction-static", "0.3",
]  # fmt: skip
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1", **EXACT}


def server(folder: Path, log: Path) -> Server:
    """Serves the model in the folder."""
    # It compiles kernels at its first start.
    return Server(SGLANG, folder, FLAGS, log=log, environment=ENVIRONMENT, ready_timeout=600)


class ServedPolicy(Policy):
    def server_log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        answer = self.server.request(
            "/generate",
            {
                "input_ids": tokens.tolist(), "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True, "logprob_start_len": 0,
            },
        )  # fmt: skip
        rows = answer["meta_info"]["input_token_logprobs"][1:]
        assert [token for _, token, *_ in rows] == tokens[1:].tolist()
        return torch.tensor([log_prob for log_prob, *_ in rows])

    def complete(self, prompt: str, samples: int, seed: int) -> list[Completion]:
        # A seed is all samples' of a request, which would then be one sample again and again: each is a request.
        answers = self.server.request(
            "/generate",
            {
                "input_ids": [self.tokenizer.encode(prompt)] * samples,
                "sampling_params": [
                    {"max_new_tokens": self.longest, "temperature": 1.0, "sampling_seed": seed + number}
                    for number in range(samples)
                ],
                "return_logprob": True,
            },
        )  # fmt: skip
        assert len(answers) == samples
        return [
            Completion(
                tokens=answer["output_ids"],
                log_probs=[log_prob for log_prob, *_ in answer["meta_info"]["output_token_logprobs"]],
                text=answer["text"],
                finished=answer["meta_info"]["finish_reason"]["type"] == "stop",
            )
            for answer in answers
        ]

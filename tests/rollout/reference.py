"""What transformers says of the served model, and how far from it the server may lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from client import generate, random_prompt
from speech import Generation, Rows, speech
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny_models
from drydock.server import Server

ENOUGH = 200
"""Positions of which a share says something: one prompt's 16 tokens had 5 near ties where 14% of many are."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A tiny model, how it is served, and how exact its log-probabilities must be.

    A router that finds two experts nearly alike may choose another one for the last bit of a sum, in any two
    implementations, and what follows is another computation. Positions where that can happen are held to
    `near_tie`, all others to `bound`.
    """

    make: Callable[[Path, int], Path]
    dtype: str
    bound: float
    """Nats."""
    tie: float = 0.0
    """Router logits of the last chosen and the first rejected expert that are closer than this make a near tie."""
    near_tie: float = 0.0
    """Nats."""
    near_ties: float = 0.0
    """The largest share of positions that may be near ties, where there are ENOUGH of them."""
    faults: dict[str, Callable[[PreTrainedModel], None]] = field(default_factory=dict)
    """Smaller than any real mistake, and still to be seen."""


class Reference:
    """The weights as they are served, computed in float32."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.kind = kind
        dtype = getattr(torch, kind.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float().eval()

    def with_fault(self, name: str) -> Reference:
        """A copy with one of the kind's faults in it."""
        broken = copy.copy(self)
        broken.model = copy.deepcopy(self.model)
        with torch.no_grad():
            self.kind.faults[name](broken.model)
        return broken

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [position][vocabulary] of every token but the first, and [position] near ties."""
        inputs = torch.tensor([tokens[:-1]])
        if not self.kind.tie:
            return self.model(inputs).logits[0].double().log_softmax(-1), torch.zeros(len(tokens) - 1).bool()
        output = self.model(inputs, output_router_logits=True)
        chosen = self.model.config.num_experts_per_tok
        ranked = torch.stack(output.router_logits).topk(chosen + 1, dim=-1).values
        margins = (ranked[..., chosen - 1] - ranked[..., chosen]).amin(0)
        return output.logits[0].double().log_softmax(-1), margins < self.kind.tie


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Tokens, and what a server says of them: each prefilled as a prompt, the last ones generated as well."""

    tokens: tuple[int, ...]
    prefilled: Rows
    generated: Rows


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a server's log-probabilities compare with the reference's."""

    gap: float
    """The largest, in nats, where the routing is clear."""
    near_tie_gap: float
    near_ties: float
    """The share of such positions."""
    beyond: list[str]
    """A line for every position that is further off than it may be; empty when they agree."""


def score(server: Server, lengths: Sequence[int], new_tokens: int) -> list[Scored]:
    """Greedy continuations of prompts of these lengths, scored both ways."""
    generations = [
        generate(server, random_prompt(length, seed), new_tokens)[0] for seed, length in enumerate(lengths)
    ]
    return [
        Scored(
            tokens=generation.prompt + generation.tokens,
            # The last one is left out: with it there would be no room for the one token that a request makes.
            prefilled=speech(server).prefill(server, (generation.prompt + generation.tokens)[:-1]),
            generated=generation.log_probs,
        )
        for generation in generations
    ]


def scored(generation: Generation) -> Scored:
    """A generation as something to compare."""
    return Scored(tokens=generation.prompt + generation.tokens, prefilled=(), generated=generation.log_probs)


def compare(reference: Reference, answers: Sequence[Scored]) -> Agreement:
    """Hold every position of every answer against the reference."""
    gaps, ties, labels = [], [], []
    for answer in answers:
        expected, near = reference(answer.tokens)
        start = len(expected) - len(answer.generated)
        for first, rows, how in ((0, answer.prefilled, "prefilled"), (start, answer.generated, "generated")):
            if not rows:
                continue
            last = first + len(rows)
            gaps.append(_off(rows, expected[first:last]))
            ties.append(near[first:last])
            labels += [f"{how} token {place + 1} of {len(answer.tokens)}" for place in range(first, last)]
    gap, tie = torch.cat(gaps), torch.cat(ties)
    kind = reference.kind
    limit = torch.where(tie, kind.near_tie, kind.bound)
    beyond = [
        f"{labels[place]}: {gap[place]:.2e} nats from the reference, the bound is {limit[place]:.0e}"
        # A NaN is beyond any bound.
        for place in (~(gap <= limit)).nonzero().flatten().tolist()
    ]
    share = float(tie.double().mean())
    if len(tie) >= ENOUGH and share > kind.near_ties:
        beyond.append(f"{share:.0%} of the positions are near ties, more than {kind.near_ties:.0%}")
    return Agreement(
        gap=float(gap.where(~tie, 0.0).max()),
        near_tie_gap=float(gap.where(tie, 0.0).max()),
        near_ties=share,
        beyond=beyond,
    )


def _off(rows: Rows, expected: torch.Tensor) -> torch.Tensor:
    """How far each row lies from the reference's (rows, vocabulary), in the token that is furthest; what an engine does
    not tell is left out, and a NaN that it tells is not."""
    told = torch.tensor([[value is not None for value in row] for row in rows])
    values = torch.tensor([[value or 0.0 for value in row] for row in rows], dtype=torch.float64)
    return (values - expected).abs().where(told, 0.0).amax(-1)


def _swap_experts(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].mlp.experts.down_proj
    weight[[2, 5]] = weight[[5, 2]].clone()


def _no_renormalisation(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = False


def _norm_off(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.weight[7] *= 1.01


def _no_key_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_norm.weight.fill_(1.0)


def _swap_heads(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.copy_(weight.roll(model.config.head_dim, dims=0))


DENSE = Kind(
    make=tiny_models.make_qwen3,
    dtype="float32",
    # Measured on CPUs over 9960 positions: 7.9e-7; compiled 7.1e-7. The smallest fault below makes 8.8e-4.
    bound=1e-5,
    faults={
        "one weight of a norm off by 1%": _norm_off,
        "key norm not loaded": _no_key_norm,
        "heads swapped": _swap_heads,
    },
)

MOE = Kind(
    make=tiny_models.make_qwen3_moe,
    dtype="bfloat16",
    # Measured on CPUs over 9920 positions: 0.0185, the next 0.0136. The smallest fault below makes 0.078.
    bound=0.03,
    # vLLM's router logits are bfloat16: two steps of it between 0.5 and 1. Every gap over 0.0185 was seen at a
    # margin below 0.005, none at a larger one.
    tie=0.008,
    # Measured there: 0.075, at 14% of the positions.
    near_tie=0.2,
    near_ties=0.3,
    faults={
        "two experts swapped": _swap_experts,
        "router weights not renormalised": _no_renormalisation,
        "heads swapped": _swap_heads,
        "key norm not loaded": _no_key_norm,
    },
)


def _make_wider_moe(folder: Path, seed: int) -> Path:
    """Heads of 64. Measured with transformers in bfloat16 over 6144 positions: 0.0135, at near ties 0.079. The smallest
    fault makes 0.076; with the seed as it is two swapped experts make 0.056, too little to be told from the bound."""
    return tiny_models.make_qwen3_moe(folder, seed + 1, head_dim=64)


KINDS = {"dense": DENSE, "moe": MOE}
"""The tier's models, by name."""


def kind_for(name: str, engine: str) -> Kind:
    """A model as an engine serves it."""
    kind = KINDS[name]
    if engine == "sglang" and name == "moe":
        # In bfloat16 SGLang 0.5.14 asks for a kernel that rotates and stores keys, and has none for 32 numbers: the
        # server ends at its first prompt (an assert in rotary_embedding/base.py). It has one for heads of 64.
        return replace(kind, make=_make_wider_moe)
    if engine != "trtllm" or kind.dtype != "float32":
        return kind
    # TensorRT-LLM's kernels are for 16 bits, which do not show a hundredth of a weight.
    # Measured with vLLM on an H100 over 5,000 positions: 0.0066. The smallest fault below makes 0.077.
    seen = {fault: function for fault, function in kind.faults.items() if function is not _norm_off}
    return replace(kind, dtype="bfloat16", bound=0.03, faults=seen)

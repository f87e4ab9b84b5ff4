"""A small Qwen3-MoE trained from a seed to add and multiply digits, so that a wrong expert shows in its answers.

A prompt is a few letters and a problem, `kqzab 7*8=`; the answer is the last digit of the result, repeated to
the end. The letters make prompts that training never saw, and a prompt of one letter many times over loads
the experts unevenly.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from balance import balance, rank_loads
from planners import Shape
from reference_planner import ReferencePlanner
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tiny_models import save_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST_LETTERS = 8
TAIL = 3
"""Answers in a row at the end of a sequence in training."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    prompt: str
    answer: str


def is_held_out(letters: str) -> bool:
    """Whether training never sees these letters: about one string in five."""
    return sum(map(ord, letters)) % 5 == 0


def problem(rng: random.Random, letters: str) -> Problem:
    left, right, sign = rng.randrange(10), rng.randrange(10), rng.choice("+*")
    result = left + right if sign == "+" else left * right
    return Problem(prompt=f"{letters} {left}{sign}{right}=", answer=str(result % 10))


def problems(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """Problems whose letters are all held out of training, or all not."""
    rng = random.Random(seed)
    made: list[Problem] = []
    while len(made) < count:
        letters = "".join(rng.choices(LETTERS, k=rng.randint(2, MOST_LETTERS)))
        if is_held_out(letters) == held_out:
            made.append(problem(rng, letters))
    return made


def skewed_problems(count: int, seed: int, letter: str) -> list[Problem]:
    """Problems that all begin with one letter `MOST_LETTERS` times, so that most tokens are the same."""
    rng = random.Random(seed)
    return [problem(rng, letter * MOST_LETTERS) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Swap:
    """An expert that matters, the others from the one that matters least, and the accuracy without the two."""

    layer: int
    expert: int
    others: Sequence[int]
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrainedMoe:
    """The model in memory and in a folder, as float32 safetensors with its tokenizer."""

    model: Any
    folder: Path
    vocabulary: dict[str, int]
    seconds: float

    def first_tokens(self, prompts: Sequence[str], model: Any = None) -> list[int]:
        """The greedy token after each prompt, by this model or by a changed copy of it."""
        ids, ends = self.encode(prompts)
        with torch.inference_mode():
            logits = (self.model if model is None else model)(input_ids=ids).logits
        tokens: list[int] = logits[torch.arange(len(prompts)), ends].argmax(-1).tolist()
        return tokens

    def accuracy(self, asked: Sequence[Problem], model: Any = None) -> float:
        """Share of problems whose first greedy token is the answer."""
        given = self.first_tokens([each.prompt for each in asked], model)
        right = [token == self.vocabulary[each.answer] for token, each in zip(given, asked, strict=True)]
        return sum(right) / len(right)

    def expert_load(self, prompts: Sequence[str], *, at_the_answer: bool = False) -> np.ndarray:
        """[layers, experts]: tokens of these prompts that each expert processes, or only each prompt's last."""
        ids, ends = self.encode(prompts)
        places = torch.arange(ids.shape[1])[None, :]
        wanted = places == ends[:, None] if at_the_answer else places <= ends[:, None]
        layers: list[np.ndarray] = []

        def count(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
            chosen = output[-1][wanted.flatten()].flatten().cpu()
            layers.append(np.bincount(chosen, minlength=self.model.config.num_experts))

        hooks = [layer.mlp.gate.register_forward_hook(count) for layer in self.model.model.layers]
        with torch.inference_mode():
            self.model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        return np.array(layers)

    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids padded on the right, and each prompt's last position.

        Attention is causal, so what stands to the right of a prompt does not reach it.
        """
        rows = [[self.vocabulary[character] for character in prompt] for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.tensor([len(row) - 1 for row in rows])

    def most_harmful_swap(self, asked: Sequence[Problem]) -> Swap:
        """The two experts of a layer whose exchange costs the most answers, of the likeliest in each layer.

        Not those with the most tokens: they process letters, which no answer depends on (measured: exchanging
        them leaves the accuracy at 1.0). So: the expert that most answers go through, and those that the
        fewest do.
        """
        at_the_answer = self.expert_load([each.prompt for each in asked], at_the_answer=True)
        found = []
        for layer, load in enumerate(at_the_answer):
            coldest_first = [int(each) for each in np.argsort(load, kind="stable")]
            expert, others = coldest_first[-1], coldest_first[:-1]
            model = with_swapped_experts(self.model, layer, expert, others[0])
            accuracy = self.accuracy(asked, model)
            found.append(Swap(layer=layer, expert=expert, others=others, accuracy=accuracy))
        return min(found, key=lambda swap: swap.accuracy)


def with_swapped_experts(model: Any, layer: int, first: int, second: int) -> Any:
    """A copy of the model in which two experts of one layer have each other's weights."""
    swapped = copy.deepcopy(model)
    experts = swapped.model.layers[layer].mlp.experts
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[[first, second]] = weight[[second, first]]
    return swapped


def train(folder: Path, *, steps: int, experts: int = 16, seed: int = 0) -> TrainedMoe:
    """Train for `steps` batches of 128, on the CPU, and save into `folder`."""
    began = time.monotonic()
    save_tokenizer(folder)
    vocabulary = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=experts, num_experts_per_tok=2, decoder_sparse_step=1, norm_topk_prob=True,
        max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=vocabulary["<pad>"], eos_token_id=vocabulary["<eos>"], bos_token_id=None,
        # Wider than the usual 0.02: with so few steps small weights hardly leave the start.
        initializer_range=0.15,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    moe = TrainedMoe(model=model, folder=folder, vocabulary=vocabulary, seconds=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        asked = problems(128, seed=seed * 1_000_003 + step, held_out=False)
        ids, ends = moe.encode([each.prompt + each.answer * TAIL for each in asked])
        logits = model(input_ids=ids).logits
        loss = torch.zeros(())
        # The first answer is what there is to learn; that it repeats is learned at once.
        for place, weight in enumerate((1.0, *[0.1] * (TAIL - 1))):
            at = ends - TAIL + place
            row = torch.arange(len(asked))
            loss = loss + weight * torch.nn.functional.cross_entropy(logits[row, at], ids[row, at + 1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    return TrainedMoe(model=model, folder=folder, vocabulary=vocabulary, seconds=time.monotonic() - began)


def most_lopsided_letters(moe: TrainedMoe, ranks: int, redundant: int) -> list[str]:
    """The letters, first the one whose prompts load the ranks least evenly under the map that vLLM starts with."""
    experts = moe.model.config.num_experts
    initial = [*range(experts), *(each % experts for each in range(redundant))]

    def evenness(letter: str) -> float:
        load = _load_of(moe, letter)
        return float(balance(rank_loads(load, np.array([initial] * len(load)), ranks)).mean())

    return sorted(LETTERS, key=evenness)


def letters_that_change(moe: TrainedMoe, ranks: int, redundant: int) -> tuple[str, str]:
    """The most lopsided letter, and the one that a plan for its load fits worst: by that a plan for what was is seen.

    The second most lopsided may load the same experts: in a model of 400 steps a plan for the first fitted it too.
    """
    first = most_lopsided_letters(moe, ranks, redundant)[0]
    load = _load_of(moe, first)
    experts = load.shape[1]
    shape = Shape(experts=experts, slots=experts + redundant, groups=1, nodes=1, ranks=ranks)
    plan = ReferencePlanner().plan(load, shape).phy2log

    def evenness(letter: str) -> float:
        return float(balance(rank_loads(_load_of(moe, letter), plan, ranks)).mean())

    return first, min(LETTERS, key=evenness)


def _load_of(moe: TrainedMoe, letter: str) -> np.ndarray:
    return moe.expert_load([each.prompt for each in skewed_problems(16, 0, letter)])

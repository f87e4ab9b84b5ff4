"""GRPO, small but whole: rollouts from an engine's server, verl's advantage and loss, AdamW, weights pushed back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arithmetic import Problem, reward
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.workers.config import ActorConfig

from drydock.server import Server

END = 1
"""`<eos>` in the tokenizer of tiny_models."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What the policy in the server wrote: `samples` completions of each problem, one after another.

    All tensors are of shape (problems * samples, response length), padded on the right.
    """

    group: np.ndarray  # (problems * samples,), the problem's index
    prompts: torch.Tensor  # (problems * samples, prompt length)
    responses: torch.Tensor
    mask: torch.Tensor  # 1 where the policy wrote a token, its <eos> included
    log_probs: torch.Tensor  # the server's own, of the tokens written
    rewards: torch.Tensor  # (problems * samples,)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the policy in the server wrote to a prompt."""

    tokens: list[int]
    log_probs: list[float]
    text: str
    finished: bool
    """Whether it ended the text itself."""


class Learner:
    """The model where it is trained, and its tokenizer, from a folder as transformers saves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids of texts of one length, (texts, length)."""
        return torch.tensor([self.tokenizer.encode(text) for text in texts])

    def log_probs(self, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of responses, (batch, response length)."""
        tokens = torch.cat([prompts, responses], dim=1)
        logits = self.model(input_ids=tokens).logits[:, prompts.shape[1] - 1 : -1]
        return torch.log_softmax(logits, dim=-1).gather(-1, responses[..., None])[..., 0]

    def judged(
        self, chosen: Sequence[Problem], samples: int, completions: Sequence[Completion], longest: int
    ) -> Rollouts:
        """Completions, `samples` of each problem one after another, with what they earn; `longest` tokens at most."""
        group = np.repeat(np.arange(len(chosen)), samples)
        shape = (len(completions), longest)
        responses, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        log_probs, rewards = torch.zeros(shape), torch.zeros(len(completions))
        for row, found in enumerate(completions):
            length = len(found.tokens)
            responses[row, :length] = torch.tensor(found.tokens)
            mask[row, :length] = 1
            log_probs[row, :length] = torch.tensor(found.log_probs)
            rewards[row] = reward(chosen[group[row]], found.text, found.finished)
        return Rollouts(
            group=group, prompts=self.encode([chosen[index].prompt for index in group]),
            responses=responses, mask=mask, log_probs=log_probs, rewards=rewards,
        )  # fmt: skip


class Policy(Learner, ABC):
    """The same model twice: here, where it is trained, and in the server, where it writes.

    Parameters:
        folder: what the server serves; pushes overwrite its weights.
        server: an engine's that can load weights again.
        longest: tokens of a response at most.
    """

    def __init__(self, folder: Path, server: Server, longest: int) -> None:
        super().__init__(folder)
        self.server, self.longest = server, longest

    @abstractmethod
    def server_log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """The server's log-probabilities of tokens[1:], each given those before it."""

    @abstractmethod
    def complete(self, prompt: str, samples: int, seed: int) -> list[Completion]:
        """Samples at temperature 1, the first with this seed, each other with the next one."""

    def push(self) -> None:
        """Make the server's weights the trainer's."""
        written = self.folder / "model.safetensors.new"
        save_file(
            {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()},
            written,
            metadata={"format": "pt"},
        )
        written.replace(self.folder / "model.safetensors")
        self.server.reload_weights()

    def rollouts(self, chosen: Sequence[Problem], samples: int, seed: int) -> Rollouts:
        """`samples` completions of each problem at temperature 1, reproducible by seed."""

        def ask(index: int) -> list[Completion]:
            return self.complete(chosen[index].prompt, samples, (seed * len(chosen) + index) * samples)

        with ThreadPoolExecutor(8) as pool:
            completions = [each for group in pool.map(ask, range(len(chosen))) for each in group]
        return self.judged(chosen, samples, completions, self.longest)


def warm_up(learner: Learner, known: Sequence[Problem], steps: int, seed: int) -> None:
    """Teach the form by examples whose digit is random: one digit, then the end. No sum is ever shown."""
    draw = torch.Generator().manual_seed(seed)
    prompts = learner.encode([problem.prompt for problem in known])
    digits = learner.encode([*"0123456789"])[:, 0]
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=3e-3)
    for _ in range(steps):
        answers = digits[torch.randint(10, (len(known),), generator=draw)]
        responses = torch.stack([answers, torch.full_like(answers, END)], dim=1)
        loss = -learner.log_probs(prompts, responses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step of GRPO saw."""

    reward: float  # mean over the step's rollouts
    loss: float
    gap: float  # largest |trainer's - server's| log-probability of a token written, nats


class Trainer:
    """GRPO of a policy.

    Parameters:
        rewards: what the learner is told, made of what was earned; the identity, but for a control.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        epochs: int,
        rewards: Callable[[torch.Tensor], torch.Tensor] = lambda earned: earned,
    ) -> None:
        self.policy, self.epochs, self.rewards = policy, epochs, rewards
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, weight_decay=0.0)
        self.advantage = get_adv_estimator_fn("grpo")
        self.loss = get_policy_loss_fn("vanilla")
        self.config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)

    def step(self, chosen: Sequence[Problem], samples: int, seed: int) -> Step:
        """Roll out, judge and learn; the server's weights stay."""
        rollouts = self.policy.rollouts(chosen, samples, seed)
        last = rollouts.mask.sum(dim=1).long() - 1
        token_rewards = torch.zeros_like(rollouts.mask)
        token_rewards[torch.arange(len(last)), last] = self.rewards(rollouts.rewards)
        advantages, _ = self.advantage(
            token_level_rewards=token_rewards, response_mask=rollouts.mask, index=rollouts.group
        )
        with torch.no_grad():
            before = self.policy.log_probs(rollouts.prompts, rollouts.responses)
        gap = ((before - rollouts.log_probs).abs() * rollouts.mask).max().item()
        for _ in range(self.epochs):
            log_probs = self.policy.log_probs(rollouts.prompts, rollouts.responses)
            loss, _ = self.loss(before, log_probs, advantages, rollouts.mask, "token-mean", self.config)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), 1.0)
            self.optimizer.step()
        return Step(reward=rollouts.rewards.mean().item(), loss=loss.item(), gap=gap)

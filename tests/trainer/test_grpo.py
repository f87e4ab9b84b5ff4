"""GRPO against the engine's real server learns to add: rollouts, rewards, verl's advantage and loss, pushes.

What may pass for learning is ruled out by measurement: the untrained model, the model that was only taught the
form, the best constant answer, and the same loop with the same rewards given to the wrong rollouts.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from arithmetic import CHANCE, Problem, best_constant, problems
from grpo import Policy, Step, Trainer, warm_up

from tiny_models import make_qwen3

pytestmark = [
    pytest.mark.serves,
    pytest.mark.lacks(
        "trtllm", "trtllm-serve reads its weights once: verl gives new ones to a server under Ray"
    ),
]
LONGEST = 3
"""Tokens of a response: the digit, the end, and one too many."""
EXAM_SEED = 10**6
"""Far from the steps' seeds: the exam's rollouts are no step's."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, results: Path, engine: str) -> Iterator[Policy]:
    """A dense model with random weights, here and in a server."""
    folder = make_qwen3(tmp_path_factory.mktemp("qwen3"))
    served = importlib.import_module(f"policy_{engine}")
    with served.server(folder, results / f"{engine}-grpo.log") as server:
        yield served.ServedPolicy(folder, server, LONGEST)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where GRPO begins: rewards measured before and after the warm-up, and the weights after it."""

    known: list[Problem]
    constant: float  # what the best answer that does not depend on the sum earns
    untrained: float
    warmed: float
    weights: dict[str, torch.Tensor]


def exam(policy: Policy, known: list[Problem], profile: Mapping[str, Any]) -> float:
    """Mean reward of what the server writes, over all problems."""
    return policy.rollouts(known, profile["exam_samples"], EXAM_SEED).rewards.mean().item()


@pytest.fixture(scope="module")
def start(policy: Policy, profile: Mapping[str, Any]) -> Start:
    known = problems(profile["operands"])
    untrained = exam(policy, known, profile)
    warm_up(policy, known, steps=profile["warm_up_steps"], seed=0)
    policy.push()
    return Start(
        known=known, constant=best_constant(known), untrained=untrained,
        warmed=exam(policy, known, profile), weights=copy.deepcopy(policy.model.state_dict()),
    )  # fmt: skip


@pytest.fixture
def fresh(policy: Policy, start: Start) -> Policy:
    """The warmed-up policy, here and in the server."""
    policy.model.load_state_dict(start.weights)
    policy.push()
    return policy


def check_push(policy: Policy, bound: float) -> float:
    """See that the server's weights are the trainer's, and return the gap in nats.

    Raises:
        AssertionError: a token's log-probability differs by `bound` or more.
    """
    probe = policy.encode(["1+2=3+0=3"])
    ours = policy.log_probs(probe[:, :1], probe[:, 1:])[0].detach()
    gap = (ours - policy.server_log_probs(probe[0])).abs().max().item()
    assert gap < bound, f"the server's log-probabilities are {gap:.2g} nats from the trainer's"
    return gap


def train(
    policy: Policy,
    start: Start,
    profile: Mapping[str, Any],
    rewards: Callable[[torch.Tensor], torch.Tensor] = lambda earned: earned,
) -> list[Step]:
    """The profile's number of steps, each push checked."""
    trainer = Trainer(
        policy, learning_rate=profile["learning_rate"], epochs=profile["epochs"], rewards=rewards
    )
    steps = []
    for seed in range(profile["steps"]):
        steps.append(trainer.step(start.known, profile["samples"], seed))
        with pytest.raises(AssertionError, match="nats from"):
            check_push(policy, profile["gap_bound"])  # the update did change the probe
        policy.push()
        check_push(policy, profile["gap_bound"])
    return steps


def curve(title: str, steps: list[Step], threshold: float) -> dict[str, Any]:
    """For the report: mean reward by step."""
    return {
        "title": title, "x_label": "step", "y_label": "mean reward", "threshold": threshold,
        "x": list(range(1, len(steps) + 1)), "y": [step.reward for step in steps],
    }  # fmt: skip


def test_before_grpo_nobody_can_add(start: Start, record: Any) -> None:
    record("rewards", {"untrained": start.untrained, "warmed": start.warmed, "constant": start.constant})
    assert start.untrained < CHANCE / 2, "random weights should not even know the form"
    assert abs(start.warmed - CHANCE) < 0.06, "the warm-up should teach the form and nothing else"


def test_the_same_seed_is_the_same_rollouts(fresh: Policy, start: Start, profile: Mapping[str, Any]) -> None:
    first, again, other = (fresh.rollouts(start.known, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(first.responses, again.responses)
    assert torch.equal(first.mask, again.mask)
    assert (first.log_probs - again.log_probs).abs().max() < profile["gap_bound"]
    assert not torch.equal(first.responses, other.responses)


def test_a_push_that_did_not_take_is_seen(fresh: Policy, start: Start, profile: Mapping[str, Any]) -> None:
    bound = profile["gap_bound"]
    assert check_push(fresh, bound) < bound
    Trainer(fresh, learning_rate=profile["learning_rate"], epochs=1).step(start.known, 4, 0)
    with pytest.raises(AssertionError, match="nats from"):
        check_push(fresh, bound)

    learned = copy.deepcopy(fresh.model.state_dict())
    stale = "model.layers.1.mlp.down_proj.weight"
    fresh.model.load_state_dict({**learned, stale: start.weights[stale]})
    fresh.push()
    fresh.model.load_state_dict(learned)
    with pytest.raises(AssertionError, match="nats from"):
        check_push(fresh, bound)

    fresh.push()
    check_push(fresh, bound)


def test_the_reward_rises(fresh: Policy, start: Start, profile: Mapping[str, Any], record: Any) -> None:
    threshold = max(start.warmed, start.constant) + profile["margin"]
    steps = train(fresh, start, profile)
    after = exam(fresh, start.known, profile)
    record("series", curve("GRPO on a+b=", steps, threshold))
    record("rewards", {"before": start.warmed, "after": after, "threshold": threshold})
    record("gap", [step.gap for step in steps])
    assert all(abs(step.loss) < 10 for step in steps)
    assert max(step.gap for step in steps) < profile["gap_bound"]
    assert after > threshold


def test_the_reward_does_not_rise_where_rewards_go_to_the_wrong_rollouts(
    fresh: Policy, start: Start, profile: Mapping[str, Any], record: Any
) -> None:
    draw = torch.Generator().manual_seed(0)
    steps = train(
        fresh, start, profile, rewards=lambda earned: earned[torch.randperm(len(earned), generator=draw)]
    )
    after = exam(fresh, start.known, profile)
    record("series", curve("GRPO on a+b=, rewards shuffled", steps, start.constant))
    record("rewards", {"before": start.warmed, "after": after})
    assert after < max(start.warmed, start.constant) + profile["margin"] / 2

"""verl's advantage estimators against a numpy oracle, and the same check against planted faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from batches import Batch, close, hold, tensor
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

Estimator = Callable[..., tuple[torch.Tensor, torch.Tensor]]

gae, grpo, grpo_vectorized, rloo, rloo_vectorized = (
    get_adv_estimator_fn(name) for name in ("gae", "grpo", "grpo_vectorized", "rloo", "rloo_vectorized")
)


def check_gae(estimator: Estimator) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        gamma, lam = batch.draw.uniform(0.5, 1.0, 2)
        advantages, returns = estimator(
            token_level_rewards=tensor(batch.rewards), values=tensor(batch.values),
            response_mask=tensor(batch.mask), gamma=gamma, lam=lam,
        )  # fmt: skip
        expected, expected_returns = oracle.gae(batch.rewards, batch.values, batch.mask, gamma, lam)
        # verl leaves what is masked as it falls out; nothing may read it (test_masking).
        own = batch.mask > 0
        close(returns[own], expected_returns[own])
        # Where all tokens have one advantage, whitening divides nothing by nothing.
        if expected[own].std() > 1e-3:
            close(advantages[own], oracle.whiten(expected, batch.mask)[own], 1e-5)

    return check


def check_grpo(estimator: Estimator, tolerance: float) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        for by_std in (True, False):
            advantages, returns = estimator(
                token_level_rewards=tensor(batch.rewards), response_mask=tensor(batch.mask),
                index=batch.group, norm_adv_by_std_in_grpo=by_std, epsilon=1e-4,
            )  # fmt: skip
            expected = oracle.grpo(batch.rewards, batch.mask, batch.group, 1e-4, by_std)
            close(advantages, expected, tolerance)
            close(returns, expected, tolerance)

    return check


def check_rloo(estimator: Estimator) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        advantages, returns = estimator(
            token_level_rewards=tensor(batch.rewards), response_mask=tensor(batch.mask), index=batch.group
        )
        expected = oracle.rloo(batch.rewards, batch.mask, batch.group)
        if estimator is rloo_vectorized:
            # The two disagree on a group of one: here it gets nothing, there it keeps its reward.
            alone = np.bincount(batch.group)[batch.group] == 1
            expected[alone] = 0.0
        close(advantages, expected)
        close(returns, expected)

    return check


def test_gae_is_the_papers(profile: Mapping[str, Any]) -> None:
    hold(check_gae(gae), profile["examples"])


def test_grpo_is_the_papers(profile: Mapping[str, Any]) -> None:
    hold(check_grpo(grpo, 1e-6), profile["examples"])


def test_vectorized_grpo_is_the_same(profile: Mapping[str, Any]) -> None:
    # It computes in float32, whatever it is given; a mean of equal rewards is then off by 1e-7, of which
    # epsilon makes 1e-3.
    hold(check_grpo(grpo_vectorized, 3e-3), profile["examples"])


@pytest.mark.parametrize("estimator", [rloo, rloo_vectorized], ids=["rloo", "rloo_vectorized"])
def test_rloo_is_the_papers(profile: Mapping[str, Any], estimator: Estimator) -> None:
    hold(check_rloo(estimator), profile["examples"])


def changed(estimator: Estimator, **changes: Callable[[Any], Any]) -> Estimator:
    """The estimator, but some of its arguments are not what it was given."""
    return lambda **given: estimator(
        **{name: changes[name](value) if name in changes else value for name, value in given.items()}
    )


def negated(estimator: Estimator) -> Estimator:
    def wrong(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        advantages, returns = estimator(**given)
        return -advantages, returns

    return wrong


def gae_off_by_one(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """delta_t takes V_t for V_{t+1}."""
    values = given["values"]
    shifted = torch.cat([values[:, :1], values[:, :-1]], dim=1)
    advantages, _ = gae(**{**given, "values": shifted})
    return advantages, advantages + values


def gae_not_whitened(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, returns = gae(**given)
    return returns - given["values"], returns


def whitened_with_the_padding(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, returns = gae(**given)
    raw = returns - given["values"]
    return (raw - raw.mean()) / raw.std(), returns


def grpo_population_std(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    centered, _ = grpo(**{**given, "norm_adv_by_std_in_grpo": False})
    if not given["norm_adv_by_std_in_grpo"]:
        return centered, centered
    scores = given["token_level_rewards"].sum(dim=1)
    for name in np.unique(given["index"]):
        rows = given["index"] == name
        if rows.sum() > 1:
            centered[rows] /= scores[rows].std(correction=0) + given["epsilon"]
    return centered, centered


def grpo_std_over_the_batch(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    centered, _ = grpo(**{**given, "norm_adv_by_std_in_grpo": False})
    if given["norm_adv_by_std_in_grpo"]:
        centered = centered / (given["token_level_rewards"].sum(dim=1).std() + given["epsilon"])
    return centered, centered


def baseline_with_itself(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """RLOO whose baseline is the mean of the whole group."""
    return grpo(**given, norm_adv_by_std_in_grpo=False)


def unmasked(mask: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(mask)


MUTANTS: dict[str, Callable[[Batch], None]] = {
    "gae forgets the mask": check_gae(changed(gae, response_mask=unmasked)),
    "gae's sign": check_gae(negated(gae)),
    "gae off by one": check_gae(gae_off_by_one),
    "gae without lambda": check_gae(changed(gae, lam=lambda _: 1.0)),
    "gae without gamma": check_gae(changed(gae, gamma=lambda _: 1.0)),
    "gae not whitened": check_gae(gae_not_whitened),
    "gae whitened with the padding": check_gae(whitened_with_the_padding),
    "grpo forgets the mask": check_grpo(changed(grpo, response_mask=unmasked), 1e-6),
    "grpo's sign": check_grpo(negated(grpo), 1e-6),
    "grpo divides by n, not n - 1": check_grpo(grpo_population_std, 1e-6),
    "grpo divides by n, not n - 1, at the wide tolerance": check_grpo(grpo_population_std, 3e-3),
    "grpo's std over the batch": check_grpo(grpo_std_over_the_batch, 1e-6),
    "grpo takes the batch for one group": check_grpo(changed(grpo, index=np.zeros_like), 1e-6),
    "grpo always divides by the std": check_grpo(changed(grpo, norm_adv_by_std_in_grpo=lambda _: True), 1e-6),
    "grpo sees the last token's reward alone": check_grpo(
        changed(grpo, token_level_rewards=lambda rewards: rewards[:, -1:]), 1e-6
    ),
    "rloo forgets the mask": check_rloo(changed(rloo, response_mask=unmasked)),
    "rloo's sign": check_rloo(negated(rloo)),
    "rloo's baseline holds the sample itself": check_rloo(baseline_with_itself),
    "rloo takes the batch for one group": check_rloo(changed(rloo, index=np.zeros_like)),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_caught(profile: Mapping[str, Any], fault: str) -> None:
    with pytest.raises(AssertionError):
        hold(MUTANTS[fault], profile["examples"])

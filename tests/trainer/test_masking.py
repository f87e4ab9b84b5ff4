"""What is masked never moves an advantage, a loss or a gradient: bit-equal, whatever stands there.

Every estimator, every loss and every aggregation that verl has registered is in a table here; a new one
fails the first test until it is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracle import MODES
from releases import cases, here
from verl.trainer.config import AlgoConfig, RolloutCorrectionConfig
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.config import ActorConfig, PolicyLossConfig

ROWS, LENGTH, WORDS = 8, 12, 5
ESTIMATORS = {
    "gae", "grpo", "grpo_vectorized", "grpo_passk", "gdpo", "reinforce_plus_plus",
    "reinforce_plus_plus_baseline", "remax", "rloo", "rloo_vectorized", "opo", "gpg", "optimal_token_baseline",
    "tir_optimal_token_baseline",
}  # fmt: skip
READS_MASKED_REWARDS = {
    "grpo", "grpo_vectorized", "grpo_passk", "gdpo", "reinforce_plus_plus_baseline", "rloo", "rloo_vectorized",
    "opo", "gpg",
}  # fmt: skip
"""These take the sum of a whole row for the response's one reward: who puts a reward on a masked token, a
tool's answer say, is paid for it. The others take no reward from there."""
LEAVES_MASKED_ADVANTAGES = {"gae", "remax"}
"""These give masked tokens advantages that mean nothing, for the loss to leave out."""
FURTHEST = {
    "vanilla": 1e4, "dppo_tv": 1e4, "dppo_kl": 1e4, "gspo": 1e4, "sapo": 1e4, "gpg": 1e4, "dro": 1e4,
    "cispo": 1e4, "geo_mean": 1e4, "bypass_mode": 1e4, "clip_cov": 40.0, "kl_cov": 40.0,
}  # fmt: skip
"""How far a masked log-probability may lie from the old one, in nats."""
UNBOUNDED = ("clip_cov", "kl_cov")
"""These do not bound the ratio, so that a masked token far enough away overflows it, and 0 times infinity is NaN."""


def estimate(name: str, given: Mapping[str, Any]) -> torch.Tensor:
    """The advantages of one of verl's estimators, which each take some of what is given."""
    names = {
        "gae": ("values", "gamma", "lam"),
        "remax": ("reward_baselines",),
        "optimal_token_baseline": ("index", "old_log_probs", "sum_pi_squared"),
        "tir_optimal_token_baseline": ("index", "old_log_probs", "sum_pi_squared"),
        "reinforce_plus_plus": ("config",),
        "grpo_passk": ("index", "config"),
    }.get(name, ("index",))
    arguments = {key: given[key] for key in ("token_level_rewards", "response_mask", *names)}
    result: torch.Tensor = core_algos.get_adv_estimator_fn(name)(**arguments)[0]
    return result


@pytest.fixture
def batch() -> SimpleNamespace:
    """Padding, holes and a row with nothing of its own; outcome rewards on the last token of each row."""
    draw = torch.Generator().manual_seed(5)
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH, (ROWS, 1), generator=draw)).float()
    mask[1::2, 1] = 0
    mask[3] = 0
    own = mask > 0
    rewards = torch.zeros(ROWS, LENGTH)
    last = LENGTH - 1 - own.flip(1).int().argmax(dim=1)
    rewards[torch.arange(ROWS), last] = torch.randn(ROWS, generator=draw) * own.any(dim=1)
    return SimpleNamespace(
        mask=mask, own=own, rewards=rewards, index=np.arange(ROWS) // 4,
        values=torch.randn(ROWS, LENGTH, generator=draw),
        old=-torch.rand(ROWS, LENGTH, generator=draw) * 3,
        logits=torch.randn(ROWS, LENGTH, WORDS, generator=draw),
        words=torch.randint(WORDS, (ROWS, LENGTH, 1), generator=draw),
        advantages=torch.randn(ROWS, LENGTH, generator=draw), noise=torch.randn(ROWS, LENGTH, generator=draw),
    )  # fmt: skip


def test_nothing_registered_is_left_out() -> None:
    assert set(core_algos.ADV_ESTIMATOR_REGISTRY) == ESTIMATORS
    assert set(core_algos.POLICY_LOSS_REGISTRY) == set(here(FURTHEST))


def hold_still(batch: SimpleNamespace, name: str, mask: torch.Tensor) -> None:
    """Put anything at the batch's masked tokens, and see that the advantages of the others stay.

    Parameters:
        mask: what the estimator is told.

    Raises:
        AssertionError: they move, or a masked token has an advantage.
    """

    def advantages(**moves: float) -> torch.Tensor:
        moved = {
            key: torch.where(batch.own, value, size * batch.noise)
            for (key, value), size in zip(movable.items(), moves.values(), strict=True)
        }
        return estimate(
            name,
            {
                **moved, "response_mask": mask, "index": batch.index, "reward_baselines": batch.values[:, 0],
                "gamma": 0.97, "lam": 0.9, "config": AlgoConfig(gamma=0.97),
            },
        )  # fmt: skip

    movable = {
        "token_level_rewards": batch.rewards, "values": batch.values, "old_log_probs": batch.old,
        "sum_pi_squared": batch.old.exp() / 2,
    }  # fmt: skip
    clean = advantages(rewards=0.0, values=0.0, old=0.0, squares=0.0)
    assert torch.isfinite(clean).all()
    assert clean[batch.own].abs().max() > 0.1, "nothing to move"
    other = advantages(rewards=0.0, values=1e18, old=30.0, squares=1e18)
    assert torch.equal(other[batch.own], clean[batch.own])
    if name not in LEAVES_MASKED_ADVANTAGES:
        assert (other[~batch.own] == 0).all()
    paid = advantages(rewards=3.0, values=0.0, old=0.0, squares=0.0)
    assert torch.equal(paid[batch.own], clean[batch.own]) == (name not in READS_MASKED_REWARDS)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_masked_tokens_never_move_an_advantage(batch: SimpleNamespace, name: str) -> None:
    hold_still(batch, name, batch.mask)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_estimator_that_forgets_its_mask_is_caught(batch: SimpleNamespace, name: str) -> None:
    with pytest.raises(AssertionError):
        hold_still(batch, name, torch.ones_like(batch.mask))


def run_loss(
    batch: SimpleNamespace,
    name: str,
    mode: str,
    *,
    moved: bool,
    mask: torch.Tensor | None = None,
    furthest: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A loss, and its gradients by the logits and by a bias that all tokens share, as a parameter is.

    Parameters:
        moved: whether logits, old log-probabilities and advantages differ where the batch's mask is 0.
        mask: what the loss is told; the batch's own.
        furthest: in place of FURTHEST.
    """
    bias = torch.zeros(WORDS, requires_grad=True)
    logits, old, advantages = batch.logits, batch.old, batch.advantages
    if moved:
        # A token certain now and all but impossible before, or the other way round; an advantage is up to 1e18.
        span = furthest or FURTHEST[name]
        far = span * batch.noise.tanh()
        logits = torch.where(
            batch.own[..., None], logits, torch.zeros_like(logits).scatter(-1, batch.words, far[..., None])
        )
        old = torch.where(batch.own, old, (-span * batch.noise.flip(0).tanh()).clamp(max=0))
        advantages = torch.where(batch.own, advantages, 1e18 * batch.noise)
    logits = logits.clone().requires_grad_()
    log_probs = torch.log_softmax(logits + bias, dim=-1).gather(-1, batch.words)[..., 0]
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(
            **({"dro_beta": 0.1} if here(["dro"]) else {}),
            clip_cov_ratio=0.1, clip_cov_lb=-10.0, clip_cov_ub=10.0, kl_cov_ratio=0.2,
            rollout_correction=RolloutCorrectionConfig(bypass_mode=True, rollout_is="token", loss_type="reinforce"),
        ),
    )  # fmt: skip
    torch.manual_seed(0)  # clip_cov draws which tokens it leaves out
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=old, log_prob=log_probs, advantages=advantages,
        response_mask=batch.mask if mask is None else mask, loss_agg_mode=mode, config=config,
    )  # fmt: skip
    loss.backward()
    assert logits.grad is not None
    assert bias.grad is not None
    return loss.detach(), logits.grad, bias.grad


@pytest.mark.parametrize("mode", cases(MODES))
@pytest.mark.parametrize("name", cases(sorted(FURTHEST)))
def test_masked_tokens_never_move_a_policy_loss(batch: SimpleNamespace, name: str, mode: str) -> None:
    loss, by_logits, by_bias = run_loss(batch, name, mode, moved=False)
    assert by_bias.abs().max() > 1e-4, "nothing to move"
    other, other_by_logits, other_by_bias = run_loss(batch, name, mode, moved=True)
    assert torch.equal(other, loss)
    assert torch.equal(other_by_bias, by_bias)
    assert torch.equal(other_by_logits[batch.own], by_logits[batch.own])
    assert (other_by_logits[~batch.own] == 0).all()


@pytest.mark.parametrize("name", cases(sorted(FURTHEST)))
def test_a_loss_that_forgets_its_mask_is_caught(batch: SimpleNamespace, name: str) -> None:
    one = torch.ones_like(batch.mask)
    loss, _, by_bias = run_loss(batch, name, "token-mean", moved=False, mask=one)
    other, _, other_by_bias = run_loss(batch, name, "token-mean", moved=True, mask=one)
    assert not torch.equal(other, loss)
    assert not torch.equal(other_by_bias, by_bias)


@pytest.mark.parametrize("mode", cases(MODES))
@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_the_ratio_has_no_bound_a_masked_token_spoils_the_gradient(
    batch: SimpleNamespace, name: str, mode: str
) -> None:
    """What verl 0.9.1 does, and shows that the tests above would see it; when it fails, enter 1e4 in FURTHEST."""
    _, _, by_bias = run_loss(batch, name, mode, moved=True, furthest=1e4)
    assert not torch.isfinite(by_bias).any()


def value_loss(batch: SimpleNamespace, predicted: torch.Tensor, mode: str) -> torch.Tensor:
    huge = torch.where(batch.own, batch.advantages, 1e15 * batch.noise)
    loss: torch.Tensor = core_algos.compute_value_loss(
        predicted, returns=huge, values=batch.values, response_mask=batch.mask, cliprange_value=0.5,
        loss_agg_mode=mode,
    )[0]  # fmt: skip
    return loss


def entropy_loss(batch: SimpleNamespace, predicted: torch.Tensor, mode: str) -> torch.Tensor:
    return core_algos.compute_entropy_loss(predicted[..., None] * batch.logits, batch.mask, mode)


def kl_loss(batch: SimpleNamespace, predicted: torch.Tensor, mode: str) -> torch.Tensor:
    total = torch.zeros(())
    for name in ("k1", "abs", "k2", "k3", "k1+", "k3+"):
        penalty = core_algos.kl_penalty(predicted, batch.old, name)
        total = total + core_algos.agg_loss(penalty, batch.mask, mode)
    return total


@pytest.mark.parametrize("mode", cases(MODES))
@pytest.mark.parametrize("loss", [value_loss, entropy_loss, kl_loss])
def test_masked_tokens_never_move_the_other_losses(
    batch: SimpleNamespace, loss: Callable[[SimpleNamespace, torch.Tensor, str], torch.Tensor], mode: str
) -> None:
    results = []
    for moved in (batch.values, torch.where(batch.own, batch.values, 1e6 * batch.noise)):
        predicted = moved.clone().requires_grad_()
        value = loss(batch, predicted, mode)
        value.backward()
        assert predicted.grad is not None
        results.append((value.detach(), predicted.grad))
    (clean, slope), (other, other_slope) = results
    assert torch.equal(other, clean)
    assert torch.equal(other_slope[batch.own], slope[batch.own])
    assert (other_slope[~batch.own] == 0).all()
    assert slope.abs().max() > 1e-4, "nothing to move"


@pytest.mark.parametrize("there", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_behind_the_mask_where_verl_says_so(
    batch: SimpleNamespace, there: float
) -> None:
    """verl promises it of masked_sum, so of all that is made of it: a mean, and the two aggregations over tokens."""
    bad = torch.where(batch.own, batch.advantages, there)
    for name in ("masked_sum", "masked_mean", "masked_var"):
        function = getattr(torch_functional, name)
        assert torch.equal(function(bad, batch.mask), function(batch.advantages, batch.mask)), name
    for mode in here(("token-mean", "token-sum")):
        results = []
        for losses in (batch.advantages, bad):
            leaf = losses.clone().requires_grad_()
            value = core_algos.agg_loss(leaf, batch.mask, mode)
            value.backward()
            results.append((value.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0]), mode
        assert torch.equal(results[0][1], results[1][1]), mode

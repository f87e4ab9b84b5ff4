"""verl's losses and their derivatives against a numpy oracle, and the same checks against planted faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from batches import Batch, close, hold, tensor
from oracle import MODES
from releases import here
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

KL_NAMES = {
    "k1": "k1", "kl": "k1", "abs": "abs", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3",
    "k1+": "k1+", "k3+": "k3+",
}  # fmt: skip
"""verl's name -> the oracle's."""

Loss = Callable[..., Any]
vanilla = core_algos.get_policy_loss_fn("vanilla")


def actor(low: float, high: float, dual: float, **batch_info: float) -> ActorConfig:
    """verl's configuration of an actor, of which a loss reads the clip ratios and the sizes of the batch."""
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low,
        clip_ratio_high=high, clip_ratio_c=dual, global_batch_info=batch_info,
    )  # fmt: skip


def check_aggregation(aggregate: Loss) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        losses, mask = tensor(batch.advantages), tensor(batch.mask)
        for mode in here(MODES):
            expected = oracle.aggregate(batch.advantages, batch.mask, mode)
            close(aggregate(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode), expected)
            # Data parallel: two ranks with half of the sequences each, whose gradients are then averaged.
            whole = {
                "dp_size": 2, "batch_num_tokens": int(batch.mask.sum()),
                "global_batch_size": int(batch.mask.any(axis=1).sum()),
            }  # fmt: skip
            halves = [
                aggregate(loss_mat=losses[part], loss_mask=mask[part], loss_agg_mode=mode, **whole)
                for part in (slice(None, None, 2), slice(1, None, 2))
            ]
            close((halves[0] + halves[1]) / 2, expected)
        scaled = aggregate(
            loss_mat=losses, loss_mask=mask, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=7
        )
        close(scaled, oracle.aggregate(batch.advantages, batch.mask, "seq-mean-token-sum-norm", 7))

    return check


def check_ppo(loss: Loss) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        low, high, dual = (batch.draw.uniform(*ends) for ends in ((0.1, 0.4), (0.1, 0.4), (1.2, 4.0)))
        weights = batch.draw.uniform(0.5, 2.0, batch.mask.shape)
        for mode in here(MODES):
            for given in (None, weights):
                new = tensor(batch.new).requires_grad_()
                value, _ = loss(
                    old_log_prob=tensor(batch.old), log_prob=new, advantages=tensor(batch.advantages),
                    response_mask=tensor(batch.mask), loss_agg_mode=mode, config=actor(low, high, dual),
                    rollout_is_weights=None if given is None else tensor(given),
                )  # fmt: skip
                value.backward()
                losses, slopes = oracle.ppo_clip(batch.old, batch.new, batch.advantages, low, high, dual)
                factor = 1.0 if given is None else given
                close(value, oracle.aggregate(losses * factor, batch.mask, mode))
                # An aggregation is linear: its derivative by one token is its value where the others are 0.
                share = np.zeros_like(batch.mask)
                for row, column in np.argwhere(batch.mask > 0):
                    alone = np.zeros_like(batch.mask)
                    alone[row, column] = 1
                    share[row, column] = oracle.aggregate(alone, batch.mask, mode)
                close(new.grad, share * slopes * factor)

    return check


def check_value(loss: Loss) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        clip = batch.draw.uniform(0.1, 0.8)
        for mode in here(MODES):
            value, _ = loss(
                vpreds=tensor(batch.new), returns=tensor(batch.advantages), values=tensor(batch.values),
                response_mask=tensor(batch.mask), cliprange_value=clip, loss_agg_mode=mode,
            )  # fmt: skip
            losses = oracle.value_clip(batch.new, batch.advantages, batch.values, clip)
            close(value, oracle.aggregate(losses, batch.mask, mode))

    return check


def check_kl(penalty: Loss, names: Mapping[str, str] = KL_NAMES) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        reference = batch.new + 2 * (batch.old - batch.new)  # far enough for verl's bound on k3
        for name, meant in names.items():
            new = tensor(batch.new).requires_grad_()
            value = penalty(new, tensor(reference), name)
            value.sum().backward()
            expected, slope = oracle.kl(batch.new, reference, meant)
            close(value, expected)
            close(new.grad, slope)

    return check


def check_entropy(loss: Loss) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        logits = batch.draw.normal(0, 3, (*batch.mask.shape, 11))
        for mode in here(MODES):
            value = loss(tensor(logits), tensor(batch.mask), mode)
            close(value, oracle.aggregate(oracle.entropy(logits), batch.mask, mode))

    return check


def check_reward_penalty(rewards: Loss) -> Callable[[Batch], None]:
    def check(batch: Batch) -> None:
        value = rewards(tensor(batch.rewards), tensor(batch.new), tensor(batch.old), 0.3)
        close(value, batch.rewards - 0.3 * oracle.kl(batch.new, batch.old, "k1")[0])

    return check


CHECKS: dict[str, Callable[[Batch], None]] = {
    "aggregation": check_aggregation(core_algos.agg_loss),
    "PPO clip": check_ppo(vanilla),
    "clipped value loss": check_value(core_algos.compute_value_loss),
    "KL penalties": check_kl(core_algos.kl_penalty),
    "entropy": check_entropy(core_algos.compute_entropy_loss),
    "KL in the reward": check_reward_penalty(core_algos.compute_rewards),
}


@pytest.mark.parametrize("check", CHECKS)
def test_verl_is_the_papers(profile: Mapping[str, Any], check: str) -> None:
    hold(CHECKS[check], profile["examples"])


def with_arguments(loss: Loss, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Loss:
    """The loss, but its named arguments are first changed."""
    return lambda **given: loss(**{**given, **change(given)})


def with_clip(**ratios: float) -> Loss:
    """PPO's loss that holds to its own clip ratios, whatever is configured; the others stay."""

    def wrong(**given: Any) -> Any:
        config = given["config"]
        kept = {
            "low": config.clip_ratio_low, "high": config.clip_ratio_high, "dual": config.clip_ratio_c,
        }  # fmt: skip
        return vanilla(**{**given, "config": actor(**{**kept, **ratios})})

    return wrong


def pessimist_turned(**given: Any) -> Any:
    """The smaller of the two losses, not the larger."""
    config, mask = given["config"], given["response_mask"]
    ratio = (given["log_prob"] - given["old_log_prob"]).exp()
    clipped = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    losses = torch.minimum(-given["advantages"] * ratio, -given["advantages"] * clipped)
    if given["rollout_is_weights"] is not None:
        losses = losses * given["rollout_is_weights"]
    return core_algos.agg_loss(losses, mask, given["loss_agg_mode"]), {}


def no_gradient_through_the_ratio(**given: Any) -> Any:
    """The right value, and the gradient of A log p: the ratio is not differentiated."""
    value, metrics = vanilla(**{**given, "log_prob": given["log_prob"].detach()})
    plain = core_algos.agg_loss(
        -given["advantages"] * given["log_prob"], given["response_mask"], given["loss_agg_mode"]
    )
    return value + plain - plain.detach(), metrics


def negative(loss: Loss) -> Loss:
    def wrong(*given: Any, **named: Any) -> Any:
        result = loss(*given, **named)
        return (-result[0], *result[1:]) if isinstance(result, tuple) else -result

    return wrong


def mode_taken_for(asked: str, used: str) -> Loss:
    return with_arguments(
        core_algos.agg_loss,
        lambda given: {"loss_agg_mode": used if given["loss_agg_mode"] == asked else given["loss_agg_mode"]},
    )


def all_rows_count(**given: Any) -> torch.Tensor:
    """A mean over sequences in which one without tokens counts."""
    value = core_algos.agg_loss(**given)
    mask = given["loss_mask"]
    if given["loss_agg_mode"].startswith("seq") and "global_batch_size" not in given:
        value = value * mask.any(dim=1).sum() / len(mask)
    return value


def no_mask(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {name: torch.ones_like(given[name])}


MUTANTS: dict[str, Callable[[Batch], None]] = {
    "aggregation forgets the mask": check_aggregation(
        with_arguments(core_algos.agg_loss, no_mask("loss_mask"))
    ),
    "mean of tokens for mean of sequences": check_aggregation(
        mode_taken_for("seq-mean-token-mean", "token-mean")
    ),
    "mean of sequences for mean of tokens": check_aggregation(
        mode_taken_for("token-mean", "seq-mean-token-mean")
    ),
    "the length's norm left out": check_aggregation(
        mode_taken_for("seq-mean-token-sum-norm", "seq-mean-token-sum")
    ),
    "an empty sequence counts": check_aggregation(all_rows_count),
    "a rank does not scale by the number of ranks": check_aggregation(
        with_arguments(core_algos.agg_loss, lambda given: {"dp_size": 1})  # noqa: ARG005
    ),
    "ppo forgets the mask": check_ppo(with_arguments(vanilla, no_mask("response_mask"))),
    "ppo's sign": check_ppo(negative(vanilla)),
    "ppo clips above only": check_ppo(with_clip(low=1e9)),
    "ppo clips below only": check_ppo(with_clip(high=1e9)),
    "ppo does not clip": check_ppo(with_clip(low=1e9, high=1e9)),
    "ppo without dual clip": check_ppo(with_clip(dual=1e9)),
    "ppo swaps the clip ratios": check_ppo(
        lambda **given: vanilla(
            **{
                **given,
                "config": actor(
                    given["config"].clip_ratio_high,
                    given["config"].clip_ratio_low,
                    given["config"].clip_ratio_c,
                ),
            }
        )
    ),
    "ppo takes the smaller loss": check_ppo(pessimist_turned),
    "ppo swaps old and new": check_ppo(
        with_arguments(
            vanilla, lambda given: {"old_log_prob": given["log_prob"], "log_prob": given["old_log_prob"]}
        )
    ),
    "ppo does not differentiate the ratio": check_ppo(no_gradient_through_the_ratio),
    "ppo forgets the importance weights": check_ppo(
        with_arguments(vanilla, lambda given: {"rollout_is_weights": None})  # noqa: ARG005
    ),
    "value loss forgets the mask": check_value(
        with_arguments(core_algos.compute_value_loss, no_mask("response_mask"))
    ),
    "value loss does not clip": check_value(
        with_arguments(core_algos.compute_value_loss, lambda given: {"cliprange_value": 1e9})  # noqa: ARG005
    ),
    "value loss clips around the returns": check_value(
        with_arguments(core_algos.compute_value_loss, lambda given: {"values": given["returns"]})
    ),
    "kl's sign": check_kl(negative(core_algos.kl_penalty)),
    "kl the other way round": check_kl(
        lambda new, reference, name: core_algos.kl_penalty(reference, new, name)
    ),
    "k2 for k3": check_kl(lambda new, reference, name: core_algos.kl_penalty(new, reference, "k2"), {"k3": "k3"}),  # noqa: ARG005
    "k3 without its bound": check_kl(
        lambda new, reference, name: (reference - new).exp() - 1 - (reference - new), {"k3": "k3"}  # noqa: ARG005
    ),
    "k3's own gradient for k3+": check_kl(core_algos.kl_penalty, {"k3": "k3+"}),
    "entropy's sign": check_entropy(negative(core_algos.compute_entropy_loss)),
    "entropy in bits": check_entropy(
        lambda *given: core_algos.compute_entropy_loss(*given) / torch.log(torch.tensor(2.0))
    ),
    "KL added to the reward": check_reward_penalty(
        lambda rewards, new, old, ratio: core_algos.compute_rewards(rewards, new, old, -ratio)
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_caught(profile: Mapping[str, Any], fault: str) -> None:
    with pytest.raises(AssertionError):
        hold(MUTANTS[fault], profile["examples"])

"""Advantages and losses in numpy, written from the papers' formulas; what verl computes is held against them.

Every function takes float64 arrays of shape (batch, response length) and a mask of 0 and 1 of that shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
"""How `aggregate` may sum up; the names are verl's."""


def whiten(values: Array, mask: Array) -> Array:
    """Mean 0 and variance 1 over what the mask selects, with Bessel's correction."""
    chosen = values[mask > 0]
    return (values - chosen.mean()) / np.sqrt(chosen.var(ddof=1))


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """Advantages, not whitened, and returns: generalized advantage estimation (arXiv:1506.02438, eq. 16).

    A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, where "next" is the
    next token the policy wrote: what the mask takes out (padding, a tool's answer) is not a step at all.
    At those places the result is 0.
    """
    advantages = np.zeros_like(rewards)
    for row in range(len(rewards)):
        steps = np.flatnonzero(mask[row])
        for position, step in enumerate(steps):
            for distance, later in enumerate(steps[position:]):
                after = steps[position + distance + 1 : position + distance + 2]
                next_value = values[row, after[0]] if len(after) else 0.0
                delta = rewards[row, later] + gamma * next_value - values[row, later]
                advantages[row, step] += (gamma * lam) ** distance * delta
    return advantages, (advantages + values) * mask


def grpo(rewards: Array, mask: Array, group: NDArray[np.int64], epsilon: float, by_std: bool) -> Array:
    """Group-relative advantages (DeepSeekMath, arXiv:2402.03300, 4.1.2): (r_i - mean) / std of the group.

    Without `by_std` Dr. GRPO's r_i - mean (arXiv:2503.20783). The papers leave two things open: verl's std
    is the sample's (n - 1), and a group of one keeps its reward, as if its mean were 0 and its std 1.
    """
    scores = rewards.sum(axis=1)
    result = np.empty_like(scores)
    for row, score in enumerate(scores):
        peers = scores[group == group[row]]
        alone = len(peers) == 1
        result[row] = score - (0.0 if alone else peers.mean())
        if by_std:
            result[row] /= (1.0 if alone else peers.std(ddof=1)) + epsilon
    return result[:, None] * mask


def rloo(rewards: Array, mask: Array, group: NDArray[np.int64]) -> Array:
    """REINFORCE leave-one-out (arXiv:2402.14740, eq. 4): r_i minus the mean of the others' rewards."""
    scores = rewards.sum(axis=1)
    result = np.zeros_like(scores)
    for row, score in enumerate(scores):
        others = [scores[peer] for peer in np.flatnonzero(group == group[row]) if peer != row]
        result[row] = score - np.mean(others) if others else score
    return result[:, None] * mask


def aggregate(losses: Array, mask: Array, mode: str, scale: float | None = None) -> float:
    """One number of a matrix of token losses, by one of `MODES`.

    token-mean: DAPO's (arXiv:2503.14476, eq. 8); seq-mean-token-mean: GRPO's 1/G sum 1/|o| sum;
    seq-mean-token-sum-norm: Dr. GRPO's, by a constant, the response length where none is given.
    A sequence with no token of its own does not count as a sequence.
    """
    rows = [losses[row][mask[row] > 0] for row in range(len(losses)) if mask[row].any()]
    match mode:
        case "token-mean":
            return float(np.concatenate(rows).mean())
        case "token-sum":
            return float(np.concatenate(rows).sum())
        case "seq-mean-token-sum":
            return float(np.mean([row.sum() for row in rows]))
        case "seq-mean-token-mean":
            return float(np.mean([row.mean() for row in rows]))
        case "seq-mean-token-sum-norm":
            return float(np.mean([row.sum() for row in rows]) / (scale or losses.shape[1]))
    raise ValueError(f"no aggregation is named {mode}")


def ppo_clip(
    old: Array, new: Array, advantages: Array, low: float, high: float, dual: float
) -> tuple[Array, Array]:
    """Token losses of PPO (arXiv:1707.06347, eq. 7) with dual clip (arXiv:1912.09729, eq. 5), and their
    derivatives by the new log-probabilities.

    The objective is min(r A, clip(r, 1 - low, 1 + high) A); for A < 0 it is at least `dual` A.
    """
    ratio = np.exp(new - old)
    objective = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    # The ratio still moves the objective only where the unclipped term is the smaller one: inside the clip
    # range on both sides, and outside it on the side that makes things worse.
    moved = np.where(advantages > 0, ratio < 1 + high, ratio > 1 - low)
    floored = (advantages < 0) & (objective < dual * advantages)
    objective = np.where(floored, dual * advantages, objective)
    return -objective, -np.where(moved & ~floored, ratio * advantages, 0.0)


def value_clip(predicted: Array, returns: Array, old: Array, clip: float) -> Array:
    """Token losses of a critic, clipped as PPO's first implementation does: half the larger of two squares."""
    near = np.clip(predicted, old - clip, old + clip)
    return 0.5 * np.maximum((predicted - returns) ** 2, (near - returns) ** 2)


def kl(new: Array, reference: Array, name: str) -> tuple[Array, Array]:
    """Schulman's estimators of KL(new || reference) from its own samples, and their derivatives by `new`.

    With log r = reference - new: k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r. A name that ends in +
    has k2's derivative, the one whose expectation is the KL's own. Not Schulman's but verl's: k3 is at most
    10, and flat beyond.
    """
    log_r = reference - new
    k3 = np.exp(log_r) - 1 - log_r
    value, slope = {
        "k1": (-log_r, np.ones_like(log_r)),
        "abs": (np.abs(log_r), -np.sign(log_r)),
        "k2": (log_r**2 / 2, -log_r),
        "k3": (np.minimum(k3, 10), np.where(k3 < 10, 1 - np.exp(log_r), 0)),
    }[name.removesuffix("+")]
    return value, -log_r if name.endswith("+") else slope


def entropy(logits: Array) -> Array:
    """-sum p log p over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(-(np.exp(log_p) * log_p).sum(axis=-1))

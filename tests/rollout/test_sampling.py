"""Sampling, n of a prompt as in a rollout: drawn from the model's distribution, the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from client import Generation, at_once, generate, random_prompt
from reference import Reference, compare, scored

from drydock.server import Server

pytestmark = pytest.mark.parametrize("served", ["dense"], indirect=True)


def test_n_samples_of_each_prompt(
    server: Server, reference: Reference, profile: Mapping[str, Any], record: Any
) -> None:
    """n distinct samples each, the same ones for the same seed, with the model's own log-probabilities."""
    count, n = profile["rollout_prompts"], profile["rollout_n"]
    assert count * n % profile["max_num_seqs"], "the last batch must be a part of one"
    prompts = [random_prompt(4 + number % 20, seed=700 + number) for number in range(count)]

    def rollout(number: int) -> list[Generation]:
        # vLLM gives sample i of a request the seed + i: seeds next to each other share samples.
        options = {"n": n, "temperature": 1.0, "seed": 1000 * number}
        return generate(server, prompts[number], profile["rollout_tokens"], **options)

    groups = at_once(rollout, range(count))
    for prompt, group in zip(prompts, groups, strict=True):
        assert [generation.prompt for generation in group] == [prompt] * n
        assert len({generation.tokens for generation in group}) == n
        assert all(len(generation.tokens) == profile["rollout_tokens"] for generation in group)
    agreement = compare(reference, [scored(generation) for group in groups for generation in group])
    assert agreement.beyond == []
    record("gap", agreement.gap)
    # The tokens: log-probabilities may differ in the last bit, see test_many_at_once.
    assert [found.tokens for found in rollout(0)] == [found.tokens for found in groups[0]]


def test_another_seed_gives_other_samples(server: Server) -> None:
    prompt = random_prompt(6, seed=701)
    one, other = (
        {found.tokens for found in generate(server, prompt, 16, n=4, temperature=1.0, seed=seed)}
        for seed in (0, 1000)
    )
    assert not one & other


def misfit(drawn: Sequence[int], probabilities: torch.Tensor) -> float:
    """How far counts lie from a distribution: chi-square in standard deviations from its mean.

    Tokens that are expected less than five times count as one, since chi-square wants no small counts.
    """
    expected = probabilities.double() * len(drawn)
    found = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    rare = expected < 5
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
        found = torch.cat([found[~rare], found[rare].sum(0, keepdim=True)])
    freedom = len(expected) - 1
    return float((((found - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_samples_follow_the_temperature(
    server: Server, reference: Reference, profile: Mapping[str, Any], record: Any
) -> None:
    """The first tokens of many samples are spread as the model says, at this temperature and no other."""
    prompt, temperature = random_prompt(9, seed=702), 0.25
    samples = generate(server, prompt, 1, n=profile["draws"], temperature=temperature, seed=0)
    log_probs = reference([*prompt, 0])[0][-1]
    drawn = [sample.tokens[0] for sample in samples]
    found = {t: misfit(drawn, (log_probs / t).softmax(-1)) for t in (0.125, temperature, 0.5, 1.0)}
    record("misfit", {str(t): value for t, value in found.items()})
    assert found[temperature] < 4
    assert all(value > 8 for t, value in found.items() if t != temperature)
    # What a rollout reports is the model's own, before the temperature: the ratio in a PPO loss is made of it.
    assert compare(reference, [scored(sample) for sample in samples[:1]]).beyond == []

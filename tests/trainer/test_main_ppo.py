"""verl's own entry point: its configuration, data and reward checked on any machine, the run itself on a GPU."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import ray
import sync_probe
import torch
import trtllm_arguments
import verl_run
from arithmetic import Problem, best_constant, problems
from children import run_child
from grpo import Learner
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from safetensors.torch import load_file
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset, get_dataset_class


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the entry point is given."""

    known: list[Problem]
    model: Path
    data: Path
    output: Path
    overrides: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, profile: Mapping[str, Any], engine: str) -> Run:
    folder = tmp_path_factory.mktemp("main_ppo")
    known = problems(profile["main_ppo_operands"])
    model = verl_run.make_model(folder / "model", known, profile["warm_up_steps"])
    data = verl_run.make_data(folder / "problems.parquet", known)
    given = verl_run.overrides(model, data, folder / "checkpoints", len(known), profile, engine)
    return Run(known=known, model=model, data=data, output=folder / "checkpoints", overrides=given)


@pytest.fixture
def configured() -> Iterator[None]:
    """hydra finds verl's configuration, as in `python -m verl.trainer.main_ppo`."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


@pytest.fixture
def config(configured: None, run: Run) -> DictConfig:  # noqa: ARG001
    return compose("ppo_trainer", overrides=run.overrides)


def test_every_override_is_one_that_verl_has(config: DictConfig, run: Run, engine: str) -> None:
    added = [item.partition("=")[0] for item in run.overrides if item.startswith("+")]
    allowed = {f"+ray_kwargs.ray_init.{name}" for name in inspect.signature(ray.init).parameters}
    # A dictionary that is meant to be filled; its key is read where the model's configuration is made, below.
    allowed.add("+actor_rollout_ref.model.override_config.attn_implementation")
    if engine == "sglang":
        # Another, and verl gives its keys to this class.
        arguments = importlib.import_module("sglang.srt.server_args").ServerArgs
        allowed |= {
            f"+actor_rollout_ref.rollout.engine_kwargs.sglang.{field.name}" for field in fields(arguments)
        }
    assert set(added) <= allowed
    validate_config(config, need_reference_policy(config), need_critic(config))
    # With one sample a problem, GRPO has no advantage to learn from.
    assert config.actor_rollout_ref.rollout.n > 1
    samples = len(run.known) * config.actor_rollout_ref.rollout.n
    assert samples % config.actor_rollout_ref.rollout.max_num_seqs, "the last batch must be a part of one"
    assert not need_critic(config)
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    assert model.hf_config._attn_implementation == "sdpa"
    for part in ("actor", "rollout"):
        omega_conf_to_dataclass(config.actor_rollout_ref[part])


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    "wrong",
    ["trainer.total_steps=1", "actor_rollout_ref.rollout.samples=8"],  # contract: refused
)
def test_an_override_that_verl_does_not_have_is_refused(run: Run, wrong: str) -> None:
    with pytest.raises(HydraException):
        compose("ppo_trainer", overrides=[*run.overrides, wrong])


def test_a_batch_that_the_actor_cannot_split_is_refused(config: DictConfig) -> None:
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 2 * config.data.train_batch_size
    with pytest.raises(ValueError, match="must be >="):
        validate_config(config, need_reference_policy(config), need_critic(config))


def rows_of(config: DictConfig, run: Run) -> RLHFDataset:
    """The problems as verl's trainer reads them."""
    tokenizer = Learner(run.model).tokenizer
    return get_dataset_class(config.data)(
        data_files=config.data.train_files, tokenizer=tokenizer, processor=None, config=config.data
    )


def test_data_is_what_the_model_was_warmed_up_with(config: DictConfig, run: Run) -> None:
    rows = rows_of(config, run)
    assert len(rows) == len(run.known)
    for row, problem in zip(rows, run.known, strict=True):
        assert list(row["raw_prompt"]) == [{"role": "user", "content": problem.prompt}]
        assert row["reward_model"]["ground_truth"] == problem.answer


@pytest.mark.lacks("trtllm", "verl 0.8.0 makes a prompt's tokens in its agent loop, and nowhere alone")
def test_a_prompt_has_the_tokens_that_the_model_was_warmed_up_with(config: DictConfig, run: Run) -> None:
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    tokenizer = Learner(run.model).tokenizer
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3")
    for row, problem in zip(rows_of(config, run), run.known, strict=True):
        assert builder.build_initial_tokens(list(row["raw_prompt"])) == tokenizer.encode(problem.prompt)


def test_the_reward_is_the_tasks(config: DictConfig, run: Run) -> None:
    score = get_custom_reward_fn(config)
    assert score
    assert get_reward_manager_cls(config.reward.reward_manager.name).__name__ == "NaiveRewardManager"
    for problem in run.known:
        for digit in "0123456789":
            given = {
                "data_source": "drydock/arithmetic", "ground_truth": problem.answer,
                "extra_info": {"num_turns": 2},
            }  # fmt: skip
            assert score(solution_str=digit, **given) == float(digit == problem.answer)
            assert score(solution_str=digit + "0", **given) == 0.0


def check_updates(synced: Path, steps: int, record: Any) -> None:
    """See that after each update every tensor in the engine is the trainer's, and that one that is not would be seen.

    Raises:
        AssertionError: one is not.
    """
    sent, held = sync_probe.read(synced, "sent"), sync_probe.read(synced, "held")
    record("weight updates", {"updates": len(held), "tensors": len(held[0]["held"])})
    assert len(sent) == len(held) >= steps
    assert len({json.dumps(update) for update in sent}) > steps / 2, "the same weights again and again"
    for ours, theirs in zip(sent, held, strict=True):
        assert sync_probe.differences(ours, theirs["held"]) == []
        assert len(sync_probe.differences(ours, theirs["spoiled"])) == 1
        assert theirs["again"] == theirs["held"]


@pytest.mark.full("it trains and rolls out on an accelerator")
@pytest.mark.needs(gpus=1)
def test_main_ppo_learns(
    run: Run, profile: Mapping[str, Any], results: Path, tmp_path: Path, record: Any, engine: str
) -> None:
    metrics = results / "main-ppo-metrics.jsonl"
    synced = tmp_path / "synced"
    synced.mkdir()
    errors = results / "main-ppo.err"
    ended = run_child(
        verl_run.command(run.overrides), output=results / "main-ppo.out", errors=errors,
        deadline=profile["main_ppo_deadline"],
        environment={
            "VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1",
            "VERL_USE_EXTERNAL_MODULES": (trtllm_arguments if engine == "trtllm" else sync_probe).__name__,
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "sglang_sync", sync_probe.FOLDER: str(synced),
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        },
    )  # fmt: skip
    last = errors.read_text()[-4000:]
    assert ended.status == 0, f"status {ended.status} within {profile['main_ppo_deadline']} s\n{last}"
    assert ended.left == []

    steps = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    steps = [step for step in steps if "actor/pg_loss" in step]
    assert len(steps) == profile["main_ppo_steps"]
    rewards = [step["critic/score/mean"] for step in steps]
    gaps = [step["training/rollout_probs_diff_max"] for step in steps]
    threshold = max(best_constant(run.known), rewards[0]) + profile["margin"]
    record(
        "series",
        {
            "title": "verl.trainer.main_ppo on a+b=", "x_label": "step", "y_label": "mean reward",
            "threshold": threshold, "x": list(range(1, len(steps) + 1)), "y": rewards,
        },
    )  # fmt: skip
    record("gap", gaps)
    assert all(math.isfinite(step[name]) for step in steps for name in ("actor/pg_loss", "actor/grad_norm"))
    assert max(gaps) < profile["main_ppo_gap_bound"]
    assert mean(rewards[-3:]) > threshold

    if engine == "trtllm":
        # The probe knows neither its processes nor its names; that it has the trainer's weights the gap above says.
        record("weight updates", {"compared tensor by tensor": 0})
    else:
        check_updates(synced, profile["main_ppo_steps"], record)

    last_step = f"global_step_{profile['main_ppo_steps']}"
    (trained,) = run.output.glob(f"{last_step}/actor/huggingface/*.safetensors")
    before, after = load_file(run.model / "model.safetensors"), load_file(trained)
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name].to(after[name].dtype), after[name])]
    assert same == [], "these parameters did not change"

"""A run of verl's own entry point on the arithmetic task: a model, data and a reward made in code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from arithmetic import Problem
from grpo import Learner, warm_up

from tiny_models import make_qwen3

LONGEST = 3
RAY = {"include_dashboard": False, "object_store_memory": 256 * 2**20}
"""Parameters of ray.init that verl's configuration does not name, and so takes with a + only. The store is larger
than a Docker container's /dev/shm: ray then puts it into /tmp by itself."""

SGLANG_ARGUMENTS = {
    # verl takes FlashInfer for SGLang 0.5.12 and later, which has nvcc compile for a head of 32 numbers, if it can.
    "+actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend": "triton",
    "+actor_rollout_ref.rollout.engine_kwargs.sglang.sampling_backend": "pytorch",
}
"""What its server is given beyond what verl gives it: a dictionary that is meant to be filled."""


def make_model(folder: Path, known: Sequence[Problem], warm_up_steps: int) -> Path:
    """A dense Qwen3 that knows the form of an answer and no sum, with what verl asks of a Qwen3's tokenizer."""
    learner = Learner(make_qwen3(folder))
    warm_up(learner, known, warm_up_steps, seed=0)
    # The agent loop looks for ChatML's end of a turn in every Qwen3, and renders the prompt by the template.
    learner.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    learner.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    learner.tokenizer.save_pretrained(folder)
    learner.model.resize_token_embeddings(len(learner.tokenizer))
    learner.model.save_pretrained(folder)
    return folder


def make_data(path: Path, known: Sequence[Problem]) -> Path:
    """The problems in the columns that verl's data set and reward manager read, as parquet."""
    pandas.DataFrame(
        [
            {
                "data_source": "drydock/arithmetic",
                "prompt": [{"role": "user", "content": problem.prompt}],
                "reward_model": {"style": "rule", "ground_truth": problem.answer},
                "extra_info": {"index": index},
            }
            for index, problem in enumerate(known)
        ]
    ).to_parquet(path)
    return path


def overrides(
    model: Path, data: Path, output: Path, problems: int, profile: Mapping[str, Any], engine: str
) -> list[str]:
    """verl's configuration of the run: GRPO on one GPU, one batch of all problems a step."""
    samples, steps = profile["main_ppo_samples"], profile["main_ppo_steps"]
    values = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": data,
        "data.val_files": data,
        "data.train_batch_size": problems,
        "data.max_prompt_length": 8,
        "data.max_response_length": LONGEST,
        "data.dataloader_num_workers": 0,
        "data.seed": 1,
        "actor_rollout_ref.model.path": model,
        # flash-attn is not in the image, and packing without it would let sequences see each other.
        "actor_rollout_ref.model.use_remove_padding": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "actor_rollout_ref.actor.optim.lr": profile["learning_rate"],
        "actor_rollout_ref.actor.optim.weight_decay": 0.0,
        "actor_rollout_ref.actor.ppo_epochs": profile["epochs"],
        "actor_rollout_ref.actor.ppo_mini_batch_size": problems,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": problems * samples,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.checkpoint.save_contents": "[model,optimizer,extra,hf_model]",
        "actor_rollout_ref.rollout.name": engine,
        "actor_rollout_ref.rollout.n": samples,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.max_model_len": 32,
        "actor_rollout_ref.rollout.max_num_seqs": profile["main_ppo_max_num_seqs"],
        "actor_rollout_ref.rollout.max_num_batched_tokens": profile["main_ppo_max_num_batched_tokens"],
        "actor_rollout_ref.rollout.gpu_memory_utilization": 0.3,
        "actor_rollout_ref.rollout.enforce_eager": True,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": problems * samples,
        "actor_rollout_ref.rollout.agent.num_workers": 2,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": Path(__file__).with_name("arithmetic_reward.py"),
        # TransferQueue waits for a CPU of ray for each of its units, without a word and for ever.
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 2,
        "ray_kwargs.ray_init.num_cpus": 16,
        **{f"+ray_kwargs.ray_init.{name}": value for name, value in RAY.items()},
        "trainer.logger": "[console,file]",
        "trainer.project_name": "drydock",
        "trainer.experiment_name": "arithmetic",
        "trainer.n_gpus_per_node": 1,
        "trainer.total_epochs": steps,
        "trainer.total_training_steps": steps,
        "trainer.save_freq": steps,
        "trainer.val_before_train": False,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": output,
        **(SGLANG_ARGUMENTS if engine == "sglang" else {}),
    }
    return [f"{key}={value}" for key, value in values.items()]


def command(given: Sequence[str]) -> list[str]:
    """What runs it; hydra writes its own record of the run nowhere."""
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *quiet, *given]

"""What runs in the ranks of the checkpoint test: FSDP2 over gloo, with verl's own checkpoint manager."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3ForCausalLM
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.torch_functional import get_constant_schedule_with_warmup

WHOLE = ("model", "optimizer", "extra")
"""All that verl saves and loads; `extra` is the schedule and the state of the random generators."""


def train(
    model_folder: str,
    first: int,
    last: int,
    *,
    save_after: int = 0,
    checkpoint: str = "",
    load: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Train from step `first` up to `last`, and return all parameters, whole.

    What a step learns from is drawn from Python's, numpy's and torch's generators, the dropout included, so that
    only restored generators repeat it.

    Parameters:
        save_after: save the checkpoint after that step; 0: never.
        checkpoint: its folder.
        load: what of the checkpoint to load before the first step.
    """
    # Each rank its own, as with data of its own: its generators must come back to it and not to another.
    rank = torch.distributed.get_rank()
    random.seed(10 * rank + 1)
    np.random.seed(10 * rank + 2)
    torch.manual_seed(10 * rank + 3)
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attention_dropout=0.1)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=20)
    manager = FSDPCheckpointManager(
        model, optimizer, schedule,
        checkpoint_config={"load_contents": list(load), "save_contents": list(WHOLE)},
    )  # fmt: skip
    if load:
        manager.load_checkpoint(checkpoint)
    for step in range(first, last):
        length = random.randint(4, 8)
        tokens = torch.from_numpy(np.random.randint(3, model.config.vocab_size, (2, length)))
        noise = torch.rand(2, length)
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        (losses * noise[:, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == save_after:
            manager.save_checkpoint(checkpoint, global_step=step + 1)
    return {name: tensor.full_tensor().detach().numpy() for name, tensor in model.named_parameters()}

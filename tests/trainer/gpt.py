"""What runs in the ranks of the Megatron test: one forward and backward pass of a small GPT, sharded or whole."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from parallel import Layout

from drydock.tiers.device import device_here

WORDS, LENGTH, ROWS, EXPERTS = 64, 16, 4, 4


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One rank's share: the mean loss of its tokens, and gradients of that by the parameter's whole-model name.

    Each gradient comes with the dimension it is a shard of, or None where the rank has all of it.
    """

    loss: float
    gradients: dict[str, tuple[int | None, np.ndarray]]


def whole_name(name: str, experts: bool) -> str:
    """A parameter's name in the unsharded model: experts count on over the ranks of expert parallelism."""
    if not experts:
        return name
    first = parallel_state.get_expert_model_parallel_rank() * (
        EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    )
    return re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{first + int(found[1])}", name)


def run_pass(layout: Layout, experts: bool, misplaced: str = "") -> Pass:
    """Build the model with weights that depend on the whole model's names alone, and run it once.

    Parameters:
        experts: a mixture of experts instead of the dense MLP.
        misplaced: a fault: a parameter whose name has this gets the neighbour's shard, or expert.
    """
    device = device_here().at(torch.distributed.get_rank())
    device_here().module().set_device(device)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, expert_model_parallel_size=layout.ep,
        context_parallel_size=layout.cp, distributed_timeout_minutes=1,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, normalization="RMSNorm",
        add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
        perform_initialization=False, bias_dropout_fusion=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp, expert_model_parallel_size=layout.ep, context_parallel_size=layout.cp,
        num_moe_experts=EXPERTS if experts else None, moe_router_topk=2, moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none", moe_ffn_hidden_size=128 if experts else None,
        moe_router_dtype="fp32" if experts else None,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(num_experts=EXPERTS if experts else None, normalization="RMSNorm"),
        vocab_size=WORDS, max_sequence_length=LENGTH, position_embedding_type="rope",
    ).to(device)  # fmt: skip
    names = {parameter: whole_name(name, experts) for name, parameter in model.named_parameters()}
    shards = {}
    for parameter, name in names.items():
        shards[name] = fill(parameter, name, layout, shift=int(bool(misplaced) and misplaced in name))

    # The ranks of data parallelism, over which expert parallelism lies too, have their part of the rows each.
    data_rank = parallel_state.get_data_parallel_rank()
    data_ranks = parallel_state.get_data_parallel_world_size()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(WORDS, (ROWS, LENGTH + 1), generator=draw).chunk(data_ranks)[data_rank].to(device)
    positions = torch.arange(LENGTH, device=device).expand(len(tokens), -1)
    later = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)
    loss = model(tokens[:, :-1], positions, later, labels=tokens[:, 1:]).mean()
    loss.backward()
    gradients = {}
    for parameter, name in names.items():
        # An expert that no token was sent to has none.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[name] = (shards[name], gradient.cpu().numpy())
    return Pass(loss=loss.item(), gradients=gradients)


def fill(parameter: torch.nn.Parameter, name: str, layout: Layout, shift: int) -> int | None:
    """Give a parameter its part of weights drawn by its name; the dimension that it is a shard of, or None."""
    shard: int | None = None
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False) and layout.tp > 1:
        shard = parameter.partition_dim
        shape[shard] *= layout.tp
    if shift and "local_experts" in name:
        name = re.sub(
            r"local_experts\.(\d+)", lambda found: f"local_experts.{(int(found[1]) + 1) % EXPERTS}", name
        )
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(shape, generator=draw) * (0.1 if len(shape) > 1 else 0.05) + (len(shape) == 1)
    if shard is not None:
        rank = (parallel_state.get_tensor_model_parallel_rank() + shift) % layout.tp
        whole = whole.chunk(layout.tp, dim=shard)[rank]
    with torch.no_grad():
        parameter.copy_(whole)
    return shard


def assemble(passes: Iterable[Pass], layout: Layout) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of the whole model, from the ranks of a layout that is either TP or EP.

    With expert parallelism each rank's loss is of its own rows: the whole loss is their mean, and so is each
    gradient; an expert's, on one rank, is already the sum over all rows that were sent to it.
    """
    ranks = list(passes)
    gradients: dict[str, np.ndarray] = {}
    for name in {name for each in ranks for name in each.gradients}:
        found = [each.gradients[name] for each in ranks if name in each.gradients]
        shard = found[0][0]
        parts = [part for _, part in found]
        if shard is not None:
            gradients[name] = np.concatenate(parts, axis=shard)
        elif layout.ep > 1:
            gradients[name] = np.sum(parts, axis=0) / layout.ep
        else:
            gradients[name] = parts[0]
            assert all(np.allclose(part, parts[0], rtol=1e-5, atol=1e-7) for part in parts), name
    return float(np.mean([each.loss for each in ranks])), gradients

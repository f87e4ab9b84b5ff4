"""What runs in the ranks of the context parallelism test: the shift by one that multi-token prediction makes."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import roll_tensor

from drydock.tiers.device import device_here


def chunks_of(rank: int, ranks: int) -> list[int]:
    """Which of a sequence's 2 x ranks chunks a rank has: one of the beginning and its mirror of the end, so that
    causal attention costs every rank the same (megatron-core's get_batch_on_this_cp_rank)."""
    return [rank, 2 * ranks - 1 - rank]


def roll_parts(tokens: np.ndarray, times: int, straight: bool = False) -> np.ndarray:
    """This rank's part of the tokens (rows, length), shifted to the left that many times.

    Parameters:
        straight: a fault: the rank has the sequence's next part in one piece, as without the mirror.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = device_here().at(rank)
    device_here().module().set_device(device)
    parallel_state.initialize_model_parallel(context_parallel_size=ranks, distributed_timeout_minutes=1)
    split = np.split(tokens, 2 * ranks, axis=-1)
    own = [2 * rank, 2 * rank + 1] if straight else chunks_of(rank, ranks)
    part = torch.from_numpy(np.concatenate([split[each] for each in own], axis=-1)).to(device)
    group = parallel_state.get_context_parallel_group()
    for _ in range(times):
        part, _ = roll_tensor(part, shifts=-1, dims=-1, cp_group=group)
    device_here().module().synchronize()
    return part.cpu().numpy()


def join(parts: list[np.ndarray]) -> np.ndarray:
    """The whole tokens of all ranks' parts."""
    ranks = len(parts)
    whole: list[np.ndarray] = [np.empty(0)] * (2 * ranks)
    for rank, part in enumerate(parts):
        for chunk, piece in zip(chunks_of(rank, ranks), np.split(part, 2, axis=-1), strict=True):
            whole[chunk] = piece
    return np.concatenate(whole, axis=-1)

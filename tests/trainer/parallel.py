"""What runs in the ranks of the megatron-core tests: groups of a layout, and what a reduction over them gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

GROUPS = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "dp-cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp-pp": parallel_state.get_model_parallel_group,
    "tp-cp": parallel_state.get_tensor_and_context_parallel_group,
    "ep": parallel_state.get_expert_model_parallel_group,
    "expert tp": parallel_state.get_expert_tensor_parallel_group,
    "expert dp": parallel_state.get_expert_data_parallel_group,
    "expert tp-ep": parallel_state.get_expert_tensor_and_model_parallel_group,
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions; data parallelism takes what is left of the world.

    Parameters:
        expert_tp: tensor parallelism inside an expert.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in vars(self).items() if size > 1) or "dp only"


Seen = dict[str, tuple[list[int], int]]
"""Group -> its ranks, and the sum of 2**rank that a reduction over it gave."""


def form_groups(layouts: list[Layout], order: str) -> list[Seen]:
    """For each layout, the groups that this rank is in, made by megatron-core one layout after the other."""
    seen = []
    for layout in layouts:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp, expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp, order=order, distributed_timeout_minutes=1,
        )  # fmt: skip
        found: Seen = {}
        for name, group in GROUPS.items():
            total = torch.tensor(2 ** torch.distributed.get_rank())
            torch.distributed.all_reduce(total, group=group())
            found[name] = (torch.distributed.get_process_group_ranks(group()), int(total))
        seen.append(found)
        # Each of gloo's groups has threads of its own: those of twenty layouts were hundreds, and took 7 to 52 s.
        groups = {group() for group in GROUPS.values()}
        parallel_state.destroy_model_parallel()
        for group in sorted(groups, key=lambda group: group.group_name):
            torch.distributed.destroy_process_group(group)
    return seen

"""The choice of a replica: a wrong one cost 0.21 of GSM8K in sglang#32962, without an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import caught_by
from replica_choice import check_choice, choose_replicas

EXPERTS, SLOTS, TOKENS, PER_TOKEN = 16, 24, 4097, 2


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """phy2log of one layer with its log2phy and logcnt, and the experts that the tokens chose."""
    generator = torch.Generator().manual_seed(9)
    phy2log = torch.cat([torch.arange(EXPERTS), torch.zeros(4, dtype=torch.int64), torch.arange(1, 5)])
    phy2log = phy2log[torch.randperm(SLOTS, generator=generator)]
    logcnt = torch.bincount(phy2log)
    log2phy = torch.full((EXPERTS, 1024), -1)
    for expert in range(EXPERTS):
        log2phy[expert, : logcnt[expert]] = (phy2log == expert).nonzero().flatten()
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(PER_TOKEN).indices
    return phy2log, log2phy, logcnt, chosen


def counted(physical: torch.Tensor) -> torch.Tensor:
    return torch.bincount(physical.flatten(), minlength=SLOTS)


def test_the_choice_keeps_to_the_expert_and_uses_every_replica() -> None:
    phy2log, log2phy, logcnt, chosen = batch()
    physical = choose_replicas(chosen, log2phy, logcnt)
    check_choice(chosen, physical, phy2log, counted(physical))


Choice = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FAULTS: dict[str, tuple[Choice, str]] = {
    "the neighbour's slot": (
        lambda chosen, log2phy, logcnt: (choose_replicas(chosen, log2phy, logcnt) + 1) % SLOTS,
        "a slot holds the expert that was chosen",
    ),
    "logical ids taken for physical": (
        lambda chosen, log2phy, logcnt: chosen,  # noqa: ARG005
        "a slot holds the expert that was chosen",
    ),
    "always the first replica": (
        lambda chosen, log2phy, logcnt: log2phy[chosen, 0],  # noqa: ARG005
        "replicas share alike",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_choice_is_caught(fault: str) -> None:
    phy2log, log2phy, logcnt, chosen = batch()
    plant, expected = FAULTS[fault]
    physical = plant(chosen, log2phy, logcnt)
    assert caught_by(lambda: check_choice(chosen, physical, phy2log, counted(physical))) == expected


def test_a_load_that_is_not_counted_is_caught() -> None:
    phy2log, log2phy, logcnt, chosen = batch()
    physical = choose_replicas(chosen, log2phy, logcnt)
    short = counted(physical) // 2
    assert caught_by(lambda: check_choice(chosen, physical, phy2log, short)) == "the load is counted"


@pytest.mark.engine("vllm")
@pytest.mark.accelerated(
    "the choice is a kernel that needs a GPU; on a CPU vLLM leaves the experts as they are"
)
@pytest.mark.cuda("vLLM has this kernel for CUDA and ROCm only")
@pytest.mark.needs(gpus=1)
def test_the_kernel_chooses_and_counts_as_it_says() -> None:
    from vllm.model_executor.layers.fused_moe.router.base_router import eplb_map_to_physical_and_record

    phy2log, log2phy, logcnt, chosen = (each.to("cuda") for each in batch())
    # As in a batch that is padded: no expert is chosen there, and none is counted.
    padded = chosen.clone()
    padded[TOKENS // 2 :: 3] = -1
    for ids in (chosen, padded):
        expected = torch.where(ids < 0, ids, choose_replicas(ids.clamp(min=0), log2phy, logcnt))
        for recorded in (True, False):
            # What other steps counted stays.
            before = torch.arange(SLOTS, dtype=torch.int32, device="cuda")
            load = before.clone()
            physical = eplb_map_to_physical_and_record(
                topk_ids=ids.to(torch.int32),
                expert_load_view=load,
                logical_to_physical_map=log2phy,
                logical_replica_count=logcnt,
                record_enabled=torch.tensor(recorded, device="cuda"),
            ).long()
            assert torch.equal(physical, expected)
            real = ids[:, 0] >= 0
            if recorded:
                check_choice(ids[real], physical[real], phy2log, load - before)
            else:
                assert torch.equal(load, before), "counted in a step that is not recorded"

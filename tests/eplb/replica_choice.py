"""Which replica of an expert a token goes to in vLLM 0.24, and what any such choice must fulfil."""

from __future__ import annotations

import torch
from checks import require

KNUTH = 2654435769


def choose_replicas(chosen: torch.Tensor, log2phy: torch.Tensor, logcnt: torch.Tensor) -> torch.Tensor:
    """[tokens, k] physical slots for [tokens, k] logical experts: a hash of the token's place in the batch.

    vLLM does this in a kernel that needs a GPU; this is its arithmetic, which test_replica_choice compares.
    """
    token = torch.arange(len(chosen), device=chosen.device)[:, None]
    return log2phy[chosen, ((token * KNUTH) & 0xFFFFFFFF) % logcnt[chosen]]


def check_choice(
    chosen: torch.Tensor, physical: torch.Tensor, phy2log: torch.Tensor, load: torch.Tensor
) -> None:
    """Every token goes to a slot that holds its expert, all replicas are used alike, and the count is right."""
    require(
        torch.equal(phy2log[physical], chosen.to(phy2log.dtype)),
        "a slot holds the expert that was chosen",
        f"{int((phy2log[physical] != chosen).sum())} of {chosen.numel()} went to another expert's slot",
    )
    counted = torch.bincount(physical.flatten(), minlength=len(phy2log))
    require(torch.equal(load.to(counted.dtype), counted), "the load is counted", f"{load} is not {counted}")
    for expert in phy2log.unique():
        slots = counted[phy2log == expert].double()
        require(
            bool((slots >= 0.8 * slots.mean()).all()), "replicas share alike", f"expert {expert}: {slots}"
        )

"""The ranks of the test of SGLang's exchange: its own EPLB around experts that are a few numbers each, on a CPU."""

# contract: sglang
from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

RANKS, LAYERS, EXPERTS, INTERVAL = 2, 2, 16, 3


def weights(layer: int, experts: list[int]) -> list[torch.Tensor]:
    """Two tensors, as an expert has: each number is the expert's own."""
    values = torch.tensor([100.0 * layer + expert for expert in experts]).half()
    return [values[:, None, None].expand(-1, 3, 2).clone(), values[:, None].expand(-1, 4).clone()]


def spread(chosen: torch.Tensor, phy2log: torch.Tensor) -> torch.Tensor:
    """Each token's experts' slots; replicas take turns."""
    slots = [(phy2log == expert).nonzero().flatten() for expert in range(EXPERTS)]
    return torch.tensor(
        [
            [int(slots[each][token % len(slots[each])]) for each in row]
            for token, row in enumerate(chosen.tolist())
        ]
    )


def serve(rank: int, store: str, folder: str, redundant: int, fault: str) -> None:
    """Twelve steps of skewed routing, of which each third is followed by a rearrangement; then the rank's report.

    Parameters:
        fault: a variable of `sglang_eplb.probe` that plants one; empty for none.
    """
    os.environ["SGLANG_EXPERT_LOCATION_UPDATER_CANARY"] = "1"
    os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = folder
    if fault:
        os.environ[fault] = "1"
    import sglang_eplb.probe  # noqa: F401, it watches what follows
    from sglang.srt.eplb import eplb_manager, expert_distribution, expert_location, expert_location_updater

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    arguments = SimpleNamespace(
        device="cpu", ep_size=RANKS, nnodes=1, moe_a2a_backend="none", ep_dispatch_algorithm="dynamic",
        ep_num_redundant_experts=redundant, eplb_algorithm="auto", eplb_rebalance_num_iterations=INTERVAL,
        eplb_rebalance_layers_per_chunk=None, eplb_min_rebalancing_utilization_threshold=1.0,
        expert_distribution_recorder_mode="stat", expert_distribution_recorder_buffer_size=INTERVAL,
        enable_expert_distribution_metrics=False,
    )  # fmt: skip
    # What it asks of a server that is not there, and of a device.
    expert_location_updater.get_global_server_args = lambda: arguments
    expert_distribution.get_device = lambda: "cpu"
    torch.get_device_module = lambda *_: SimpleNamespace(  # type: ignore[assignment]
        empty_cache=lambda: None, synchronize=lambda: None, is_current_stream_capturing=lambda: False
    )
    size = expert_location.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)
    expert_location.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda _: size)

    maps = expert_location.ExpertLocationMetadata.init_trivial(arguments, None, rank)
    expert_location.set_global_expert_location_metadata(maps)
    recorder = expert_distribution.ExpertDistributionRecorder.init_new(arguments, maps, rank=rank)
    expert_distribution.set_global_expert_distribution_recorder(recorder)
    slots = maps.num_local_physical_experts
    own = maps.physical_to_logical_map_cpu[:, rank * slots : (rank + 1) * slots].tolist()
    model = SimpleNamespace(
        routed_experts_weights_of_layer={layer: weights(layer, held) for layer, held in enumerate(own)}
    )
    updater = expert_location_updater.ExpertLocationUpdater()

    def update(new: Any, update_layer_ids: list[int]) -> None:
        held = model.routed_experts_weights_of_layer
        updater.update(held, new, update_layer_ids=update_layer_ids, nnodes=1, rank=rank)

    runner = SimpleNamespace(
        server_args=arguments, model_config=None, model=model, update_expert_location=update
    )
    manager = eplb_manager.EPLBManager(runner)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for step in range(4 * INTERVAL):
            with recorder.with_forward_pass(step, None):
                for layer in range(LAYERS):
                    # Two in three go to four experts that lie on one rank and have no replica at first.
                    low, high = (4, 8) if step % 3 else (0, EXPERTS)
                    chosen = torch.randint(low, high, (64, 2), generator=draw)
                    places = spread(chosen, maps.physical_to_logical_map_cpu[layer])
                    with recorder.with_current_layer(layer):
                        recorder.on_select_experts(topk_ids=places)
            manager.on_forward_pass_end()
    recorder.dump_record()
    torch.distributed.barrier()

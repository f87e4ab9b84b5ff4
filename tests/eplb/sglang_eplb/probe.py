"""Follows SGLang's EPLB in its schedulers: what its slots were asked to do under each map, and every rearrangement.

`/dump_expert_distribution_record` reaches every scheduler; each then writes `rank-<n>.json` into the folder that SGLang
has for it, in place of SGLang's own record, which would begin the window anew.
"""

# contract: sglang
from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.eplb import eplb_manager, expert_distribution, expert_location_updater
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from worker_extension import digests

FOLDER = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
FAULT = "DRYDOCK_SGLANG_MOVES_NOTHING"
"""Variable: a rearrangement commits its maps, and no expert's weights move."""


class Watch:
    """One rank's EPLB. A rearrangement is completed when its maps are in place, of the last layer where it has several
    steps."""

    def __init__(self, manager: Any) -> None:
        self.runner = manager._model_runner
        self.interval = manager._rebalance_num_iterations
        self.completed = self.steps = self.since = 0
        self.lowest_steps_left = self.interval
        self.updates = 0
        self.moves: list[list[float]] = []
        slots = get_global_expert_location_metadata().physical_to_logical_map
        self.load = torch.zeros_like(slots, dtype=torch.int64)
        self.history: list[list[tuple[list[int], torch.Tensor]]] = [[] for _ in self.load]

    def count(self, counts: torch.Tensor) -> None:
        self.load += counts.to(self.load)

    def step(self, run: Callable[[], None]) -> None:
        """What SGLang does when a forward pass ends: in some, a rearrangement."""
        self.steps += 1
        self.since += 1
        began, updates = time.monotonic(), self.updates
        run()
        if self.updates != updates:
            self.moves.append([began, time.monotonic()])
        self.lowest_steps_left = min(self.lowest_steps_left, self.interval - self.since)

    def close_periods(self, layers: list[int]) -> None:
        # Clones stay on the device: reading them here would stall the step that is watched.
        held = get_global_expert_location_metadata().physical_to_logical_map_cpu
        for layer in layers:
            self.history[layer].append((held[layer].tolist(), self.load[layer].clone()))
            self.load[layer] = 0

    def rearranged(self, layers: list[int]) -> None:
        self.updates += 1
        if max(layers) == len(self.load) - 1:
            self.completed += 1
            self.since = 0

    def report(self, rank: int) -> dict[str, Any]:
        """As vLLM's, see `worker_extension.Watch.report`."""
        maps = get_global_expert_location_metadata()
        phy2log = maps.physical_to_logical_map.tolist()
        weights = self.runner.model.routed_experts_weights_of_layer
        return {
            "rank": rank,
            "steps": self.steps,
            "steps_left": self.interval - self.since,
            "lowest_steps_left": self.lowest_steps_left,
            "completed": self.completed,
            "moves": self.moves,
            "phy2log": phy2log,
            "log2phy": maps.logical_to_all_physical_map.tolist(),
            "logcnt": maps.logical_to_all_physical_map_num_valid.tolist(),
            "digests": [digests(weights[layer]) for layer in range(len(phy2log))],
            "periods": [
                [{"phy2log": held, "load": load.tolist()} for held, load in [*past, (now, left)]]
                for past, now, left in zip(self.history, phy2log, self.load, strict=True)
            ],
        }


WATCHES: list[Watch] = []
"""This process's, once it has an EPLB."""

_Manager, _Updater = eplb_manager.EPLBManager, expert_location_updater.ExpertLocationUpdater
_Recorder, _Accumulator = (
    expert_distribution._ExpertDistributionRecorderReal,
    expert_distribution._StatAccumulator,
)
_begin, _step, _update = _Manager.__init__, _Manager.on_forward_pass_end, _Updater.update
_append, _dump = _Accumulator.append, _Recorder.dump_record


def _on_begin(self: Any, *arguments: Any, **options: Any) -> None:
    _begin(self, *arguments, **options)
    WATCHES.append(Watch(self))


def _on_step(self: Any) -> None:
    (watch,) = WATCHES
    watch.step(lambda: _step(self))


def _on_update(self: Any, *arguments: Any, update_layer_ids: list[int], **options: Any) -> Any:
    (watch,) = WATCHES
    watch.close_periods(update_layer_ids)
    missing = _update(self, *arguments, update_layer_ids=update_layer_ids, **options)
    watch.rearranged(update_layer_ids)
    return missing


def _on_append(
    self: Any, forward_pass_id: int, gatherer_key: str, single_pass_data: dict[str, Any], outputs: Any
) -> None:
    for watch in WATCHES:
        watch.count(single_pass_data["global_physical_count"])
    _append(self, forward_pass_id, gatherer_key, single_pass_data, outputs)


def _on_dump(self: Any, output_mode: str = "file") -> Any:
    if output_mode != "file":
        return _dump(self, output_mode=output_mode)
    rank = torch.distributed.get_rank()
    file = Path(os.environ[FOLDER]) / f"rank-{rank}.json"
    file.with_suffix(".part").write_text(json.dumps([watch.report(rank) for watch in WATCHES]))
    file.with_suffix(".part").rename(file)
    return None


_Manager.__init__, _Manager.on_forward_pass_end, _Updater.update = _on_begin, _on_step, _on_update
_Accumulator.append, _Recorder.dump_record = _on_append, _on_dump
if os.environ.get(FAULT):
    expert_location_updater.update_expert_weights_single_layer = lambda **_: None

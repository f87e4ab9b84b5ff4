"""Methods that vLLM's workers get with `--worker-extension-cls worker_extension.EplbProbe`, over /collective_rpc.

With data parallelism the API returns the first engine's answer only, so every worker writes what it has to say
into a folder, a file per rank.
"""

# contract: vllm
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Watch:
    """Follows one EplbState: what its layers were asked to do under each map, and every completed rearrangement.

    A rearrangement is completed when its maps are committed, of the last layer where they go one by one. The
    one that profiles memory at start-up commits nothing.
    """

    def __init__(self, state: Any) -> None:
        from vllm.distributed.eplb import eplb_state

        self.state = state
        self.completed = 0
        self.steps = 0
        self.lowest_steps_left = state.expert_rearrangement_step_interval
        self.moves: list[list[float]] = []
        """When each rearrangement began and ended, by this machine's monotonic clock."""
        (self.of_model,) = state.model_states.values()
        self._load = torch.zeros_like(self.of_model.expert_load_pass, dtype=torch.int64)
        self._history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._load]
        self._module = eplb_state
        self._commit, self._move = eplb_state._commit_eplb_maps, eplb_state._move_to_workspace
        self._step, self._rearrange = state.step, state.rearrange
        eplb_state._commit_eplb_maps, eplb_state._move_to_workspace = self._on_commit, self._on_move
        state.step, state.rearrange = self._on_step, self._on_rearrange

    def close(self) -> None:
        self._module._commit_eplb_maps, self._module._move_to_workspace = self._commit, self._move
        del self.state.step, self.state.rearrange

    def _on_step(self, is_dummy: bool = False, is_profile: bool = False, **options: Any) -> None:
        if not is_dummy and not is_profile:
            self._load += self.of_model.expert_load_pass
        self._step(is_dummy, is_profile, **options)
        self.steps += 1
        self.lowest_steps_left = min(self.lowest_steps_left, self.steps_left)

    @property
    def steps_left(self) -> int:
        left: int = self.state.expert_rearrangement_step_interval - self.state.expert_rearrangement_step
        return left

    def _on_rearrange(self, is_profile: bool = False, *arguments: Any, **options: Any) -> Any:
        if not is_profile:
            self.moves.append([time.monotonic()] * 2)
        answer = self._rearrange(is_profile, *arguments, **options)
        self._still_moves()
        return answer

    def _still_moves(self) -> None:
        if self.moves:
            self.moves[-1][1] = time.monotonic()

    def _on_commit(self, model_state: Any, *arguments: Any, **options: Any) -> None:
        for layer in range(len(self._load)):
            self._close_period(layer)
        self._commit(model_state, *arguments, **options)
        self.completed += 1

    def _on_move(self, model_state: Any, *arguments: Any, **options: Any) -> None:
        layer = model_state.pending_result.layer_idx
        self._close_period(layer)
        self._move(model_state, *arguments, **options)
        self._still_moves()
        self.completed += layer == len(self._load) - 1

    def _close_period(self, layer: int) -> None:
        # Clones stay on the device: reading them here would stall the step that is watched.
        self._history[layer].append(
            (self.of_model.physical_to_logical_map[layer].clone(), self._load[layer].clone())
        )
        self._load[layer] = 0

    def report(self, rank: int) -> dict[str, Any]:
        """What this rank knows; lists by layer, and within `periods` one entry for each map a layer has had."""
        model_state, thread = self.of_model, self.state.async_worker
        current = zip(model_state.physical_to_logical_map, self._load, strict=True)
        # The rows have room for any number of replicas: as far as anything stands there, and one more.
        used = int((model_state.logical_to_physical_map >= 0).any(0).any(0).nonzero().max()) + 2
        return {
            "rank": rank,
            "asynchronous": self.state.is_async,
            "thread_alive": None if thread is None else thread.is_alive(),
            "steps": self.steps,
            "steps_left": self.steps_left,
            "lowest_steps_left": self.lowest_steps_left,
            "completed": self.completed,
            "moves": self.moves,
            "phy2log": model_state.physical_to_logical_map.tolist(),
            "log2phy": model_state.logical_to_physical_map[..., :used].tolist(),
            "logcnt": model_state.logical_replica_count.tolist(),
            "digests": [digests(layer) for layer in model_state.model.expert_weights],
            "periods": [
                [{"phy2log": held.tolist(), "load": load.tolist()} for held, load in [*past, now]]
                for past, now in zip(self._history, current, strict=True)
            ],
        }


def _rank() -> int:
    from vllm.distributed.parallel_state import get_ep_group

    rank: int = get_ep_group().rank_in_group
    return rank


def digests(weights: Sequence[torch.Tensor]) -> list[str]:
    """A digest of each local slot's weights, of all the tensors that a layer's experts have."""
    found = []
    for slot in range(len(weights[0])):
        digest = hashlib.sha256()
        for tensor in weights:
            digest.update(tensor[slot].flatten().view(torch.uint8).cpu().numpy().tobytes())
        found.append(digest.hexdigest()[:16])
    return found


class EplbProbe:
    """Mixed into vLLM's worker class, whose `model_runner` it reads."""

    model_runner: Any

    def eplb_watch(self) -> None:
        """From now on follow the rearrangements."""
        self._eplb_watch = Watch(self.model_runner.eplb_state)

    def eplb_report(self, folder: str) -> None:
        """Write `rank-<n>.json` into the folder; null where there is no EPLB."""
        rank = _rank()
        watched = None if self.model_runner.eplb_state is None else self._eplb_watch.report(rank)
        file = Path(folder) / f"rank-{rank}.json"
        file.with_suffix(".part").write_text(json.dumps(watched))
        file.with_suffix(".part").rename(file)

    @torch.inference_mode()
    def eplb_swap_experts(self, layer: int, expert: int, others: Sequence[int]) -> None:
        """Plant a fault: each local replica of an expert and the first of `others` here exchange weights."""
        (of_model,) = self.model_runner.eplb_state.model_states.values()
        weights = of_model.model.expert_weights[layer]
        slots = len(weights[0])
        first = _rank() * slots
        held = of_model.physical_to_logical_map[layer, first : first + slots].tolist()
        other = next(held.index(each) for each in others if each in held and each != expert)
        replicas = [slot for slot, each in enumerate(held) if each == expert]
        for tensor in weights if replicas else ():
            kept = tensor[other].clone()
            tensor[other] = tensor[replicas[0]]
            tensor[replicas] = kept

    def eplb_end_async(self) -> None:
        """Plant a fault: at the next rearrangement the asynchronous thread dies, as in vllm#57883."""
        self.model_runner.eplb_state.policy = None

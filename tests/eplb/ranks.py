"""What runs in each process of a fleet: vLLM's own EPLB, over gloo, around a MoE whose experts the ranks share.

Real here: vLLM's EplbState with its step counter, load window and both modes, its policy, its weight exchange
and communicators, its maps and their commit; the model with its router. Not vLLM's: the choice of a replica
and the count of tokens (a CUDA kernel in 0.24; the same arithmetic here) and the experts' matrix products.
Streams and events of the device do nothing: on a CPU a copy is done when the call returns.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from replica_choice import choose_replicas
from transformers import Qwen3MoeForCausalLM
from vllm.config.parallel import EPLBConfig
from vllm.distributed import parallel_state
from vllm.distributed.eplb import eplb_state, rebalance_execute
from vllm.distributed.eplb.eplb_communicator import EplbCommunicator, create_eplb_communicator
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState
from vllm.distributed.eplb.eplb_utils import CpuGpuEvent
from vllm.model_executor.models.interfaces import MixtureOfExperts
from worker_extension import EplbProbe, digests


class _Done:
    """Stands for a stream or an event of a device: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> float:
        return 0.0

    record = wait = synchronize = elapsed_time = _nothing


def join(rank: int, ranks: int, rendezvous: str) -> None:
    """Make this process a rank of vLLM's expert-parallel group and of its EPLB group."""
    torch.set_num_threads(1)
    device: Any = torch.cuda
    device.Event = device.Stream = device.current_stream = _Done
    device.stream = lambda _: contextlib.nullcontext()
    torch.accelerator.set_device_index = lambda _: None
    parallel_state.init_distributed_environment(ranks, rank, f"file://{rendezvous}", 0, "gloo")
    for group in ("_EP", "_EPLB"):
        joined = parallel_state.init_model_parallel_group(
            [list(range(ranks))], 0, "gloo", group_name=group, use_device_communicator=False
        )
        setattr(parallel_state, group, joined)


def joined() -> int:
    """The rank, as an answer to whether it is there."""
    return _rank()


def _rank() -> int:
    rank: int = parallel_state.get_ep_group().rank_in_group
    return rank


def _is_last() -> bool:
    return _rank() == parallel_state.get_ep_group().world_size - 1


def _local(slots: int) -> slice:
    own = slots // parallel_state.get_ep_group().world_size
    return slice(_rank() * own, (_rank() + 1) * own)


# Faults in the exchange, each planted around the call that moves `weights`, [layers][tensors of a layer].

Weights = list[list[torch.Tensor]]


@contextlib.contextmanager
def _swaps_two_experts(weights: Weights) -> Iterator[None]:
    yield
    if _rank() == 0:
        for tensor in weights[0]:
            tensor[[0, -1]] = tensor[[-1, 0]]


@contextlib.contextmanager
def _leaves_a_slot_behind(weights: Weights) -> Iterator[None]:  # noqa: ARG001
    """The last rank does not copy the first slot that changes."""
    real = rebalance_execute.move_from_buffer

    def move(*, transfer_metadata: Any, **others: Any) -> None:
        changed = np.flatnonzero(~transfer_metadata.is_unchanged)
        if _is_last() and len(changed):
            transfer_metadata.is_unchanged[changed[0]] = True
        real(transfer_metadata=transfer_metadata, **others)

    with mock.patch.object(rebalance_execute, "move_from_buffer", move):
        yield


@contextlib.contextmanager
def _moves_nothing(weights: Weights) -> Iterator[None]:  # noqa: ARG001
    with mock.patch.object(rebalance_execute, "move_from_buffer"):
        yield


@contextlib.contextmanager
def _sends_a_row_shifted(weights: Weights) -> Iterator[None]:  # noqa: ARG001
    from vllm.distributed.eplb import eplb_communicator

    with contextlib.ExitStack() as planted:
        for name in ("TorchDistNcclEplbCommunicator", "TorchDistGlooStagedEplbCommunicator"):
            kind = getattr(eplb_communicator, name)
            planted.enter_context(mock.patch.object(kind, "add_send", _shifting(kind.add_send)))
        yield


def _shifting(real: Callable[..., None]) -> Callable[..., None]:
    def add_send(self: EplbCommunicator, tensors: list[torch.Tensor], *others: Any, **more: Any) -> None:
        real(self, [tensor.roll(1, 0) for tensor in tensors], *others, **more)

    return add_send


EXCHANGE_FAULTS: dict[str, Callable[[Weights], contextlib.AbstractContextManager[None]]] = {
    "swaps two experts": _swaps_two_experts,
    "leaves a slot behind": _leaves_a_slot_behind,
    "moves nothing": _moves_nothing,
    "sends a row shifted": _sends_a_row_shifted,
}


def exchange(
    old: np.ndarray, new: np.ndarray, experts: int, communicator: str, fault: str | None = None
) -> dict[str, Any]:
    """Move random weights from one map to another, [layers, slots] each.

    Returns:
        digests, by layer, of every expert's weights and of what this rank's slots then hold.
    """
    layers, slots = old.shape
    generator = torch.Generator().manual_seed(layers * slots)
    every = [
        [torch.randn(experts, *shape, generator=generator).to(torch.bfloat16) for shape in ((8, 6), (6, 4))]
        for _ in range(layers)
    ]
    mine = _local(slots)
    weights = [[tensor[old[layer, mine]].clone() for tensor in every[layer]] for layer in range(layers)]
    buffer = [torch.empty_like(tensor) for tensor in weights[0]]
    group = parallel_state.get_eplb_group()
    with EXCHANGE_FAULTS[fault](weights) if fault else contextlib.nullcontext():
        rebalance_execute.rearrange_expert_weights_inplace(
            torch.from_numpy(old), torch.from_numpy(new), weights, buffer, group.device_group,
            create_eplb_communicator(group, communicator, weights, buffer),
        )  # fmt: skip
    return {"experts": [digests(layer) for layer in every], "held": [digests(layer) for layer in weights]}


class Layer:
    """The experts of one MoE layer that live on this rank; takes the place of the model's own experts."""

    def __init__(self, experts: Any, slots: int, held: list[int], wrong_replica: bool) -> None:
        mine = held[_local(slots)]
        self.weights = [experts.gate_up_proj.detach()[mine].clone(), experts.down_proj.detach()[mine].clone()]
        self.first = _local(slots).start
        self.slots = slots
        self.activation = experts.act_fn
        self.eplb_state = EplbLayerState()
        self.wrong_replica = wrong_replica
        self.experts = len(set(held))
        self.chosen: list[int] = []
        experts.forward = self.forward

    def get_expert_weights(self) -> list[torch.Tensor]:
        return self.weights

    def set_eplb_state(self, moe_layer_idx: int, **views: torch.Tensor) -> None:
        self.eplb_state.set_layer_state(moe_layer_idx, **views)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        state: Any = self.eplb_state
        physical = choose_replicas(chosen, state.logical_to_physical_map, state.logical_replica_count)
        if self.wrong_replica:
            first = state.logical_to_physical_map[chosen, 0]
            physical = torch.where(physical == first, physical, (physical + 1) % self.slots)
        self.chosen = torch.bincount(chosen.flatten(), minlength=self.experts).tolist()
        if state.should_record_tensor:
            # Of the tokens that would have come to this rank, as with data parallelism.
            own = physical[_rank() :: parallel_state.get_ep_group().world_size]
            state.expert_load_view += torch.bincount(own[own >= 0], minlength=self.slots)
        output = torch.zeros_like(hidden)
        for slot, (gate_up, down) in enumerate(zip(*self.weights, strict=True)):
            tokens, place = torch.where(physical == self.first + slot)
            gate, up = (hidden[tokens] @ gate_up.T).chunk(2, -1)
            result = (self.activation(gate) * up) @ down.T
            output.index_add_(0, tokens, result * shares[tokens, place, None])
        torch.distributed.all_reduce(output, group=parallel_state.get_ep_group().device_group)
        return output


class SharedMoe(MixtureOfExperts):
    """A trained MoE whose experts are spread over the ranks, with what vLLM asks of such a model."""

    def __init__(self, folder: str, redundant: int, wrong_replica: bool = False) -> None:
        self.model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
        experts = self.model.config.num_experts
        slots = experts + redundant
        held = list(EplbState.build_initial_global_physical_to_logical_map(experts, redundant))
        self.moe_layers: Any = [
            Layer(layer.mlp.experts, slots, held, wrong_replica) for layer in self.model.model.layers
        ]
        self.expert_weights = []
        self.num_moe_layers = len(self.moe_layers)
        self.num_expert_groups = 1
        self.num_logical_experts = self.num_routed_experts = experts
        self.num_physical_experts = slots
        self.num_local_physical_experts = len(self.moe_layers[0].weights[0])
        self.num_shared_experts = 0
        self.num_redundant_experts = redundant

    def first_tokens(self, ids: torch.Tensor, ends: torch.Tensor) -> list[int]:
        """The greedy token after each row's last position."""
        with torch.inference_mode():
            logits = self.model(input_ids=ids).logits
        tokens: list[int] = logits[torch.arange(len(ids)), ends].argmax(-1).tolist()
        return tokens


class Worker(EplbProbe):
    """As much of vLLM's worker as the probe sees."""

    def __init__(self, moe: SharedMoe, **options: Any) -> None:
        config: Any = SimpleNamespace(
            eplb_config=EPLBConfig(num_redundant_experts=moe.num_redundant_experts, **options)
        )
        self.state = EplbState(config, torch.device("cpu"))
        self.state.add_model(moe, SimpleNamespace(model="trained", compute_hash=lambda: "trained"))
        self.state.cuda_device_index = 0
        self.model_runner = SimpleNamespace(eplb_state=self.state)
        self.eplb_watch()

    @property
    def is_moving(self) -> bool:
        """Whether an asynchronous rearrangement is under way; all ranks agree after each step."""
        return any(of_model.rebalanced for of_model in self.state.model_states.values())


def commit_one_layer(
    folder: str, redundant: int, layer: int, new: np.ndarray, fault: str | None
) -> list[Any]:
    """Move one layer as the asynchronous mode does, weights and maps; reports of this rank before and after."""
    moe = SharedMoe(folder, redundant)
    worker = Worker(moe, window_size=4, step_interval=8, use_async=True, communicator="torch_gloo")
    (of_model,) = worker.state.model_states.values()
    before = worker._eplb_watch.report(_rank())
    group = parallel_state.get_eplb_group().device_group
    planned = torch.from_numpy(new)
    of_model.rebalanced = True
    of_model.pending_result = rebalance_execute.AsyncEplbLayerResult(
        layer_idx=layer,
        new_physical_to_logical_map=planned,
        transfer_metadata=rebalance_execute.transfer_layer(
            of_model.physical_to_logical_map[layer], planned, moe.expert_weights[layer],
            of_model.expert_buffer, group, of_model.communicator, layer_idx=layer,
        ),
        consumed_event=CpuGpuEvent(),
    )  # fmt: skip
    eplb_state._move_to_workspace(of_model, _rank())
    neighbour = (layer + 1) % moe.num_moe_layers
    if fault == "writes the neighbour's weights too" and _is_last():
        for to, origin in zip(moe.expert_weights[neighbour], moe.expert_weights[layer], strict=True):
            to[0] = origin[0]
    if fault == "commits the neighbour's map too":
        eplb_state._commit_eplb_maps_for_layer(of_model, planned, neighbour)
    if fault == "commits the map to the neighbour":
        for maps in (of_model.physical_to_logical_map, of_model.logical_to_physical_map):
            maps[[layer, neighbour]] = maps[[neighbour, layer]]
    worker._eplb_watch.close()
    return [before, worker._eplb_watch.report(_rank())]


class _IgnoresTheLoad:
    """A policy that leaves everything where it is."""

    @staticmethod
    def rebalance_experts(load: torch.Tensor, *arguments: Any) -> torch.Tensor:  # noqa: ARG004
        old: torch.Tensor = arguments[-1]
        return old.clone()


class _Planned:
    """A policy that keeps the load that the one it stands before is given; its fault is in what it then gives that."""

    def __init__(self, policy: Any, fault: str | None) -> None:
        self.loads: list[list[list[int]]] = []
        self._policy = policy
        self._for_ever = fault == "plans for the first load for ever"
        self._first: torch.Tensor | None = None

    def rebalance_experts(self, load: torch.Tensor, *arguments: Any) -> torch.Tensor:
        self.loads.append(load.tolist())
        if self._first is None or not self._for_ever:
            self._first = load.clone()
        new: torch.Tensor = self._policy.rebalance_experts(self._first, *arguments)
        return new


def _takes_one_rank_s_load(loads: list[torch.Tensor]) -> list[torch.Tensor]:
    """In place of the sum over ranks: all get the same, so nothing hangs and no map differs."""
    for load in loads:
        torch.distributed.broadcast(load, 0, group=parallel_state.get_ep_group().device_group)
    return loads


def _commits_no_counts(real: Callable[..., None]) -> Callable[..., None]:
    def commit(of_model: Any, *arguments: Any, **options: Any) -> None:
        kept = of_model.logical_replica_count.clone()
        real(of_model, *arguments, **options)
        of_model.logical_replica_count.copy_(kept)

    return commit


def _commits_no_way_back(real: Callable[..., None]) -> Callable[..., None]:
    def commit(of_model: Any, *arguments: Any, **options: Any) -> None:
        kept = of_model.logical_to_physical_map.clone()
        real(of_model, *arguments, **options)
        of_model.logical_to_physical_map.copy_(kept)

    return commit


def _commits_another_map_on_the_last_rank(real: Callable[..., None]) -> Callable[..., None]:
    def commit(of_model: Any, new_physical_to_logical_map: torch.Tensor) -> None:
        own = new_physical_to_logical_map
        real(of_model, own.roll(1, 1) if _is_last() else own)

    return commit


COMMIT_FAULTS: dict[str, Callable[[Callable[..., None]], Callable[..., None]]] = {
    "commits no counts": _commits_no_counts,
    "commits no way back": _commits_no_way_back,
    "commits another map on a rank": _commits_another_map_on_the_last_rank,
}


def serve(
    folder: str,
    traffic: Sequence[tuple[torch.Tensor, torch.Tensor]],
    asked: tuple[torch.Tensor, torch.Tensor],
    *,
    change: int,
    steps: int,
    redundant: int,
    batch: int,
    options: dict[str, Any],
    swap: tuple[int, int, list[int]],
    fault: str | None = None,
) -> dict[str, Any]:
    """Put traffic through the shared MoE, a step of EPLB after each batch, then ask the questions that count.

    Parameters:
        traffic: ids and each row's last position, up to step `change` and from there on.
        asked: the same, of the questions.
        options: of vLLM's EPLBConfig.
        swap: layer, expert and others, for the fault "swaps experts' weights".

    Returns:
        the watch's `report`, the `answers` to `asked`, `initial` digests and seconds a step took; `chosen`, what the
        routers chose in each step, [steps][layers][experts]; `planned`, the load of each plan, [layers][experts], and
        `planned_after`, the step it came after.
    """
    commit = eplb_state._commit_eplb_maps
    if fault in COMMIT_FAULTS:
        commit = COMMIT_FAULTS[fault](commit)
    with mock.patch.object(eplb_state, "_commit_eplb_maps", commit):
        moe = SharedMoe(folder, redundant, wrong_replica=fault == "takes a wrong replica")
        worker = Worker(moe, **options)
        watch, state = worker._eplb_watch, worker.state
        initial = watch.report(_rank())
        chosen: list[list[list[int]]] = []
        if fault == "ignores the load":
            state.policy = _IgnoresTheLoad
        if fault == "takes one rank's load for all":
            state._allreduce_list = _takes_one_rank_s_load
        state.policy = planned = _Planned(state.policy, fault)
        planned_after = []
        rearrange = state.rearrange

        def noted(*arguments: Any, **more: Any) -> Any:
            planned_after.append(len(chosen))
            return rearrange(*arguments, **more)

        state.rearrange = noted
        if fault == "never rearranges":
            state.expert_rearrangement_step = -steps
        if fault == "the asynchronous thread dies":
            worker.eplb_end_async()
        state.start_async_loop()
        seconds = []
        for step in range(steps):
            ids, ends = traffic[step >= change]
            rows = torch.arange(step * batch, (step + 1) * batch) % len(ids)
            began = time.perf_counter()
            moe.first_tokens(ids[rows], ends[rows])
            chosen.append([layer.chosen for layer in moe.moe_layers])
            state.step()
            seconds.append(time.perf_counter() - began)
        # A move still under way would meet the next job's: both use the one EPLB group. A dead thread's never ends.
        while worker.is_moving and fault != "the asynchronous thread dies":
            state.step(is_dummy=True)
        if fault == "swaps experts' weights":
            worker.eplb_swap_experts(*swap)
        if fault == "counts another step on a rank" and _is_last():
            state.expert_rearrangement_step += 1
        report = watch.report(_rank())
        watch.close()
    return {
        "report": report, "initial": initial, "answers": moe.first_tokens(*asked), "seconds": seconds,
        "chosen": chosen, "planned": planned.loads, "planned_after": planned_after,
    }  # fmt: skip


def logged_balancedness(folder: str) -> list[str]:
    """The lines vLLM's own step logs, for all tokens on one rank and then for an even load."""
    moe = SharedMoe(folder, 0)
    worker = Worker(moe, window_size=4, step_interval=100, use_async=False, communicator="torch_gloo")
    (of_model,) = worker.state.model_states.values()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())
    eplb_state.logger.addHandler(handler)
    local = moe.num_local_physical_experts
    try:
        for busy in (local, moe.num_physical_experts):
            of_model.expert_load_pass.zero_()
            of_model.expert_load_pass[:, :busy] = 100
            worker.state.step(log_stats=True)
    finally:
        eplb_state.logger.removeHandler(handler)
        worker._eplb_watch.close()
    return [line for line in lines if "balancedness" in line]

"""Writes down what the trainer sends to the rollout engine at each weight update, and what the engine then holds.

verl imports this in each of its processes (VERL_USE_EXTERNAL_MODULES): the trainer's worker, and vLLM's, whose
extension is verl's. SGLang's scheduler has it from `sglang_sync`. Each tensor is one sha256 of its bytes, in the data
type that the engine holds it in.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "DRYDOCK_SYNC_PROBE"
"""Variable: where the documents go, a line of JSON an update in `sent-<pid>.jsonl` and `held-<pid>.jsonl`."""
DTYPES = ("float32", "bfloat16")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""SGLang's layers, as the `load_weights` of its Qwen3 has them; vLLM's models say it themselves."""


def digest(tensor: Any) -> str:
    """sha256 of a tensor's bytes, as a host has them."""
    import torch

    plain = tensor.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(plain.tobytes()).hexdigest()


def write(kind: str, document: dict[str, Any]) -> None:
    with (Path(os.environ[FOLDER]) / f"{kind}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(document) + "\n")


async def noting(weights: Any, sent: dict[str, dict[str, str]]) -> AsyncIterator[tuple[str, Any]]:
    """Passes the weights on, and notes each."""
    import torch
    from verl.workers.rollout.utils import ensure_async_iterator

    async for name, tensor in ensure_async_iterator(weights):
        sent[name] = {dtype: digest(tensor.to(getattr(torch, dtype))) for dtype in DTYPES}
        yield name, tensor


def noting_sent(send: Callable[..., Any]) -> Callable[..., Any]:
    """A sender's method, whose first argument is the weights, in the trainer."""

    async def watched(self: Any, weights: Any, *arguments: Any, **options: Any) -> None:
        sent: dict[str, dict[str, str]] = {}
        await send(self, noting(weights, sent), *arguments, **options)
        write("sent", sent)

    return watched


def parts(model: Any) -> Iterator[tuple[str, Any]]:
    """The engine's parameters under the names that the trainer has for them: what it fuses is cut apart."""
    fused = getattr(model, "packed_modules_mapping", FUSED)
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, field = name.rpartition(".")
        parent, _, last = owner.rpartition(".")
        if last not in fused:
            # Both engines pad the vocabulary to a multiple of 64.
            words = getattr(layers[owner], "org_vocab_size", None)
            yield name, parameter if words is None else parameter[:words]
            continue
        sizes = layers[owner].output_partition_sizes
        for own, piece in zip(fused[last], parameter.split(sizes, dim=0), strict=True):
            yield f"{parent}.{own}.{field}", piece


def note_held(model: Any) -> None:
    """Writes what the engine holds after an update, and what would be read if one tensor were another."""
    import torch

    def held() -> dict[str, list[str]]:
        return {name: [str(each.dtype).removeprefix("torch."), digest(each)] for name, each in parts(model)}

    document: dict[str, Any] = {"held": held()}
    # A fault for the reader to find: one element of one tensor, put back at once.
    _, victim = next(iter(model.named_parameters()))
    first = victim.data.view(-1)[:1]
    kept = first.clone()
    first.copy_(torch.where(kept == 0, torch.ones_like(kept), -kept))
    document["spoiled"] = held()
    first.copy_(kept)
    document["again"] = held()
    write("held", document)


def noting_held(update: Callable[..., Any], model_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """A receiver's method, in the engine; `model_of` its object is the model.

    verl sends a model to SGLang in several buckets where it is larger than one; then there are more documents than
    updates.
    """

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        answer = update(self, *arguments, **options)
        note_held(model_of(self))
        return answer

    return watched


Noting = Callable[[Callable[..., Any]], Callable[..., Any]]
WATCHED: dict[str, tuple[str, str, Noting]] = {
    "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer": (
        "BucketedWeightSender", "async_send_weights", noting_sent,
    ),
    "verl.workers.rollout.vllm_rollout.utils": (
        "vLLMColocateWorkerExtension", "update_weights_from_ipc",
        partial(noting_held, model_of=lambda worker: worker.model_runner.model),
    ),
    "verl.workers.rollout.sglang_rollout.sglang_rollout": ("ServerAdapter", "update_weights", noting_sent),
}  # fmt: skip
"""By its module: a class, its method, and what takes the method's place."""


class Finder(importlib.abc.MetaPathFinder):
    """Lets a module of `WATCHED` load as always and then changes it; to import it here would be too early."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name not in WATCHED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            owner, method, wrap = WATCHED[name]
            watched = getattr(module, owner)
            setattr(watched, method, wrap(getattr(watched, method)))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get(FOLDER):
    sys.meta_path.insert(0, Finder())


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The updates of the only process that wrote some, in their order.

    Raises:
        ValueError: no process did, or several.
    """
    files = sorted(folder.glob(f"{kind}-*.jsonl"))
    if len(files) != 1:
        raise ValueError(f"{len(files)} processes wrote what they {kind}, not one")
    return [json.loads(line) for line in files[0].read_text().splitlines()]


def differences(sent: dict[str, dict[str, str]], held: dict[str, list[str]]) -> list[str]:
    """Names of tensors that are not what was sent, or that only one side has."""
    # Tied, it is sent under both names and held under one.
    missing = sent.keys() - held.keys() - {"lm_head.weight"}
    return sorted(missing) + sorted(
        name for name, (dtype, found) in held.items() if sent.get(name, {}).get(dtype) != found
    )

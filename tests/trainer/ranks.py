"""Runs a function in the ranks of a process group, processes of their own, and says what became of each.

On the CPU the processes are forked from one that has imported torch, verl and megatron-core and has run nothing: each
is as new as a spawned one, without seconds of imports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch.distributed

from drydock.tiers.device import CPU, Device, hidden

Result = TypeVar("Result")
PRELOAD = [
    "torch.distributed.fsdp",
    "transformers.models.qwen3.modeling_qwen3",
    "verl.utils.checkpoint.fsdp_checkpoint_manager",
    "megatron.core.parallel_state",
    "megatron.core.transformer.moe.router",
]


class RankError(Exception):
    """A rank failed, died or hung; the text says which, and its traceback or where it stood."""


def run_ranks(
    function: Callable[..., Result],
    world: int,
    *arguments: Any,
    deadline: float = 90.0,
    device: Device = CPU,
) -> list[Result]:
    """`function(*arguments)` in each of `world` ranks; what they return, by rank.

    Parameters:
        function: a module's own; its result goes through a pipe.
        deadline: seconds for all of it. What is not done then is killed.
        device: what each rank has one of; on the CPU they see no accelerator.

    Raises:
        RankError: not every rank returned.
    """
    # A process in which an accelerator was looked at cannot be forked: ranks on one import everything themselves.
    context = multiprocessing.get_context("forkserver" if device == CPU else "spawn")
    context.set_forkserver_preload(PRELOAD)
    until = time.monotonic() + deadline
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        shared = (world, folder, deadline, device, function, arguments)
        processes = [
            context.Process(target=_rank, args=(rank, pipes[rank][1], *shared)) for rank in range(world)
        ]
        try:
            with mock.patch.dict(os.environ, hidden() if device == CPU else {}):
                for process, (_, theirs) in zip(processes, pipes, strict=True):
                    process.start()
                    theirs.close()
            answers = [_answer(pipe, until) for pipe, _ in pipes]
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
            for pipe, _ in pipes:
                pipe.close()
        problems = []
        for rank, (answer, process) in enumerate(zip(answers, processes, strict=True)):
            if answer is None:
                stack = folder / f"stack-{rank}"
                where = stack.read_text() if stack.exists() else ""
                fate = (
                    f"ended with status {process.exitcode}" if process.exitcode != -9
                    else f"was killed after {deadline:g} s, or before"
                )  # fmt: skip
                problems.append(f"rank {rank} of {world} {fate}\n{where}")
            elif answer[0] == "failed":
                problems.append(f"rank {rank} of {world} failed\n{answer[1]}")
    if problems:
        raise RankError("\n".join(problems))
    return [answer[1] for answer in answers if answer]


def stop_preloaded() -> None:
    """End the process that gloo's ranks are forked from; it would end with this one, but be seen to outlive it."""
    multiprocessing.forkserver._forkserver._stop()


def _answer(pipe: Connection, until: float) -> tuple[str, Any] | None:
    """What a rank sends; nothing where it ends or is late."""
    try:
        if pipe.poll(max(0.0, until - time.monotonic())):
            answer: tuple[str, Any] = pipe.recv()
            return answer
    except EOFError:
        pass
    return None


def _rank(
    rank: int,
    pipe: Connection,
    world: int,
    folder: Path,
    deadline: float,
    device: Device,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.dump_traceback_later(deadline * 0.9, file=stack)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    try:
        device.module()  # importing torch_npu adds its backend
        torch.distributed.init_process_group(
            device.backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
            timeout=timedelta(seconds=deadline * 0.8),
        )  # fmt: skip
        result = function(*arguments)
        torch.distributed.barrier()
        pipe.send(("done", result))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    # Not the interpreter's own end: it may wait for a peer that is gone.
    pipe.close()
    os._exit(0)

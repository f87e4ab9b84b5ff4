"""Starts ray and TransferQueue, moves a batch through it, stops both; a process of its own, since a start may hang.

    python queue_child.py '{"folder": "/tmp/x", "cpus": 3, "units": 2, "check": true}'

Its last line of output is a JSON object; where it hangs, `stack_after` seconds later its stack is on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import sys
import time
from typing import Any

import ray
import torch
import transfer_queue
from tensordict import TensorDict

STORE_BYTES = 80 * 2**20
"""Ray's least is 75 MiB: more than the 64 MiB of /dev/shm in a Docker container, so it goes elsewhere."""


def check_cpus(units: int) -> None:
    """See that ray has a CPU for each of TransferQueue's actors: one that gets none is waited for, without a word.

    Raises:
        SystemExit: it has not.
    """
    needed, there = 1 + units, int(ray.cluster_resources().get("CPU", 0))
    if there < needed:
        raise SystemExit(
            f"TransferQueue with {units} storage units needs {needed} CPUs of ray, which has {there}: its start "
            f"would hang. Give ray.init num_cpus={needed} or more, or num_data_storage_units={max(there - 1, 1)}"
        )


def same(found: TensorDict, expected: TensorDict) -> bool:
    """Every row of every field equal, type and shape too; what comes back may be a nested tensor."""
    return set(found.keys()) == set(expected.keys()) and all(
        one.dtype == other.dtype and torch.equal(one, other)
        for name in expected.keys()  # noqa: SIM118  # iterating a TensorDict goes over its rows
        for one, other in zip(found[name].unbind(), expected[name].unbind(), strict=True)
    )


def move_a_batch() -> dict[str, bool]:
    """Put rollouts and get them again, whole, in part and in another order."""
    draw = torch.Generator().manual_seed(0)
    rollouts = TensorDict(
        {
            "responses": torch.randint(0, 50, (8, 6), generator=draw),
            "log_probs": torch.randn(8, 6, generator=draw),
            "rewards": torch.randn(8, 1, generator=draw).to(torch.bfloat16),
        },
        batch_size=8,
    )
    keys = [f"rollout-{row}" for row in range(8)]
    transfer_queue.kv_batch_put(keys=keys, partition_id="train", fields=rollouts, tags=[{"step": 1}] * 8)
    found = transfer_queue.kv_batch_get(keys=keys, partition_id="train")
    turned = transfer_queue.kv_batch_get(keys=keys[::-1], partition_id="train")
    part = transfer_queue.kv_batch_get(keys=keys[2:4], partition_id="train", select_fields=["rewards"])
    listed = transfer_queue.kv_list("train")["train"]
    transfer_queue.kv_clear(keys=keys, partition_id="train")
    return {
        "whole": same(found, rollouts),
        "turned": same(turned, rollouts[list(range(8))[::-1]]) and not same(turned, rollouts),
        "part": same(part, rollouts.select("rewards")[2:4]),
        "listed": sorted(listed) == sorted(keys),
        "cleared": not transfer_queue.kv_list("train").get("train"),
    }


def run(folder: str, cpus: int, units: int, check: bool, stack_after: float) -> dict[str, Any]:
    """Seconds of each part, what `move_a_batch` found, and bytes that /dev/shm lost meanwhile."""
    faulthandler.dump_traceback_later(stack_after)
    shm = shutil.disk_usage("/dev/shm").used
    began = time.monotonic()
    ray.init(
        num_cpus=cpus, num_gpus=0, include_dashboard=False, object_store_memory=STORE_BYTES,
        _plasma_directory=folder, _temp_dir=folder, log_to_driver=False,
    )  # fmt: skip
    ray_seconds = time.monotonic() - began
    if check:
        check_cpus(units)
    began = time.monotonic()
    transfer_queue.init({"backend": {"SimpleStorage": {"num_data_storage_units": units}}})
    queue_seconds = time.monotonic() - began
    moved = move_a_batch()
    shm = shutil.disk_usage("/dev/shm").used - shm
    began = time.monotonic()
    transfer_queue.close()
    ray.shutdown()
    seconds = {"ray": ray_seconds, "queue": queue_seconds, "stop": time.monotonic() - began}
    return {"moved": moved, "seconds": seconds, "shm": shm}


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))

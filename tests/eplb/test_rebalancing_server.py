"""EPLB in the real server on two GPUs: rearranged under skewed traffic, watched in its workers, broken on purpose."""

# contract: vllm
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checks import Report, caught_by, check_better, check_served, expert_digests, measured_loads
from rebalancing import (
    ASKED,
    PROMPTS,
    RANKS,
    Profile,
    Record,
    answers,
    check_accuracy,
    check_equal,
    record_answers,
    record_run,
)
from traffic import Reader, check_stall, complete_all, last_moves, settled, skewed_traffic
from trained_moe import TrainedMoe, most_lopsided_letters, skewed_problems
from vllm_reports import reports, rpc

from drydock.server import VLLM, Server

pytestmark = [
    pytest.mark.engine("vllm"),
    pytest.mark.full("vLLM has EPLB on CUDA and ROCm only; test_served_moe runs its parts on a CPU"),
    pytest.mark.cuda("vLLM has EPLB on CUDA and ROCm only"),
    pytest.mark.needs(gpus=RANKS),
]

FLAGS = [
    "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "64",
    "--gpu-memory-utilization", "0.3", "--no-enable-prefix-caching",
    "--data-parallel-size", str(RANKS), "--enable-expert-parallel",
    "--all2all-backend", "allgather_reducescatter",
]  # fmt: skip

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    **VLLM.development,
    "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
}


@pytest.fixture(scope="module")
def plain(moe: TrainedMoe, results: Path) -> tuple[list[str], list[float]]:
    """What the same server says without EPLB, and how long its readers wait."""
    log = results / "without-eplb.log"
    with Server(VLLM, moe.folder, FLAGS, log=log, environment=ENVIRONMENT, ready_timeout=600) as server:
        with Reader(server, PROMPTS[0]) as reader:
            given = answers(server)
        return given, reader.gaps


def eplb_flags(mode: str, redundant: int, profile: Profile) -> list[str]:
    config = {
        "window_size": profile["window_size"], "step_interval": profile["step_interval"],
        "num_redundant_experts": redundant, "use_async": mode == "async",
    }  # fmt: skip
    return [
        *FLAGS, "--enable-eplb", "--eplb-config", json.dumps(config),
        "--worker-extension-cls", "worker_extension.EplbProbe",
    ]  # fmt: skip


def ask(server: Server, folder: Path) -> list[Report]:
    return reports(server, folder, RANKS)


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rearranging_evens_the_load_and_keeps_the_answers(
    mode: str, redundant: int, moe: TrainedMoe, plain: tuple[list[str], list[float]],
    results: Path, tmp_path: Path, profile: Profile, record: Record,
) -> None:  # fmt: skip
    letter = most_lopsided_letters(moe, RANKS, redundant)[0]
    skewed = [each.prompt for each in skewed_problems(profile["requests_in_a_wave"], 32, letter)]
    log = results / f"eplb-{mode}-{redundant}.log"
    with Server(
        VLLM, moe.folder, eplb_flags(mode, redundant, profile),
        log=log, environment=ENVIRONMENT, ready_timeout=600,
    ) as server:  # fmt: skip
        rpc(server, "eplb_watch")
        experts = expert_digests(settled(lambda: ask(server, tmp_path)))
        # Few steps of the same traffic: what is compiled for a batch's size is compiled before experts move.
        complete_all(server, skewed[:64], max_tokens=4, at_once=32)
        with Reader(server, PROMPTS[0]) as reader:
            # One more than must be seen: what is recorded between the last two is the load after.
            least = profile["rearrangements"] + 1
            skewed_traffic(
                server, skewed, lambda: ask(server, tmp_path), "completed", least, profile["traffic_seconds"]
            )
        # Before the questions, whose load is another.
        rested = settled(lambda: ask(server, tmp_path))
        before, after = measured_loads(rested, 0), measured_loads(rested, -1)
        given = answers(server)
        seen = settled(lambda: ask(server, tmp_path))
        record_run(record, f"{mode}, {redundant} redundant experts", before, after, reader.gaps, profile)
        record("rearrangements", seen[0]["completed"])
        moves = [move for report in rested for move in report["moves"]]
        # The synchronous rows are the first, and compile.
        late = last_moves(rested, profile["rearrangements"]) if mode == "sync" else moves
        during = reader.gaps_during(late)
        record_answers(record, given, plain, reader.gaps, during)
        took = [ended - began for began, ended in moves]
        record("longest rearrangement, seconds", max(took, default=None))

        check_served(seen, experts, completed=profile["rearrangements"], slack=profile["steps_late"])
        check_better(before, after, profile["balance_gain"])
        check_accuracy(given, profile["accuracy"])
        check_equal(given, plain[0], profile["equal_answers"])
        check_stall(during, profile["stall_seconds"])
        if mode == "sync":
            # All of them, by the ranks' clocks: so long each holds up its rank. An asynchronous one goes on beside.
            check_stall(took, profile["stall_seconds"])
            # The log is another witness of completed ones; the asynchronous mode logs only that one begins.
            lines = [line for line in log.read_text().splitlines() if "Rearranged experts" in line]
            assert sum("(profile)" not in line for line in lines) >= seen[0]["completed"]

        swap = moe.most_harmful_swap(ASKED)
        rpc(server, "eplb_swap_experts", swap.layer, swap.expert, list(swap.others))
        broken = answers(server)
        torn = settled(lambda: ask(server, tmp_path))
        caught = {
            caught_by(lambda: check_accuracy(broken, profile["accuracy"])),
            caught_by(lambda: check_equal(broken, plain[0], profile["equal_answers"])),
            caught_by(lambda: check_served(torn, experts, completed=0, slack=profile["steps_late"])),
        }
        record("two experts swapped, caught by", sorted(map(str, caught)))
        assert caught == {"accuracy is kept", "answers are those without EPLB", "weights match the map"}


def test_an_asynchronous_thread_that_dies_is_seen(
    moe: TrainedMoe, results: Path, tmp_path: Path, profile: Profile, record: Record
) -> None:
    """vllm#57883: the server goes on answering, `/health` with it, and never rearranges again."""
    letter = most_lopsided_letters(moe, RANKS, 4)[0]
    skewed = [each.prompt for each in skewed_problems(profile["requests_in_a_wave"], 33, letter)]
    with Server(
        VLLM, moe.folder, eplb_flags("async", 4, profile),
        log=results / "eplb-dead-thread.log", environment=ENVIRONMENT, ready_timeout=600,
    ) as server:  # fmt: skip
        rpc(server, "eplb_watch")
        experts = expert_digests(settled(lambda: ask(server, tmp_path)))
        skewed_traffic(
            server, skewed, lambda: ask(server, tmp_path), "completed", 1, profile["traffic_seconds"]
        )
        alive = settled(lambda: ask(server, tmp_path))
        check_served(alive, experts, completed=1, slack=profile["steps_late"])
        rpc(server, "eplb_end_async")
        steps = alive[0]["steps"] + 2 * profile["step_interval"] + profile["steps_late"]
        skewed_traffic(
            server, skewed, lambda: ask(server, tmp_path), "steps", steps, profile["traffic_seconds"]
        )
        server.request("/health")
        dead = settled(lambda: ask(server, tmp_path))
        record("after the thread's death", {"health": 200, "steps left": dead[0]["steps_left"]})
        caught = caught_by(lambda: check_served(dead, experts, completed=1, slack=profile["steps_late"]))
        assert caught == "the step counter is alive"

"""EPLB in the real server on two GPUs: rearranged under skewed traffic, watched in its workers, broken on purpose."""

# contract: vllm
from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from balance import balance
from checks import (
    caught_by,
    check_answers,
    check_better,
    check_served,
    expert_digests,
    measured_loads,
)
from traffic import check_stall, complete_all, reports, rpc, settled, stream
from trained_moe import TrainedMoe, most_lopsided_letters, problems, skewed_problems

from drydock.server import VLLM, Server

Record = Callable[[str, Any], None]
Profile = Mapping[str, Any]

RANKS = 2

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

ASKED = problems(256, 31, held_out=True)
PROMPTS = [each.prompt for each in ASKED]


def answers(server: Server) -> list[str]:
    """Sixteen greedy tokens to each of the problems that accuracy and equality are measured with."""
    return complete_all(server, PROMPTS, max_tokens=16)


def check_accuracy(given: Sequence[str], share: float) -> None:
    check_answers([text[:1] for text in given], [each.answer for each in ASKED], share, "accuracy is kept")


def check_equal(given: Sequence[str], plain: Sequence[str], share: float) -> None:
    check_answers(given, plain, share, "answers are those without EPLB")


class Reader:
    """Reads one stream after another while something else goes on, and keeps every wait for a token."""

    def __init__(self, server: Server) -> None:
        self.gaps: list[float] = []
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._error: BaseException | None = None

    def _read(self) -> None:
        try:
            while not self._over.is_set():
                self.gaps += [gap for _, gap in stream(self._server, PROMPTS[0], max_tokens=200)]
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error:
            raise self._error


@pytest.fixture(scope="module")
def plain(moe: TrainedMoe, results: Path) -> tuple[list[str], list[float]]:
    """What the same server says without EPLB, and how long its readers wait."""
    log = results / "without-eplb.log"
    with Server(VLLM, moe.folder, FLAGS, log=log, environment=ENVIRONMENT, ready_timeout=600) as server:
        with Reader(server) as reader:
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


def skewed_traffic(
    server: Server, prompts: Sequence[str], folder: Path, what: str, least: int, seconds: float
) -> None:
    """Requests in waves until what every rank reports under that name is at least so much, or time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        complete_all(server, prompts, max_tokens=4, at_once=32)
        if min(report[what] for report in reports(server, folder, RANKS)) >= least:
            return


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
        experts = expert_digests(settled(server, tmp_path, RANKS))
        with Reader(server) as reader:
            # One more than must be seen: what is recorded between the last two is the load after.
            least = profile["rearrangements"] + 1
            skewed_traffic(server, skewed, tmp_path, "completed", least, profile["traffic_seconds"])
        # Before the questions, whose load is another.
        rested = settled(server, tmp_path, RANKS)
        before, after = measured_loads(rested, 0), measured_loads(rested, -1)
        given = answers(server)
        seen = settled(server, tmp_path, RANKS)
        record(
            "expert_load",
            {
                "unit": "tokens",
                "title": f"{mode}, {redundant} redundant experts, 2 GPUs: balance "
                f"{balance(before).mean():.2f} before, {balance(after).mean():.2f} after",
                "before": before.tolist(),
                "after": after.tolist(),
            },
        )
        record("rearrangements", seen[0]["completed"])
        equal = sum(ours == theirs for ours, theirs in zip(given, plain[0], strict=True)) / len(given)
        record("equal to the server without EPLB", equal)
        record(
            "series",
            {
                "title": f"wait for a token while experts move, {mode}, {redundant} redundant experts",
                "x": list(range(len(reader.gaps))),
                "y": [round(gap, 4) for gap in reader.gaps],
                "x_label": "token",
                "y_label": "seconds",
                "threshold": profile["stall_seconds"],
            },
        )
        record("longest wait for a token, seconds", {"without EPLB": max(plain[1]), "with": max(reader.gaps)})

        check_served(seen, experts, completed=profile["rearrangements"], slack=profile["steps_late"])
        check_better(before, after, profile["balance_gain"])
        check_accuracy(given, profile["accuracy"])
        check_equal(given, plain[0], profile["equal_answers"])
        check_stall(reader.gaps, profile["stall_seconds"])
        if mode == "sync":
            # The log is another witness of completed ones; the asynchronous mode logs only that one begins.
            lines = [line for line in log.read_text().splitlines() if "Rearranged experts" in line]
            assert sum("(profile)" not in line for line in lines) >= seen[0]["completed"]

        swap = moe.most_harmful_swap(ASKED)
        rpc(server, "eplb_swap_experts", swap.layer, swap.expert, list(swap.others))
        broken = answers(server)
        torn = settled(server, tmp_path, RANKS)
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
        experts = expert_digests(settled(server, tmp_path, RANKS))
        skewed_traffic(server, skewed, tmp_path, "completed", 1, profile["traffic_seconds"])
        alive = settled(server, tmp_path, RANKS)
        check_served(alive, experts, completed=1, slack=profile["steps_late"])
        rpc(server, "eplb_end_async")
        steps = alive[0]["steps"] + 2 * profile["step_interval"] + profile["steps_late"]
        skewed_traffic(server, skewed, tmp_path, "steps", steps, profile["traffic_seconds"])
        server.request("/health")
        dead = settled(server, tmp_path, RANKS)
        record("after the thread's death", {"health": 200, "steps left": dead[0]["steps_left"]})
        caught = caught_by(lambda: check_served(dead, experts, completed=1, slack=profile["steps_late"]))
        assert caught == "the step counter is alive"

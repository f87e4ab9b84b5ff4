"""The trained MoE behind the real vLLM: its accuracy, and that a wrong expert, a stall or a lost method is seen."""

# contract: vllm
from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from checks import caught_by, check_answers
from traffic import check_stall, complete_all, stream
from trained_moe import Problem, TrainedMoe, problems, with_swapped_experts
from vllm_reports import rpc

from drydock.server import VLLM, Server

Record = Callable[[str, Any], None]
Profile = Mapping[str, Any]


def accuracy(given: Sequence[str], asked: Sequence[Problem]) -> float:
    return sum(text == each.answer for text, each in zip(given, asked, strict=True)) / len(asked)


FLAGS = [
    "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16",
    "--no-enable-prefix-caching", "--worker-extension-cls", "worker_extension.EplbProbe",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(moe: TrainedMoe, results: Path) -> Iterator[Server]:
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **VLLM.development,
        "TORCH_COMPILE_DISABLE": "1",
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    with Server(VLLM, moe.folder, FLAGS, log=results / "eplb-server.log", environment=environment) as running:
        yield running


def test_the_trained_moe_answers_held_out_problems(moe: TrainedMoe, profile: Profile, record: Record) -> None:
    asked = problems(500, 21, held_out=True)
    record("training", {"seconds": round(moe.seconds, 1), "accuracy": moe.accuracy(asked)})
    assert moe.accuracy(asked) >= profile["accuracy"]


def test_two_swapped_experts_cost_the_accuracy(moe: TrainedMoe, profile: Profile, record: Record) -> None:
    asked = problems(500, 22, held_out=True)
    swap = moe.most_harmful_swap(asked)
    record("accuracy with two experts swapped", swap.accuracy)
    assert swap.accuracy < profile["accuracy"]
    again = with_swapped_experts(
        with_swapped_experts(moe.model, swap.layer, swap.expert, swap.others[0]),
        swap.layer, swap.expert, swap.others[0],
    )  # fmt: skip
    assert moe.accuracy(asked, again) == moe.accuracy(asked), "swapped back it must be the model it was"


def test_the_server_answers_held_out_problems(server: Server, profile: Profile, record: Record) -> None:
    asked = problems(profile["api_questions"], 23, held_out=True)
    given = complete_all(server, [each.prompt for each in asked], max_tokens=1)
    record("accuracy through the API", accuracy(given, asked))
    check_answers(given, [each.answer for each in asked], profile["accuracy"], "accuracy")


def test_a_stall_of_a_reader_is_seen(server: Server, profile: Profile, record: Record) -> None:
    """Undisturbed, a stream has no gap over the budget; while its server is halted for longer, it has."""
    budget = profile["stall_seconds"]
    (asked,) = problems(1, 24, held_out=True)

    def gaps() -> list[float]:
        pieces = list(stream(server, asked.prompt, max_tokens=64))
        assert "".join(text for text, _ in pieces) == asked.answer * 64
        return [gap for _, gap in pieces]

    def resume() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    calm = gaps()
    pids = list(server.survivors())
    # Halted before the request: on a busy machine all 64 tokens may be made before the first one is read.
    resumed = threading.Timer(budget + 0.5, resume)
    resumed.start()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    halted = gaps()
    resumed.join()
    record("longest gap between tokens, seconds", {"calm": max(calm), "halted": max(halted)})
    check_stall(calm, budget)
    assert caught_by(lambda: check_stall(halted, budget)) == "stall within its budget"


def test_the_worker_extension_is_reached_in_every_worker(server: Server, tmp_path: Path) -> None:
    rpc(server, "eplb_report", str(tmp_path))
    assert json.loads((tmp_path / "rank-0.json").read_text()) is None, "there is no EPLB on a CPU"


def test_two_swapped_experts_show_through_the_api(
    server: Server, moe: TrainedMoe, profile: Profile, record: Record
) -> None:
    """The last test of this server: it leaves it with the fault."""
    asked = problems(profile["api_questions"], 23, held_out=True)
    swap = moe.most_harmful_swap(asked)
    with_swapped_experts(moe.model, swap.layer, swap.expert, swap.others[0]).save_pretrained(moe.folder)
    try:
        server.reload_weights()
    finally:
        moe.model.save_pretrained(moe.folder)
    given = complete_all(server, [each.prompt for each in asked], max_tokens=1)
    record(
        "accuracy with two experts swapped",
        sum(g == a.answer for g, a in zip(given, asked, strict=True)) / len(asked),
    )
    wanted = [each.answer for each in asked]
    assert caught_by(lambda: check_answers(given, wanted, profile["accuracy"], "accuracy")) == "accuracy"

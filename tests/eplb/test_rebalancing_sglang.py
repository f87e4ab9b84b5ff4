"""EPLB in SGLang's real server on two GPUs, its own canary on: rearranged under skewed traffic, broken on purpose.

SGLANG_EXPERT_LOCATION_UPDATER_CANARY moves each slot's expert id along with its weights and asserts, after each
rearrangement, that the ids are where the new map has them.
"""

# contract: sglang
from __future__ import annotations

import json
import os
import time
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
from traffic import Reader, check_stall, complete_all, settled, skewed_traffic
from trained_moe import TrainedMoe, most_lopsided_letters, skewed_problems, with_swapped_experts

from drydock.server import SGLANG, Server, ServerError

pytestmark = [
    pytest.mark.engine("sglang"),
    pytest.mark.full("SGLang's server has EPLB across GPUs only"),
    pytest.mark.cuda("SGLang's server is made for CUDA in the images that have it"),
    pytest.mark.needs(gpus=RANKS),
]

FLAGS = [
    # Not bfloat16, for which it takes a kernel that rotates and stores keys and has none for heads of 32 numbers.
    "--dtype", "float16",
    "--context-length", "256", "--max-running-requests", "64", "--mem-fraction-static", "0.3",
    "--tp-size", str(RANKS), "--ep-size", str(RANKS),
    "--disable-cuda-graph", "--disable-radix-cache",
    # What needs no kernels that are compiled at the first request, nor memory that is shared between GPUs.
    "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion",
]  # fmt: skip

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}

STEP_OF_PLAN = 1
"""A plan is due after the interval's steps, and made with the next."""


@pytest.fixture(scope="module")
def plain(moe: TrainedMoe, results: Path) -> tuple[list[str], list[float]]:
    """What the same server says without EPLB, and how long its readers wait."""
    log = results / "sglang-without-eplb.log"
    with Server(SGLANG, moe.folder, FLAGS, log=log, environment=ENVIRONMENT, ready_timeout=600) as server:
        with Reader(server, PROMPTS[0]) as reader:
            given = answers(server)
        return given, reader.gaps


def eplb_server(
    moe: TrainedMoe, log: Path, folder: Path, profile: Profile, redundant: int, **variables: str
) -> Server:
    """A server whose ranks write their reports into the folder; the canary is on."""
    flags = [
        *FLAGS, "--enable-eplb", "--ep-num-redundant-experts", str(redundant),
        "--eplb-rebalance-num-iterations", str(profile["step_interval"]),
        "--expert-distribution-recorder-mode", "stat",
        # "static" gives each rank its nearest replica. Where every rank has every token, as without DeepEP, two ranks
        # then compute the same expert, and their sum has it twice; "dynamic" draws one, the same on each.
        "--ep-dispatch-algorithm", "dynamic" if redundant else "static",
    ]  # fmt: skip
    environment = {
        **ENVIRONMENT,
        "SGLANG_EXPERT_LOCATION_UPDATER_CANARY": "1",
        "SGLANG_EXTERNAL_MODEL_PACKAGE": "sglang_eplb",
        "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(folder),
        "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        **variables,
    }
    return Server(SGLANG, moe.folder, flags, log=log, environment=environment, ready_timeout=600)


MAPPED = {"DRYDOCK_SGLANG_MAPPED": "1"}


def reports(server: Server, folder: Path) -> list[Report]:
    """What the ranks' `sglang_eplb.probe` reports, by rank.

    Raises:
        LookupError: not every rank reported within 10 s of the answer, which is the first's.
    """
    found = [folder / f"rank-{rank}.json" for rank in range(RANKS)]
    for file in found:
        file.unlink(missing_ok=True)
    server.request("/dump_expert_distribution_record", {})
    deadline = time.monotonic() + 10
    while missing := [file.name for file in found if not file.exists()]:
        if time.monotonic() > deadline:
            raise LookupError(f"{', '.join(missing)}: not written; see the log for what was imported")
        time.sleep(0.05)
    return [report for file in found for report in json.loads(file.read_text())]


def rearrangements_in(log: Path) -> int:
    """By the log of the server's first rank, which is another witness."""
    lines = [line for line in log.read_text().splitlines() if " TP0" in line]
    return sum("[EPLBManager] rebalance end" in line for line in lines)


def skewed_prompts(moe: TrainedMoe, redundant: int, profile: Profile) -> list[str]:
    letter = most_lopsided_letters(moe, RANKS, redundant)[0]
    return [each.prompt for each in skewed_problems(profile["requests_in_a_wave"], 32, letter)]


@pytest.mark.parametrize("redundant", [0, 4])
def test_rearranging_evens_the_load_and_keeps_the_answers(
    redundant: int, moe: TrainedMoe, plain: tuple[list[str], list[float]],
    results: Path, tmp_path: Path, profile: Profile, record: Record,
) -> None:  # fmt: skip
    """Of a Qwen3-MoE whose router is given the map, which SGLang 0.5.14 leaves out: see the test below."""
    skewed = skewed_prompts(moe, redundant, profile)
    log = results / f"sglang-eplb-{redundant}.log"
    slack = STEP_OF_PLAN
    with eplb_server(moe, log, tmp_path, profile, redundant, **MAPPED) as server:

        def ask() -> list[Report]:
            return reports(server, tmp_path)

        experts = expert_digests(settled(ask))
        # The first sets up the ranks' connections, which is not what a reader waits for each time.
        skewed_traffic(server, skewed, ask, "completed", 1, profile["traffic_seconds"])
        with Reader(server, PROMPTS[0]) as reader:
            # One more than must be seen: what is recorded between the last two is the load after.
            least = profile["rearrangements"] + 1
            skewed_traffic(server, skewed, ask, "completed", least, profile["traffic_seconds"])
        # Before the questions, whose load is another.
        rested = settled(ask)
        before, after = measured_loads(rested, 0), measured_loads(rested, -1)
        given = answers(server)
        seen = settled(ask)
        record_run(record, f"SGLang, {redundant} redundant experts", before, after, reader.gaps, profile)
        record("rearrangements", seen[0]["completed"])
        during = reader.gaps_during(move for report in rested for move in report["moves"])
        record_answers(record, given, plain, reader.gaps, during)

        check_served(seen, experts, completed=profile["rearrangements"], slack=slack)
        check_better(before, after, profile["balance_gain"])
        check_accuracy(given, profile["accuracy"])
        check_equal(given, plain[0], profile["equal_answers"])
        check_stall(during, profile["stall_seconds"])
        assert rearrangements_in(log) >= seen[0]["completed"]

        swap = moe.most_harmful_swap(ASKED)
        with_swapped_experts(moe.model, swap.layer, swap.expert, swap.others[0]).save_pretrained(moe.folder)
        try:
            server.reload_weights()
        finally:
            moe.model.save_pretrained(moe.folder)
        broken = answers(server)
        torn = settled(ask)
        caught = {
            caught_by(lambda: check_accuracy(broken, profile["accuracy"])),
            caught_by(lambda: check_equal(broken, plain[0], profile["equal_answers"])),
            caught_by(lambda: check_served(torn, experts, completed=0, slack=slack)),
        }
        record("two experts swapped, caught by", sorted(map(str, caught)))
        assert caught == {"accuracy is kept", "answers are those without EPLB", "weights match the map"}


def test_a_router_without_the_map_asks_for_experts_where_they_are_no_more(
    moe: TrainedMoe, plain: tuple[list[str], list[float]],
    results: Path, tmp_path: Path, profile: Profile, record: Record,
) -> None:  # fmt: skip
    """As SGLang 0.5.14 comes: without DeepEP its Qwen3-MoE asks by logical ids (models/qwen3_moe.py, forward_normal).

    Maps and weights are right, the canary is content, `/health` is 200, and the answers are wrong from the first
    rearrangement on. When this fails SGLang has mended it; then `sglang_eplb.mapped` can go, and this test with it.
    """
    skewed = skewed_prompts(moe, 0, profile)
    log = results / "sglang-eplb-as-it-comes.log"
    with eplb_server(moe, log, tmp_path, profile, 0) as server:

        def ask() -> list[Report]:
            return reports(server, tmp_path)

        experts = expert_digests(settled(ask))
        # Few: before the first rearrangement.
        first = complete_all(server, PROMPTS[:32], max_tokens=16)
        check_equal(first, plain[0][:32], profile["equal_answers"])
        assert reports(server, tmp_path)[0]["completed"] == 0
        skewed_traffic(server, skewed, ask, "completed", 1, profile["traffic_seconds"])
        given = answers(server)
        check_served(settled(ask), experts, completed=1, slack=STEP_OF_PLAN)
        server.request("/health")
        caught = {
            caught_by(lambda: check_accuracy(given, profile["accuracy"])),
            caught_by(lambda: check_equal(given, plain[0], profile["equal_answers"])),
        }
        record("as SGLang comes, caught by", sorted(map(str, caught)))
        assert caught == {"accuracy is kept", "answers are those without EPLB"}


def test_the_canary_ends_a_server_whose_experts_did_not_move(
    moe: TrainedMoe, results: Path, tmp_path: Path, profile: Profile
) -> None:
    """A map that is put in place without its weights: the first rearrangement's assert ends the service."""
    skewed = skewed_prompts(moe, 0, profile)
    log = results / "sglang-eplb-canary.log"
    variables = {**MAPPED, "DRYDOCK_SGLANG_MOVES_NOTHING": "1"}
    with eplb_server(moe, log, tmp_path, profile, 0, **variables) as server:
        with pytest.raises(ServerError):
            skewed_traffic(
                server, skewed, lambda: reports(server, tmp_path), "completed", 1, profile["traffic_seconds"]
            )
        assert "[EPLBManager] rebalance start" in log.read_text()
        assert "AssertionError: expect_value=" in log.read_text()

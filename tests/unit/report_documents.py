"""Session documents as the tiers and the session write them, for the tests of the report.

Seeded, so that two tests that ask for the same document get the same one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

Document = dict[str, Any]

SERVING = {
    "start": (3.1, 0.2, 20.0), "load": (5.2, 0.5, 40.0), "ready": (19.0, 5.0, 60.0), "test": (1.4, 0.0, 30.0),
    "stop": (1.9, 0.1, 15.0),
}  # fmt: skip
"""Phase -> usual seconds, floor and ceiling of a test that starts a server."""
QUICK = {"test": (0.6, 0.0, 30.0), "start": (0.02, 0.0, 20.0)}

TESTS: dict[str, list[tuple[str, dict[str, tuple[float, float, float]]]]] = {
    "rollout": [
        ("test_flags.py::test_the_parser_accepts_our_flags", {"test": (6.3, 1.0, 30.0)}),
        ("test_flags.py::test_the_parser_refuses_an_unknown_flag", {"test": (5.9, 1.0, 30.0)}),
        ("test_serving.py::test_the_api_lists_the_model[dense]", SERVING),
        ("test_serving.py::test_greedy_completions_repeat[dense]", QUICK),
        ("test_serving.py::test_log_probabilities_agree_with_transformers[dense]", {"test": (4.4, 0.5, 30.0)}),
        ("test_serving.py::test_another_prompt_gives_another_distribution[dense]", QUICK),
        ("test_serving.py::test_sixteen_requests_at_once[dense]", {"test": (3.4, 0.3, 30.0)}),
        ("test_serving.py::test_an_aborted_request_frees_its_slot[dense]", QUICK),
        ("test_serving.py::test_a_malformed_request_is_refused[dense]", QUICK),
        ("test_serving.py::test_too_long_a_prompt_is_refused[dense]", QUICK),
        ("test_serving.py::test_stopping_leaves_no_process_behind[dense]", {"test": (2.0, 0.1, 30.0)}),
        ("test_serving.py::test_the_api_lists_the_model[moe]", SERVING),
        ("test_serving.py::test_greedy_completions_repeat[moe]", QUICK),
        ("test_serving.py::test_log_probabilities_agree_with_transformers[moe]", {"test": (6.1, 0.5, 30.0)}),
        ("test_serving.py::test_sixteen_requests_at_once[moe]", {"test": (4.2, 0.3, 30.0)}),
        ("test_serving.py::test_stopping_leaves_no_process_behind[moe]", {"test": (2.1, 0.1, 30.0)}),
        ("test_weights.py::test_a_weight_update_changes_the_output", SERVING),
        ("test_weights.py::test_the_old_weights_bring_the_old_output_back", QUICK),
    ],
    "trainer": [
        *((f"test_advantages.py::test_{name}_against_numpy[{case}]", {"test": (0.05, 0.0, 10.0)})
          for name in ("gae", "grpo", "rloo") for case in ("short", "long", "one-token")),
        *((f"test_losses.py::test_masked_tokens_move_nothing[{name}]", {"test": (0.08, 0.0, 10.0)})
          for name in ("ppo_clip", "kl", "entropy")),
        ("test_grpo.py::test_reward_rises_beyond_chance",
         SERVING | {"test": (38.0, 10.0, 120.0), "ready": (21.0, 5.0, 60.0)}),
        ("test_checkpoint.py::test_resume_equals_continuous", {"test": (9.0, 1.0, 60.0)}),
        ("test_megatron.py::test_parallel_groups", {"start": (3.0, 0.0, 20.0), "test": (4.2, 0.5, 30.0)}),
        ("test_megatron.py::test_router_and_permutation_with_gloo", {"test": (4.0, 0.5, 30.0)}),
        ("test_transferqueue.py::test_what_is_put_is_got",
         {"start": (0.1, 0.0, 20.0), "ready": (17.0, 2.0, 60.0), "test": (1.1, 0.0, 30.0), "stop": (2.2, 0.0, 15.0)}),
    ],
    "eplb": [
        *((f"test_invariants.py::test_{name}[{policy}]", {"test": (seconds, 0.0, 30.0)})
          for policy in ("vllm-default", "ours")
          for name, seconds in (("every_expert_is_somewhere", 1.8), ("the_maps_are_inverses", 1.7),
                                ("ranks_hold_the_same_number_of_slots", 1.6), ("groups_stay_on_a_node", 1.2),
                                ("ties_and_zero_load", 0.7), ("one_hot_load", 0.4))),
        ("test_balance.py::test_balance_against_the_lower_bound", {"test": (3.9, 0.2, 30.0)}),
        ("test_balance.py::test_balance_against_our_own_planner", {"test": (4.6, 0.2, 30.0)}),
        ("test_balance.py::test_all_on_one_rank_reads_one_over_ranks", QUICK),
        ("test_ranks.py::test_all_ranks_compute_the_same_map", {"start": (4.0, 0.0, 20.0), "test": (2.2, 0.0, 30.0)}),
        ("test_churn.py::test_an_identical_load_moves_nothing", QUICK),
        ("test_churn.py::test_noise_of_one_percent", {"test": (2.8, 0.1, 30.0)}),
        ("test_time.py::test_planner_time", {"test": (1.9, 0.1, 30.0)}),
    ],
}  # fmt: skip

NOT_SELECTED = {
    "rollout": [
        ("test_long.py::test_restart_five_times_with_no_leak", "full profile only: five servers take minutes"),
        ("test_long.py::test_long_sequences", "full profile only: 4,096 tokens on two cores take minutes"),
        ("test_gsm8k.py::test_accuracy", "needs --gsm8k-model and --gsm8k-data"),
    ],
    "trainer": [
        ("test_main_ppo.py::test_verl_entry_point", "full profile only: verl's trainer needs a GPU")
    ],
    "eplb": [
        ("test_server.py::test_two_rearrangements", "full profile only: EPLB runs on GPUs only"),
        ("test_server.py::test_outputs_equal_without_eplb", "full profile only: EPLB runs on GPUs only"),
        ("test_server.py::test_swapped_experts_are_caught", "full profile only: EPLB runs on GPUs only"),
    ],
}  # fmt: skip

PROFILE_VALUES: dict[str, list[tuple[str, Any, Any, str]]] = {
    "rollout": [
        ("max_model_len", 256, 4096, "sequences that need more than a few KV-cache blocks, and their paging"),
        ("concurrent_requests", 16, 128, "scheduling under pressure: preemption and a full waiting queue"),
        ("hidden_size", 64, 2048, "kernels of the sizes that real models use"),
    ],
    "trainer": [
        ("rollout_n", 4, 16, "the spread of rewards in a large group"),
        ("train_batch_size", 16, 256, "memory held by activations and gradient accumulation"),
        ("steps", 30, 200, "drift that shows only after many updates"),
    ],
    "eplb": [
        ("experts", 32, 256, "ties and rounding among hundreds of experts"),
        ("layers", 4, 58, "planner time over all layers of a large model"),
        ("seed", 17, 17, ""),
    ],
}


def build(
    *,
    seed: int = 0,
    began: str = "2026-11-22T23:50:01Z",
    pace: float = 1.0,
    session: str = "vllm_fast",
    profile: str = "fast",
) -> Document:
    """A run in which everything passed: three tiers, 54 tests.

    Parameters:
        pace: factor on every time, for a faster or slower machine.
    """
    chance = random.Random(seed)
    tiers = [_tier(name, profile, began, pace, chance) for name in TESTS]
    steps = [{"name": "image", "seconds": 0.8}, {"name": "runtime", "seconds": 0.3}]
    steps.append({"name": "verification", "seconds": round(2.0 * pace, 3)})
    steps += [{"name": tier["tier"], "seconds": round(tier["seconds"] + 0.4, 3)} for tier in tiers]
    steps.append({"name": "report", "seconds": 1.3})
    seconds = round(sum(step["seconds"] for step in steps[2:]), 3)
    return {
        "schema": 1,
        "session": session,
        "engine": "vllm",
        "profile": profile,
        "image": {"name": "cpu-vllm", "digest": _digest("manifest"), "config_digest": _digest("config")},
        "drydock": {"commit": hashlib.sha1(b"drydock").hexdigest(), "dirty": False},
        "began": began,
        "seconds": seconds,
        "outcome": "passed",
        "detail": "",
        "runtime": "chroot",
        "device": {
            "kind": "cpu", "cpu": "AMD EPYC 9354 32-Core Processor", "cores": 2, "memory_bytes": 24 << 30, "gpus": [],
        },
        "verification": _verification(),
        "steps": steps,
        "overhead_seconds": round(seconds - sum(tier["seconds"] for tier in tiers), 3),
        "budget": {"ceiling": 480.0},
        "tiers": tiers,
        "not_run": [],
    }  # fmt: skip


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _verification() -> Document:
    checks = (("python", 1, 0.01, "3.13.5"), ("distributions", 222, 0.31, ""), ("files", 51_873, 0.92, ""),
              ("debs", 151, 0.24, ""), ("libraries", 688, 0.52, ""))  # fmt: skip
    made = [
        {"name": name, "state": "ok", "checked": checked, "seconds": seconds, "detail": detail, "findings": [],
         "unused": []}
        for name, checked, seconds, detail in checks
    ]  # fmt: skip
    made.append(
        {"name": "accelerator", "state": "not-applicable", "checked": 0, "seconds": 0.0,
         "detail": "the image needs none", "findings": [], "unused": []}
    )  # fmt: skip
    return {
        "schema": 1, "image": "cpu-vllm", "verdict": "ok", "full": False, "seconds": 2.0, "python": "3.13.5",
        "machine": "x86_64", "checks": made,
    }  # fmt: skip


def _tier(name: str, profile: str, began: str, pace: float, chance: random.Random) -> Document:
    tests = []
    for identifier, phases in TESTS[name]:
        used = {
            phase: round(usual * pace * chance.uniform(0.85, 1.2), 3)
            for phase, (usual, _, _) in phases.items()
        }  # fmt: skip
        budget = {
            phase: {"floor": floor, "ceiling": ceiling} for phase, (_, floor, ceiling) in phases.items()
        }  # fmt: skip
        tests.append(
            {
                "id": f"tests/{name}/{identifier}", "outcome": "passed", "phase": None, "message": None, "detail": None,
                "stacks": None, "seconds": round(sum(used.values()), 3), "phases": used, "budget": budget,
                "records": _records(identifier, chance),
            }
        )  # fmt: skip
    phases = _sums(tests)
    usual = {
        phase: sum(row[phase][0] for _, row in TESTS[name] if phase in row) for phase in phases
    }  # fmt: skip
    return {
        "schema": 1,
        "tier": name,
        "profile": profile,
        "image": "cpu-vllm",
        "began": began,
        "seconds": round(sum(phases.values()) + 2.6 * pace, 3),
        "outcome": "passed",
        "detail": "",
        "complete": True,
        "whole": True,
        "phases": phases,
        "budget": {
            "phases": {
                phase: {"floor": round(seconds * 0.2, 1), "ceiling": math.ceil(seconds * 1.7) + 1.0}
                for phase, seconds in usual.items()
            },
            "each": {"test": {"ceiling": 60.0}},
            "tests": {},
        },
        "tests": tests,
        "not_selected": [
            {"id": f"tests/{name}/{identifier}", "reason": reason}
            for identifier, reason in NOT_SELECTED[name]
        ],
        "profile_values": [
            {"name": parameter, "value": fast if profile == "fast" else full, "fast": fast, "full": full,
             "gives_up": gives_up}
            for parameter, fast, full, gives_up in PROFILE_VALUES[name]
        ],
        "survivors": [],
    }  # fmt: skip


def _sums(tests: Iterable[Document]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for test in tests:
        for phase, seconds in test["phases"].items():
            sums[phase] = round(sums.get(phase, 0.0) + seconds, 3)
    return sums


def _records(identifier: str, chance: random.Random) -> Document:
    name = identifier.partition("::")[2]
    if name == "test_reward_rises_beyond_chance":
        steps = list(range(1, 31))
        rewards = [
            round(0.1 + 0.62 / (1 + math.exp(-(step - 14) / 3)) + chance.gauss(0, 0.025), 4) for step in steps
        ]
        return {
            "series": {
                "title": "Mean reward of a small arithmetic task", "x": steps, "y": rewards, "x_label": "step",
                "y_label": "mean reward", "threshold": 0.4,
            }
        }  # fmt: skip
    if name == "test_balance_against_the_lower_bound":
        before = [[chance.paretovariate(1.3) * 900 for _ in range(8)] for _ in range(4)]
        after = [
            [sum(layer) / 8 * chance.uniform(0.94, 1.05) for _ in layer] for layer in before
        ]  # fmt: skip
        return {
            "expert_load": {
                "title": "Zipf load, vLLM's planner",
                "unit": "tokens",
                "before": before,
                "after": after,
            }
        }
    if name == "test_balance_against_our_own_planner":
        return {
            "expert_load": {
                "title": "One hot expert, our planner", "unit": "tokens",
                "before": [6200.0, 410.0, 390.0, 400.0], "after": [1890.0, 1840.0, 1835.0, 1835.0],
            }
        }  # fmt: skip
    if name == "test_noise_of_one_percent":
        return {
            "churn": {"moved": 870, "slots": 1152, "balance_change": round(chance.gauss(-0.0005, 1e-4), 6)}
        }
    if name == "test_planner_time":
        return {"planner_seconds": {"vllm": 0.104, "ours": 0.381}}
    if name == "test_log_probabilities_agree_with_transformers[moe]":
        return {"largest_difference": 0.0131}
    return {}


def find(document: Document, part: str) -> tuple[Document, Document]:
    """The first test whose id holds `part`, and its tier."""
    for tier in document["tiers"]:
        for test in tier["tests"]:
            if part in test["id"]:
                return tier, test
    raise LookupError(part)


TRACE = '''    def test_log_probabilities_agree_with_transformers(server: Server, reference: Model) -> None:
        ours = server.complete("12+34=", max_tokens=16, temperature=0.0, logprobs=1)
        theirs = reference.log_probabilities("12+34=", ours["text"])
>       assert np.abs(ours - theirs).max() < BOUND
E       AssertionError: assert 0.4811 < 0.05
E        +  where 0.4811 = max(abs([-0.0021, -0.6931, ...] - [-0.0021, -1.1742, ...]))

tests/rollout/test_serving.py:71: AssertionError
'''  # fmt: skip


def failing(document: Document | None = None) -> Document:
    """The same run with a failed assertion, an overrun, an underrun, missing hardware and tests that did not run."""
    document = copy.deepcopy(document or build())
    tier, test = find(document, "agree_with_transformers[moe]")
    test |= {
        "outcome": "failed", "phase": "test", "message": "AssertionError: assert 0.4811 < 0.05", "detail": TRACE,
    }  # fmt: skip
    tier |= {"outcome": "failed", "detail": "1 of 18 tests failed"}

    tier, test = find(document, "test_what_is_put_is_got")
    grown = 60.4 - test["phases"]["ready"]
    test["phases"] |= {"ready": 60.4, "test": 0.0}
    test |= {
        "outcome": "overrun", "phase": "ready", "seconds": round(sum(test["phases"].values()), 3),
        "message": "over its ceiling of 60.0 s in ready: TransferQueue's init did not return",
        "detail": "Thread 0x7f1c (most recent call first):\n  File \"ray/_private/worker.py\", line 2822 in get\n",
        "stacks": "stacks-test_what_is_put_is_got.txt",
    }  # fmt: skip
    _, slow = find(document, "test_gae_against_numpy[short]")
    slow |= {
        "outcome": "underrun", "phase": "test", "message": "0.04 s in test, under its floor of 1.0 s",
        "budget": {"test": {"floor": 1.0, "ceiling": 10.0}},
    }  # fmt: skip
    tier |= {
        "outcome": "overrun", "detail": "2 of 17 tests failed; ready took longer than its ceiling",
        "phases": _sums(tier["tests"]), "seconds": round(tier["seconds"] + grown, 3),
        "survivors": ["2417 raylet --session-dir /tmp/ray/session_1"],
    }  # fmt: skip

    tier, test = find(document, "test_all_ranks_compute_the_same_map")
    test |= {"outcome": "missing", "phase": "start", "message": "needs 2 GPUs and there are none"}
    for part in ("test_an_identical_load", "test_noise_of_one_percent", "test_planner_time"):
        _, test = find(document, part)
        test |= {
            "outcome": "not-run", "seconds": 0.0, "phases": {}, "records": {},
            "message": "the tier had been interrupted",
        }  # fmt: skip
    tier |= {"outcome": "interrupted", "detail": "stopped by the session's ceiling", "complete": False}
    tier["phases"] = _sums(tier["tests"])
    document["not_run"] = [{"what": "the throughput benchmark", "reason": "the session's ceiling was near"}]
    document["seconds"] = round(document["seconds"] + grown, 3)
    return document | {
        "outcome": "failed",
        "detail": "rollout: 1 of 18 tests failed; trainer: 2 of 17 tests failed",
    }


def crashed() -> Document:
    """One tier whose pytest died and left no document, no budgets, nothing verified."""
    document = build()
    tier = {
        "schema": 1, "tier": "rollout", "profile": "fast", "seconds": 12.5, "outcome": "crashed",
        "detail": "pytest ended with status -9 and left no document", "complete": False, "phases": {}, "budget": None,
        "tests": [], "not_selected": [], "profile_values": [], "survivors": [],
    }  # fmt: skip
    return document | {
        "tiers": [tier], "budget": None, "verification": None, "outcome": "failed", "detail": tier["detail"],
    }  # fmt: skip


def empty() -> Document:
    """A session that ended at its verification: no tier, no test."""
    document = build()
    document["verification"]["verdict"] = "drift"
    document["verification"]["checks"][1] |= {
        "state": "failed", "findings": [{"subject": "torch", "what": "2.11.1 is installed, 2.11.0 is locked"}],
    }  # fmt: skip
    return document | {
        "tiers": [], "steps": [], "outcome": "failed",
        "detail": "the image is not what its lock says (verification ended with status 1)",
        "not_run": [{"what": f"the {tier} tier", "reason": "verification failed"} for tier in TESTS],
    }  # fmt: skip


def huge(tests: int = 500) -> Document:
    """A run of many tests, every twentieth failed, with long names and a long trace each."""
    document = build()
    chance = random.Random(1)
    for number, tier in enumerate(document["tiers"]):
        pattern = tier["tests"]
        mine = range(number, tests, len(document["tiers"]))
        tier["tests"] = [copy.deepcopy(pattern[place % len(pattern)]) for place in mine]
        for place, test in zip(mine, tier["tests"], strict=True):
            test["id"] += f"[case-{place}-{'long-parameter-' * chance.randrange(6)}]"
            if place % 20 == 0:
                trace = "\n".join(f"frame {frame} of a deep stack" for frame in range(4000))
                test |= {"outcome": "failed", "phase": "test", "message": "x" * 3000, "detail": trace}
        tier |= {"phases": _sums(tier["tests"]), "outcome": "failed", "detail": "tests failed"}
        tier["seconds"] = sum(tier["phases"].values()) + 5.0
    return document | {"outcome": "failed", "detail": "tests failed"}


HOSTILE = (
    "</title></style></pre><script>document.title = 'pwned'</script><img src=x onerror=alert(1)>"
    "\x00\x07\x1b[31mred\x1b[0m\x7f\x85\udcff\ud800\ufffe\uffff\u202e\u2028]]>--> &amp; \"'` $x^{$ {{ 7*7 }} 日本語 🚢 "
)


def hostile() -> Document:
    """Every text that a test or an image can choose is hostile, and some lines are very long."""
    document = failing()
    document["detail"] = HOSTILE
    document["image"]["name"] += HOSTILE
    document["device"]["cpu"] = HOSTILE
    document["not_run"].append({"what": HOSTILE, "reason": HOSTILE})
    document["verification"]["checks"][0]["findings"] = [{"subject": HOSTILE, "what": "y" * 4000}]
    for tier in document["tiers"]:
        tier["detail"] = HOSTILE + "z" * 4000
        tier["survivors"] = [HOSTILE]
        for row in tier["not_selected"]:
            row |= {"id": row["id"] + HOSTILE, "reason": HOSTILE}
        for row in tier["profile_values"]:
            row |= {"name": HOSTILE, "gives_up": HOSTILE, "full": HOSTILE}
        for test in tier["tests"]:
            test |= {
                "id": f"{test['id']}[{HOSTILE}{'w' * 500}]", "message": HOSTILE + "v" * 4000,
                "detail": f"{HOSTILE}\n{'u' * 4000}\n\ttab", "stacks": HOSTILE,
            }  # fmt: skip
            for record in test["records"].values():
                if isinstance(record, dict):
                    record |= {"title": HOSTILE, "unit": HOSTILE}
            test["records"] |= {HOSTILE: {HOSTILE: HOSTILE}}
    return document


def save_runs(folder: Path, count: int = 5) -> None:
    """Earlier runs as a session leaves them: one folder each, and `latest` on the last."""
    first = datetime(2026, 11, 17, 9, 30, tzinfo=UTC)
    for number in range(count):
        began = (first + timedelta(days=number)).strftime("%Y-%m-%dT%H:%M:%SZ")
        document = build(seed=number + 1, began=began, pace=1.25 - 0.05 * number)
        if number == 2:
            _, test = find(document, "test_reward_rises")
            test |= {"outcome": "failed", "phase": "test", "message": "0.31 is not beyond 0.4"}
            document["tiers"][1] |= {"outcome": "failed", "detail": "1 of 17 tests failed"}
            document["outcome"] = "failed"
        run = folder / began.replace(":", "")
        run.mkdir(parents=True)
        (run / "report.json").write_text(json.dumps(document))
    if count:
        (folder / "latest").symlink_to(run.name)

"""SGLang's own EPLB between two processes on a CPU, its canary on: it moves what it plans, and no move is seen."""

# contract: sglang
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from balance import balance
from checks import check_better, check_served, measured_loads
from sglang_ranks import EXPERTS, LAYERS, RANKS, serve, weights
from worker_extension import digests

pytestmark = pytest.mark.engine("sglang")


def run(folder: Path, redundant: int, fault: str = "") -> None:
    arguments = (str(folder / "store"), str(folder), redundant, fault)
    torch.multiprocessing.spawn(serve, arguments, nprocs=RANKS)


@pytest.mark.parametrize("redundant", [0, 4])
def test_experts_lie_where_the_plan_has_them(redundant: int, tmp_path: Path, record: Any) -> None:
    run(tmp_path, redundant)
    seen = [
        report for rank in range(RANKS) for report in json.loads((tmp_path / f"rank-{rank}.json").read_text())
    ]
    experts = [digests(weights(layer, list(range(EXPERTS)))) for layer in range(LAYERS)]
    check_served(seen, experts, completed=2, slack=0)
    before, after = measured_loads(seen, 0), measured_loads(seen, -1)
    record("balance", {"before": float(balance(before).mean()), "after": float(balance(after).mean())})
    check_better(before, after, 0.1)


def test_the_canary_sees_that_nothing_moved(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AssertionError: expect_value="):
        run(tmp_path, 0, "DRYDOCK_SGLANG_MOVES_NOTHING")

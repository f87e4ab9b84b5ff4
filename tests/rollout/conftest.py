"""The rollout tier's server: one real vLLM on a tiny model for all of its tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from drydock.server import Server, vllm_command
from tiny_models import make_qwen3_moe

RESULTS = Path(os.environ.get("DRYDOCK_RESULTS", "/results"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_qwen3_moe(tmp_path_factory.mktemp("qwen3-moe"))
    flags = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with Server(vllm_command(model, *flags), RESULTS / "vllm-server.log", environment) as running:
        print(f"\nvLLM was ready after {running.ready_seconds:.1f} s")
        yield running

"""SGLang's KV canary: beside each slot of its cache stands whose it is and a hash of what lies there.

A request that reads another's slots, or one that was written to in between, gets a plausible answer to another prompt.
SGLang ships ways to break its own cache on purpose; a flipped byte changes no table, so that the server goes on.
"""

# contract: sglang
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from client import at_once, generate, random_prompt
from conftest import Launch
from reference import kind_for
from speech import speech

pytestmark = [pytest.mark.engine("sglang"), pytest.mark.serves]

CALM = 400
"""Steps of the model before it begins to flip bytes: warm-up included, more than the undisturbed requests take."""
# Its buffers have room for every slot of the cache, which is therefore no larger than it must be.
FLAGS = ["--kv-canary", "log", "--kv-canary-real-data", "all", "--max-total-tokens", "65536"]
ENVIRONMENT = {
    # Tokens are compared with the request's, too.
    "SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT": "1",
    "SGLANG_KV_CANARY_PERTURB_WARMUP_STEPS": str(CALM),
    "SGLANG_KV_CANARY_PERTURB_REAL_KV_USED_PROB": "1.0",
    "SGLANG_KV_CANARY_PERTURB_TARGET_GROUP": "full",
}
VIOLATION = re.compile(r"kv_canary violation: launch_tag=(\S+) fail_reason=(\S+)")


def test_a_byte_of_the_cache_that_changes_is_seen(
    launch: Launch, profile: Mapping[str, Any], results: Path, tmp_path: Path, record: Any
) -> None:
    """And before it none is: of requests at once, in chunks, and with their prompts in the cache."""
    kind = kind_for("dense", "sglang")
    launch = replace(launch, environment={**launch.environment, **ENVIRONMENT})
    log = results / "sglang-kv-canary.log"
    prompts = [
        random_prompt(length, seed=1200 + length) for length in (5, 40, max(profile["prompt_lengths"]))
    ]
    with launch.server(kind.make(tmp_path, 0), kind, log, *FLAGS) as server:
        for _ in range(2):
            at_once(lambda prompt: generate(server, prompt, 16), prompts)
        assert "perturb: enabled" not in log.read_text(), "too few steps before bytes are flipped"
        calm = VIOLATION.findall(log.read_text())
        while speech(server).steps(server) < 2 * CALM:
            at_once(lambda prompt: generate(server, prompt, 64), prompts)
        broken = VIOLATION.findall(log.read_text())
    assert "install_canary" in log.read_text(), "the canary is not on"
    record("violations", {"undisturbed": len(calm), "bytes flipped": len(broken)})
    assert calm == []
    assert broken
    assert any("real_kv" in reason for _, reason in broken)

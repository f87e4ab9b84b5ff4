"""Has `sync_probe` watch SGLang's scheduler: verl starts it as a process of its own, where none of its modules are."""

# contract: sglang
from __future__ import annotations

from sglang.srt.model_executor.model_runner import ModelRunner
from sync_probe import noting_held

ModelRunner.update_weights_from_tensor = noting_held(
    ModelRunner.update_weights_from_tensor, lambda runner: runner.model
)

"""Has `sync_probe` watch SGLang's scheduler: verl starts it as a process of its own, where none of its modules are."""

# contract: sglang
from __future__ import annotations

import sync_probe
from sglang.srt.model_executor import model_runner

sync_probe.watch_sglang(model_runner)

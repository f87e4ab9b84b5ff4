"""Gives the router of SGLang's Qwen3-MoE the map that it leaves out, where `VARIABLE` says so.

Without DeepEP 0.5.14 asks for experts by their logical ids (models/qwen3_moe.py, `forward_normal`), wherever EPLB has
moved them to: with DeepEP, which is in no image here, it gives the map along (`forward_deepep`).
"""

# contract: sglang
from __future__ import annotations

import os
from typing import Any

from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.models import qwen3_moe

VARIABLE = "DRYDOCK_SGLANG_MAPPED"


class MappedTopK(TopK):
    """As in `forward_deepep`."""

    def forward(self, hidden_states: Any, router_logits: Any) -> Any:
        where = ExpertLocationDispatchInfo.init_new(layer_id=self.layer_id)
        return super().forward(hidden_states, router_logits, expert_location_dispatch_info=where)


if os.environ.get(VARIABLE):
    qwen3_moe.TopK = MappedTopK

"""Starts an inference server, knows when it really answers, and ends it with everything it started.

Used by the tiers inside an image, so: standard library only.

>>> with Server(VLLM, model, ["--dtype", "bfloat16"], log=results / "vllm.log") as server:
...     server.complete("1+1=", max_tokens=4, temperature=0.0)["text"]
"""

from drydock.server.engines import SGLANG, TRTLLM, VLLM, Engine
from drydock.server.errors import FlagError, NoAnswer, NoConnection, ServerError
from drydock.server.harness import Server

__all__ = [
    "SGLANG", "TRTLLM", "VLLM", "Engine", "FlagError", "NoAnswer", "NoConnection", "Server", "ServerError",
]  # fmt: skip

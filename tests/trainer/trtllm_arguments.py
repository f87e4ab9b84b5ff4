"""Lets verl 0.8.0 start a model on TensorRT-LLM 1.2.1: an argument that it gives has another name there.

verl imports this in each of its processes (VERL_USE_EXTERNAL_MODULES). It gives `sleep_config`, None where it cannot
make one; TensorRT-LLM took that in place of `enable_sleep` in 1.3.0, and refuses an argument that it does not know. Not
seen running: it is read from both sources. With a base that has `sleep_config` it changes nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ENGINE = "tensorrt_llm"


def known(given: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """verl's arguments in the engine's names: a model that can sleep is asked for by the name that the engine has."""
    if "sleep_config" in fields:
        return given
    return {**{name: value for name, value in given.items() if name != "sleep_config"}, "enable_sleep": True}


def translate(module: ModuleType) -> None:
    """Put a function in the place of the engine's AsyncLLM, which verl calls and nothing else."""
    make: Callable[..., Any] = module.AsyncLLM

    def translated(**given: Any) -> Any:
        from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

        return make(**known(given, TorchLlmArgs.model_fields))

    module.AsyncLLM = translated  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    """Lets the engine load as always and then changes it; to import it here would be too early."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            translate(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    sys.meta_path.insert(0, Finder())

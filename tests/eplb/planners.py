"""Finds the EPLB planner of every installed engine and loads it from its file, without the engine around it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a planner is asked to fill: logical experts in groups, physical slots on ranks, ranks on nodes."""

    experts: int
    slots: int
    groups: int
    nodes: int
    ranks: int

    @property
    def hierarchical(self) -> bool:
        """Whether groups can be kept on a node each; otherwise a planner balances over all ranks at once."""
        return self.groups % self.nodes == 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which logical expert each physical slot holds, and the way back.

    phy2log: [layers, slots]; log2phy: [layers, experts, at least the most replicas], padded with -1;
    logcnt: [layers, experts].
    """

    phy2log: np.ndarray
    log2phy: np.ndarray
    logcnt: np.ndarray


class Planner(Protocol):
    """One engine's planner; `load` is [layers, experts], `old` the phy2log that is in place."""

    name: str
    keeps_slots: bool

    def plan(self, load: np.ndarray, shape: Shape, old: np.ndarray | None = None) -> Plan: ...


class VllmPlanner:
    """vLLM's default policy, and its derivation of the logical maps."""

    name = "vllm"
    keeps_slots = True
    files = ("distributed/eplb/policy/default.py", "distributed/eplb/eplb_state.py")

    def __init__(self, package: Path) -> None:
        policy, state = (package / name for name in self.files)
        # The package's own __init__ would import all of vLLM, 6 s of it; the policy needs its neighbour
        # `abstract` only, so it gets a parent that is an empty package over the same folder.
        parent = types.ModuleType("vllm_eplb_policy")
        parent.__path__ = [str(policy.parent)]
        sys.modules[parent.__name__] = parent
        self._policy = importlib.import_module(f"{parent.__name__}.{policy.stem}").DefaultEplbPolicy
        self._logical_maps = _function(state, "compute_logical_maps")

    def plan(self, load: np.ndarray, shape: Shape, old: np.ndarray | None = None) -> Plan:
        phy2log = self._policy.rebalance_experts(
            torch.from_numpy(load), shape.slots, shape.groups, shape.nodes, shape.ranks,
            None if old is None else torch.from_numpy(old),
        )  # fmt: skip
        log2phy, logcnt = self._logical_maps(phy2log, shape.experts)
        return Plan(phy2log=phy2log.numpy(), log2phy=log2phy.numpy(), logcnt=logcnt.numpy())


class SglangPlanner:
    """SGLang's copy of DeepSeek's planner; it does not know what is in place."""

    name = "sglang"
    keeps_slots = False
    files = ("srt/eplb/eplb_algorithms/deepseek.py",)

    def __init__(self, package: Path) -> None:
        spec = importlib.util.spec_from_file_location("sglang_eplb_deepseek", package / self.files[0])
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._rebalance = module.rebalance_experts

    def plan(self, load: np.ndarray, shape: Shape, old: np.ndarray | None = None) -> Plan:  # noqa: ARG002
        # The engine itself asks for the hierarchical policy exactly when the groups divide by the nodes.
        maps = self._rebalance(
            torch.from_numpy(load), shape.slots, shape.groups, shape.nodes, shape.ranks, shape.hierarchical
        )
        return Plan(
            **dict(zip(("phy2log", "log2phy", "logcnt"), (each.numpy() for each in maps), strict=True))
        )


ENGINES: tuple[type[VllmPlanner] | type[SglangPlanner], ...] = (VllmPlanner, SglangPlanner)


def find_planners(path: Sequence[str] | None = None) -> list[Planner]:
    """The planner of every engine installed on `path` (the interpreter's own if None).

    Raises:
        LookupError: an engine is installed without the planner this tier knows, or none is installed.
    """
    found: list[Planner] = []
    for engine in ENGINES:
        spec = PathFinder.find_spec(engine.name, path)
        if spec is None:
            continue
        package = Path(next(iter(spec.submodule_search_locations or [])))
        if missing := [name for name in engine.files if not (package / name).is_file()]:
            raise LookupError(
                f"{engine.name} is installed in {package} without {', '.join(missing)}: its planner has moved; "
                "find it and correct `files` in tests/eplb/planners.py"
            )
        found.append(engine(package))
    if not found:
        names = " or ".join(engine.name for engine in ENGINES)
        raise LookupError(f"no engine with an EPLB planner is installed ({names}): run this tier in an image")
    return found


def _function(file: Path, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """One function of a module that is too expensive to import, compiled from the module's own text."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            names: dict[str, object] = {"torch": torch}
            exec(compile(ast.Module([node], []), file, "exec"), names)
            return names[name]
    raise LookupError(f"{file} has no function {name}: correct tests/eplb/planners.py")

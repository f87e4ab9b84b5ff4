"""The rollout tier's servers: real ones on tiny models, a dense and a mixture of experts, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from client import VOCABULARY
from reference import KINDS, Kind, Reference, Scored, score

from drydock.server import VLLM, Server
from tiny_models import EXACT


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the tier starts vLLM, whatever the model."""

    flags: list[str]
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is being served."""

    server: Server
    folder: Path
    kind: Kind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what starts servers of its own, then a model after the other, and what stops a server last.

    Two servers do not fit on one accelerator: each takes all the memory that it is given.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "launch" in fixtures:
            item.add_marker(pytest.mark.engine("vllm"))
        if "served" in fixtures:
            item.add_marker(pytest.mark.serves)

    def place(item: pytest.Item) -> tuple[str, bool]:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("served", ""), item.get_closest_marker("stops_the_server") is not None

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stops_the_server: runs after all others that use the same server")


@pytest.fixture(scope="session")
def launch(profile: Mapping[str, Any]) -> Launch:
    flags = [
        "--max-model-len", str(profile["max_model_len"]),
        "--max-num-seqs", str(profile["max_num_seqs"]),
        "--max-num-batched-tokens", str(profile["max_num_batched_tokens"]),
        "--max-logprobs", str(VOCABULARY),
        "--enable-server-load-tracking",
    ]  # fmt: skip
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        **EXACT,
    }
    if not profile["compile"]:
        flags.append("--enforce-eager")
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return Launch(flags=flags, environment=environment)


@pytest.fixture(scope="session", params=list(KINDS))
def served(
    request: pytest.FixtureRequest, launch: Launch, results: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    kind = KINDS[request.param]
    folder = kind.make(tmp_path_factory.mktemp(request.param), 0)
    flags = ["--dtype", kind.dtype, *launch.flags]
    log = results / f"vllm-{request.param}.log"
    with Server(VLLM, folder, flags, log=log, environment=launch.environment) as server:
        yield Served(server=server, folder=folder, kind=kind)


@pytest.fixture(scope="session")
def server(served: Served) -> Server:
    return served.server


@pytest.fixture(scope="session")
def reference(served: Served) -> Reference:
    return Reference(served.folder, served.kind)


@pytest.fixture(scope="session")
def answers(server: Server, profile: Mapping[str, Any]) -> list[Scored]:
    """What the server says of the profile's prompts, with the weights it started with."""
    return score(server, profile["prompt_lengths"], profile["new_tokens"])

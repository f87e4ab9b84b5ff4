"""The rollout tier's servers: real ones on tiny models, a dense and a mixture of experts, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference import KINDS, Kind, Reference, Scored, kind_for, score
from speech import SPEECHES, Speech

from drydock.server import Server


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the tier starts the image's engine, whatever the model."""

    words: Speech
    profile: Mapping[str, Any]
    files: Path
    environment: dict[str, str]

    def flags(self, dtype: str) -> list[str]:
        """For a model that is served in this type."""
        return self.words.flags(self.profile, dtype, self.files)

    def server(self, folder: Path, kind: Kind, log: Path, *more: str) -> Server:
        """The engine's server of a model; `more` are flags."""
        flags = [*self.flags(kind.dtype), *more]
        # SGLang compiles kernels at its first start: nvcc takes some ten seconds for each.
        return Server(
            self.words.engine, folder, flags, log=log, environment=self.environment, ready_timeout=600
        )


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
        # TensorRT-LLM's libraries need the driver's, so that its parser cannot be asked without a GPU either.
        if "served" in fixtures or ("launch" in fixtures and item.config.getoption("engine") == "trtllm"):
            item.add_marker(pytest.mark.serves)

    def place(item: pytest.Item) -> tuple[str, bool]:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("served", ""), item.get_closest_marker("stops_the_server") is not None

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stops_the_server: runs after all others that use the same server")


@pytest.fixture(scope="session")
def launch(engine: str, profile: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    words = SPEECHES[engine]
    environment = dict(words.environment)
    if not profile["compile"]:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return Launch(
        words=words, profile=profile, files=tmp_path_factory.mktemp("options"), environment=environment
    )


@pytest.fixture(scope="session", params=list(KINDS))
def served(
    request: pytest.FixtureRequest,
    engine: str,
    launch: Launch,
    results: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    kind = kind_for(request.param, engine)
    folder = kind.make(tmp_path_factory.mktemp(request.param), 0)
    with launch.server(folder, kind, results / f"{engine}-{request.param}.log") as server:
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

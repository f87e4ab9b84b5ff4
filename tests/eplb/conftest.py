"""The EPLB tier's fixtures: the planners of the engines in the image, a trained MoE, ranks and servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

sys.path.insert(0, str(Path(__file__).parents[1]))

from fleet import Fleet
from planners import Planner, find_planners
from reference_planner import ReferencePlanner
from trained_moe import TrainedMoe, train

# Sums in one order, so that a model trained here is the same every time; at this size two threads are no faster.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What exchanges weights in the fleet, and what the servers are asked through, is vLLM's."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if {"fleet", "server"} & set(fixtures):
            item.add_marker(pytest.mark.engine("vllm"))
        if "server" in fixtures:
            item.add_marker(pytest.mark.serves)


# At import, so that an image without a planner, or with one that has moved, fails the tier before anything runs.
PLANNERS = find_planners()


@pytest.fixture(scope="session", autouse=True)
def hypothesis_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hypothesis keeps what it reads of our sources in a folder; not in the one the tier is started from."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture(params=PLANNERS, ids=lambda planner: planner.name)
def planner(request: pytest.FixtureRequest) -> Planner:
    found: Planner = request.param
    return found


@pytest.fixture(scope="session")
def reference() -> Planner:
    return ReferencePlanner()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Fleet]:
    with Fleet(4) as ranks:
        yield ranks


@pytest.fixture
def fleet(four_ranks: Fleet) -> Fleet:
    """Four ranks over gloo with vLLM's EPLB in each."""
    four_ranks.start()
    return four_ranks


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory, profile: Mapping[str, Any]) -> TrainedMoe:
    """The MoE that answers arithmetic, trained here and now."""
    return train(tmp_path_factory.mktemp("trained-moe"), steps=profile["training_steps"])

"""Which waits for a token are a rearrangement's, and which the server's own."""

from __future__ import annotations

import pytest
from checks import caught_by
from traffic import Reader, check_stall, last_moves

from drydock.server import VLLM, Server

WAITS = [(0.0, 0.9), (0.9, 1.0), (1.0, 1.1), (1.1, 1.9), (1.9, 2.0), (2.0, 2.1)]


@pytest.fixture
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """One that has waited; its server was never started."""
    folder = tmp_path_factory.mktemp("none")
    reader = Reader(Server(VLLM, folder, [], log=folder / "log"), "")
    reader.waits = list(WAITS)
    return reader


def test_a_wait_is_a_rearrangements_where_they_overlap(reader: Reader) -> None:
    # The long first one is none: no expert moved.
    assert reader.gaps_during([(1.02, 1.05)]) == pytest.approx([0.1, 0.8])
    assert reader.gaps_during([(0.95, 1.15)]) == pytest.approx([0.1, 0.1, 0.8, 0.1])
    assert reader.gaps_during([(2.05, 3.0)]) == pytest.approx([0.1])
    assert reader.gaps_during([(5.0, 6.0)]) == []


def test_a_stall_while_experts_move_and_nobody_who_waits_are_seen(reader: Reader) -> None:
    check_stall(reader.gaps_during([(1.95, 2.05)]), 0.5)
    for moves in ([(1.2, 1.3)], [(5.0, 6.0)]):
        during = reader.gaps_during(moves)
        assert caught_by(lambda during=during: check_stall(during, 0.5)) == "stall within its budget"


def test_the_last_rearrangements_are_those_of_every_rank() -> None:
    ranks = [{"moves": [[0.0, 0.8], [1.0, 1.1], [2.0, 2.1]]}, {"moves": [[0.5, 0.9]]}, {"moves": []}]
    assert last_moves(ranks, 2) == [[1.0, 1.1], [2.0, 2.1], [0.5, 0.9]]

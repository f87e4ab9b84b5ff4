"""The runner of ranks says which rank failed, died or hung, and where; without it a group's test tells nothing."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed
from ranks import RankError, run_ranks

pytestmark = pytest.mark.usefixtures("preloaded")


def add_up(number: int) -> int:
    total = torch.tensor(number + torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    return int(total)


def fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("an expert is missing")


def die_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(7)


def hang_on_one() -> None:
    while torch.distributed.get_rank() == 1:
        time.sleep(0.1)


def test_ranks_reduce_together() -> None:
    assert run_ranks(add_up, 2, 10) == [21, 21]


def test_a_rank_that_fails_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*in fail_on_one.*an expert is missing"):
        run_ranks(fail_on_one, 2, deadline=10)


def test_a_rank_that_dies_is_named_with_its_status() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 ended with status 7"):
        run_ranks(die_on_one, 2, deadline=10)


def test_a_rank_that_hangs_is_ended_and_its_stack_is_told() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 was killed.*in hang_on_one"):
        run_ranks(hang_on_one, 2, deadline=6)
    assert time.monotonic() - began < 16

"""The engine's own parser takes the flags that the tier uses, and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from client import VOCABULARY, at_once
from conftest import Launch, Served

from drydock.server import VLLM, FlagError


def test_what_the_parser_does_not_know_is_refused(launch: Launch) -> None:
    """An unknown flag, and a value that is none of the choices."""

    def words(wrong: tuple[str, str]) -> str:
        # The parser's own flags are in order, or it would complain about them.
        with pytest.raises(FlagError) as refusal:
            VLLM.parse([*launch.flags, *wrong])
        return str(refusal.value)

    flag, value = at_once(words, [("--no-such-flag", "1"), ("--dtype", "float12")])  # contract: refused
    assert "--no-such-flag" in flag  # contract: refused
    assert "--dtype" in value
    assert "float12" in value


def test_our_flags_arrive_as_they_were_meant(served: Served, profile: Mapping[str, Any]) -> None:
    accepted = served.server.accepted
    assert accepted["dtype"] == served.kind.dtype
    assert accepted["enforce_eager"] is not profile["compile"]
    assert accepted["max_logprobs"] == VOCABULARY
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        assert accepted[name] == profile[name]

"""The engine's own parser takes the flags that the tier uses, and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from client import at_once
from conftest import Launch, Served

from drydock.server import FlagError


# vLLM's parser asks first what device there is, and ends where it is made for one and there is none.
@pytest.mark.serves("vllm")
def test_what_the_parser_does_not_know_is_refused(launch: Launch) -> None:
    """An unknown flag, and a value that is none of the choices."""

    engine = launch.words.engine

    def words(wrong: tuple[str, str]) -> str:
        # The parser's own flags are in order, or it would complain about them.
        with pytest.raises(FlagError) as refusal:
            engine.parse(
                engine.flags(
                    [*launch.flags("auto"), *wrong], model="/nowhere", name="none", host="127.0.0.1", port=1
                )
            )
        return str(refusal.value)

    choice = launch.words.wrong_choice
    flag, value = at_once(words, [("--no-such-flag", "1"), choice])  # contract: refused
    assert "--no-such-flag" in flag  # contract: refused
    assert choice[0] in value
    assert choice[1] in value


def test_our_flags_arrive_as_they_were_meant(
    served: Served, launch: Launch, profile: Mapping[str, Any]
) -> None:
    accepted = served.server.accepted
    assert accepted["dtype"] == served.kind.dtype
    for name, value in launch.words.accepted(profile).items():
        assert accepted[name] == value
    for name, theirs in launch.words.names.items():
        assert accepted[theirs] == profile[name]

"""A server can be started again and again: it answers as exactly as the first time, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from client import generate, random_prompt
from conftest import Launch
from reference import Reference, compare, kind_for, scored


def left_behind() -> dict[str, Any]:
    """What a server could leave: shared memory, temporary files, and open files of this process."""
    return {
        "shared": {path.name for path in Path("/dev/shm").iterdir()},
        "temporary": {path.name for path in Path(tempfile.gettempdir()).iterdir()},
        "open": len(list(Path("/proc/self/fd").iterdir())),
    }


@pytest.mark.serves
@pytest.mark.full("five starts of a server take minutes")
def test_every_start_is_like_the_first(
    engine: str, launch: Launch, profile: Mapping[str, Any], results: Path, tmp_path: Path, record: Any
) -> None:
    kind = kind_for("dense", engine)
    folder = kind.make(tmp_path, 0)
    shared = left_behind()["shared"]
    found, seconds, left, dropped = [], [], [], []
    for number in range(profile["starts"]):
        with launch.server(folder, kind, results / f"{engine}-start-{number + 1}.log") as server:
            found.append(generate(server, random_prompt(20, seed=800), profile["new_tokens"]))
            assert server.stop() == {}, f"start {number + 1} had to be killed"
        assert server.survivors() == {}
        seconds.append(server.ready_seconds)
        left.append(left_behind())
        dropped.append(len(server.leftovers))
    # Which went with the server's own temporary folder; without one, a rollout engine that is restarted fills /tmp.
    record("files_the_engine_left_in_its_temporary_folder", dropped)
    record("series", {"title": "Seconds until a server is ready", "x": list(range(1, len(seconds) + 1)), "y": seconds,
                      "x_label": "start", "y_label": "s", "threshold": None})  # fmt: skip
    # Not the same bits: a first start compiles what the others find compiled, and kernels are chosen by their time.
    record("the_same_bits_as_first", sum(answer == found[0] for answer in found) / len(found))
    assert compare(Reference(folder, kind), [scored(answer) for (answer,) in found]).beyond == []
    assert left[0]["shared"] == shared
    # The first start may fill caches that the others use; after it nothing may come to what is there.
    assert left == left[:1] * profile["starts"]

"""TransferQueue starts where ray has CPUs enough, says so where not, and leaves nothing behind, even when it hangs."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from children import Ended, run_child

UNITS = 2
"""TransferQueue's own default; with its controller, three actors of one CPU each."""


def run_queue(results: Path, name: str, deadline: float, **options: Any) -> tuple[Ended, str, str]:
    """Run queue_child.py; how it ended, and its output and errors, which stay in the results."""
    output, errors = (results / f"transfer-queue-{name}.{kind}" for kind in ("out", "err"))
    # A short path: ray's sockets are in it, and a socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="tq-", dir="/tmp") as folder:
        given = {"folder": folder, "units": UNITS, "stack_after": deadline * 0.9, **options}
        ended = run_child(
            [sys.executable, "-W", "ignore", str(Path(__file__).with_name("queue_child.py")), json.dumps(given)],
            output=output, errors=errors, deadline=deadline,
            environment={"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
    return ended, output.read_text(), errors.read_text()


def test_a_batch_goes_through_and_nothing_is_left(
    profile: Mapping[str, Any], results: Path, record: Any
) -> None:
    deadline = profile["queue_deadline"]
    ended, output, errors = run_queue(results, "batch", deadline, cpus=profile["queue_cpus"], check=True)
    assert ended.status == 0, f"status {ended.status} within {deadline} s\n{errors}"
    said = json.loads(output.splitlines()[-1])
    record("transfer_queue_seconds", said["seconds"])
    assert said["moved"] == dict.fromkeys(("whole", "turned", "part", "listed", "cleared"), True)
    assert said["shm"] < 16 * 2**20, "in a Docker container /dev/shm has 64 MiB"
    assert ended.left == []


def test_too_few_cpus_are_told_before_the_start(profile: Mapping[str, Any], results: Path) -> None:
    ended, _, errors = run_queue(results, "check", profile["queue_deadline"], cpus=UNITS, check=True)
    assert ended.status == 1, errors
    assert "needs 3 CPUs of ray, which has 2" in errors.splitlines()[-1]
    assert ended.left == []


@pytest.mark.full("it proves that what the check refuses does hang, and so takes its whole deadline")
def test_a_start_that_hangs_is_ended_at_its_deadline(profile: Mapping[str, Any], results: Path) -> None:
    ended, _, errors = run_queue(results, "hang", profile["queue_hang_deadline"], cpus=UNITS, check=False)
    assert ended.status is None, "it does not hang any more: then the check can go"
    assert "in process_zmq_server_info" in errors, errors
    assert ended.left == []

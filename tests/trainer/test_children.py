"""The runner of children sees what is left behind, and ends what does not end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import children
import pytest
from children import Ended, run_child


def run(tmp_path: Path, code: str, deadline: float) -> Ended:
    return run_child(
        [sys.executable, "-c", code], output=tmp_path / "out", errors=tmp_path / "err", deadline=deadline,
        environment={"GIVEN": "yes"},
    )  # fmt: skip


def test_a_child_that_ends_its_own(tmp_path: Path) -> None:
    ended = run(tmp_path, "import os, sys; print(os.environ['GIVEN']); sys.exit(3)", 30)
    assert ended == Ended(status=3, left=[])
    assert (tmp_path / "out").read_text() == "yes\n"


def test_a_daemon_that_stays_is_named_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "DAEMONS_SECONDS", 1.0)
    daemon = "import time; time.sleep(77)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {daemon!r}], start_new_session=True)"
    ended = run(tmp_path, code, 30)
    assert ended.status == 0
    assert len(ended.left) == 1
    assert "sleep(77)" in ended.left[0]


def test_a_hang_is_ended_at_its_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(tmp_path, "while True: pass", 1) == Ended(status=None, left=[])
    assert time.monotonic() - began < 20

"""verl's arguments reach an engine that has another name for one of them, and no other engine is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = Path(__file__).parents[1] / "trainer"
GIVEN = {"model": "m", "max_seq_len": 5, "sleep_config": None}
PACKAGE = {
    "__init__.py": """
        def AsyncLLM(**given):
            from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
            assert given.keys() <= TorchLlmArgs.model_fields.keys(), sorted(given)
            return given
    """,
    "llmapi/__init__.py": "",
}


def started(tmp_path: Path, fields: list[str], modules: str) -> subprocess.CompletedProcess[str]:
    """What verl's server does: its package imports the modules, and then it asks the engine for a model."""
    for path, text in {
        **PACKAGE,
        "llmapi/llm_args.py": f"class TorchLlmArgs:\n    model_fields = dict.fromkeys({fields})\n",
    }.items():
        file = tmp_path / "tensorrt_llm" / path
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
    script = (
        "import importlib, json, os\n"
        "[importlib.import_module(name) for name in os.environ['VERL_USE_EXTERNAL_MODULES'].split(',') if name]\n"
        f"from tensorrt_llm import AsyncLLM\nprint(json.dumps(AsyncLLM(**json.loads('{json.dumps(GIVEN)}'))))\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{TRAINER}", "VERL_USE_EXTERNAL_MODULES": modules}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        (["model", "max_seq_len", "enable_sleep"], {"model": "m", "max_seq_len": 5, "enable_sleep": True}),
        (["model", "max_seq_len", "sleep_config"], GIVEN),
    ],
)
def test_the_engine_gets_what_it_has_a_name_for(
    tmp_path: Path, fields: list[str], taken: dict[str, object]
) -> None:
    assert json.loads(started(tmp_path, fields, "trtllm_arguments").stdout) == taken


def test_without_it_the_engine_refuses_the_argument(tmp_path: Path) -> None:
    done = started(tmp_path, ["model", "max_seq_len", "enable_sleep"], "")
    assert done.returncode == 1
    assert "sleep_config" in done.stderr


def test_an_argument_that_nobody_knows_is_not_hidden(tmp_path: Path) -> None:
    done = started(tmp_path, ["model", "enable_sleep"], "trtllm_arguments")
    assert done.returncode == 1
    assert "AssertionError: ['enable_sleep', 'max_seq_len', 'model']" in done.stderr

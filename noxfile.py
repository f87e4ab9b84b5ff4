"""drydock's sessions. Each runs in the environment that `make bootstrap` made from lock/drydock.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


@nox.session
def tests(session: nox.Session) -> None:
    """drydock's own tests; those of a real image build a small one first. Takes pytest's arguments."""
    session.run(sys.executable, "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and mypy; actionlint and zizmor of the workflows, offline."""
    session.run(sys.executable, "-m", "ruff", "check", ".")
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".")
    session.run(sys.executable, "-m", "mypy")
    # Its two helpers off: whether a machine has them must not decide what is found.
    session.run(_tool("actionlint"), "-shellcheck=", "-pyflakes=")
    session.run(_tool("zizmor"), "--offline", "--pedantic", "--strict-collection", "--quiet", ".github")


def _tool(name: str) -> str:
    """A program of the environment that runs this; of the machine's own, none is taken."""
    return str(Path(sys.executable).with_name(name))


@nox.session(tags=["fast"])
def vllm_fast(session: nox.Session) -> None:
    """Trainer, rollout and EPLB tiers in vLLM's image for this machine, small: minutes, under budgets.

    Narrow it with `-- --hardware cpu --runtime chroot --tier rollout -k greedy`; `-- --help` lists all.
    """
    session.run(sys.executable, "-m", "drydock.session", "vllm", "fast", *session.posargs)


@nox.session(tags=["full"])
def vllm_full(session: nox.Session) -> None:
    """The same at the boundaries that fast gives up: long sequences, large batches, real GPUs and EPLB."""
    session.run(sys.executable, "-m", "drydock.session", "vllm", "full", *session.posargs)


@nox.session(tags=["fast"])
def sglang_fast(session: nox.Session) -> None:
    """The tiers in SGLang's image. Without a GPU: `-- --hardware h100 --cpu-part`, for what needs none."""
    session.run(sys.executable, "-m", "drydock.session", "sglang", "fast", *session.posargs)


@nox.session(tags=["full"])
def sglang_full(session: nox.Session) -> None:
    """The same at the boundaries that fast gives up."""
    session.run(sys.executable, "-m", "drydock.session", "sglang", "full", *session.posargs)


@nox.session(tags=["fast"])
def trtllm_fast(session: nox.Session) -> None:
    """The rollout and trainer tiers in TensorRT-LLM's image. Without a GPU: `-- --hardware h100 --cpu-part`."""
    session.run(sys.executable, "-m", "drydock.session", "trtllm", "fast", *session.posargs)


@nox.session(tags=["full"])
def trtllm_full(session: nox.Session) -> None:
    """The same at the boundaries that fast gives up."""
    session.run(sys.executable, "-m", "drydock.session", "trtllm", "full", *session.posargs)

"""drydock's sessions. Each runs in the environment that `make bootstrap` made from lock/drydock.txt."""

from __future__ import annotations

import sys

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]


@nox.session
def tests(session: nox.Session) -> None:
    """drydock's own tests; those of a real image build a small one first. Takes pytest's arguments."""
    session.run(sys.executable, "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (rules and format) and mypy."""
    session.run(sys.executable, "-m", "ruff", "check", ".")
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".")
    session.run(sys.executable, "-m", "mypy")


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

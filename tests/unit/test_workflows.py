"""The workflows: they decide nothing, run nothing that is not pinned, and may do no more than they need.

What actionlint and zizmor find is `nox -s lint`'s; here is what they cannot know, and that both catch a planted fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from drydock.ci import Build, Session, outputs, plan

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROGRAMS = {"make", ".venv/bin/drydock", ".venv/bin/nox", "docker", "git", "gh", ".ci/machine", "apt-get"}
"""What a step may run: one of these, once."""
WRITES = {
    ("images", "tiers"): {"actions"},
    ("nightly", "publish"): {"id-token", "pages"},
    ("refresh", "open"): {"actions", "contents", "pull-requests"},
}
"""Job -> what it may write. All others only read."""


class Job(NamedTuple):
    workflow: str
    name: str
    data: dict[str, Any]

    @property
    def steps(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.data.get("steps", [])
        return found

    @property
    def commands(self) -> list[str]:
        return [step["run"] for step in self.steps if "run" in step]


def read(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return found


WORKFLOWS = {path.stem: read(path) for path in FILES}
JOBS = [
    Job(name, job, data) for name, workflow in WORKFLOWS.items() for job, data in workflow["jobs"].items()
]
EVERY_JOB = pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.workflow}-{job.name}")
EVERY_WORKFLOW = pytest.mark.parametrize("name", WORKFLOWS)


def triggers(name: str) -> dict[str, Any]:
    # YAML 1.1 takes `on` for true.
    found: dict[str, Any] = WORKFLOWS[name][True]
    return found


def test_all_of_them_are_here() -> None:
    assert set(WORKFLOWS) == {"checks", "images", "tiers", "nightly", "refresh"}


# ---------------------------------------------------------------------------------------------------- what steps run


def fault(command: str) -> str | None:
    """What makes a step more than one call of a program that is allowed; None for nothing."""
    if "${{" in command:
        return "an expression, whose value a shell would read: hand it over in env"
    # Where its output goes, or what it reads, is no logic; nor is what jq makes of gh's answer.
    rest = re.sub(r"'[^']*'", "''", command.strip())
    rest = re.sub(r' >> "\$GITHUB_OUTPUT"$| <<< "\$[A-Z_]+"$', "", rest)
    if found := re.search(r"[;|&`<>\n]|\$\(|\$\{", rest):
        return f"logic: {found.group()!r}"
    words = rest.split()
    while words and (words[0] == "sudo" or words[0].startswith("--preserve-env")):
        words.pop(0)
    if not words or words[0] not in PROGRAMS:
        return f"not one of {', '.join(sorted(PROGRAMS))}"
    return None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("make lint", None),
        ("sudo --preserve-env make test", None),
        ("gh run list --jq '.[0] | .x' >> \"$GITHUB_OUTPUT\"", None),
        ('docker login "$HOST" --password-stdin <<< "$PASSWORD"', None),
        ("make lint && make test", "logic"),
        ("make lint; make test", "logic"),
        ("make lint\nmake test", "logic"),
        ("git log | head", "logic"),
        ("git log > file", "logic"),
        ("docker rm $(docker ps -q)", "logic"),
        ("docker rm `docker ps -q`", "logic"),
        ("gh pr edit ${NUMBER:-1}", "logic"),
        ("if git diff", "not one of"),
        ("curl x", "not one of"),
        ("sudo tee", "not one of"),
        ("bash -c 'make'", "not one of"),
        ("A=1 make", "not one of"),
        ("make ${{ github.head_ref }}", "an expression"),
    ],
)
def test_the_rule_for_steps(command: str, said: str | None) -> None:
    found = fault(command)
    assert found is said if said is None else str(found).startswith(said)


@EVERY_JOB
def test_a_step_is_one_call_of_ours_or_of_git_gh_and_docker(job: Job) -> None:
    assert not [(command, found) for command in job.commands if (found := fault(command))]


def uses() -> Iterator[tuple[str, str]]:
    """Each `uses`, with the rest of its line."""
    for path in FILES:
        for line in path.read_text().splitlines():
            if found := re.fullmatch(r"\s*(?:- )?uses: (\S+)(.*)", line):
                yield found[1], found[2]


def test_actions_are_pinned_by_commit_and_say_their_version() -> None:
    remote = [(action, comment) for action, comment in uses() if not action.startswith("./")]
    for action, comment in remote:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), f"{action} is not pinned by a commit"
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action} does not say its version"
    # One action has one pin everywhere.
    assert len({action for action, _ in remote}) == len({action.partition("@")[0] for action, _ in remote})
    everything = sum("uses" in step for job in JOBS for step in job.steps) + sum(
        "uses" in job.data for job in JOBS
    )
    assert len(list(uses())) == everything


# ---------------------------------------------------------------------------------------------- what they may, and when


@EVERY_WORKFLOW
def test_a_workflow_has_no_permissions_but_its_jobs(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {}


@EVERY_JOB
def test_a_job_may_write_only_what_it_is_for(job: Job) -> None:
    granted = job.data["permissions"]
    assert set(granted.values()) <= {"read", "write"}
    writes = {what for what, how in granted.items() if how == "write"}
    assert writes == WRITES.get((job.workflow, job.name), set())
    if writes:
        # What may write runs nobody's code but GitHub's own.
        assert all(command.split()[0] in ("git", "gh") for command in job.commands)


@EVERY_JOB
def test_no_token_is_left_in_a_checkout(job: Job) -> None:
    checkouts = [step for step in job.steps if "actions/checkout@" in step.get("uses", "")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@EVERY_WORKFLOW
def test_a_superseded_run_is_cancelled(name: str) -> None:
    group = WORKFLOWS[name]["concurrency"]
    assert group["cancel-in-progress"] is True
    # Of its own: one that calls another would else cancel it.
    assert group["group"].split("-")[0] == name


@EVERY_WORKFLOW
def test_no_event_hands_secrets_to_a_strangers_code(name: str) -> None:
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(triggers(name))


def test_what_each_is_started_by() -> None:
    assert "pull_request" in triggers("checks")
    assert {"pull_request", "push"} <= set(triggers("images"))
    assert "workflow_call" in triggers("tiers")
    assert all("schedule" in triggers(name) for name in ("nightly", "refresh"))
    # On machines of one's own, which outlive a job, no stranger's pull request runs.
    assert "pull_request" not in triggers("tiers")


@EVERY_JOB
def test_every_job_has_a_timeout_and_that_of_images_and_tiers_is_planned(job: Job) -> None:
    if job.data.get("uses"):
        return  # its own jobs have
    limit = job.data["timeout-minutes"]
    work = re.compile(r"drydock(\.session| build| ci record)|make smoke|docker run")
    if any(work.search(command) for command in job.commands):
        assert re.fullmatch(r"\$\{\{ (fromJSON\(needs\.plan\.outputs\.minutes\)|matrix\.minutes) \}\}", limit)
        assert re.fullmatch(
            r"\$\{\{ (fromJSON\(needs\.plan\.outputs\.labels\)|matrix\.labels) \}\}", job.data["runs-on"]
        )
    else:
        assert isinstance(limit, int)


def test_images_and_tiers_are_matrices_of_the_plan() -> None:
    for workflow, job, rows in (("images", "image", "images"), ("tiers", "session", "tiers")):
        strategy = WORKFLOWS[workflow]["jobs"][job]["strategy"]
        assert strategy == {"fail-fast": False, "matrix": f"${{{{ fromJSON(needs.plan.outputs.{rows}) }}}}"}
        assert WORKFLOWS[workflow]["jobs"][job]["if"] == f"needs.plan.outputs.any-{rows} == 'true'"


@EVERY_WORKFLOW
def test_what_is_asked_of_the_plan_is_in_it(name: str) -> None:
    """A name that is not there is an empty text to GitHub, and a linter cannot know."""
    text = (ROOT / f".github/workflows/{name}.yml").read_text()
    known = set(outputs(plan(ROOT, None, "fast", {})))
    asked = set(re.findall(r"steps\.plan\.outputs\.([\w-]+)", text))
    assert asked <= known
    for job in WORKFLOWS[name]["jobs"].values():
        if "${{ matrix." in str(job):
            row = Build if name == "images" else Session
            asked = set(re.findall(r"\$\{\{ matrix\.([\w-]+) ", str(job)))
            assert asked <= {field.name for field in fields(row)}


def test_a_session_runs_in_the_pulled_digest_and_nothing_is_built_there() -> None:
    (job,) = [job for job in JOBS if (job.workflow, job.name) == ("tiers", "session")]
    pull = job.commands.index('docker pull "$REFERENCE"')
    (run,) = [n for n, command in enumerate(job.commands) if "drydock.session" in command]
    assert pull < run
    assert job.data["env"]["REFERENCE"] == "${{ matrix.reference }}"
    assert (
        '--entrypoint "" "$REFERENCE" python -m drydock.session $ARGUMENTS --digest "$DIGEST"'
        in job.commands[run]
    )
    assert not any(re.search(r"drydock build|make|pip|nox", command) for command in job.commands)
    upload = job.steps[-1]["with"]
    assert upload["name"] == "${{ matrix.session }}-${{ matrix.image }}"  # as drydock.night.artifact has it
    assert upload["path"] == "results/${{ matrix.session }}/latest"


# ------------------------------------------------------------------------------------- the linters catch what is wrong

SOUND = """\
name: x
on: push
permissions: {}
concurrency:
  group: x
  cancel-in-progress: true
jobs:
  one:
    name: one
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    outputs:
      a: ${{ steps.a.outputs.a }}
    steps:
      - uses: actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2
        with:
          persist-credentials: false
      - id: a
        run: make
"""
LINTERS = {
    "actionlint": ("-shellcheck=", "-pyflakes="),
    "zizmor": ("--offline", "--pedantic", "--strict-collection", "--quiet", ".github"),
}


def lint(folder: Path, tool: str, text: str) -> subprocess.CompletedProcess[str]:
    path = folder / ".github/workflows/x.yml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (folder / ".git").mkdir()
    command = [Path(sys.executable).with_name(tool), *LINTERS[tool]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_lint_calls_both_as_here() -> None:
    text = (ROOT / "noxfile.py").read_text()
    for tool, options in LINTERS.items():
        quoted = ", ".join(f'"{option}"' for option in options)
        assert f'session.run(_tool("{tool}"), {quoted})' in text


@pytest.mark.parametrize("tool", LINTERS)
def test_a_sound_workflow_passes(tmp_path: Path, tool: str) -> None:
    done = lint(tmp_path, tool, SOUND)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("tool", "old", "new", "said"),
    [
        ("actionlint", "steps.a.outputs", "steps.b.outputs", 'property "b" is not defined'),
        ("actionlint", "runs-on: ubuntu-24.04", "runs-on: ubuntu-24.O4", "is unknown"),
        ("actionlint", "timeout-minutes", "timeout-minute", "unexpected key"),
        ("zizmor", "@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2", "@v6", "unpinned-uses"),
        ("zizmor", "run: make", "run: make ${{ github.head_ref }}", "template-injection"),
        ("zizmor", "permissions: {}\n", "", "excessive-permissions"),
        ("zizmor", "persist-credentials: false", "fetch-depth: 0", "artipacked"),
        ("zizmor", "on: push", "on: pull_request_target", "dangerous-triggers"),
    ],
)
def test_a_planted_fault_is_caught(tmp_path: Path, tool: str, old: str, new: str, said: str) -> None:
    assert old in SOUND
    done = lint(tmp_path, tool, SOUND.replace(old, new))
    assert done.returncode != 0
    assert said in done.stdout + done.stderr

"""`drydock ci`: what a change touches, which sessions run where and for how long, a refresh's text, a night's page."""

from __future__ import annotations

import ast
import json
import math
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_documents
from project import REPOSITORY

from drydock import ci, refresh
from drydock.ci import inputs, outputs, plan, summary, touched
from drydock.contract import Answer
from drydock.definition import Image, image_names
from drydock.errors import DrydockError
from drydock.locks import write_lock
from drydock.night import artifact, publish
from drydock.plan import ASSEMBLER
from drydock.session import PATIENCE
from drydock.store import Store
from drydock.tiers.budgets import read_budgets

EVERY = {name for name in image_names(REPOSITORY) if not Image.named(REPOSITORY, name).unread}
"""All but those over a base that nobody has read, which are not built."""
H100 = {"h100-sglang", "h100-vllm"}
NONE: set[str] = set()
REGISTRY = {"DRYDOCK_REGISTRY": "registry.lan/team"}
COPIED = (
    "images",
    "lock",
    ".github",
    "docs",
    "tests/budgets.toml",
    "README.md",
    "pyproject.toml",
    "noxfile.py",
)


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", root, *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own definitions, locks and modules, as the one commit of another repository."""
    root = tmp_path_factory.mktemp("committed")
    for name in COPIED:
        source, target = REPOSITORY / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    for path in REPOSITORY.glob("src/drydock/*.py"):
        (root / "src/drydock").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / "src/drydock" / path.name)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


@pytest.fixture
def checkout(committed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(committed, tmp_path / "checkout")


def append(path: Path, text: str = "\n# changed\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {text.count(old)} of {old!r}"
    path.write_text(text.replace(old, new))


def redefine(path: Path) -> None:
    """Change what a definition says of all its images."""
    path.write_text(path.read_text().replace('summary = "', 'summary = "Another ', 1))


# ---------------------------------------------------------------------------------------------- what a change touches


@pytest.mark.parametrize(
    ("path", "images", "tiers"),
    [
        # A comment: in no image.
        ("images/h100/image.toml", NONE, NONE),
        ("images/debian-13.toml", EVERY, EVERY),
        ("lock/pylock.gb200-sglang.toml", {"gb200-sglang"}, {"gb200-sglang"}),
        ("lock/debian-13-amd64.toml", EVERY, EVERY),
        ("lock/debian-13-arm64.toml", EVERY, EVERY),
        ("src/drydock/layer.py", EVERY, EVERY),
        ("src/drydock/locks.py", EVERY, EVERY),
        # Not the assembler's: no image is another, but what runs in them is.
        ("src/drydock/session.py", NONE, EVERY),
        ("tests/rollout/client.py", NONE, EVERY),
        ("tests/budgets.toml", NONE, EVERY),
        ("pyproject.toml", NONE, EVERY),
        # The tools' lock, as long as no library of the assembler's moves in it.
        ("lock/drydock.txt", NONE, NONE),
        ("tests/unit/test_ci.py", NONE, NONE),
        ("tests/image/test_carry.py", NONE, NONE),
        ("docs/matrix.md", NONE, NONE),
        ("README.md", NONE, NONE),
        ("noxfile.py", NONE, NONE),
        (".github/workflows/images.yml", NONE, NONE),
    ],
)
def test_what_one_file_touches(checkout: Path, path: str, images: set[str], tiers: set[str]) -> None:
    append(checkout / path)
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "second")
    found = touched(checkout, "HEAD^")
    assert (set(found.images), set(found.tiers)) == (images, tiers)
    assert all(lines[0].startswith(f"{path}: ") for lines in found.tiers.values())


@pytest.mark.parametrize(
    ("path", "old", "new", "images"),
    [
        ("images/h100/image.toml", 'summary = "NVIDIA H100', 'summary = "An H100', H100),
        ("images/h100/image.toml", 'summary = "verl and Megatron-core with SGLang"', 'summary = "S"', {"h100-sglang"}),
        ("images/h100/image.toml", 'default-engine = "vllm"', 'default-engine = "sglang"', NONE),
        ("images/cpu/image.toml", 'summary = "', 'summary = "With ', {"cpu-vllm"}),
    ],
)  # fmt: skip
def test_a_definition_touches_the_images_whose_part_of_it_is_another(
    checkout: Path, path: str, old: str, new: str, images: set[str]
) -> None:
    text = (checkout / path).read_text()
    assert old in text
    (checkout / path).write_text(text.replace(old, new, 1))
    found = touched(checkout, "HEAD")
    assert set(found.images) == set(found.tiers) == images
    assert all(lines == [f"{path}: its image.toml"] for lines in found.images.values())


def test_a_definition_that_was_none_before_touches_its_images(checkout: Path) -> None:
    path = checkout / "images/h100/image.toml"
    text = path.read_text()
    path.write_text("this is no TOML\n")
    git(checkout, "commit", "-qam", "broken")
    path.write_text(text)
    assert set(touched(checkout, "HEAD").images) == H100


@pytest.mark.parametrize(
    ("library", "images"),
    [
        ("zstandard", EVERY),
        ("installer", EVERY),
        ("python-debian", EVERY),
        ("tomli-w", EVERY),
        ("httpx", NONE),
    ],
)
def test_a_library_that_decides_bytes_touches_every_image(
    checkout: Path, library: str, images: set[str]
) -> None:
    version = ci._pins((checkout / "lock/drydock.txt").read_text())[library]
    replace(checkout / "lock/drydock.txt", f"\n{library}=={version} ", f"\n{library}==99.0 ")
    found = touched(checkout, "HEAD")
    assert set(found.images) == images
    assert all(f"{library} {version} -> 99.0" in lines[0] for lines in found.images.values())


def test_a_digest_recorded_anew_touches_its_image(checkout: Path) -> None:
    digest = tomllib.loads((checkout / "lock/images.toml").read_text())["h100-vllm"]["digest"]
    replace(checkout / "lock/images.toml", digest, f"sha256:{'0' * 64}")
    found = touched(checkout, "HEAD")
    assert found.images == {"h100-vllm": ["lock/images.toml: its digest"]}


def test_a_revision_without_records_had_none(checkout: Path) -> None:
    git(checkout, "rm", "-q", "lock/images.toml")
    git(checkout, "commit", "-qm", "without")
    git(checkout, "checkout", "-q", "HEAD^", "--", "lock/images.toml")
    assert set(touched(checkout, "HEAD").images) == EVERY


def test_what_is_not_committed_counts_and_what_is_ignored_does_not(checkout: Path) -> None:
    text = (checkout / "images/cpu/image.toml").read_text()
    append(checkout / "images/box/image.toml", text.replace('hardware = "cpu"', 'hardware = "box"'))
    append(checkout / ".git/info/exclude", "*.ignored\n")
    append(checkout / "src/drydock/x.ignored")
    found = touched(checkout, "HEAD")
    assert set(found.images) == set(found.tiers) == {"box-vllm"}


def test_what_the_other_branch_did_is_not_ours(checkout: Path) -> None:
    git(checkout, "switch", "-qc", "topic")
    redefine(checkout / "images/h100/image.toml")
    git(checkout, "commit", "-qam", "ours")
    git(checkout, "switch", "-q", "main")
    redefine(checkout / "images/cpu/image.toml")
    git(checkout, "commit", "-qam", "theirs")
    git(checkout, "switch", "-q", "topic")
    assert set(touched(checkout, "main").images) == H100


def test_a_file_that_is_moved_away_is_changed(checkout: Path) -> None:
    git(checkout, "mv", "src/drydock/layer.py", "docs/layer.py")
    assert set(touched(checkout, "HEAD").images) == EVERY


def test_nothing_changed_touches_nothing(checkout: Path) -> None:
    found = touched(checkout, "HEAD")
    assert not found.images
    assert not found.tiers


@pytest.mark.parametrize("base", [None, ""])
def test_without_a_base_everything_is_touched(checkout: Path, base: str | None) -> None:
    assert set(touched(checkout, base).images) == set(touched(checkout, base).tiers) == EVERY


def test_a_commit_that_is_gone_touches_everything_and_says_so(checkout: Path) -> None:
    """A branch that was moved by force must not stop every run after it."""
    gone = "1" * 40
    found = touched(checkout, gone)
    assert found.images == {
        name: [f"everything: {gone} is gone, of a branch that was moved"] for name in EVERY
    }


@pytest.mark.parametrize("base", ["nope", "--output=x", "1" * 39])
def test_a_base_that_git_does_not_know_is_an_error(checkout: Path, base: str) -> None:
    with pytest.raises(DrydockError, match=f"(?s)git merge-base: .*{base}.*: name a revision that is here"):
        touched(checkout, base)
    assert not (checkout / "x").exists()


def test_a_base_that_shares_no_history_is_an_error(checkout: Path) -> None:
    git(checkout, "switch", "-q", "--orphan", "other")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "alone")
    git(checkout, "switch", "-q", "main")
    with pytest.raises(DrydockError, match="no commit in common"):
        touched(checkout, "other")


def imported(module: str) -> set[str]:
    """The modules of drydock's that one module's source imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse((REPOSITORY / f"src/drydock/{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drydock."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "drydock":
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_that_a_build_runs_decides_bytes_or_is_known_not_to() -> None:
    """A module that the assembler begins to import has to be put on one side."""
    only_bring_or_tell = {
        "errors", "indexes", "npu_smi", "progress", "publish", "published", "registry", "sdist", "store", "transfer",
    }  # fmt: skip
    seen: set[str] = set()
    todo = {"build"}
    while todo:
        seen |= todo
        todo = set().union(*(imported(module) for module in todo)) - seen
    # It is not imported but run, by the image's Python.
    assert seen | {"bytecode_worker"} == {*ASSEMBLER, *ci.READERS} | only_bring_or_tell


def test_the_inputs_of_an_image_are_files_that_are_there() -> None:
    for name in EVERY:
        image = Image.named(REPOSITORY, name)
        found = inputs(image)
        assert all((REPOSITORY / path).is_file() for path in found)
        assert {f"lock/pylock.{name}.toml", f"images/{image.definition.hardware}/image.toml"} <= found.keys()


# ------------------------------------------------------------------------------------------------------------ the plan


def test_the_matrix_is_the_definitions(checkout: Path) -> None:
    made = plan(checkout, None, "full", REGISTRY)
    assert {row.image for row in made.images} == {row.image for row in made.tiers} == EVERY
    records = tomllib.loads((checkout / "lock/images.toml").read_text())
    rows = {row.image: row for row in made.tiers}
    for name, row in rows.items():
        assert row.reference == f"registry.lan/team/{name}@{records[name]['digest']}"
    h100 = rows["h100-vllm"]
    assert (h100.session, h100.arguments) == ("vllm_full", "vllm full --unbudgeted")
    assert h100.labels == ("self-hosted", "linux", "x64", "h100")
    assert h100.docker == "--init --shm-size=2g --gpus=all"
    # The full profile's tests of GPUs fail where there is none.
    assert rows["cpu-vllm"].session == "vllm_fast"
    assert "--gpus=all" not in rows["cpu-vllm"].docker


def test_an_image_over_a_base_that_nobody_has_read_is_not_run_and_says_so(checkout: Path) -> None:
    unread = set(image_names(REPOSITORY)) - EVERY
    append(checkout / "tests/rollout/client.py")
    reasons = {row.what: row.reason for row in plan(checkout, "HEAD", "fast", REGISTRY).not_run}
    assert unread <= reasons.keys()
    assert all("its base is not read yet" in reasons[name] for name in unread)


def test_the_time_is_the_budgets(checkout: Path) -> None:
    limit = read_budgets(checkout / "tests/budgets.toml")["cpu-vllm", "fast"].session
    assert limit
    assert limit.ceiling
    pulling = tomllib.loads((checkout / ci.RUNNERS).read_text())["tiers"]["pull-minutes"]

    def cpu() -> ci.Session:
        (row,) = [row for row in plan(checkout, None, "fast", REGISTRY).tiers if row.image == "cpu-vllm"]
        return row

    assert (cpu().ceiling, cpu().minutes) == (
        limit.ceiling,
        math.ceil((limit.ceiling + PATIENCE) / 60) + pulling,
    )
    assert cpu().arguments == "vllm fast"
    replace(
        checkout / "tests/budgets.toml",
        f"[cpu-vllm.fast]\nsession = {{ ceiling = {limit.ceiling:g} }}",
        "[cpu-vllm.fast]\nsession = { ceiling = 6000 }",
    )
    assert cpu().minutes == 101 + pulling


def test_an_image_without_budgets_has_a_bound_and_the_summary_says_so(checkout: Path) -> None:
    made = plan(checkout, None, "fast", REGISTRY)
    allowance = tomllib.loads((checkout / ci.RUNNERS).read_text())["tiers"]
    rows = [row for row in made.tiers if row.ceiling is None]
    assert {row.image for row in rows} == EVERY - {"cpu-vllm", "h100-vllm"}
    for row in rows:
        assert row.minutes == allowance["unbudgeted-minutes"] + allowance["pull-minutes"]
        assert row.arguments.endswith(" --unbudgeted")
        assert (
            f"| `{row.image}` | {row.session} | {', '.join(row.labels)} | {row.minutes} (it has no"
            in summary(made)
        )


def without_h100(checkout: Path) -> dict[str, str]:
    path = checkout / ci.RUNNERS
    path.write_text(path.read_text().replace("[hardware.h100]", "[hardware.other]"))
    return REGISTRY


def without_a_digest(checkout: Path) -> dict[str, str]:
    path = checkout / "lock/images.toml"
    text = path.read_text()
    path.write_text(text[: text.index("[h100-sglang]")])
    return REGISTRY


@pytest.mark.parametrize(
    ("change", "images", "reason"),
    [
        (without_h100, H100, "no runner: .github/runners.toml has no [hardware.h100]"),
        (without_a_digest, H100, "no digest is recorded: `drydock build {image} --record`"),
        (lambda _: {}, EVERY, "no registry to pull from: set the repository's variable DRYDOCK_REGISTRY"),
    ],
    ids=["no runner", "no digest", "no registry"],
)
def test_what_cannot_run_is_named_with_its_reason(
    checkout: Path, change: Callable[[Path], dict[str, str]], images: set[str], reason: str
) -> None:
    made = plan(checkout, None, "fast", change(checkout))
    assert {row.image for row in made.tiers} == EVERY - images
    listed = summary(made).partition("## Not run")[2]
    for name in images:
        line = f"| {name.partition('-')[2]}_fast in {name} | {reason.format(image=name)} |"
        assert line in listed.splitlines()


def test_a_machine_waits_for_its_images(checkout: Path) -> None:
    replace(checkout / ci.RUNNERS, "[build]", '[hardware.later]\nlabels = ["later"]\n[build]')
    made = plan(checkout, None, "fast", REGISTRY)
    assert "the tiers on later" in {row.what for row in made.not_run}
    assert "later" not in {row.hardware for row in made.tiers}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('docker = ["--gpus=all"]', 'docker = ["--gpus all"]', "hardware.h100.docker.0: "),
        ('docker = ["--gpus=all"]', 'docker = ["--env=A=$(id)"]', "hardware.h100.docker.0: "),
        ('docker = ["--gpus=all"]', 'docker = ["/bin/sh"]', "hardware.h100.docker.0: "),
        ('docker = ["--gpus=all"]', 'dokcer = ["--gpus=all"]', "hardware.h100.dokcer: unknown key"),
        ("pull-minutes = 30", "pull-minutes = 0", "tiers.pull-minutes: "),
        ('labels = ["self-hosted", "linux", "x64", "h100"]', "labels = []", "hardware.h100.labels: "),
        ("all-minutes = 300\n", "", "build.all-minutes: required"),
    ],
)
def test_a_wrong_table_of_machines_is_one_line(checkout: Path, old: str, new: str, said: str) -> None:
    path = checkout / ci.RUNNERS
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DrydockError) as error:
        plan(checkout, None, "fast", REGISTRY)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- the command line


def run(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    command = [sys.executable, "-m", "drydock.cli", "ci", *words]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_the_plan_for_github(checkout: Path, tmp_path: Path) -> None:
    redefine(checkout / "images/h100/image.toml")
    files = {"GITHUB_OUTPUT": tmp_path / "output", "GITHUB_STEP_SUMMARY": tmp_path / "summary"}
    files["GITHUB_OUTPUT"].write_text("before=1\n")
    variables = {name: str(path) for name, path in files.items()}
    done = run(checkout, "plan", "--base", "HEAD", "--json", "--github", **variables, **REGISTRY)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {row["image"] for row in document["images"]} == H100
    lines = files["GITHUB_OUTPUT"].read_text().splitlines()
    written = dict(line.split("=", 1) for line in lines)
    assert lines[0] == "before=1"
    made = plan(checkout, "HEAD", "fast", REGISTRY)
    assert json.loads(written["images"]) == json.loads(json.dumps(outputs(made)["images"]))
    assert (written["any-images"], written["any-tiers"]) == ("true", "true")
    assert written["registry"] == "registry.lan"
    assert json.loads(written["build-labels"]) == ["ubuntu-24.04"]
    assert files["GITHUB_STEP_SUMMARY"].read_text() == summary(made)


def test_an_empty_matrix_is_said_beside_it(checkout: Path) -> None:
    found = outputs(plan(checkout, "HEAD", "fast", REGISTRY))
    assert (found["any-images"], found["any-tiers"]) == (False, False)
    assert found["images"] == {"include": []}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "--profile", "slow"), "drydock: unknown profile 'slow': there are fast and full\n"),
        (("plan", "--base", "nope"), "drydock: git merge-base: "),
        (("plan", "--github"), "drydock: --github: GITHUB_OUTPUT is not set"),
        (("plan", "--pull"), "drydock: no registry is named: give one, or set DRYDOCK_REGISTRY"),
        (("record",), "drydock: "),
    ],
)
def test_bad_input_is_one_line(checkout: Path, words: tuple[str, ...], said: str) -> None:
    done = run(checkout, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------------------- a refresh's notes


def test_the_notes_of_a_refresh(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an index: the wheels' part is the contract's own, and its answers are put in its place."""
    answers = {
        "h100-vllm": Answer(uses=10, packages={}, missing=[]),
        "cpu-vllm": Answer(uses=10, packages={}, missing=["a.py:1: vllm 9 has no x"]),
    }
    monkeypatch.setattr(refresh, "look_up", lambda image, _: answers[image.name])
    for name in answers:
        lock = checkout / f"lock/pylock.{name}.toml"
        data = tomllib.loads(lock.read_text())
        (moved,) = [package for package in data["packages"] if package["name"] == "aiohttp"]
        old, moved["version"] = moved["version"], "99.1"
        (wheel,) = moved["wheels"]
        wheel["path"] = wheel["path"].replace(f"-{old}-", "-99.1-")
        write_lock(lock, data)
    size = tomllib.loads((checkout / "lock/images.toml").read_text())["h100-vllm"]["size"]
    replace(checkout / "lock/images.toml", f"size = {size}\n", "size = 5123000000\n")
    text = refresh.notes(checkout, Store(tmp_path / "store"), "HEAD")
    assert f"- size: {size / 1e9:.2f} GB -> 5.12 GB" in text
    assert "- contract: all 10 uses are there" in text
    assert "- **contract: 1 of 10 uses are missing**\n  - `a.py:1: vllm 9 has no x`" in text
    assert text.count(f"  aiohttp {old} -> 99.1\n") == 2
    assert "gb200" not in text.partition("## What images hold now")[0]
    assert "| `gb200-vllm` | vllm" in text


def test_nothing_moved_has_no_notes(checkout: Path, tmp_path: Path) -> None:
    assert refresh.notes(checkout, Store(tmp_path / "store"), "HEAD") == ""
    output = tmp_path / "output"
    variables = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    variables["DRYDOCK_STORE"] = str(tmp_path / "store")
    done = run(
        checkout, "notes", "--base", "HEAD", "--output", str(tmp_path / "notes.md"), "--github", **variables
    )
    assert (done.returncode, output.read_text()) == (0, "changed=false\n"), done.stderr


def test_notes_that_are_too_long_are_cut_at_a_line_outside_of_a_list() -> None:
    assert refresh._within("short\n") == "short\n"
    long = "## x\n\n```\n" + "  package 1 -> 2\n" * 10_000
    cut = refresh._within(long)
    assert refresh.MOST < len(cut) + len("  package 1 -> 2\n") < 65_536
    assert cut.count("```") == 2
    assert "  package 1 -> 2\n```\n\nThe rest did not fit" in cut


# ------------------------------------------------------------------------------------------------------ a night's page


def test_a_nights_page_has_every_session_of_the_plan(checkout: Path, tmp_path: Path) -> None:
    made = plan(checkout, None, "full", REGISTRY)
    rows = {row.image: row for row in made.tiers}
    written: dict[str, dict[str, Any]] = {}
    for name in ("cpu-vllm", "h100-vllm", "gb200-vllm"):
        document = report_documents.build()
        document["image"] = {"name": name, "digest": rows[name].digest, "config_digest": None}
        written[name] = document
    written["gb200-vllm"]["image"]["digest"] = f"sha256:{'0' * 64}"
    test = written["h100-vllm"]["tiers"][0]["tests"][0]
    test |= {"outcome": "failed", "message": "<script>no</script>"}
    for name, document in written.items():
        append(tmp_path / "results" / artifact(rows[name]) / "report.json", json.dumps(document))
    append(tmp_path / "results" / artifact(rows["h100-sglang"]) / "report.json", "{")
    found = {
        outcome.session.image: outcome for outcome in publish(made, tmp_path / "results", tmp_path / "site")
    }
    assert {name for name, outcome in found.items() if outcome.passed} == {"cpu-vllm"}
    assert set(found) == EVERY
    text = (tmp_path / "site/index.html").read_text()
    assert "1 of 5</span> sessions passed" in text
    assert "it left no report" in found["gb200-sglang"].detail
    assert "of another image: sha256:0000" in found["gb200-vllm"].detail
    assert "report.json" in found["h100-sglang"].detail
    for name in ("cpu-vllm", "h100-vllm", "gb200-vllm"):
        assert f'href="{found[name].page}"' in text
        assert written[name]["image"]["name"] in (tmp_path / "site" / found[name].page).read_text()
    assert "ascend-vllm-a3: its base is not read yet" in text
    with pytest.raises(DrydockError, match="name a folder that is not there"):
        publish(made, tmp_path / "results", tmp_path / "site")


def test_a_night_without_sessions_has_not_passed(checkout: Path, tmp_path: Path) -> None:
    publish(plan(checkout, None, "full", {}), tmp_path / "results", tmp_path / "site")
    text = (tmp_path / "site/index.html").read_text()
    assert '<span class="bad">0 of 0</span> sessions passed' in text
    assert "no registry to pull from" in text

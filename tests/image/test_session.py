"""A whole session on a real image: verified first, its tiers run inside it, the report always written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import docker
import pytest
from conftest import Made
from mini_image import (
    REPOSITORY,
    SITE,
    Outcome,
    Project,
    copy_tree,
    docker_engine,
    environment,
    rewrite,
    twin,
    wait_until,
)

sys.path.insert(0, str(REPOSITORY / "tests/unit"))

from debian_registry import debian_registry

from drydock.publish import push
from drydock.published import write_record
from drydock.registry import Registry
from drydock.session import SETTLE
from drydock.store import Store
from drydock.unpack import folder, unpack

PASSING = "def test_it(profile):\n    assert profile['size'] == 1\n"
PROFILE = '[size]\nfast = 1\nfull = 2\ngives-up = "twos"\n'
BUDGETS = """
[tiny-mini.fast]
session = { ceiling = 100 }
"""
RUNNING = "this is not its end: the trainer tier was running"
TIERS = ("rollout", "trainer", "eplb")
BUDGETS += "".join(f"[tiny-mini.fast.{tier}.each]\ntest = {{ ceiling = 30 }}\n" for tier in TIERS)


@dataclass(frozen=True)
class Session:
    """A checkout with tiers of one small test each, and a store that holds its image."""

    project: Project
    store: Store

    def write(self, tier: str, text: str) -> None:
        (self.project.root / "tests" / tier / f"test_{tier}.py").write_text(text)

    def command(self, *options: str, profile: str = "fast") -> list[str]:
        session = [sys.executable, "-m", "drydock.session", "mini", profile]
        return [*session, "--hardware", "tiny", "--runtime", "chroot", *options]

    @property
    def surroundings(self) -> dict[str, Any]:
        return {"cwd": self.project.root, "env": environment(self.store)}

    def run(self, *options: str, profile: str = "fast", **extra: str) -> Outcome:
        done = subprocess.run(
            self.command(*options, profile=profile), cwd=self.project.root, env=environment(self.store, **extra),
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    @property
    def results(self) -> Path:
        return self.project.root / "results/mini_fast/latest"

    def report(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.results / "report.json").read_text())
        return document


@pytest.fixture
def session(project: Project, tiny: Made, tmp_path: Path) -> Session:
    copy = project.copy(tmp_path / "checkout")
    shutil.copytree(
        REPOSITORY / "src/drydock", copy.root / "src/drydock", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy.root / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--strict-markers'\n")
    (copy.root / "tests").mkdir()
    (copy.root / "tests/budgets.toml").write_text(BUDGETS)
    unpack(tiny.store, tiny.built.layers)
    made = Session(copy, twin(tmp_path / "store", tiny.store))
    (made.store.root / "unpacked").mkdir()
    copy_tree(tiny.store.root / "unpacked", made.store.root / "unpacked")
    for tier in TIERS:
        (copy.root / "tests" / tier).mkdir()
        (copy.root / "tests" / tier / "profile.toml").write_text(PROFILE)
        made.write(tier, PASSING)
    return made


def test_a_session_that_passes(session: Session, tiny: Made) -> None:
    outcome = session.run()
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    report = session.report()
    assert report["outcome"] == "passed"
    assert report["image"]["digest"] == f"sha256:{tiny.built.digest}"
    assert report["device"]["emulated"] == ""
    assert report["verification"]["verdict"] == "ok"
    assert [tier["tier"] for tier in report["tiers"]] == list(TIERS)
    assert [test["outcome"] for tier in report["tiers"] for test in tier["tests"]] == ["passed"] * 3
    assert [step["name"] for step in report["steps"]] == [
        "image",
        "runtime",
        "verification",
        *TIERS,
        "report",
    ]
    assert report["not_run"] == []
    assert 0 < report["overhead_seconds"] < report["seconds"] <= 100
    cases = ElementTree.parse(session.results / "junit.xml").getroot().iter("testcase")
    assert sum(case.get("name") == "test_it" for case in cases) == 3
    assert "tiny-mini" in (session.results / "report.html").read_text()


def test_a_failing_tier_does_not_keep_the_others_from_running(session: Session) -> None:
    session.write("trainer", "def test_it():\n    assert 1 + 1 == 3\n")
    outcome = session.run()
    assert outcome.status == 1
    assert outcome.stderr.splitlines()[-1].startswith("drydock: mini_fast failed: trainer: "), outcome.stderr
    assert [tier["outcome"] for tier in session.report()["tiers"]] == ["passed", "failed", "passed"]


def test_an_image_that_differs_from_its_lock_ends_the_session_before_its_tiers(
    session: Session, tiny: Made
) -> None:
    changed(session, tiny)
    outcome = session.run()
    assert outcome.status == 1
    report = session.report()
    assert report["tiers"] == []
    assert {row["what"] for row in report["not_run"]} == {f"the {tier} tier" for tier in TIERS}
    assert report["verification"]["verdict"] != "ok"
    assert "not what its lock says" in outcome.stderr.splitlines()[-1]
    assert (session.results / "report.html").is_file()


def changed(session: Session, tiny: Made) -> None:
    """A byte more in a module of the image."""
    unpack(session.store, tiny.built.layers)
    places = [folder(session.store, layer) / SITE / "click/__init__.py" for layer in tiny.built.layers]
    (target,) = [path for path in places if path.exists()]
    rewrite(target, lambda data: data + b"# changed\n")


def test_drift_that_is_allowed_is_the_first_thing_said(session: Session, tiny: Made) -> None:
    changed(session, tiny)
    outcome = session.run("--allow-drift")
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    report = session.report()
    assert [tier["outcome"] for tier in report["tiers"]] == ["passed"] * 3
    assert report["verification"]["verdict"] == "drift"
    assert "not the locked image: it differs from the lock in 1 place" in outcome.stdout
    assert "Not the locked image" in (session.results / "report.html").read_text()


def test_an_environment_in_the_place_of_an_image_has_to_be_the_locked_one(session: Session) -> None:
    """This test's own Python, which holds drydock's tools and not the mini image's packages."""
    outcome = session.run("--runtime", "here")
    assert outcome.status == 1
    assert session.report()["tiers"] == []
    outcome = session.run("--runtime", "here", "--allow-drift")
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    report = session.report()
    assert report["runtime"] == "in place"
    assert report["image"] == {"name": "tiny-mini", "digest": None, "config_digest": None}
    states = {check["name"]: check["state"] for check in report["verification"]["checks"]}
    assert states["files"] == states["debs"] == states["libraries"] == "not-run"
    subjects = {row["subject"] for check in report["verification"]["checks"] for row in check["findings"]}
    assert "matplotlib" in subjects  # installed here and not locked


def test_a_tier_whose_watchdog_is_killed_too_is_a_crash(session: Session) -> None:
    """Even the watchdog is gone: everything in the image is killed."""
    session.write("trainer", "import os, signal\n\ndef test_it():\n    os.kill(-1, signal.SIGKILL)\n")
    outcome = session.run("--tier", "trainer")
    assert outcome.status == 1
    (tier,) = session.report()["tiers"]
    assert tier["outcome"] == "crashed"
    assert not tier["complete"]


def test_a_session_that_is_killed_leaves_the_report_of_what_ran(session: Session) -> None:
    session.write("trainer", "import time\n\ndef test_it():\n    time.sleep(30)\n")
    with subprocess.Popen(session.command(), **session.surroundings, stdout=subprocess.DEVNULL) as process:
        pages = session.results.parent
        assert wait_until(
            lambda: any(RUNNING in page.read_text() for page in pages.glob("*/report.html")), 60, 0.1
        )
        process.kill()
    report = json.loads(next(pages.glob("*/report.json")).read_text())
    assert report["outcome"] == "failed"
    assert report["detail"] == RUNNING
    assert [tier["outcome"] for tier in report["tiers"]] == ["passed"]


def test_one_tier_says_that_the_others_were_not_asked_for(session: Session) -> None:
    outcome = session.run("--tier", "eplb")
    assert outcome.status == 0, outcome.stderr
    assert [tier["tier"] for tier in session.report()["tiers"]] == ["eplb"]
    assert {row["what"] for row in session.report()["not_run"]} == {"the rollout tier", "the trainer tier"}


def test_a_keyword_that_selects_nothing_is_no_pass(session: Session) -> None:
    outcome = session.run("-k", "no_such_test")
    assert outcome.status == 1
    assert outcome.stderr.splitlines()[-1] == "drydock: mini_fast failed: no test ran"


def test_a_keyword_that_selects_in_one_tier_only(session: Session) -> None:
    outcome = session.run("-k", "test_eplb")
    assert outcome.status == 0, outcome.stderr
    assert {row["what"] for row in session.report()["not_run"]} == {"the rollout tier", "the trainer tier"}


def test_a_run_without_budgets_is_refused_before_anything_is_built(session: Session) -> None:
    (session.project.root / "tests/budgets.toml").write_text("")
    outcome = session.run()
    assert "--unbudgeted" in outcome.error
    assert not (session.project.root / "results").exists()
    assert session.run("--unbudgeted").status == 0
    assert session.report()["budget"] is None


def for_cuda(session: Session) -> None:
    """Say that the image is made for GPUs."""
    path = session.project.root / "images/tiny/image.toml"
    path.write_text(
        path.read_text().replace('kind = "none"', 'kind = "cuda"\nminimum-driver = "580.65.06"\nsm = ["90"]')
    )


def test_hardware_that_is_not_here_is_named(session: Session) -> None:
    for_cuda(session)
    assert "needs an NVIDIA GPU" in session.run().error


NEEDY = """
import pytest

def test_it(profile):
    assert profile["size"] == 1

@pytest.mark.needs(gpus=2)
def test_two():
    raise AssertionError

@pytest.mark.serves
def test_server():
    raise AssertionError

@pytest.mark.engine("other")
def test_of_another():
    raise AssertionError
"""


def test_the_part_that_needs_no_gpu_of_an_image_for_one(session: Session) -> None:
    for_cuda(session)
    session.write("trainer", NEEDY)
    assert "add --cpu-part" in session.run().error
    # Its budgets are not those of the whole.
    assert "tiny-mini.fast-cpu-part" in session.run("--cpu-part").error
    outcome = session.run("--cpu-part", "--unbudgeted")
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    report = json.loads((session.project.root / "results/mini_fast_cpu_part/latest/report.json").read_text())
    assert (report["profile"], report["session"]) == ("fast-cpu-part", "mini_fast_cpu_part")
    assert {row["what"] for row in report["not_run"]} == {"what needs an accelerator"}
    trainer = report["tiers"][1]
    assert [test["id"].partition("::")[2] for test in trainer["tests"]] == ["test_it"]
    reasons = {row["id"].partition("::")[2]: row["reason"] for row in trainer["not_selected"]}
    assert "needs 2 GPUs" in reasons["test_two"]
    assert "needs 1 GPU," in reasons["test_server"]
    assert reasons["test_of_another"] == "what it tests is other's"


def test_a_model_that_is_not_there_is_one_line(session: Session) -> None:
    assert "--gsm8k-model: nowhere is not there" in session.run("--gsm8k-model", "nowhere").error


# In Docker


def test_a_tier_in_docker_has_a_container_that_was_made_while_the_one_before_ran(
    session: Session, tiny: Made
) -> None:
    engine = docker_engine()
    # Where it was told its command, the container was made before.
    tells = "import os\nfrom pathlib import Path\n\n" + PASSING
    tells += "    text = str('DRYDOCK_TOLD' in os.environ)\n"
    tells += "    (Path(os.environ['DRYDOCK_RESULTS']) / 'told-{}').write_text(text)\n"
    session.write("rollout", PASSING + f"    import time\n    time.sleep({SETTLE + 3})\n")
    session.write("trainer", tells.format("trainer"))
    session.write("eplb", tells.format("eplb"))
    try:
        outcome = session.run("--runtime", "docker")
        assert outcome.status == 0, outcome.stderr + outcome.stdout
        report = session.report()
        assert [tier["outcome"] for tier in report["tiers"]] == ["passed"] * 3
        steps = {step["name"]: step["seconds"] for step in report["steps"]}
        assert (session.results / "told-trainer").read_text() == "True"
        # Since it was told to begin, not since it stood there.
        assert report["tiers"][1]["seconds"] < steps["trainer"]
        # The trainer's was over before one was made for this, unless the machine was very busy.
        assert (session.results / "told-eplb").read_text() == str(steps["trainer"] > SETTLE)
        assert report["overhead_seconds"] > 0
        assert not mounted(engine, session)
    finally:
        engine.images.remove(tiny.built.reference, force=True)


@pytest.mark.parametrize("during", ["verification", "rollout"])
def test_what_was_made_ahead_in_docker_goes_when_the_session_is_ended(
    session: Session, tiny: Made, during: str
) -> None:
    engine = docker_engine()
    began = "(Path(os.environ['DRYDOCK_RESULTS']) / 'began').touch()"
    session.write(
        "rollout",
        f"import os, time\nfrom pathlib import Path\n\ndef test_it(profile):\n    {began}\n    time.sleep(120)\n",
    )
    runs = session.results.parent
    process = subprocess.Popen(session.command("--runtime", "docker"), **session.surroundings)
    try:
        if during == "rollout":
            assert wait_until(lambda: list(runs.glob("*/began")), 60, 0.1)
            # The verification's may not be removed yet, but runs no more.
            assert wait_until(lambda: len(mounted(engine, session, running=True)) == 2, 60, 0.1)
        else:
            assert wait_until(lambda: mounted(engine, session), 60, 0.1)
        process.terminate()
        assert process.wait(60) == 128 + 15
        report = session.report()
        assert report["detail"].startswith("interrupted")
        assert [tier["tier"] for tier in report["tiers"]] == ["rollout"] * (during == "rollout")
        assert not mounted(engine, session)
    finally:
        process.kill()
        process.wait()
        engine.images.remove(tiny.built.reference, force=True)


def mounted(engine: docker.DockerClient, session: Session, running: bool = False) -> list[str]:
    """Containers that have the session's checkout, whatever their state, or those that run."""
    return [
        str(container.id)
        for container in engine.containers.list(all=not running, ignore_removed=True)
        if str(session.project.root) in {mount.get("Source") for mount in container.attrs["Mounts"]}
    ]


# Carried


def test_an_image_that_comes_in_parts_is_put_together_and_its_tiers_run(
    session: Session, tiny: Made, tmp_path: Path
) -> None:
    """As on a lent machine, to which a part a call is sent: unpacking begins before the last one is there."""
    root, parts, there = session.project.root, tmp_path / "parts", tmp_path / "there"
    shutil.copytree(REPOSITORY / "tools", root / "tools")
    write_record(root, tiny.built)
    tools, have = tmp_path / "tools.tar.gz", tmp_path / "have.json.gz"
    carry = [sys.executable, root / "tools/carry.py"]
    surroundings: dict[str, Any] = {"cwd": root, "env": environment(session.store)}
    (tmp_path / "nothing").mkdir()
    have.write_bytes(
        subprocess.run([*carry, "probe", tmp_path / "nothing"], capture_output=True, check=True).stdout
    )
    packing = [*carry, "pack", "tiny-mini", have, tmp_path / "sent", "--megabytes", "20", "--level", "1"]
    subprocess.run(packing, **surroundings, check=True)
    # The Python that runs the tests has what drydock needs already.
    tarfile.open(tools, "w:gz").close()
    sent = sorted((tmp_path / "sent").glob("part-*"))
    assert len(sent) > 1

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    target = environment(there, PATH=path, TMPDIR=str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    script = root / "tools/carried.sh"
    unpacking = subprocess.Popen([script, "unpack", parts, tools, str(len(sent))], env=target)
    try:
        for part in sent:
            time.sleep(0.5)
            assert unpacking.poll() is None
            part.rename(parts / part.name)
        words = [script, parts, tools, tmp_path / "out", "mini", "fast", "--hardware", "tiny"]
        done = subprocess.run(words, env=target, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert unpacking.wait(10) == 0
    finally:
        unpacking.kill()
        unpacking.wait()
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as tar:
        member = tar.extractfile("./report.json")
        assert member
        report = json.load(member)
    assert (report["outcome"], report["image"]["digest"]) == ("passed", f"sha256:{tiny.built.digest}")


# Prebuilt


@pytest.fixture
def published(session: Session, tiny: Made, tmp_path: Path) -> Iterator[str]:
    """Debian's registry with the image, whose digest the session's checkout records; its own store is empty."""
    write_record(session.project.root, tiny.built)
    shutil.rmtree(session.store.root)
    with debian_registry(tmp_path) as host:
        push(tiny.store, tiny.built, Registry.read(host), {}, stream=io.StringIO())
        yield host


def blobs(session: Session) -> list[Path]:
    return list((session.store.root / "blobs/sha256").glob("*"))


def test_a_prebuilt_image_is_pulled_by_its_recorded_digest(
    session: Session, tiny: Made, published: str
) -> None:
    outcome = session.run("--prebuilt", DRYDOCK_REGISTRY=published)
    assert outcome.status == 0, outcome.stderr + outcome.stdout
    assert session.report()["image"]["digest"] == f"sha256:{tiny.built.digest}"
    assert session.report()["verification"]["verdict"] == "ok"
    outcome = session.run("--prebuilt")
    assert outcome.status == 0, "the second time it is there"


def test_docker_pulls_a_prebuilt_image_itself(session: Session, tiny: Made, published: str) -> None:
    engine = docker_engine()
    name = f"{published}/tiny-mini@sha256:{tiny.built.digest}"
    with contextlib.suppress(docker.errors.ImageNotFound):
        engine.images.remove(tiny.built.reference, force=True)
    try:
        options = ("--runtime", "docker", "--prebuilt")
        outcome = session.run(*options, DRYDOCK_REGISTRY=f"127.0.0.1:1 {published}")
        assert outcome.status == 0, outcome.stderr + outcome.stdout
        report = session.report()
        assert report["runtime"] == "docker"
        assert report["image"]["digest"] == f"sha256:{tiny.built.digest}"
        assert report["image"]["config_digest"] == f"sha256:{tiny.built.config_digest}"
        assert report["verification"]["verdict"] == "ok"
        assert [tier["outcome"] for tier in report["tiers"]] == ["passed"] * 3
        outcome = session.run(*options)
        assert outcome.status == 0, "the second time the engine holds it"
        assert "pull into docker" not in outcome.stderr
        assert blobs(session) == []
    finally:
        for each in (name, tiny.built.reference):
            with contextlib.suppress(docker.errors.ImageNotFound):
                engine.images.remove(each, force=True)


@pytest.mark.parametrize("runtime", ["chroot", "docker"])
def test_a_prebuilt_image_that_is_nowhere_is_one_line(
    session: Session, tiny: Made, runtime: str, tmp_path: Path
) -> None:
    if runtime == "docker":
        docker_engine()
    options = ("--runtime", runtime, "--prebuilt")
    other = replace(tiny.built, digest="0" * 64, config_digest="1" * 64)
    write_record(session.project.root, other)
    said = session.run(*options).error
    assert f"and {session.store.root} holds sha256:{tiny.built.digest[:12]}: set DRYDOCK_REGISTRY" in said
    with debian_registry(tmp_path) as host:
        push(tiny.store, tiny.built, Registry.read(host), {}, stream=io.StringIO())
        said = session.run(*options, DRYDOCK_REGISTRY=host).error
    assert f"tiny-mini sha256:{'0' * 64} is not to be had" in said
    assert said.endswith(": push tiny-mini there, or set DRYDOCK_REGISTRY to who has it")

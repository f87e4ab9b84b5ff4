"""Budgets as data: reading the file, and proposing a table from runs that is never looser than it was."""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drydock.errors import DrydockError
from drydock.propose import Table, ceiling, check_splice, floor, propose, read_runs, splice, tighten
from drydock.tiers import PHASES
from drydock.tiers.budgets import Limit, NoBudget, TierBudget, parse_tier, read_budgets, tier_budget

TABLE = """
[cpu-vllm.fast]
session = { ceiling = 480 }
[cpu-vllm.fast.rollout.phases]
start = { floor = 2.0, ceiling = 40.0 }
[cpu-vllm.fast.rollout.each]
test = { ceiling = 60.0 }
[cpu-vllm.fast.rollout.tests."test_serving.py::test_x"]
test = { floor = 1.0, ceiling = 20.0 }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "budgets.toml"
    path.write_text(text)
    return path


# ---------------------------------------------------------------------------------- reading


def test_a_table_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, TABLE)
    budget = tier_budget(path, "cpu-vllm", "fast", "rollout")
    assert budget == TierBudget(
        phases={"start": Limit(floor=2.0, ceiling=40.0)},
        each={"test": Limit(ceiling=60.0)},
        tests={"test_serving.py::test_x": {"test": Limit(floor=1.0, ceiling=20.0)}},
    )
    assert parse_tier(budget.document(), "it") == budget
    assert read_budgets(path)["cpu-vllm", "fast"].session == Limit(ceiling=480)


@pytest.mark.parametrize("which", [("h100-vllm", "fast", "rollout"), ("cpu-vllm", "full", "rollout"),
                                   ("cpu-vllm", "fast", "eplb")])  # fmt: skip
def test_no_table_says_how_to_make_one(tmp_path: Path, which: tuple[str, str, str]) -> None:
    for path in (written(tmp_path, TABLE), tmp_path / "missing.toml"):
        with pytest.raises(NoBudget) as refused:
            tier_budget(path, *which)
        assert f"has no table [{'.'.join(which)}]: measure with --unbudgeted" in str(refused.value)
        assert refused.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a.fast.rollout.phase]\ntest = { ceiling = 1 }", "a.fast.rollout: unknown key 'phase'"),
        ("[a.fast.rollout.phases]\ntests = { ceiling = 1 }", "a.fast.rollout.phases: unknown phase 'tests'"),
        (
            "[a.fast.rollout.phases]\ntest = { cieling = 1 }",
            "a.fast.rollout.phases.test: unknown key 'cieling'",
        ),
        ("[a.fast.rollout.phases]\ntest = 3", "a.fast.rollout.phases.test is not a table"),
        ("[a.fast.rollout.phases]\ntest = {}", "a.fast.rollout.phases.test has neither floor nor ceiling"),
        (
            "[a.fast.rollout.phases]\ntest = { ceiling = -1 }",
            "a.fast.rollout.phases.test: ceiling = -1 is not more than 0",
        ),
        ("[a.fast.rollout.phases]\ntest = { floor = 0 }", "floor = 0 is not more than 0"),
        ("[a.fast.rollout.phases]\ntest = { ceiling = inf }", "ceiling = inf is not a number of seconds"),
        ("[a.fast.rollout.phases]\ntest = { ceiling = true }", "ceiling = True is not a number of seconds"),
        ('[a.fast.rollout.phases]\ntest = { ceiling = "9" }', "ceiling = '9' is not a number of seconds"),
        (
            "[a.fast.rollout.phases]\ntest = { floor = 5, ceiling = 4 }",
            "a.fast.rollout.phases.test: floor 5 is over ceiling 4",
        ),
        (
            "[a.fast.rollout.each]\ntest = { floor = 1, ceiling = 4 }",
            "a.fast.rollout.each.test: a floor is for",
        ),
        ("[a.fast]\nsession = { floor = 1 }", "a.fast.session: a floor is for"),
        (
            '[a.fast.rollout.tests."test_x.py::test_y"]\ntset = { ceiling = 4 }',
            "a.fast.rollout.tests.\"test_x.py::test_y\": unknown phase 'tset'",
        ),
        ("[a]\nfast = 3", "a.fast is not a table"),
        ("a = 3", "a is not a table"),
        ("[a", "Expected"),
    ],
)
def test_a_wrong_table_is_one_line_that_names_table_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DrydockError) as refused:
        read_budgets(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_status == 2


def test_reading_needs_the_standard_library_only() -> None:
    """It runs in the image, beside whatever versions that has."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import drydock.tiers.budgets, drydock.tiers.profiles, drydock.tiers.watchdog, drydock.tiers.link\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(names - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['drydock']\n"


# ---------------------------------------------------------------------------------- the rule

seconds = st.floats(0.001, 3000, allow_nan=False).map(lambda value: round(value, 3))
runs_of_one = st.lists(seconds, min_size=3, max_size=7)


@settings(deadline=None)
@given(values=runs_of_one)
def test_what_was_measured_keeps_what_is_suggested(values: list[float]) -> None:
    assert ceiling(values) >= max(10.0, 1.2 * max(values), 1.5 * statistics.median(values))
    assert ceiling(values) == int(ceiling(values))
    least = floor(values)
    if min(values) < 1:
        assert least is None
    else:
        assert least is not None
        assert 0.3 * min(values) - 0.1 <= least + 1e-9 <= 0.3 * min(values) + 2e-9


def test_the_rule_by_hand() -> None:
    assert ceiling([10, 10.1, 10.2]) == 16  # 1.5 × 10.1
    assert ceiling([10, 11, 20]) == 24  # 1.2 × 20
    assert ceiling([8, 10, 12]) == 22  # 10 + 6 × 2
    assert ceiling([0.01, 0.02, 0.01]) == 10
    assert ceiling([70, 70, 70]) == 105
    assert ceiling([251, 251, 251]) == 380
    assert floor([10, 11, 20]) == 3.0
    assert floor([1.0, 1.0, 1.0]) == 0.3
    assert floor([0.99, 5, 5]) is None


@st.composite
def limits(draw: st.DrawFn) -> Limit | None:
    high = draw(st.none() | seconds)
    low = draw(st.none() | seconds)
    if high is not None and low is not None and low > high:
        low, high = high, low
    return None if high is None and low is None else Limit(floor=low, ceiling=high)


def no_looser(new: Limit, old: Limit | None) -> bool:
    if old is None:
        return True
    higher = old.ceiling is not None and (new.ceiling is None or new.ceiling > old.ceiling)
    lower = old.floor is not None and (new.floor is None or new.floor < old.floor)
    return not higher and not lower


@settings(deadline=None)
@given(values=runs_of_one, current=limits(), floors=st.booleans())
def test_an_entry_only_tightens(values: list[float], current: Limit | None, floors: bool) -> None:
    notes: list[str] = []
    new = tighten("it", values, current, floors, notes.append)
    assert no_looser(new, current)
    assert new.floor is None or new.ceiling is None or new.floor <= new.ceiling
    # Whatever does not fit what was measured is said.
    broken = (new.ceiling is not None and new.ceiling < max(values)) or (
        new.floor is not None and new.floor > min(values)
    )
    assert not broken or notes


# ---------------------------------------------------------------------------------- runs


def report(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A session's report of one passed run, as drydock.session writes it; each run a little slower."""
    slower = 1 + number / 100

    def phases(start: float, load: float, test: float) -> dict[str, float]:
        return {
            "start": start * slower,
            "load": load * slower,
            "ready": 0.0,
            "test": test * slower,
            "stop": 0.2,
        }

    def tier(name: str, *tests: tuple[str, dict[str, float]]) -> dict[str, Any]:
        rows = [
            {
                "id": f"tests/{name}/{test}",
                "outcome": "passed",
                "phases": spent,
                "seconds": sum(spent.values()),
            }
            for test, spent in tests
        ]
        sums = {phase: sum(row["phases"][phase] for row in rows) for phase in PHASES}
        return {
            "tier": name,
            "outcome": "passed",
            "complete": True,
            "whole": True,
            "phases": sums,
            "tests": rows,
        }

    return {
        "schema": 1, "session": "vllm_fast", "profile": "fast", "image": {"name": "cpu-vllm"},
        "began": f"2026-11-2{number}T10:00:00Z", "outcome": "passed", "detail": None, "seconds": 200.0 * slower,
        "steps": [{"name": "image", "seconds": 90.0}, {"name": "runtime", "seconds": 10.0}],
        "device": {"kind": "cpu", "cpu": "A CPU", "cores": 2}, "not_run": [],
        "verification": {"verdict": "ok"},
        "tiers": [
            tier("rollout", ("test_a.py::test_long[x y]", phases(20.0, 0.0, 30.0)),
                 ("test_a.py::test_short", phases(0.01, 0.0, 0.5))),
            tier("eplb", ("test_b.py::test_it", phases(0.02, 3.0, 10.0))),
        ],
    } | changes  # fmt: skip


def store(folder: Path, *reports: dict[str, Any]) -> Path:
    for number, document in enumerate(reports):
        (folder / f"run-{number}").mkdir(parents=True)
        (folder / f"run-{number}" / "report.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        ({"gpus": []}, "A CPU, 2 cores"),
        ({"gpus": [{"name": "NVIDIA H100"}]}, "1 x NVIDIA H100, A CPU, 2 cores"),
        ({"npus": [{"name": "910B3"}, {"name": "910B3"}]}, "2 x 910B3, A CPU, 2 cores"),
    ],
)
def test_a_table_names_the_accelerators_that_it_was_measured_on(
    tmp_path: Path, devices: dict[str, Any], named: str
) -> None:
    here = {"device": {"kind": "any", "cpu": "A CPU", "cores": 2, **devices}}
    runs = read_runs([store(tmp_path / "runs", *(report(number) | here for number in range(3)))])
    first = propose(runs, tmp_path / "budgets.toml", None).text.splitlines()[0]
    assert first == f"# 3 runs, 2026-11-20 to 2026-11-22, {named}; beside each entry their median ± MAD"


def test_a_first_table(tmp_path: Path) -> None:
    runs = read_runs([store(tmp_path / "runs", *(report(number) for number in range(3)))])
    table = propose(runs, tmp_path / "budgets.toml", None)
    assert table.notes == ()
    assert table.text == (
        "# 3 runs, 2026-11-20 to 2026-11-22, A CPU, 2 cores; beside each entry their median ± MAD\n"
        "[cpu-vllm.fast]\n"
        "session = { ceiling = 155 }  # 102.00 ± 2.00 s\n"
        "[cpu-vllm.fast.rollout.phases]\n"
        "start = { floor = 6, ceiling = 31 }  # 20.21 ± 0.20 s\n"
        "test = { floor = 9.1, ceiling = 47 }  # 30.80 ± 0.30 s\n"
        "stop = { ceiling = 10 }  # 0.40 ± 0.00 s\n"
        "[cpu-vllm.fast.rollout.each]\n"
        "start = { ceiling = 31 }  # 20.20 ± 0.20 s\n"
        "test = { ceiling = 46 }  # 30.30 ± 0.30 s\n"
        "stop = { ceiling = 10 }  # 0.20 ± 0.00 s\n"
        '[cpu-vllm.fast.rollout.tests."test_a.py::test_long[x y]"]\n'
        "start = { ceiling = 31 }  # 20.20 ± 0.20 s\n"
        "test = { floor = 9, ceiling = 46 }  # 30.30 ± 0.30 s\n"
        "[cpu-vllm.fast.eplb.phases]\n"
        "start = { ceiling = 10 }  # 0.02 ± 0.00 s\n"
        "load = { floor = 0.9, ceiling = 10 }  # 3.03 ± 0.03 s\n"
        "test = { floor = 3, ceiling = 16 }  # 10.10 ± 0.10 s\n"
        "stop = { ceiling = 10 }  # 0.20 ± 0.00 s\n"
        "[cpu-vllm.fast.eplb.each]\n"
        "start = { ceiling = 10 }  # 0.02 ± 0.00 s\n"
        "load = { ceiling = 10 }  # 3.03 ± 0.03 s\n"
        "test = { ceiling = 16 }  # 10.10 ± 0.10 s\n"
        "stop = { ceiling = 10 }  # 0.20 ± 0.00 s\n"
        '[cpu-vllm.fast.eplb.tests."test_b.py::test_it"]\n'
        "load = { ceiling = 10 }  # 3.03 ± 0.03 s\n"
        "test = { floor = 3, ceiling = 16 }  # 10.10 ± 0.10 s\n"
    )


def test_what_is_tighter_stays_and_is_said_and_what_is_looser_tightens(tmp_path: Path) -> None:
    current = written(
        tmp_path,
        """
[cpu-vllm.fast]
session = { ceiling = 150 }
[cpu-vllm.fast.rollout.phases]
start = { floor = 25, ceiling = 400 }  # the floor is over what the runs took
load = { ceiling = 7 }                 # not measured
test = { floor = 1, ceiling = 20 }     # the ceiling is under what the runs took
[cpu-vllm.fast.rollout.tests."test_a.py::test_short"]
test = { ceiling = 30 }
[cpu-vllm.fast.rollout.tests."test_a.py::test_gone"]
test = { ceiling = 30 }
[cpu-vllm.fast.trainer.each]
test = { ceiling = 33 }
""",
    )
    runs = [report(number) for number in range(3)]
    table = propose(runs, current, None)
    made = tomllib.loads(table.text)["cpu-vllm"]["fast"]
    assert made["session"] == {"ceiling": 150}
    assert made["rollout"]["phases"]["start"] == {"floor": 25, "ceiling": 31}
    assert made["rollout"]["phases"]["load"] == {"ceiling": 7}
    assert made["rollout"]["phases"]["test"] == {"floor": 9.1, "ceiling": 20}
    assert made["rollout"]["tests"]["test_a.py::test_short"] == {"test": {"ceiling": 10}}
    assert "test_a.py::test_gone" not in made["rollout"]["tests"]
    # No run has that tier.
    assert made["trainer"] == {"each": {"test": {"ceiling": 33}}}
    assert table.notes == (
        "cpu-vllm.fast.rollout.phases.start: keeps its floor of 25 s, the runs took 20.0 to 20.4 s",
        "cpu-vllm.fast.rollout.phases.test: keeps its ceiling of 20 s, the runs took 30.5 to 31.1 s",
        'cpu-vllm.fast.rollout.tests."test_a.py::test_gone": no run has that test, and the table no entry for it '
        "any more",
    )

    loosened = propose(runs, current, "the model grew")
    made = tomllib.loads(loosened.text)["cpu-vllm"]["fast"]
    assert loosened.text.splitlines()[1] == "# loosened on 2026-11-22: the model grew"
    assert made["session"] == {"ceiling": 155}
    assert made["rollout"]["phases"]["start"] == {"floor": 6, "ceiling": 31}
    assert made["rollout"]["phases"]["test"] == {"floor": 9.1, "ceiling": 47}
    assert loosened.notes == table.notes[2:]
    # The reason stays as long as the table does.
    current.write_text(splice(current.read_text(), loosened))
    assert "# loosened on 2026-11-22: the model grew\n" in propose(runs, current, None).text


def flat(document: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Limit]:
    if document and document.keys() <= {"floor", "ceiling"}:
        return {path: Limit(**document)}
    return {key: limit for name, part in document.items() for key, limit in flat(part, (*path, name)).items()}


def scaled(document: dict[str, Any], factor: float) -> dict[str, Any]:
    made = copy.deepcopy(document)
    made["seconds"] = 100 + (made["seconds"] - 100) * factor
    for tier in made["tiers"]:
        for phases in (tier["phases"], *(row["phases"] for row in tier["tests"])):
            phases.update({phase: value * factor for phase, value in phases.items()})
    return made


@settings(deadline=None)
@given(
    first=st.lists(st.floats(0.01, 30), min_size=3, max_size=5),
    then=st.lists(st.floats(0.01, 30), min_size=3, max_size=5),
)
def test_a_whole_table_only_tightens(
    tmp_path_factory: pytest.TempPathFactory, first: list[float], then: list[float]
) -> None:
    path = tmp_path_factory.mktemp("budgets") / "budgets.toml"
    path.write_text(propose([scaled(report(), factor) for factor in first], path, None).text)
    old = read_budgets(path)["cpu-vllm", "fast"]
    table = propose([scaled(report(), factor) for factor in then], path, None)
    path.write_text(table.text)
    new = read_budgets(path)["cpu-vllm", "fast"]  # and it is a table that can be read
    assert old.session is not None
    assert new.session is not None
    assert no_looser(new.session, old.session)
    for tier, budget in old.tiers.items():
        after = flat(new.tiers[tier].document())
        for key, limit in flat(budget.document()).items():
            assert no_looser(after[key], limit), key


def test_a_session_of_some_tiers_says_nothing_about_the_whole(tmp_path: Path) -> None:
    row = {"what": "the trainer tier", "reason": "only rollout was asked for (--tier)"}
    runs = [report(number, not_run=[row]) for number in range(3)]
    assert "session" not in propose(runs, tmp_path / "none.toml", None).text
    current = written(tmp_path, "[cpu-vllm.fast]\nsession = { ceiling = 9 }\n")
    assert "session = { ceiling = 9 }  # kept, not measured" in propose(runs, current, None).text


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([report(), report(1)], "2 runs say nothing about the spread: give at least 3"),
        ([], "no report.json there"),
        ([report(), report(1), report(2, outcome="failed", detail="a test")], "did not pass (a test)"),
        ([report(), report(1), report(2, tiers=[])], "did not pass (no tier ran)"),
        (
            [report(), report(1), report(2, device={"cpu": "A CPU", "cores": 2, "emulated": "aarch64"})],
            "aarch64 was emulated there: measure where cpu-vllm runs itself",
        ),
        (
            [report(), report(1), report(2, verification={"verdict": "drift"})],
            "what ran there was not what cpu-vllm is locked to be: measure that",
        ),
        (
            [report(), report(1), report(2, image={"name": "h100-vllm"})],
            "different images or profiles have no common budget: cpu-vllm fast in ",
        ),
        ([report(), report(1), report(2, profile="full")], "cpu-vllm full in "),
        ([report(), report(1), report(2) | {"tiers": report()["tiers"][:1]}], "runs of different tiers"),
        (
            [report(), report(1), report(2) | {"tiers": [report()["tiers"][0] | {"whole": False}]}],
            "only a part of the rollout tier ran",
        ),
        ([report(), report(1), {"schema": 1}], "is no session's report"),
    ],
)
def test_runs_that_do_not_measure(tmp_path: Path, reports: list[dict[str, Any]], message: str) -> None:
    (tmp_path / "runs").mkdir()
    store(tmp_path / "runs", *reports)
    with pytest.raises(DrydockError) as refused:
        read_runs([tmp_path / "runs"])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_same_run_counts_once(tmp_path: Path) -> None:
    folder = store(tmp_path / "runs", report(), report(1))
    (folder / "latest").symlink_to("run-1")
    with pytest.raises(DrydockError, match="2 runs say nothing"):
        read_runs([folder, folder / "latest", folder / "latest" / "report.json"])


# ---------------------------------------------------------------------------------- the file

FILE = """# What time each tier may take.

# of the cpu image
[cpu-vllm.fast]
session = { ceiling = 9 }
[cpu-vllm.fast.rollout.each]
test = { ceiling = 3 }

# the other one, a comment to keep
[h100-vllm.fast]
session = { ceiling = 7 }  # and this

[cpu-vllm.full.rollout.each]
test = { ceiling = 5 }
[cpu-vllm.fast.eplb.each]
test = { ceiling = 3 }
"""
OTHERS = """# the other one, a comment to keep
[h100-vllm.fast]
session = { ceiling = 7 }  # and this

[cpu-vllm.full.rollout.each]
test = { ceiling = 5 }
"""


def table(text: str) -> Table:
    return Table(image="cpu-vllm", profile="fast", text=text, notes=())


def test_a_table_is_spliced_in_where_it_was() -> None:
    new = table("# 3 runs\n[cpu-vllm.fast]\nsession = { ceiling = 4 }\n")
    made = splice(FILE, new)
    assert made == f"# What time each tier may take.\n\n{new.text}\n{OTHERS}"
    assert splice(made, new) == made


def test_a_new_table_comes_at_the_end() -> None:
    new = table("# 3 runs\n[cpu-vllm.fast]\nsession = { ceiling = 4 }\n")
    assert splice("", new) == new.text
    assert splice(OTHERS, new) == f"{OTHERS}\n{new.text}"
    assert splice(OTHERS.rstrip(), new) == f"{OTHERS}\n{new.text}"


def test_a_file_of_another_form_is_not_touched() -> None:
    new = table("[cpu-vllm.fast]\nsession = { ceiling = 4 }\n")
    with pytest.raises(DrydockError, match="put the printed table in by hand"):
        splice("[cpu-vllm]\nfast.session = { ceiling = 9 }\n", new)
    with pytest.raises(DrydockError, match="put the printed table in by hand"):
        check_splice(OTHERS, OTHERS.replace("7", "8") + new.text, new)
    check_splice(OTHERS, OTHERS + new.text, new)


@settings(deadline=None)
@given(
    image=st.text('ab-."é \\', min_size=1, max_size=5), test=st.text('ab:[]."é \\', min_size=1, max_size=8)
)
def test_any_name_survives_the_file(image: str, test: str) -> None:
    runs = [report(number, image={"name": image}) for number in range(3)]
    for run in runs:
        run["tiers"][0]["tests"][0]["id"] = f"tests/rollout/{test}"
    assume(test != "test_a.py::test_short")
    made = propose(runs, Path("/nonexistent/budgets.toml"), None)
    document = tomllib.loads(splice(OTHERS, made))
    assert document[image]["fast"]["rollout"]["tests"].keys() == {test}
    assert document["h100-vllm"] == {"fast": {"session": {"ceiling": 7}}}


# ---------------------------------------------------------------------------------- the command


def drydock(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "drydock.cli", "budget", "propose", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_prints_writes_and_refuses(tmp_path: Path) -> None:
    for name in ("images", "lock", "tests"):
        (tmp_path / name).mkdir()
    path = written(tmp_path / "tests", f"[cpu-vllm.fast]\nsession = {{ ceiling = 50 }}\n\n{OTHERS}")
    before = path.read_text()
    runs = str(store(tmp_path / "runs", *(report(number) for number in range(3))))

    done = drydock(tmp_path, runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# 3 runs, ")
    assert done.stderr == (
        "drydock: cpu-vllm.fast.session: keeps its ceiling of 50 s, the runs took 100.0 to 104.0 s\n"
    )
    assert path.read_text() == before

    done = drydock(tmp_path, "--write", "--loosen", "more tests", runs)
    assert done.returncode == 0, done.stderr
    assert path.read_text() == f"{done.stdout}\n{OTHERS}"
    assert "# loosened on 2026-11-22: more tests\n" in done.stdout
    assert read_budgets(path)["cpu-vllm", "fast"].session == Limit(ceiling=155)

    for arguments, message in (
        ([f"{runs}/run-0"], "1 runs say nothing about the spread"),
        (["--loosen", " ", runs], "--loosen needs a reason, in one line"),
        (["--loosen", "two\nlines", runs], "--loosen needs a reason, in one line"),
        ([str(tmp_path / "nothing")], "no report.json there"),
    ):
        done = drydock(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert message in line


def test_a_proposed_table_holds_the_runs_it_is_of(tmp_path: Path) -> None:
    """Every figure of every run lies between floor and ceiling."""
    runs = [report(number) for number in range(5)]
    path = written(tmp_path, propose(runs, tmp_path / "none.toml", None).text)
    for run in runs:
        for tier in run["tiers"]:
            budget = tier_budget(path, "cpu-vllm", "fast", tier["tier"])
            for phase, limit in budget.phases.items():
                assert (limit.floor or 0) <= tier["phases"][phase] <= (limit.ceiling or math.inf)
            for row in tier["tests"]:
                own = budget.tests.get(row["id"].removeprefix(f"tests/{tier['tier']}/"), {})
                for phase, limit in {**budget.each, **own}.items():
                    assert (limit.floor or 0) <= row["phases"][phase] <= (limit.ceiling or math.inf)

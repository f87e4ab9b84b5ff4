"""The tiers' pytest plugin (`-p drydock.tiers.plugin`): phases, budgets, profile values, honest outcomes.

It turns the process into a watchdog and its child, which is pytest from then on: see `watchdog`.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.outcomes import OutcomeException

from drydock.errors import CheckFailed, DrydockError
from drydock.tiers import install
from drydock.tiers import record as _record
from drydock.tiers.budgets import TierBudget, tier_budget
from drydock.tiers.device import CPU, CUDA, Device, device_for
from drydock.tiers.link import Link
from drydock.tiers.processes import age
from drydock.tiers.profiles import PROFILES, Profile, kind_of, read_profile

GRACE_SECONDS = 5.0
"""For a test to come back after it was told to leave."""
STILL_SECONDS = 30.0
"""Between lines that say what is still running."""
EXIT_SECONDS = 30.0
"""For pytest's process to end after its last test."""
PATIENCE = 6
"""Times as long has it where no budget holds: under emulation, beside another such run, 30 s were too few."""
DETAIL_CHARACTERS = 20_000
STAGES = {"setup": "start", "call": "test", "teardown": "stop"}
"""pytest's stage -> the phase it is."""
MARKERS = (
    "full(reason): runs in the full profile only; why it is not in fast",
    "needs(gpus): fails as missing where there are fewer GPUs, or NPUs in an image that is made for those",
    "serves(*engines): starts the engine's server: needs a GPU or an NPU in an image that is made for one",
    "cuda(reason): why it is not for an image that is made for NPUs",
    "accelerated(reason): why it is not for an image that is made for no accelerator",
    "engine(name): what it tests is that engine's, so it is not for the image of another",
    "lacks(engine, reason): that engine does not have what it tests; why",
    "asked(*options): runs only when all of these options of pytest are given",
)


class BudgetExceeded(OutcomeException):
    """Raised in a test that is over its budget.

    Of pytest's own kind of outcome, which is no `Exception`: a test's `except Exception` does not stop it,
    and pytest remembers it for a shared fixture and goes on with the other finalizers. But not what
    `pytest.fail` raises: hypothesis takes that for a counterexample and runs the test again.
    """

    __module__ = "builtins"  # as pytest's own, for a short name in its output


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("drydock", "the tiers of drydock")
    group.addoption("--tier", help="folder under tests/")
    group.addoption("--profile", choices=PROFILES)
    group.addoption("--image", help="the image this runs in, for its budgets")
    group.addoption("--engine", help="whose image it is; that of any without")
    group.addoption("--accelerator", default="none", help="what the image is made for: none, cuda, npu")
    group.addoption("--cpu-part", action="store_true", help="leave out what needs an accelerator")
    group.addoption("--results", type=Path, help="folder for the result document and logs")
    group.addoption("--budgets", type=Path, help="tests/budgets.toml by default")
    group.addoption("--unbudgeted", action="store_true", help="measure: hold the run to no budget")
    group.addoption("--session-seconds", type=_seconds, help="what is left of the session's budget")
    group.addoption("--gsm8k-model", help="folder of the model")
    group.addoption("--gsm8k-data", help="folder of the data set")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds):
        raise ValueError
    return seconds


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """Before anything of the tier is imported, and before output is captured."""
    options = early_config.known_args_namespace
    if options.help or options.collectonly:
        return (yield)
    tier = _begin(early_config)
    early_config.pluginmanager.register(tier, "drydock-tier")
    try:
        return (yield)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        tier.link.tell("broken", id=f"tests/{options.tier}", message=text.splitlines()[-1], detail=text)
        raise


def _begin(config: pytest.Config) -> Tier:
    """Read what the run is held to and start the watchdog.

    Raises:
        pytest.UsageError: an option is missing.
        SystemExit: the budgets or the profile are wrong (status 2), or the session has no time left (1).
    """
    # The tier's time is that of its process: Python's and pytest's own start is a part of it. Asked here, since it is
    # another process after the link is made, pytest being the child of what then is the watchdog.
    began = time.monotonic() - age()
    options = config.known_args_namespace
    missing = [name for name in ("tier", "profile", "image", "results") if not getattr(options, name)]
    if missing:
        raise pytest.UsageError(f"a tier needs {', '.join(f'--{name}' for name in missing)}")
    try:
        options.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--results {options.results}: {error.strerror}") from error
    tests = config.rootpath / "tests"
    budget: TierBudget | None = None
    profile = Profile(options.profile, tests, {})
    refusal: DrydockError | None = None
    kind = kind_of(options.profile, options.cpu_part)
    try:
        if not (tests / options.tier).is_dir():
            raise DrydockError(f"no tier {options.tier!r}: there is no folder {tests / options.tier}")
        profile = read_profile(tests / options.tier / "profile.toml", options.profile)
        if not options.unbudgeted:
            path = options.budgets or tests / "budgets.toml"
            budget = tier_budget(path, options.image, kind, options.tier)
        if options.session_seconds is not None and options.session_seconds <= 0:
            raise CheckFailed("the session's budget was used up before the tier began")
    except DrydockError as error:
        refusal = error
    try:
        link = Link(BudgetExceeded, _watchdog_gone)
        link.order(
            tier=options.tier,
            profile=kind,
            image=options.image,
            results=str(options.results.absolute()),
            budget=budget and budget.document(),
            session_seconds=options.session_seconds,
            began=began,
            profile_values=profile.document(),
            grace=GRACE_SECONDS,
            still=STILL_SECONDS,
            exit=EXIT_SECONDS * (PATIENCE if options.unbudgeted else 1),
            refusal=refusal and str(refusal),
        )
    except DrydockError as error:
        refusal = error
    if refusal:
        print(f"drydock: {refusal}", file=sys.stderr)
        raise SystemExit(refusal.exit_status)
    return Tier(config, link, profile)


def _watchdog_gone() -> BaseException:
    return pytest.exit.Exception("drydock: the tier's watchdog ended: no result is written", returncode=3)


class Missing(pytest.fail.Exception):  # type: ignore[name-defined, misc]
    """What a test needs is not here."""

    __module__ = "builtins"


class Tier:
    """The hooks of a running tier: what happens goes to the watchdog, its verdicts come back as failures."""

    def __init__(self, config: pytest.Config, link: Link, profile: Profile) -> None:
        self.config = config
        self.link = link
        self.profile = profile
        self._failed = False
        self._problems: list[str] = []
        install(link)

    # ---------------------------------------------------------------- collection

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            _fail(report, f"{report.longrepr[2]}: a tier skips nothing, use a marker of drydock.tiers.plugin")
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            text = report.longreprtext
            # A traceback's own last word, or all there is.
            lines = [line for line in text.splitlines() if line.startswith("E  ")] or text.splitlines()[-1:]
            message = lines[-1].removeprefix("E").strip()
            self.link.tell("broken", id=report.nodeid, message=message, detail=_cut(text))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.link.tell(
            "collected",
            tests=[item.nodeid for item in session.items],
            not_selected=self.config.stash[NOT_SELECTED],
            whole=_whole(self.config),
        )

    # ---------------------------------------------------------------- a test

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        self._failed = False
        mid_line = self.config.get_terminal_writer().width_of_current_line > 0
        answer = self.link.ask("test", id=item.nodeid, mid_line=mid_line)
        # True: it is dealt with, pytest goes on with the next one.
        return True if answer.get("refused") else None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None]:
        with self.link.stage(STAGES["setup"]):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None]:
        with self.link.stage(STAGES["call"]):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        with self.link.stage(STAGES["teardown"]):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None]:
        if fixturedef.scope == "function":
            return (yield)
        with self.link.shared():
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.skipped or hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "xfail"
            _fail(
                report, f"{reason}: a tier skips nothing and expects no failure, use a marker of its plugin"
            )
        if report.failed:
            self._failed = True
            error = call.excinfo.value if call.excinfo else None
            outcome = (
                "missing" if isinstance(error, Missing) else "failed" if call.when == "call" else "error"
            )
            self.link.tell(
                "report",
                outcome=outcome,
                phase=self.link.phase_of(error, STAGES[call.when]),
                message=_first_line(report),
                detail=_cut(report.longreprtext),
            )
        if call.when == "teardown":
            verdict = self.link.ask("done")
            # What the test itself did not notice: it swallowed the exception, or was too quick.
            if verdict.get("outcome") in ("overrun", "underrun") and not self._failed:
                _fail(report, verdict["message"])
        return report

    # ---------------------------------------------------------------- the end

    def pytest_internalerror(self, excrepr: Any) -> None:
        text = str(excrepr)
        self.link.tell("broken", id="pytest", message=text.splitlines()[-1], detail=_cut(text))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # pytest also leaves its loop this way, after errors in collection for one.
        if not isinstance(excinfo.value, pytest.Session.Interrupted):
            self.link.tell("interrupted", by=self.link.by or f"{excinfo.typename}: {excinfo.value}")

    @pytest.hookimpl(tryfirst=True, specname="pytest_sessionfinish")
    def pytest_finishing(self) -> None:
        self.link.tell("finishing")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._problems = self.link.ask("end", unread=self._unread()).get("problems", [])
        if self._problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _unread(self) -> list[str]:
        """Profile values that no test read, nor would one that is not selected now, by what is written."""
        folder = self.config.rootpath / "tests" / self.config.getoption("tier")
        text = ""
        if self.config.stash[NOT_SELECTED]:
            text = "\n".join(path.read_text() for path in folder.rglob("*.py"))
        return [name for name in self.profile.unread() if f'"{name}"' not in text and f"'{name}'" not in text]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._problems:
            terminalreporter.write_line(f"drydock: {self.config.getoption('tier')}: {line}", red=True)

    def pytest_unconfigure(self) -> None:
        install(None)


# -------------------------------------------------------------------- what is selected

NOT_SELECTED = pytest.StashKey[list[dict[str, str]]]()
NARROWED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    config.stash[NOT_SELECTED] = []
    config.stash[NARROWED] = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = [_reason(item) for item in items]
    gone = [item for item, reason in zip(items, reasons, strict=True) if reason]
    rows = [
        {"id": item.nodeid, "reason": reason} for item, reason in zip(items, reasons, strict=True) if reason
    ]
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
    config.stash[NOT_SELECTED] += rows
    if gone:
        config.hook.pytest_deselected(items=gone)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        rows = item.config.stash[NOT_SELECTED]
        if item.nodeid not in {row["id"] for row in rows}:
            rows.append({"id": item.nodeid, "reason": "left out on the command line"})
            item.config.stash[NARROWED] = True


def _reason(item: pytest.Item) -> str | None:
    """Why this profile and these options do not select a test.

    Raises:
        pytest.UsageError: a marker says it wrongly.
    """
    for marker in item.iter_markers("needs"):
        if marker.args or set(marker.kwargs) != {"gpus"} or not isinstance(marker.kwargs["gpus"], int):
            raise pytest.UsageError(f"{item.nodeid}: write needs(gpus=NUMBER)")
    reasons = []
    if item.config.getoption("cpu_part") and (number := _devices_for(item)):
        word = f"{_device(item).word}{'s' * (number > 1)}"
        reasons.append(f"needs {number} {word}, and --cpu-part asks for what needs none")
    engine = item.config.getoption("engine")
    for (name,) in _words(item, "engine", "NAME"):
        if engine not in (None, name):
            reasons.append(f"what it tests is {name}'s")
    for name, why in _words(item, "lacks", "ENGINE", '"what it does not have"'):
        if engine == name:
            reasons.append(why)
    for (why,) in _words(item, "full", '"why it is not in the fast profile"'):
        if item.config.getoption("profile") != "full":
            reasons.append(why)
    for (why,) in _words(item, "cuda", '"why it is not for NPUs"'):
        if item.config.getoption("accelerator") == "npu":
            reasons.append(why)
    for (why,) in _words(item, "accelerated", '"why it needs an accelerator"'):
        if item.config.getoption("accelerator") == "none":
            reasons.append(why)
    for marker in item.iter_markers("asked"):
        for name in marker.args:
            try:
                given = item.config.getoption(name)
            except ValueError as error:
                raise pytest.UsageError(
                    f"{item.nodeid}: asked({name!r}): pytest has no such option"
                ) from error
            if not given:
                reasons.append(f"runs when --{name.replace('_', '-')} is given")
    return "; ".join(reasons) or None


def _words(item: pytest.Item, marker: str, *wanted: str) -> Iterator[tuple[str, ...]]:
    """The arguments of each marker of that name, which are to be so many texts.

    Raises:
        pytest.UsageError: a marker has others.
    """
    for found in item.iter_markers(marker):
        if (
            found.kwargs
            or len(found.args) != len(wanted)
            or not all(isinstance(each, str) for each in found.args)
        ):
            raise pytest.UsageError(f"{item.nodeid}: write {marker}({', '.join(wanted)})")
        yield found.args


def _whole(config: pytest.Config) -> bool:
    """Whether the command line asks for all that the tier has."""
    folder = (config.rootpath / "tests" / config.getoption("tier")).resolve()
    asked = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    everything = any(folder == path or path in folder.parents for path in asked)
    ignored = config.getoption("ignore") or config.getoption("ignore_glob")
    return everything and not ignored and not config.stash[NARROWED]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before its fixtures: what a test needs is here, or it fails."""
    device = _device(item)
    needed, here = _devices_for(item), device.usable()
    if here < needed:
        raise Missing(f"needs {needed} {device.word}s, {here} are here", pytrace=False)


def _device(item: pytest.Item) -> Device:
    """What a test runs on that needs an accelerator; a GPU in an image that is made for none."""
    device = device_for(item.config.getoption("accelerator"))
    return CUDA if device is CPU else device


def _devices_for(item: pytest.Item) -> int:
    """How many accelerators a test needs in this image."""
    engine, made_for = item.config.getoption("engine"), item.config.getoption("accelerator")
    # Of the engines that are named, or of any.
    serves = made_for != "none" and any(
        not marker.args or engine in (None, *marker.args) for marker in item.iter_markers("serves")
    )
    numbers: list[int] = [marker.kwargs["gpus"] for marker in item.iter_markers("needs")]
    return max([int(bool(serves)), *numbers])


# -------------------------------------------------------------------- reports


def _fail(report: pytest.TestReport | pytest.CollectReport, line: str) -> None:
    """Make a failure of a report that was none."""
    report.outcome = "failed"
    report.longrepr = line
    if hasattr(report, "wasxfail"):
        del report.wasxfail


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (crash.message if crash else report.longreprtext).removeprefix("Missing: ")
    return next((line.strip() for line in text.splitlines() if line.strip()), "no word of why")


def _cut(text: str) -> str:
    return text if len(text) <= DETAIL_CHARACTERS else f"...{text[-DETAIL_CHARACTERS:]}"


# -------------------------------------------------------------------- fixtures


def _tier(request: pytest.FixtureRequest) -> Tier:
    found = request.config.pluginmanager.get_plugin("drydock-tier")
    assert isinstance(found, Tier)
    return found


@pytest.fixture(scope="session")
def profile(request: pytest.FixtureRequest) -> Profile:
    """The tier's profile values: `profile["max_model_len"]`."""
    return _tier(request).profile


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> str:
    """The name of the image's engine."""
    return request.config.getoption("engine") or "vllm"


@pytest.fixture(scope="session")
def record() -> Callable[[str, Any], None]:
    """`drydock.tiers.record`."""
    return _record


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Path:
    """Folder for logs, next to the result document."""
    return Path(request.config.getoption("results")).absolute()

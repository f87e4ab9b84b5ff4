"""A run's `report.json`, typed on reading, with what the report derives from it: failures, budget use, verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from drydock.errors import DrydockError

DOCUMENT = "report.json"
SCHEMA = 1
MOST_LINE = 300

Phase = Literal["start", "load", "ready", "test", "stop"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a test goes through them."""

TestOutcome = Literal[
    "passed", "failed", "error", "overrun", "underrun", "crashed", "missing", "not-run"
]  # fmt: skip
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


def clean(value: Any) -> Any:
    """The JSON value with every character escaped that a page, an XML file or a terminal cannot show.

    Test names and messages come from anywhere: they hold control characters (XML forbids them, a terminal obeys
    them), halves of surrogate pairs (no UTF-8 file can hold them) and marks that turn the direction of text.

    >>> clean("a\\x1b[31m\\udcff")
    'a\\\\x1b[31m\\\\udcff'
    """
    if isinstance(value, str):
        if value.replace("\n", "").replace("\t", "").isprintable():
            return value
        return "".join(
            character
            if character in "\n\t" or character.isprintable()
            else character.encode("unicode_escape").decode()
            for character in value
        )
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


class Model(BaseModel):
    """A frozen part of a document. What a newer drydock adds to it is no error."""

    model_config = ConfigDict(frozen=True)


class Limit(Model):
    """What a phase may take, in seconds."""

    floor: Seconds | None = None
    ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, kw_only=True)
class Use:
    """What was used of a budget: seconds against a floor and a ceiling, of one phase or of a sum."""

    name: str
    seconds: float
    limit: Limit

    @property
    def share(self) -> float | None:
        """Seconds as a part of the ceiling; over 1 is an overrun."""
        return None if self.limit.ceiling is None else self.seconds / self.limit.ceiling

    @property
    def headroom(self) -> str:
        """What is left below the ceiling, in words."""
        if self.limit.floor is not None and self.seconds < self.limit.floor:
            return f"below the floor of {duration(self.limit.floor)}"
        if self.share is None:
            return ""
        if self.share > 1:
            return f"{math.ceil((self.share - 1) * 100)}% over"
        return f"{math.floor((1 - self.share) * 100)}% left"

    @property
    def kept(self) -> bool:
        """Whether it lies between its floor and its ceiling."""
        return self.seconds >= (self.limit.floor or 0) and (self.share or 0) <= 1


def duration(seconds: float) -> str:
    """Seconds for people: `0.42 s`, `3.2 s`, `61.5 s`, `412 s`."""
    digits = 2 if seconds < 1 else 1 if seconds < 100 else 0
    return f"{seconds:.{digits}f} s"


def _uses(phases: Mapping[Phase, float], limits: Mapping[Phase, Limit]) -> tuple[Use, ...]:
    return tuple(
        Use(name=phase, seconds=phases.get(phase, 0.0), limit=limits.get(phase, Limit()))
        for phase in PHASES
        if phases.get(phase) or phase in limits
    )


def tightest(uses: tuple[Use, ...]) -> Use | None:
    """The use nearest to its ceiling, or over it: what breaks first."""
    limited = [use for use in uses if use.share is not None]
    return max(limited, key=lambda use: use.share or 0.0, default=None)


class Test(Model):
    """One test of a tier."""

    __test__ = False  # its name would have pytest collect it

    id: str
    outcome: TestOutcome
    phase: Phase | None = None
    message: Text = ""
    detail: Text = ""
    stacks: str | None = None
    seconds: Seconds = 0.0
    phases: dict[Phase, Seconds] = {}
    budget: Annotated[dict[Phase, Limit], BeforeValidator(lambda value: value or {})] = {}
    records: Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})] = {}

    @property
    def short(self) -> str:
        """The id from its file's name on."""
        path, separator, rest = self.id.partition("::")
        return path.rpartition("/")[2] + separator + rest

    @property
    def name(self) -> str:
        """The id without its file, where space is scarce."""
        return self.short.partition("::")[2] or self.short

    @property
    def failed(self) -> bool:
        """Whether the test itself went wrong; one that never ran did not, but has not passed either."""
        return self.outcome not in ("passed", "not-run")

    @property
    def uses(self) -> tuple[Use, ...]:
        return _uses(self.phases, self.budget)

    @property
    def tightest(self) -> Use | None:
        return tightest(self.uses)


class NotSelected(Model):
    id: str
    reason: Text


class ProfileValue(Model):
    """A parameter of a tier: the value it ran with, both profiles' values, what the fast one gives up."""

    name: str
    value: Any
    fast: Any
    full: Any
    gives_up: Text = ""


class TierBudget(Model):
    phases: dict[Phase, Limit] = {}


class Tier(Model):
    """A tier's run. `whole` is whether all of it was asked for: with `-k`, sums are of some tests only."""

    tier: str
    began: AwareDatetime | None = None
    seconds: Seconds
    outcome: Literal["passed", "failed", "overrun", "underrun", "crashed", "interrupted"]
    detail: Text = ""
    complete: bool = True
    whole: bool = True
    phases: dict[Phase, Seconds] = {}
    budget: TierBudget | None = None
    tests: tuple[Test, ...] = ()
    not_selected: tuple[NotSelected, ...] = ()
    profile_values: tuple[ProfileValue, ...] = ()
    survivors: tuple[str, ...] = ()

    @property
    def passed(self) -> tuple[Test, ...]:
        return tuple(test for test in self.tests if test.outcome == "passed")

    @property
    def failed(self) -> tuple[Test, ...]:
        return tuple(test for test in self.tests if test.failed)

    @property
    def not_run(self) -> tuple[Test, ...]:
        return tuple(test for test in self.tests if test.outcome == "not-run")

    @property
    def ok(self) -> bool:
        """Whether all of it may be called passed."""
        return self.outcome == "passed" and self.complete and len(self.passed) == len(self.tests)

    @property
    def why(self) -> str:
        """One line on what kept it from passing as a whole."""
        if self.detail or self.ok:
            return self.detail
        return self.outcome if self.complete else f"{self.outcome}: its document is not complete"

    @property
    def explains(self) -> bool:
        """Whether it says something that its failed tests do not: it broke as a whole, or left something."""
        return bool(self.survivors) or (not self.ok and not (self.outcome == "failed" and self.failed))

    @property
    def uses(self) -> tuple[Use, ...]:
        limits = self.budget.phases if self.budget else {}
        if not self.whole:
            limits = {phase: Limit(ceiling=limit.ceiling) for phase, limit in limits.items()}
        return _uses(self.phases, limits)

    @property
    def tightest(self) -> Use | None:
        return tightest(self.uses)

    @property
    def total(self) -> Use | None:
        """Its phases that have a ceiling, summed, against the sum of their ceilings."""
        limited = [use for use in self.uses if use.limit.ceiling is not None]
        if not limited:
            return None
        ceiling = sum(use.limit.ceiling or 0.0 for use in limited)
        return Use(name=self.tier, seconds=sum(use.seconds for use in limited), limit=Limit(ceiling=ceiling))


class Finding(Model):
    subject: str
    what: str


class Check(Model):
    """One check of the verification."""

    name: str
    state: str
    checked: int = 0
    seconds: Seconds = 0.0
    detail: Text = ""
    findings: tuple[Finding, ...] = ()


class Verification(Model):
    """What `python -m drydock.verify` said."""

    verdict: Literal["ok", "drift"]
    full: bool = False
    python: str = ""
    checks: tuple[Check, ...] = ()

    @property
    def sentence(self) -> str:
        """The verdict with its counts."""
        counts = ", ".join(f"{check.checked:,} {check.name}" for check in self.checks if check.checked > 1)
        differences = sum(len(check.findings) for check in self.checks)
        if self.verdict == "ok" and not differences:
            return f"as locked ({counts})"
        return f"differs from the lock in {plural(differences, 'place')} ({counts})"


class ImageName(Model):
    name: str
    digest: str | None = None
    config_digest: str | None = None


class Commit(Model):
    commit: str | None = None
    dirty: bool = False

    @property
    def text(self) -> str:
        return (self.commit or "not known")[:12] + (", with uncommitted changes" if self.dirty else "")


class Accelerator(Model):
    """A GPU or an NPU."""

    name: str
    memory_bytes: int = 0
    driver: Text = ""


class Device(Model):
    kind: str
    cpu: Text = ""
    cores: int = 0
    memory_bytes: int = 0
    emulated: Text = ""
    gpus: tuple[Accelerator, ...] = ()
    npus: tuple[Accelerator, ...] = ()

    @property
    def text(self) -> str:
        """One line: what the run had to compute with."""
        parts = []
        for one in dict.fromkeys((*self.gpus, *self.npus)):
            count = (*self.gpus, *self.npus).count(one)
            parts.append(f"{count} × {one.name}, {_gib(one.memory_bytes)} each, driver {one.driver}")
        parts.append(f"{self.cpu or 'CPU'}, {plural(self.cores, 'core')}, {_gib(self.memory_bytes)}")
        if self.emulated:
            parts.append(f"{self.emulated} emulated")
        return "; ".join(parts)


class Step(Model):
    name: str
    seconds: Seconds


class SessionBudget(Model):
    ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NotRun(Model):
    what: str
    reason: Text


class Report(Model):
    """A session's run, whole."""

    session: str
    engine: str
    profile: str
    image: ImageName
    drydock: Commit
    began: AwareDatetime
    seconds: Seconds
    outcome: Literal["passed", "failed"]
    detail: Text = ""
    runtime: str
    device: Device
    verification: Verification | None = None
    drift_allowed: bool = False
    steps: tuple[Step, ...] = ()
    overhead_seconds: float = Field(0.0, allow_inf_nan=False)
    budget: SessionBudget | None = None
    tiers: tuple[Tier, ...] = ()
    not_run: tuple[NotRun, ...] = ()

    @property
    def tests(self) -> tuple[tuple[Tier, Test], ...]:
        return tuple((tier, test) for tier in self.tiers for test in tier.tests)

    @property
    def ok(self) -> bool:
        """Passed as a whole and in each part: nothing that failed is hidden by a wrong outcome above it."""
        return self.outcome == "passed" and all(tier.ok for tier in self.tiers) and not self.drifted

    @property
    def differs(self) -> bool:
        """Whether verification found differences from the lock."""
        return self.verification is not None and self.verification.verdict != "ok"

    @property
    def drifted(self) -> bool:
        """Whether such differences fail the run."""
        return self.differs and not self.drift_allowed

    @property
    def drift(self) -> str:
        """What a run that was let go on with other versions has to say first; empty for all others."""
        if self.verification is None or not self.differs or not self.drift_allowed:
            return ""
        return f"not the locked image: it {self.verification.sentence}"

    @property
    def whole(self) -> bool:
        """Whether its time compares with that of other runs: nothing of it was left out."""
        return all(tier.whole for tier in self.tiers) and not self.not_run

    @property
    def use(self) -> Use:
        """The session's seconds against its ceiling."""
        limit = Limit(ceiling=self.budget.ceiling) if self.budget else Limit()
        return Use(name="session", seconds=self.seconds, limit=limit)

    @property
    def when(self) -> str:
        return self.began.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")

    @property
    def verdict(self) -> str:
        """The run in one sentence, without its name and outcome."""
        ran = sum(test.outcome != "not-run" for _, test in self.tests)
        failed = [(tier.tier, len(tier.failed)) for tier in self.tiers if tier.failed]
        idle = sum(len(tier.not_run) for tier in self.tiers)
        aside = f"; {plural(idle, 'test')} did not run" if idle else ""
        if failed:
            where = ", ".join(f"{name} {count}" for name, count in failed)
            return f"{sum(count for _, count in failed)} of {plural(ran, 'test')} failed ({where}){aside}"
        if not self.ok:
            broken = [f"{tier.tier}: {tier.why}" for tier in self.tiers if not tier.ok]
            return one_line(self.detail or "; ".join(broken) or "the image differs from its lock") + aside
        tiers = plural(len(self.tiers), "tier")
        return f"all {plural(ran, 'test')} of {tiers} passed" if ran else "no test failed, and none ran"


def plural(count: int, noun: str) -> str:
    """`1 test`, `2 tests`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def one_line(text: str) -> str:
    """The text on one line of a length that a person still reads."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_LINE else f"{line[: MOST_LINE - 1]}…"


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def read(path: Path) -> Report:
    """Read a run's document.

    Raises:
        DrydockError: it is not there, or not ours, or of another schema.

    >>> read(Path("results/vllm_fast/latest/report.json")).outcome
    'passed'
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DrydockError(f"cannot read {path} ({error.strerror}): name the folder of a run") from error
    except (ValueError, RecursionError) as error:
        raise DrydockError(f"{path} is not a report of drydock's: it is not JSON ({error})") from error
    return parse(document, str(path))


def parse(document: object, source: str = DOCUMENT) -> Report:
    """The typed report of a document.

    Parameters:
        source: what errors call it.

    Raises:
        DrydockError: it is not ours, or of another schema.
    """
    if not isinstance(document, Mapping) or "schema" not in document:
        raise DrydockError(f"{source} is not a report of drydock's: it names no schema")
    if document["schema"] != SCHEMA:
        raise DrydockError(
            f"{source} has schema {document['schema']!r} and this drydock reads {SCHEMA}: "
            "use the drydock that wrote it"
        )
    try:
        return Report.model_validate(clean(document))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DrydockError(f"{source} is not a report of drydock's: {place}: {first['msg']}") from error


# ------------------------------------------------------------------- records that the report draws


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _layers(value: Any) -> Any:
    """One list a layer, also where a record has one layer only and so just a list."""
    return [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value


Loads = Annotated[
    tuple[
        Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], Field(min_length=1)], ...
    ],
    Field(min_length=1),
    BeforeValidator(_layers),
]


class ExpertLoad(Model):
    """The load of each rank in each layer, before and after a rearrangement."""

    before: Loads
    after: Loads
    unit: str = "tokens"
    title: str = "Expert load"

    @model_validator(mode="after")
    def _same_shape(self) -> ExpertLoad:
        shapes = {tuple(len(layer) for layer in side) for side in (self.before, self.after)}
        if len(shapes) > 1 or len(set(next(iter(shapes)))) > 1:
            raise ValueError("before and after must have the same layers, and each layer the same ranks")
        return self


class Series(Model):
    """One value a step, such as the mean reward; values that are not finite are gaps."""

    x: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = Field(min_length=1)
    y: tuple[Annotated[float, BeforeValidator(_finite)], ...]
    title: str = "Series"
    x_label: str = ""
    y_label: str = ""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _same_length(self) -> Series:
        if len(self.x) != len(self.y):
            raise ValueError("x and y must have the same length")
        if all(math.isnan(value) for value in self.y):
            raise ValueError("no value of y is a finite number")
        return self


def balance(layer: tuple[float, ...]) -> float | None:
    """How even a layer's load is over its ranks, mean ÷ maximum: 1 is even, 1/ranks is all on one.

    None for a layer that had no load, which is neither.
    """
    return sum(layer) / len(layer) / max(layer) if max(layer) > 0 else None


SHAPES: dict[str, type[ExpertLoad] | type[Series]] = {"expert_load": ExpertLoad, "series": Series}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A value that a test recorded. `drawn` is what it is where the report can draw it; `problem` is why not,
    where its name says that it could."""

    tier: str
    test: Test
    name: str
    value: Any
    drawn: ExpertLoad | Series | None = None
    problem: str = ""


def records(report: Report) -> Iterator[Recorded]:
    """Every recorded value, in order of run. One of a known shape may be a list of such values."""
    for tier, test in report.tests:
        for name, value in test.records.items():
            shape = SHAPES.get(name)
            for item in value if shape and isinstance(value, list) else [value]:
                drawn, problem = None, ""
                if shape:
                    try:
                        drawn = shape.model_validate(item)
                    except ValidationError as error:
                        problem = error.errors()[0]["msg"]
                yield Recorded(
                    tier=tier.tier, test=test, name=name, value=item, drawn=drawn, problem=problem
                )  # fmt: skip

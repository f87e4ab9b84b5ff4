"""The commands of docs/*.md are run, in order, in a fresh copy of the repository, and what a page quotes must come.

A page's ```console blocks hold commands (`$ `) and what they print. Each quoted line must be printed, in that order;
its figures and digests may be others, and `...` stands for what is left out. A ```diff block is applied,
a ```text block is to read. All exit with 0. What is put in place of something, or is otherwise in a run, stands before
the block it is for:

    <!-- test: tiny-mini for cpu-vllm -->     the small image of these tests; several are separated by commas
    <!-- test: status 1 -->                   how the block's last command exits
    <!-- test: other output: REASON -->       what is quoted is the real image's, and is not compared
    <!-- test: not run: REASON -->            only looked at: commands and options must exist
    <!-- test: with Docker -->                needs an engine
    <!-- test: first: COMMAND -->             run before, for the small image's sake
    <!-- test: file PATH -->                  the block is that file

Substitutions before the page's first heading are for all of it. With the small image goes a store that holds it,
otherwise the user's own is taken, and the user's own indexes and mirrors. No engine is asked but `with Docker`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import typer
from conftest import Made
from mini_image import REPOSITORY, Project, twin

from drydock import cli
from drydock.errors import DrydockError
from drydock.runtime import choose

PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
ALL_PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *PAGES]
SMALL = "tiny-mini"
NO_ENGINE = {"DOCKER_HOST": "unix:///nonexistent/docker.sock"}
TIERS = ("rollout", "trainer", "eplb")
BUDGETS = "".join(f"\n[tiny-mini.fast.{tier}.each]\ntest = {{ ceiling = 30 }}\n" for tier in TIERS)


@dataclass
class Block:
    """A fenced block: `kind` is its language, `line` where it begins."""

    kind: str
    line: int
    text: str = ""
    substitutions: dict[str, str] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    status: int = 0
    compared: bool = True
    run: bool = True
    docker: bool = False
    file: str = ""

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command with the lines it is said to print, as they are run."""
        found: list[tuple[str, list[str]]] = []
        for line in self.replaced().splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line:
                assert found, f"line {self.line}: output before any command"
                found[-1][1].append(line)
        return found

    def replaced(self) -> str:
        text = self.text
        for old, new in self.substitutions.items():
            text = text.replace(old, new)
        return text


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, with what their notes say.

    Raises:
        ValueError: a note or a block of no known kind, so that none is passed over.
    """
    everywhere: dict[str, str] = {}
    block = Block("", 0)
    inside = headed = False
    for number, line in enumerate(page.splitlines(), 1):
        if not headed and line.startswith("# "):
            headed, block = True, Block("", 0)
        if line.startswith("```") and not inside:
            block.kind, block.line, inside = line[3:], number, True
            block.substitutions = {**everywhere, **block.substitutions}
            if not block.file and block.kind not in ("console", "diff", "text"):
                raise ValueError(
                    f"line {number}: a block of {block.kind or 'no language'} that nobody looks at"
                )
        elif line.startswith("```"):
            if block.kind == "text" and re.search(r"^\$ ", block.text, re.MULTILINE):
                raise ValueError(f"line {block.line}: a command where nobody runs it")
            yield block
            block, inside = Block("", 0), False
        elif inside:
            block.text += f"{line}\n"
        elif note := re.fullmatch(r"<!-- test: (.+) -->", line):
            _read_note(note[1], block)
            if not headed:
                everywhere |= block.substitutions
        elif "<!--" in line:
            raise ValueError(f"line {number}: a comment that is no note of a test")
        elif line and headed and not line.startswith("# "):
            if block != Block("", 0):
                raise ValueError(f"line {number}: the note before it is for no block")
            block = Block("", 0)


def _read_note(text: str, block: Block) -> None:
    word, _, rest = text.partition(" ")
    if text.startswith("first: "):
        block.first.append(rest)
    elif word == "status":
        block.status = int(rest)
    elif found := re.fullmatch(r"(other output|not run): .{10,}", text):
        block.compared = found[1] != "other output"
        block.run = found[1] != "not run"
    elif word == "file":
        block.file = rest
    else:
        for part in text.split(", "):
            if part == "with Docker":
                block.docker = True
                continue
            new, found_for, old = part.partition(" for ")
            if not found_for:
                raise ValueError(f"no note of a test: {text}")
            block.substitutions[old] = new


def shape(line: str) -> str:
    """A line without its figures and digests."""
    return re.sub(r"sha256:[0-9a-f]+|\d[\d.,]*(?<![.,])", "0", line)


def not_printed(expected: list[str], printed: str) -> list[str]:
    """The quoted lines that did not come, in that order."""
    lines = iter([shape(line).rstrip() for line in printed.splitlines()])
    missing = []
    for line in expected:
        if line.strip() == "...":
            continue
        pattern = ".*".join(re.escape(part) for part in shape(line).rstrip().split("..."))
        if not any(re.fullmatch(pattern, each) for each in lines):
            missing.append(line)
    return missing


@dataclass(frozen=True)
class Reader:
    """Somebody who follows a page: a checkout and the stores of the small image and of the user."""

    checkout: Path
    small: Path
    users: Path

    def follow(self, page: Path, *, docker: bool = False) -> int:
        """Do what the page says; returns how many commands were run."""
        count = 0
        for block in blocks(page.read_text()):
            where = f"{page.name}:{block.line}"
            if block.docker and not docker:
                continue
            for command in block.first:
                assert self._run(command, block)[0] == 0, f"{where}: {command}"
            if block.file:
                (self.checkout / block.file).parent.mkdir(parents=True, exist_ok=True)
                (self.checkout / block.file).write_text(block.replaced())
            elif block.kind == "diff":
                done = subprocess.run(
                    ["git", "apply", "-"], cwd=self.checkout, input=block.replaced(),
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{where}: {done.stderr}"
            elif block.kind == "console" and block.run:
                commands = block.commands()
                for command, expected in commands:
                    status, printed = self._run(command, block)
                    wanted = block.status if command == commands[-1][0] else 0
                    assert status == wanted, f"{where}: `{command}` exits with {status}\n{printed[-3000:]}"
                    missing = not_printed(expected, printed) if block.compared else []
                    assert not missing, (
                        f"{where}: `{command}` did not print {missing[0]!r} but\n{printed[-3000:]}"
                    )
                    count += 1
        return count

    def _run(self, command: str, block: Block) -> tuple[int, str]:
        small = any(SMALL in new for new in block.substitutions.values())
        variables = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.checkout / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DRYDOCK_STORE": str(self.small if small else self.users),
            **({} if block.docker else NO_ENGINE),
        }
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=self.checkout, env=variables, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture(scope="session")
def small(tiny: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the small image, for all pages: it is unpacked once, and what a page makes is by hash."""
    return twin(tmp_path_factory.mktemp("small") / "store", tiny.store).root


@pytest.fixture
def reader(tmp_path: Path, project: Project, small: Path) -> Reader:
    """With a copy of what git has here, as it is in the working tree, and of the small image's definition and lock."""
    checkout = tmp_path / "checkout"
    listed = subprocess.run(["git", "-C", REPOSITORY, "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, checkout / name)
    for name in ("images/tiny/image.toml", "lock/pylock.tiny-mini.toml"):
        (checkout / name).parent.mkdir(exist_ok=True)
        shutil.copy(project.root / name, checkout / name)
    with (checkout / "tests/budgets.toml").open("a") as file:
        file.write(BUDGETS)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it is"]):
        who = ["-c", "user.name=reader", "-c", "user.email=reader@localhost"]
        subprocess.run(["git", *who, *words], cwd=checkout, check=True)
    users = Path(os.environ.get("DRYDOCK_STORE") or REPOSITORY / ".drydock")
    return Reader(checkout, small, users.absolute())


def _runs(page: Path, *, docker: bool) -> bool:
    found = blocks(page.read_text())
    return any(block.kind == "console" and block.run and block.docker == docker for block in found)


@pytest.fixture(scope="session")
def online() -> None:
    """Whether this user's index and mirrors answer, as drydock finds it."""
    asked = subprocess.run(
        [sys.executable, "-m", "drydock.cli", "doctor", "--json"],
        cwd=REPOSITORY, env={**os.environ, **NO_ENGINE}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    findings = {finding["what"]: finding for finding in json.loads(asked.stdout)["findings"]}
    for what in ("package index", "Debian mirror"):
        if findings[what]["state"] == "missing":
            pytest.skip(f"not run: {what}: {findings[what]['detail']}")


@pytest.mark.network
@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if _runs(page, docker=False)], ids=lambda page: str(page.stem)
)
def test_what_a_page_says_works(page: Path, reader: Reader) -> None:
    reader.follow(page)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if _runs(page, docker=True)], ids=lambda page: str(page.stem)
)
def test_what_a_page_says_of_docker_works(page: Path, reader: Reader) -> None:
    try:
        choose("docker")
    except DrydockError as error:
        if os.environ.get("DRYDOCK_REQUIRE_DOCKER"):
            pytest.fail(str(error))
        pytest.skip(f"not run: {error}")
    try:
        assert reader.follow(page, docker=True) > 0
    finally:
        loaded = f"docker images --quiet drydock/{SMALL} | xargs --no-run-if-empty docker image rm --force"
        subprocess.run(["bash", "-c", loaded], check=True)


# ------------------------------------------------------------------------------- every command, run or not


def mentioned(page: Path) -> Iterator[str]:
    """The commands of a page: in its blocks and in its text."""
    text = page.read_text()
    for command in re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE):
        yield command.replace("\\\n", "")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`((?:drydock|nox|make) [^`\n]+)`", prose)


@cache
def session_help() -> str:
    """What `nox -s vllm_fast -- --help` says."""
    asked = [sys.executable, "-m", "drydock.session", "vllm", "fast", "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def wrong_with(command: str) -> str:
    """Why a command of drydock, nox or make is none, or nothing; others are only looked at where they run."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        return "" if words[1] in targets else f"no target {words[1]}"
    if words[:2] == ["nox", "-s"]:
        if f"def {words[2]}(session" not in (REPOSITORY / "noxfile.py").read_text():
            return f"no session {words[2]}"
        unknown = [
            word
            for word in words[3:]
            if re.match("-[a-z-]", word) and word != "--" and word not in session_help()
        ]
        return f"no option {unknown[0]}" if unknown else ""
    if words[0] != "drydock":
        return ""
    group = typer.main.get_command(cli.app)
    name, *rest = words[1:]
    while (commands := getattr(group, "commands", None)) is not None and name in commands:
        group = commands[name]
        if not hasattr(group, "commands"):
            break
        if not rest:
            return ""  # a text names a group
        name, *rest = rest
    else:
        return "" if name.startswith("--") else f"no command {name}"
    try:
        group.make_context(name, rest)
    except Exception as error:
        # A text names a command without what it is given.
        return "" if type(error).__name__ == "MissingParameter" else str(error) or type(error).__name__
    return ""


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.stem))
def test_every_command_of_a_page_is_one(page: Path) -> None:
    wrong = {command: why for command in mentioned(page) if (why := wrong_with(command))}
    assert not wrong


def test_the_readmes_commands_are_those_that_ci_runs() -> None:
    ci = (REPOSITORY / ".ci/run").read_text()
    (first, *_) = blocks((REPOSITORY / "README.md").read_text())
    commands = [shlex.join(shlex.split(command, comments=True)) for command, _ in first.commands()]
    assert commands == ["make smoke", "make test"]
    assert all(re.search(rf"^.*{command}\b", ci, re.MULTILINE) for command in commands)


# ----------------------------------------------------------------------------------- and this can see it


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("drydock bild cpu-vllm", "no command bild"),
        ("drydock build cpu-vllm --lod", "--lod"),
        ("drydock diff one two three", "extra"),
        ("drydock budget suggest", "no command suggest"),
        ("nox -s vllm_quick", "no session vllm_quick"),
        ("nox -s vllm_fast -- --hard-ware cpu", "no option --hard-ware"),
        ("make image-h1000", "no target image-h1000"),
    ],
)
def test_a_command_that_is_none_is_seen(command: str, why: str) -> None:
    assert why in wrong_with(command)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("```console\n$ false\n```", "`false` exits with 1"),
        ("```console\n$ false\n$ true\n```", "`false` exits with 1"),
        ("<!-- test: status 1 -->\n```console\n$ true\n```", "`true` exits with 0"),
        ("```console\n$ echo one\ntwo\n```", "did not print 'two'"),
        ("```console\n$ printf 'one\\ntwo\\n'\ntwo\none\n```", "did not print 'one'"),
        ("```console\n$ echo 3.1 s of five\n2.7 s of four\n```", "did not print"),
        (
            "```diff\n--- a/Makefile\n+++ b/Makefile\n@@ -1 +1 @@\n-nothing\n+something\n```",
            "patch does not apply",
        ),
    ],
)
def test_a_page_that_is_wrong_is_seen(tmp_path: Path, block: str, why: str) -> None:
    (tmp_path / "page.md").write_text(f"# Page\n\n{block}\n")
    (tmp_path / "Makefile").write_text("all:\n")
    with pytest.raises(AssertionError, match=re.escape(why)):
        Reader(tmp_path, tmp_path, tmp_path).follow(tmp_path / "page.md")


@pytest.mark.parametrize(
    "page",
    [
        "# Page\n\n```\n$ true\n```\n",
        "# Page\n\n```sh\ntrue\n```\n",
        "# Page\n\n```text\n$ true\n```\n",
        "# Page\n\n<!-- nobody sees this -->\n```console\n$ true\n```\n",
        "# Page\n\n<!-- test: skip it -->\n```console\n$ true\n```\n",
        "# Page\n\n<!-- test: not run: why -->\n```console\n$ true\n```\n",
        "# Page\n\n<!-- test: status 1 -->\nText.\n\n```console\n$ true\n```\n",
    ],
)
def test_a_block_that_nobody_would_look_at_is_seen(page: str) -> None:
    with pytest.raises(ValueError, match=r"line \d|no note"):
        list(blocks(page))


def test_what_a_page_quotes_may_have_other_figures_and_leave_lines_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- test: there for here -->\n# Page\n\n```console\n$ printf 'a 1\\nb\\nhere 2.5 GB, sha256:ab\\n' # here\n"
        "a 12\n...\nhere 7 GB, ...\n```\n\n<!-- test: file new/here.txt -->\n```text\nhere\n```\n"
    )
    assert Reader(tmp_path, tmp_path, tmp_path).follow(page) == 1
    assert (tmp_path / "new/there.txt").exists() is False
    assert (tmp_path / "new/here.txt").read_text() == "there\n"

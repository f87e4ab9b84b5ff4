"""The command line: one command a step, each a few lines over the module that does the work."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from drydock import completion
from drydock.budget_cli import budget
from drydock.ci_cli import ci
from drydock.errors import CheckFailed, DrydockError
from drydock.project import get_artifacts, open_store, project_root
from drydock.store import Store
from drydock.supply_cli import supply

if TYPE_CHECKING or not completion.COMPLETING:
    # No shell's question needs what reads definitions, and pydantic takes most of the time that one may wait.
    from drydock.definition import Image, image_names
    from drydock.locks import Artifact
    from drydock.oci import Built, read_image

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Reproducible environments for LLM reinforcement-learning stacks.",
)
app.add_typer(budget, name="budget")
app.add_typer(ci, name="ci")
app.add_typer(supply)

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE]...", help="images; all when none is named", autocompletion=completion.image_names
    ),
]
Name = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="an image, as `drydock images` lists them",
        autocompletion=completion.image_names,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one line of JSON")]
RuntimeName = Annotated[
    str, typer.Option("--runtime", help="auto, docker or chroot", autocompletion=completion.runtimes)
]


def _say(document: object) -> None:
    print(json.dumps(document, sort_keys=False), flush=True)


@app.command()
def images(as_json: Json = False) -> None:
    """List the images that are defined, and how far each is on this machine."""
    from drydock.locks import read_pylock

    root = project_root()
    store = open_store(root)
    rows = []
    for name in image_names(root):
        image = Image.named(root, name)
        row: dict[str, Any] = {
            "image": name,
            "architecture": image.definition.architecture,
            "summary": image.engine.summary,
        }
        try:
            row["packages"] = len(read_pylock(image).packages)
            row["built"] = f"sha256:{read_image(store, name).digest}"
        except DrydockError as error:
            row["state"] = str(error)
        rows.append(row)
    if as_json:
        _say(rows)
        return
    for row in rows:
        print(f"{row['image']:<14} {row['architecture']:<6} {row['summary']}")
        print(f"{'':<14} {row.get('built') or row['state']}")


@app.command()
def lock(
    names: Names = None,
    check: Annotated[
        bool, typer.Option("--check", help="only say whether the locks are right, offline")
    ] = False,
    upgrade: Annotated[
        list[str] | None,
        typer.Option(
            "--upgrade", metavar="PKG", help="move this package", autocompletion=completion.package_names
        ),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="move every package that the definitions let move")
    ] = False,
    base: Annotated[bool, typer.Option("--base", help="only the bases")] = False,
    packages: Annotated[bool, typer.Option("--packages", help="only the Python packages")] = False,
    as_json: Json = False,
) -> None:
    """Resolve what images are made of, keeping the versions that are locked; or check the locks."""
    from drydock import relock

    root = project_root()
    chosen = [Image.named(root, name) for name in names or image_names(root)]
    if check:
        answer = relock.check(chosen)
        if as_json:
            _say(answer)
        else:
            for row in answer["locks"]:
                print(f"{row['lock']}: {'; '.join(row['problems']) or row.get('open', 'ok')}")
        if not answer["ok"]:
            bad = sum(1 for row in answer["locks"] if row["problems"])
            raise CheckFailed(f"{bad} of {len(answer['locks'])} locks are not right")
        return
    if base and packages:
        raise DrydockError("--base and --packages leave nothing out: name one of them, or none for both")
    changes = relock.lock(
        chosen,
        open_store(root),
        os.environ,
        upgrade=tuple(upgrade or ()),
        refresh=refresh,
        only_base=base,
        only_packages=packages,
        named=bool(names),
    )
    if as_json:
        _say(changes)
        return
    for change in changes:
        print(
            f"{change['lock']}: {change['package']} {change['from'] or '(new)'} -> {change['to'] or '(gone)'}"
        )
    print(f"{len(changes)} changes", file=sys.stderr)


@app.command()
def fetch(names: Names = None, as_json: Json = False) -> None:
    """Bring every artifact of images into the store, by sha256."""
    from dataclasses import asdict

    from drydock.build import Inputs
    from drydock.vendor import unread_line

    root = project_root()
    store = open_store(root)
    artifacts: dict[str, Artifact] = {}
    for image in [Image.named(root, name) for name in names or image_names(root)]:
        if image.unread and not names:
            print(f"{image.name}: left out, {unread_line(image)}", file=sys.stderr)
            continue
        artifacts |= {artifact.sha256: artifact for artifact in Inputs(image).artifacts()}
    report = asdict(get_artifacts(store, list(artifacts.values())))
    if as_json:
        _say(report)
        return
    print(f"{report['fetched']} fetched, {report['present']} were there, {report['seconds']:.1f} s")


@app.command()
def build(
    name: Name,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="PATH",
            help="also write an OCI layout folder, or an archive if PATH ends in .tar",
        ),
    ] = None,
    load: Annotated[bool, typer.Option("--load", help="load it into Docker")] = False,
    record: Annotated[bool, typer.Option("--record", help="write its digests into lock/images.toml")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="fail where its digests are not those of lock/images.toml")
    ] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="layers made at a time")] = None,
    as_json: Json = False,
) -> None:
    """Assemble an image from its locks. What is in the store already is not made again."""
    from drydock import oci
    from drydock.build import as_json as describe
    from drydock.build import build as assemble
    from drydock.published import compare, write_record
    from drydock.store import disk_errors

    root = project_root()
    store = open_store(root)
    image = Image.named(root, name)
    if output and output.suffix != ".tar" and output.exists() and not output.is_dir():
        raise DrydockError(f"{output} is a file: name a folder, or a path that ends in .tar")
    built, seconds = assemble(image, store, lambda artifacts: get_artifacts(store, artifacts), jobs)
    if output and output.suffix == ".tar":
        with disk_errors(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = output.with_name(f".{output.name}.part")
            try:
                with temporary.open("wb") as file:
                    oci.write_archive(store, built, file)
                temporary.rename(output)
            finally:
                temporary.unlink(missing_ok=True)
    elif output:
        oci.write_layout(store, built, output)
    if load:
        from drydock.runtime import choose
        from drydock.vendor import have_layers

        have_layers(store, image, built, os.environ)
        choose("docker").prepare(store, built)
    if record:
        write_record(root, built)
    recorded = compare(root, built)
    if as_json:
        _say(describe(built, seconds) | {"recorded": recorded})
    else:
        made = sum(layer.made for layer in built.layers)
        print(f"{built.name} sha256:{built.digest}")
        size = f"{len(built.layers)} layers ({made} made), {built.size / 1e9:.2f} GB"
        print(f"config sha256:{built.config_digest}, {size}, {seconds:.1f} s")
        print(f"lock/images.toml: {recorded}")
    if check and recorded != "same":
        raise CheckFailed(
            f"{built.name} is {recorded} in lock/images.toml: if that is meant, "
            f"`drydock build {built.name} --record` and commit it"
        )


Place = Annotated[
    str | None,
    typer.Argument(metavar="[REGISTRY]", help="HOST[:PORT][/PATH]; what DRYDOCK_REGISTRY says by default"),
]


@app.command()
def push(
    name: Name,
    registry: Place = None,
    no_sbom: Annotated[bool, typer.Option("--no-sbom", help="attach no SBOM to it")] = False,
    as_json: Json = False,
) -> None:
    """Send a built image to a registry, only what it lacks, with its SBOM; record its digest in lock/images.toml."""
    from dataclasses import asdict

    from drydock.progress import amount
    from drydock.publish import push as send
    from drydock.publish import registries
    from drydock.published import compare, write_record
    from drydock.referrers import attach
    from drydock.sbom import MEDIA_TYPE, sbom
    from drydock.vendor import vendor_source

    root = project_root()
    store = open_store(root)
    image = Image.named(root, name)
    built = read_image(store, image.name)
    others = []
    for other in image_names(root):
        if other != image.name and store.read_record("images", other):
            others.append(read_image(store, other, whole=False))
    base = vendor_source(image, os.environ) if image.vendor else None
    place = registries(os.environ, registry)[0]
    try:
        document = None if no_sbom else sbom(image, built, store)
    except DrydockError as error:
        raise DrydockError(f"no SBOM can be made of it: {error}; or push with --no-sbom") from error
    report = send(store, built, place, os.environ, others=others, base=base)
    recorded = compare(root, built)
    if recorded != "same":
        write_record(root, built)
    attached = None
    if document:
        title = f"{image.name}.cdx.json"
        attached = attach(store, built, place, os.environ, kind=MEDIA_TYPE, title=title, data=document.data)
    if as_json:
        _say(asdict(report) | {"sbom": attached and asdict(attached), "recorded": recorded})
        return
    print(f"{report.reference} sha256:{report.digest}")
    print(
        f"{report.blobs} blobs: {report.there} were there, {report.mounted} mounted, {report.uploaded} sent "
        f"({amount(report.sent)}), {report.seconds:.1f} s"
    )
    if attached:
        print(f"SBOM sha256:{attached.digest}: {'attached' if attached.added else 'was attached'}")
    was = "as recorded" if recorded == "same" else f"recorded now (was {recorded}): commit it"
    print(f"lock/images.toml: {was}")


@app.command()
def pull(name: Name, registry: Place = None, as_json: Json = False) -> None:
    """Bring an image into the store from a registry, by the digest in lock/images.toml and no other."""
    from dataclasses import asdict

    from drydock.progress import amount
    from drydock.publish import pull as take
    from drydock.publish import registries

    root = project_root()
    image = Image.named(root, name)
    places = registries(os.environ, registry)
    _, report = take(root, open_store(root), image.name, places, os.environ)
    if as_json:
        _say(asdict(report))
        return
    print(f"{image.name} sha256:{report.digest}")
    print(
        f"{report.blobs} blobs: {report.present} were there, {amount(report.received)} received from "
        f"{report.source or 'nowhere'}, {report.seconds:.1f} s"
    )


def _task(root: Path, results: Path | None, command: list[str], **extra: Any) -> Any:
    from drydock.runtime import Task

    return Task(command=tuple(command), checkout=root, results=results or root / "results", **extra)


def _prepared(root: Path, name: str, runtime_name: str) -> tuple[Any, Store, Built, str]:
    """A runtime that holds the image, and the kind of accelerator it is for, `none` where there is none here."""
    from drydock.runtime import choose
    from drydock.tiers.device import device_for
    from drydock.vendor import have_layers

    if runtime_name not in ("auto", "docker", "chroot"):
        raise DrydockError(f"unknown runtime {runtime_name!r}: there are auto, docker and chroot")
    store = open_store(root)
    image = Image.named(root, name)
    built = read_image(store, image.name)
    runtime = choose(runtime_name)  # type: ignore[arg-type]
    have_layers(store, image, built, os.environ)
    runtime.prepare(store, built)
    kind = image.definition.accelerator.kind
    return runtime, store, built, kind if device_for(kind).here() else "none"


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    name: Name,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="program and arguments, after --")
    ],
    runtime: RuntimeName = "auto",
    results: Annotated[Path | None, typer.Option("--results", help="folder mounted at /results")] = None,
    user: Annotated[
        str, typer.Option("--user", help="root or drydock", autocompletion=completion.users)
    ] = "root",
    environment: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE")] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="pass standard input through")
    ] = False,
) -> None:
    """Run a command in a built image; the checkout is at /drydock, read-only."""
    root = project_root()
    if user not in ("root", "drydock"):
        raise DrydockError(f"unknown user {user!r}: an image has root and drydock")
    variables = {}
    for text in environment or ():
        key, separator, value = text.partition("=")
        if not separator:
            raise DrydockError(f"--env {text!r} is not NAME=VALUE")
        variables[key] = value
    chosen, store, built, accelerator = _prepared(root, name, runtime)
    task = _task(
        root, results, command,
        environment=variables, user=user, interactive=interactive, accelerator=accelerator,
    )  # fmt: skip
    raise typer.Exit(chosen.run(store, built, task))


@app.command()
def verify(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[IMAGE]", help="an image; none inside of one", autocompletion=completion.image_names
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="compare hashes, not sizes")] = False,
    as_json: Json = False,
    runtime: RuntimeName = "auto",
) -> None:
    """Compare an image, from inside, with the lock it carries."""
    options = [*(["--full"] if full else []), *(["--json"] if as_json else [])]
    if name is None:
        from drydock.verify import main as verify_here

        raise typer.Exit(verify_here(options))
    root = project_root()
    chosen, store, built, accelerator = _prepared(root, name, runtime)
    # Only drydock's own package is mounted, at /drydock, so the verifier is ours whatever the checkout is.
    # No bytecode: what Python would write beside its library would be a stray to it.
    task = _task(
        Path(__file__).parent,
        root / "results",
        ["python", "-m", "drydock.verify", *options],
        environment={"PYTHONPATH": "/", "PYTHONDONTWRITEBYTECODE": "1"},
        accelerator=accelerator,
    )
    raise typer.Exit(chosen.run(store, built, task))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_FOLDER",
            help="such as results/vllm_fast/latest",
            autocompletion=completion.run_folders,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Make a run's page and JUnit file again from its report.json, and print its summary."""
    from drydock.report import DOCUMENT, JUNIT, PAGE, summary, write

    made = write(folder / DOCUMENT, folder)
    if not as_json:
        summary(made, folder)
        return
    _say(
        {
            "session": made.session,
            "image": made.image.name,
            "outcome": "passed" if made.ok else "failed",
            "verdict": made.verdict,
            "html": str(folder / PAGE),
            "junit": str(folder / JUNIT),
        }
    )


@app.command()
def contract(
    image_name: Name,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="PACKAGE==VERSION", help="look into that release instead"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look up everything the tiers use of an engine, verl and Megatron-core in their wheels, without a GPU."""
    from drydock.contract import look_up

    root = project_root()
    image = Image.named(root, image_name)
    answer = look_up(image, open_store(root), against or ())
    missing = answer.missing
    if as_json:
        _say(
            {
                "image": image.name,
                "packages": answer.packages,
                "missing": missing,
                "of_the_base": answer.of_the_base,
            }
        )
    else:
        for line in missing:
            print(line)
        each = answer.packages.items()
        looked = ", ".join(f"{name} {found['version']} ({found['uses']})" for name, found in each)
        print(
            f"{image.name}: {answer.uses} uses looked up in {looked}: {len(missing) or 'none'} missing{answer.aside}"
        )
    if missing:
        raise CheckFailed(f"{image.name}: {len(missing)} of {answer.uses} uses are not there")


@app.command()
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="leave out what asks a network")] = False,
    as_json: Json = False,
) -> None:
    """What this machine can do for drydock, and what to do about what it cannot."""
    from dataclasses import asdict

    from drydock.doctor import examine, verdict

    root = project_root()
    findings = []
    for finding in examine(root, open_store(root), os.environ, offline=offline):
        findings.append(finding)
        if not as_json:
            print(f"{finding.state:<8} {finding.what}: {finding.detail}", flush=True)
            if finding.advice:
                print(f"{'':<8} -> {finding.advice}", flush=True)
    why = verdict(findings)
    if as_json:
        _say({"ok": why is None, "findings": [asdict(finding) for finding in findings]})
    if why:
        raise CheckFailed(why)


@app.command("diff")
def diff_images(
    old: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE[@REVISION]",
            help="an image, or its lock in git then",
            autocompletion=completion.image_names,
        ),
    ],
    new: Annotated[str, typer.Argument(metavar="IMAGE[@REVISION]", autocompletion=completion.image_names)],
    as_json: Json = False,
) -> None:
    """What differs between two images, and which layers one who has the first pulls for the second."""
    from drydock.diff import diff, side, text_lines

    root = project_root()
    store = open_store(root)
    document = diff(side(root, store, old), side(root, store, new))
    if as_json:
        _say(document)
    else:
        print("\n".join(text_lines(document)))


@app.command("matrix")
def matrix_page(
    write: Annotated[bool, typer.Option("--write", help="write docs/matrix.md")] = False,
    check: Annotated[bool, typer.Option("--check", help="fail where docs/matrix.md is not this")] = False,
) -> None:
    """What each image holds and how far it has been proven, as a page."""
    from drydock.matrix import matrix

    root = project_root()
    text, path = matrix(root), root / "docs" / "matrix.md"
    if write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    elif check:
        if not path.is_file() or path.read_text() != text:
            raise CheckFailed("docs/matrix.md is not what locks and runs say: run `drydock matrix --write`")
        print("docs/matrix.md: ok")
    else:
        print(text, end="")


def _terminated(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> NoReturn:
    """The `drydock` program: errors of ours are one line on standard error and their exit status."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    # As ctrl-C does, so that workers and half-written files go before the process does.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        status = app(standalone_mode=False)
    except TyperException as error:
        print(f"drydock: {error.format_message().rstrip('.')}: see `drydock --help`", file=sys.stderr)
        sys.exit(2)
    except DrydockError as error:
        print(f"drydock: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    if status == 130:
        print("drydock: stopped; what is complete is kept", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()

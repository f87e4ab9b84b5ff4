"""How long an image takes to build, next to BuildKit's exports of the same tree and a plain `tar | zstd`.

From one run: drydock builds the image from fetched artifacts in a store without layers, builds it again with
nothing changed, and again with one package moved to another release. What it built is then unpacked into one
tree, which `tar | zstd` packs and BuildKit copies and exports. Run it on a quiet machine: it takes three
times the unpacked image on disk, and for a GPU image most of an hour.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from common import (
    Document,
    Parser,
    Ran,
    bumped_project,
    drydock,
    gigabytes,
    main,
    need_space,
    other_release,
    output,
    run_measured,
    say,
    seed,
    work_folder,
)

from drydock.build import Inputs
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.oci import EPOCH, Layer, read_image
from drydock.project import open_store, project_root
from drydock.store import Store
from drydock.unpack import folder, remove_tree, unpack

CONTEXT = "drydock-benchmark"
"""BuildKit's name for the tree; it is in the description of every cache record that a leg leaves behind."""
DOCKERFILE = f"FROM scratch\nCOPY --from={CONTEXT} . /\n"
UNPACKED = 2.7
"""Bytes of an unpacked image over those of its artifacts, to guess the room it takes before it is built."""
CANCEL_SECONDS = 60

STEPS = {"load from client": "send", "COPY --from=": "copy", "exporting to": "export"}
"""Words in BuildKit's name of a step -> ours: the tree to the engine, the tree into a layer, the export."""
PARTS = re.compile(r"(exporting layers|rewriting layers|sending tarball).* ([\d.]+)s done$")
"""What BuildKit times within an export."""

NOTES = {
    "drydock.cold": (
        "whole command, from wheels and debs in the store to layers, config and manifest: unpacks, "
        "compiles bytecode, builds the wheels nobody published, hashes, compresses with zstd level 3, fsyncs"
    ),
    "drydock.bumped": "whole command; the other release is fetched before",
    "tar-zstd": "one archive of the finished tree, bytecode included: the floor; no image, no hash, no fsync",
    "buildkit": (
        "starts from the finished tree with its bytecode, which drydock compiles within its own time; "
        "its archive goes to a pipe and is counted, not written; --no-cache, nothing is left of an earlier leg"
    ),
    "buildkit.seconds": "whole command: sends the tree to the engine, copies it into a layer, exports it",
    "buildkit.export-seconds": "the export alone: compresses, rewrites times where asked, sends the archive",
    "buildkit.reproducible": "type=oci, gzip (its default), rewrite-timestamp=true with SOURCE_DATE_EPOCH",
    "buildkit.zstd": "type=oci, zstd at its default level, times as they are: not reproducible",
    "ratios": "seconds of a leg over drydock.cold.seconds; with at-least, the leg was stopped at its limit",
    "peak-memory": "of the process tree, sampled; pss counts a page that several share once, rss each time",
}


def measure(arguments: Namespace) -> Document:
    if arguments.timeout <= 0:
        raise DrydockError(f"--timeout {arguments.timeout:g}: it takes more than 0 seconds")
    root = project_root()
    image = Image.named(root, arguments.image)
    source = open_store(root)
    inputs = Inputs(image)
    if output("docker", "buildx", "version") is None or output("docker", "info") is None:
        raise DrydockError("no Docker engine with buildx answers: start one, or set DOCKER_HOST")
    with work_folder(arguments.work, source) as work:
        _check_room(image, source, inputs, work)
        store = Store(work / "store")
        say(f"{image.name}: seeding an empty store with artifacts")
        seeded = seed(source, store, inputs.artifacts(), image.name)
        document: Document = {"image": image.name, "artifacts": {"bytes": seeded}}
        document["drydock"] = _drydock(image, store, work, arguments.bump)
        tree, document["tree"] = _tree(store, document["drydock"].pop("layers"), work)
        document["tar-zstd"] = _tar(tree)
        context = work / "context"
        context.mkdir()
        (context / "Dockerfile").write_text(DOCKERFILE)
        zstd = Leg("zstd", ["compression=zstd", "force-compression=true"])
        rewrite = Leg(
            "reproducible", ["rewrite-timestamp=true"], {"SOURCE_DATE_EPOCH": str(EPOCH)}, last=True
        )
        legs = [zstd] if arguments.skip_rewrite else [zstd, rewrite]
        document["buildkit"] = {leg.name: leg.run(context, tree, arguments.timeout) for leg in legs}
    document["ratios"] = _ratios(document)
    document["failed"] = [name for name, leg in document["buildkit"].items() if "error" in leg]
    document["notes"] = NOTES
    return document


def _check_room(image: Image, source: Store, inputs: Inputs, work: Path) -> None:
    """Ask for what the largest moment takes: BuildKit's copies and blob beside the tree.

    In the reproducible leg, which holds two blobs, the tree is removed once BuildKit has its copy.
    """
    compressed = sum(artifact.size for artifact in inputs.artifacts())
    unpacked = int(compressed * UNPACKED)
    with contextlib.suppress(DrydockError):
        built = read_image(source, image.name)
        compressed, unpacked = built.size, sum(layer.unpacked for layer in built.layers)
    engine = Path(output("docker", "info", "--format", "{{.DockerRootDir}}") or "")
    if engine.is_absolute() and engine.is_dir() and engine.stat().st_dev != work.stat().st_dev:
        need_space(engine, 2 * unpacked + 2 * compressed)
        need_space(work, unpacked + 2 * compressed)
    else:
        need_space(work, 3 * unpacked + compressed)


def _drydock(image: Image, store: Store, work: Path, bump: str) -> Document:
    def told(what: str, ran: Ran, said: Document) -> Document:
        made = [layer["title"] for layer in said["layers"] if layer["state"] == "made"]
        say(f"drydock, {what}: {ran.seconds:.1f} s, {gigabytes(ran.pss)} of memory, {len(made)} layers made")
        return {
            **ran.numbers(),
            "digest": said["digest"],
            "layers": len(said["layers"]),
            "layers-made": len(made),
            "size": said["size"],
        }

    before = {package.name: package.version for package in Inputs(image).lock.packages}.get(bump)
    artifact = other_release(image, bump, store)
    project = bumped_project(image, artifact, work / "project")

    ran, said = drydock(image.root, store.root, "build", image.name)
    cold = told("from artifacts", ran, said) | {"recorded": said["recorded"]}
    layers = read_image(store, image.name).layers
    ran, said = drydock(image.root, store.root, "build", image.name)
    unchanged = told("nothing changed", ran, said)
    ran, said = drydock(project.root, store.root, "build", image.name)
    bumped = told(f"{bump} {before} -> {artifact.version}", ran, said)
    made = [
        {"title": layer["title"], "size": layer["size"], "packages": len(layer["contents"])}
        for layer in said["layers"]
        if layer["state"] == "made"
    ]
    own = [layer for layer in said["layers"] if f"{bump} {artifact.version}" in layer["contents"]]
    expected = [layer["title"] for layer in (*own, said["layers"][-1])]
    bumped |= {
        "package": bump,
        "from": before,
        "to": artifact.version,
        "made": made,
        "only-its-layer-and-the-manifest": [layer["title"] for layer in made] == expected,
    }
    return {"cold": cold, "unchanged": unchanged, "bumped": bumped, "layers": layers}


def _tree(store: Store, layers: tuple[Layer, ...], work: Path) -> tuple[Path, Document]:
    """The image's content as one folder, as a container sees it; the store goes, to make room."""
    say("unpacking what was built into one tree")
    unpack(store, layers)
    tree = work / "tree"
    tree.mkdir()
    for layer in layers:
        source = folder(store, layer)
        for path in source.rglob("*"):
            # cp puts a later layer's file in place of an earlier one's, but no link in place of a folder.
            there = tree / path.relative_to(source)
            if _is_folder(there) and not _is_folder(path):
                remove_tree(there)
        # Hard links, gone again when the layers' own folders are removed.
        command = ["cp", "--archive", "--link", "--remove-destination", f"{source}/.", str(tree)]
        if subprocess.run(command, check=False).returncode:
            raise DrydockError(f"the layers of the image did not go together in {tree}")
    remove_tree(store.root)
    files = [entry.lstat() for entry in tree.rglob("*") if entry.is_symlink() or not entry.is_dir()]
    facts = {"files": len(files), "bytes": sum({found.st_ino: found.st_size for found in files}.values())}
    say(f"tree: {facts['files']} files, {gigabytes(facts['bytes'])}")
    return tree, facts


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _tar(tree: Path) -> Document:
    target = tree.with_name("tree.tar.zst")
    cores = len(os.sched_getaffinity(0))
    command = (
        f"set -o pipefail; tar --sort=name --mtime=@{EPOCH} --numeric-owner -cf - -C {tree.name} . "
        f"| zstd -q -T{cores} -3 -o {target.name}"
    )
    ran = run_measured(["bash", "-c", command], tree.parent, dict(os.environ))
    size = target.stat().st_size
    target.unlink()
    say(f"tar | zstd: {ran.seconds:.1f} s, {gigabytes(size)}")
    return {"command": command.partition("; ")[2], "seconds": round(ran.seconds, 2), "size": size}


@dataclass
class Leg:
    """One export of the tree by BuildKit.

    `outputs` are added to `type=oci`; `last` removes the tree as soon as BuildKit holds its copy of it.
    """

    name: str
    outputs: list[str]
    build_arguments: dict[str, str] = field(default_factory=dict)
    last: bool = False

    def run(self, context: Path, tree: Path, limit: float) -> Document:
        _prune()
        say(f"BuildKit, {self.name}: started, limit {limit:.0f} s")
        options = [f"--build-arg={name}={value}" for name, value in self.build_arguments.items()]
        command = [
            "docker", "buildx", "build", "--builder", "default", "--progress", "plain", "--no-cache",
            "--provenance=false", "--sbom=false", f"--build-context={CONTEXT}={tree}",
            f"--output={','.join(['type=oci', 'dest=-', *self.outputs])}", *options, str(context),
        ]  # fmt: skip
        os.sync()
        log = Log(remove_tree_at_export=tree if self.last else None)
        began = time.monotonic()
        # In a session of its own, so that stopping it reaches buildx, which docker runs as a child.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout
        assert process.stderr
        readers = [
            threading.Thread(target=log.count, args=(process.stdout,)),
            threading.Thread(target=log.read, args=(process.stderr,)),
        ]
        for reader in readers:
            reader.start()
        finished = True
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            finished = False
        finally:
            ended = time.monotonic()
            _stop(process)
            for reader in readers:
                reader.join()
            _prune()
        return self._document(log, ended - began, finished, ended, process.returncode)

    def _document(self, log: Log, seconds: float, finished: bool, ended: float, status: int) -> Document:
        leg: Document = {"finished": finished, "seconds": round(seconds, 2)}
        if finished and status:
            say(f"BuildKit, {self.name}: failed after {seconds:.0f} s: {log.last}")
            return leg | {"finished": False, "error": log.last}
        leg["export-seconds"] = log.done.get("export")
        if not finished and "export" in log.began and leg["export-seconds"] is None:
            leg["export-seconds"] = round(ended - log.began["export"], 2)
        leg |= {
            "send-tree-seconds": log.done.get("send"),
            "copy-seconds": log.done.get("copy"),
            "export-parts": log.parts,
            "size": log.size if finished else None,
        }
        say(f"BuildKit, {self.name}: {'' if finished else 'stopped at its limit, '}{seconds:.1f} s")
        return leg


class Log:
    """What BuildKit's plain progress tells: when the steps of a leg began, how many seconds they took."""

    def __init__(self, remove_tree_at_export: Path | None) -> None:
        self._remove = remove_tree_at_export
        self._steps: dict[str, str] = {}
        self.began: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.parts: dict[str, float] = {}
        self.last = "it said nothing"
        self.size = 0

    def count(self, archive: IO[bytes]) -> None:
        while data := archive.read(1 << 20):
            self.size += len(data)

    def read(self, lines: IO[bytes]) -> None:
        for raw in lines:
            line = raw.decode(errors="replace").rstrip()
            self.last = line or self.last
            number, _, text = line.partition(" ")
            if number not in self._steps:
                self._steps[number] = next((step for words, step in STEPS.items() if words in text), "")
                self._begin(self._steps[number])
            step = self._steps[number]
            if step and (done := re.fullmatch(r"DONE ([\d.]+)s", text)):
                self.done[step] = float(done[1])
            if part := PARTS.match(text):
                self.parts[part[1]] = float(part[2])

    def _begin(self, step: str) -> None:
        if not step:
            return
        self.began[step] = time.monotonic()
        say(f"BuildKit: {step} begins")
        if step == "export" and self._remove:
            shutil.rmtree(self._remove, ignore_errors=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a leg that still runs: first as ctrl-C does, which lets the engine cancel the build."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, number)
                process.wait(CANCEL_SECONDS)


def _prune() -> None:
    """Remove what a leg left in the engine's build cache, and nothing of anybody else's."""
    deadline = time.monotonic() + CANCEL_SECONDS
    while time.monotonic() < deadline:
        records = (output("docker", "buildx", "du", "--builder", "default", "--verbose") or "").split("\n\n")
        mark = re.compile(rf"^Description:.*\b{CONTEXT}\b", re.MULTILINE)
        ours = [record for record in records if mark.search(record)]
        if not ours:
            return
        for record in ours:
            identity = re.search(r"^ID:\s*(\S+)", record, re.MULTILINE)
            if identity:
                output(
                    "docker",
                    "buildx",
                    "prune",
                    "--builder",
                    "default",
                    "--force",
                    f"--filter=id={identity[1]}",
                )
        # A cancelled build holds its records a moment longer.
        time.sleep(1)


def _ratios(document: Document) -> Document:
    cold = document["drydock"]["cold"]["seconds"]
    ratios: Document = {"tar-zstd": round(document["tar-zstd"]["seconds"] / cold, 3)}
    for name, leg in document["buildkit"].items():
        if "error" in leg:
            continue
        export = leg["export-seconds"]
        ratios[f"buildkit-{name}"] = {
            "whole": round(leg["seconds"] / cold, 2),
            "export": round(export / cold, 2) if export is not None else None,
            "at-least": not leg["finished"],
        }
    return ratios


def table(document: Document) -> str:
    own, ratios = document["drydock"], document["ratios"]
    cold, unchanged, bumped = own["cold"], own["unchanged"], own["bumped"]
    packed = document["tar-zstd"]
    moved = f"drydock, {bumped['package']} {bumped['from']} -> {bumped['to']}"
    made = ", ".join(layer["title"] for layer in bumped["made"])
    memory = gigabytes(cold["peak-memory-pss"])
    lines = [
        f"{document['image']}: {document['tree']['files']} files, {gigabytes(document['tree']['bytes'])}",
        f"{'drydock, from artifacts':<44} {cold['seconds']:>9.1f} s   memory: {memory}",
        f"{'drydock, nothing changed':<44} {unchanged['seconds']:>9.1f} s",
        f"{moved:<44} {bumped['seconds']:>9.1f} s   made: {made}",
        f"{'tar | zstd':<44} {packed['seconds']:>9.1f} s   {ratios['tar-zstd']:.2f} times drydock's",
    ]
    for name, leg in document["buildkit"].items():
        if "error" in leg:
            lines.append(f"BuildKit, {name}: failed: {leg['error']}")
            continue
        ratio, least = ratios[f"buildkit-{name}"], "" if leg["finished"] else "at least "
        for what, key in (("whole command", "whole"), ("export only", "export")):
            seconds = leg["seconds" if key == "whole" else "export-seconds"]
            if seconds is not None:
                title = f"BuildKit, {name}, {what}"
                lines.append(f"{title:<44} {seconds:>9.1f} s   {least}{ratio[key]:.2f} times drydock's")
    return "\n".join([*lines, "", *(f"{key}: {note}" for key, note in document["notes"].items())])


def _parser() -> Parser:
    parser = Parser(prog="build.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", default="h100-vllm", help="an image, as `drydock images` lists them")
    parser.add_argument("--bump", metavar="PACKAGE", default="tqdm", help="the package of the third build")
    parser.add_argument(
        "--skip-rewrite", action="store_true", help="leave out BuildKit's reproducible export"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="SECONDS", help="limit of each BuildKit leg"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where to work (default: the store's)")
    return parser


if __name__ == "__main__":
    main(_parser(), measure, table)

"""An image to a registry and from it to an empty Docker engine, before and after one package moved; and as one layer.

Everything is real: Debian's docker-registry on loopback, `drydock push`, and a second Docker engine with nothing in it,
which pulls by digest. Bytes are those that the registry's own access log says it received and served. The one-layer
image has the same base and the whole venv as one zstd layer, as a Dockerfile with one `pip install` makes it, pushed
and pulled in the same way. With `--session` the second engine then runs the fast tiers in what it pulled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from common import (
    Document,
    Parser,
    as_one_layer,
    bumped_project,
    drydock,
    gigabytes,
    main,
    need_space,
    other_release,
    output,
    say,
    seed,
    seed_layers,
    venv_layers,
    work_folder,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit"))

from debian_registry import debian_registry

from drydock.build import Inputs
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.oci import Built, canonical, manifest_document, read_image
from drydock.project import open_store, project_root
from drydock.publish import push
from drydock.registry import Registry
from drydock.store import Store

ACCESS = re.compile(r'"(?P<method>[A-Z]+) \S+ HTTP/[\d.]+" (?P<status>\d+) (?P<bytes>\d+)')
START_SECONDS = 60.0
BRIDGE = "drydock-bench"

NOTES = {
    "sent": "bytes of blobs that `drydock push` sent; the registry had the rest, or mounted it",
    "served": "bytes that the registry's access log has for the pull, answers without a body included",
    "one-layer": "the same layers but for the venv, bytecode included, as one zstd layer; the engine holds its base",
    "bump": "the package's other release with the rest as locked, as in pull.py",
}


@dataclass(frozen=True)
class Engine:
    """A Docker engine of its own, with nothing in it."""

    address: str
    folder: Path

    def docker(self, *arguments: str) -> str:
        done = subprocess.run(
            ["docker", *arguments], env={**os.environ, "DOCKER_HOST": self.address},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise DrydockError(f"`docker {' '.join(arguments)}`: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout


@contextlib.contextmanager
def own_bridge(name: str) -> Iterator[None]:
    """A network bridge: an engine that is told to have none takes the other engine's away."""
    if output("ip", "link", "add", name, "type", "bridge") is None:
        raise DrydockError(
            f"`ip link add {name} type bridge` fails: run this as root, with iproute2 installed"
        )
    try:
        yield
    finally:
        output("ip", "link", "delete", name)


@contextlib.contextmanager
def empty_engine(folder: Path) -> Iterator[Engine]:
    """Run a second Docker engine with its data in a folder.

    Raises:
        DrydockError: it does not start; the line has its last words.
    """
    folder.mkdir()
    # The path of a socket is at most 107 characters long.
    run = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    address = f"unix://{run}/docker.sock"
    (folder / "daemon.json").write_text(json.dumps({"features": {"containerd-snapshotter": True}}))
    command = [
        "dockerd", "--config-file", str(folder / "daemon.json"), "--host", address, "--data-root", str(folder / "data"),
        "--exec-root", str(run / "exec"), "--pidfile", str(run / "pid"), "--bridge", BRIDGE, "--iptables=false",
    ]  # fmt: skip
    log = folder / "dockerd.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    engine = Engine(address, folder)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                engine.docker("version", "--format", "{{.Server.Version}}")
                break
            except DrydockError as error:
                if time.monotonic() > deadline or process.poll() is not None:
                    last = log.read_text(errors="replace").splitlines()[-1:]
                    raise DrydockError(f"a second Docker engine does not start: {' '.join(last)}") from error
                time.sleep(0.2)
        yield engine
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(run, ignore_errors=True)


def served(log: Path, since: int) -> int:
    """Bytes of blobs and manifests that a registry's access log has after a place in it."""
    with log.open("rb") as file:
        file.seek(since)
        text = file.read().decode(errors="replace")
    return sum(int(found["bytes"]) for found in ACCESS.finditer(text) if found["method"] == "GET")


@dataclass(frozen=True)
class Places:
    """Where it happens: the registry, its log, the engine that pulls and the stores that push."""

    host: str
    log: Path
    engine: Engine

    def push(self, store: Store, built: Built) -> Document:
        """Push an image; what that took."""
        say(f"pushing {built.name}")
        pushed = push(store, built, Registry.read(self.host), os.environ)
        return {
            "size": built.size,
            "seconds": round(pushed.seconds, 2),
            "sent": pushed.sent,
            "blobs": pushed.uploaded,
        }

    def pull(self, built: Built) -> Document:
        """Pull an image into the engine; what that took."""
        say(f"pulling {built.name} into an engine of its own")
        since = self.log.stat().st_size
        began = time.monotonic()
        self.engine.docker("pull", "--quiet", f"{self.host}/{built.name}@sha256:{built.digest}")
        seconds = time.monotonic() - began
        return {"seconds": round(seconds, 2), "served": served(self.log, since)}


def measure(arguments: Namespace) -> Document:
    for program in ("docker", "dockerd", "docker-registry"):
        if not shutil.which(program):
            raise DrydockError(f"{program} is not installed (Debian: docker.io, docker-cli, docker-registry)")
    root = project_root()
    image = Image.named(root, arguments.image)
    source = open_store(root)
    locked = read_image(source, image.name)
    package = arguments.package or image.engine.distribution
    with work_folder(arguments.work, source) as work:
        # The registry holds three likes of the image, the engine two, one more unpacked in each, the store one.
        need_space(work, 6 * locked.size + 2 * sum(layer.unpacked for layer in locked.layers))
        store = Store(work / "store")
        seed(source, store, Inputs(image).artifacts(), image.name)
        seed_layers(source, store, locked.layers)
        drydock(image.root, store.root, "build", image.name)
        other = bumped_project(image, other_release(image, package, store), work / "project")
        with (
            debian_registry(work) as host,
            own_bridge(BRIDGE),
            empty_engine(work / "engine") as engine,
        ):
            places = Places(host, work / "registry.log", engine)
            document: Document = {
                "image": image.name,
                "package": package,
                "from": Inputs(image).versions[package],
                "to": Inputs(other).versions[package],
                "size": locked.size,
                "engine": engine.docker("version", "--format", "{{.Server.Version}}").strip(),
            }
            built = read_image(store, image.name)
            document["push"] = {"layers, first": places.push(store, built)}
            document["pull"] = {"layers, first": places.pull(built)}
            if arguments.session:
                document["session"] = session(image, places, work / "empty")
            with in_one_layer(store, image, built) as one:
                document["push"]["one layer, first"] = places.push(store, one)
            say(f"building {image.name} with {package} {document['to']}")
            drydock(other.root, store.root, "build", image.name)
            built = read_image(store, image.name)
            document["push"]["layers, bumped"] = places.push(store, built)
            document["pull"]["layers, bumped"] = places.pull(built)
            with in_one_layer(store, other, built) as one:
                document["push"]["one layer, bumped"] = places.push(store, one)
                document["pull"]["one layer, bumped"] = places.pull(one)
        document["ratio"] = {
            what: round(document[step]["one layer, bumped"][what] / document[step]["layers, bumped"][what], 2)
            for step, what in (("push", "sent"), ("pull", "served"))
        }
        return {**document, "notes": NOTES}


@contextlib.contextmanager
def in_one_layer(store: Store, image: Image, built: Built) -> Iterator[Built]:
    """The image with its venv as one layer, under a name of its own."""
    venv = venv_layers(image, built)
    with store.writer() as blob:
        diff_id = as_one_layer(store, venv, cast(IO[bytes], blob))
    layer = replace(venv[0], digest=blob.digest, size=blob.size, diff_id=diff_id, title="venv")
    first = built.layers.index(venv[0])
    layers = (*built.layers[:first], layer, *(each for each in built.layers[first:] if each not in venv))
    config = json.loads(store.path(built.config_digest).read_bytes())
    config["rootfs"]["diff_ids"] = [f"sha256:{each.diff_id}" for each in layers]
    config["history"] = []
    data = canonical(config)
    config_digest = store.put(data)
    manifest = store.put(canonical(manifest_document(data, config_digest, layers)))
    yield replace(
        built, name=f"{built.name}-one", digest=manifest, config_digest=config_digest, layers=layers
    )
    store.discard(blob.digest)


def session(image: Image, places: Places, empty: Path) -> Document:
    """The fast tiers of the recorded image, in the engine that pulled it, with a store that holds nothing."""
    say("running the fast tiers in the engine that pulled")
    command = [
        sys.executable, "-m", "drydock.session", image.engine_name, "fast", "--prebuilt",
        "--hardware", image.definition.hardware, "--runtime", "docker",
    ]  # fmt: skip
    began = time.monotonic()
    status = subprocess.run(
        command, cwd=image.root, stdout=sys.stderr, check=False,
        env={
            **os.environ, "DOCKER_HOST": places.engine.address, "DRYDOCK_STORE": str(empty),
            "DRYDOCK_REGISTRY": places.host,
        },
    ).returncode  # fmt: skip
    report = json.loads((image.root / f"results/{image.engine_name}_fast/latest/report.json").read_text())
    return {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "outcome": report["outcome"],
        "digest": report["image"]["digest"],
        "verification": report["verification"]["verdict"],
        "passed": sum(test["outcome"] == "passed" for tier in report["tiers"] for test in tier["tests"]),
        "overhead": report["overhead_seconds"],
    }


def table(document: Document) -> str:
    lines = [
        f"{document['image']}, {document['package']} {document['from']} -> {document['to']}",
        f"{'':<24} {'pushed':>10} {'s':>7} {'pulled':>10} {'s':>7}",
    ]
    for what, pushed in document["push"].items():
        pulled = document["pull"].get(what)
        line = f"{what:<24} {gigabytes(pushed['sent']):>10} {pushed['seconds']:>7.1f}"
        lines.append(
            line + (f" {gigabytes(pulled['served']):>10} {pulled['seconds']:>7.1f}" if pulled else "")
        )
    ratio = document["ratio"]
    lines.append(
        f"the bump as one layer: {ratio['sent']:.1f} times the bytes to push, {ratio['served']:.1f} to pull"
    )
    if "session" in document:
        run = document["session"]
        lines.append(
            f"the fast tiers in the engine that pulled: {run['outcome']}, {run['passed']} tests, {run['seconds']:.0f} s"
        )
    return "\n".join([*lines, "", *(f"{key}: {note}" for key, note in document["notes"].items())])


def _parser() -> Parser:
    parser = Parser(prog="registry.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", default="cpu-vllm", help="a built image, as `drydock images` lists them")
    parser.add_argument("--package", help="which one moves (default: the engine's)")
    parser.add_argument("--session", action="store_true", help="run the fast tiers in the engine that pulled")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where to work (default: the store's)")
    return parser


if __name__ == "__main__":
    main(_parser(), measure, table)

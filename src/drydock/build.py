"""Assembles an image: every layer from the store's artifacts or its cache, then manifest and config."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from drydock.base import (
    ENVIRONMENT,
    add_base_files,
    add_dpkg_database,
    add_venv,
    image_environment,
    python_version,
    stdlib_sources,
)
from drydock.bytecode import (
    Compiler,
    Toolchain,
    builder_architecture,
    pyc_path,
    toolchain,
    unpack_toolchain,
)
from drydock.debs import add_deb, checked, open_deb
from drydock.definition import Image, VendorBase
from drydock.errors import DrydockError
from drydock.layer import LayerWriter, Row, open_layer, overlap
from drydock.locks import (
    Artifact,
    DebianLock,
    PyLock,
    check_debian_lock,
    check_pylock,
    own_definition,
    read_debian_lock,
    read_pylock,
    sha256_json,
)
from drydock.oci import Built, Layer, write_image
from drydock.plan import Spec, assembler_hash, plan_layers
from drydock.progress import Progress
from drydock.sdist import ensure_built
from drydock.store import Store, sha256_file
from drydock.vendor import VendorLock, read_vendor_lock, vendor_layers
from drydock.wheels import PREFIX, Installed, add_wheel, site_packages

SHARE = "usr/share/drydock"
"""Where an image carries what it was made of."""


class Inputs:
    """Everything a build reads besides artifacts, checked once. Of `debian` and `vendor`, one is None; `tools`
    compile bytecode, which an image over a vendor's does without: its interpreter is not here."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.lock: PyLock = read_pylock(image)
        self.vendor: VendorLock | None = None
        self.debian: DebianLock | None = None
        self.tools: Toolchain | None = None
        problems = check_pylock(image, self.lock)
        if image.vendor:
            self.vendor = read_vendor_lock(image)
        else:
            architecture = image.definition.architecture
            self.debian = read_debian_lock(image.root, image.base, architecture)
            problems += check_debian_lock(image.base, self.debian)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DrydockError(
                f"the lock of {image.name} is wrong: {problems[0]}{more}: run `drydock lock {image.name}`"
            )
        if self.debian:
            builder = builder_architecture()
            other = (
                self.debian
                if builder == image.definition.architecture
                else read_debian_lock(image.root, image.base, builder)
            )
            self.tools = toolchain(image.definition.python, self.debian, other)

    @property
    def base(self) -> DebianLock:
        """The Debian base's lock; only of an image on Debian."""
        assert self.debian
        return self.debian

    @property
    def environment(self) -> dict[str, str]:
        """The image's environment."""
        base = self.vendor.environment if self.vendor else ENVIRONMENT
        return image_environment(base, self.image.engine.environment)

    @property
    def versions(self) -> dict[str, str]:
        """Every distribution that the image holds, ours and those its base provides -> version."""
        return self.image.provides | {package.name: package.version for package in self.lock.packages}

    @property
    def python_version(self) -> str:
        """`platform.python_version()` in the image."""
        if self.image.vendor:
            return self.image.vendor.python_version
        return python_version(self.image.definition.python, self.base)

    def artifacts(self) -> list[Artifact]:
        """Every file to fetch for a build from nothing."""
        debs = [*self.debian.artifacts(), *self.tools.debs] if self.debian and self.tools else []
        found = {artifact.sha256: artifact for artifact in (*debs, *self.lock.artifacts())}
        return list(found.values())


def build(
    image: Image, store: Store, get: Callable[[list[Artifact]], object], jobs: int | None = None
) -> tuple[Built, float]:
    """Build an image into the store.

    Parameters:
        get: called with the artifacts that the layers to be made need; fetches those the store lacks.
        jobs: layers made at a time; the number of processors by default.

    Returns:
        The image, and the seconds it took.

    Raises:
        DrydockError: a lock is missing, wrong or out of date, an artifact cannot be had, the disk is full.
    """
    began = time.monotonic()
    inputs = Inputs(image)
    store.sweep()
    specs = plan_layers(image, inputs.lock, inputs.debian, inputs.tools)
    records = {spec.key: _found(store, spec) for spec in specs}
    missing = [spec for spec in specs if records[spec.key] is None]
    if missing:
        _have_artifacts(store, inputs, missing, get)
        records |= _make_all(store, image, missing, jobs or os.cpu_count() or 1)
    made = {spec.key for spec in missing}
    manifest = _manifest_spec(image, specs)
    record = _found(store, manifest)
    if record is None:
        record = _make_manifest(store, inputs, manifest, [records[spec.key] for spec in specs])
        made.add(manifest.key)
    specs.append(manifest)
    records[manifest.key] = record
    layers = tuple(_layer(spec, records[spec.key] or {}, spec.key in made) for spec in specs)
    settings: dict[str, Any] = {}
    if inputs.vendor:
        layers = (*vendor_layers(inputs.vendor), *layers)
        settings = inputs.vendor.settings
    built = write_image(store, image, layers, _labels(inputs), inputs.environment, settings)
    return built, time.monotonic() - began


def _found(store: Store, spec: Spec) -> dict[str, Any] | None:
    record = store.read_record("layers", spec.key)
    if record and store.has(record["digest"], record["size"]) and store.has(record["facts"]):
        # Facts end up in the image's manifest: a byte that changed on disk must not.
        if sha256_file(store.path(record["facts"])) == record["facts"]:
            return record
        store.discard(record["facts"])
    return None


def _layer(spec: Spec, record: Mapping[str, Any], made: bool) -> Layer:
    return Layer(
        digest=record["digest"],
        size=record["size"],
        diff_id=record["diff-id"],
        unpacked=record["unpacked"],
        title=spec.title,
        contents=tuple(
            f"{artifact.name} {artifact.version}" for artifact in spec.artifacts if spec.kind != "base"
        ),
        key=spec.key,
        made=made,
    )


def _have_artifacts(
    store: Store, inputs: Inputs, missing: list[Spec], get: Callable[[list[Artifact]], object]
) -> None:
    """Fetch what the missing layers are made of, and build the wheels that nobody published."""
    packages = {package.name: package for package in inputs.lock.packages}
    wanted: dict[str, Artifact] = {}
    sources: dict[str, Artifact] = {}
    build_first = []
    for spec in missing:
        for artifact in spec.artifacts:
            package = packages.get(artifact.name) if spec.kind == "wheels" else None
            if package is None or package.built_from is None:
                wanted[artifact.sha256] = artifact
            elif not store.has(artifact.sha256, artifact.size):
                build_first.append(package)
                source = package.built_from.sdist.artifact("sdist", package.name, package.version)
                for needed in (source, *(tool.artifact for tool in package.built_from.build_requires)):
                    sources[needed.sha256] = needed
    if inputs.tools and any(spec.kind in ("wheels", "stdlib") for spec in missing):
        wanted |= {artifact.sha256: artifact for artifact in inputs.tools.debs}
    get(list((wanted | sources).values()))
    for artifact in sources.values():
        checked(store, artifact)
    for package in build_first:
        ensure_built(store, package)


class _Worker:
    """What one worker process keeps between layers."""

    def __init__(self, store: Path, root: Path, name: str, told: Any) -> None:
        self.store = Store(store)
        self.image = Image.named(root, name)
        self.inputs = Inputs(self.image)
        self.told = told
        self._compiler: Compiler | None = None

    @property
    def compiling(self) -> tuple[Compiler, Toolchain] | None:
        """What makes bytecode for the image, or None for an image without."""
        tools = self.inputs.tools
        if tools is None:
            return None
        if self._compiler is None:
            self._compiler = Compiler(unpack_toolchain(self.store, tools), tools.series)
        return self._compiler, tools

    def kill(self) -> None:
        if self._compiler:
            self._compiler.kill()


_worker: _Worker | None = None
_interruptible = False
"""Whether a worker may be stopped where it is. Not while it holds a lock of a queue: an exception out of a signal's
handler, between the lock's taking and the block that gives it back, leaves it taken, and all others wait for ever."""
_stopping = False


def _start_worker(store: Path, root: Path, name: str, told: Any, parent: int) -> None:
    global _worker
    # A builder that is killed must not leave workers behind that go on writing.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was killed before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_worker)
    _worker = _Worker(store, root, name, told)


def _stop_worker(*_: object) -> None:
    """Unwind, so that what is half written is removed, and take up nothing that is queued."""
    global _stopping
    _stopping = True
    if _worker:
        _worker.kill()
    _stop_here()


def _stop_here() -> None:
    if _stopping and _interruptible:
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _interrupted(may: bool) -> Iterator[None]:
    """Whether a signal stops the worker in this block; one that came before stops it where that begins to be so."""
    global _interruptible
    before, _interruptible = _interruptible, may
    try:
        _stop_here()
        yield
    finally:
        _interruptible = before
    _stop_here()


def _tell(worker: _Worker, what: str, title: str, amount: int) -> None:
    with _interrupted(False):
        worker.told.put((what, title, amount))


def _make(spec: Spec) -> dict[str, Any]:
    """Make one layer in a worker process, unless another build made it meanwhile."""
    with _interrupted(True):
        return _make_layer(spec)


def _make_layer(spec: Spec) -> dict[str, Any]:
    assert _worker
    worker = _worker
    with worker.store.lock(f"layer-{spec.key[:16]}"):
        found = _found(worker.store, spec)
        if found:
            return found
        _tell(worker, "start", spec.title, 0)
        installed: list[Installed] = []
        with open_layer(worker.store) as (layer, written):
            for artifact in spec.artifacts:
                if spec.kind == "debs":
                    with open_deb(worker.store, artifact) as deb:
                        add_deb(layer, deb, artifact.name)
                elif spec.kind == "wheels":
                    series = worker.image.definition.python
                    installed.append(add_wheel(layer, worker.store, artifact, series, worker.compiling))
                elif spec.kind == "stdlib":
                    _add_stdlib(layer, worker, artifact)
                _tell(worker, "advance", spec.title, artifact.size)
            if spec.kind == "venv":
                vendor = worker.image.vendor
                assert vendor
                layer.owner = "drydock"
                add_venv(layer, vendor.interpreter, vendor.python_version, system=True)
                layer.folder(site_packages(worker.image.definition.python))
            if spec.kind == "base":
                add_base_files(layer, worker.store, worker.image, worker.inputs.base)
                add_dpkg_database(layer, worker.store, worker.inputs.base)
        record = {
            "digest": written.digest,
            "size": written.size,
            "diff-id": written.diff_id,
            "unpacked": written.unpacked,
            "facts": _put_facts(worker.store, written.rows, installed),
        }
        worker.store.write_record("layers", spec.key, record)
        _tell(worker, "done", spec.title, 0)
        return record


def _put_facts(store: Store, rows: list[Row], installed: list[Installed]) -> str:
    facts = {"rows": [list(row) for row in rows], "distributions": [asdict(entry) for entry in installed]}
    return store.put(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape"))


def _add_stdlib(layer: LayerWriter, worker: _Worker, artifact: Artifact) -> None:
    """Bytecode of the library's sources in one deb; the sources are in the deb's own layer."""
    assert worker.compiling
    compiler, tools = worker.compiling
    series = tools.series
    layer.owner = "drydock"
    with open_deb(worker.store, artifact) as deb, worker.store.scratch() as scratch:
        # The compiler's Python reads a tar; a deb wraps one in an ar archive.
        with (scratch / "data.tar").open("wb") as file:
            sources = stdlib_sources(_copy_tar(deb, file), series)
        compiler.compile(scratch / "data.tar", sources, scratch / "pyc.zip")
        with zipfile.ZipFile(scratch / "pyc.zip") as archive:
            for path in sorted(archive.namelist()):
                layer.file(pyc_path(path, series), archive.read(path))


def _copy_tar(deb: Any, file: Any) -> list[str]:
    names = []
    with deb.data.tgz() as source, tarfile.open(fileobj=file, mode="w") as target:
        for member in source:
            if member.isreg():
                # python-debian's names are objects of its own, without a hash.
                plain = tarfile.TarInfo(str(member.name))
                plain.size = member.size
                names.append(plain.name)
                target.addfile(plain, source.extractfile(member))
    return names


def _make_all(store: Store, image: Image, specs: list[Spec], jobs: int) -> dict[str, dict[str, Any]]:
    """Make layers in parallel, the largest first."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    records: dict[str, dict[str, Any]] = {}
    with Progress(f"build {image.name}", sum(spec.weight for spec in specs)) as progress:
        listener = threading.Thread(target=_listen, args=(told, progress), daemon=True)
        listener.start()
        pool = ProcessPoolExecutor(
            min(jobs, len(specs)),
            context,
            _start_worker,
            (store.root, image.root, image.name, told, os.getpid()),
        )
        workers: set[int] = set()
        try:
            futures: dict[Future[dict[str, Any]], Spec] = {}
            for spec in sorted(specs, key=lambda spec: -spec.weight):
                futures[pool.submit(_make, spec)] = spec
                workers |= set(pool._processes or ())
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    records[futures[future].key] = future.result()
        except BrokenProcessPool as error:
            raise DrydockError(
                "a build worker was killed (out of memory?): what is complete is kept, run the build again"
            ) from error
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            store.sweep(workers)
            told.put(None)
            listener.join()
    return records


def _listen(told: Any, progress: Progress) -> None:
    while (message := told.get()) is not None:
        what, title, amount = message
        if what == "start":
            progress.start(title)
        elif what == "done":
            progress.done(title)
        else:
            progress.advance(amount)


def lock_files(image: Image) -> dict[str, Path]:
    """The files that an image carries as they are, by the names that they have there."""
    if image.vendor:
        return {"pylock.toml": image.pylock_path, "base.toml": image.vendor_lock_path}
    return {
        "debian-request.toml": image.root / "images" / f"debian-{image.base.release}.toml",
        "pylock.toml": image.pylock_path,
        "debian.toml": image.debian_lock_path,
    }


def carried(image: Image) -> dict[str, bytes]:
    """What an image carries of what it was made of: its own part of the definition, and its locks."""
    files = {name: path.read_bytes() for name, path in lock_files(image).items()}
    return {"image.toml": own_definition(image), **files}


def _manifest_spec(image: Image, specs: list[Spec]) -> Spec:
    files = {name: sha256(data).hexdigest() for name, data in carried(image).items()}
    return Spec(
        kind="manifest",
        title=f"manifest of {image.name}",
        artifacts=(),
        key=sha256_json([assembler_hash(), image.name, files, [spec.key for spec in specs]]),
    )


def _make_manifest(
    store: Store, inputs: Inputs, spec: Spec, records: list[dict[str, Any] | None]
) -> dict[str, Any]:
    """The last layer: the locks, the definition, and what verification compares the image with."""
    rows: dict[str, Row] = {}
    distributions: list[Installed] = []
    for record in records:
        assert record
        facts = json.loads(store.path(record["facts"]).read_bytes())
        # A path that two layers hold is the later one's, as it is when they are unpacked.
        for row in (Row(*fields) for fields in facts["rows"]):
            _check_overlap(inputs.image, rows.get(row.path), row)
            rows[row.path] = row
        distributions += [Installed(**entry) for entry in facts["distributions"]]
    held = rows
    # Files of wheels are in their RECORDs; base.RECORD has everything else.
    wheels = {entry.name for entry in distributions}
    rows = {
        path: row
        for path, row in rows.items()
        if row.owner not in wheels or not path.startswith(f"{PREFIX}/")
    }
    with open_layer(store) as (layer, written):
        for name, data in carried(inputs.image).items():
            layer.file(f"{SHARE}/{name}", data)
        _add_links(layer, inputs.image, held)
        rows |= {row.path: row for row in layer.rows}
        base_record = _csv(list(rows.values()))
        digest, _ = layer.file(f"{SHARE}/base.RECORD", base_record)
        document = manifest(inputs, distributions, digest.hex())
        layer.file(f"{SHARE}/manifest.json", json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    made = {
        "digest": written.digest,
        "size": written.size,
        "diff-id": written.diff_id,
        "unpacked": written.unpacked,
        "facts": _put_facts(store, [], []),
    }
    store.write_record("layers", spec.key, made)
    return made


def _add_links(layer: LayerWriter, image: Image, held: Mapping[str, Row]) -> None:
    """The definition's links, each to something that the image holds.

    Raises:
        DrydockError: a link would lead nowhere, or lies where a file is.
    """

    def is_held(path: str) -> bool:
        return path in held or any(each.startswith(f"{path}/") for each in held)

    where = f"{image.definition_path.relative_to(image.root)}: engine.{image.engine_name}.links"
    for link, target in image.engine.links.items():
        if is_held(link.lstrip("/")):
            raise DrydockError(f"{where}: the image holds something else at {link}")
        if not is_held(target.lstrip("/")):
            raise DrydockError(f"{where}: {link} would lead to {target}, which is not in the image")
        layer.symlink(link.lstrip("/"), target)


def _check_overlap(image: Image, first: Row | None, second: Row) -> None:
    if first is None or first.hash == second.hash:
        return
    winner = image.engine.overlaps.get(second.owner)
    if winner is None or first.owner not in winner.over:
        raise overlap(first, second)


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(sorted(rows))
    return text.getvalue().encode("utf-8", "surrogateescape")


def manifest(inputs: Inputs, distributions: list[Installed], base_record: str) -> dict[str, Any]:
    """What `drydock verify` in the image compares the image with."""
    image, engine = inputs.image, inputs.image.engine
    definition = image.definition
    return {
        "schema": 1,
        "image": image.name,
        "architecture": definition.architecture,
        "machine": image.machine,
        "python": inputs.python_version,
        "prefix": f"/{PREFIX}",
        "site-packages": f"/{site_packages(definition.python)}",
        "distributions": [
            {
                "name": entry.name,
                "version": entry.version,
                "dist-info": entry.dist_info,
                "record": entry.record,
            }
            for entry in sorted(distributions, key=lambda entry: entry.name)
        ],
        "debs": [
            {"name": package.name, "version": package.version, "architecture": package.architecture}
            for package in (inputs.debian.packages if inputs.debian else ())
        ],
        **(_provided(image.vendor) if image.vendor else {}),
        "base-record": base_record,
        "accelerator": {
            "kind": definition.accelerator.kind,
            "minimum-driver": definition.accelerator.minimum_driver,
            "sm": list(definition.accelerator.sm),
        },
        "driver-libraries": list(definition.driver_libraries),
        "absent-libraries": {
            **({} if image.vendor else image.base.absent_libraries),
            **engine.absent_libraries,
        },
        "foreign-objects": dict(engine.foreign_objects),
        "environment": inputs.environment,
    }


def _provided(vendor: VendorBase) -> dict[str, Any]:
    """What verification looks for in a vendor's base."""
    return {
        "base": {
            "repository": vendor.repository,
            "version": vendor.version,
            "digest": vendor.digest,
            "site-packages": list(vendor.site_packages),
            "provides": dict(vendor.provides),
        }
    }


def _labels(inputs: Inputs) -> dict[str, str]:
    image = inputs.image
    if image.vendor:
        base = {
            "org.opencontainers.image.base.name": f"{image.vendor.repository}:{image.vendor.version}",
            "org.opencontainers.image.base.digest": image.vendor.digest,
        }
    else:
        base = {"org.opencontainers.image.base.name": f"debian:{image.base.suite}"}
    labels = {
        **base,
        "org.opencontainers.image.description": image.definition.summary,
        "dev.drydock.image": image.name,
        "dev.drydock.lock": f"sha256:{sha256_file(image.pylock_path)}",
        "dev.drydock.base-lock": f"sha256:{sha256_file(image.base_lock_path)}",
        "dev.drydock.engine": f"{image.engine.distribution} {inputs.versions[image.engine.distribution]}",
        "dev.drydock.python": inputs.python_version,
        "dev.drydock.accelerator": image.definition.accelerator.kind,
    }
    if image.definition.accelerator.minimum_driver:
        labels["dev.drydock.minimum-driver"] = image.definition.accelerator.minimum_driver
    return labels | image.definition.labels | image.engine.labels


def as_json(built: Built, seconds: float) -> dict[str, Any]:
    """The one line of `drydock build --json`."""
    return {
        "image": built.name,
        "digest": f"sha256:{built.digest}",
        "config-digest": f"sha256:{built.config_digest}",
        "size": built.size,
        "layers": [
            {
                "digest": f"sha256:{layer.digest}",
                "diff-id": f"sha256:{layer.diff_id}",
                "size": layer.size,
                "title": layer.title,
                "contents": list(layer.contents),
                "state": "made" if layer.made else "reused",
            }
            for layer in built.layers
        ],
        "seconds": round(seconds, 3),
    }

"""Running images in a Docker engine, loaded straight from the store."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, Mount

from drydock import oci
from drydock.definition import Image
from drydock.drivers import driver_files
from drydock.errors import DrydockError
from drydock.namespaces import USER_ID
from drydock.oci import Built
from drydock.progress import Progress
from drydock.runtime import CHECKOUT, RESULTS, Task, check_architecture, ending_signals
from drydock.store import CHUNK, Store
from drydock.tiers.processes import TOLD
from drydock.unpack import check_blobs

if TYPE_CHECKING:
    from docker.models.containers import Container

LABEL = {"dev.drydock": "run"}
"""On every container that drydock starts."""
OWNER, OWNER_PID = "dev.drydock.owner", "dev.drydock.pid"
"""On them too: the machine and process that started it."""
SHARED_MEMORY = "2g"
"""Size of /dev/shm: the engine's default of 64 MB is too small for vLLM's and NCCL's buffers."""
ANY_COMMAND = ("sh",)
"""What a container that stands ready runs: it reads the command that it is told."""
NOT_SET_UP = "waiting for init preliminary setup"
"""In runc's words: a container's first process was lost before it ran anything. Seen once, on a busy machine."""
PING_SECONDS = 10
GRACE_SECONDS = 10
"""From SIGTERM to SIGKILL when drydock is told to end."""


def engine_facts() -> tuple[str, bool]:
    """The Docker engine's version, and whether it keeps images in the containerd store.

    Raises:
        DrydockError: no engine answers.
    """
    return DockerRuntime().facts()


Output = Iterable[tuple[bytes | None, bytes | None]]
Attached = TypeVar("Attached")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A container that waits to be told its command.

    `surroundings` is the task it was made for, without command and environment; `line` is what it is told through.
    """

    digest: str
    surroundings: Task
    container: Container
    output: Output
    line: Any

    def tell(self, task: Task) -> None:
        """Tell it its command, and that it was told now."""
        variables = [f"{name}={value}" for name, value in task.environment.items()]
        command = shlex.join(["env", *variables, *task.command])
        # In braces, so that of words that were cut off nothing runs.
        words = f"{{ read -r {TOLD} _ < /proc/uptime; export {TOLD}; exec {command} < /dev/null; }}\n"
        # docker-py gives a SocketIO, with TLS an SSLSocket and over SSH a channel.
        getattr(self.line, "_sock", self.line).sendall(words.encode())
        self.line.close()

    def close(self) -> None:
        """It is not needed: remove it, beside what comes next."""
        self.line.close()
        _remove_behind(self.container)


class DockerRuntime:
    """Runs images in the engine that DOCKER_HOST names, or the one on the default socket.

    Raises:
        DrydockError: no engine answers.
    """

    name = "docker"

    def __init__(self) -> None:
        try:
            self._client = docker.from_env(timeout=PING_SECONDS)
            self._client.ping()
        except (DockerException, OSError) as error:
            raise DrydockError(
                f"no Docker engine answers ({_reason(error)}): start one, set DOCKER_HOST, "
                "or use --runtime chroot"
            ) from error
        # The engine unpacks a loaded image before it answers, and a command may be silent for hours.
        self._client.api.timeout = None  # type: ignore[assignment]  # what requests takes for "no limit"
        self._coming: Future[Ready | None] | None = None
        self._lock = threading.Lock()

    def facts(self) -> tuple[str, bool]:
        """The engine's version, and whether it keeps images in the containerd store."""
        about = self._client.info()
        return str(about["ServerVersion"]), _containerd(about)

    def held(self, name: str, recorded: Mapping[str, Any]) -> Built | None:
        """The recorded image, if the engine holds it; its layers are the engine's own."""
        built = _named(name, recorded)
        if not self._loaded(built):
            return None
        facts = self._client.images.get(built.reference).attrs
        environment = dict(entry.split("=", 1) for entry in facts["Config"]["Env"])
        return replace(built, architecture=facts["Architecture"], environment=environment)

    def pull(self, image: Image, store: Store, recorded: Mapping[str, Any]) -> Built:
        """Have the engine pull what is recorded, by that digest."""
        del store
        from drydock.publish import registries, source_of
        from drydock.registry import Registry, first_of

        source = source_of(image.name, registries(os.environ))
        with Progress("pull into docker", recorded["size"]) as progress:
            progress.start(image.name)

            def ask(place: Registry) -> Built:
                repository = f"{place.host}/{place.repository(source.repository)}"
                self._pull(repository, recorded["digest"], progress)
                pulled = self._client.images.get(f"{repository}@{recorded['digest']}")
                ours, _, tag = _named(image.name, recorded).reference.partition(":")
                pulled.tag(ours, tag)
                if built := self.held(image.name, recorded):
                    return built
                raise DrydockError(f"{place} gave {pulled.id}, which is not what is recorded")

            what = f"{image.name} {recorded['digest']}"
            return first_of(source.places, ask, what, source.remedy, progress.note)[1]

    def _pull(self, repository: str, digest: str, progress: Progress) -> None:
        from drydock.registry import Missing

        seen: dict[str, int] = {}
        try:
            for event in self._client.api.pull(repository, tag=digest, stream=True, decode=True):
                if "error" in event:
                    raise DrydockError(f"Docker: {event['error']}")
                if event.get("status") == "Downloading":
                    current = event["progressDetail"].get("current", 0)
                    progress.advance(current - seen.get(event["id"], 0))
                    seen[event["id"]] = current
        except NotFound as error:
            raise Missing(f"{repository}@{digest} is not there") from error
        except (DockerException, OSError) as error:
            raise DrydockError(f"Docker: {_reason(error)}") from error

    def prepare(self, store: Store, built: Built) -> None:
        """Load the image, unless the engine holds this very one."""
        if self._loaded(built):
            return
        with store.lock(f"docker-{built.digest[:16]}"):
            if not self._loaded(built):
                self._load(store, built)
                self._start_once(built)

    def _loaded(self, built: Built) -> bool:
        try:
            image = self._client.images.get(built.reference)
        except ImageNotFound:
            return False
        # The containerd store names an image by its manifest, the classic one by its config.
        return image.id in (f"sha256:{built.digest}", f"sha256:{built.config_digest}")

    def _load(self, store: Store, built: Built) -> None:
        with Progress("load into docker", total=built.size) as progress:
            progress.start(built.reference)
            try:
                with _archive(store, built, progress) as chunks:
                    # An iterator and no file: of a file, requests would send line by line.
                    self._client.images.load(chunks)  # type: ignore[arg-type]
            except BaseException as error:
                # The engine names an image before it has seen that a layer of it is missing or wrong.
                with contextlib.suppress(DockerException, OSError):
                    self._client.images.remove(built.reference, force=True)
                if not isinstance(error, (DockerException, OSError)):
                    raise
                check_blobs(store, built.layers)
                raise DrydockError(self._refusal(built, _reason(error))) from error
        if not self._loaded(built):
            raise DrydockError(self._refusal(built, "what it holds afterwards is another image"))

    def _start_once(self, built: Built) -> None:
        """Start a container once: an image's first takes the engine seconds more than those after it."""
        # What is wrong is said by the command that is asked for.
        with contextlib.suppress(DockerException):
            container = self._client.containers.create(
                built.reference,
                ["true"],
                entrypoint=[],
                init=True,
                platform=f"linux/{built.architecture}",
                labels=_labels(),
            )
            try:
                container.start()
                container.wait()
            finally:
                _remove(container)

    def _refusal(self, built: Built, reason: str) -> str:
        if _containerd(self._client.info()):
            return f"Docker did not take {built.reference} ({reason}): free its disk or use --runtime chroot"
        return (
            f"Docker's classic image store did not take {built.reference} ({reason}): set "
            '{"features": {"containerd-snapshotter": true}} in /etc/docker/daemon.json and restart it, or '
            "use --runtime chroot"
        )

    def run(self, store: Store, built: Built, task: Task) -> int:
        """Run the task in a container of its own, which a thread removes beside what comes next.

        The process does not end before that thread.
        """
        del store
        check_architecture(built, self._client.info()["Architecture"])
        self._remove_orphans()
        with ending_signals():
            ready = self._take(built, task)
            container = ready.container if ready else self._create(built, task)
            try:
                if task.interactive:
                    return self._interactive(container)
                if ready is None:
                    return self._stream(container)
                ready.tell(task)
                return self._copied(container, ready.output)
            finally:
                _remove_behind(container)

    def ahead(self, built: Built, task: Task) -> None:
        """Start a container, beside what runs now, for a later `run` of a task with this one's surroundings.

        It takes its command and environment then. One that was made ahead before and not used is removed.
        """
        self.dismiss()
        coming: Future[Ready | None] = Future()

        def make() -> None:
            try:
                coming.set_result(self._make_ready(built, _surroundings(task)))
            except BaseException as error:
                coming.set_exception(error)

        # Where the engine answers no more, the process ends all the same.
        threading.Thread(target=make, name="ahead", daemon=True).start()
        with self._lock:
            self._coming = coming

    def _make_ready(self, built: Built, surroundings: Task) -> Ready | None:
        # Without one, `run` makes its own, and says what is wrong.
        with contextlib.suppress(DrydockError, DockerException, OSError):
            container = self._create(built, surroundings, told=True)
            try:
                output, line = _started(container, lambda: self._line_to(container))
            except BaseException:
                _remove(container)
                raise
            return Ready(
                digest=built.digest,
                surroundings=surroundings,
                container=container,
                output=output,
                line=line,
            )
        return None

    def _line_to(self, container: Container) -> tuple[Output, Any]:
        output = container.attach(stream=True, demux=True)
        return output, self._client.api.attach_socket(str(container.id), {"stdin": 1, "stream": 1})

    def dismiss(self) -> None:
        """Remove what was made ahead and is not used.

        What an engine that does not answer in time still makes is ended by the next drydock's run.
        """
        with contextlib.suppress(TimeoutError):
            if ready := self._made_ahead(GRACE_SECONDS):
                ready.close()

    def _made_ahead(self, timeout: float | None = None) -> Ready | None:
        coming = self._coming
        # A signal that comes while this waits leaves it to `dismiss`.
        ready = coming.result(timeout) if coming else None
        with self._lock:
            if self._coming is not coming:
                return None
            self._coming = None
        return ready

    def _take(self, built: Built, task: Task) -> Ready | None:
        """The container that was made ahead, if it is one for this task and still waits."""
        ready = self._made_ahead()
        fits = False
        try:
            if ready:
                with contextlib.suppress(DockerException):
                    ready.container.reload()
                    fits = (built.digest, _surroundings(task), "running") == (
                        ready.digest,
                        ready.surroundings,
                        ready.container.status,
                    )
        finally:
            if ready and not fits:
                ready.close()
        return ready if fits else None

    def _remove_orphans(self) -> None:
        """End containers of a drydock on this machine that was killed before it could end them itself."""
        # One that its own drydock removes meanwhile is no orphan.
        for container in self._client.containers.list(
            all=True, ignore_removed=True, filters={"label": f"{OWNER}={platform.node()}"}
        ):
            if not Path("/proc", container.labels.get(OWNER_PID, "")).is_dir():
                with contextlib.suppress(DockerException):
                    container.remove(force=True, v=True)

    def _create(self, built: Built, task: Task, told: bool = False) -> Container:
        requests = [DeviceRequest(count=-1, capabilities=[["gpu"]])] if task.accelerator == "cuda" else []
        # What NVIDIA's toolkit does for the engine there, is done here for NPUs, for which few engines have one.
        files = driver_files("npu")[0] if task.accelerator == "npu" else []
        devices = [f"{file.source}:{file.target}:rwm" for file in files if file.target.startswith("/dev/")]
        mounts = [
            Mount(file.target, file.source, type="bind", read_only=True)
            for file in files
            if not file.target.startswith("/dev/")
        ]
        try:
            return self._client.containers.create(
                built.reference,
                list(task.command),
                entrypoint=[],
                environment=task.variables(built),
                user="0:0" if task.user == "root" else f"{USER_ID}:{USER_ID}",
                working_dir=task.workdir,
                mounts=[
                    Mount(CHECKOUT, str(task.checkout.absolute()), type="bind", read_only=True),
                    Mount(RESULTS, str(task.make_results()), type="bind"),
                    *(
                        Mount(target, str(source.absolute()), type="bind", read_only=True)
                        for target, source in task.inputs.items()
                    ),
                    *mounts,
                ],
                devices=devices,
                device_requests=requests,
                init=True,
                shm_size=SHARED_MEMORY,
                platform=f"linux/{built.architecture}",
                labels=_labels(),
                stdin_open=task.interactive or told,
                tty=task.interactive and sys.stdin.isatty(),
            )
        except APIError as error:
            raise DrydockError(
                f"Docker did not make a container of {built.reference}: {_reason(error)}"
            ) from error

    def _stream(self, container: Container) -> int:
        output = _started(container, lambda: container.attach(stream=True, demux=True))
        return self._copied(container, output)

    def _copied(self, container: Container, output: Output) -> int:
        """Pass the output on until the command ends; its status."""
        # In a thread of its own, so that a signal does not break it off before the command's last words.
        copying = threading.Thread(target=_copy, args=(output,), name="output")
        copying.start()
        try:
            copying.join()
        except (KeyboardInterrupt, SystemExit):
            with contextlib.suppress(DockerException):
                container.stop(timeout=GRACE_SECONDS)
            copying.join()
            raise
        return int(container.wait()["StatusCode"])

    def _interactive(self, container: Container) -> int:
        # The client has what a terminal needs (raw mode, its size); the SDK has not.
        client = shutil.which("docker")
        if client is None:
            raise DrydockError(
                "an interactive run in Docker needs the docker command: install Docker's client, "
                "or use --runtime chroot"
            )
        command = [client, "start", "--attach", "--interactive", str(container.id)]
        started = subprocess.run(command, check=False)
        container.reload()
        if container.status == "created":
            return started.returncode
        return int(container.wait()["StatusCode"])


def _named(name: str, recorded: Mapping[str, Any]) -> Built:
    """A recorded image, of which no more is known than its digests."""
    return Built(
        name=name,
        architecture="",
        digest=oci.hex_of(recorded["digest"]),
        config_digest=oci.hex_of(recorded["config-digest"]),
        layers=(),
        environment={},
    )


def _surroundings(task: Task) -> Task:
    """The task of a container that waits for its command."""
    return replace(task, command=ANY_COMMAND, environment={})


def _labels() -> dict[str, str]:
    return {**LABEL, OWNER: platform.node(), OWNER_PID: str(os.getpid())}


def _remove_behind(container: Container) -> None:
    """Remove it beside what comes next; the process does not end before."""
    threading.Thread(target=_remove, args=(container,), name="removal").start()


def _remove(container: Container) -> None:
    try:
        container.remove(force=True, v=True)
    except (DockerException, OSError) as error:
        print(f"drydock: container {container.short_id} is not removed: {_reason(error)}", file=sys.stderr)


def _copy(output: Output) -> None:
    for chunks in output:
        for stream, chunk in zip((sys.stdout, sys.stderr), chunks, strict=True):
            if chunk:
                stream.buffer.write(chunk)
                stream.flush()


@contextlib.contextmanager
def _archive(store: Store, built: Built, progress: Progress) -> Iterator[Iterator[bytes]]:
    """The image's OCI archive in chunks, written by a thread while they are read."""
    reading, writing = os.pipe()
    failed: list[Exception] = []

    def write() -> None:
        try:
            with os.fdopen(writing, "wb") as file:
                oci.write_archive(store, built, file, progress.advance)
        except BrokenPipeError:
            pass  # The engine stopped reading, and says itself why.
        except Exception as error:
            failed.append(error)

    def chunks(file: BinaryIO) -> Iterator[bytes]:
        while data := file.read(CHUNK):
            yield data
        writer.join()
        if failed:
            # Into the request, which breaks it off: the engine must not take half an archive for a whole one.
            raise failed[0]

    writer = threading.Thread(target=write, name="archive")
    writer.start()
    try:
        with os.fdopen(reading, "rb") as file:
            yield chunks(file)
    finally:
        writer.join()
        if failed:
            raise DrydockError(
                f"{built.name} cannot be read from {store.root} ({failed[0]}): run `drydock build` again"
            )


def _started(container: Container, attach: Callable[[], Attached], again: bool = False) -> Attached:
    """Attach to a container and start it, in this order, so that nothing of its output is lost.

    Once more where the engine lost its first process before that ran anything.

    Raises:
        DrydockError: it does not start.
    """
    attached = attach()
    try:
        container.start()
    except APIError as error:
        if again or NOT_SET_UP not in _reason(error):
            raise _not_started(error) from error
        print(f"drydock: {_not_started(error)}; once more", file=sys.stderr)
        return _started(container, attach, again=True)
    return attached


def _not_started(error: APIError) -> DrydockError:
    reason = _reason(error)
    if "could not select device driver" in reason:
        return DrydockError(
            "Docker has no access to GPUs: install the NVIDIA Container Toolkit, or use --runtime chroot"
        )
    return DrydockError(f"Docker did not start the command: {reason}")


def _reason(error: Exception) -> str:
    """An error of the SDK's in one line."""
    text = str(error.explanation if isinstance(error, APIError) and error.explanation else error)
    return " ".join(text.split()).removeprefix("Error while fetching server API version: ")


def _containerd(about: Mapping[str, Any]) -> bool:
    return "containerd" in dict(about.get("DriverStatus") or []).get("driver-type", "")

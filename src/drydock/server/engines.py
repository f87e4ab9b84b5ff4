"""What the harness must know of an inference engine: its command, its parser, its log and its endpoints."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from drydock.server.errors import FlagError, ServerError
from drydock.server.processes import Kept, readable

LAUNCHER = Path(__file__).with_name("launch.py")
Post = Callable[[str, Mapping[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine whose server speaks OpenAI's API.

    Parameters:
        name: as people write it.
        module: what `python -m` runs as the server.
        parser: `module:function` that gets the flags, imports the engine, and returns name -> value of what its
            own parser accepts; where it refuses, it raises SystemExit with the parser's words, or anything else.
        own: the flags that the harness gives after the user's, with {model}, {name}, {host} and {port}.
        command: what stands before all flags.
        named_by_folder: it has no flag for the name and takes the model's folder's: it is given a link to the folder,
            with the name.
        repeats_name: it answers under whatever name it is asked by; `/v1/models` says who it is.
        shares_port: it sets SO_REUSEADDR, and so has its port beside the socket that holds it.
        loading, loaded: texts of the log, one of which says that the weights begin, or have ended, to load.
        environment: what each server of it needs.
        leaves: files that it maps and never removes, as patterns of glob; they go when it is stopped.
        development: environment that opens the endpoints for development.
        reload: loads the weights from the model's folder again, given a function that sends a POST to a path, and
            that folder.
        not_reloaded: texts of the log that say that a reload was not whole, though it was answered as if.
    """

    name: str
    module: str
    parser: str
    own: tuple[str, ...]
    command: tuple[str, ...] = ()
    named_by_folder: bool = False
    repeats_name: bool = False
    shares_port: bool = True
    loading: tuple[str, ...]
    loaded: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    development: Mapping[str, str] = field(default_factory=dict)
    reload: Callable[[Post, str], None] | None = None
    not_reloaded: tuple[str, ...] = ()

    def flags(self, flags: Sequence[str], **values: object) -> list[str]:
        """The engine's command, the user's flags and the harness's own."""
        return [*self.command, *flags, *(flag.format(**values) for flag in self.own)]

    def launch(self, verdict: int, flags: Sequence[str], *, serve: bool) -> list[str]:
        """The command that judges flags, writes the verdict to a handle and, when accepted, serves."""
        module = self.module if serve else ""
        return [sys.executable, "-P", str(LAUNCHER), str(verdict), self.parser, module, *flags]

    def parse(self, flags: Sequence[str], timeout: float = 300.0) -> dict[str, Any]:
        """What the engine's own parser makes of flags: name -> value, defaults included.

        Values that JSON does not have are given as their `repr`.

        Raises:
            FlagError: it refuses them.
            ServerError: the engine cannot be asked.
        """
        with tempfile.TemporaryFile() as output, Verdict() as verdict:
            kept = Kept(
                self.launch(verdict.handle, flags, serve=False),
                environment=os.environ, output=output, handles=[verdict.handle],
            )  # fmt: skip
            try:
                return verdict.wait(self, kept, timeout)
            except FlagError:
                raise
            except ServerError as error:
                output.seek(0)
                last = output.read().decode(errors="replace").splitlines()[-25:]
                raise ServerError("\n".join([str(error), *last])) from None
            finally:
                kept.kill()


class Verdict:
    """The pipe through which the launcher says what the parser said."""

    def __init__(self) -> None:
        self._read, self.handle = os.pipe()

    def __enter__(self) -> Verdict:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        os.close(self.handle)

    def wait(self, engine: Engine, kept: Kept, seconds: float) -> dict[str, Any]:
        """The values that the parser accepted.

        Raises:
            FlagError: it refused the flags.
            ServerError: the engine cannot be imported, or there was no verdict in time.
        """
        deadline = time.monotonic() + seconds
        text = b""
        while not text.endswith(b"\n"):
            if readable(self._read, 0.1):
                text += os.read(self._read, 1 << 16)
            elif fate := kept.fate():
                raise ServerError(f"{engine.name} ended {fate} before its parser had judged the flags")
            elif time.monotonic() >= deadline:
                raise ServerError(f"{engine.name}'s parser did not judge the flags within {seconds:.3g} s")
        said = json.loads(text)
        if "refused" in said:
            raise FlagError(f"{engine.name} refuses the flags: {said['refused']}")
        if "broken" in said:
            raise ServerError(f"{engine.name} cannot be asked about its flags: {said['broken']}")
        accepted: dict[str, Any] = said["accepted"]
        return accepted


def _refuse(words: str) -> NoReturn:
    """In place of a parser's own `error`, which prints: its words are the verdict."""
    raise SystemExit(words)


def parse_vllm(flags: list[str]) -> dict[str, Any]:
    """vLLM's own verdict, in the steps of vllm/entrypoints/openai/api_server.py (0.24)."""
    arguments = importlib.import_module("vllm.entrypoints.openai.cli_args")
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser(prog="vllm")
    parser.error = _refuse
    accepted = arguments.make_arg_parser(parser).parse_args(flags)
    arguments.validate_parsed_serve_args(accepted)
    if accepted.model_tag is not None:
        # The parser takes a stray word, such as the "true" of `--enforce-eager true`, as the model's name, which
        # this server then does not use.
        _refuse(f"unrecognized arguments: {accepted.model_tag}")
    return dict(vars(accepted))


def reload_vllm(post: Post, model: str) -> None:  # noqa: ARG001, it knows its model
    """Through the workers' own reload_weights; what was cached of prompts came from the old weights.

    vLLM 0.24 answers null though a tensor is missing from the files: it logs those of which it got nothing, see
    `not_reloaded`, and does not notice a part of a fused one (q_proj of qkv_proj), whose place then holds anything.
    """
    answer = post("/collective_rpc", {"method": "reload_weights"})
    results = answer.get("results") if isinstance(answer, dict) else None
    if not results or any(result is not None for result in results):
        raise ServerError(
            f"/collective_rpc reload_weights: every worker should answer null, got {str(answer)[:300]}"
        )
    post("/reset_prefix_cache", {})


VLLM = Engine(
    name="vLLM",
    # The module and not the `vllm` script: the script asks for a distribution named vllm, which the cpu image's
    # build of it is not.
    module="vllm.entrypoints.openai.api_server",
    parser="drydock.server.engines:parse_vllm",
    own=("--model", "{model}", "--served-model-name", "{name}", "--host", "{host}", "--port", "{port}"),
    loading=("Starting to load model",),
    # The first is the safetensors loader's; with others, what follows on a GPU or a CPU.
    loaded=("Loading weights took", "Model loading took", "Warming up model"),
    development={"VLLM_SERVER_DEV_MODE": "1"},
    reload=reload_vllm,
    not_reloaded=("weights were not loaded from checkpoint",),
)


def parse_sglang(flags: list[str]) -> dict[str, Any]:
    """SGLang's own verdict, in the steps of sglang/srt/server_args.py (0.5.14); it looks at the devices too."""
    server_args = importlib.import_module("sglang.srt.server_args")
    parser = argparse.ArgumentParser(prog="sglang")
    parser.error = _refuse  # type: ignore[assignment]
    server_args.ServerArgs.add_cli_args(parser)
    accepted = parser.parse_args(flags)
    try:
        accepted = server_args.ServerArgs.from_cli_args(accepted)
    except RuntimeError as error:
        # Where there is no device, the flags are judged and not whether this device can do what they ask for.
        if "No accelerator" not in str(error):
            raise
    return dict(vars(accepted))


def reload_sglang(post: Post, model: str) -> None:
    """Through `/update_weights_from_disk`, which also forgets what was cached of prompts."""
    answer = post("/update_weights_from_disk", {"model_path": model})
    if not isinstance(answer, dict) or answer.get("success") is not True:
        raise ServerError(f"/update_weights_from_disk should have succeeded, got {str(answer)[:300]}")


SGLANG = Engine(
    name="SGLang",
    module="sglang.launch_server",
    parser="drydock.server.engines:parse_sglang",
    own=("--model-path", "{model}", "--served-model-name", "{name}", "--host", "{host}", "--port", "{port}"),
    repeats_name=True,
    loading=("Load weight begin",),
    loaded=("Load weight end",),
    # Of 0.5.14: it refuses its flags where this port, which is its own plus 10000 unless told, is above 65535, also
    # though it serves no gRPC. A port that the kernel chooses is so in one case of six.
    environment={"SGLANG_GRPC_PORT": "1"},
    # Its scheduler's load, for its frontend, and a semaphore of Python's multiprocessing, whose resource tracker it
    # kills with the rest of itself: a file of each at every start.
    leaves=("/dev/shm/sglang_loads_*", "/dev/shm/sem.mp-*"),
    reload=reload_sglang,
)


def parse_trtllm(flags: list[str]) -> dict[str, Any]:
    """TensorRT-LLM's own verdict: its click command parses them, and serves nothing (commands/serve.py of 1.2.1).

    What the file of `--extra_llm_api_options` says is among the values: it replaces flags, and has what no flag is for.
    """
    serve = importlib.import_module("tensorrt_llm.commands.serve").serve
    click = importlib.import_module("click")
    try:
        accepted = dict(serve.make_context("trtllm-serve", flags[len(TRTLLM.command) :]).params)
    except click.ClickException as error:
        _refuse(error.format_message())
    if path := accepted["extra_llm_api_options"]:
        options = importlib.import_module("yaml").safe_load(Path(path).read_text())
        known = importlib.import_module("tensorrt_llm.llmapi.llm_args").TorchLlmArgs.model_fields
        if unknown := sorted(options.keys() - known):
            _refuse(f"{path}: no such option: {unknown[0]}")
        accepted |= options
    return accepted


TRTLLM = Engine(
    name="TensorRT-LLM",
    module="tensorrt_llm.commands.serve",
    parser="drydock.server.engines:parse_trtllm",
    command=("serve",),
    # Of 1.2.1: --served_model_name came with 1.3, and its socket is bound without SO_REUSEADDR before the model loads.
    own=("{model}", "--host", "{host}", "--port", "{port}"),
    named_by_folder=True,
    repeats_name=True,
    shares_port=False,
    loading=("Loading safetensors weights in parallel",),
    loaded=("Model init total",),
    # Its server has /update_weights, /release_memory and /resume_memory, and refuses them unless its model runs under
    # Ray (AsyncLLM), as verl starts it: `trtllm-serve` never does. Weights come through them as CUDA IPC handles.
    reload=None,
)

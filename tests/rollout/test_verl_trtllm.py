"""verl's adapter to TensorRT-LLM against a server that speaks its API: memory by tags, weights as handles. No GPU.

What verl starts in place of `trtllm-serve` has the same API, and behind it a model under Ray, which can be controlled.
"""

# contract: trtllm
from __future__ import annotations

import ast
import asyncio
import base64
import inspect
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drydock.server import TRTLLM, Server

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "unit"))
FLAGS = ["--max_seq_len", "64", "--max_batch_size", "4"]

pytestmark = pytest.mark.engine("trtllm")


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server imports `tensorrt_llm` from, and verl here: the real one needs the driver's libraries."""
    import fake_trtllm

    folder = str(fake_trtllm.install(tmp_path_factory.mktemp("packages")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def environment(package: str) -> dict[str, str]:
    return {"PYTHONPATH": f"{package}:{HERE / 'unit'}:{HERE}", "FAKE_ASYNC_LLM": "1"}


@pytest.fixture
def server(package: str, tmp_path: Path, results: Path) -> Iterator[Server]:
    log = results / "trtllm-of-verl.log"
    with Server(TRTLLM, tmp_path, FLAGS, log=log, environment=environment(package)) as server:
        yield server


def adapter(server: Server, **options: Any) -> Any:
    from verl.workers.rollout.trtllm_rollout.trtllm_rollout import AsyncTRTLLMHttpAdapter

    return AsyncTRTLLMHttpAdapter("127.0.0.1", server.port, retry_delay=0.01, **options)


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.request("/fake/state")
    return found


def test_memory_is_given_back_and_taken_in_parts(server: Server) -> None:
    from verl.workers.rollout.trtllm_rollout.trtllm_rollout import ServerAdapter

    theirs, everything = adapter(server), ServerAdapter.get_full_tags()
    weights = [tag for tag in everything if tag != "kv_cache"]
    assert {"model", "kv_cache"} <= set(everything)
    assert asyncio.run(theirs.release_memory_occupation(tags=everything)) == {"status": "success"}
    assert state(server)["asleep"] == sorted(everything)
    asyncio.run(theirs.resume_memory_occupation(tags=weights))
    assert state(server)["asleep"] == ["kv_cache"]
    asyncio.run(theirs.resume_memory_occupation(tags=["kv_cache"]))
    assert state(server)["asleep"] == []


def of_verl(server: Server, megabytes: int) -> Any:
    """The rank that speaks for its replica, as far as an update asks for it."""
    from omegaconf import OmegaConf
    from verl.workers.rollout.trtllm_rollout.trtllm_rollout import ServerAdapter

    rank = ServerAdapter.__new__(ServerAdapter)
    rank.config = OmegaConf.create({"checkpoint_engine": {"update_weights_bucket_megabytes": megabytes}})
    rank.model_config = SimpleNamespace(hf_config=SimpleNamespace())
    rank.is_leader_rank, rank.hybrid_device_mesh, rank.gpu_id = True, None, 0
    rank._adapter = adapter(server)
    return rank


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """The process group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_weights_arrive_in_buckets_and_are_finished(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.rollout.trtllm_rollout import trtllm_rollout

    monkeypatch.setattr(trtllm_rollout, "get_device_uuid", lambda _: "GPU-0")
    device = SimpleNamespace(empty_cache=lambda: None)
    monkeypatch.setattr(trtllm_rollout, "get_torch_device", lambda: device)
    # Half a megabyte each: two fit into a bucket of one.
    sent = {f"model.layers.{number}.weight": torch.full((2**17,), float(number)) for number in range(5)}

    async def weights() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for item in sent.items():
            yield item

    before = server.complete("12", max_tokens=8, temperature=0)["text"]
    asyncio.run(of_verl(server, megabytes=1).update_weights(weights()))
    *updates, last = state(server)["updates"]
    assert last is None, "nothing told the engine that these are all"
    assert [list(update) for update in updates] == [["GPU-0"]] * 3
    found = {}
    for update in updates:
        for name, (rebuild, arguments) in pickle.loads(base64.b64decode(update["GPU-0"])):
            found[name] = rebuild(*arguments)
    assert found.keys() == sent.keys()
    assert all(torch.equal(found[name], sent[name]) for name in sent)
    assert server.complete("12", max_tokens=8, temperature=0)["text"] != before


def test_a_server_that_nobody_may_control_is_an_error_at_once(
    package: str, tmp_path: Path, results: Path
) -> None:
    """`trtllm-serve` itself has the paths, and no model under Ray behind them."""
    import aiohttp

    variables = environment(package) | {"FAKE_ASYNC_LLM": ""}
    log = results / "trtllm-serve.log"
    with Server(TRTLLM, tmp_path, FLAGS, log=log, environment=variables) as server:
        for call in (
            lambda: adapter(server).update_weights(None),
            lambda: adapter(server).release_memory_occupation(tags=["model"]),
        ):
            with pytest.raises(aiohttp.ClientResponseError) as refused:
                asyncio.run(call())
            assert refused.value.status == 500


def test_a_server_that_is_gone_is_an_error_after_some_attempts(server: Server) -> None:
    gone = adapter(server, max_attempts=3)
    server.stop()
    with pytest.raises(RuntimeError, match="after 3 attempts"):
        asyncio.run(gone.update_weights(None))


def given_to_the_engine() -> set[str]:
    """The arguments that verl's server gives to AsyncLLM, as they stand in its source."""
    from verl.workers.rollout.trtllm_rollout import trtllm_async_server

    tree = ast.parse(inspect.getsource(trtllm_async_server))
    values = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "llm_kwargs"
    ]
    assert len(values) == 1
    assert isinstance(values[0], ast.Dict)
    return {key.value for key in values[0].keys if isinstance(key, ast.Constant)}


def test_what_verl_gives_the_engine_is_found_in_its_source() -> None:
    assert {"model", "max_seq_len", "kv_cache_config", "load_format"} <= given_to_the_engine()


@pytest.mark.needs(gpus=1)
def test_the_engine_takes_what_verl_gives_it() -> None:
    """Looked at in the image, since no wheel has it; to import it takes a GPU.

    But for `sleep_config`: it came with 1.3.0 in place of `enable_sleep`, see the trainer tier's trtllm_arguments.
    """
    script = "from tensorrt_llm.llmapi.llm_args import TorchLlmArgs as a; print(*a.model_fields, sep='\\n')"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fields = set(told.stdout.splitlines())
    assert given_to_the_engine() - fields <= {"sleep_config"}
    assert fields & {"sleep_config", "enable_sleep"}

"""The harness and TensorRT-LLM: its click command judges the flags, and who answers is proven by a folder's name."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fake_trtllm
import pytest

from drydock import server as server_package
from drydock.server import TRTLLM, FlagError, Server, ServerError, ports

HERE = Path(__file__).parent
SOURCE = Path(server_package.__file__).parents[2]
FLAGS = ["--max_seq_len", "256", "--max_batch_size", "8", "--enable_chunked_prefill"]

Serve = Callable[..., Server]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where the fake is imported from as `tensorrt_llm`."""
    folder = fake_trtllm.install(tmp_path / "packages")
    return {"PYTHONPATH": f"{SOURCE}:{folder}:{HERE}:{HERE.parent}"}


@pytest.fixture
def serve(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Makes servers of a model's folder; in the end no link to it is left."""
    folder = tmp_path / "the-model"
    folder.mkdir()
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(links))
    made: list[Server] = []

    def one(*flags: str, **variables: str) -> Server:
        made.append(
            Server(TRTLLM, folder, [*FLAGS, *flags], log=tmp_path / "server.log", ready_timeout=60,
                   environment={**environment, **variables})
        )  # fmt: skip
        return made[-1]

    yield one
    for server in made:
        server.stop()
    assert list(links.iterdir()) == []


def test_it_is_started_by_its_own_names_and_says_who_it_is(serve: Serve, tmp_path: Path) -> None:
    with serve() as server:
        assert server.request("/v1/models")["data"][0]["id"] == server.model
        assert server.complete("12", max_tokens=3)["finish_reason"] == "length"
        assert server.accepted["max_seq_len"] == 256
        assert server.accepted["port"] == server.port
        assert (Path(server.accepted["model"]).name, Path(server.accepted["model"]).resolve()) == (
            server.model, tmp_path / "the-model",
        )  # fmt: skip
        assert list(server.seconds) == ["start", "load", "ready"]
        assert server.stop() == {}
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
        pass


def test_two_starts_are_two_names(serve: Serve) -> None:
    with serve() as one, serve() as two:
        assert one.model != two.model
        assert two.request("/v1/models")["data"][0]["id"] == two.model


def test_an_answer_under_our_name_proves_nothing(serve: Serve) -> None:
    """It repeats the name that it is asked by; what follows the link has the folder's own, and is not believed."""
    with pytest.raises(ServerError, match=r"(?s)answered, but not by this server: .*'id': 'the-model'"):
        serve(FAKE_FAULT="resolves").start()
    with serve() as server:
        assert server.request("/v1/completions", {"model": "anybody", "prompt": "1"})["model"] == "anybody"


def test_a_port_that_is_held_for_it_is_one_that_it_cannot_have(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sets no SO_REUSEADDR: held as for other engines, the port is lost to it."""
    with serve():
        pass
    monkeypatch.setitem(globals(), "TRTLLM", replace(TRTLLM, shares_port=True))
    with pytest.raises(ServerError, match=r"(?s)the server ended with status 1.*Address already in use"):
        serve().start()


def test_a_port_that_somebody_took_meanwhile_is_an_error(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as theirs:

        class Taken:
            getsockname = theirs.getsockname

            def close(self) -> None:
                """As if somebody had it in the moment after."""

        monkeypatch.setattr(ports, "hold", Taken)
        with pytest.raises(
            ServerError, match=r"(?s)answered by another server|ended with status 1.*Address already"
        ):
            serve().start()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no_such_flag", "1"], "No such option '?--no_such_flag"),
        (["--max_seq_len", "many"], "Invalid value for '--max_seq_len': 'many' is not a valid integer"),
        (["--backend", "float12"], "Invalid value for '--backend': 'float12' is not one of 'pytorch'"),
        (["another"], r"Got unexpected extra argument"),
    ],
)
def test_refused_flags_end_it_in_click_s_own_words(serve: Serve, flags: list[str], words: str) -> None:
    with pytest.raises(FlagError, match=f"TensorRT-LLM refuses the flags: {words}"):
        serve(*flags).start()


def test_the_file_of_options_is_judged_with_the_flags(serve: Serve, tmp_path: Path) -> None:
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"dtype": "bfloat16", "max_seq_len": 64}))
    with serve("--extra_llm_api_options", str(options)) as server:
        assert server.accepted["dtype"] == "bfloat16"
        assert server.accepted["max_seq_len"] == 64, "the file replaces flags"
    options.write_text(json.dumps({"dtyp": "bfloat16"}))
    with pytest.raises(FlagError, match=r"options.json: no such option: dtyp"):
        serve("--extra_llm_api_options", str(options)).start()


def test_without_the_engine_the_flags_are_not_refused(tmp_path: Path) -> None:
    server = Server(TRTLLM, tmp_path, FLAGS, log=tmp_path / "server.log")
    with pytest.raises(ServerError, match=r"cannot be asked about its flags: .*tensorrt_llm") as error:
        server.start()
    assert not isinstance(error.value, FlagError)


def test_its_weights_cannot_be_loaded_again(serve: Serve) -> None:
    """`trtllm-serve` has the path, and an assertion behind it that fails."""
    with serve() as server:
        with pytest.raises(ServerError, match="TensorRT-LLM cannot load weights again"):
            server.reload_weights()
        for path, body in (("/update_weights", {"weights": None}), ("/release_memory", {"tags": ["model"]})):
            with pytest.raises(ServerError, match="HTTP 500: Internal Server Error"):
                server.request(path, body)
        assert server.complete("12", max_tokens=1)["finish_reason"] == "length"


def test_health_is_said_where_upstream_says_it(serve: Serve) -> None:
    with serve() as server:
        for path, words in (("/health", b""), ("/health_generate", b"Generation health check OK")):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, words)
            connection.close()

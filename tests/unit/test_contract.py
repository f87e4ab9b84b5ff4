"""What the tiers use of a package is found in its wheel, and what a release lacks is named with our line."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from drydock.contract import Answer, Use, Wheel, check, uses
from drydock.errors import DrydockError

ENGINE = {
    "vllm/__init__.py": "",
    "vllm/version.py": "number = 1",
    "vllm/envs.py": 'environment = {"VLLM_FAST": lambda: 1}',
    "vllm/engine/arg_utils.py": """
        def add(parser):
            parser.add_argument("--max-len", type=int)
            parser.add_argument("--tune", "-t", action=BooleanOptionalAction)
    """,
    "vllm/entrypoints/openai/cli_args.py": """
        @dataclass
        class BaseFrontendArgs:
            port: int = 8000
            enable_tracking: bool = False
    """,
    "vllm/entrypoints/api.py": 'router.post("/sleep")\nrouter.get("/v1/models")',
    "vllm/state.py": """
        from vllm.inner.parts import *
        from . import version as numbered
        try:
            import fast
        except ImportError:
            fast = None
        if fast:
            def both(): ...
        else:
            both = None
        first, (second, *rest) = 1, (2, 3)
        class Kind:
            ONE = 1
    """,
    "vllm/lazy.py": """
        __all__ = ["Later"]
        def __getattr__(name): ...
    """,
    "vllm/inner/parts.py": "def deep(): ...",
    "vllm/compiled.cpython-313-x86_64-linux-gnu.so": "",
}


@pytest.fixture
def engine(tmp_path: Path) -> Wheel:
    path = tmp_path / "engine.whl"
    write(path, ENGINE)
    return Wheel("1.0", path)


def write(path: Path, files: Mapping[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, dedent(text))


def used(tmp_path: Path, text: str, file: str = "tests/rollout/test_a.py") -> list[Use]:
    path = tmp_path / "checkout" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return uses(tmp_path / "checkout", "vllm")


THERE = [
    "import vllm",
    "import vllm.state",
    "import vllm.compiled",
    "from vllm import compiled",
    "from vllm import state",
    "from vllm.state import Kind, both, first, second, rest, fast, numbered",
    "from vllm.state import deep",
    "from vllm.lazy import Later",
    "from vllm import state\nstate.both()",
    "from vllm.state import Kind\nKind.ONE",
    "import_module('vllm.state').Kind",
    "import vllm.state as s\ns.Kind",
    "flags = ['--max-len', '--no-tune', '--tune', '--enable-tracking', '--port']",
    "environment = {'VLLM_FAST': '1'}",
    "server.request('/sleep?level=1')",
    "server.request('/v1/models')",
    "import numpy.nothing",
    'def f():\n    """--not-a-flag in a text, and VLLM_NOTHING too"""',
    "parse(['--gone'])  # contract: refused",
]
MISSING = {
    "import vllm.gone": "vllm 1.0 has no vllm.gone",
    "from vllm.gone import it": "vllm 1.0 has no vllm.gone.it",
    "\nfrom vllm.state import Gone": "vllm 1.0 has no vllm.state.Gone",
    "from vllm.lazy import Never": "vllm 1.0 has no vllm.lazy.Never",
    "from vllm import state\nstate.gone()": "vllm 1.0 has no vllm.state.gone",
    "import vllm.state as s\ns.Gone": "vllm 1.0 has no vllm.state.Gone",
    "import_module('vllm.gone')": "vllm 1.0 has no vllm.gone",
    "import_module('vllm.state').Gone": "vllm 1.0 has no vllm.state.Gone",
    "def f():\n    from vllm.state import Gone": "vllm 1.0 has no vllm.state.Gone",
    "flags = ['--max-length']": "vllm 1.0 has no flag --max-length",
    "flags = ['--no-speed']": "vllm 1.0 has no flag --no-speed",
    "environment = {'VLLM_SLOW': '1'}": "vllm 1.0 has no variable VLLM_SLOW",
    "server.request('/wake_up', {})": "vllm 1.0 has no path /wake_up",
}


@pytest.mark.parametrize("text", THERE)
def test_what_is_there_is_found(engine: Wheel, tmp_path: Path, text: str) -> None:
    assert check(used(tmp_path, text), {"vllm": engine}) == []


@pytest.mark.parametrize("text", MISSING)
def test_what_is_missing_is_named_with_our_line(engine: Wheel, tmp_path: Path, text: str) -> None:
    line = text.count("\n") + 1
    found = check(used(tmp_path, text), {"vllm": engine})
    assert found == [f"tests/rollout/test_a.py:{line}: {MISSING[text]}"]


def test_what_is_another_engine_s_is_not_looked_up(engine: Wheel, tmp_path: Path) -> None:
    text = """
def reload_sglang(post):
    post("/update", {})
SGLANG = Engine(own=("--model-path",))
VLLM = Engine(own=("--max-len", "--gone"))
LAUNCHER = ["--option-of-a-program"]
"""
    found = check(used(tmp_path, text, "src/drydock/server/engines.py"), {"vllm": engine})
    assert found == ["src/drydock/server/engines.py:5: vllm 1.0 has no flag --gone"]


def test_an_engine_s_own_class_and_file_are_looked_up_for_it_alone(engine: Wheel, tmp_path: Path) -> None:
    body = "    def flags(self, server):\n        server.request('/nowhere')\n        return ['--no-such']\n"
    for text in (f"class SglangWords:\n{body}", f"# contract: sglang\nclass Words:\n{body}"):
        assert check(used(tmp_path, text), {"vllm": engine}) == []
    for text in (f"class VllmWords:\n{body}", f"# contract: vllm\nclass Words:\n{body}"):
        missing = check(used(tmp_path, text.replace("'/nowhere'", "f'/nowhere{self}'")), {"vllm": engine})
        assert sorted(line.rpartition(" ")[2] for line in missing) == ["--no-such", "/nowhere"]


def test_a_test_that_is_not_for_the_engine_is_not_looked_up_for_it(engine: Wheel, tmp_path: Path) -> None:
    body = "def test_it():\n    import vllm.gone\n"
    for mark in ('engine("sglang")', 'lacks("vllm", "it has none")'):
        assert check(used(tmp_path, f"@pytest.mark.{mark}\n{body}"), {"vllm": engine}) == []
    for mark in ('engine("vllm")', 'lacks("sglang", "it has none")'):
        found = check(used(tmp_path, f"@pytest.mark.{mark}\n{body}"), {"vllm": engine})
        assert [line.rpartition(" ")[2] for line in found] == ["vllm.gone"]


def test_a_package_of_the_base_is_said_to_be_not_looked_up() -> None:
    answer = Answer(uses=3, packages={}, missing=[], of_the_base={"tensorrt_llm": 26})
    assert answer.aside == "; not looked up: tensorrt_llm is the base's (26 uses)"
    assert Answer(uses=3, packages={}, missing=[], of_the_base={}).aside == ""


def test_an_engine_that_is_imported_by_another_name_is_found_by_it(tmp_path: Path) -> None:
    path = tmp_path / "checkout/tests/rollout/test_a.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import tensorrt_llm.llmapi\nflags = ['--max_seq_len']\nclass VllmWords:\n    flag = '--no-such'\n"
    )
    assert [(use.package, use.kind, use.name) for use in uses(tmp_path / "checkout", "trtllm")] == [
        ("tensorrt_llm", "symbol", "tensorrt_llm.llmapi:"), ("tensorrt_llm", "flag", "--max_seq_len"),
    ]  # fmt: skip


CONFIGURATION = {
    "verl/__init__.py": "",
    "verl/trainer/config/_generated_ppo_trainer.yaml": """
        actor_rollout_ref:
          rollout:
            n: 1
            sampling: {}
        ray_kwargs:
          ray_init:
            num_cpus: null
        trainer:
          logger: [console]
    """,
}


@pytest.mark.parametrize(
    "text",
    [
        "overrides = ['actor_rollout_ref.rollout.n=5', '++trainer.new=1', '~trainer.logger']",
        "files = ['trainer.log', 'data.parquet']",
        "assert config.trainer.get('loggers')",
        "overrides = ['+actor_rollout_ref.rollout.sampling.top_k=5']",
        "overrides = [f'+ray_kwargs.ray_init.{name}=1' for name in names]",
        "assert config.actor_rollout_ref.rollout.n > 1",
        "overrides = ['trainer.loggers=1']  # contract: refused",
        "other.trainer.loggers",
    ],
)
def test_keys_of_verls_configuration_that_are_there_are_found(tmp_path: Path, text: str) -> None:
    write(tmp_path / "verl.whl", CONFIGURATION)
    wheels = {"verl": Wheel("1.0", tmp_path / "verl.whl")}
    assert check(used(tmp_path, text, "tests/trainer/test_a.py"), wheels) == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("overrides = ['actor_rollout_ref.rollout.samples=5']", "actor_rollout_ref.rollout.samples"),
        ("overrides = ['+actor_rollout_ref.options.top_k=5']", "actor_rollout_ref.options"),
        ("overrides = [f'+ray_kwargs.init.{name}=1' for name in names]", "ray_kwargs.init"),
        ("overrides = ['~trainer.loggers']", "trainer.loggers"),
        ("assert config.trainer.loggers", "trainer.loggers"),
        ("overrides = {'trainer.logger.level': 1}", "trainer.logger.level"),
    ],
)
def test_keys_that_verl_lacks_are_named_with_our_line(tmp_path: Path, text: str, key: str) -> None:
    write(tmp_path / "verl.whl", CONFIGURATION)
    wheels = {"verl": Wheel("1.0", tmp_path / "verl.whl")}
    assert check(used(tmp_path, text, "tests/trainer/test_a.py"), wheels) == [
        f"tests/trainer/test_a.py:1: verl 1.0 has no key {key}"
    ]


def test_a_package_that_the_image_lacks_is_one_line(engine: Wheel, tmp_path: Path) -> None:
    with pytest.raises(DrydockError, match="uses verl, which the image does not have"):
        check(used(tmp_path, "import verl.trainer"), {"vllm": engine})


def test_the_tiers_of_this_checkout_use_a_good_deal() -> None:
    """That nothing is missing means something only where what is used is found."""
    found = uses(Path(__file__).parents[2], "vllm")
    names = {(use.kind, use.name) for use in found}
    assert ("flag", "--all2all-backend") in names
    assert ("variable", "VLLM_SERVER_DEV_MODE") in names
    assert ("path", "/wake_up") in names
    assert ("symbol", "vllm.config.parallel:EPLBConfig") in names
    assert ("symbol", "verl.trainer.ppo.core_algos:agg_loss") in names
    assert ("key", "actor_rollout_ref.rollout.n") in names
    assert ("flag", "--no-such-flag") not in names
    assert len(found) > 150

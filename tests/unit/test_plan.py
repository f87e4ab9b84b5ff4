"""Layers follow the lock: a package moves its own layer and no other."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from drydock.bytecode import toolchain
from drydock.definition import Image
from drydock.locks import Artifact, DebianLock, PyLock, read_debian_lock, read_pylock
from drydock.plan import LARGE_WHEEL, WHEEL_BUCKETS, _grouped, plan_layers

ROOT = Path(__file__).parents[2]


def wheel(name: str, size: int = 1000) -> Artifact:
    return Artifact(
        kind="wheel", name=name, version="1", filename=f"{name}.whl", sha256=name.ljust(64, "0"), size=size
    )


def grouping(names: set[str]) -> set[frozenset[str]]:
    groups = _grouped([wheel(name) for name in sorted(names)], LARGE_WHEEL, WHEEL_BUCKETS, "python")
    return {frozenset(artifact.name for artifact in group) for _, group in groups}


@given(
    st.sets(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=40),
    st.text("xyz", min_size=1, max_size=4),
)
def test_adding_a_package_changes_one_bucket(names: set[str], added: str) -> None:
    before, after = grouping(names), grouping(names | {added})
    assert len(after - before) == 1
    (changed,) = after - before
    assert added in changed
    assert before - after <= {changed - {added}}


def parts(name: str) -> tuple[Image, PyLock, DebianLock]:
    image = Image.named(ROOT, name)
    return image, read_pylock(image), read_debian_lock(ROOT, image.base, image.definition.architecture)


def test_every_artifact_is_in_exactly_one_layer_and_few_enough_layers() -> None:
    for name in ("cpu-vllm", "h100-vllm", "gb200-vllm"):
        image, lock, base = parts(name)
        specs = plan_layers(image, lock, base, toolchain(image.definition.python, base, base))
        wheels = [artifact.name for spec in specs if spec.kind == "wheels" for artifact in spec.artifacts]
        debs = [artifact.name for spec in specs if spec.kind == "debs" for artifact in spec.artifacts]
        assert sorted(wheels) == sorted(package.name for package in lock.packages)
        assert sorted(debs) == sorted(package.name for package in base.packages)
        assert len(specs) + 1 < 100, "containerd allows 127 layers, and users add some of their own"
        assert len({spec.key for spec in specs}) == len(specs)


def test_bumping_a_package_changes_one_key() -> None:
    image, lock, base = parts("cpu-vllm")
    tools = toolchain(image.definition.python, base, base)
    for index in (0, len(lock.packages) // 2, -1):
        packages = list(lock.packages)
        package = packages[index]
        file = package.wheels[0].model_copy(update={"hashes": {"sha256": "0" * 64}})
        packages[index] = package.model_copy(update={"version": "99", "wheels": (file,)})
        bumped = lock.model_copy(update={"packages": tuple(packages)})
        before = {spec.key for spec in plan_layers(image, lock, base, tools)}
        after = {spec.key for spec in plan_layers(image, bumped, base, tools)}
        assert len(after - before) == 1


def test_a_distribution_over_another_comes_after_it() -> None:
    image, lock, base = parts("h100-vllm")
    specs = plan_layers(image, lock, base, toolchain(image.definition.python, base, base))
    order = [artifact.name for spec in specs for artifact in spec.artifacts]
    for winner, overlap in image.engine.overlaps.items():
        for loser in overlap.over:
            assert order.index(loser) < order.index(winner)

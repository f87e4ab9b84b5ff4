"""`drydock diff`: what is said is what differs, of images here and of locks in git."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from project import make_project

from drydock.diff import Side, diff, side, text_lines
from drydock.errors import DrydockError
from drydock.oci import Layer
from drydock.store import Store


def layer(title: str, digest: str, size: int) -> Layer:
    return Layer(
        digest=digest, size=size, diff_id=digest, unpacked=size, title=title, contents=(title,), key=digest, made=False
    )  # fmt: skip


def a_side(**changes: Any) -> Side:
    values: dict[str, Any] = {
        "name": "box-mini", "python": {"alpha": "1.0", "beta": "1.0"}, "base": {"libc6": "2.41"},
        "environment": {"A": "1"}, "layers": None,
    }  # fmt: skip
    return Side(**values | changes)


def test_the_same_differs_in_nothing() -> None:
    found = diff(a_side(), a_side())
    assert (found["python"], found["base"], found["environment"]) == ({}, {}, {})


def test_packages_variables_and_layers() -> None:
    base, one, other = layer("base", "b", 100), layer("alpha 1.0", "1", 10), layer("alpha 1.1", "2", 20)
    old = a_side(layers=(base, one))
    new = a_side(
        python={"alpha": "1.1", "gamma": "3"},
        environment={},
        base={"libc6": "2.42"},
        layers=(base, other, other),
    )
    found = diff(old, new)
    assert found["python"] == {"alpha": ["1.0", "1.1"], "beta": ["1.0", None], "gamma": [None, "3"]}
    assert found["base"] == {"libc6": ["2.41", "2.42"]}
    assert found["environment"] == {"A": ["1", None]}
    assert found["layers"] == {
        "of": 2, "shared": 1, "shared_bytes": 100, "pulled_bytes": 20, "pulled": [{"title": "alpha 1.1", "bytes": 20}],
    }  # fmt: skip
    text = "\n".join(text_lines(found))
    for line in ("1 moved, 1 added, 1 removed", "  alpha 1.0 -> 1.1", "  + gamma 3", "  - beta 1.0",
                 "environment: A: 1 -> not set", "layers: 1 of 2 shared (0.0 MB), 1 to pull"):  # fmt: skip
        assert line in text
    assert json.loads(json.dumps(found)) == found


def git(root: Path, *words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)


def test_a_lock_as_a_revision_had_it(tmp_path: Path) -> None:
    """Also one whose definition had a key that is unknown now."""
    root = make_project(tmp_path / "project", '["alpha"]')
    store = Store(tmp_path / "store")
    lock, definition = root / "lock/pylock.box-mini.toml", root / "images/box/image.toml"
    lock.write_text('[[packages]]\nname = "alpha"\nversion = "1.0"\n')
    now = definition.read_text()
    definition.write_text(now.replace("[engine.mini]", "[engine.mini]\nforgotten-key = true"))
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "then")
    lock.write_text('[[packages]]\nname = "alpha"\nversion = "1.1"\n')
    definition.write_text(now)
    git(root, "commit", "-qam", "now")
    found = diff(side(root, store, "box@HEAD~1"), side(root, store, "box-mini@HEAD"))
    assert found["python"] == {"alpha": ["1.0", "1.1"]}
    assert (found["old"], found["layers"]) == ("box-mini@HEAD~1", None)


@pytest.mark.parametrize("name", ["box@nowhere", "box@--output=x", "bax@HEAD", "box-maxi@HEAD"])
def test_what_git_does_not_have_is_one_line(tmp_path: Path, name: str) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    with pytest.raises(DrydockError) as raised:
        side(root, Store(tmp_path / "store"), name)
    assert "\n" not in str(raised.value)
    assert not (root / "x").exists()

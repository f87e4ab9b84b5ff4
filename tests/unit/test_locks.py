"""Locking made-up packages from a folder, with the real uv, and checking locks offline."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from project import make_project, make_wheel

from drydock import relock
from drydock.definition import Image
from drydock.errors import DrydockError
from drydock.locks import check_pylock, content_hash, platform_tags, read_pylock, wheel_rank, write_lock
from drydock.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    links = tmp_path / "links"
    for version in ("1.0", "1.1"):
        make_wheel(links, "alpha", version, ("beta",))
        make_wheel(links, "beta", version)
    return links


@pytest.fixture
def environ(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment with no index but the folder."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "DRYDOCK_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return dict(os.environ)


def relocked(root: Path, environ: dict[str, str], *upgrade: str) -> list[tuple[str, str | None, str | None]]:
    """Lock the Python environment only: the Debian locks are the repository's."""
    image = Image.named(root, "box")
    before = relock.versions(image.pylock_path)
    from drydock.indexes import read_indexes
    from drydock.resolve import lock_image

    kept = {name: version for name, version in before.items() if name not in upgrade}
    lock_image(image, Store(root / ".drydock"), read_indexes(environ), kept)
    after = relock.versions(image.pylock_path)
    return [
        (name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def test_a_lock_names_files_and_no_place(tmp_path: Path, environ: dict[str, str]) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    relocked(root, environ)
    text = (root / "lock/pylock.box-mini.toml").read_text()
    assert "://" not in text
    assert str(tmp_path) not in text
    data = tomllib.loads(text)
    assert [package["wheels"][0]["path"] for package in data["packages"]] == [
        "wheels/alpha-1.1-py3-none-any.whl",
        "wheels/beta-1.1-py3-none-any.whl",
    ]
    assert check_pylock(Image.named(root, "box"), read_pylock(Image.named(root, "box"))) == []


def test_locking_again_moves_nothing_and_upgrade_moves_one(
    tmp_path: Path, folder: Path, environ: dict[str, str]
) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    relocked(root, environ)
    for name in ("alpha", "beta"):
        make_wheel(folder, name, "1.2", ("beta",) if name == "alpha" else ())
    assert relocked(root, environ) == []
    assert relocked(root, environ, "beta") == [("beta", "1.1", "1.2")]


def test_a_refresh_holds_nothing(
    tmp_path: Path, folder: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    relocked(root, environ)
    for name in ("alpha", "beta"):
        make_wheel(folder, name, "1.2", ("beta",) if name == "alpha" else ())
    held = []
    # apt's part is its own tests'; here is what it is told to hold.
    monkeypatch.setattr(relock, "lock_base", lambda *arguments: held.append(arguments[-1]))
    environ = environ | {"DRYDOCK_DEBIAN_MIRROR": str(tmp_path)}
    image, store = Image.named(root, "box"), Store(root / ".drydock")
    assert relock.lock([image], store, environ) == []
    changes = relock.lock([image], store, environ, refresh=True)
    assert [(row["package"], row["from"], row["to"]) for row in changes] == [
        ("alpha", "1.1", "1.2"),
        ("beta", "1.1", "1.2"),
    ]
    assert "libc6" in held[0]
    assert held[1] == {}


def test_a_changed_definition_keeps_what_still_fits(tmp_path: Path, environ: dict[str, str]) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    relocked(root, environ)
    path = root / "images/box/image.toml"
    path.write_text(path.read_text().replace('["alpha"]', '["alpha==1.0"]'))
    with pytest.raises(DrydockError, match="out of date"):
        read_pylock(Image.named(root, "box"))
    assert relocked(root, environ) == [("alpha", "1.1", "1.0")]


def test_only_versions_that_the_definition_refuses_are_let_go() -> None:
    """What is let go moves, all else is held exactly: held loosely, uv may take a release without a wheel for us."""
    from drydock.resolve import still_asked_for

    kept = {"alpha": "1.1", "beta": "2.0rc1", "gamma": "1.0"}
    assert still_asked_for(kept, ["alpha==1.0", "Beta[more]>=1", "delta"]) == {
        "beta": "2.0rc1",
        "gamma": "1.0",
    }


def test_overrides_and_exclusions_reach_the_resolver(tmp_path: Path, environ: dict[str, str]) -> None:
    more = '[engine.mini.overrides]\nbeta = { version = "1.0", reason = "for a test of it" }\n'
    root = make_project(tmp_path / "a", '["alpha"]', more)
    assert ("beta", None, "1.0") in relocked(root, environ)
    more = '[engine.mini.exclusions]\nbeta = { reason = "for a test of it" }\n'
    root = make_project(tmp_path / "b", '["alpha"]', more)
    assert relocked(root, environ) == [("alpha", None, "1.1")]


def test_what_does_not_resolve_is_one_line(tmp_path: Path, environ: dict[str, str]) -> None:
    root = make_project(tmp_path / "project", '["alpha", "beta==9"]')
    with pytest.raises(DrydockError, match=r"box-mini does not resolve: .*beta==9") as raised:
        relocked(root, environ)
    assert "\n" not in str(raised.value)


def test_a_wheel_for_another_platform_is_no_wheel(
    tmp_path: Path, folder: Path, environ: dict[str, str]
) -> None:
    make_wheel(folder, "gamma", "1.0", tag="cp313-cp313-manylinux_2_28_aarch64")
    root = make_project(tmp_path / "project", '["alpha", "gamma"]')
    with pytest.raises(DrydockError, match="gamma"):
        relocked(root, environ)


def test_an_edited_lock_is_refused(tmp_path: Path, environ: dict[str, str]) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    relocked(root, environ)
    path = root / "lock/pylock.box-mini.toml"
    path.write_text(path.read_text().replace('version = "1.1"', 'version = "1.0"', 1))
    with pytest.raises(DrydockError, match="edited by hand"):
        read_pylock(Image.named(root, "box"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lock: lock["packages"].pop(0), "alpha is asked for and not locked"),
        (lambda lock: lock["packages"].append(lock["packages"][0]), "locked twice"),
        (
            lambda lock: lock["packages"][0]["wheels"][0].update(path="wheels/alpha-1.0-py3-none-any.whl"),
            "its wheel is alpha-1.0",
        ),
        (
            lambda lock: lock["packages"][0]["wheels"][0].update(
                path="wheels/alpha-1.1-cp313-cp313-manylinux_2_28_aarch64.whl"
            ),
            "does not fit",
        ),
    ],
)
def test_a_sealed_lock_that_is_wrong_is_told_apart(
    change: object, words: str, tmp_path: Path, environ: dict[str, str]
) -> None:
    root = make_project(tmp_path / "project", '["alpha"]')
    relocked(root, environ)
    image = Image.named(root, "box")
    data = tomllib.loads(image.pylock_path.read_text())
    change(data)  # type: ignore[operator]
    write_lock(image.pylock_path, data)
    assert any(words in problem for problem in check_pylock(image, read_pylock(image)))
    answer = relock.check([image])
    assert not answer["ok"]


def test_the_repositorys_own_locks_are_right() -> None:
    from drydock.definition import image_names

    root = Path(__file__).parents[2]
    answer = relock.check([Image.named(root, name) for name in image_names(root)])
    assert answer["ok"], answer


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
@example({"tool": 0})
def test_the_seal_does_not_cover_itself_and_covers_all_else(data: dict[str, int | str]) -> None:
    sealed = {**data, "content": "anything"}
    assert content_hash(sealed) == content_hash({**data, "content": "else"})
    assert content_hash({**sealed, "new key": 1}) != content_hash(sealed)


def test_the_best_wheel_is_the_most_specific_that_fits() -> None:
    tags = platform_tags(Image.named(Path(__file__).parents[2], "cpu"))
    ranked = [
        wheel_rank(f"x-1-{tag}.whl", tags)
        for tag in (
            "cp313-cp313-manylinux_2_40_x86_64",
            "cp313-cp313-manylinux2014_x86_64",
            "cp39-abi3-manylinux1_x86_64",
            "py3-none-any",
        )
    ]
    assert None not in ranked
    assert ranked == sorted(ranked, key=lambda rank: rank or 0)
    for tag in (
        "cp313-cp313-manylinux_2_41_x86_64",
        "cp313-cp313-musllinux_1_2_x86_64",
        "cp312-cp312-manylinux_2_28_x86_64",
        "cp313-cp313t-manylinux_2_28_x86_64",
        "cp313-cp313-manylinux_2_28_aarch64",
    ):
        assert wheel_rank(f"x-1-{tag}.whl", tags) is None, tag

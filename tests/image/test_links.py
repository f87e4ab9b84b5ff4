"""A definition's links: in the image, verified as all else, and never to nowhere or over a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_image import SITE, Project, build, edit_toml, unpacked

from drydock.oci import read_image
from drydock.store import Store
from drydock.verify import verify


def link(own: Project, links: dict[str, str]) -> None:
    edit_toml(own.root / "images/tiny/image.toml", lambda data: data["engine"]["mini"].update(links=links))


def test_links_are_in_the_image_and_one_that_is_changed_is_drift(
    own: Project, warm: Store, tmp_path: Path
) -> None:
    file, folder = f"/{SITE}/click/__init__.py", f"/{SITE}/click"
    link(own, {"/usr/local/tool/lib/first": file, "/usr/local/tool/all": folder})
    said = build(own, warm)
    assert said.status == 0, said.stderr
    tree = unpacked(warm, read_image(warm, "tiny-mini"), tmp_path / "root")
    assert (tree / "usr/local/tool/lib/first").readlink() == Path(file)
    assert (tree / "usr/local/tool/all").readlink() == Path(folder)
    assert verify(tree, full=True).verdict == "ok"
    (tree / "usr/local/tool/all").unlink()
    (tree / "usr/local/tool/all").symlink_to("/tmp")
    assert verify(tree, full=False).verdict == "drift"


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ({"/usr/local/tool": "/opt/nothing"}, "/usr/local/tool would lead to /opt/nothing, which is not in"),
        ({"/usr/bin": "/opt/venv"}, "the image holds something else at /usr/bin"),
        ({f"/{SITE}/click/__init__.py": "/usr"}, "the image holds something else at"),
        ({"usr/local/tool": "/usr"}, "'usr/local/tool' is not an absolute path"),
        ({"/usr/local/../tool": "/usr"}, "'/usr/local/../tool' is not an absolute path"),
        ({"/usr/share/drydock/more": "/usr"}, "outside of"),
    ],
)
def test_a_link_that_cannot_be_right_is_refused(
    own: Project, warm: Store, links: dict[str, str], expected: str
) -> None:
    link(own, links)
    said = build(own, warm)
    assert "engine.mini.links" in said.error
    assert expected in said.error

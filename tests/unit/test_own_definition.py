"""An engine with a definition of its own beside its hardware's, and a vendor's image that nobody has read yet."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from project import VENDOR_DEFINITION, make_project, make_wheel
from typer.testing import CliRunner

from drydock import relock
from drydock.build import Inputs
from drydock.cli import app
from drydock.definition import Image, image_names
from drydock.diff import side
from drydock.errors import DrydockError
from drydock.hardware import definition_for
from drydock.matrix import matrix
from drydock.oci import Built
from drydock.published import write_record
from drydock.store import Store
from drydock.tiers.device import CUDA
from drydock.verify.here import verify_here

DIGEST = f"sha256:{'1' * 64}"
OWN = VENDOR_DEFINITION.replace("mini", "own").format(
    hardware="box", architecture="amd64", repository="vendor/release", digest=DIGEST,
    site_packages="/usr/lib/python3/dist-packages", provided="torch", version="2.9.1",
    requirements='["alpha", "torch"]', more="",
)  # fmt: skip
VARIANT = f'[base.variants.b2]\ndigest = "{DIGEST}"\nversion = "1.2.1-b2"\nsoc = ["Chip2"]\n'
LOCK = f'repository = "vendor/release"\nversion = "1"\nmanifest = "{"4" * 64}"\n'
BASE = {"vendor/release": f"1 sha256:{'4' * 12}"}
NOT_READ = "its base is not read yet: run `drydock lock --base box-own` where a registry has it"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "alpha", "1.0")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = make_project(tmp_path / "project", '["alpha"]')
    (root / "images/box/own.toml").write_text(OWN)
    return root


def locked(root: Path, environ: dict[str, str], *names: str, named: bool = True, **more: bool) -> list[str]:
    images = [Image.named(root, name) for name in names]
    changes = relock.lock(images, Store(root / "store"), environ, named=named, **more)
    return [f"{change['lock']} {change['package']}" for change in changes]


def commit(root: Path) -> None:
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "then"]):
        subprocess.run([*git, *words], check=True, capture_output=True)


def test_each_engine_has_its_definition_and_its_locks(root: Path) -> None:
    assert image_names(root) == ["box-mini", "box-own"]
    mini, own = (Image.named(root, name) for name in image_names(root))
    assert mini.definition_path == root / "images/box/image.toml"
    assert own.definition_path == root / "images/box/own.toml"
    assert (mini.vendor, mini.unread) == (None, False)
    assert own.vendor_lock_path == root / "lock/base-box-own.toml"
    assert own.unread
    own.vendor_lock_path.write_text("")
    assert not own.unread


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("other.toml", OWN, "other.toml: engine: is own in the file of other"),
        ("mini.toml", OWN.replace("own", "mini"), "has mini.toml beside it: define it in one of them"),
    ],
)
def test_a_file_defines_the_engine_that_it_is_named_for_and_no_other_does(
    root: Path, file: str, text: str, said: str
) -> None:
    (root / "images/box" / file).write_text(text)
    with pytest.raises(DrydockError) as raised:
        image_names(root)
    assert said in str(raised.value)


def test_packages_are_locked_over_a_base_that_nobody_has_read(root: Path, environ: dict[str, str]) -> None:
    assert locked(root, environ, "box-own", only_packages=True) == ["pylock.box-own.toml alpha"]
    assert relock.check([Image.named(root, "box-own")]) == {
        "ok": True,
        "locks": [
            {"lock": "base-box-own", "problems": [], "open": NOT_READ},
            {"lock": "pylock.box-own", "problems": []},
        ],
    }
    with pytest.raises(
        DrydockError, match=r"base-box-own\.toml is missing: run `drydock lock --base box-own`"
    ):
        Inputs(Image.named(root, "box-own"))


def test_it_is_read_where_somebody_asks_for_it_and_left_where_all_are_locked(
    root: Path, environ: dict[str, str]
) -> None:
    with pytest.raises(DrydockError, match="no registry of base images is named"):
        locked(root, environ, "box-own")
    assert locked(root, environ, "box-own", named=False) == ["pylock.box-own.toml alpha"]
    nowhere = environ | {"DRYDOCK_BASE_REGISTRY": "127.0.0.1:1"}
    with pytest.raises(DrydockError, match=r"127\.0\.0\.1:1"):
        locked(root, nowhere, "box-own", named=False)


def test_one_that_is_recorded_must_have_been_read(root: Path, environ: dict[str, str]) -> None:
    locked(root, environ, "box-own", only_packages=True)
    write_record(
        root,
        Built(
            name="box-own", architecture="amd64", digest="2" * 64, config_digest="3" * 64, layers=(), environment={}
        ),
    )  # fmt: skip
    answer = relock.check([Image.named(root, "box-own")])
    assert not answer["ok"]
    assert "base-box-own.toml is missing" in answer["locks"][0]["problems"][0]


def test_the_matrix_says_what_of_it_is_locked(root: Path, environ: dict[str, str]) -> None:
    assert "| `box-own` |  |" in matrix_rows(root, environ, lock=False)
    row = matrix_rows(root, environ, lock=True)
    assert "| `box-own` | packages; its base is not read yet |  |" in row
    assert "| `box-own` | torch 2.9.1 |" in row


def matrix_rows(root: Path, environ: dict[str, str], *, lock: bool) -> str:
    if lock:
        locked(root, environ, "box-own", only_packages=True)
        locked(root, environ, "box-mini", only_packages=True)
        return matrix(root)
    from drydock.matrix import proven

    return "\n".join(proven(root))


def test_the_command_says_it_and_passes(
    root: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DRYDOCK_BASE_REGISTRY", raising=False)
    monkeypatch.setenv("DRYDOCK_STORE", str(root / "store"))
    monkeypatch.chdir(root)
    (root / "pyproject.toml").write_text("")
    run = CliRunner().invoke
    assert run(app, ["lock", "--packages", "box-own", "box-mini"]).exit_code == 0
    checked = run(app, ["lock", "--check"])
    assert checked.exit_code == 0
    assert f"base-box-own: {NOT_READ}" in checked.output
    fetched = run(app, ["fetch", "--json", "box-own"])
    assert isinstance(fetched.exception, DrydockError)
    both = run(app, ["lock", "--base", "--packages"])
    assert "leave nothing out" in str(both.exception)


def test_an_environment_is_compared_with_its_own_definition(root: Path, environ: dict[str, str]) -> None:
    locked(root, environ, "box-own", only_packages=True)
    path = root / "images/box/own.toml"
    path.write_text(OWN.replace('kind = "none"', 'kind = "cuda"\nminimum-driver = "580"\nsm = ["90"]'))
    checks = {check.name: check for check in verify_here(root, "box-own").checks}
    assert checks["accelerator"].state != "not-applicable", "of box-mini, which has no accelerator"


def test_a_variant_of_it_is_found_here_and_in_a_revision(root: Path, environ: dict[str, str]) -> None:
    path = root / "images/box/own.toml"
    path.write_text(OWN.replace("[base.provides]", f"{VARIANT}[base.provides]"))
    locked(root, environ, "box-own-b2", only_packages=True)
    (root / "lock/base-box-own-b2.toml").write_text(LOCK)
    commit(root)
    found = side(root, Store(root / "store"), "box-own-b2@HEAD")
    assert (found.name, found.python, found.base) == ("box-own-b2@HEAD", {"alpha": "1.0"}, BASE)
    assert verify_here(root, "box-own-b2").image == "box-own-b2"


def test_a_hardware_with_such_files_only_is_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "images/box/own.toml"
    path.write_text(OWN.replace('kind = "none"', 'kind = "cuda"\nminimum-driver = "580"\nsm = ["90"]'))
    (root / "images/box/image.toml").unlink()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = definition_for(root, CUDA)
    assert found
    assert found.hardware == "box"


def test_it_is_compared_with_what_a_revision_had(root: Path, environ: dict[str, str]) -> None:
    locked(root, environ, "box-own", only_packages=True)
    (root / "lock/base-box-own.toml").write_text(LOCK)
    commit(root)
    found = side(root, Store(root / "store"), "box-own@HEAD")
    assert (found.python, found.base) == ({"alpha": "1.0"}, BASE)
    assert json.dumps(found.environment) == "{}"

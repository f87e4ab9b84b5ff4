"""A session in place, inside an image: what it needs is there, and its report says which image that was."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project import REPOSITORY

from drydock import session
from drydock.definition import Image, image_names
from drydock.errors import CheckFailed, DrydockError
from drydock.tiers import device

DIGEST = f"sha256:{'5' * 64}"
WITH_THE_IMAGES_PACKAGES_ALONE = """
import importlib.metadata, re, sys, tomllib

def normalized(name):
    return re.sub("[-_.]+", "-", name).lower()

def with_what_it_requires(name):
    held.add(name)
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        required = normalized(re.match("[A-Za-z0-9._-]+", line)[0])
        if "extra ==" not in line and required not in held:
            with_what_it_requires(required)

held = {package["name"] for package in tomllib.load(open(sys.argv[1], "rb"))["packages"]} | {"drydock"}
for name in sys.argv[2:]:
    with_what_it_requires(name)
missing = {
    module
    for module, distributions in importlib.metadata.packages_distributions().items()
    if not set(map(normalized, distributions)) & held
}
loaded = {name.partition(".")[0] for name in sys.modules}

class OnlyTheImage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"the image has no {name}")

sys.meta_path.insert(0, OnlyTheImage())
assert not missing & loaded, missing & loaded
try:
    import matplotlib
except ModuleNotFoundError:
    import drydock.session, drydock.report
    from drydock.report.junit import junit
    print("imported")
"""


@pytest.mark.parametrize("image", image_names(REPOSITORY))
def test_a_session_starts_with_what_the_image_holds(image: str) -> None:
    """Of drydock's own dependencies, an image holds those that the stack needs too; a vendor's base some of them, which
    its definition provides, or leaves out of the lock for that."""
    found = Image.named(REPOSITORY, image)
    given = [*found.provides, *found.engine.exclusions] if found.vendor else []
    command = [sys.executable, "-c", WITH_THE_IMAGES_PACKAGES_ALONE, str(found.pylock_path), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


def test_what_an_image_has_on_its_path_stays_there_behind_ours() -> None:
    """CANN's modules are on PYTHONPATH, and torch-npu imports them."""
    assert session._environment("/drydock", "/cann/python:/cann/tbe")["PYTHONPATH"] == (
        "/drydock/src:/cann/python:/cann/tbe"
    )
    assert session._environment("/drydock", "")["PYTHONPATH"] == "/drydock/src"


def options(**values: Any) -> argparse.Namespace:
    usual = {
        "engine": "vllm", "profile": "fast", "hardware": None, "runtime": "auto", "cpu_part": False, "tier": None,
        "keyword": None, "gsm8k_model": None, "gsm8k_data": None, "prebuilt": False, "digest": None,
        "allow_drift": False, "unbudgeted": True,
    }  # fmt: skip
    return argparse.Namespace(**usual | values)


def test_a_session_inside_an_image_says_what_that_was_pulled_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, where verification finds no image, so that it ends there: its report is written all the same."""
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"image": "cpu-vllm", "accelerator": {"kind": "none"}}))
    monkeypatch.setattr(session, "MANIFEST", manifest)
    monkeypatch.setattr(session, "inside", lambda: True)
    root = tmp_path / "checkout"
    (root / "src").mkdir(parents=True)
    with pytest.raises(CheckFailed, match="the image is not what its lock says"):
        session.run_session(root, options(digest=DIGEST))
    report = json.loads((root / "results/vllm_fast/latest/report.json").read_text())
    assert (report["runtime"], report["image"]["name"], report["image"]["digest"]) == (
        "inside",
        "cpu-vllm",
        DIGEST,
    )


def test_a_digest_is_for_inside_an_image() -> None:
    with pytest.raises(DrydockError, match="--digest is of the image that this runs in, and this is none"):
        # No such hardware: were it not refused, it would not begin to build.
        session.run_session(REPOSITORY, options(digest=DIGEST, hardware="none"))


@pytest.mark.parametrize("text", ["latest", "sha256:5", f"{DIGEST}5", "5" * 64])
def test_a_digest_that_is_none_is_refused(text: str) -> None:
    command = [sys.executable, "-m", "drydock.session", "vllm", "fast", "--digest", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"argument --digest: '{text}' is not sha256: and 64 digits" in done.stderr


def test_tensorrt_llm_s_session_has_no_eplb_tier_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session._chosen(options()) == ["rollout", "trainer", "eplb"]
    assert session._chosen(options(engine="trtllm")) == ["rollout", "trainer"]
    with pytest.raises(DrydockError, match="trtllm has no eplb tier: TensorRT-LLM plans its experts"):
        session._chosen(options(engine="trtllm", tier="eplb"))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"image": "h100-trtllm", "accelerator": {"kind": "none"}}))
    monkeypatch.setattr(session, "MANIFEST", manifest)
    monkeypatch.setattr(session, "inside", lambda: True)
    (tmp_path / "checkout/src").mkdir(parents=True)
    with pytest.raises(CheckFailed):
        session.run_session(tmp_path / "checkout", options(engine="trtllm"))
    report = json.loads((tmp_path / "checkout/results/trtllm_fast/latest/report.json").read_text())
    assert {row["what"]: row["reason"].partition(" ")[0] for row in report["not_run"]} == {
        "the rollout tier": "verification", "the trainer tier": "verification", "the eplb tier": "TensorRT-LLM",
    }  # fmt: skip


def test_a_session_for_a_device_that_is_not_here_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "DEV", tmp_path)
    ascend = Image.named(REPOSITORY, "ascend")
    with pytest.raises(DrydockError, match="ascend-vllm needs an Ascend NPU and this machine shows none"):
        session._need_device(ascend, options())
    with pytest.raises(DrydockError, match="h100-vllm needs an NVIDIA GPU and this machine shows none"):
        session._need_device(Image.named(REPOSITORY, "h100"), options())
    assert session._need_device(ascend, options(cpu_part=True)) == device.NPU
    assert session._need_device(Image.named(REPOSITORY, "cpu"), options()) == device.CPU
    (tmp_path / "davinci0").touch()
    assert session._need_device(ascend, options()) == device.NPU
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    with pytest.raises(DrydockError, match="needs an Ascend NPU and ASCEND_RT_VISIBLE_DEVICES leaves none"):
        session._need_device(ascend, options())


def test_the_image_is_the_one_for_the_chips_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        session, "variant_here", lambda definition: "-a3" if definition.hardware == "ascend" else ""
    )
    assert session._image_name(REPOSITORY, options(hardware="ascend")) == "ascend-vllm-a3"
    assert session._image_name(REPOSITORY, options(hardware="cpu")) == "cpu-vllm"
    monkeypatch.setattr(session, "hardware_here", lambda _: "ascend")
    assert session._image_name(REPOSITORY, options()) == "ascend-vllm-a3"

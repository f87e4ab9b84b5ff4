"""Definitions of NPUs, and of one base in several variants."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from project import REPOSITORY, VENDOR_DEFINITION

from drydock import relock
from drydock.definition import Image, image_names, read_definition
from drydock.errors import DrydockError
from drydock.locks import resolution_inputs

OTHER = f"sha256:{9:064x}"
VARIANT = f'[base.variants.b2]\ndigest = "{OTHER}"\nversion = "1.2.1-b2"\nsoc = ["Chip2"]\n'
NPU = 'kind = "npu"\nminimum-driver = "26.0.RC1"\nsoc = ["Chip1"]\ncann = "9.1.0"'


def define(root: Path, accelerator: str = NPU, variant: str = VARIANT) -> Path:
    """A checkout with one definition over a vendor's image."""
    text = VENDOR_DEFINITION.format(
        hardware="box", architecture="arm64", repository="vendor/release", digest=f"sha256:{1:064x}",
        site_packages="/opt/python", provided="torch", version="2.10.0", requirements='["alpha"]', more="",
    )  # fmt: skip
    path = root / "images/box/image.toml"
    path.parent.mkdir(parents=True)
    path.write_text(
        text.replace('kind = "none"', accelerator).replace("[accelerator]", f"{variant}[accelerator]")
    )
    return path


def test_a_variant_is_an_image_with_its_own_base_and_the_same_lock(tmp_path: Path) -> None:
    define(tmp_path)
    assert image_names(tmp_path) == ["box-mini", "box-mini-b2"]
    base, other = (Image.named(tmp_path, name) for name in image_names(tmp_path))
    assert (base.name, other.name) == ("box-mini", "box-mini-b2")
    assert base.vendor
    assert other.vendor
    assert (base.vendor.digest, base.vendor.version) == (f"sha256:{1:064x}", "1.2.1")
    assert (other.vendor.digest, other.vendor.version) == (OTHER, "1.2.1-b2")
    assert [image.vendor_lock_path.name for image in (base, other)] == ["base-box.toml", "base-box-b2.toml"]
    assert base.pylock_path == other.pylock_path
    assert resolution_inputs(base) == resolution_inputs(other)
    assert base.provides == other.provides == {"torch": "2.10.0"}
    rows = relock.check([base, other])["locks"]
    assert [row["lock"] for row in rows] == ["base-box", "base-box-b2", "pylock.box-mini"]


@pytest.mark.parametrize("name", ["box-b2", "box-mini-", "box-mini-b3", "box-maxi-b2"])
def test_what_is_no_variant_is_one_line_that_lists_them(tmp_path: Path, name: str) -> None:
    define(tmp_path)
    with pytest.raises(DrydockError, match=rf"unknown image '{name}'.*engine\(s\) mini .* as b2 too"):
        Image.named(tmp_path, name)


def test_an_engine_with_a_file_of_its_own_has_variants_too(tmp_path: Path) -> None:
    own = define(tmp_path)
    own.rename(own.with_name("mini.toml"))
    text = own.with_name("mini.toml").read_text()
    own.write_text(text.replace(".mini", ".maxi").replace(VARIANT, "").replace('"mini"', '"maxi"'))
    assert image_names(tmp_path) == ["box-maxi", "box-mini", "box-mini-b2"]
    image = Image.named(tmp_path, "box-mini-b2")
    assert image.definition_path.name == "mini.toml"
    assert (image.pylock_path.name, image.vendor_lock_path.name) == (
        "pylock.box-mini.toml",
        "base-box-mini-b2.toml",
    )


@pytest.mark.parametrize(
    ("accelerator", "why"),
    [
        (NPU.replace('cann = "9.1.0"', ""), "accelerator: kind npu needs minimum-driver, soc and cann"),
        (NPU.replace('soc = ["Chip1"]', ""), "accelerator: kind npu needs minimum-driver, soc and cann"),
        (NPU.replace("minimum-driver", "newest-driver"), "accelerator.newest-driver: unknown key"),
        (
            NPU.replace('"26.0.RC1"', '"26.0-final"'),
            "accelerator.minimum-driver: '26.0-final' is no version of Ascend's driver",
        ),
        ('kind = "none"\ncann = "9.1.0"', "accelerator: soc and cann are of kind npu"),
    ],
)
def test_an_npu_says_its_driver_chips_and_cann(tmp_path: Path, accelerator: str, why: str) -> None:
    with pytest.raises(DrydockError, match=re.escape(f"image.toml: {why}")):
        read_definition(define(tmp_path, accelerator))


def test_a_variant_names_its_chips(tmp_path: Path) -> None:
    with pytest.raises(DrydockError, match=r"base\.variants\.b2\.soc: required"):
        read_definition(define(tmp_path, variant=VARIANT.replace("soc", "# soc")))


def test_ours_for_ascend_is_two_images_of_one_definition() -> None:
    names = [name for name in image_names(REPOSITORY) if name.startswith("ascend-")]
    assert names == ["ascend-vllm", "ascend-vllm-a3"]
    images = [Image.named(REPOSITORY, name) for name in names]
    assert len({image.vendor.digest for image in images if image.vendor}) == 2
    assert "mindspeed" in images[0].engine.absent_distributions

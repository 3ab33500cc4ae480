"""support/pictures.py: any image becomes RGB bytes, and what is not an image is named."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from support.errors import UserError
from support.pictures import read_image, readable_suffixes, to_image

# (48, 64, 3) uint8, a different ramp in every channel and nothing symmetric.
Y, X = np.mgrid[:48, :64]
RGB = np.stack([X * 3, Y * 4, X + 2 * Y], axis=-1).astype(np.uint8)
GREY = RGB[..., :1].repeat(3, axis=2)
RGBA = np.concatenate([RGB, 255 - RGB[..., :1]], axis=2)


# One pixel of 16 bits per channel, which Pillow can read but not write.
PNG_16 = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000c49444154789c63"
    "103201410002b300d3fab702450000000049454e44ae426082"
)

FORMS = {
    "PIL": (Image.fromarray(RGB), RGB),
    "PIL RGBA": (Image.fromarray(RGBA), RGB),
    "PIL palette": (Image.fromarray(GREY[..., 0]).convert("P"), GREY),
    "array": (RGB, RGB),
    "array RGBA": (RGBA, RGB),
    "array grey": (GREY[..., 0], GREY),
    "reversed strides": (RGB[::-1, :, ::-1].copy()[::-1, :, ::-1], RGB),
    "not writeable": (np.asarray(Image.fromarray(RGB)), RGB),
    "float64": (RGB / 255, RGB),
    "tensor": (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
    "float tensor": (torch.from_numpy(GREY[..., :1]).permute(2, 0, 1) / 255, GREY),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_its_pixels(form: str) -> None:
    image, expected = FORMS[form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(to_image(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    Image.fromarray(RGB).save(path, exif=exif, quality=100)
    for pixels in (read_image(path), to_image(path), to_image(Image.open(path))):
        difference = pixels.permute(1, 2, 0).numpy().astype(int) - np.rot90(RGB, -1)
        assert abs(difference).mean() < 3
    assert type(read_image(path)) is tv_tensors.Image


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rgb.png").write_bytes(PNG_16)
    for name, dtype in (("grey.png", np.uint16), ("int.tif", np.int32), ("float.tif", np.float32)):
        Image.fromarray(GREY[..., 0].astype(dtype)).save(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{path.name}: .*more than 8 bits.*save it with 8"):
            read_image(path)
        with pytest.raises(UserError, match="more than 8 bits"):
            to_image(Image.open(path))


NO_IMAGES = [
    (np.zeros((4, 5, 2), np.uint8), "shape"),
    (np.zeros((0, 5, 3), np.uint8), "shape"),
    (torch.zeros(1, 3, 4, 5), "shape"),
    (np.zeros((4, 5, 3), np.uint16), "uint8"),
    (np.full((4, 5, 3), 255.0), "0 … 1"),
    (np.full((4, 5, 3), np.nan), "0 … 1"),
    (None, "NoneType"),
    ("nowhere.jpg", r"nowhere\.jpg: .*No such file"),
]


@pytest.mark.parametrize(("image", "words"), NO_IMAGES)
def test_what_is_no_image_is_refused(image: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        to_image(image)


DAMAGED = [  # the fifth is a download that was interrupted
    ("jpg", lambda whole, half: b"", "the file is empty"),
    ("jpg", lambda whole, half: b"<html>Not found</html>", "not a known image format"),
    ("jpg", lambda whole, half: whole[:half], "truncated"),
    ("png", lambda whole, half: whole[:half], "truncated"),
    ("jpg", lambda whole, half: whole[:half] + bytes(half), "truncated"),
    # torchvision's decoder ends the process on this one.
    ("png", lambda whole, half: whole[:half] + b"\x01" + whole[half + 1 :], ""),
]


@pytest.mark.parametrize(("suffix", "damage", "words"), DAMAGED)
def test_damaged_files(
    tmp_path: Path, suffix: str, damage: Callable[[bytes, int], bytes], words: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes() + bytes(600))
    read_image(path)  # zeros after the end do no harm
    path.write_bytes(damage(path.read_bytes(), path.stat().st_size // 2))
    with pytest.raises(UserError, match=rf"x\.{suffix}: cannot be read as an image \(.*{words}"):
        read_image(path)


def test_readable_suffixes_are_those_that_pillow_reads() -> None:
    usual = "jpg jpeg jfif png webp bmp gif tif tiff jp2 tga pgm ppm mpo ico"
    assert readable_suffixes() >= {f".{suffix}" for suffix in usual.split()}
    others = "pdf mp4 mpg txt json h5 eps ps wmf grib"
    assert not readable_suffixes() & {f".{suffix}" for suffix in others.split()}

"""support/pictures.py: any image becomes RGB bytes, and what is not an image is named."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from support.errors import UserError
from support.pictures import read_header, read_image, readable_suffixes, to_image

W, H = 64, 48
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
ORIENTATION = 0x0112


def gradient(channels: int = 3) -> np.ndarray:
    """(H, W, channels) uint8, a different ramp in every channel and nothing symmetric."""
    y, x = np.mgrid[:H, :W]
    ramps = [x * 3, y * 4, x + 2 * y, 255 - x]
    return np.stack(ramps, axis=-1)[..., :channels].astype(np.uint8)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits per channel, which Pillow writes for grey only; pixels (H, W, 3) uint16."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


def hwc(image: Tensor) -> np.ndarray:
    assert type(image) is tv_tensors.Image
    assert str(image.dtype) == "torch.uint8" and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def test_images_become_rgb(tmp_path: Path) -> None:
    rgb, grey = gradient(), gradient()[..., :1].repeat(3, axis=2)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.webp", lossless=True)
    Image.fromarray(gradient(4)).save(tmp_path / "rgba.png")
    write_png16(tmp_path / "rgb16.png", rgb.astype(np.uint16) * 257)
    Image.fromarray(grey[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(grey[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for name in ("rgb.png", "rgb.webp", "rgba.png", "rgb16.png"):
        assert np.array_equal(hwc(read_image(tmp_path / name)), rgb), name
    for name in ("grey.png", "grey16.png"):
        assert np.array_equal(hwc(read_image(tmp_path / name)), grey), name

    palette = COLOURS[(np.arange(H * W) % 3).reshape(H, W)].astype(np.uint8)
    Image.fromarray(palette).quantize(3).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert np.array_equal(hwc(read_image(tmp_path / "palette.png")), palette)


# --- more than 8 bits ---

RAMP = gradient()[..., 0].astype(int)  # (H, W), 0–189

DEEP = {  # values in the file, and bits that a warning names
    "12 bits in 16": ((RAMP * 16).astype(np.uint16), 12),
    "8 bits in 16": (RAMP.astype(np.uint16), 8),
    "8 bits in 32": (RAMP.astype(np.int32), 8),
    "12 bits in 32": ((RAMP * 16).astype(np.int32), 12),
    "16 bits in 32": ((RAMP * 257).astype(np.int32), None),
    "float 0-1": ((RAMP / 255).astype(np.float32), None),
    "float 0-255": (RAMP.astype(np.float32), 8),
    "float 0-65535": ((RAMP * 257).astype(np.float32), None),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_tiffs_are_not_black(tmp_path: Path, name: str) -> None:
    values, bits = DEEP[name]
    Image.fromarray(values).save(tmp_path / "x.tif")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = hwc(read_image(tmp_path / "x.tif"))
        again = to_image(Image.open(tmp_path / "x.tif")).permute(1, 2, 0).numpy()
    assert np.abs(image.astype(int) - RAMP[..., None]).max() <= 1  # 16/257 of 4095 is not exact
    assert np.array_equal(image, again)
    expected = [] if bits is None else [f"read as images of {bits} bits"] * 2
    assert len(caught) == len(expected)
    assert all(words in str(w.message) for w, words in zip(caught, expected, strict=True))


def test_a_tiff_that_says_how_many_bits_it_has(tmp_path: Path) -> None:
    """Dark 12-bit values that are packed into one and a half bytes."""
    values = RAMP // 2  # of 4095
    high, low = values[:, ::2], values[:, 1::2]
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1).astype(np.uint8)
    tags = {256: W, 257: H, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: H, 279: packed.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    header = b"II*\0" + struct.pack("<I", 8 + packed.size)
    (tmp_path / "x.tif").write_bytes(header + packed.tobytes() + directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = hwc(read_image(tmp_path / "x.tif"))
    assert np.abs(image[..., 0] - values * 255 / 4095).max() <= 0.5


def test_a_negative_tiff_is_inverted(tmp_path: Path) -> None:
    photometric_interpretation, white_is_zero = 262, 0
    negative = Image.fromarray(((255 - RAMP) * 257).astype(np.uint16))
    negative.save(tmp_path / "x.tif", tiffinfo={photometric_interpretation: white_is_zero})
    assert np.array_equal(hwc(read_image(tmp_path / "x.tif"))[..., 0], RAMP)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((RAMP - 100).astype(np.int16), "from -100 to 89"),
        ((RAMP * 1000).astype(np.int32), "from 0 to 189000"),
        ((RAMP * 1000.0).astype(np.float32), "from 0 to 189000"),
        (np.where(RAMP == 0, np.nan, RAMP).astype(np.float32), "from nan to nan"),
        (np.where(RAMP == 0, np.inf, RAMP).astype(np.float32), "to inf"),
    ],
)
def test_ranges_that_are_not_known_are_refused(
    tmp_path: Path, values: np.ndarray, words: str
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif: cannot be read .*{words}, .*8 or 16 bits"):
        read_image(tmp_path / "x.tif")
    with pytest.raises(UserError, match=words):
        to_image(Image.open(tmp_path / "x.tif"))


def test_12_bit_colours_in_16_give_a_warning(tmp_path: Path) -> None:
    rgb = gradient().astype(np.uint16)
    write_png16(tmp_path / "12.png", rgb * 16)
    with pytest.warns(UserWarning, match="below 4096 become nearly black"):
        read_image(tmp_path / "12.png")
    write_png16(tmp_path / "16.png", rgb * 257)
    Image.new("RGB", (W, H), (3, 3, 3)).save(tmp_path / "dark.png")
    Image.new("I;16", (W, H)).save(tmp_path / "black.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("16.png", "dark.png", "black.png"):
            read_image(tmp_path / name)


# --- orientation and headers ---


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be shown turned clockwise by a quarter
    Image.fromarray(gradient()).save(tmp_path / name, exif=exif, quality=100)
    difference = hwc(read_image(tmp_path / name)).astype(int) - np.rot90(gradient(), -1)
    assert abs(difference).mean() < 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_headers_tell_the_size_that_decoding_gives(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(gradient()).save(path, exif=exif)
    header = read_header(path)
    if suffix == "tif" and orientation != 1:
        assert header is None  # only decoding can tell
    else:
        assert header == (tuple(read_image(path).shape[1:]), Image.open(path).mode)


def test_headers_of_files_that_are_not_images(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xd8", b"<html>", bytes(1000)):
        (tmp_path / "x.jpg").write_bytes(content)
        assert read_header(tmp_path / "x.jpg") is None
    assert read_header(tmp_path / "nowhere.jpg") is None and read_header(tmp_path) is None


def test_headers_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    for suffix in ("jpg", "png", "webp", "tif"):
        Image.fromarray(gradient()).save(tmp_path / f"x.{suffix}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for suffix in ("jpg", "png", "webp", "tif"):
        assert read_header(tmp_path / f"x.{suffix}") == ((H, W), "RGB")


# --- damaged files ---


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    return cut(content) + bytes(len(content) - len(content) // 2)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BROKEN = [
    ("jpg", cut, "truncated"),
    ("jpg", zeroed, "truncated"),  # as an interrupted download leaves it
    ("png", cut, "truncated"),
    ("png", zeroed, ""),
    ("png", flipped, ""),  # torchvision's decoder ends the process on this one
    ("webp", cut, ""),
    ("jpg", lambda content: b"", "the file is empty"),
    ("jpg", lambda content: b"<html>Not found</html>", "not a known image format"),
]


@pytest.mark.parametrize(("suffix", "damage", "words"), BROKEN)
def test_broken_images(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)).save(path)
    read_image(path)
    path.write_bytes(path.read_bytes() + b"\0\0padding")
    read_image(path)  # a few bytes after the end do no harm
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as an image (")
    assert words in str(caught.value)


def test_missing_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be read as an image \(No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="Is a directory"):
        read_image(tmp_path)


# --- formats ---


def test_readable_suffixes_are_those_that_pillow_reads() -> None:
    suffixes = readable_suffixes()
    usual = "jpg jpeg jfif png webp bmp gif tif tiff jp2 tga pgm ppm mpo ico"
    others = "pdf mp4 mpg txt json h5 eps ps wmf grib"
    assert suffixes >= {f".{suffix}" for suffix in usual.split()}
    assert not suffixes & {f".{suffix}" for suffix in others.split()}
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in suffixes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow will drop
def test_images_of_every_suffix_that_pillow_also_writes(tmp_path: Path) -> None:
    tried = 0
    for suffix in sorted(readable_suffixes()):
        name = Image.registered_extensions()[suffix]
        for mode in ("RGB", "L", "1", "P"):  # some formats have only a few modes
            content = io.BytesIO()
            try:
                Image.new(mode, (32, 32), 1).save(content, name)
            except (KeyError, OSError, ValueError):
                continue
            (tmp_path / f"x{suffix}").write_bytes(content.getvalue())
            assert len(read_image(tmp_path / f"x{suffix}")) == 3, suffix
            tried += 1
            break
    assert tried > 30


def test_an_array_that_cannot_be_written_to_is_read_without_a_warning() -> None:
    array = np.asarray(Image.new("RGB", (8, 6), (1, 2, 3)))
    assert not array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = to_image(array)
    assert pixels.shape == (3, 6, 8) and pixels[:, 0, 0].tolist() == [1, 2, 3]

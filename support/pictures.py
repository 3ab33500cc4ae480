"""Any image (a path, a PIL image, a NumPy array, a tensor) as a (3, H, W) uint8 RGB tensor."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors

from support.errors import UserError

AnyPath = str | os.PathLike[str]
AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

# Pillow warns of images above 89 megapixels, which are photographs, and refuses those above 179.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow knows the suffixes of these formats, but needs another program to read them, if it can.
NOT_READ_BY_PILLOW = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# TIFF tags (TIFF 6.0, section 8).
BITS_PER_SAMPLE = 258
PHOTOMETRIC_INTERPRETATION = 262
WHITE_IS_ZERO = 0


def readable_suffixes() -> frozenset[str]:
    """The file suffixes that Pillow reads here, plugins included: {".jpg", ".jfif", ".avif", …}.

    They are in lower case and begin with a dot.
    """
    suffixes = Image.registered_extensions()  # also loads the plugins, which fill Image.OPEN
    readable = Image.OPEN.keys() - NOT_READ_BY_PILLOW
    return frozenset({s for s, name in suffixes.items() if name in readable} | {".mpo"})


def read_image(path: AnyPath) -> tv_tensors.Image:
    """Decodes an image file: (3, H, W) uint8 RGB, turned as its EXIF orientation says.

    An animation or a file of several pages gives its first image. Pillow does the decoding, because
    torchvision.io's decoders end the whole process on a damaged PNG.

    Raises:
        UserError: the file is not a complete image, or the range of its values is not known.
    """
    try:
        content = Path(path).read_bytes()
        _refuse_jpeg_that_ends_in_zeros(content)
        with Image.open(io.BytesIO(content)) as image:
            has_16_bit_channels = ";16" in str(image.tile)  # empty once the image is loaded
            ImageOps.exif_transpose(image, in_place=True)
            pixels = pil_to_tensor(image)
            if has_16_bit_channels and not image.mode.startswith("I"):
                _warn_of_12_bit_colours(pixels)
            return pixels
    # On damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known image format" if content else "the file is empty"
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); replace it or leave it out"
        ) from None


def _refuse_jpeg_that_ends_in_zeros(content: bytes) -> None:
    """An interrupted download may end in zeros, which the decoder would take for grey pixels."""
    is_jpeg = content.startswith(b"\xff\xd8")
    body = content.rstrip(b"\0")
    if is_jpeg and len(content) - len(body) > 512 and not body.endswith(b"\xff\xd9"):
        raise OSError("JPEG file is truncated: it ends in zeros")


def read_header(path: AnyPath) -> tuple[tuple[int, int], str] | None:
    """What the beginning of an image file says, without decoding it: about 0.1 ms per file.

    Returns:
        The (height, width) that `read_image` should give, and the mode in PIL's words ("RGB",
        "L", "I;16", …). None if only decoding can tell, as with a damaged file.
    """
    try:
        with Image.open(path) as image:
            # The method of the base class: a PNG's own one decodes the file to look for EXIF data.
            exif = Image.Image.getexif(image)
            orientation = exif.get(ExifTags.Base.Orientation, 1)
            width, height = image.size
            # Some versions of Pillow have already swapped the sides of a TIFF, others have not.
            if image.format == "TIFF" and orientation != 1:
                return None
            is_turned = orientation in (5, 6, 7, 8)
            return ((width, height) if is_turned else (height, width)), image.mode
    except Exception:  # see `read_image`
        return None


def pil_to_tensor(image: Image.Image) -> tv_tensors.Image:
    """A PIL image of any mode as (3, H, W) uint8 RGB.

    Raises:
        UserError: the image has more than 8 bits, and the range of its values is not known.
    """
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_deep_grey_to_8_bits(image))
    # The tensor is not made contiguous: torchvision resizes uint8 images twice as fast if the
    # channels are last in memory.
    return tv_tensors.Image(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def _deep_grey_to_8_bits(image: Image.Image) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floats, scaled to (H, W) uint8.

    Cameras and microscopes write 12 bits into files of 16, and TIFFs of 32 bits or of floats hold
    any range. If the file does not say which, the largest value decides, one image at a time: 0–1
    (floats only), 8, 12 or 16 bits.
    """
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:  # also if one of them is NaN
        raise UserError(
            f"its values run from {low:.6g} to {high:.6g}, a range that is not known; save it with "
            "values of 8 or 16 bits"
        )

    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(BITS_PER_SAMPLE) == (12,):
        scaled = values * (255 / 4095)
    elif high <= 1 and values.dtype.kind == "f":
        scaled = values * 255.0
    elif high <= 255:
        scaled = values
        _warn_of_guess(high, bits=8)
    elif high <= 4095:
        scaled = values * (255 / 4095)
        _warn_of_guess(high, bits=12)
    else:
        scaled = values.astype(np.int32) >> 8

    grey = scaled.round().astype(np.uint8)
    is_negative = tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    return 255 - grey if is_negative else grey


def _warn_of_guess(high: float, bits: int) -> None:
    if high > 0:  # a black image is black in any range
        # The text names no file, so that Python shows it once rather than once per image.
        warnings.warn(
            f"grey images of more than 8 bits whose values end below {2**bits} are read as images "
            f"of {bits} bits; if they have another range, save them with 8 bits",
            stacklevel=4,
        )


def _warn_of_12_bit_colours(pixels: Tensor) -> None:
    """Pillow keeps the upper 8 bits of 16-bit colours, of which 12-bit values leave 0–15."""
    if 0 < pixels.max() < 16:
        warnings.warn(
            "colour images of 16 bits per channel whose values end below 4096 become nearly black; "
            "if they hold 12-bit values, save them with 8 bits",
            stacklevel=3,
        )


def to_image(image: AnyImage) -> Tensor:
    """Any image as (3, H, W) uint8 RGB.

    Args:
        image: a path; a PIL image; a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a
            tensor (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are grey, RGB (not
            OpenCV's BGR) or RGBA, whose alpha is ignored. Their values are uint8 0–255, uint16
            0–65535, or float 0–1, which is rounded to 255 levels.

    Raises:
        UserError: the file cannot be read, or the array is not an image.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image).as_subclass(Tensor)
    if isinstance(image, Image.Image):
        return pil_to_tensor(ImageOps.exif_transpose(image)).as_subclass(Tensor)
    if isinstance(image, np.ndarray):
        pixels = np.ascontiguousarray(image)
        # torch warns of arrays that cannot be written to, such as np.asarray of a PIL image.
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels
    elif isinstance(image, Tensor):
        pixels = image.as_subclass(Tensor)
    else:
        raise UserError(
            "an image is a path, a PIL image, a NumPy array or a tensor, not a "
            f"{type(image).__name__}"
        )

    given = f"{tuple(image.shape)} of {image.dtype}"
    if pixels.dim() == 2:
        pixels = pixels[None]
    if pixels.dim() != 3 or len(pixels) not in (1, 3, 4) or 0 in pixels.shape:
        raise UserError(
            f"an image of shape {given}: arrays are (H, W, 3), tensors (3, H, W); 1 or 4 channels "
            "are fine too"
        )

    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise UserError(
                f"an image {given} with values outside of 0 … 1: give floats from 0 to 1, or uint8"
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    elif pixels.dtype == torch.uint16:
        pixels = (pixels.int() >> 8).to(torch.uint8)
    elif pixels.dtype != torch.uint8:
        raise UserError(f"an image {given}: give uint8, uint16, or floats from 0 to 1")
    return pixels[:3].expand(3, -1, -1)

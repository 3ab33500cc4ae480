"""Any picture (path, PIL image, NumPy array, tensor) as a (3, H, W) uint8 tensor."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors

from support.errors import UserError

AnyPath = str | os.PathLike[str]
AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

warnings.filterwarnings(
    "ignore", category=Image.DecompressionBombWarning
)  # 108 MP are a photograph, 179 an error


def read_image(path: AnyPath) -> tv_tensors.Image:
    """Decodes a picture: (3, H, W) uint8 RGB, turned as its EXIF orientation says; the first frame of an animation.

    By Pillow: torchvision.io's decoders end the process on a damaged PNG. UserError where the file is no whole picture.
    """
    try:
        content = Path(path).read_bytes()
        body = content.rstrip(
            b"\0"
        )  # an interrupted download may end in zeros, which decoders take for pixels
        if (
            content[:2] == b"\xff\xd8"
            and len(content) - len(body) > 512
            and body[-2:] != b"\xff\xd9"
        ):
            raise OSError("JPEG file is truncated: it ends in zeros")
        with Image.open(io.BytesIO(content)) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            return picture_to_tensor(picture)
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known picture format" if content else "the file is empty"
        raise UserError(
            f"{path}: cannot be read as a picture ({reason}); replace it or leave it out"
        ) from None


def picture_to_tensor(picture: Image.Image) -> tv_tensors.Image:
    """A PIL image of any mode, (3, H, W) uint8 RGB."""
    if picture.mode.startswith("I"):  # 16-bit grey: convert() alone may clip it at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    # Not made contiguous: torchvision resizes uint8 twice as fast while the channels lie last in memory.
    return tv_tensors.Image(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))


def to_image(image: AnyImage) -> Tensor:
    """Any picture as (3, H, W) uint8 RGB.

    Args:
        image: a path; a PIL image; a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor (H, W),
            (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are grey, RGB (not OpenCV's BGR) or RGBA, whose
            alpha is ignored; uint8 0–255, uint16 0–65535, or float 0–1, which is rounded to 255 levels.

    Raises:
        UserError: the file cannot be read, or the array is no picture.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image).as_subclass(Tensor)
    if isinstance(image, Image.Image):
        return picture_to_tensor(ImageOps.exif_transpose(image)).as_subclass(Tensor)
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(
            f"a picture is a path, a PIL image, a NumPy array or a tensor, not {type(image).__name__}"
        )
    form = f"{tuple(image.shape)} of {image.dtype}"
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels  # (channels, H, W)
    else:
        pixels = image.as_subclass(Tensor)
    pixels = pixels[None] if pixels.dim() == 2 else pixels
    if pixels.dim() != 3 or len(pixels) not in (1, 3, 4) or 0 in pixels.shape:
        raise UserError(
            f"a picture of shape {form}: arrays are (H, W, 3), tensors (3, H, W); or 1 or 4 channels"
        )
    pixels = (pixels.int() >> 8).to(torch.uint8) if pixels.dtype == torch.uint16 else pixels
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise UserError(
                f"a picture {form} with values outside of 0 … 1: give floats from 0 to 1, or uint8"
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    elif pixels.dtype != torch.uint8:
        raise UserError(f"a picture {form}: give uint8, uint16, or floats from 0 to 1")
    return pixels[:3].expand(3, -1, -1)

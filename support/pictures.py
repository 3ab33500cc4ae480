"""Any image (a path, a PIL image, a NumPy array, a tensor) as a (3, H, W) uint8 RGB tensor.

What has more than 8 bits per channel is refused. Cameras and microscopes write 12 bits into files
of 16, and TIFFs of floats hold any range; a wrong guess gives a black image and no detections.
"""

import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors

from support.errors import UserError

AnyPath = str | os.PathLike[str]
AnyImage = AnyPath | Image.Image | np.ndarray | Tensor

# Pillow warns of images above 89 megapixels, which are photographs, and refuses those above 179.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow knows the suffixes of these formats, but needs another program to read them, if it can.
NOT_READ_BY_PILLOW = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


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
        UserError: the file is not a complete image of 8 bits per channel.
    """
    try:
        content = Path(path).read_bytes()
        # An interrupted download may end in zeros, which the decoder would take for grey pixels.
        body = content.rstrip(b"\0")
        is_padded = content.startswith(b"\xff\xd8") and len(content) - len(body) > 512
        if is_padded and not body.endswith(b"\xff\xd9"):
            raise OSError("JPEG file is truncated: it ends in zeros")
        with Image.open(io.BytesIO(content)) as image:
            return pil_to_tensor(image)
    # On damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known image format" if content else "the file is empty"
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); replace it or leave it out"
        ) from None


def pil_to_tensor(image: Image.Image) -> tv_tensors.Image:
    """A PIL image as (3, H, W) uint8 RGB, turned as its EXIF orientation says.

    Raises:
        UserError: it has more than 8 bits per channel.
    """
    # Of 16-bit colours Pillow keeps the upper 8 bits. Then only the decoder's arguments, which are
    # there until the pixels are loaded, tell of the others.
    is_deep_colour = re.search(";16[BLN]", str(getattr(image, "tile", "")))  # ";16" are 5, 6 and 5
    if image.mode.startswith(("I", "F")) or is_deep_colour:
        raise UserError(
            "more than 8 bits per channel, and the range of its values is not known; save it with "
            "8 bits, as bright as it should look"
        )
    image = ImageOps.exif_transpose(image).convert("RGB")
    # The tensor is not made contiguous: torchvision resizes uint8 images twice as fast if the
    # channels are last in memory.
    return tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def to_image(image: AnyImage) -> Tensor:
    """Any image as (3, H, W) uint8 RGB.

    Args:
        image: a path; a PIL image; a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a
            tensor (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are grey, RGB (not
            OpenCV's BGR) or RGBA, whose alpha is ignored. Their values are uint8 0–255, or float
            0–1, which is rounded to 255 levels.

    Raises:
        UserError: the file cannot be read, or the array is not an image.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image).as_subclass(Tensor)
    if isinstance(image, Image.Image):
        return pil_to_tensor(image).as_subclass(Tensor)
    if isinstance(image, np.ndarray):
        # A copy: torch takes neither reversed strides nor, silently, arrays that are read-only.
        pixels = torch.from_numpy(image.copy())
        pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels
    elif isinstance(image, Tensor):
        pixels = image.as_subclass(Tensor)
    else:
        raise UserError(
            "an image is a path, a PIL image, a NumPy array or a tensor, not a "
            f"{type(image).__name__}"
        )

    given = f"an image of shape {tuple(image.shape)} and {image.dtype}"
    pixels = pixels[None] if pixels.dim() == 2 else pixels
    if pixels.dim() != 3 or len(pixels) not in (1, 3, 4) or 0 in pixels.shape:
        raise UserError(
            f"{given}: arrays are (H, W, 3), tensors (3, H, W); 1 or 4 channels are fine too"
        )
    if pixels.is_floating_point() and bool(((pixels >= 0) & (pixels <= 1)).all()):
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise UserError(f"{given}: give uint8 values 0 … 255, or floats 0 … 1")
    return pixels[:3].expand(3, -1, -1)

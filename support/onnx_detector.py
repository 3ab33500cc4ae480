"""An exported ONNX file in the language of `SparseRCNN`."""

import json
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from support.errors import UserError, first_line

METADATA = ("class_names", "category_ids", "test_size", "max_size")
INPUT, OUTPUTS = "image", ("boxes", "scores", "labels")


def needed(name: str) -> ModuleType:
    """A package that only ONNX files need, imported where it is used: everything else runs without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX files need the package {name} ({first_line(error)}): pip install onnx onnxscript onnxruntime"
        ) from None


class OnnxDetector:
    """An exported file, in the language of `SparseRCNN` in eval mode.

    Args:
        path: a file that `python -m tools.export` wrote.
        device: on "cuda" it runs where onnxruntime has CUDA, and else, with a warning, on the CPU; so on other devices.

    Attributes:
        class_names: K names, in the order of the labels. category_ids: K ids of the training annotations.
        test_size, max_size: pixels, what the shortest and longest side of an image are best resized to beforehand.

    Raises:
        UserError: onnxruntime is not installed, or the file is missing, damaged, or not of `python -m tools.export`.
    """

    class_names: list[str]
    category_ids: list[int]
    test_size: int
    max_size: int

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        onnxruntime = needed("onnxruntime")
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = (
            4  # its errors are raised too, and printed here they would be said twice
        )
        providers: list[Any] = ["CPUExecutionProvider"]
        if (device := torch.device(device)).type == "cuda":
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
            else:
                warnings.warn(
                    "onnxruntime has no CUDA here: the model runs on the CPU (see onnxruntime-gpu)",
                    stacklevel=2,
                )
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the errors of onnxruntime have no base class of their own
            raise UserError(
                f"{path}: onnxruntime cannot load this ({first_line(error)}); if the file is damaged, write it anew "
                "with `python -m tools.export CHECKPOINT FILE.onnx`"
            ) from None
        metadata = self._session.get_modelmeta().custom_metadata_map
        names = [
            value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())
        ]
        try:
            for name in METADATA:
                setattr(self, name, json.loads(metadata[name]))
            if names != [INPUT, *OUTPUTS]:
                raise ValueError
        except (KeyError, ValueError):
            raise UserError(
                f"{path}: an ONNX file, but not one that `python -m tools.export CHECKPOINT FILE.onnx` wrote: it "
                f"should hold {', '.join(METADATA)} as metadata, and lead from {INPUT} to {', '.join(OUTPUTS)}"
            ) from None

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Images to detections, one image at a time.

        Args:
            images: B tensors (3, H, W) uint8 RGB, each its own size, on any device.

        Returns:
            For each image a dict of `boxes` (n, 4) float32 xyxy pixels of that image, `scores` (n,) float32 falling,
            `labels` (n,) int64, all on the CPU.

        Raises:
            ValueError: an image of another shape or dtype.
        """
        results = []
        for i, image in enumerate(images):
            if (
                image.dim() != 3
                or len(image) != 3
                or 0 in image.shape
                or image.dtype != torch.uint8
            ):
                raise ValueError(
                    f"OnnxDetector: image {i} has shape {tuple(image.shape)} and dtype {image.dtype}; "
                    "RGB images (3, H, W) of torch.uint8 are needed"
                )
            arrays = self._session.run(list(OUTPUTS), {INPUT: image.cpu().contiguous().numpy()})
            results.append(
                {name: torch.from_numpy(array) for name, array in zip(OUTPUTS, arrays, strict=True)}
            )
        return results

"""An exported ONNX file that behaves like `SparseRCNN` in eval mode.

In:  images (3, H, W) uint8 RGB, each of its own size, as a list.
Out: for each image a dict of `boxes` (n, 4) xyxy pixels, `scores` (n,) and `labels` (n,).

`python -m tools.export` writes such files. onnxruntime runs them without PyTorch; here the tensors
are PyTorch's only so that `predict.py` can put the file in the place of a checkpoint. Beside the
model a file holds, as metadata in JSON, what cannot be read off its graph (`METADATA`).

The package onnxruntime is imported only when a file is opened, so nothing else needs it.

Shapes: n detections of an image, K classes.
"""

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

# Names in the file.
METADATA = ("class_names", "category_ids", "test_size", "max_size")
INPUT = "image"
OUTPUTS = ("boxes", "scores", "labels")


def needed(name: str) -> ModuleType:
    """Imports a package that only ONNX files need.

    Raises:
        UserError: it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX files need the package {name} ({first_line(error)}): pip install onnx "
            "onnxscript onnxruntime"
        ) from None


class OnnxDetector:
    """An exported file, called like `SparseRCNN` in eval mode.

    Args:
        path: a file that `python -m tools.export` wrote.
        device: "cuda" runs it on the GPU if onnxruntime can, else on the CPU with a warning. All
            other devices mean the CPU.

    Attributes:
        class_names: K names, in the order of the labels.
        category_ids: K ids of the training annotations, in the same order.
        test_size: pixels that the shortest side of an image should be resized to beforehand.
        max_size: pixels, the limit of its longest side.

    Raises:
        UserError: onnxruntime is not installed, or the file is missing, damaged, or not from
            `python -m tools.export`.
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
        options.log_severity_level = 4  # its errors are raised anyway; do not print them as well
        providers = _providers(onnxruntime, torch.device(device))
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the errors of onnxruntime have no base class of their own
            raise UserError(
                f"{path}: onnxruntime cannot load this ({first_line(error)}); if the file is "
                "damaged, write it again with `python -m tools.export CHECKPOINT FILE.onnx`"
            ) from None

        try:
            self._read_metadata()
        except (KeyError, ValueError):
            raise UserError(
                f"{path}: an ONNX file, but not one that `python -m tools.export CHECKPOINT "
                f"FILE.onnx` wrote: it should hold {', '.join(METADATA)} as metadata, and lead "
                f"from {INPUT} to {', '.join(OUTPUTS)}"
            ) from None

    def _read_metadata(self) -> None:
        """Sets the attributes.

        Raises:
            KeyError, ValueError: the file is not what `tools.export` writes.
        """
        metadata = self._session.get_modelmeta().custom_metadata_map
        for name in METADATA:
            setattr(self, name, json.loads(metadata[name]))

        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        names = self.class_names
        sizes = (self.test_size, self.max_size)
        is_ours = (
            [end.name for end in ends] == [INPUT, *OUTPUTS]
            and isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and all(isinstance(size, int) and size > 0 for size in sizes)
        )
        if not is_ours:
            raise ValueError

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detects objects, one image at a time.

        Args:
            images: tensors (3, H, W) uint8 RGB, each of its own size, on any device.

        Returns:
            For each image a dict of `boxes` (n, 4) float32 xyxy pixels of that image, `scores`
            (n,) float32 in descending order and `labels` (n,) int64, all on the CPU.

        Raises:
            ValueError: an image has another shape or dtype.
        """
        for i, image in enumerate(images):
            is_rgb = image.dim() == 3 and len(image) == 3 and 0 not in image.shape
            if not is_rgb or image.dtype != torch.uint8:
                raise ValueError(
                    f"OnnxDetector: image {i} has shape {tuple(image.shape)} and dtype "
                    f"{image.dtype}; RGB images (3, H, W) of torch.uint8 are needed"
                )

        results = []
        for image in images:
            pixels = image.cpu().contiguous().numpy()
            arrays = self._session.run(list(OUTPUTS), {INPUT: pixels})
            tensors = [torch.from_numpy(array) for array in arrays]
            results.append(dict(zip(OUTPUTS, tensors, strict=True)))
        return results


def _providers(onnxruntime: ModuleType, device: torch.device) -> list[Any]:
    """What onnxruntime should run on, in the order of preference."""
    cpu = "CPUExecutionProvider"
    if device.type != "cuda":
        return [cpu]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        warnings.warn(
            "onnxruntime has no CUDA here: the model runs on the CPU (see onnxruntime-gpu)",
            stacklevel=3,
        )
        return [cpu]
    return [("CUDAExecutionProvider", {"device_id": device.index or 0}), cpu]

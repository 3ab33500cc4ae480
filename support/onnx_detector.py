"""An exported ONNX file that behaves like `SparseRCNN` in eval mode.

In:  images (3, H, W) uint8 RGB, each of its own size, as a list.
Out: for each image a dict of `boxes` (n, 4) xyxy pixels, `scores` (n,) and `labels` (n,).

`python -m tools.export` writes such files. onnxruntime runs them without PyTorch; here the tensors
are PyTorch's only so that `predict.py` can put the file in the place of a checkpoint. Beside the
model a file holds, as metadata in JSON, what cannot be read off its graph (`METADATA`).

Shapes: n detections of an image, K classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from support.errors import UserError, first_line

# Names in the file.
METADATA = ("class_names", "category_ids", "test_size", "max_size")
INPUT = "image"
OUTPUTS = ("boxes", "scores", "labels")


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
        try:
            import onnxruntime  # only here, so that nothing but ONNX files needs it
        except ImportError as error:
            raise UserError(f"{path}: {first_line(error)}; pip install onnxruntime") from None
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")

        device = torch.device(device)
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # its errors are raised anyway; do not print them as well
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            metadata = self._session.get_modelmeta().custom_metadata_map
            for name in METADATA:
                setattr(self, name, json.loads(metadata[name]))
        except Exception as error:  # the errors of onnxruntime have no base class of their own
            raise UserError(
                f"{path}: damaged, or not a file of ours ({first_line(error)}); write it with "
                "`python -m tools.export CHECKPOINT FILE.onnx`"
            ) from None

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detects objects, one image at a time.

        Args:
            images: tensors (3, H, W) uint8 RGB, each of its own size, on any device.

        Returns:
            For each image a dict of `boxes` (n, 4) float32 xyxy pixels of that image, `scores`
            (n,) float32 in descending order and `labels` (n,) int64, all on the CPU.
        """
        results = []
        for image in images:
            pixels = image.cpu().contiguous().numpy()
            arrays = self._session.run(list(OUTPUTS), {INPUT: pixels})
            tensors = [torch.from_numpy(array) for array in arrays]
            results.append(dict(zip(OUTPUTS, tensors, strict=True)))
        return results

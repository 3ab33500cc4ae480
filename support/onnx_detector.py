"""An exported ONNX file that behaves like `SparseRCNN` in eval mode.

In:  images (3, H, W) uint8 RGB, each of its own size, as a list.
Out: for each image a dict of `boxes` (n, 4) xyxy pixels, `scores` (n,) and `labels` (n,).

`python -m tools.export` writes such files. On a CPU, OpenVINO runs them where it is installed, and
otherwise onnxruntime, which also knows GPUs. Neither needs PyTorch; here the tensors are PyTorch's
only so that `predict.py` can put the file in the place of a checkpoint. Beside the model a file
holds, as metadata in JSON, what cannot be read off its graph (`METADATA`).

Shapes: n detections of an image, K classes.
"""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
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
        amp: "off" computes in the file's own float32, and "bf16" in bfloat16, which only OpenVINO
            can, on processors that have it.

    Attributes:
        class_names: K names, in the order of the labels.
        category_ids: K ids of the training annotations, in the same order.
        test_size: pixels that the shortest side of an image should be resized to beforehand.
        max_size: pixels, the limit of its longest side.

    Raises:
        UserError: neither of the two is installed, or it cannot compute as `amp` says, or the file
            is missing, damaged, or not from `python -m tools.export`.
    """

    class_names: list[str]
    category_ids: list[int]
    test_size: int
    max_size: int

    def __init__(
        self, path: str | Path, device: torch.device | str = "cpu", amp: str = "off"
    ) -> None:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        device = torch.device(device)
        with_openvino = device.type != "cuda" and find_spec("openvino") is not None
        if amp != "off" and not (amp == "bf16" and with_openvino):
            raise UserError(
                f"--amp {amp}: {path} has its own precision; only in OpenVINO (pip install "
                "openvino), on a CPU, can it be bf16 instead"
            )
        try:
            if with_openvino:
                self._detect, metadata = load_openvino(path, amp)
            else:
                self._detect, metadata = load_onnxruntime(path, device)
            for name in METADATA:
                setattr(self, name, json.loads(metadata[name]))
        except ImportError as error:
            raise UserError(f"{path}: {first_line(error)}; pip install onnxruntime") from None
        except Exception as error:  # the errors of both have no base class of their own
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

        Raises:
            UserError: the file does not take an image of this size.
        """
        results = []
        for image in images:
            try:
                arrays = self._detect(image.cpu().contiguous().numpy())
            except Exception as error:  # as above
                height, width = image.shape[1:]
                raise UserError(
                    f"the ONNX file does not take an image of {height}×{width} pixels, perhaps "
                    f"because it was exported with --static ({first_line(error)})"
                ) from None
            results.append(as_detections(arrays))
        return results


def as_detections(arrays: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """A file's outputs for one image in the form of `SparseRCNN`: what has no area is left out.

    A file of one size keeps it, with a score of 0.
    """
    found = {name: torch.from_numpy(array) for name, array in zip(OUTPUTS, arrays, strict=True)}
    has_area = found["scores"] != 0
    return {name: tensor[has_area] for name, tensor in found.items()}


# --- what runs it ---

# From an image (3, H, W) uint8 to its boxes, scores and labels.
Detect = Callable[[np.ndarray], Sequence[np.ndarray]]


def load_openvino(path: str | Path, amp: str) -> tuple[Detect, dict[str, str]]:
    """The file in OpenVINO, on a CPU the faster of the two, and its metadata."""
    import openvino  # only here, so that nothing but ONNX files needs it

    core = openvino.Core()
    model = core.read_model(path)
    settings = {
        # Without this hint it takes bfloat16 wherever the processor has that, and loses AP.
        "INFERENCE_PRECISION_HINT": "bf16" if amp == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    metadata = {name: model.get_rt_info(["framework", name]).value for name in METADATA}
    compiled = core.compile_model(model, "CPU", settings)
    return lambda image: list(compiled([image]).values()), metadata


def load_onnxruntime(path: str | Path, device: torch.device) -> tuple[Detect, dict[str, str]]:
    """The file in onnxruntime, on a GPU if its package for GPUs is installed, and its metadata."""
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised anyway; do not print them as well
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    metadata = session.get_modelmeta().custom_metadata_map
    return lambda image: session.run(list(OUTPUTS), {INPUT: image}), metadata

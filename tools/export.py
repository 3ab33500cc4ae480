"""A checkpoint to ONNX: `python -m tools.export last.pt model.onnx`.

The file holds everything from pixels to detections: normalisation, padding, all stages, top-N and
clipping. onnxruntime runs it without PyTorch, and `predict.py --weights model.onnx` takes it. It is
kept only if its detections agree with PyTorch's.

In:  `image` (3, H, W) uint8 RGB, of any height and width. Like `SparseRCNN` itself the file does
     not resize.
Out: `boxes` (n, 4) float32 xyxy pixels, clipped to the image; `scores` (n,) float32 in descending
     order; `labels` (n,) int64 from 0. This is what `SparseRCNN` returns in eval mode.

Height and width are free, but there is one image at a time. Detections depend a little on how far
an image is padded; alone, each is padded to the next multiple of 32 and no further.

The metadata of the file holds, as JSON, `class_names`, `category_ids`, and the `test_size` and
`max_size` (pixels) that images should be resized to beforehand.

Shapes: n detections of the file, m of PyTorch, on one image.
"""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from model import SparseRCNN, load_model
from support.cli import parse_args, run_main
from support.errors import UserError
from support.files import make_folder, replacing
from support.onnx_detector import INPUT, METADATA, OUTPUTS, OnnxDetector

# The version of ONNX's operators. torch writes none before it.
OPSET = 18
# How far onnxruntime may be from PyTorch.
BOX_TOLERANCE_PX = 0.05
SCORE_TOLERANCE = 1e-4


# --- writing ---


class _OneImage(nn.Module):
    """`SparseRCNN` with tensors instead of lists and dicts, which ONNX does not have."""

    def __init__(self, model: SparseRCNN):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) uint8 -> boxes (n, 4), scores (n,), labels (n,)."""
        detections = self.model([image])[0]
        return tuple(detections[name] for name in OUTPUTS)


def export_onnx(model: SparseRCNN, path: str | Path, metadata: dict[str, Any]) -> None:
    """Writes the ONNX file without checking it.

    Args:
        model: its detections in eval mode are exported. It is not changed.
        path: of the file, which includes the weights.
        metadata: has the keys in `METADATA`.

    Raises:
        OSError: the file cannot be written.
    """
    free_sides = {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    # The example may have any size, except that the exporter could take it for a rule if two sides
    # of the image or of a feature map were equal, or if one were 1.
    example = torch.zeros(3, 70, 101, dtype=torch.uint8, device=model.proposal_boxes.device)
    # The exporter's warnings and log messages are about its own internals.
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        logging.disable(logging.WARNING)
        program = torch.onnx.export(
            _OneImage(model.for_inference()).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(free_sides,),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            verbose=False,
        )
        logging.disable(logging.NOTSET)
    # The exporter's stack traces would tell paths of the machine that it ran on.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props.update({name: json.dumps(metadata[name]) for name in METADATA})
    program.save(str(path), external_data=False)


# --- checking ---


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether a file's detections (n) are PyTorch's (m), but for rounding.

    float32 sums that are taken in another order differ in their last bits. So detections of nearly
    equal score may change places, and are therefore paired: the cheapest assignment has the fewest
    wrong pairs. One without a partner may only be among the last, where another one may take its
    place, or have hardly any area, so that only one side drops it.
    """
    box_distance_px = (found["boxes"][:, None] - expected["boxes"]).abs().amax(-1)  # (n, m)
    score_distance = (found["scores"][:, None] - expected["scores"]).abs()  # (n, m)
    is_right = (box_distance_px <= BOX_TOLERANCE_PX) & (score_distance <= SCORE_TOLERANCE)
    is_right &= found["labels"][:, None] == expected["labels"]
    rows, columns = linear_sum_assignment(~is_right.numpy())
    is_pair = is_right[rows, columns]

    last = expected["scores"].min() if len(expected["scores"]) else 0.0
    for detections, paired in ((found, rows[is_pair]), (expected, columns[is_pair])):
        sides_px = detections["boxes"][:, 2:] - detections["boxes"][:, :2]
        may_be_alone = (sides_px <= BOX_TOLERANCE_PX).any(1)
        may_be_alone |= detections["scores"] <= last + SCORE_TOLERANCE
        is_alone = ~may_be_alone
        is_alone[paired] = False
        if is_alone.any():
            return False
    return not bool((found["scores"].diff() > 0).any())


def check(detector: OnnxDetector, model: SparseRCNN, size_hw: tuple[int, int]) -> int:
    """Runs an ONNX file and its model, on the CPU, on an image of random pixels.

    Returns:
        How many detections they both have.

    Raises:
        UserError: they disagree.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, *size_hw), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        [expected] = model([image])
    [found] = detector([image])
    if not agree(found, expected):
        raise UserError(
            "not written: onnxruntime and PyTorch disagree on an image of "
            f"{size_hw[0]}×{size_hw[1]} pixels; try other versions of them"
        )
    return len(found["scores"])


# --- command line ---


@dataclass(frozen=True)
class ExportArgs:
    source: tyro.conf.Positional[Path]  # checkpoint of train.py or tools.convert
    output: tyro.conf.Positional[Path]  # file to write, *.onnx


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ExportArgs, "python -m tools.export", __doc__.split("\n\n")[0])
    # Mistakes are found before the minute that an export takes.
    if args.output.suffix != ".onnx" or args.output.is_dir():
        raise UserError(f"{args.output}: give the file to write, which should end in .onnx")
    packages = ("onnx", "onnxscript", "onnxruntime")
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(f"an export needs more packages: pip install {' '.join(missing)}")
    model, checkpoint = load_model(args.source)
    config = checkpoint["config"]
    make_folder(args.output.parent)

    # A wide image, a tall one, and a smaller one of odd sides.
    short, long = config.test_size, round(config.test_size * 4 / 3)
    sizes_hw = [(short, long), (long, short), (short * 5 // 8 - 1, long // 2 - 1)]
    with replacing(args.output) as temporary:
        export_onnx(model, temporary, {**checkpoint, **config.to_dict()})
        detector = OnnxDetector(temporary)
        counts = [check(detector, model, size_hw) for size_hw in sizes_hw]

    megabytes = args.output.stat().st_size / 1e6
    print(f"{args.output}: {megabytes:.1f} MB, opset {OPSET}, {len(detector.class_names)} classes")
    for (height, width), count in zip(sizes_hw, counts, strict=True):
        print(f"  {height}×{width} pixels: {count} detections in onnxruntime and in PyTorch")


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.export"))

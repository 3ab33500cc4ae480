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

Shapes: N proposals, K classes, n detections of an image, c candidates (see `compare`).
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from model import SparseRCNN, load_model
from support.cli import parse_args, run_main
from support.errors import UserError, first_line
from support.onnx_detector import INPUT, METADATA, OUTPUTS, OnnxDetector, needed
from support.results import make_folder, replacing

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings and log messages: the exporter's are about its own internals."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def export_onnx(
    model: SparseRCNN, path: str | Path, metadata: dict[str, Any], opset: int = 18
) -> None:
    """Writes the ONNX file without checking it.

    Args:
        model: its detections in eval mode are exported. It is not changed.
        path: of the file, which includes the weights.
        metadata: has the keys in `METADATA`.
        opset: the version of ONNX's operators, 18 … 21.

    Raises:
        UserError: onnx or onnxscript is not installed, or cannot write this opset.
        OSError: the file cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        needed(package)
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    # The example may have any size, except that the exporter could take it for a rule if two sides
    # of the image or of a feature map were equal, or if one were 1.
    example = torch.zeros(3, 70, 101, dtype=torch.uint8, device=model.proposal_boxes.device)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _OneImage(model.for_inference()).eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({1: height, 2: width},),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            verbose=False,
        )

    # If it cannot convert to the opset, the exporter only logs that.
    written = program.model.opset_imports[""]
    if written != opset:
        raise UserError(
            f"--opset {opset}: this version of torch and onnxscript writes {written} only; use that"
        )
    # The exporter's stack traces would tell paths of the machine that it ran on.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props.update({name: json.dumps(metadata[name]) for name in METADATA})
    program.save(str(path), external_data=False)


# --- checking ---


class Comparison(NamedTuple):
    """How far an ONNX file is from PyTorch on one image."""

    count: int  # detections of the file
    boxes_px: float  # the largest difference between the sides of two boxes
    scores: float  # the largest difference between two scores
    problem: str | None  # what is wrong; None if the two agree


def compare(
    found: dict[str, Tensor], logits: Tensor, boxes_px: Tensor, whwh_px: Tensor
) -> Comparison:
    """Compares detections with PyTorch's predictions before any selection.

    They cannot be compared rank by rank. float32 sums that are taken in another order differ in
    their last bits. So two scores that are nearly equal may change places, also where one of them
    is the N-th best and the other is left out; and a box that clipping leaves hardly any area may
    be kept by one and dropped by the other.

    Therefore every detection has to be one of PyTorch's N·K candidates, with the same label, and no
    two of them the same candidate. In turn, all candidates have to be detections that score clearly
    more than the last one kept and clearly have an area.

    Args:
        found: `boxes` (n, 4), `scores` (n,) and `labels` (n,) of one image.
        logits: (N, K), of PyTorch's last stage.
        boxes_px: (N, 4) xyxy pixels, not clipped, of the same stage.
        whwh_px: (4,), the image's width, height, width and height.
    """
    N, K = logits.shape
    scores = logits.sigmoid().flatten()  # (N·K,)
    cut = scores.topk(N).values[-1]
    candidates = torch.nonzero(scores >= cut - SCORE_TOLERANCE).squeeze(1)  # (c,)
    scores = scores[candidates]
    labels = candidates % K
    boxes_px = boxes_px.clamp(min=0).minimum(whwh_px)[candidates // K]  # (c, 4)

    # How far each detection is from each candidate, in tolerances.
    box_distance_px = (found["boxes"][:, None] - boxes_px).abs().amax(-1)  # (n, c)
    score_distance = (found["scores"][:, None] - scores).abs()  # (n, c)
    distance = torch.maximum(box_distance_px / BOX_TOLERANCE_PX, score_distance / SCORE_TOLERANCE)
    distance = distance.double()
    distance[found["labels"][:, None] != labels] = torch.inf
    is_wrong = ~(distance <= 1)  # also if it is NaN

    # The cheapest assignment has the fewest wrong pairs, and among those assignments it is the one
    # whose right pairs are the nearest.
    cost = distance.nan_to_num(1e6).clamp(max=1e6) + 1e6 * is_wrong
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))

    has_area = (boxes_px[:, 2:] - boxes_px[:, :2]).amin(1) > BOX_TOLERANCE_PX
    is_missing = (scores > cut + SCORE_TOLERANCE) & has_area
    is_missing[columns] = False

    count = len(found["boxes"])
    right = int((~is_wrong[rows, columns]).sum())
    problem = None
    if right < count:
        problem = f"{count - right} of {count} detections are not among PyTorch's"
    elif is_missing.any():
        problem = f"{int(is_missing.sum())} of PyTorch's detections are missing"
    elif (found["scores"].diff() > 0).any():
        problem = "the scores do not fall"

    largest = [
        float(np.max(part[rows, columns].numpy(), initial=0))
        for part in (box_distance_px, score_distance)
    ]
    return Comparison(count, *largest, problem)


def check(detector: OnnxDetector, model: SparseRCNN, size: tuple[int, int]) -> Comparison:
    """Compares an ONNX file with its model on an image of random pixels.

    Args:
        detector: the file.
        model: on the CPU.
        size: height and width of the image.
    """
    height, width = size
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        outputs = model.stages([image])
    try:
        found = detector([image])[0]
    except Exception as error:  # the errors of onnxruntime have no base class of their own
        return Comparison(0, 0, 0, first_line(error))
    whwh_px = torch.tensor([width, height, width, height])
    return compare(found, outputs.logits[-1, 0], outputs.boxes[-1, 0], whwh_px)


def require_agreement(output: Path, size: tuple[int, int], result: Comparison) -> str:
    """What to print about a comparison.

    Raises:
        UserError: the file and PyTorch disagree.
    """
    if result.problem:
        raise UserError(
            f"{output}: not written, as onnxruntime and PyTorch disagree on an image of "
            f"{size[0]}×{size[1]} pixels: {result.problem} (to {BOX_TOLERANCE_PX} px and "
            f"{SCORE_TOLERANCE:g}). Untrained weights can magnify rounding so far; with trained "
            "ones try another --opset, or other versions of torch and onnxruntime"
        )
    return (
        f"  {size[0]}×{size[1]}: {result.count} detections, boxes within {result.boxes_px:.2g} px, "
        f"scores within {result.scores:.2g}"
    )


# --- command line ---


@dataclass(frozen=True)
class ExportArgs:
    source: tyro.conf.Positional[Path]  # checkpoint of train.py or tools.convert
    output: tyro.conf.Positional[Path]  # file to write, *.onnx
    # Version of ONNX's operators. torch writes none before 18, and onnxruntime's CPU lacks the
    # RoIAlign of 22.
    opset: Literal[18, 19, 20, 21] = 18
    # Pixels: height and width of each image that the file is checked on; by default three that
    # follow the model's test size: wide, tall and smaller.
    sizes: tuple[tuple[int, int], ...] = ()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ExportArgs, "python -m tools.export", __doc__.split("\n\n")[0])
    _check_args(args)
    model, checkpoint = load_model(args.source)
    config = checkpoint["config"]
    sizes = args.sizes or default_sizes(config.test_size)

    with replacing(args.output) as temporary:
        export_onnx(model, temporary, {**checkpoint, **config.to_dict()}, args.opset)
        detector = OnnxDetector(temporary)
        lines = []
        for size in sizes:
            lines.append(require_agreement(args.output, size, check(detector, model, size)))

    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, opset {args.opset}, "
        f"{len(detector.class_names)} classes\n"
        "  in: image (3, height, width) uint8 RGB; height and width are free, one image at a time\n"
        "  out: boxes (n, 4) float32 xyxy pixels, scores (n,) float32, labels (n,) int64\n"
        "in onnxruntime and PyTorch, height × width in pixels:",
        *lines,
        sep="\n",
    )


def _check_args(args: ExportArgs) -> None:
    """Finds mistakes before the minute that an export takes.

    Raises:
        UserError: says what is wrong.
        OSError: the file cannot be written there.
    """
    if args.output.suffix != ".onnx":
        raise UserError(f"{args.output}: the file to write should end in .onnx")
    if args.output.is_dir():
        raise UserError(f"{args.output}: this is a folder; give the file to write")
    if not args.output.parent.is_dir():
        raise UserError(f"{args.output.parent}: no such folder; make it first")
    if any(side < 1 for size in args.sizes for side in size):
        raise UserError(f"--sizes {args.sizes}: heights and widths should be at least 1 pixel")
    make_folder(args.output.parent)
    needed("onnxruntime")


def default_sizes(test_size: int) -> list[tuple[int, int]]:
    """Heights and widths to check a file on: a wide image, a tall one and a smaller, odd one."""
    short, long = test_size, round(test_size * 4 / 3)
    return [(short, long), (long, short), (max(1, short * 5 // 8 - 1), max(1, long // 2 - 1))]


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.export"))

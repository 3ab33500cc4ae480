"""A checkpoint to ONNX: `python -m tools.export last.pt model.onnx` writes one file that onnxruntime runs alone, from
pixels to detections, and that `predict.py --weights model.onnx` takes.

In:  `image` (3, H, W) uint8 RGB, of any height and width. Like `SparseRCNN` itself the file does not resize.
Out: `boxes` (n, 4) float32 xyxy pixels, clipped to the image, `scores` (n,) float32 falling, `labels` (n,) int64 from
     0: what `SparseRCNN` gives in eval mode. Normalisation, padding, all stages, top-N and clipping are inside.

Height and width are free. The batch is fixed to one image, because detections depend a little on how far an image is
padded: alone, each is padded to the next multiple of 32 and no further.

The file's metadata holds, as JSON, `class_names`, `category_ids`, and the `test_size` and `max_size` (pixels) that
images are best resized to beforehand.
"""

import json
import logging
import os
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

from model import SparseRCNN
from support.checkpoint import load_model
from support.cli import parse_args, run_main
from support.errors import UserError, first_line
from support.onnx_detector import INPUT, METADATA, OUTPUTS, OnnxDetector, needed

BOX_TOLERANCE_PX, SCORE_TOLERANCE = 0.05, 1e-4


class _OneImage(nn.Module):
    """`SparseRCNN` with tensors in place of lists and dicts, which ONNX does not know."""

    def __init__(self, model: SparseRCNN):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) uint8 -> boxes (n, 4), scores (n,), labels (n,)."""
        detections = self.model([image])[0]
        return tuple(detections[name] for name in OUTPUTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: the exporter's are about its own inside."""
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
    """Writes the ONNX file, unchecked.

    Args:
        model: its detections in eval mode are exported; it is not changed.
        path: written as one file, the weights in it.
        metadata: the values of `METADATA`.
        opset: ONNX's version of its operators, 18 … 21.

    Raises:
        UserError: onnx or onnxscript is not installed, or cannot write this opset.
        OSError: the file cannot be written.
    """
    for package in ("onnx", "onnxscript"):
        needed(package)
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    # Any size serves as the example, but one whose sides or maps are equal, or 1, could be taken for a rule.
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
    if (
        written := program.model.opset_imports[""]
    ) != opset:  # the exporter has logged why and gone on
        raise UserError(
            f"--opset {opset}: this version of torch and onnxscript writes {written} only; give that"
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces, with the paths of the machine it ran on
    program.model.metadata_props.update({name: json.dumps(metadata[name]) for name in METADATA})
    program.save(str(path), external_data=False)


class Comparison(NamedTuple):
    """How far an ONNX file is from PyTorch on one image."""

    count: int  # detections of the file
    boxes_px: float  # the largest difference of a box's side
    scores: float  # the largest difference of a score
    problem: str | None  # what is wrong, None where the two agree


def compare(
    found: dict[str, Tensor], logits: Tensor, boxes_px: Tensor, whwh_px: Tensor
) -> Comparison:
    """Detections against PyTorch's predictions before any selection.

    Not rank by rank: float32 sums taken in another order differ in their last bits, so nearly equal scores may change
    places, also across the cut between the N-th best and the next, and a box that clipping leaves hardly any area may
    be kept by one and dropped by the other. Therefore each detection has to be one of PyTorch's N·K candidates, with
    its label and no two the same one, and all candidates that are clearly above the cut and clearly have an area have
    to be among the detections.

    Args:
        found: one image's `boxes` (n, 4), `scores` (n,), `labels` (n,).
        logits: (N, K), boxes_px: (N, 4) xyxy pixels, not clipped, whwh_px: (4,), of PyTorch's last stage.
    """
    N, K = logits.shape
    scores = logits.sigmoid().flatten()  # (N·K,)
    cut = scores.topk(N).values[-1]
    candidates = torch.nonzero(scores >= cut - SCORE_TOLERANCE).squeeze(1)  # (c,)
    scores, labels = scores[candidates], candidates % K
    boxes_px = boxes_px.clamp(min=0).minimum(whwh_px)[candidates // K]  # (c, 4)

    box_distance_px = (found["boxes"][:, None] - boxes_px).abs().amax(-1)  # (n, c)
    score_distance = (found["scores"][:, None] - scores).abs()  # (n, c)
    distance = torch.maximum(
        box_distance_px / BOX_TOLERANCE_PX, score_distance / SCORE_TOLERANCE
    ).double()
    distance[found["labels"][:, None] != labels] = torch.inf
    is_wrong = ~(distance <= 1)
    # The sum is least where the fewest pairs are wrong, and among those where the right ones are nearest.
    cost = distance.nan_to_num(1e6).clamp(max=1e6) + 1e6 * is_wrong
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))

    is_missing = (scores > cut + SCORE_TOLERANCE) & (
        (boxes_px[:, 2:] - boxes_px[:, :2]).amin(1) > BOX_TOLERANCE_PX
    )
    is_missing[columns] = False
    count, right = len(found["boxes"]), int((~is_wrong[rows, columns]).sum())
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
    """Runs an ONNX file and its model on one image of random pixels, of `size` (height, width), and compares them."""
    height, width = size
    image = torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    whwh_px = torch.tensor([width, height, width, height])
    with torch.no_grad():
        logits, boxes_px = (part[-1, 0] for part in model.stages([image]))  # (N, K), (N, 4)
    try:
        found = detector([image])[0]
    except Exception as error:  # as in `OnnxDetector`
        return Comparison(0, 0, 0, first_line(error))
    return compare(found, logits, boxes_px, whwh_px)


@dataclass(frozen=True)
class ExportArgs:
    source: tyro.conf.Positional[Path]  # checkpoint of train.py or tools.convert
    output: tyro.conf.Positional[Path]  # file to write, *.onnx
    # ONNX's version of its operators. torch writes none before 18, and onnxruntime's CPU lacks the RoIAlign of 22.
    opset: Literal[18, 19, 20, 21] = 18
    # Pixels: height and width of each image that the file is checked on; by default three that follow the model's
    # test size, wide, tall and smaller.
    sizes: tuple[tuple[int, int], ...] = ()


def _checked_line(output: Path, size: tuple[int, int], result: Comparison) -> str:
    """What to print of a comparison.

    Raises:
        UserError: the two disagree.
    """
    if result.problem:
        raise UserError(
            f"{output}: not written, as onnxruntime and PyTorch disagree on an image of {size[0]}×{size[1]} pixels: "
            f"{result.problem} (to {BOX_TOLERANCE_PX} px and {SCORE_TOLERANCE:g}). Untrained weights can magnify "
            "rounding so far; with trained ones try another --opset, or other versions of torch and onnxruntime"
        )
    return (
        f"  {size[0]}×{size[1]}: {result.count} detections, boxes within {result.boxes_px:.2g} px, "
        f"scores within {result.scores:.2g}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    args = parse_args(argv, ExportArgs, "python -m tools.export", __doc__.split("\n\n")[0])
    if args.output.suffix != ".onnx":
        raise UserError(f"{args.output}: the file to write should end in .onnx")
    if not args.output.parent.is_dir():
        raise UserError(f"{args.output.parent}: no such folder; make it first")
    if any(side < 1 for size in args.sizes for side in size):
        raise UserError(f"--sizes {args.sizes}: heights and widths should be at least 1 pixel")
    needed("onnxruntime")  # before the minute that an export takes
    model, checkpoint = load_model(args.source)
    config = checkpoint["config"]
    short, long = config.test_size, round(config.test_size * 4 / 3)
    sizes = args.sizes or (
        (short, long),
        (long, short),
        (max(1, short * 5 // 8 - 1), max(1, long // 2 - 1)),
    )

    temporary = args.output.with_name(args.output.name + ".tmp")
    try:
        export_onnx(model, temporary, {**checkpoint, **config.to_dict()}, args.opset)
        detector = OnnxDetector(temporary)
        lines = [_checked_line(args.output, size, check(detector, model, size)) for size in sizes]
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, opset {args.opset}, "
        f"{len(detector.class_names)} classes\n"
        "  in: image (3, height, width) uint8 RGB; height and width are free, one image at a time\n"
        "  out: boxes (n, 4) float32 xyxy pixels, scores (n,) float32, labels (n,) int64\n"
        "in onnxruntime and PyTorch, height × width in pixels:",
        *lines,
        sep="\n",
    )


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.export"))

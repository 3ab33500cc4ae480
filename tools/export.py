"""A checkpoint to a file for other runtimes: `python -m tools.export last.pt model.onnx`.

The file holds everything from pixels to detections: normalisation, padding, all stages, top-N and
clipping. It is kept only if its detections agree with PyTorch's. onnxruntime and others run it
without PyTorch, and `predict.py --weights model.onnx` takes it. `python -m experiments.runtimes`
tells which runtimes do, and how far they are from PyTorch.

In:  `image` (3, H, W) uint8 RGB, of any height and width. Like `SparseRCNN` itself the file does
     not resize.
Out: `boxes` (n, 4) float32 xyxy pixels, clipped to the image; `scores` (n,) float32 in descending
     order; `labels` (n,) int64 from 0. This is what `SparseRCNN` returns in eval mode.

Height and width are free, but there is one image at a time. Detections depend a little on how far
an image is padded; alone, each is padded to the next multiple of 32 and no further.

With `--static HEIGHT WIDTH` the file takes images of this size only, and no shape in it depends on
what is in the image: phones' and compilers' runtimes need that. It always gives N detections. Those
without area, which `SparseRCNN` drops, stay in their places with a score of 0. RoIAlign becomes
matrix products (support/matrix_pooler.py). Only such files can end in `.tflite` (LiteRT) or `.pte`
(ExecuTorch).

The metadata of an ONNX file holds, as JSON, `class_names`, `category_ids`, and the `test_size` and
`max_size` (pixels) that images should be resized to beforehand.

Shapes: n detections of the file, m of PyTorch, on one image; N proposals.
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
from torch.utils.flop_counter import FlopCounterMode

from model import SparseRCNN, load_model
from support import runtimes
from support.cli import parse_args, run_main
from support.errors import UserError
from support.files import make_folder, replacing
from support.matrix_pooler import MatrixPooler
from support.onnx_detector import INPUT, METADATA, OUTPUTS
from support.runtimes import Detect

# The version of ONNX's operators. torch writes none before it.
OPSET = 18
# For each format, the packages that it needs and the runtime that checks it.
FORMATS = {
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), runtimes.onnxruntime),
    ".tflite": (("litert_torch",), runtimes.litert),
    ".pte": (("executorch",), runtimes.executorch),
}
# How far a file may be from PyTorch.
BOX_TOLERANCE_PX = 0.05
SCORE_TOLERANCE = 1e-4


# --- writing ---


class _OneImage(nn.Module):
    """`SparseRCNN` with tensors instead of lists and dicts, which other runtimes do not have."""

    def __init__(self, model: SparseRCNN):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) uint8 -> boxes (n, 4), scores (n,), labels (n,)."""
        detections = self.model([image])[0]
        return tuple(detections[name] for name in OUTPUTS)


class _OneSize(_OneImage):
    """The same without a shape that depends on the image; what has no area gets a score of 0."""

    def __init__(self, model: SparseRCNN):
        super().__init__(model)
        model.head.pooler = MatrixPooler(model.head.pooler)
        # ExecuTorch does not take weights with channels last in memory.
        model.backbone.to(memory_format=torch.contiguous_format)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) uint8 -> boxes (N, 4), scores (N,), labels (N,)."""
        last = self.model.stages([image])
        height, width = image.shape[1:]
        whwh_px = torch.tensor([[width, height, width, height]], dtype=torch.float32)
        best = self.model.best_of_all(last.logits[-1], last.boxes[-1], whwh_px)
        boxes, scores, labels = (tensor[0] for tensor in best)
        return boxes, scores * (boxes[:, 2:] > boxes[:, :2]).all(1), labels


def export_model(
    model: SparseRCNN,
    path: Path,
    metadata: dict[str, Any],
    static_hw: tuple[int, int] | None = None,
    suffix: str = ".onnx",
) -> None:
    """Writes a file without checking it.

    Args:
        model: on the CPU. Its detections in eval mode are exported. It is not changed.
        path: of the file, which includes the weights.
        metadata: has the keys in `METADATA`.
        static_hw: the only size of images; any size if it is None.
        suffix: which format to write, a key of `FORMATS`.

    Raises:
        OSError: the file cannot be written.
    """
    # The exporters' warnings and log messages are about their own internals.
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        logging.disable(logging.WARNING)
        if static_hw is None:
            # The example may have any size, except that the exporter could take it for a rule if
            # two sides of the image or of a feature map were equal, or if one were 1.
            example = torch.zeros(3, 70, 101, dtype=torch.uint8)
            free_sides = ({1: torch.export.Dim("height"), 2: torch.export.Dim("width")},)
            detector = _OneImage(model.for_inference()).eval()
        else:
            example, free_sides = torch.zeros(3, *static_hw, dtype=torch.uint8), None
            detector = _OneSize(model.for_inference()).eval()

        if suffix == ".tflite":
            import litert_torch

            litert_torch.convert(detector, (example,)).export(str(path))
        elif suffix == ".pte":
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            program = torch.export.export(detector, (example,))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)
        else:
            program = torch.onnx.export(
                detector,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=free_sides,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                verbose=False,
            )
            # The exporter's stack traces would tell paths of the machine that it ran on.
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()
            values = {name: json.dumps(metadata[name]) for name in METADATA}
            program.model.metadata_props.update(values)
            program.save(str(path), external_data=False)
        logging.disable(logging.NOTSET)


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


def check(detect: Detect, model: SparseRCNN, size_hw: tuple[int, int]) -> int:
    """Runs a file and its model, on the CPU, on an image of random pixels.

    Returns:
        How many detections they both have.

    Raises:
        UserError: they disagree.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, *size_hw), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        [expected] = model([image])
    arrays = [torch.from_numpy(array) for array in detect(image.numpy())]
    found = dict(zip(OUTPUTS, arrays, strict=True))
    has_area = found["scores"] != 0  # a file of one image size keeps the others
    found = {name: tensor[has_area] for name, tensor in found.items()}
    if not agree(found, expected):
        raise UserError(
            "not written: the file and PyTorch disagree on an image of "
            f"{size_hw[0]}×{size_hw[1]} pixels; try other versions of the packages"
        )
    return len(found["scores"])


def count_operations(model: nn.Module, size_hw: tuple[int, int]) -> int:
    """Of convolutions and matrix products, in one image."""
    image = torch.zeros(3, *size_hw, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


# --- command line ---


@dataclass(frozen=True)
class ExportArgs:
    source: tyro.conf.Positional[Path]  # checkpoint of train.py or tools.convert
    output: tyro.conf.Positional[Path]  # file to write: *.onnx, or with --static *.tflite or *.pte
    # Height and width in pixels: the file takes images of this size only, and runs where no shape
    # may depend on the image.
    static: tuple[int, int] | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ExportArgs, "python -m tools.export", __doc__.split("\n\n")[0])
    # Mistakes are found before the minute that an export takes.
    suffix = args.output.suffix
    if suffix not in FORMATS or args.output.is_dir():
        raise UserError(
            f"{args.output}: give the file to write, which should end in .onnx, .tflite or .pte"
        )
    if suffix != ".onnx" and args.static is None:
        raise UserError(f"{args.output}: {suffix} needs --static HEIGHT WIDTH, the image size")
    packages, load = FORMATS[suffix]
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UserError(f"an export needs more packages: pip install {' '.join(missing)}")
    model, checkpoint = load_model(args.source)
    config = checkpoint["config"]
    make_folder(args.output.parent)

    # A wide image, a tall one, and a smaller one of odd sides.
    short, long = config.test_size, round(config.test_size * 4 / 3)
    sizes_hw = [(short, long), (long, short), (short * 5 // 8 - 1, long // 2 - 1)]
    if args.static is not None:
        sizes_hw = [args.static]
    with replacing(args.output) as temporary:
        metadata = {**checkpoint, **config.to_dict()}
        export_model(model, temporary, metadata, args.static, suffix)
        detect = load(temporary)
        counts = [check(detect, model, size_hw) for size_hw in sizes_hw]

    megabytes = args.output.stat().st_size / 1e6
    print(f"{args.output}: {megabytes:.1f} MB, {len(checkpoint['class_names'])} classes")
    for (height, width), count in zip(sizes_hw, counts, strict=True):
        print(f"  {height}×{width} pixels: {count} detections in the file and in PyTorch")
    if args.static is not None:
        plain, static = _OneImage(model), _OneSize(model.for_inference())
        ratio = count_operations(static, args.static) / count_operations(plain, args.static)
        print(f"  matrix products in place of RoIAlign: {ratio - 1:.0%} more operations")


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.export"))

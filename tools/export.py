"""A checkpoint to a file for other runtimes: `python -m tools.export last.pt model.onnx`.

The file holds everything from pixels to detections: normalisation, padding, all stages, top-N and
clipping. It is kept only if its detections agree with PyTorch's. Many runtimes run it without
PyTorch, and `predict.py --weights model.onnx` takes it. With `--compare` the file, which is there
already, is run by all runtimes that are installed (requirements-devices.txt lists them), on a data
set in COCO's format, and a table tells how far from PyTorch each of them is.

In:  `image` (3, H, W) uint8 RGB, of any height and width. Like `SparseRCNN` itself the file does
     not resize.
Out: `boxes` (n, 4) float32 xyxy pixels, clipped to the image; `scores` (n,) float32 in descending
     order; `labels` (n,) int64 from 0. This is what `SparseRCNN` returns in eval mode.

Height and width are free, but there is one image at a time. Detections depend a little on how far
an image is padded; alone, each is padded to the next multiple of 32 and no further.

With `--static HEIGHT WIDTH` the file takes images of this size only, and no shape in it depends on
what is in the image: compilers and phones' runtimes need that. It always gives N detections. Those
without area, which `SparseRCNN` drops, stay in their places with a score of 0. RoIAlign becomes
matrix products (`MatrixPooler`). Only such files can end in `.tflite` (LiteRT) or `.pte`
(ExecuTorch).

The metadata of an ONNX file holds, as JSON, `class_names`, `category_ids`, and the `test_size` and
`max_size` (pixels) that images should be resized to beforehand.

Shapes: n detections of the file, m of PyTorch, on one image; B images, N proposals per image, C
channels, maps of H×W cells, R×R bins per region.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import validation_set
from evaluate import coco_metrics, coco_results
from head import RoIPooler
from model import SparseRCNN, load_model
from support.cli import parse_args, run_main
from support.errors import UserError, first_line
from support.files import make_folder, replacing
from support.onnx_detector import (
    INPUT,
    METADATA,
    OUTPUTS,
    Detect,
    as_detections,
    load_onnxruntime,
    load_openvino,
)

# The version of ONNX's operators. torch writes none before it.
OPSET = 18
# How far a file may be from PyTorch.
BOX_TOLERANCE_PX = 0.05
SCORE_TOLERANCE = 1e-4
# `--compare` looks at the boxes with a higher score.
CONFIDENT = 0.5


# --- the model ---


class MatrixPooler(RoIPooler):
    """RoIAlign as matrix products: the same regions up to rounding, for boxes that are finite.

    A bin is a weighted sum of a map's cells, and the weights are products: how much a row counts
    does not depend on the column. So pooling is one matrix product along y and one along x, between
    the map and two matrices that depend on the boxes alone. Nearly all their entries are zero,
    which is wasteful. But every runtime can multiply matrices, while few have RoIAlign, and not all
    of those agree on it. All boxes are pooled from all levels; a mask keeps the level that fits.
    """

    def forward(self, pyramid: Sequence[Tensor], boxes_px: Tensor) -> Tensor:
        """pyramid of (B, C, H, W), boxes_px (B, N, 4) -> (B·N, C, R, R)."""
        B, C = pyramid[0].shape[:2]
        N, R = boxes_px.shape[1], self.roi_size
        levels = self.levels(boxes_px)  # (B, N)

        regions = 0.0
        for i, features in enumerate(pyramid):
            H, W = features.shape[2:]
            # As aligned=True: a cell's value belongs to its centre.
            x1, y1, x2, y2 = (boxes_px / self.strides[i] - 0.5).unbind(-1)  # (B, N), in cells
            rows = self.weights(y1, y2, H) * (levels == i)[..., None, None]  # (B, N, R, H)
            columns = self.weights(x1, x2, W).view(B * N, 1, R, W)
            table = features.permute(0, 2, 3, 1).reshape(B, H, W * C)
            pooled = rows.view(B, N * R, H) @ table  # (B, N·R, W·C)
            regions = regions + columns @ pooled.view(B * N, R, W, C)  # (B·N, R, R, C)
        return regions.permute(0, 3, 1, 2)

    def weights(self, low: Tensor, high: Tensor, length: int) -> Tensor:
        """Along one axis: how much each cell counts in each bin.

        Args:
            low, high: (B, N) ends of the regions, in cells.
            length: cells of the map along this axis.

        Returns:
            (B, N, R, length)
        """
        R, samples = self.roi_size, self.sampling_ratio
        steps = torch.arange(R * samples, device=low.device) + 0.5
        at = low[..., None] + (high - low)[..., None] / (R * samples) * steps  # (B, N, R·samples)
        # torchvision's border: a sample more than one cell outside counts as zero, a nearer one
        # takes the value of the edge.
        is_near = (at >= -1) & (at <= length)
        at = at.clamp(0, length - 1)[..., None]
        shares = (1 - (at - torch.arange(length, device=low.device)).abs()).clamp(min=0)
        shares = shares * is_near[..., None]  # (B, N, R·samples, length)
        return shares.unflatten(2, (R, samples)).mean(3)


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
        pooler = model.head.pooler
        model.head.pooler = MatrixPooler(
            pooler.roi_size, pooler.strides, pooler.canonical_box_px, pooler.sampling_ratio
        )
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


# --- writing ---


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
    if static_hw is None:
        # The example may have any size, except that the exporter could take it for a rule if two
        # sides of the image or of a feature map were equal, or if one were 1.
        detector, example_hw = _OneImage(model.for_inference()).eval(), (70, 101)
    else:
        detector, example_hw = _OneSize(model.for_inference()).eval(), static_hw
    example = torch.zeros(3, *example_hw, dtype=torch.uint8)

    # The exporters' warnings and log messages are about their own internals.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            if suffix == ".tflite":
                write_tflite(detector, example, path)
            elif suffix == ".pte":
                write_pte(detector, example, path)
            else:
                write_onnx(detector, example, path, metadata, static_hw is None)
    finally:
        logging.disable(logging.NOTSET)


def write_onnx(
    detector: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any], is_size_free: bool
) -> None:
    """Writes a file for ONNX's runtimes, for images of any size or of the example's."""
    sides = {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    program = torch.onnx.export(
        detector,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=(sides,) if is_size_free else None,
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


def write_tflite(detector: nn.Module, example: Tensor, path: Path) -> None:
    """Writes a file for LiteRT, for images of the example's size."""
    import litert_torch

    litert_torch.convert(detector, (example,)).export(str(path))


def write_pte(detector: nn.Module, example: Tensor, path: Path) -> None:
    """Writes a file for ExecuTorch, for images of the example's size."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(detector, (example,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


# --- runtimes: each loads a file and gives a function from an image to boxes, scores, labels ---


def onnxruntime(path: Path) -> Detect:
    return load_onnxruntime(path, torch.device("cpu"))[0]


def openvino(path: Path) -> Detect:
    return load_openvino(path, amp="off")[0]


def opencv(path: Path) -> Detect:
    import cv2

    cv2.setNumThreads(1)
    net = cv2.dnn.readNetFromONNX(str(path))

    def detect(image: np.ndarray) -> Sequence[np.ndarray]:
        net.setInput(image, INPUT)
        return net.forward(list(OUTPUTS))

    return detect


def iree(path: Path) -> Detect:
    import iree.runtime

    module = iree.runtime.load_vm_flatbuffer_file(str(path), driver="local-sync")
    return lambda image: [output.to_host() for output in module.main_graph(image)]


def litert(path: Path) -> Detect:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()

    def detect(image: np.ndarray) -> Sequence[np.ndarray]:
        interpreter.set_tensor(given["index"], image)
        interpreter.invoke()
        return [interpreter.get_tensor(each["index"]) for each in interpreter.get_output_details()]

    return detect


def executorch(path: Path) -> Detect:
    import executorch.runtime

    method = executorch.runtime.Runtime.get().load_program(path).load_method("forward")
    return lambda image: [output.numpy() for output in method.execute([torch.from_numpy(image)])]


# Which files each takes, its package as in requirements-devices.txt, and its function.
RUNTIMES = {
    "onnxruntime": (".onnx", "onnxruntime", onnxruntime),
    "OpenVINO, float32": (".onnx", "openvino", openvino),
    "OpenCV": (".onnx", "opencv-python-headless", opencv),
    "LiteRT": (".tflite", "ai-edge-litert", litert),
    "ExecuTorch": (".pte", "executorch", executorch),
    "IREE": (".vmfb", "iree-base-runtime", iree),
}
# For each format, the packages that it needs and the runtime that checks it.
FORMATS = {
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), onnxruntime),
    ".tflite": (("litert_torch",), litert),
    ".pte": (("executorch",), executorch),
}


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
    found = as_detections(detect(image.numpy()))
    if not agree(found, expected):
        raise UserError(
            "not written: the file and PyTorch disagree on an image of "
            f"{size_hw[0]}×{size_hw[1]} pixels; try other versions of the packages"
        )
    return len(found["scores"])


def compare(path: Path, model: SparseRCNN, dataset: Dataset) -> None:
    """Prints a row for each runtime that is installed and takes the file, or why it refuses it."""
    versions = {package.name: package.version for package in distributions()}
    print("| runtime | largest difference | AP | ms | time / PyTorch |\n|---|---:|---:|---:|---:|")
    for name, (suffix, package, load) in RUNTIMES.items():
        if suffix == path.suffix and package in versions:
            try:
                row = measure(load(path), model, dataset)
            except Exception as error:  # of any kind: what a runtime refuses is a result too
                row = first_line(error)
            print(f"| {name} {versions[package]} | {row} |", flush=True)


@torch.inference_mode()
def measure(detect: Detect, model: SparseRCNN, dataset: Dataset) -> str:
    """A row of the table.

    The difference is the largest one between a confident box of PyTorch and the nearest box of the
    runtime with the same label. The runtime takes turns with PyTorch, so that whatever else the
    machine is doing slows both alike; times are medians over the images.
    """
    differences_px, records, seconds = [0.0], [], []
    for i in range(len(dataset)):
        image, target = dataset[i]
        image = image.as_subclass(Tensor)
        start = time.perf_counter()
        [expected] = model([image])
        middle = time.perf_counter()
        found = as_detections(detect(image.contiguous().numpy()))
        seconds.append((middle - start, time.perf_counter() - middle))

        distance_px = (found["boxes"][:, None] - expected["boxes"]).abs().amax(-1)  # (n, m)
        distance_px[found["labels"][:, None] != expected["labels"]] = torch.inf
        differences_px += distance_px[:, expected["scores"] > CONFIDENT].amin(0).tolist()
        records += coco_results(found, target, image.shape[1:], dataset.category_ids)

    ap = 100 * coco_metrics(dataset.coco(), records)["AP"]
    of_pytorch, of_runtime = np.median(seconds, axis=0)
    times = f"{1000 * of_runtime:.0f} | {of_runtime / of_pytorch:.2f}"
    return f"{max(differences_px):.1g} px | {ap:.2f} | {times}"


# --- command line ---


@dataclass(frozen=True)
class ExportArgs:
    source: tyro.conf.Positional[Path]  # checkpoint of train.py or tools.convert
    output: tyro.conf.Positional[Path]  # file to write: *.onnx, or with --static *.tflite or *.pte
    # Height and width in pixels: the file takes images of this size only, and runs where no shape
    # may depend on the image.
    static: tuple[int, int] | None = None
    # Write nothing: run the file in all runtimes that are installed, and print a table.
    compare: bool = False
    # Annotations (COCO format) for --compare; by default those of the training run.
    val_json: str | None = None
    val_images: str | None = None  # folder that the file names in --val-json are relative to


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ExportArgs, "python -m tools.export", __doc__.split("\n\n")[0])
    if args.compare:
        model, checkpoint = load_model(args.source)
        dataset = validation_set(checkpoint, val_json=args.val_json, val_images=args.val_images)
        return compare(args.output, model.for_inference(), dataset)

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


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.export"))

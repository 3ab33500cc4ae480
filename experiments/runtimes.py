"""How far each runtime that is installed is from PyTorch, on the blood cells in assets.

    python -m tools.export assets/blood.pt model.onnx
    python -m tools.export assets/blood.pt static.onnx --static 320 427
    python -m experiments.runtimes model.onnx static.onnx

There is a row for each file and each runtime that takes it: the largest difference between a
confident box of PyTorch and the nearest one of the runtime with the same label, AP, milliseconds
per image, and how many times that is the time of the first row, with which each runtime takes
turns. A runtime that cannot run a file says why. All use one thread if they can be told so.

requirements-devices.txt lists the runtimes. They need not fit into one environment: a table of some
of them is right as well.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from data import validation_set
from evaluate import evaluate
from experiments.measure import take_turns
from model import load_model
from support.cli import parse_args, run_main
from support.distributed import World
from support.errors import first_line
from support.onnx_detector import OUTPUTS
from support.runtimes import RUNTIMES, Detect

ASSETS = Path(__file__).parents[1] / "assets"
# Boxes with a higher score are compared.
CONFIDENT = 0.5
REPEATS = 10


class Detector(nn.Module):
    """A runtime with the interface of `SparseRCNN` in eval mode, which remembers its detections."""

    def __init__(self, detect: Detect):
        super().__init__()
        self.detect = detect
        self.found: list[dict[str, Tensor]] = []

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        arrays = self.detect(images[0].numpy())
        tensors = [torch.from_numpy(array) for array in arrays]
        self.found.append(dict(zip(OUTPUTS, tensors, strict=True)))
        return self.found[-1:]


def largest_difference_px(
    found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]
) -> float:
    """Over the confident boxes expected in all images; infinite if one has no counterpart."""
    largest = 0.0
    for f, e in zip(found, expected, strict=True):
        distance_px = (f["boxes"][:, None] - e["boxes"]).abs().amax(-1)  # (n, m)
        distance_px[f["labels"][:, None] != e["labels"]] = torch.inf
        confident = distance_px[:, e["scores"] > CONFIDENT]
        largest = max(largest, *confident.amin(0).tolist())
    return largest


@dataclass(frozen=True)
class RuntimesArgs:
    # Files that tools.export made of assets/blood.pt, or .vmfb that iree-compile made of one.
    files: tyro.conf.Positional[tuple[Path, ...]]


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    description = __doc__.split("\n\n")[0]
    args = parse_args(argv, RuntimesArgs, "python -m experiments.runtimes", description)
    model, checkpoint = load_model(ASSETS / "blood.pt")
    data = {"val_json": str(ASSETS / "blood/val.json"), "val_images": str(ASSETS / "blood")}
    dataset = validation_set({**checkpoint, "config": replace(checkpoint["config"], **data)})
    images = [dataset[i][0].as_subclass(Tensor) for i in range(len(dataset))]
    expected = [model([image])[0] for image in images]

    versions = {package.name: package.version for package in distributions()}
    first = None
    print("| file | runtime | largest difference | AP | ms | time / first row |")
    print("|---|---|---:|---:|---:|---:|")
    for path in args.files:
        for name, (suffix, package, load) in RUNTIMES.items():
            if suffix != path.suffix or package not in versions:
                continue
            row = f"| {path.name} | {name} {versions[package]}"
            try:
                detector = Detector(load(path))
                metrics, _ = evaluate(detector, dataset, World(torch.device("cpu")), progress=False)
            except Exception as error:  # of any kind; what a runtime refuses is a result too
                print(f"{row} | {first_line(error)} |")
                continue
            difference_px = largest_difference_px(detector.found, expected)

            call = partial(detector.detect, images[0].numpy())
            first = first or call
            turns = take_turns({"first": first, "this": call}, REPEATS, torch.device("cpu"))
            first_ms, ms = (1000 * statistics.median(turns[key]) for key in ("first", "this"))
            print(
                f"{row} | {difference_px:.1g} px | {100 * metrics['AP']:.2f} | {ms:.0f} |", end=""
            )
            print(f" {ms / first_ms:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.runtimes"))

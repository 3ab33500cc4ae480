"""`python -m experiments.benchmark growth`: detection with more proposals, more stages, larger images (slides: Tables 7, 8).

One thing grows at a time, from 100 proposals, six stages and the size given; all variants share the weights of one
backbone and of twelve stages, which are random. They run as `SparseRCNN.for_inference()` makes them.

"time / base" is what a row takes over what that base takes, and beside it the same ratio of the paper's frames per
second, on a V100. The paper counts its own post-processing and another machine's overheads: compare the direction.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from config import PRESETS, PresetName
from experiments.benchmark_inference import dtype_name, random_model
from experiments.measure import report, take_turns
from head import DynamicHead
from model import SparseRCNN
from support.cli import AMP_DTYPES, parse_args, pick_device
from support.errors import UserError

BASE = {"proposals": 100, "stages": 6, "scale": 1.0}
# What differs from the base, and the paper's frames per second where it has a row for it.
VARIANTS: tuple[tuple[dict[str, float], float | None], ...] = (
    ({}, 23),
    ({"proposals": 300}, 22),
    ({"proposals": 500}, 20),
    *(({"stages": stages}, fps) for stages, fps in ((1, 35), (2, 33), (3, 29), (12, 17))),
    *(({"scale": scale}, None) for scale in (0.5, 0.75, 1.5)),
)
COLUMNS = {
    "proposals": "{proposals:d}",
    "stages": "{stages:d}",
    "resolution, px": "{resolution}",
    "ms, median": "{median_ms:.1f}",
    "min – max": "{min_ms:.1f} – {max_ms:.1f}",
    "images/s": "{images_per_second:.2f}",
    "time / base": "{over_base:.2f}",
    "FPS (paper)": "{paper_fps:.0f}",
    "time / base (paper)": "{paper_over_base:.2f}",
}


@dataclass(frozen=True)
class GrowthArgs:
    preset: PresetName = "r50-100"  # which of our models; its proposals and stages are replaced
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    height: int = 800  # pixels of the images
    width: int = 1216  # pixels of the images
    repeats: int = 5  # measurements of every variant
    warmup: int = 1  # passes of every variant before them
    seed: int = 0  # of weights and images
    output: Path = Path("runs/benchmark.jsonl")  # file that a line is added to


def with_size(model: SparseRCNN, proposals: int, stages: int) -> SparseRCNN:
    """The first `proposals` and `stages` of a larger model, which shares its weights."""
    head = DynamicHead(model.head.stages[:stages], model.head.pooler)
    boxes, feats = model.proposal_boxes[:proposals], model.proposal_feats[:proposals]
    return SparseRCNN(model.backbone, head, model.criterion, boxes, feats).to(boxes.device).eval()


def main(argv: Sequence[str]) -> None:
    """The command `growth`; a user's mistake raises `UserError`."""
    args = parse_args(
        argv,
        GrowthArgs,
        "python -m experiments.benchmark growth",
        "Speed as proposals, stages, images grow.",
    )
    if min(args.repeats, args.warmup) < 1 or args.seed not in range(2**63):
        raise UserError("growth: --repeats and --warmup are at least 1, --seed in 0 … 2^63 − 1")
    if min(args.height, args.width) < 64:
        raise UserError(
            f"growth: images of {args.height}×{args.width} px; half of them, as well, needs 32 px a side"
        )
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    sizes = [{**BASE, **change} for change, _ in VARIANTS]
    largest = {f"num_{name}": max(size[name] for size in sizes) for name in ("proposals", "stages")}
    model = random_model(replace(PRESETS[args.preset], **largest)).to(device).for_inference()
    images = {
        scale: [torch.rand(3, int(args.height * scale), int(args.width * scale)).to(device)]
        for scale in {size["scale"] for size in sizes}
    }

    def passes(size: dict[str, float]) -> Callable[[], int]:
        sized, batch = (
            with_size(model, int(size["proposals"]), int(size["stages"])),
            images[size["scale"]],
        )

        def run() -> int:
            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != "off"):
                return len(sized(batch))

        return run

    with torch.inference_mode():
        turns = take_turns(
            {i: passes(size) for i, size in enumerate(sizes)}, args.repeats, args.warmup, device
        )
    rows, base_ms, base_fps = [], None, VARIANTS[0][1]
    for i, (size, (_, paper_fps)) in enumerate(zip(sizes, VARIANTS, strict=True)):
        times_ms = [1000 * seconds for _, seconds in turns[i]]
        median = statistics.median(times_ms)
        base_ms = base_ms or median  # the first row's
        height, width = images[size["scale"]][0].shape[1:]
        rows.append(
            {
                "proposals": size["proposals"],
                "stages": size["stages"],
                "resolution": f"{height}×{width}",
                "median_ms": median,
                "min_ms": min(times_ms),
                "max_ms": max(times_ms),
                "images_per_second": 1000 / median,
                "over_base": median / base_ms,
                "paper_fps": paper_fps,
                "paper_over_base": base_fps / paper_fps if paper_fps else None,
            }
        )
    used = {
        "threads": torch.get_num_threads(),
        "preset": args.preset,
        "dtype": dtype_name(args.amp),
        "batch": 1,
    }
    used |= {"warm-up": args.warmup, "repeats": args.repeats, "seed": args.seed}
    report(args.output, "growth", used, rows, COLUMNS, device)

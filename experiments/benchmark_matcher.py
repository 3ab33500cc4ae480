"""`python -m experiments.benchmark matcher`: the matching of a training step alone, for few and for very many objects.

Predictions and objects are random: boxes of all sizes anywhere in the image, objects of random classes. That is harder
on the assignment than trained predictions are, most of which no object wants. Where there are more objects than
proposals, as many as there are proposals are matched.

Columns: "cost" is the matrix of all stages, on the device; "all" is that, its way to the host, and the assignment.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_convert

from config import PRESETS, PresetName
from experiments.measure import report, take_turns
from matcher import HungarianMatcher
from support.cli import parse_args, pick_device
from support.errors import UserError

WHWH_PX = (1216.0, 800.0, 1216.0, 800.0)
COLUMNS = {
    "objects an image": "{objects:d}",
    "matched pairs": "{pairs:d}",
    "cost, ms": "{cost_ms:.2f}",
    "all, ms, median": "{median_ms:.2f}",
    "min – max": "{min_ms:.2f} – {max_ms:.2f}",
    "ms an image and stage": "{each_ms:.3f}",
}


@dataclass(frozen=True)
class MatcherArgs:
    preset: PresetName = "r50-100"  # number of proposals, stages and classes
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    objects: tuple[int, ...] = (
        1,
        7,
        50,
        100,
        300,
        1000,
    )  # objects in every image (COCO: 7 on average)
    batch_size: int = 16  # images a step
    repeats: int = 9  # measurements of every variant
    warmup: int = 1  # and before them
    seed: int = 0  # of predictions and objects
    output: Path = Path("runs/benchmark.jsonl")  # file that a line is added to


def random_boxes_px(*shape: int) -> Tensor:
    """(…, 4) xyxy pixels, centres anywhere in the image, sides from a hundredth to half of it."""
    centres, sides = torch.rand(*shape, 2), torch.empty(*shape, 2).uniform_(-4.6, -0.7).exp()
    return box_convert(torch.cat((centres, sides), dim=-1), "cxcywh", "xyxy") * torch.tensor(
        WHWH_PX
    )


def main(argv: Sequence[str]) -> None:
    """The command `matcher`; a user's mistake raises `UserError`."""
    args = parse_args(
        argv, MatcherArgs, "python -m experiments.benchmark matcher", "Speed of matching alone."
    )
    if (
        min(args.batch_size, args.repeats, args.warmup) < 1
        or not args.objects
        or min(args.objects) < 0
    ):
        raise UserError(
            "matcher: --batch-size, --repeats, --warmup are at least 1; --objects at least 0"
        )
    if args.seed not in range(2**63):
        raise UserError(f"matcher: --seed {args.seed} is not in 0 … 2^63 − 1")
    config, device = PRESETS[args.preset], pick_device(args.device)
    torch.manual_seed(args.seed)
    S, B, N, K = config.num_stages, args.batch_size, config.num_proposals, config.num_classes
    logits, boxes_px = torch.randn(S, B, N, K).to(device) - 4, random_boxes_px(S, B, N).to(device)
    whwh_px, matcher = torch.tensor(WHWH_PX).expand(B, 4).to(device), HungarianMatcher()

    runs = {}
    for M in dict.fromkeys(args.objects):
        targets = [
            {"boxes": random_boxes_px(M).to(device), "labels": torch.randint(K, (M,)).to(device)}
            for _ in range(B)
        ]
        inputs = (logits, boxes_px, targets, whwh_px)
        runs[M, "cost"] = lambda inputs=inputs: len(matcher.cost(*inputs))
        runs[M, "all"] = lambda inputs=inputs: len(matcher(*inputs).stage)
    with torch.inference_mode():
        turns = take_turns(runs, args.repeats, args.warmup, device)

    rows = []
    for M in dict.fromkeys(args.objects):
        times_ms = {
            part: [1000 * seconds for _, seconds in turns[M, part]] for part in ("cost", "all")
        }
        median = statistics.median(times_ms["all"])
        spread = {
            "median_ms": median,
            "min_ms": min(times_ms["all"]),
            "max_ms": max(times_ms["all"]),
        }
        cost = {"cost_ms": statistics.median(times_ms["cost"]), "each_ms": median / (S * B)}
        rows.append({"objects": M, "pairs": turns[M, "all"][0][0], **spread, **cost})
    used = {
        "threads": torch.get_num_threads(),
        "preset": args.preset,
        "proposals": N,
        "stages": S,
        "classes": K,
    }
    used |= {"batch": B, "dtype": "float32", "resolution": f"{WHWH_PX[1]:.0f}×{WHWH_PX[0]:.0f} px"}
    used |= {"warm-up": args.warmup, "repeats": args.repeats, "seed": args.seed}
    report(args.output, "matcher", used, rows, COLUMNS, device)

"""`python -m experiments.benchmark training`: images/s of training, and where the time of a step goes.

What is measured is `train.py`'s own loop: its loader on JPEGs of COCO's size, its step, with the preset's optimiser,
clipping and frozen layers. All weights are random, which is right for speed: the work is the same on any weights, but
for the assignment, which is harder on random ones.

Rows "all" are whole steps, from one batch's end to the next one's. The other rows are of further steps, in which a
clock is read between the parts; on an accelerator it has to wait there for what was asked for, which a whole step does
not. The parts are

    data        waiting for the loader, whose workers decode and augment ahead: in so few steps they always have, and
                only --workers 0 shows what it takes; `python -m experiments.benchmark data` measures a loader alone
    forward     preparing images, backbone, head, and the losses
    matching    costs, their way to the host, and the assignment
    backward    gradients, set to none before and clipped after
    optimiser   AdamW's step

"of product rate" is the share of what the machine does in the same time when it multiplies large matrices of this
dtype; GFLOP are those of forward and backward, for one image. Peak memory is the accelerator's, the other variants'
weights left out; on a CPU under Linux that of the whole process, with Python and the variants measured before.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from config import PRESETS, Config, PresetName
from data import make_dataset
from experiments.benchmark_data import make_pictures
from experiments.benchmark_inference import check_compiler, count_flops, dtype_name
from experiments.benchmark_peers import tame_residuals
from experiments.measure import PeakMemory, Row, product_rate, report, synchronize, take_turns
from model import SparseRCNN, build_model
from support.cli import AMP_DTYPES, parse_args, pick_device
from support.distributed import World
from support.errors import UserError
from support.loader import GroupedBatches, collate, make_loader
from train import Trainer

PARTS = ("data", "forward", "matching", "backward", "optimiser")
COLUMNS = {
    "batch": "{batch:d}",
    "variant": "{variant}",
    "part": "{part}",
    "dtype": "{dtype}",
    "ms, median": "{median_ms:.1f}",
    "min – max": "{min_ms:.1f} – {max_ms:.1f}",
    "of the step": "{share:.1%}",
    "images/s": "{images_per_second:.2f}",
    "GFLOP": "{gflop:.1f}",
    "of product rate": "{of_product_rate:.0%}",
    "peak memory": "{peak_mb:.0f} MB",
}


@dataclass(frozen=True)
class TrainingArgs:
    preset: PresetName = "r50-100"  # which of our models
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    amp: tuple[Literal["off", "bf16"], ...] = ("off", "bf16")  # float32, and mixed precision
    batch_size: tuple[int, ...] = (2, 16)  # images a step
    micro_batch: int | None = None  # images at a time, where a batch does not fit into memory
    size: int = 800  # pixels: shortest side of the images, which are 4:3
    workers: int = 4  # processes that load images, at most the processors there are
    repeats: int = 5  # measurements of every variant, whole and in parts
    warmup: int = 1  # steps of every variant before them
    compile: bool = False  # also with torch.compile, which takes minutes to compile
    seed: int = 0  # of weights, pictures and augmentation
    output: Path = Path("runs/benchmark.jsonl")  # file that a line is added to


class PartClock:
    """Adds up the time of each part of a training step, by hooks on the trainer's modules and optimiser."""

    def __init__(self, trainer: Trainer):
        self.device, self.is_on = trainer.here.device, False
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = 0.0
        matcher = trainer.model.criterion.matcher
        trainer.model.register_forward_pre_hook(lambda *_: self.lap("backward"))
        trainer.model.register_forward_hook(lambda *_: self.lap("forward"))
        matcher.register_forward_pre_hook(lambda *_: self.lap("forward"))
        matcher.register_forward_hook(lambda *_: self.lap("matching"))
        trainer.optimizer.register_step_pre_hook(lambda *_: self.lap("backward"))
        trainer.optimizer.register_step_post_hook(lambda *_: self.lap("optimiser"))
        step = trainer.train_step

        def train_step(*args: object) -> dict[str, float]:
            self.lap("data")
            return step(*args)

        trainer.train_step = train_step

    def start(self) -> None:
        """Sets everything to zero: a step begins."""
        self.seconds, self.last = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def lap(self, part: str) -> None:
        """What was done since the last lap was this part."""
        if self.is_on:
            synchronize(self.device)
            now = time.perf_counter()
            self.seconds[part] += now - self.last
            self.last = now


class TimedTrainer:
    """A trainer that takes one step at a time, and what is known of its steps."""

    def __init__(self, config: Config, device: torch.device, loader: DataLoader):
        self.trainer = Trainer(config, World(device), len(loader.batch_sampler), tamed_model)
        self.clock = PartClock(self.trainer)
        self.steps: Iterator[dict[str, float]] = self.trainer.train_epoch(loader)
        self.parts: list[
            dict[str, float]
        ] = []  # seconds of each part of the steps that were timed so

    def whole(self) -> int:
        """A step as in `train.py`; returns its number of images."""
        self.clock.is_on = False
        return self._step()

    def in_parts(self) -> int:
        """A step with the clock on; returns its number of images."""
        self.clock.is_on = True
        self.clock.start()
        images = self._step()
        self.parts.append(self.clock.seconds)
        return images

    def _step(self) -> int:
        values = next(self.steps)
        if "bad_steps" in values:
            raise RuntimeError("a step was not finite and was skipped: its time says nothing")
        return int(values["images"])


def tamed_model(config: Config) -> SparseRCNN:
    """Random weights whose features do not grow from block to block."""
    model = build_model(config, pretrained_backbone=False)
    tame_residuals(model.backbone)
    return model


def step_flops(model: nn.Module, dataset: Dataset) -> float:
    """Floating-point operations of a step's forward and backward pass, for one image."""
    images, targets = collate([dataset[0]])
    count = count_flops(lambda: sum(model.train()(images, targets).values()).backward())
    model.zero_grad(set_to_none=True)
    return count


def measure_training(
    config: Config, device: torch.device, args: TrainingArgs, rates: dict[str, float]
) -> list[Row]:
    """The rows of one batch size; `config` says which, `rates` are of a large matrix product in each of `args.amp`."""
    dataset = make_dataset(config, "train")
    variants: dict[tuple[str, str], TimedTrainer] = {}
    peak_mb: dict[tuple[str, str], float | None] = {}
    runs: dict[tuple[tuple[str, str], bool], Callable[[], int]] = {}
    for compiled in (False, True) if args.compile else (False,):
        for amp in args.amp:
            key = ("compiled" if compiled else "plain", amp)
            batches = GroupedBatches(dataset.sizes_hw, config.batch_size, config.seed)
            loader = make_loader(dataset, batches, config.workers, reseeded=True)
            with PeakMemory(device) as memory:
                variants[key] = TimedTrainer(
                    replace(config, amp=amp, compile=compiled), device, loader
                )
                variants[
                    key
                ].whole()  # loads the first pictures, makes the optimiser's state, compiles
                variants[key].whole()
            peak_mb[key] = memory.megabytes
            runs |= {(key, True): variants[key].whole, (key, False): variants[key].in_parts}
    gflop = step_flops(next(iter(variants.values())).trainer.model, dataset) / 1e9

    def row(key: tuple[str, str], part: str, seconds: list[float], **figures: float | None) -> Row:
        times_ms = [1000 * value for value in seconds]
        spread = {
            "median_ms": statistics.median(times_ms),
            "min_ms": min(times_ms),
            "max_ms": max(times_ms),
        }
        names = {
            "batch": config.batch_size,
            "variant": key[0],
            "part": part,
            "dtype": dtype_name(key[1]),
        }
        return {**names, **spread, **figures}

    turns = take_turns(runs, args.repeats, args.warmup, device)
    rows = []
    for key, variant in variants.items():
        seconds = [seconds for _, seconds in turns[key, True]]
        median = statistics.median(seconds)
        speed = {
            "images_per_second": config.batch_size / median,
            "gflop": gflop,
            "peak_mb": peak_mb[key],
        }
        reached = gflop * 1e9 * config.batch_size / median / rates[key[1]]
        rows.append(row(key, "all", seconds, **speed, of_product_rate=reached))
        timed = variant.parts[args.warmup :]
        total = statistics.median(sum(parts.values()) for parts in timed)
        for part in PARTS:
            values = [parts[part] for parts in timed]
            rows.append(row(key, part, values, share=statistics.median(values) / total))
    return rows


def main(argv: Sequence[str]) -> None:
    """The command `training`; a user's mistake raises `UserError`."""
    args = parse_args(
        argv,
        TrainingArgs,
        "python -m experiments.benchmark training",
        "Speed of training, and of its parts.",
    )
    if not args.amp or not args.batch_size:
        raise UserError(
            "training: --amp and --batch-size name at least one precision (off is float32) and one size"
        )
    micro_batch = 1 if args.micro_batch is None else args.micro_batch
    if (
        min(*args.batch_size, micro_batch, args.repeats, args.warmup) < 1
        or min(args.seed, args.workers) < 0
    ):
        raise UserError(
            "training: --batch-size, --micro-batch, --repeats and --warmup are at least 1, --seed and --workers 0"
        )
    if args.size < 32:
        raise UserError(f"training: images of {args.size} px; --size is at least 32")
    device = pick_device(args.device)
    if args.compile:
        check_compiler(device)
    rates = {amp: product_rate(device, AMP_DTYPES[amp]) for amp in args.amp}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 + 2 * (args.warmup + args.repeats)
        files = make_pictures(Path(folder), max(args.batch_size) * steps, args.seed)
        for size in args.batch_size:
            config = replace(
                PRESETS[args.preset],
                train_json=files[0],
                train_images=files[1],
                min_sizes=(args.size,),
                max_size=2 * args.size,
                batch_size=size,
                micro_batch=args.micro_batch and min(args.micro_batch, size),
                workers=args.workers,
                seed=args.seed,
            )
            try:
                rows += measure_training(config, device, args, rates)
            except torch.OutOfMemoryError:
                print(
                    f"left out: batch {size}, which does not fit into memory; try --micro-batch",
                    file=sys.stderr,
                )
    if not rows:
        raise UserError("training: no --batch-size fits into memory; try --micro-batch 1")
    used = {"threads": torch.get_num_threads(), "preset": args.preset}
    used |= {
        "resolution": f"{args.size}×{round(args.size * 4 / 3)} px",
        "micro-batch": args.micro_batch or "none",
    }
    used |= {"warm-up": args.warmup, "repeats": args.repeats, "seed": args.seed}
    figures = {f"{dtype_name(amp)}_product_gflop_per_s": rate / 1e9 for amp, rate in rates.items()}
    report(args.output, "training", used, rows, COLUMNS, device, **figures)

"""Training: the paper's recipe, on COCO by default, on the Shapes pictures, or on any data set in COCO's format.

    torchrun --nproc_per_node=8 train.py              the paper's R50, 100 proposals, 36 epochs of COCO on 8 GPUs
    python train.py --preset shapes                   minutes on two CPU cores, nothing to download
    python train.py --train-json A.json --train-images DIR --val-json B.json --val-images DIR        your own data

In:  a `Config` (every field is a flag, see --help).
Out: in --output DIR: last.pt, best.pt, metrics.jsonl (a line an epoch), config.json, TensorBoard events, curves.png.

Deviations (ours | paper | authors' code | why)
    an epoch is a pass over the data, its last incomplete batch left out | epochs | 270,000 iterations with endless
        shuffling | readers count in epochs; 36 of them are 266,112 iterations
    a step that is not finite is skipped | not told | ends the run | one bad batch should not cost a run
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from config import Config
from data import check_data, make_dataset
from evaluate import evaluate, format_table
from model import SparseRCNN, build_model
from support.checkpoint import load_checkpoint, load_strictly, load_what_fits, save_checkpoint
from support.cli import AMP_DTYPES, parse_args, preset_from, run_main
from support.distributed import World, world
from support.errors import UserError
from support.faults import Clock, Guarded, StopSignal
from support.loader import GroupedBatches, make_loader
from support.report import Report, prepare_output, print_summary, warn_of_crowded_images, with_sums


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of a step: warm-up, then stairs or half a cosine.

    Args:
        step: steps taken before, 0 … total_steps − 1.
        total_steps: of the whole run.
        config: the peak rate, `warmup_steps`, `warmup_factor`, `schedule`, `milestones`.
    """
    warmup = min(config.warmup_steps, total_steps // 10)
    ramp = (
        1.0 if step >= warmup else config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    )
    if config.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    else:
        decay = 0.1 ** sum(step >= milestone * total_steps for milestone in config.milestones)
    return config.learning_rate * ramp * decay


class Trainer:
    """A model in training: the step of the recipe, and all that a checkpoint has to hold to go on.

    Args:
        config: the recipe.
        here: the processes that share the work; the model is on `here.device`.
        steps_per_epoch: optimiser steps in an epoch.
        build: makes the model from the config, after the seed was set.
    """

    def __init__(
        self,
        config: Config,
        here: World,
        steps_per_epoch: int,
        build: Callable[..., SparseRCNN] = build_model,
    ):
        torch.manual_seed(config.seed)
        self.config, self.here, self.steps_per_epoch = config, here, steps_per_epoch
        self.total_steps = config.epochs * steps_per_epoch
        self.model = build(config).to(here.device)
        if config.compile:
            self.model.compile()
        self.optimizer = AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=config.amp == "fp16")
        self.epoch = 0  # epochs finished, evaluation included
        self.step = 0  # batches taken, those that were skipped included
        self.best = -1.0  # best AP so far, as a fraction
        self.sums: dict[str, float] = {}  # of what is averaged over the epoch
        self.bad_in_a_row = 0
        self.stop, self.stopping, self.save_due = StopSignal(), 0.0, 0.0
        self.clock = Clock(config.checkpoint_minutes)
        self.guarded = Guarded(self.model)
        # The module that runs: under torchrun its backward pass averages the gradients over the processes.
        self.parallel = DistributedDataParallel(self.guarded) if here.size > 1 else self.guarded
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.statistics = [
            buffer for norm in norms for buffer in norm.buffers()
        ]  # empty where norms are frozen

    def train_step(
        self, images: list[Tensor], targets: list[dict[str, Any]], num_objects: float
    ) -> dict[str, float]:
        """One step of the recipe; returns every loss, their sums, and the gradient's norm before clipping.

        This process's images go through in parts of `micro_batch`, whose gradients add up. Every loss is divided by
        `num_objects`, the object count of the whole effective batch over all processes and parts: that makes the
        gradient the same however the batch is divided (but see the top of distributed.py).
        """
        size, dtype = self.config.micro_batch or len(images), AMP_DTYPES[self.config.amp]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config)
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        before = [statistic.clone() for statistic in self.statistics]
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            is_last = first + size >= len(images)
            with (
                contextlib.nullcontext()
                if is_last or self.here.size == 1
                else self.parallel.no_sync()
            ):
                with torch.autocast(self.here.device.type, dtype, enabled=dtype != torch.float32):
                    losses = self.parallel(images[part], targets[part], num_objects)
                # All processes skip together: one that went on alone would wait for the others forever.
                if self.here.sum(not losses)[0]:
                    return self._skip(self.guarded.problem, targets, before)
                # DistributedDataParallel averages over processes; what the divisor asks for is their sum.
                self.scaler.scale(sum(losses.values()) * self.here.size).backward()
            totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), self.config.clip_norm).item()
        summed = self.here.sum(*torch.stack(list(totals.values())).tolist())
        finite = math.isfinite(norm + sum(summed))
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # also after an overflow of fp16: it lowers the scale
        if not finite:  # in all processes alike: both figures are sums over them
            return self._skip("the loss or its gradient is not finite", targets, before)
        self.bad_in_a_row = 0
        return {**with_sums(dict(zip(totals, summed, strict=True))), "grad_norm": norm}

    def _skip(
        self, problem: str | None, targets: list[dict[str, Any]], statistics: list[Tensor]
    ) -> dict[str, float]:
        """Leaves a step out, without a trace in the model, and ends the run after too many of them in a row.

        Raises:
            UserError: `max_bad_steps` in a row; names the images and what to try.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for statistic, before in zip(self.statistics, statistics, strict=True):
            statistic.copy_(before)
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            reports = self.here.gather((problem, [target["image_id"] for target in targets]))
            bad = [f"{why} (image ids {ids})" for why, ids in reports if why]
            raise UserError(
                f"{self.bad_in_a_row} steps in a row were not finite: {'; '.join(bad)}. The last checkpoint is from "
                f"before. Try a lower --lr (it was {self.optimizer.param_groups[0]['lr']:.2g} for batches of "
                f"{self.config.batch_size}), --amp off or bf16 instead of fp16, and --check-data for the boxes"
            )
        return {"bad_steps": 1.0}

    def train_epoch(self, loader: DataLoader) -> Iterator[dict[str, float]]:
        """The rest of the current epoch, step by step; what is averaged over the epoch adds up in `sums`.

        Ends early where a signal asked any process to stop.
        """
        self.model.train()
        if self.step == self.epoch * self.steps_per_epoch:
            self.sums = {}
        loader.batch_sampler.seek(self.epoch, self.step - self.epoch * self.steps_per_epoch)
        batches, end = iter(loader), time.perf_counter()
        for _ in range(self.step - self.epoch * self.steps_per_epoch, self.steps_per_epoch):
            error, images, targets = None, [], []
            try:
                images, targets = next(batches)
            except (UserError, OSError) as problem:  # a picture that only this process has met
                error = problem
            waited = time.perf_counter() - end
            own = sum(len(target["labels"]) for target in targets)
            # Before the step, so that all processes know all objects, one's wish to stop, and the main one's clock.
            num_objects, num_images, self.stopping, self.save_due, errors = self.here.sum(
                own,
                len(images),
                self.stop.signal is not None,
                self.here.is_main and self.clock.is_due(),
                error is not None,
            )
            if errors:
                self.here.raise_together(error)
            if self.stopping:
                break
            values = self.train_step(images, targets, num_objects)
            values |= {
                "steps": 1,
                "images": num_images,
                "seconds": time.perf_counter() - end,
                "data_seconds": waited,
            }
            end += values["seconds"]
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            yield values

    def state(self, dataset: Dataset) -> dict[str, Any]:
        """The checkpoint; all processes have to call this."""
        rng = {"cpu": torch.get_rng_state()}
        if self.here.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.here.device)
        return {
            "model": self.model.state_dict(),
            "config": self.config.to_dict(),
            "class_names": list(dataset.class_names),
            "category_ids": list(dataset.category_ids),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {
                "total_steps": self.total_steps,
                "learning_rate": self.config.learning_rate,
            },
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "bad_in_a_row": self.bad_in_a_row,
            "sums": dict(self.sums),
            "rng": self.here.gather(rng),
        }

    def restore(self, checkpoint: dict[str, Any], path: str) -> None:
        """Goes back to what `state` saved.

        Raises:
            UserError: the checkpoint is of another model or data set, or not of a training run.
        """
        needed = (
            "optimizer",
            "schedule",
            "scaler",
            "epoch",
            "step",
            "best",
            "bad_in_a_row",
            "sums",
            "rng",
        )
        if missing := [key for key in needed if key not in checkpoint]:
            raise UserError(
                f"{path}: no training can be resumed from it, it lacks {', '.join(missing)}; try --weights"
            )
        step = checkpoint["step"]
        if step - checkpoint["epoch"] * self.steps_per_epoch not in range(self.steps_per_epoch + 1):
            raise UserError(
                f"{path}: step {step} is not in epoch {checkpoint['epoch'] + 1} of {self.steps_per_epoch} steps; were "
                "the data or --batch-size changed? Then start a run of its own with --weights"
            )
        load_strictly(self.model, checkpoint["model"], path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        if checkpoint["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step, self.best = (
            checkpoint["epoch"],
            checkpoint["step"],
            checkpoint["best"],
        )
        self.sums, self.bad_in_a_row = checkpoint["sums"], checkpoint["bad_in_a_row"]
        if len(checkpoint["rng"]) == self.here.size:
            rng = checkpoint["rng"][self.here.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.here.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.here.device)


@dataclass(frozen=True)
class TrainArgs:
    config: Config = field(default_factory=Config)
    output: Path = Path("runs/train")  # folder that everything is written into
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    # Checkpoint to start from: ours, the authors', MMDetection's, sparse-rcnn-r50-100 … What fits is kept.
    weights: str | None = None
    # Checkpoint to go on from, with its settings where no flag says otherwise; "auto" is last.pt in --output, if there.
    resume: str | None = None
    check_data: bool = False  # decode every picture before training


def read_args(argv: Sequence[str]) -> tuple[TrainArgs, dict[str, Any] | None]:
    """The command line, and the checkpoint to go on from; a resumed run's settings are the defaults of its flags."""
    description = __doc__.split("\n\n")[0]
    args = parse_args(argv, TrainArgs, "train.py", description, config=preset_from(argv))
    resume = args.resume
    if resume == "auto":
        resume = str(args.output / "last.pt") if (args.output / "last.pt").exists() else None
    if resume is None:
        return replace(args, resume=None), None
    checkpoint = load_checkpoint(resume)
    args = parse_args(
        argv, TrainArgs, "train.py", description, config=Config.from_dict(checkpoint["config"])
    )
    return replace(args, resume=resume), checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises `UserError`. Returns the exit status: 0, or 128 + a signal's number."""
    return run(*read_args(sys.argv[1:] if argv is None else list(argv)))


def run(
    args: TrainArgs,
    checkpoint: dict[str, Any] | None,
    build: Callable[..., SparseRCNN] = build_model,
) -> int:
    """`main` once the command line is read; another model is trained where another `build` makes it."""
    with world(args.device) as here:
        names = checkpoint["class_names"] if checkpoint is not None else None
        train_set = make_dataset(args.config, "train", class_names=names)
        val_set = make_dataset(args.config, "val", class_names=train_set.class_names)
        config, error = replace(args.config, num_classes=len(train_set.class_names)), None
        if not train_set.objects_per_image.any():
            raise UserError(
                "train: the training images have no objects at all, there is nothing to learn from"
            )
        try:
            if here.is_main:
                warn_of_crowded_images(train_set, config.num_proposals)
                prepare_output(args.output, args.resume)
            for dataset in filter(None, (train_set, val_set)) if args.check_data else ():
                check_data(dataset, here.rank, here.size)
        except (UserError, OSError) as problem:
            error = problem
        here.raise_together(error)
        batches = GroupedBatches(
            train_set.sizes_hw, config.batch_size, config.seed, here.rank, here.size
        )
        trainer = Trainer(
            config, here, len(batches), lambda config: build(config, checkpoint is None)
        )
        notes = []
        if checkpoint is not None:
            trainer.restore(checkpoint, args.resume)
            notes = [f"resumed from {args.resume} at step {trainer.step} of {trainer.total_steps}"]
        elif args.weights:
            notes = load_what_fits(trainer.model, args.weights, train_set.class_names)
        if here.is_main:
            print_summary(config, here, trainer.model, train_set, val_set, notes)
        loader = make_loader(train_set, batches, config.workers, reseeded=True)
        with trainer.stop, Report(args.output, trainer.epoch, config, here.is_main) as report:
            return train(trainer, loader, val_set, args.output, report)


def train(
    trainer: Trainer, loader: DataLoader, val_set: Dataset | None, output: Path, report: Report
) -> int:
    """The loop: steps, a checkpoint every few minutes, and after an epoch an evaluation. Returns the exit status."""
    config, here, train_set = trainer.config, trainer.here, loader.dataset.dataset

    def save(name: str) -> None:
        state, error = trainer.state(train_set), None
        try:
            if here.is_main:
                save_checkpoint(output / name, state)
        except OSError as problem:
            error = problem
        here.raise_together(error)
        trainer.clock.restart()

    while trainer.epoch < config.epochs:
        for _ in report.progress(trainer.train_epoch(loader), trainer):
            if trainer.save_due:
                save("last.pt")
        here.copy_buffers(trainer.model)
        save("last.pt")  # before the evaluation, which may take long
        if signals := [number for number in here.gather(trainer.stop.signal) if number]:
            trainer.stop.signal = signals[0]
            report.say(
                f"stopped by signal {signals[0]} at step {trainer.step}; saved {output / 'last.pt'}"
            )
            return 128 + signals[0]
        metrics: dict[str, Any] = {}
        if val_set is not None and (
            (trainer.epoch + 1) % config.eval_every == 0 or trainer.epoch + 1 == config.epochs
        ):
            size = config.micro_batch or config.batch_size // here.size
            with trainer.stop.obeyed(
                f"in an evaluation; {output / 'last.pt'} is from right before it"
            ):
                loading = {"batch_size": size, "workers": config.workers}
                metrics, _ = evaluate(trainer.model, val_set, here, **loading, amp=config.amp)
            report.say(format_table(metrics))
        trainer.epoch += 1
        improved = metrics.get("AP", -1.0) > trainer.best
        trainer.best = max(trainer.best, metrics.get("AP", -1.0))
        report.end_epoch(trainer, metrics)
        if improved:  # before last.pt, which says that it is done
            save("best.pt")
        save("last.pt")
    report.say(f"written: {', '.join(sorted(path.name for path in output.iterdir()))} in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))

"""Training: the paper's recipe, on COCO by default, on the Shapes pictures, or on any data set in COCO's format.

    python train.py                                                    the paper's R50, 100 proposals, 36 epochs
    python train.py --preset shapes                                    minutes on a laptop, nothing to download
    python train.py --train-json A.json --train-images DIR --val-json B.json --val-images DIR        your own data

In:  a `Config` (every field is a flag, see --help).
Out: in --output DIR: last.pt, best.pt, metrics.jsonl (a line an epoch), config.json, TensorBoard events, curves.png.

Deviations (ours | paper | authors' code | why)
    an epoch is a pass over the data, its last incomplete batch left out | epochs | 270,000 iterations with endless
        shuffling | readers count in epochs; 36 of them are 266,112 iterations
"""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint import load_checkpoint, load_strictly, save_checkpoint
from config import Config, UserError, parse_args, pick_device, preset_from, run_main
from data import check_data, make_dataset, make_loader
from evaluate import evaluate, format_table
from model import SparseRCNN, build_model
from visualize import plot_curves

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate_factor(step: int, total_steps: int, config: Config) -> float:
    """The share of the peak rate at a step: warm-up, then steps or half a cosine.

    Args:
        step: optimiser steps taken, 0 … total_steps − 1.
        total_steps: of the whole run.
        config: `warmup_steps`, `warmup_factor`, `schedule`, `milestones`.
    """
    warmup = min(config.warmup_steps, total_steps // 10)
    ramp = 1.0 if step >= warmup else config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    if config.schedule == "cosine":
        return ramp * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / total_steps)).item())
    return ramp * 0.1 ** sum(step >= milestone * total_steps for milestone in config.milestones)


@dataclass
class Trainer:
    """What changes while training, and is in the checkpoint."""

    model: SparseRCNN
    optimizer: AdamW
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    config: Config
    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps taken
    best: float = -1.0  # best AP so far, as a fraction

    def train_step(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One step of the recipe on a batch; returns the losses, detached, and the gradient's norm before clipping.

        The batch goes through in parts of `micro_batch` images whose gradients add up. All parts are divided by the
        object count of the whole batch, which makes them equal to the batch in one piece.
        """
        device, dtype = self.model.mean.device, AMP_DTYPES[self.config.amp]
        size = self.config.micro_batch or len(images)
        num_objects = sum(len(target["labels"]) for target in targets)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = self.model(images[part], targets[part], num_objects)
            self.scaler.scale(sum(losses.values())).backward()
            totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        self.scaler.unscale_(self.optimizer)
        totals["grad_norm"] = clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        return totals

    def train_epoch(self, loader: DataLoader, progress: bool = True) -> dict[str, float]:
        """One pass over the data; returns the means of the losses, and images_per_second."""
        self.model.train()
        start, images_seen, history = time.perf_counter(), 0, []
        bar = tqdm(loader, desc=f"epoch {self.epoch + 1}/{self.config.epochs}", unit="step", disable=not progress)
        for images, targets in bar:
            history.append(self.train_step(images, targets))
            images_seen += len(images)
            if len(history) % 10 == 1:  # reading a loss waits for the device
                last = summarize(history[-1:])
                bar.set_postfix({k: f"{last[k]:.3g}" for k in ("loss", "loss_cls", "loss_l1", "loss_giou")})
        return {**summarize(history), "images_per_second": images_seen / (time.perf_counter() - start)}

    def state(self, dataset: Dataset) -> dict[str, Any]:
        """The checkpoint."""
        return {
            "model": self.model.state_dict(),
            "config": self.config.to_dict(),
            "class_names": list(dataset.class_names),
            "category_ids": list(dataset.category_ids),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "rng": torch.get_rng_state(),
        }

    def restore(self, checkpoint: dict[str, Any], path: str) -> None:
        """Goes back to what `state` saved.

        Raises:
            UserError: the checkpoint is of another model, or not of a training run.
        """
        if missing := [key for key in ("optimizer", "schedule", "epoch", "step") if key not in checkpoint]:
            raise UserError(f"{path}: no training can be resumed from it, it lacks {', '.join(missing)}")
        load_strictly(self.model, checkpoint["model"], path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step, self.best = checkpoint["epoch"], checkpoint["step"], checkpoint["best"]
        torch.set_rng_state(checkpoint["rng"])


def summarize(history: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means over steps: every loss, `loss` their sum, and `loss_cls`, `loss_l1`, `loss_giou` summed over stages."""
    means = {name: torch.stack([step[name] for step in history]).mean().item() for name in history[0]}
    kinds = {f"loss_{k}": sum(v for n, v in means.items() if n.startswith(f"loss_{k}_")) for k in ("cls", "l1", "giou")}
    return {"loss": sum(kinds.values()), **kinds, **means}


def make_trainer(config: Config, device: torch.device, steps_per_epoch: int) -> Trainer:
    """Model, optimiser and schedule at the start of a run."""
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    total = config.epochs * steps_per_epoch
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, config))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    return Trainer(model, optimizer, schedule, scaler, config)


def prepare_output(folder: Path) -> None:
    """Makes the output folder, and finds out before the first epoch whether it can be written."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()


def warn_of_crowded_images(dataset: Dataset, num_proposals: int) -> None:
    """One-to-one matching leaves objects unmatched in images that have more of them than there are proposals."""
    counts = dataset.objects_per_image
    if (counts > num_proposals).any():
        warnings.warn(
            f"{int((counts > num_proposals).sum())} of {len(counts)} training images have more objects (up to "
            f"{int(counts.max())}) than the model has proposals ({num_proposals}); in each only {num_proposals} are "
            "learned at a time. Consider a larger --num-proposals",
            stacklevel=2,
        )


@dataclass(frozen=True)
class TrainArgs:
    config: Config = field(default_factory=Config)
    output: Path = Path("runs/train")  # folder that everything is written into
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    weights: str | None = None  # checkpoint to start the model from
    resume: str | None = None  # checkpoint to go on from, or "auto" for last.pt in --output where there is one
    check_data: bool = False  # decode every picture before training


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(argv, TrainArgs, "train.py", __doc__.split("\n\n")[0], config=preset_from(argv))
    device = pick_device(args.device)
    train_set = make_dataset(args.config, "train")
    val_set = make_dataset(args.config, "val", class_names=train_set.class_names)
    config = replace(args.config, num_classes=len(train_set.class_names))
    if not train_set.objects_per_image.any():
        raise UserError("train: the training images have no objects at all, there is nothing to learn from")
    warn_of_crowded_images(train_set, config.num_proposals)
    prepare_output(args.output)
    if args.check_data:
        for dataset in filter(None, (train_set, val_set)):
            check_data(dataset)
    train(config, args, device, train_set, val_set)


def train(config: Config, args: TrainArgs, device: torch.device, train_set: Dataset, val_set: Dataset | None) -> None:
    """All epochs: train, evaluate, write."""
    # The last, incomplete batch of an epoch is left out, unless it is the only one.
    whole = len(train_set) >= config.batch_size
    loader = make_loader(train_set, config.batch_size, True, config.workers, config.seed, drop_last=whole)
    trainer = make_trainer(config, device, len(loader))
    if args.weights:
        load_strictly(trainer.model, load_checkpoint(args.weights)["model"], args.weights)
    resume = args.resume
    if resume == "auto":
        resume = str(args.output / "last.pt") if (args.output / "last.pt").exists() else None
    if resume:
        trainer.restore(load_checkpoint(resume), resume)
    (args.output / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    started = time.perf_counter()
    while trainer.epoch < config.epochs:
        line = trainer.train_epoch(loader)
        trainer.epoch += 1
        metrics: dict[str, Any] = {}
        if val_set is not None and (trainer.epoch % config.eval_every == 0 or trainer.epoch == config.epochs):
            metrics, _ = evaluate(trainer.model, val_set, device, batch_size=config.batch_size, workers=config.workers)
            print(format_table(metrics))
        improved = metrics.get("AP", -1.0) > trainer.best
        trainer.best = max(trainer.best, metrics.get("AP", -1.0))
        save_checkpoint(args.output / "last.pt", trainer.state(train_set))
        if improved:
            save_checkpoint(args.output / "best.pt", trainer.state(train_set))
        line |= {"epoch": trainer.epoch, "step": trainer.step, "lr": trainer.schedule.get_last_lr()[0]}
        line |= {name: value for name, value in metrics.items() if name.startswith("A")}
        with open(args.output / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        plot_curves(args.output / "metrics.jsonl", args.output / "curves.png")
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(f"trained for {minutes} min {seconds} s; written: {args.output}/last.pt, best.pt, metrics.jsonl, curves.png")


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))

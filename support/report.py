"""What a training run tells: a summary at the start, a progress bar, a line an epoch, TensorBoard, curves."""

import json
import math
import platform
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import PRESETS, Config
from support.distributed import World
from support.errors import UserError
from support.plots import plot_curves

KINDS = ("cls", "l1", "giou")


def with_sums(losses: dict[str, float]) -> dict[str, float]:
    """The losses of all stages, `loss_cls`, `loss_l1`, `loss_giou` summed over stages, and `loss`, the sum of all."""
    kinds = {
        f"loss_{k}": sum(v for name, v in losses.items() if name.startswith(f"loss_{k}_"))
        for k in KINDS
    }
    return {"loss": sum(kinds.values()), **kinds, **losses}


def git_revision() -> str:
    """The commit that runs, and whether files were changed since; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        folder = Path(__file__).parent
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_summary(
    config: Config,
    here: World,
    model: nn.Module,
    train_set: Dataset,
    val_set: Dataset | None,
    notes: list[str],
) -> None:
    """What is about to run, and every setting that differs from `r50-100`'s."""
    is_gpu = here.device.type == "cuda"
    name = (
        torch.cuda.get_device_name(here.device)
        if is_gpu
        else f"{here.device.type} ({torch.get_num_threads()} threads)"
    )
    sizes = {
        flag: sum(p.numel() for p in model.parameters() if p.requires_grad == flag) / 1e6
        for flag in (True, False)
    }
    per_process = config.batch_size // here.size
    at_a_time = min(config.micro_batch or per_process, per_process)
    recipe, own = PRESETS["r50-100"].to_dict(), config.to_dict()
    paths = ("train_json", "train_images", "val_json", "val_images")
    changed = [
        f"{f.name}={own[f.name]}"
        for f in fields(config)
        if own[f.name] != recipe[f.name] and f.name not in paths
    ]
    print(
        f"versions      python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, revision {git_revision()}\n"
        f"devices       {here.size} × {name}\n"
        f"batch         {config.batch_size} images: {here.size} processes × {per_process}, {at_a_time} at a time\n"
        f"data          {len(train_set)} images, {int(train_set.objects_per_image.sum())} objects of "
        f"{len(train_set.class_names)} classes; validation: {len(val_set) if val_set is not None else 'no'} images\n"
        f"parameters    {sizes[True]:.2f} M trained, {sizes[False]:.2f} M frozen\n"
        f"not as r50-100: {', '.join(changed) or 'nothing'}"
    )
    if config.lr is None and config.batch_size != 16:
        print(
            f"learning rate {config.learning_rate:.3g} = {config.lr_at_16:.3g} × {config.batch_size}/16: linear in the "
            "batch size, as --lr is not given"
        )
    for note in notes:
        print(note)


def prepare_output(folder: Path, resume: str | None) -> None:
    """Makes the output folder, and finds out before the first epoch whether it can be written.

    Raises:
        UserError: another run is in it. OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()
    goes_on = resume is not None and Path(resume).resolve().parent == folder.resolve()
    if (folder / "last.pt").exists() and not goes_on:
        raise UserError(
            f"{folder} holds another run (last.pt): go on with --resume auto, or give another --output"
        )


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


class Report:
    """Writes metrics.jsonl, config.json, TensorBoard events and curves.png, shows progress; in the main process only.

    Args:
        output: the folder.
        epoch: epochs finished before: lines of later epochs, from a run that was cut off, are removed.
        config: what config.json gets.
        is_main: False makes everything silent.
    """

    def __init__(self, output: Path, epoch: int, config: Config, is_main: bool):
        self.output, self.is_main = output, is_main
        if not is_main:
            return
        (output / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        self.lines = output / "metrics.jsonl"
        old = self.lines.read_text().splitlines() if self.lines.exists() else []
        kept = [line for line in old if line.endswith("}") and json.loads(line)["epoch"] <= epoch]
        temporary = self.lines.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.lines)
        self.board = SummaryWriter(str(output))

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            self.board.close()

    def say(self, text: str) -> None:
        """Prints, in the main process."""
        if self.is_main:
            print(text, flush=True)

    def progress(
        self, steps: Iterable[dict[str, float]], trainer: Any
    ) -> Iterator[dict[str, float]]:
        """Passes the steps on and shows them: losses, rate, time left, images/s, memory. No bar without a terminal."""
        bar = tqdm(
            total=trainer.steps_per_epoch,
            initial=trainer.step - trainer.epoch * trainer.steps_per_epoch,
            desc=f"epoch {trainer.epoch + 1}/{trainer.config.epochs}",
            unit="step",
            disable=None if self.is_main else True,
        )
        for values in steps:
            bar.update()
            shown = {
                k: f"{values[k]:.3g}"
                for k in ("loss", *(f"loss_{k}" for k in KINDS))
                if k in values
            }
            shown["lr"] = f"{trainer.optimizer.param_groups[0]['lr']:.2g}"
            shown["img/s"] = f"{values['images'] / values['seconds']:.1f}"
            if trainer.here.device.type == "cuda":
                shown["GB"] = f"{torch.cuda.max_memory_allocated(trainer.here.device) / 1e9:.1f}"
            bar.set_postfix(shown, refresh=False)
            if self.is_main and trainer.step % 20 == 0 and "loss" in values:
                for name in ("loss", *(f"loss_{k}" for k in KINDS), "grad_norm"):
                    self.board.add_scalar(f"step/{name}", values[name], trainer.step)
            yield values
        bar.close()

    def end_epoch(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """The epoch's line in metrics.jsonl and on the terminal, its events, and the curves."""
        if not self.is_main:
            return
        sums = dict(trainer.sums)
        steps, bad = sums.pop("steps", 0.0), sums.pop("bad_steps", 0.0)
        images, seconds, waited = (
            sums.pop(name, 0.0) for name in ("images", "seconds", "data_seconds")
        )
        line = {
            "epoch": trainer.epoch,
            "step": trainer.step,
            **{name: value / max(1, steps - bad) for name, value in sums.items()},
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": images / max(seconds, 1e-9),
            "data_wait": waited / max(seconds, 1e-9),  # share of the time spent waiting for images
            "bad_steps": int(bad),
            **{name: value for name, value in metrics.items() if name.startswith("A")},
            "time": time.time(),
        }
        if trainer.here.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated(trainer.here.device) / 1e9
        try:
            with open(self.lines, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{self.lines}: {error}") from error
        for name, value in line.items():
            self.board.add_scalar(f"epoch/{name}", value, trainer.epoch)
        self.board.flush()
        parts = ", ".join(f"{k} {line.get(f'loss_{k}', math.nan):.3f}" for k in KINDS)
        self.say(
            f"epoch {trainer.epoch}/{trainer.config.epochs}: loss {line.get('loss', math.nan):.3f} ({parts}), "
            f"lr {line['lr']:.2g}, {line['images_per_second']:.1f} images/s, {line['data_wait']:.0%} of it waiting for "
            f"data{f', {int(bad)} steps skipped' if bad else ''}"
        )
        plot_curves(self.lines, self.output / "curves.png")

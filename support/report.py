"""What a run reports: a summary, a progress bar, a line per epoch, TensorBoard, curves."""

import contextlib
import errno
import json
import math
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import filelock
import torch
import torchvision
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import PRESETS, Config
from support.checkpoint import Training
from support.errors import UserError
from support.loader import Batch
from support.plots import plot_curves
from support.results import write_json

LOSSES = ("loss", "loss_cls", "loss_l1", "loss_giou")
LOCK_TIMEOUT_S = 10
REPLACED = ("config.json", "metrics.jsonl", "curves.png", "best.pt")  # by a run that starts afresh
PATHS = ("train_json", "train_images", "val_json", "val_images")


def with_sums(losses: dict[str, float]) -> dict[str, float]:
    """Adds `loss_cls`, `loss_l1`, `loss_giou`, each summed over stages, and `loss`, their sum."""
    kinds = {}
    for kind in LOSSES[1:]:
        stages = [value for name, value in losses.items() if name.startswith(f"{kind}_")]
        kinds[kind] = sum(stages)
    return {"loss": sum(kinds.values()), **kinds, **losses}


def git_revision() -> str:
    """The commit that runs, "-dirty" if files were changed since; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def prepare_output(folder: Path, resume: str | None) -> filelock.BaseFileLock:
    """Makes the output folder and takes it for this run, before the first epoch is spent on it.

    Returns:
        A lock that other runs find taken until this one has ended, however it ends.

    Raises:
        UserError: another run is writing into the folder, an earlier one is in it, or files of
            another program that this run would replace.
        OSError: it cannot be written.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--output {str(folder)!r}: the name is not UTF-8, which TensorBoard cannot write to; "
            "give another --output"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        # The workers of a run that was killed hold it for a few seconds more.
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout:
        raise UserError(
            f"{folder}: another run is writing to this folder; give another --output"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        warnings.warn(
            f"{folder}: files on this disk cannot be locked ({error.strerror}); make sure that no "
            "other run writes to the same --output",
            stacklevel=2,
        )
    goes_on = resume is not None and Path(resume).resolve().parent == folder.resolve()
    if (folder / "last.pt").exists() and not goes_on:
        raise UserError(
            f"{folder} holds another run (last.pt): continue it with --resume auto, or give "
            "another --output"
        )
    found = [name for name in REPLACED if (folder / name).exists()]
    if found and not goes_on and not _is_of_a_run(folder / "config.json"):
        raise UserError(
            f"{folder} holds files that are not from train.py ({', '.join(found)}) and would be "
            "replaced; give another --output"
        )
    return lock


def _is_of_a_run(config_json: Path) -> bool:
    """Whether it is the file that a run writes before all others."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # not JSON, no dict
        values = json.loads(config_json.read_text(encoding="utf-8"))
        Config.from_dict(values)
        return "preset" in values  # a run writes every setting
    return False


def warn_of_crowded_images(dataset: Dataset, num_proposals: int) -> None:
    """One-to-one matching leaves objects out if an image has more of them than proposals."""
    counts = dataset.objects_per_image
    crowded = int((counts > num_proposals).sum())
    if crowded:
        warnings.warn(
            f"{crowded} of {len(counts)} training images have more objects (up to "
            f"{int(counts.max())}) than the model has proposals ({num_proposals}); in each of them "
            f"only {num_proposals} objects are learned at a time. Consider a larger "
            "--num-proposals",
            stacklevel=2,
        )


def print_summary(
    training: Training, train_set: Dataset, val_set: Dataset | None, notes: list[str]
) -> None:
    """What is about to run: versions, devices, data, and the settings that were changed."""
    config, world = training.config, training.world
    device = f"{world.device.type} ({torch.get_num_threads()} threads)"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)

    per_process = config.batch_size // world.size
    at_a_time = min(config.micro_batch or per_process, per_process)
    trained, frozen = 0.0, 0.0
    for parameter in training.model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel() / 1e6
        else:
            frozen += parameter.numel() / 1e6

    preset, settings = PRESETS[config.preset].to_dict(), config.to_dict()
    ignored = ("num_classes", *PATHS)  # they follow from the data
    changed = [
        f"{f.name}={settings[f.name]}"
        for f in fields(config)
        if settings[f.name] != preset[f.name] and f.name not in ignored
    ]

    num_objects = int(train_set.objects_per_image.sum())
    validation = f"{len(val_set)} images" if val_set is not None else "none"
    print(
        f"versions      python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, revision {git_revision()}\n"
        f"devices       {world.size} × {device}\n"
        f"batch         {config.batch_size} images: {world.size} processes × {per_process}, "
        f"{at_a_time} at a time\n"
        f"data          {len(train_set)} images, {num_objects} objects of "
        f"{len(train_set.class_names)} classes; validation: {validation}\n"
        f"parameters    {trained:.2f} M trained, {frozen:.2f} M frozen\n"
        f"settings      preset {config.preset}{''.join(f', {change}' for change in changed)}"
    )
    if config.lr is None and config.batch_size != 16:
        print(
            f"learning rate {config.learning_rate:.3g} = {config.lr_at_16:.3g} × "
            f"{config.batch_size}/16: linear in the batch size, because --lr is not given"
        )
    for note in notes:
        print(note)


class Report:
    """Collects the values of every step, prints them and writes them to files.

    The main process writes metrics.jsonl, config.json, TensorBoard events and curves.png into the
    output folder, and shows progress. The others only add up the values for the checkpoint.

    Args:
        output: the folder.
        training: lines of later epochs than its own, from a run that was cut off, are removed.
        lock: of the folder, released at the end.
    """

    def __init__(self, output: Path, training: Training, lock: filelock.BaseFileLock | None = None):
        self.output, self.training, self.lock = output, training, lock
        self.is_main = training.world.is_main
        self.lines = output / "metrics.jsonl"
        self.bar = tqdm(disable=True)
        if not self.is_main:
            return
        write_json(output / "config.json", training.config.to_dict(), indent=2)
        self._forget_later_epochs()
        # Events after the checkpoint, from a run that was cut off, are hidden.
        self.board = SummaryWriter(str(output), purge_step=training.step)

    def _forget_later_epochs(self) -> None:
        old = self.lines.read_text(encoding="utf-8") if self.lines.exists() else ""
        kept = ""
        for line in old.splitlines():
            is_whole = line.endswith("}")  # the last one may have been cut off
            if is_whole and json.loads(line)["epoch"] <= self.training.epoch:
                kept += f"{line}\n"
        temporary = self.lines.with_name("metrics.jsonl.tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(self.lines)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.is_main:
            self.board.close()
        if self.lock is not None:
            self.lock.release()

    def say(self, text: str) -> None:
        """Prints, in the main process."""
        if self.is_main:
            print(text, flush=True)

    def start_epoch(self) -> None:
        """New sums, unless the run was resumed in mid-epoch, and a new progress bar."""
        training = self.training
        if training.steps_into_epoch == 0:
            training.sums.clear()
        # None: only on a terminal. Standard error itself is None if it is closed.
        is_hidden = None if self.is_main and sys.stderr else True
        self.bar = tqdm(
            total=training.steps_per_epoch,
            initial=training.steps_into_epoch,
            desc=f"epoch {training.epoch + 1}/{training.config.epochs}",
            unit="step",
            disable=is_hidden,
        )

    def step(self, batch: Batch, values: dict[str, float]) -> None:
        """Adds a step's values to the epoch's and shows them.

        Args:
            batch: what was trained on.
            values: losses and gradient norm, or `{"bad_steps": 1}` for a step that was skipped.
        """
        seconds = time.perf_counter() - batch.started
        is_fine = "bad_steps" not in values
        values = with_sums(values) if is_fine else dict(values)
        values |= {"steps": 1, "images": batch.num_images}
        values |= {"seconds": seconds, "data_seconds": batch.data_seconds}
        sums = self.training.sums
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value

        shown = {name.removeprefix("loss_"): f"{values[name]:.3g}" for name in LOSSES if is_fine}
        shown["lr"] = f"{self._learning_rate():.2g}"
        shown["img/s"] = f"{batch.num_images / seconds:.1f}"
        if (memory_gb := self._memory_gb()) is not None:
            shown["GB"] = f"{memory_gb:.1f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

        if self.is_main and is_fine and self.training.step % 20 == 0:
            for name in (*LOSSES, "grad_norm"):
                self.board.add_scalar(f"step/{name}", values[name], self.training.step)

    def say_stopped(self, number: int) -> None:
        """For a run that was stopped by a signal, after its checkpoint was written."""
        where = f"step {self.training.step}; saved {self.output / 'last.pt'}"
        self.say(f"stopped by signal {number} at {where}")

    def say_written(self) -> None:
        """For the end of a run: what is in the output folder."""
        if self.is_main:
            files = sorted(p.name for p in self.output.iterdir() if not p.name.startswith("."))
            print(f"written: {', '.join(files)} in {self.output}", flush=True)

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """The epoch's line in metrics.jsonl and on the terminal, its events, and the curves.

        Args:
            metrics: of the evaluation; empty if there was none.

        Raises:
            OSError: a file cannot be written.
        """
        self.bar.close()
        if not self.is_main:
            return
        training = self.training
        line = self._epoch_line(metrics)
        try:
            with open(self.lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"{self.lines}: {error}") from error

        for name, value in line.items():
            self.board.add_scalar(f"epoch/{name}", value, training.epoch)
        self.board.flush()

        parts = ", ".join(
            f"{name.removeprefix('loss_')} {line.get(name, math.nan):.3f}" for name in LOSSES[1:]
        )
        skipped = f", {line['bad_steps']} steps skipped" if line["bad_steps"] else ""
        self.say(
            f"epoch {training.epoch}/{training.config.epochs}: loss "
            f"{line.get('loss', math.nan):.3f} ({parts}), lr {line['lr']:.2g}, "
            f"{line['images_per_second']:.1f} images/s, {line['data_wait']:.0%} of the time "
            f"waiting for data{skipped}"
        )
        try:
            plot_curves(self.lines, self.output / "curves.png")
        except OSError as error:  # no reason to end a run
            warnings.warn(f"the curves could not be drawn: {error}", stacklevel=2)

    def _epoch_line(self, metrics: dict[str, Any]) -> dict[str, Any]:
        means = dict(self.training.sums)
        steps = means.pop("steps", 0.0)
        bad_steps = means.pop("bad_steps", 0.0)
        images = means.pop("images", 0.0)
        seconds = max(means.pop("seconds", 0.0), 1e-9)
        data_seconds = means.pop("data_seconds", 0.0)
        line = {
            "epoch": self.training.epoch,
            "step": self.training.step,
            **{name: value / max(1, steps - bad_steps) for name, value in means.items()},
            "lr": self._learning_rate(),
            "images_per_second": images / seconds,
            "data_wait": data_seconds / seconds,  # share of the time spent waiting for images
            "bad_steps": int(bad_steps),
            **{name: value for name, value in metrics.items() if name.startswith("A")},
            "time": time.time(),
        }
        if (memory_gb := self._memory_gb()) is not None:
            line["memory_gb"] = memory_gb
        return line

    def _learning_rate(self) -> float:
        return self.training.optimizer.param_groups[0]["lr"]

    def _memory_gb(self) -> float | None:
        device = self.training.world.device
        if device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(device) / 1e9

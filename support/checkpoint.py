"""Checkpoints: one file with a model and all that it takes to use it, or to resume its training.

A checkpoint is a dict of tensors and plain values, always read with `weights_only=True`:

    model          state dict of `SparseRCNN`
    config         `Config.to_dict()`
    class_names    K names, in the order of the labels
    category_ids   K ids of the training annotations, in the same order
    optimizer, schedule, scaler, epoch, step, best, bad_in_a_row, sums, rng
                   only in training: what `train.py --resume` needs (see `Training.state`)

Weights of the authors' code and of MMDetection are recognised by their keys and converted while
they are read. The authors' published ones are known by name (`PUBLISHED`) and downloaded once into
torch.hub's cache.
"""

import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config import Config
from model import SparseRCNN, build_model
from support.convert import as_checkpoint, convert_checkpoint
from support.distributed import ParallelModel, World
from support.errors import UserError, first_line

_KEYS = {
    "model": dict,
    "config": dict,
    "class_names": (list, tuple),
    "category_ids": (list, tuple),
}
_TRAINING_KEYS = (
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


class Published(NamedTuple):
    """Weights that can be downloaded."""

    url: str
    sha256: str | None = None  # None: not known; a download then counts as whole if it can be read
    megabytes: int = 420  # about: four bytes per parameter


# Neither the links nor the files behind them could be tried. The authors give no checksums.
_RELEASE = "https://github.com/PeizeSun/SparseR-CNN/releases/download/v0.1"
PUBLISHED = {
    "sparse-rcnn-r50-100": Published(f"{_RELEASE}/r50_100pro_3x_model.pth"),
    "sparse-rcnn-r50-300": Published(f"{_RELEASE}/r50_300pro_3x_model.pth"),
    "sparse-rcnn-r101-100": Published(f"{_RELEASE}/r101_100pro_3x_model.pth", megabytes=500),
    "sparse-rcnn-r101-300": Published(f"{_RELEASE}/r101_300pro_3x_model.pth", megabytes=500),
}


# --- files ---


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes to a temporary file, syncs it, then renames it.

    If the process is killed, `path` holds a whole checkpoint, the old one or the new one.

    Raises:
        OSError: the file cannot be written (no space, no permission); what was at `path` is intact.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # On a full disk torch raises a RuntimeError about a file position while it handles the
        # OSError that says why.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(
            f"{path}: the checkpoint could not be written ({cause}); what was there is intact"
        ) from error


def download(name: str) -> Path:
    """The file of published weights in torch.hub's cache, downloaded if it is not there yet.

    Raises:
        UserError: the download failed or is damaged; the message says which file to put where.
    """
    url, sha256, megabytes = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path

    print(f"{name}: downloading about {megabytes} MB from {url} to {path}", flush=True)
    # The name is this process's own, because others may be downloading too. The rename is atomic.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        has_terminal = sys.stderr.isatty()
        torch.hub.download_url_to_file(url, str(partial), hash_prefix=sha256, progress=has_terminal)
        read_checkpoint(partial)  # urllib takes a connection that was lost midway for a success
        # torch.load does not check the contents.
        if zipfile.is_zipfile(partial):
            with zipfile.ZipFile(partial) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{damaged} in it is damaged")
        os.replace(partial, path)
    except (OSError, HTTPException, RuntimeError, UserError) as error:  # Runtime: wrong checksum
        raise UserError(
            f"{name}: {url} could not be downloaded ({first_line(error)}); try again, or put that "
            f"file at {path}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads any file of tensors and plain values, or `PUBLISHED` weights; nothing is executed.

    Returns:
        The dict in the file, its tensors on the CPU.

    Raises:
        UserError: the file is missing, unreadable, no checkpoint, or holds more than tensors and
            plain values.
    """
    if str(path) in PUBLISHED and not Path(path).exists():
        path = download(str(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        names = ", ".join(PUBLISHED)
        raise UserError(f"{path}: no such checkpoint; give a file, or one of {names}") from None
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file without this protection.
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path}: not a checkpoint of tensors and plain values, it asks for {wanted[1]}. "
                "Nothing else is loaded, because a pickle can run any code. From a training "
                'checkpoint of MMDetection, save the "state_dict" alone'
            ) from None
        raise UserError(f"{path}: cannot be read as a checkpoint ({_damage(path)})") from None
    except MemoryError:
        raise
    # On files of another kind torch raises IndexError, TypeError, AssertionError and others.
    except Exception:
        raise UserError(f"{path}: cannot be read as a checkpoint ({_damage(path)})") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f"{path}: holds a {kind}, not the dict of a checkpoint")
    return checkpoint


def _damage(path: str | Path) -> str:
    """What seems to be wrong with a file that torch cannot read, and what to do."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as error:
        return f"{error.strerror}; check the path"
    if not start:
        return "the file is empty; replace the file, or take an earlier checkpoint"
    if not start.strip(b"\0"):
        return (
            "the file holds zeros, as after a power failure; replace the file, or take an earlier "
            "checkpoint"
        )
    if start.startswith(b"PK"):
        return (
            "the file is cut off or damaged, or another kind of archive; replace the file, or take "
            "an earlier checkpoint"
        )
    return "it was not written by torch.save; replace the file, or check its name"


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project; one of the authors' code or of MMDetection is converted.

    Raises:
        UserError: as `read_checkpoint`, or it is a checkpoint of something else, or its parts do
            not go together.
    """
    checkpoint = read_checkpoint(path)
    missing = [key for key in _KEYS if key not in checkpoint]
    if missing and "config" in checkpoint:
        names = ", ".join(missing)
        raise UserError(f"{path}: not a whole checkpoint of this project, it lacks {names}")
    if missing:
        try:
            return as_checkpoint(checkpoint)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    _check_types(checkpoint, path)
    try:
        num_classes = Config.from_dict(checkpoint["config"]).num_classes
    except UserError as error:
        raise UserError(
            f"{path}: {error}; if a newer version wrote the file, read it with that"
        ) from None
    for key in ("class_names", "category_ids"):
        if len(checkpoint[key]) != num_classes:
            raise UserError(
                f"{path}: has {len(checkpoint[key])} {key} for a model of {num_classes} classes; "
                "correct the file, or take an earlier checkpoint"
            )
    return checkpoint


def _check_types(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Checks the parts of a checkpoint of ours that every model needs.

    Raises:
        UserError: names those of the wrong type.
    """
    wrong = [key for key, types in _KEYS.items() if not isinstance(checkpoint[key], types)]
    if not wrong:
        tensors, names = checkpoint["model"].values(), checkpoint["class_names"]
        wrong += ["model"] * (not all(isinstance(value, Tensor) for value in tensors))
        wrong += ["class_names"] * (not all(isinstance(name, str) for name in names))
    if wrong:
        raise UserError(
            f"{path}: not a sound checkpoint of this project, the wrong type of value is in "
            f"{' and '.join(wrong)}; take an earlier checkpoint"
        )


# --- models ---


def _require_finite(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuses weights with which a model would silently find nothing.

    Raises:
        UserError: names the tensors that hold NaN or infinity.
    """
    if wrong := [key for key, value in state_dict.items() if not value.isfinite().all()]:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(
            f"{path}: holds values that are not finite: {', '.join(wrong[:6])}{more}; take an "
            "earlier checkpoint"
        )


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """`load_state_dict`, with a message that lists which keys and shapes do not fit.

    Raises:
        UserError: the tensors are not exactly those of the model, or not finite.
    """
    wanted = model.state_dict()
    other_shapes = [
        f"{key} {list(value.shape)} in the file, {list(wanted[key].shape)} in the model"
        for key, value in state_dict.items()
        if key in wanted and wanted[key].shape != value.shape
    ]
    problems = {
        "missing": [key for key in wanted if key not in state_dict],
        "left over": [key for key in state_dict if key not in wanted],
        "of another shape": other_shapes,
    }

    reasons = []
    for title, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
            reasons.append(f"{title}: {', '.join(keys[:6])}{more}")
    if reasons:
        raise UserError(f"{path}: does not fit the model; {'; '.join(reasons)}")
    _require_finite(state_dict, path)
    model.load_state_dict(state_dict)


def load_what_fits(model: nn.Module, path: str | Path, class_names: Sequence[str]) -> list[str]:
    """Starts a model from other weights, for fine-tuning: tensors of the same name and shape.

    Args:
        model: changed in place.
        path: a checkpoint of ours, of the authors' code or of MMDetection.
        class_names: what the model is to learn. If the file says that it learned other classes, the
            class layers start afresh.

    Returns:
        Lines that say what was taken over and what was not.

    Raises:
        UserError: as `read_checkpoint`, or nothing fits, or what fits is not finite.
    """
    checkpoint = read_checkpoint(path)
    is_ours = all(key in checkpoint for key in _KEYS)
    if is_ours:
        _check_types(checkpoint, path)
    theirs = checkpoint["model"] if is_ours else convert_checkpoint(checkpoint)
    has_other_classes = is_ours and list(checkpoint["class_names"]) != list(class_names)

    wanted = model.state_dict()
    fitting = {}
    for key, value in theirs.items():
        is_kept = not (has_other_classes and ".cls_logits." in key)
        if is_kept and key in wanted and wanted[key].shape == value.shape:
            fitting[key] = value
    if not fitting:
        raise UserError(
            f"{path}: none of its {len(theirs)} tensors fits the model; is it of another --preset?"
        )
    _require_finite(fitting, path)
    model.load_state_dict(fitting, strict=False)

    unfit = [key for key in wanted if key in theirs and key not in fitting]
    leftovers = {
        "start afresh (another shape or other classes)": unfit,
        "start afresh (not in the file)": [key for key in wanted if key not in theirs],
        "left over in the file": [key for key in theirs if key not in wanted],
    }
    lines = [f"{path}: took over {len(fitting)} of the model's {len(wanted)} tensors"]
    lines += [f"  {title}: {', '.join(keys)}" for title, keys in leftovers.items() if keys]
    return lines


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[SparseRCNN, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the device, and the checkpoint without weights.

    Its "config" is a `Config`.

    Raises:
        UserError: as `load_checkpoint`, or the weights do not fit the config beside them.
    """
    checkpoint = load_checkpoint(path)
    config = Config.from_dict(checkpoint["config"])
    model = build_model(config, pretrained_backbone=False)
    load_strictly(model, checkpoint.pop("model"), path)
    return model.to(device).eval(), {**checkpoint, "config": config}


# --- a model in training ---


@dataclass
class Training:
    """A model in training, and the rest of what a checkpoint needs to resume."""

    model: SparseRCNN
    optimizer: Optimizer
    config: Config
    world: World
    steps_per_epoch: int
    num_images: int  # in the training set
    class_names: Sequence[str] = ()
    category_ids: Sequence[int] = ()

    epoch: int = 0  # epochs finished, evaluation included
    step: int = 0  # batches taken, those that were skipped included
    best: float = -1.0  # best AP so far, as a fraction of 1
    bad_in_a_row: int = 0  # consecutive steps that were skipped
    # Sums over the epoch so far; the report divides them by the number of steps.
    sums: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parallel_model = ParallelModel(self.model, self.world)
        is_fp16 = self.config.amp == "fp16"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=is_fp16)

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def steps_into_epoch(self) -> int:
        """Batches of the current epoch that were taken."""
        return self.step - self.epoch * self.steps_per_epoch

    def save(self, path: Path) -> None:
        """Writes a checkpoint in the main process; all processes have to call this.

        Raises:
            UserError, OSError: in all processes, if the file cannot be written.
        """
        state = self.state()
        with self.world.together():
            if self.world.is_main:
                save_checkpoint(path, state)

    def state(self) -> dict[str, Any]:
        """The contents of the checkpoint; all processes have to call this."""
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return {
            "model": self.model.state_dict(),
            "config": self.config.to_dict(),
            "class_names": list(self.class_names),
            "category_ids": list(self.category_ids),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {
                "total_steps": self.total_steps,
                "learning_rate": self.config.learning_rate,
                "batch_size": self.config.batch_size,
                "num_images": self.num_images,
            },
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "bad_in_a_row": self.bad_in_a_row,
            "sums": dict(self.sums),
            "rng": self.world.gather(rng),
        }

    def restore(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """Goes back to what `state` saved.

        Raises:
            UserError: the checkpoint is of another model, batch size or data set, or was not
                written by a training run.
        """
        self._check_resumable(checkpoint, path)
        load_strictly(self.model, checkpoint["model"], path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        if checkpoint["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])

        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        self.best = checkpoint["best"]
        self.bad_in_a_row = checkpoint["bad_in_a_row"]
        self.sums = checkpoint["sums"]

        if len(checkpoint["rng"]) == self.world.size:
            rng = checkpoint["rng"][self.world.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.world.device)

    def _check_resumable(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        if missing := [key for key in _TRAINING_KEYS if key not in checkpoint]:
            raise UserError(
                f"{path}: cannot be resumed, it is not a checkpoint of a training run (it lacks "
                f"{', '.join(missing)}); try --weights"
            )

        schedule = checkpoint["schedule"]  # without the sizes in checkpoints of earlier versions
        batch_size = schedule.get("batch_size", checkpoint["config"]["batch_size"])
        num_images = schedule.get("num_images", self.num_images)
        steps_into_epoch = checkpoint["step"] - checkpoint["epoch"] * self.steps_per_epoch
        is_same = (batch_size, num_images) == (self.config.batch_size, self.num_images)
        if not (is_same and 0 <= steps_into_epoch <= self.steps_per_epoch):
            raise UserError(
                f"{path}: epoch {checkpoint['epoch'] + 1}, step {checkpoint['step']} of a run "
                f"on {num_images} images with --batch-size {batch_size}; here are "
                f"{self.num_images} images, and --batch-size {self.config.batch_size}. Resume with "
                "the same, or start another run with --weights"
            )

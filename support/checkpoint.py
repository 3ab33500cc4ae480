"""Checkpoints: one file that holds a model and all that is needed to use it, or to go on training it.

A checkpoint is a dict of tensors and plain values, always read with `torch.load(..., weights_only=True)`:

    model          state dict of `SparseRCNN`
    config         `Config.to_dict()`
    class_names    K names, in the order of the labels
    category_ids   K ids of the training annotations, in the same order
    optimizer, schedule, scaler, epoch, step, best, bad_in_a_row, sums, rng
                   in training only: what `train.py --resume` needs (see `Trainer.state`)

Weights of the authors' code and of MMDetection are told apart by their keys and converted while they are read. The
authors' published ones are known by name (`PUBLISHED`) and downloaded once into torch.hub's cache.
"""

import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import Config
from model import SparseRCNN, build_model
from support.convert import as_checkpoint, convert_checkpoint
from support.errors import UserError, first_line

_KEYS = ("model", "config", "class_names", "category_ids")


class Published(NamedTuple):
    """Weights that can be downloaded."""

    url: str
    sha256: str | None = None  # None: not known; then a download counts as whole if it can be read


# Not verified here: neither that the files are there, nor what is in them. The authors give no checksums.
_RELEASE = "https://github.com/PeizeSun/SparseR-CNN/releases/download/v0.1"
PUBLISHED = {
    "sparse-rcnn-r50-100": Published(f"{_RELEASE}/r50_100pro_3x_model.pth"),
    "sparse-rcnn-r50-300": Published(f"{_RELEASE}/r50_300pro_3x_model.pth"),
    "sparse-rcnn-r101-100": Published(f"{_RELEASE}/r101_100pro_3x_model.pth"),
    "sparse-rcnn-r101-300": Published(f"{_RELEASE}/r101_300pro_3x_model.pth"),
}


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes to a temporary file, syncs it, then renames: whenever this is killed, `path` is whole, old or new.

    Raises:
        OSError: the file cannot be written (no space, no permission); what was at `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path}: the checkpoint could not be written ({error}); what was there before is intact"
        ) from error


def download(name: str) -> Path:
    """The file of published weights in torch.hub's cache, downloaded where it is not there yet.

    Raises:
        UserError: the download failed or is broken; the message says which file to put where.
    """
    url, sha256 = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    # A name of this process's own, since others may be downloading too; the rename at the end is atomic.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(partial), hash_prefix=sha256, progress=sys.stderr.isatty()
        )
        read_checkpoint(partial)  # a connection lost midway is no error to urllib
        if zipfile.is_zipfile(partial) and (
            damaged := zipfile.ZipFile(partial).testzip()
        ):  # torch.load does not check
            raise UserError(f"{damaged} in it is damaged")
        os.replace(partial, path)
    except (
        OSError,
        HTTPException,
        RuntimeError,
        UserError,
    ) as error:  # RuntimeError: the checksum differs
        raise UserError(
            f"{name}: {url} could not be downloaded ({first_line(error)}); try again, or put that file at {path}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Any file of tensors and plain values, or weights known by name (`PUBLISHED`), on the CPU; nothing is executed.

    Raises:
        UserError: the file is missing, unreadable, no checkpoint, or holds more than tensors and plain values.
    """
    if str(path) in PUBLISHED and not Path(path).exists():
        path = download(str(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such checkpoint; it is a file, or one of {', '.join(PUBLISHED)}"
        ) from None
    except pickle.UnpicklingError as error:
        # Not torch's whole message, which advises to load the file without this protection.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else "it was not written by torch.save"
        raise UserError(
            f"{path}: not a checkpoint of tensors and plain values, {reason}; nothing else is loaded, as a pickle can "
            'run any code. Of a training checkpoint of MMDetection, save its "state_dict" alone'
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({first_line(error)}); replace the file"
        ) from None
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path}: holds a {type(checkpoint).__name__}, not the dict of a checkpoint"
        )
    return checkpoint


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project; one of the authors' code or of MMDetection becomes one.

    Raises:
        UserError: as `read_checkpoint`, or the file is a checkpoint of something else.
    """
    checkpoint = read_checkpoint(path)
    missing = [key for key in _KEYS if key not in checkpoint]
    if missing and "config" in checkpoint:
        raise UserError(
            f"{path}: not a whole checkpoint of this project, it lacks {', '.join(missing)}"
        )
    try:
        return as_checkpoint(checkpoint) if missing else checkpoint
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """`load_state_dict`, with a message that lists which keys and shapes do not fit.

    Raises:
        UserError: the tensors are not exactly those of the model.
    """
    own = model.state_dict()
    reasons = [
        f"{title}: {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
        for title, keys in (
            ("missing", [key for key in own if key not in state_dict]),
            ("left over", [key for key in state_dict if key not in own]),
            (
                "of another shape",
                [
                    f"{key} {list(value.shape)} in the file, {list(own[key].shape)} in the model"
                    for key, value in state_dict.items()
                    if key in own and own[key].shape != value.shape
                ],
            ),
        )
        if keys
    ]
    if reasons:
        raise UserError(f"{path}: does not fit the model; {'; '.join(reasons)}")
    model.load_state_dict(state_dict)


def load_what_fits(model: nn.Module, path: str | Path, class_names: Sequence[str]) -> list[str]:
    """Starts a model from other weights, for fine-tuning: tensors of the same name and shape are taken over.

    Args:
        model: changed in place.
        path: a checkpoint of ours, of the authors' code or of MMDetection.
        class_names: what the model is to learn; the class layers start anew where ours in the file are others.

    Returns:
        Lines that say what was taken over and what was not.

    Raises:
        UserError: as `read_checkpoint`, or nothing fits.
    """
    checkpoint = read_checkpoint(path)
    is_ours = all(key in checkpoint for key in _KEYS)
    theirs = checkpoint["model"] if is_ours else convert_checkpoint(checkpoint)
    own = model.state_dict()
    other_classes = is_ours and list(checkpoint["class_names"]) != list(class_names)
    fitting = {
        key: value
        for key, value in theirs.items()
        if key in own
        and own[key].shape == value.shape
        and not (other_classes and ".cls_logits." in key)
    }
    if not fitting:
        raise UserError(
            f"{path}: not one of its {len(theirs)} tensors fits the model; is it of another --preset?"
        )
    model.load_state_dict(fitting, strict=False)
    lines = [f"{path}: took over {len(fitting)} of the model's {len(own)} tensors"]
    for title, keys in (
        (
            "start anew (another shape or other classes)",
            [key for key in own if key in theirs and key not in fitting],
        ),
        ("start anew (not in the file)", [key for key in own if key not in theirs]),
        ("left over in the file", [key for key in theirs if key not in own]),
    ):
        if keys:
            lines.append(f"  {title}: {', '.join(keys)}")
    return lines


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[SparseRCNN, dict[str, Any]]:
    """The model of a checkpoint in eval mode on the device, and the checkpoint, its weights taken out.

    Raises:
        UserError: as `load_checkpoint`, or the weights do not fit the config beside them.
    """
    checkpoint = load_checkpoint(path)
    checkpoint["config"] = config = Config.from_dict(checkpoint["config"])
    model = build_model(config, pretrained_backbone=False)
    load_strictly(model, checkpoint.pop("model"), path)
    return model.to(device).eval(), checkpoint

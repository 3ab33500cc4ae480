"""Checkpoints: one file with a model and all that it takes to use it, or to resume its training.

A checkpoint is a dict of tensors and plain values, always read with `weights_only=True`:

    model          state dict of `SparseRCNN`
    config         `Config.to_dict()`
    class_names    K names, in the order of the labels
    category_ids   K ids of the training annotations, in the same order

and from training also what `train.py --resume` needs (see `train.save`).

Weights of the authors' code and of MMDetection are recognised by their keys and converted while
they are read. The authors' published ones are known by name (`PUBLISHED`) and downloaded once into
torch.hub's cache.
"""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.convert import as_checkpoint
from support.errors import UserError, first_line
from support.files import replacing

KEYS = ("model", "config", "class_names", "category_ids")

# Neither the links nor the files behind them could be tried.
_RELEASE = "https://github.com/PeizeSun/SparseR-CNN/releases/download/v0.1"
PUBLISHED = {
    "sparse-rcnn-r50-100": f"{_RELEASE}/r50_100pro_3x_model.pth",
    "sparse-rcnn-r50-300": f"{_RELEASE}/r50_300pro_3x_model.pth",
    "sparse-rcnn-r101-100": f"{_RELEASE}/r101_100pro_3x_model.pth",
    "sparse-rcnn-r101-300": f"{_RELEASE}/r101_300pro_3x_model.pth",
}


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes to a temporary file, syncs it, then renames it.

    If the process is killed, `path` holds a whole checkpoint, the old one or the new one.

    Raises:
        OSError: the file cannot be written (no space, no permission); what was at `path` is intact.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # On a full disk torch raises a RuntimeError about a file position while it handles the
            # OSError that says why.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.flush()
        os.fsync(file.fileno())


def download(name: str) -> Path:
    """The file of published weights in torch.hub's cache, downloaded if it is not there yet.

    Raises:
        UserError: the download failed; the message says which file to put where.
    """
    url = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    print(f"{name}: downloading about 420 MB from {url} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:  # urllib's errors are OSErrors
        raise UserError(
            f"{name}: {url} could not be downloaded ({first_line(error)}); try again, or put that "
            f"file at {path}"
        ) from None
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads any file of tensors and plain values, or `PUBLISHED` weights; nothing is executed.

    Returns:
        The dict in the file, its tensors on the CPU.

    Raises:
        UserError: the file is missing, no checkpoint, or holds more than tensors and plain values.
    """
    if str(path) in PUBLISHED and not Path(path).exists():
        path = download(str(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        names = ", ".join(PUBLISHED)
        raise UserError(f"{path}: no such checkpoint; give a file, or one of {names}") from None
    except (IsADirectoryError, PermissionError, MemoryError):
        raise
    except Exception as error:  # torch has no error of its own for a damaged or foreign file
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            # torch's own message advises to load the file without this protection.
            reason = (
                f"it asks for {wanted[1]}, and nothing but tensors and plain values is loaded, "
                "because a pickle can run any code; save the state dict alone"
            )
        else:
            size = os.path.getsize(path)
            reason = f"it has {size:,} bytes; is it cut off, or another kind of file?"
        raise UserError(f"{path}: cannot be read as a checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f"{path}: holds a {kind}, not the dict of a checkpoint")
    return checkpoint


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this project; one of the authors' code or of MMDetection is converted.

    Raises:
        UserError: as `read_checkpoint`, it is a checkpoint of something else, or it holds weights
            that are not finite.
    """
    checkpoint = read_checkpoint(path)
    missing = [key for key in KEYS if key not in checkpoint]
    if missing and "config" in checkpoint:
        names = ", ".join(missing)
        raise UserError(f"{path}: not a whole checkpoint of this project, it lacks {names}")
    if missing:
        try:
            checkpoint = as_checkpoint(checkpoint)  # others' weights, or a bare state dict of ours
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    # With such weights a model would silently find nothing.
    if bad := [key for key, value in checkpoint["model"].items() if not value.isfinite().all()]:
        raise UserError(f"{path}: {len(bad)} tensors are not finite, such as {bad[0]}")
    return checkpoint


def take_over(
    model: nn.Module, checkpoint: Mapping[str, Any], class_names: Sequence[str]
) -> list[str]:
    """Starts a model from trained weights, for fine-tuning on the same or on other classes.

    Classes are matched by name: the outputs of those that the checkpoint knows are taken over,
    those of the others start afresh.

    Args:
        model: changed in place; of the same network as the checkpoint, except for its classes.
        checkpoint: of `load_checkpoint`.
        class_names: K names, in the order of the model's labels.

    Returns:
        Lines that say what was taken over.

    Raises:
        RuntimeError: from torch, if the network is another one.
    """
    theirs, ours = dict(checkpoint["model"]), model.state_dict()
    old = list(checkpoint["class_names"])
    known = [name for name in class_names if name in old]
    for key in [key for key in theirs if ".cls_logits." in key]:
        value = ours[key].clone()  # (K, C) or (K,)
        rows = [list(class_names).index(name) for name in known]
        value[rows] = theirs[key].to(value)[[old.index(name) for name in known]]
        theirs[key] = value
    # Only norms that are trained count their batches.
    for key in [key for key in {*ours, *theirs} if key.endswith("num_batches_tracked")]:
        theirs[key] = theirs.get(key, ours.get(key))
        if key not in ours:
            del theirs[key]
    model.load_state_dict(theirs)

    new = [name for name in class_names if name not in old]
    lines = ["takes over the whole network" + (", except for the classes" if new else "")]
    if new:
        lines.append(f"classes that start afresh: {', '.join(new[:12])}{' …' * (len(new) > 12)}")
    if unused := [name for name in old if name not in class_names]:
        more = " …" * (len(unused) > 12)
        lines.append(f"classes that are not used: {', '.join(unused[:12])}{more}")
    return lines

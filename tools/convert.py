"""Published weights to ours: `python -m tools.convert IN OUT`.

In:  a checkpoint of the authors' code, of MMDetection or of ours, or the name of published weights.
Out: a checkpoint of ours without the state of a training. Depth of the backbone, number of
     proposals, classes and stages are read off the shapes of the tensors.

`convert_checkpoint` does the same with a state dict in Python.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

from config import Config
from support.checkpoint import load_checkpoint, save_checkpoint
from support.cli import parse_args, run_main
from support.convert import COCO_CLASSES, convert_checkpoint
from support.errors import UserError

__all__ = ["convert_checkpoint"]


@dataclass(frozen=True)
class ConvertArgs:
    source: tyro.conf.Positional[Path]  # checkpoint of the authors' code, of MMDetection or of ours
    output: tyro.conf.Positional[Path]  # file to write
    # Store floats in float16, which halves the file. They are loaded as float32 again.
    half: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ConvertArgs, "python -m tools.convert", __doc__.split("\n\n")[0])
    if args.output.is_dir():
        raise UserError(f"{args.output}: this is a folder; give the file to write")
    if args.source.exists() and args.output.exists() and args.output.samefile(args.source):
        raise UserError(
            f"{args.output}: would replace its own source, which may hold the state of a training; "
            "give another file to write"
        )
    checkpoint = load_checkpoint(args.source)
    model = checkpoint["model"]
    if args.half:
        model = to_half(model, args.source)
    config = Config.from_dict(checkpoint["config"])
    class_names = list(checkpoint["class_names"])
    save_checkpoint(
        args.output,
        {
            "model": model,
            "config": config.to_dict(),
            "class_names": class_names,
            "category_ids": list(checkpoint["category_ids"]),
        },
    )

    is_coco = class_names == list(COCO_CLASSES.values())
    print(
        f"{args.output}: {config.backbone}, {config.num_proposals} proposals, "
        f"{config.num_stages} stages, {len(class_names)} classes{' (COCO)' if is_coco else ''}, "
        f"{len(model)} tensors, {args.output.stat().st_size / 1e6:.1f} MB"
    )


def to_half(state_dict: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """A state dict with all floats in float16.

    Raises:
        UserError: a value is too large for that, or it was not finite before.
    """
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in state_dict.items()
    }
    if large := [key for key, value in half.items() if not value.isfinite().all()]:
        raise UserError(
            f"{source}: not finite in float16: {', '.join(large[:6])}; leave out --half"
        )
    return half


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.convert"))

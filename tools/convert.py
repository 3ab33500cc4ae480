"""Published weights to ours: `python -m tools.convert IN OUT`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

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
    half: bool = False  # store floats in float16: half the size; they are loaded into float32 again


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    args = parse_args(argv, ConvertArgs, "python -m tools.convert", __doc__.split("\n\n")[0])
    checkpoint = load_checkpoint(args.source)
    model, config, names = (
        checkpoint["model"],
        Config.from_dict(checkpoint["config"]),
        checkpoint["class_names"],
    )
    if args.half:
        model = {
            key: value.half() if value.is_floating_point() else value
            for key, value in model.items()
        }
        if large := [key for key, value in model.items() if not value.isfinite().all()]:
            raise UserError(
                f"{args.source}: not finite in float16: {', '.join(large[:6])}; leave out --half"
            )
    kept = {
        "config": config.to_dict(),
        "class_names": list(names),
        "category_ids": list(checkpoint["category_ids"]),
    }
    save_checkpoint(args.output, {"model": model, **kept})
    print(
        f"{args.output}: {config.backbone}, {config.num_proposals} proposals, {config.num_stages} stages, {len(names)} "
        f"classes{' (COCO)' if list(names) == list(COCO_CLASSES.values()) else ''}, {len(model)} tensors, "
        f"{args.output.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.convert"))

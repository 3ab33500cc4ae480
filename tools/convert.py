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

import torch
import tyro

from config import PRESETS, PresetName
from model import build_model, config_of
from support.checkpoint import KEYS, load_checkpoint, save_checkpoint
from support.cli import parse_args, run_main
from support.convert import convert_checkpoint
from support.errors import UserError

__all__ = ["convert_checkpoint"]


@dataclass(frozen=True)
class ConvertArgs:
    # Checkpoint of the authors' code, of MMDetection or of ours, or the name of published weights.
    source: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]  # file to write
    # Store floats in float16, which halves the file. They are loaded as float32 again.
    half: bool = False
    preset: PresetName | None = None  # that a bare state dict was trained with


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ConvertArgs, "python -m tools.convert", __doc__.split("\n\n")[0])
    if args.output.resolve() == args.source.resolve():
        raise UserError(f"{args.output}: would replace its own source; give another file to write")
    checkpoint = load_checkpoint(args.source)
    config = config_of(checkpoint, args.source, PRESETS.get(args.preset))
    with torch.device("meta"):  # only shapes, to find out whether the tensors are all there
        model = build_model(config, pretrained_backbone=False)
    model.load_state_dict(dict(checkpoint["model"]), assign=True)

    if args.half:
        for key, value in checkpoint["model"].items():
            checkpoint["model"][key] = half = value.half() if value.is_floating_point() else value
            if not half.isfinite().all():
                raise UserError(f"{args.source}: {key} is too large for float16; leave out --half")
    checkpoint["config"] = config.to_dict()
    save_checkpoint(args.output, {key: checkpoint[key] for key in KEYS})

    class_names = checkpoint["class_names"]
    print(
        f"{args.output}: {config.backbone}, {config.num_proposals} proposals, "
        f"{config.num_stages} stages, {len(class_names)} classes ({class_names[0]}, …), "
        f"{len(checkpoint['model'])} tensors, {args.output.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.convert"))

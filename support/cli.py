"""Command lines: reading them, exit codes, devices."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import tyro

from config import PRESETS, Config
from support.errors import UserError, first_line

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def preset_from(argv: Sequence[str]) -> Config:
    """The preset that `--preset` names in a command line, so that its values become the defaults of all other flags.

    Raises:
        UserError: there is no preset of that name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="r50-100")
    name = parser.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise UserError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def parse_args(
    argv: Sequence[str] | None, into: type, prog: str, description: str, **defaults: Any
) -> Any:
    """Reads a command line into the dataclass `into` with tyro; a wrong flag prints what is wrong and exits with 2."""
    args = sys.argv[1:] if argv is None else list(argv)
    default = into(**defaults) if defaults else None
    kwargs = {"default": default} if default is not None else {}
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(into, args=args, prog=prog, description=description, config=config, **kwargs)


def pick_device(name: str) -> torch.device:
    """ "auto" takes CUDA, else Apple's MPS, else the CPU; any other name is torch's.

    Raises:
        UserError: torch does not know the device, or the machine does not have it.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}; try auto or cpu") from None
    return device


def run_main(main: Callable[[], int | None], prog: str) -> int:
    """Runs a command line: 0 for success, 2 and one line on standard error for what is the user's to mend.

    A `main` that finished but skipped some inputs returns 1. Errors of the program itself keep their trace.
    """
    # Without this Python shows the line of ours that warned, which tells a user nothing.
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: warning: {message}\n"
    try:
        return main() or 0
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2

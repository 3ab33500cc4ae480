"""What all command lines share: how they are read and how they end."""

import argparse
import contextlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, make_dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import tyro

from config import (
    PRESETS,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PresetName,
    TrainingConfig,
)
from support.errors import UserError, first_line

# The groups of `--help`, the everyday ones first.
GROUPS = {
    "data": DataConfig,
    "training": TrainingConfig,
    "model": ModelConfig,
    "matching_and_loss": LossConfig,
}
# "Internal software error" in BSD's sysexits.h. Python's own 1 has another meaning, see `run_main`.
BUG_EXIT_CODE = 70


def preset_from(argv: Sequence[str]) -> Config:
    """The preset that `--preset` names; its values become the defaults of all other flags.

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
    """Reads a command line into the dataclass `into`; a wrong flag is explained and exits with 2.

    A field `config: Suppress[Config]` of `into` becomes one flag per setting. `--help` lists them
    in the groups that `Config` is made of.

    Args:
        argv: the arguments; by default the process's own.
        into: a dataclass; the comment beside a field is its help text.
        prog: the name of the command.
        description: what it does.
        defaults: values of `into` that replace its defaults.
    """
    read = partial(
        tyro.cli,
        args=sys.argv[1:] if argv is None else list(argv),
        prog=prog,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if "config" not in defaults:
        return read(into)

    config = defaults["config"]
    flags = {"run": into(**defaults), "preset": config.preset}
    for name, group in GROUPS.items():
        flags[name] = group(**{f.name: getattr(config, f.name) for f in fields(group)})
    preset_help = tyro.conf.arg(help="where the defaults of all other flags come from")
    preset = Annotated[PresetName, preset_help]
    Flags = make_dataclass("Flags", [("run", into), ("preset", preset), *GROUPS.items()])
    parsed = read(Flags, default=Flags(**flags))

    values = {"preset": parsed.preset}
    for name in GROUPS:
        values |= asdict(getattr(parsed, name))
    return replace(parsed.run, config=Config(**values))


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 4.2 s, 3 min 07 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def run_main(main: Callable[[], int | None], prog: str) -> int:
    """Runs a command line and returns its exit code.

    0 is success, 1 is for a command that finished but skipped some inputs (`main` returns it), and
    2 is for a mistake that the user can fix, with one line on standard error. Ctrl-C gives 130. A
    bug keeps its stack trace and gives 70, because Python's usual 1 has a meaning here.
    """
    start = time.perf_counter()
    for stream in (sys.stdout, sys.stderr):
        # A terminal of cp1251 or ASCII has no "×". That must not end a run of hours.
        with contextlib.suppress(AttributeError, ValueError):  # a stream that somebody replaced
            stream.reconfigure(errors="backslashreplace")
    # Python would also print the line of code that warned, which does not help a user.
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: warning: {message}\n"
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun sets it
    if not is_main:
        warnings.simplefilter("ignore")

    try:
        status = main() or 0
        if status in (0, 1) and is_main:
            print(f"{prog}: took {duration(time.perf_counter() - start)}", flush=True)
        return status
    except BrokenPipeError:  # the reader of `predict.py … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as the shell's own commands
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"{prog}: the GPU's memory is full ({first_line(error)}); take fewer images at a time "
            "(--micro-batch in training, which changes no result; --batch-size elsewhere), "
            "--amp bf16, or a smaller --max-size",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except Exception as error:
        # On the CPU torch has no error of its own for this.
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            print(
                f"{prog}: the memory is full; take a smaller --max-size or --batch-size, or fewer "
                "--workers",
                file=sys.stderr,
            )
            return 2
        traceback.print_exc()
        return BUG_EXIT_CODE

"""Speed, measured on this machine: `python -m experiments.benchmark COMMAND`, the first word being what to measure.

data        images/s of decoding and augmenting at the recipe's 480-800/1333, beside the same transforms on PIL images,
            and of a whole loader at several numbers of workers. The pictures are made here, or those of --train-json.
inference   images/s of this model and of other detectors, in float32 and bfloat16, as a whole and part by part.
training    images/s of `train.py`'s loop, and where the time of a step goes.
matcher     matching alone, up to 1,000 objects an image.
growth      how the time of detection grows with proposals, stages and image size, beside the paper's Tables 7 and 8.

Out: a Markdown table on the terminal, and one line of JSON added to --output.

The variants of a command take turns: what else the machine does in the meantime slows them alike.
Figures are medians of the repeats. What a command can and cannot show stands at the top of its file.
"""

import importlib
import sys
from collections.abc import Sequence

from support.cli import run_main
from support.errors import UserError

# Each a module with a main(argv), imported when it is asked for: `data` needs no detectors.
COMMANDS = {
    name: f"experiments.benchmark_{name}"
    for name in ("data", "inference", "training", "matcher", "growth")
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command in ("-h", "--help"):
        return print(
            f"{__doc__}\n`python -m experiments.benchmark COMMAND --help` lists a command's flags."
        )
    if command not in COMMANDS:
        wrong = f"no such command as {command}" if command else "no command given"
        raise UserError(
            f"{wrong}; commands: {', '.join(COMMANDS)} (python -m experiments.benchmark --help)"
        )
    importlib.import_module(COMMANDS[command]).main(rest)


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.benchmark"))

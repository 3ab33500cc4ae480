"""What all command lines share: how they are read and how they end."""

import contextlib
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import tyro

from support.errors import UserError, first_line

LOST = "lost the other processes"


def parse_args(
    argv: Sequence[str] | None, into: type, prog: str, description: str, default: Any = None
) -> Any:
    """Reads a command line into the dataclass `into`; a wrong flag is explained and exits with 2.

    Args:
        argv: the arguments; by default the process's own.
        into: a dataclass; the comment beside a field is its help text.
        prog: the name of the command.
        description: what it does.
        default: an instance of `into`, where the values of flags that are not given come from.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if any(word.replace("_", "-").startswith("--local-rank") for word in words):
        raise UserError("--local-rank is of torch.distributed.launch; start with torchrun instead")
    if empty := [word for word in words if word.startswith("--") and word.endswith("=")]:
        raise UserError(f"{empty[0]} has no value; is a variable of the shell not set?")
    return tyro.cli(
        into,
        args=words,
        prog=prog,
        description=description,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def run_main(main: Callable[[], int | None], prog: str) -> int:
    """Runs a command line and returns its exit code.

    0 is success, 1 is for a command that finished but skipped some inputs (`main` returns it), 2 is
    for a mistake that the user can fix, with one line on standard error, and 128 + n is for signal
    n. A bug keeps its stack trace.
    """
    start = time.perf_counter()
    for stream in (sys.stdout, sys.stderr):
        # A terminal of cp1251 or ASCII has no "×". That must not end a run of hours.
        with contextlib.suppress(AttributeError, ValueError):  # a stream that somebody replaced
            stream.reconfigure(errors="backslashreplace")
    # Python would also print the line of code that warned, which does not help a user.
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: warning: {message}\n"
    is_ended = False

    def end(number: int, _: object) -> None:
        """Like Ctrl-C it raises an exception, so that what is done can still be written."""
        nonlocal is_ended
        is_ended = True
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb that
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    is_main = os.environ.get("RANK", "0") == "0"  # torchrun sets it
    if not is_main:
        warnings.simplefilter("ignore")

    try:
        status = main() or 0
        if status in (0, 1) and is_main:
            seconds = round(time.perf_counter() - start)
            print(f"{prog}: took {timedelta(seconds=seconds)}", flush=True)  # 0:03:07
        return status
    except BrokenPipeError:  # the reader of `predict.py … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as the shell's own commands
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except Exception as error:
        problem = _problem(error)
        if problem is None:
            raise
    gc.collect()  # the error held on to workers, which would end with noise after the line below
    if not is_main or problem.startswith(LOST):
        # The main process says at once what all of them have met, and the one that failed says what
        # the others have lost. Then torchrun ends this process, here. Otherwise it has to speak.
        for _ in range(50):
            if is_ended:
                return 128 + signal.SIGTERM
            time.sleep(0.1)
    print(f"{prog}: {problem}", file=sys.stderr, flush=True)
    return 2


def _problem(error: Exception) -> str | None:
    """What to tell a user about an error, in one line; None for a bug."""
    text = str(error)
    if isinstance(error, UserError) and "UserError: " in text:
        # A DataLoader raises its worker's error anew, with the worker's trace as the message.
        return text.rpartition("UserError: ")[2].strip()
    if isinstance(error, UserError | OSError):
        return text
    if "loading state_dict" in text:
        problems = "; ".join(line.strip() for line in text.splitlines()[1:])
        return f"the weights do not fit the model; {problems:.500}"
    if isinstance(error, dist.DistError) or ("gloo" in text and isinstance(error, RuntimeError)):
        return f"{LOST}; the first error above is the cause ({first_line(error)})"
    is_full = "DefaultCPUAllocator" in text or "DataLoader worker (pid" in text  # it was killed
    if is_full or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return (
            f"the memory is full ({first_line(error)}); take fewer images at a time "
            "(--micro-batch in training, --batch-size in evaluate.py), "
            "--amp bf16, a smaller --max-size, or fewer --workers"
        )
    return None

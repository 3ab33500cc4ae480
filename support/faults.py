"""What can go wrong during training: signals, steps that are not finite, data that fails."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from support.checkpoint import Training
from support.distributed import World
from support.errors import LoadingFailed, NotFinite, UserError


@contextlib.contextmanager
def statistics_restored(model: nn.Module) -> Iterator[None]:
    """Puts the running statistics of trained batch norms back if the step inside is `NotFinite`.

    They change in the forward pass: one bad batch would stay in them for good. Frozen norms have
    none that change.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except NotFinite:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise


def check_batch_norms(training: Training, batch_size: int) -> None:
    """Checks before the first step that trained batch norms see more than one value per channel.

    Args:
        training: its model and config.
        batch_size: images that this process takes per step.

    Raises:
        UserError: an image of 32 pixels goes through alone, so that p5 is a single cell.
    """
    is_trained = any(isinstance(module, nn.BatchNorm2d) for module in training.model.modules())
    size = training.config.micro_batch or batch_size
    smallest_part = batch_size % size or size
    smallest_px = min(training.config.min_sizes)
    if is_trained and smallest_part == 1 and smallest_px <= 32:
        raise UserError(
            f"batch norms cannot learn from one image of {smallest_px} pixels at a time; "
            "give a larger --batch-size, --micro-batch or --min-sizes"
        )


def skip(
    training: Training, image_ids: list[int], error: NotFinite, last_pt: Path | None = None
) -> dict[str, float]:
    """Counts a skipped step: one bad batch should not cost a run. The authors' code ends the run.

    Args:
        training: counts the steps that were skipped in a row.
        image_ids: this process's images of the step.
        error: what happened.
        last_pt: where the run is saved, now and then.

    Returns:
        The values for `Report.step`, in place of losses.

    Raises:
        UserError: `max_bad_steps` steps in a row, or all of a shorter run, were skipped; names the
            images and what to try.
    """
    training.bad_in_a_row += 1
    # A run without a single step that was taken has not trained: it must not end as a success.
    if training.bad_in_a_row < min(training.config.max_bad_steps, training.total_steps):
        return {"bad_steps": 1.0}

    reports = training.world.gather((error.problem, image_ids))
    causes = [f"{problem} (image ids {ids})" for problem, ids in reports if problem]
    rate = training.optimizer.param_groups[0]["lr"]
    # Also if it was written since: a skipped step changes no weight.
    is_saved = last_pt is not None and last_pt.exists()
    saved = f"{last_pt} has the weights from before them. " if is_saved else ""
    raise UserError(
        f"{training.bad_in_a_row} steps in a row were not finite: {'; '.join(causes)}. "
        f"{saved}Try a lower --lr (it was {rate:.2g} for batches of "
        f"{training.config.batch_size}), --amp off or bf16 instead of fp16, and --check-data for "
        "the boxes"
    )


@contextlib.contextmanager
def saved_if_loading_fails(training: Training, path: Path) -> Iterator[None]:
    """Saves the steps so far if a batch cannot be loaded."""
    try:
        yield
    except LoadingFailed:
        training.save(path)
        raise


class Stopped(BaseException):
    """A signal came while the process was waiting for data; `StopSignal.signal` says which.

    A BaseException, as KeyboardInterrupt is: `except Exception` around a decoder must not catch it.
    """


class StopSignal:
    """Inside `with`, SIGTERM (pre-emption) and SIGINT (Ctrl-C) are noted instead of obeyed.

    So is SIGHUP (the terminal was closed), unless it is ignored, as with `nohup`. A second Ctrl-C
    is obeyed. After a stop all stay noted until the process ends, because torchrun sends SIGTERM to
    all processes as soon as one of them has ended.

    Attributes:
        signal: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._text: str | None = None  # what to print before obeying at once
        self._is_waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        numbers = [signal.SIGTERM, signal.SIGINT]
        # Windows has no SIGHUP.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.signal is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def agreed(self, world: World) -> int | None:
        """The signal that any process received, or None; all processes have to call this."""
        signals = [number for number in world.gather(self.signal) if number is not None]
        if signals:
            self.signal = signals[0]
        return self.signal

    @contextlib.contextmanager
    def obeyed(self, text: str) -> Iterator[None]:
        """Inside, a signal ends the process at once, with `text` and the usual exit code."""
        self._text = text
        try:
            yield
        finally:
            self._text = None

    @contextlib.contextmanager
    def ends_waiting(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped`: nobody has to wait for data that may never come."""
        self._is_waiting = True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self._is_waiting = False

    def _note(self, number: int, _: object) -> None:
        self.signal = int(number)
        if self._is_waiting:
            raise Stopped
        if self._text is not None:
            print(f"stopped by signal {self.signal} {self._text}", flush=True)
            raise SystemExit(128 + self.signal)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


class Clock:
    """Says when the next checkpoint is due."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.last = time.monotonic()

    def is_due(self) -> bool:
        """Whether the minutes have passed since the last checkpoint that this clock asked for."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True

"""What goes wrong in a training: signals, steps that are not finite, the clock of checkpoints."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Guarded(nn.Module):
    """A model that notes a `FloatingPointError` as `problem` and returns no losses, rather than raise it.

    Raised inside DistributedDataParallel by one process alone, it would leave that one in a state of its own.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.problem = model, None

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The model's losses, or an empty dict."""
        try:
            self.problem = None
            return self.model(*inputs)
        except FloatingPointError as error:
            self.problem = str(error)
            return {}


class StopSignal:
    """Within `with`, SIGTERM (pre-emption) and SIGINT (Ctrl-C) are noted rather than obeyed; a second Ctrl-C is obeyed.

    After a stop they stay noted until the process ends: torchrun sends SIGTERM to all as soon as one has ended.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items() if self.signal is None else ():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def obeyed(self, text: str) -> Iterator[None]:
        """Within it a signal ends the process at once, with `text` and the conventional exit status."""
        self._at_once, self._text = True, text
        yield
        self._at_once = False

    def _note(self, number: int, _: object) -> None:
        self.signal = int(number)
        if self._at_once:
            print(f"stopped by signal {self.signal} {self._text}", flush=True)
            raise SystemExit(128 + self.signal)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


class Clock:
    """Says when `minutes` have passed since the last restart."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """From now on."""
        self.since = time.monotonic()

    def is_due(self) -> bool:
        """Whether the minutes have passed."""
        return time.monotonic() - self.since >= self.seconds

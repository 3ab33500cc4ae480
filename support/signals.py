"""Signals that ask a training run to stop: it finishes its step and saves first."""

import signal
import sys
import threading
import time
from typing import Any

SAME_REQUEST_S = 1.0  # torchrun passes Ctrl-C on to processes that the terminal has told already


class StopSignal:
    """Inside `with`, signals that end a process are noted, not obeyed.

    They are SIGTERM and SIGUSR1 (pre-emption, of Slurm and others), SIGINT (Ctrl-C) and SIGHUP.
    Another one, at least a second later, is obeyed at once. SIGHUP (the terminal was closed) stays
    ignored where it is ignored already, as with `nohup`.

    Attributes:
        number: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._time = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread gets signals, and may ask for them
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has not all
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number is None:
            self.number, self._time = int(number), time.monotonic()
        elif time.monotonic() - self._time > SAME_REQUEST_S:
            sys.exit(128 + number)

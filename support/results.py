"""Results that survive: images that fail alone, and files that are either old or whole.

A run over thousands of images meets a damaged one, a full disk, or a user who presses Ctrl-C. None
of them should cost what was done before. So an error becomes a value (`Failure`) in the place of
one image's result, and no file is touched before everything that goes into it has been written.
"""

import contextlib
import errno
import json
import math
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.utils.data import Dataset

from support.errors import UserError, first_line
from support.loader import make_loader

Item = tuple[Tensor, dict[str, Any]]  # an image and what belongs to it


# --- images that fail alone ---


@dataclass(frozen=True)
class Failure:
    """Why there is no result for an image. A worker process can send it as it is."""

    reason: str  # one line
    trace: str  # the stack trace of an error in the program; empty for a damaged file and the like

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """The failure that an exception stands for."""
        if isinstance(error, UserError):
            return cls(str(error), "")
        if isinstance(error, OSError) and error.filename is not None:  # of the system, not a bug
            return cls(f"{error.filename}: {error.strerror}", "")
        trace = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {first_line(error)}", trace)

    def about(self, name: object) -> str:
        """The reason; behind `name` if it is a bug's, which does not say what it is about."""
        return f"{name}: {self.reason}" if self.trace else self.reason


class _Attempts(Dataset):
    """A data set in which an image that cannot be loaded is a `Failure`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor | Failure, dict[str, Any]]:
        try:
            return self.dataset[index]
        except Exception as error:  # whatever it is, the other images can still be loaded
            return Failure.of(error), {}


def load_tolerantly(
    dataset: Dataset, batches: Sequence[Sequence[int]], workers: int, batch_bytes: int = 0
) -> Iterator[list[Item | Failure]]:
    """Loads a data set in batches of (image, target), in which failures take the place of some.

    If a worker process is killed, this one loads what is left.

    Args:
        dataset: of (image, target), a tensor and a dict.
        batches: the indices of each.
        workers, batch_bytes: as for `make_loader`.
    """
    loader = make_loader(_Attempts(dataset), batches, workers, batch_bytes=batch_bytes)
    num_loaded = 0
    try:
        for images, targets in loader:
            num_loaded += 1
            yield [
                image if isinstance(image, Failure) else (image, target)
                for image, target in zip(images, targets, strict=True)
            ]
    except RuntimeError as error:
        if not _is_killed_worker(error):
            raise
        warnings.warn(
            "a process that loads images was killed, often because the memory is full; going on "
            "without such processes (--workers 0)",
            stacklevel=2,
        )
        yield from load_tolerantly(dataset, batches[num_loaded:], workers=0)


def _is_killed_worker(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def undisturbed(run: Callable[[], Any]) -> Any:
    """Runs a function, and once more if the news that a worker was killed interrupts it.

    PyTorch raises that error right where the main process happens to be.
    """
    try:
        return run()
    except RuntimeError as error:
        if not _is_killed_worker(error):
            raise
    return run()


def attempt(
    run: Callable[[list[Item]], Sequence[Any]], items: Sequence[Item | Failure]
) -> list[Any]:
    """A result for each item, or a failure for each one that fails.

    Items that are failures already stay what they are. If `run` fails on the others together, it
    gets them one by one, so that a single image, or too little memory for all of them at a time,
    does not cost the rest of the batch.

    Args:
        run: items -> as many results.
        items: a batch.
    """
    sound = [item for item in items if not isinstance(item, Failure)]
    failure = None
    results: list[Any] = []
    try:
        if sound:
            results = list(undisturbed(lambda: run(sound)))
    except Exception as error:
        failure = Failure.of(error)

    # After the `except` block: inside it, the stack trace would keep the memory of what failed.
    if failure is not None and len(sound) == 1:
        results = [failure]
    elif failure is not None:
        results = [attempt(run, [item])[0] for item in sound]

    remaining = iter(results)
    return [item if isinstance(item, Failure) else next(remaining) for item in items]


def raise_bug(failures: Sequence[Failure]) -> None:
    """For when all images failed: if the program is to blame for one of them, it needs a debugger.

    Raises:
        RuntimeError: with the stack trace of that one.
    """
    for failure in failures:
        if failure.trace:
            raise RuntimeError(
                f"all {len(failures)} images failed, one of them so:\n{failure.trace}"
            )


def would_fail_again(error: Exception) -> bool:
    """Whether the next file could not be written, either; because the disk is full, say."""
    reasons = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    return isinstance(error, OSError) and error.errno in reasons


# --- files that are either old or whole ---


def make_folder(path: Path) -> None:
    """Creates a folder for results, and makes sure that files can be written there.

    Raises:
        OSError: they cannot; better now than after an hour of work.
    """
    with _naming(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path / "probe")
        probe.touch()
        probe.unlink()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; if nothing fails, that file then takes the name `path`."""
    temporary = _temporary(path)
    try:
        with _naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replaces a file by one that holds a value as JSON, in UTF-8."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        temporary.write_bytes(_encode(text + "\n"))


class JsonList:
    """A JSON file of records, one per line, that is whole no matter how the run ends.

    Records go to a temporary file as they come. When the `with` block ends, even by an error or by
    Ctrl-C, that file takes the name `path`. Until then an earlier file stays as it is; it also
    stays if an error ends the block before there is any record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.temporary = _temporary(path)
        self.end = 0  # of the last whole record, in bytes

    def __enter__(self) -> Self:
        with _naming(self.path):
            if self.path.is_dir():  # better now than at the end
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            # Without a buffer, so that even a process that is killed leaves its records behind.
            self.file = open(self.temporary, "wb", buffering=0)
        return self

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record.

        Raises:
            OSError: it cannot be written, as on a full disk; the records before it are kept.
            ValueError: it holds something that JSON does not have, such as NaN.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self.end += self._write((",\n" if self.end else "[\n") + line)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A signal would leave the records under the temporary name. All that it could spare the
        # user is this moment.
        with _handled_by(lambda *_: None, _STOP_SIGNALS):
            self._close(is_kept=self.end > 0 or kind is None)

    def _close(self, is_kept: bool) -> None:
        """Ends the list, and gives the file its name or removes it."""
        try:
            self._write("\n]\n" if self.end else "[]\n")
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.path}: could not be written ({error.strerror}); the results are in "
                f"{self.temporary}, without the last bracket"
            ) from None
        finally:
            self.file.close()
        if is_kept:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()

    def _write(self, text: str) -> int:
        """Writes behind the last whole record; returns the number of bytes."""
        data = _encode(text)
        with _naming(self.path):
            # If the last write was interrupted, a part of a record may be there.
            self.file.seek(self.end)
            self.file.truncate()
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Lets errors of the system name `path`, and not a temporary file or none at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _temporary(path: Path) -> Path:
    """A path in the same folder that no other process writes to.

    The name is cut, so that the file system takes it whenever it takes that of `path`.
    """
    return path.with_name(f".{path.name[:32]}.{os.getpid()}.tmp")


def _encode(json_text: str) -> bytes:
    # A file name that is not UTF-8 holds lone surrogates. Python's escape of such a character is
    # that of JSON as well, so that whoever reads the file gets the same name back.
    return json_text.encode("utf-8", "backslashreplace")


# --- signals ---

# They ask a process to end: from Ctrl-C; from a scheduler, `timeout` or `docker stop`; and from a
# terminal that is closed, which Windows does not have.
_STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_SAME_REQUEST_S = 1.0  # signals that come this soon after the first ask for the same


@contextlib.contextmanager
def signals_like_ctrl_c() -> Iterator[None]:
    """Inside, all signals that ask a process to end raise KeyboardInterrupt, as Ctrl-C does.

    Those that are handled or ignored already stay so, as SIGHUP does with `nohup`. Of several at a
    time only the first counts: the others would interrupt what the KeyboardInterrupt sets off.
    """
    stopped = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal stopped
        if time.monotonic() - stopped > _SAME_REQUEST_S:
            stopped = time.monotonic()
            raise KeyboardInterrupt(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    with _handled_by(stop, [n for n in _STOP_SIGNALS if signal.getsignal(n) in usual]):
        yield


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> Iterator[None]:
    """Inside, these signals go to a handler."""
    before = {}
    try:
        for number in numbers:
            with contextlib.suppress(ValueError):  # only the main thread may
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def signal_of(stop: KeyboardInterrupt) -> signal.Signals:
    """The signal that a KeyboardInterrupt stands for."""
    return signal.Signals(stop.args[0] if stop.args else signal.SIGINT)


def describe_signal(number: int) -> str:
    """What a user calls it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

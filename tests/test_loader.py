"""Loading: what travels from a worker, and what happens if it cannot."""

import os
import re
import shutil
import signal
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import python

from support import loader
from support.cli import run_main
from support.errors import UserError
from support.loader import make_loader, workers_that_fit


class Mixed(torch.utils.data.Dataset):
    """Images with 0, 1, … objects."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        boxes = torch.rand(index % 4, 4)
        return torch.rand(3, 5, 9), {"boxes": boxes, "labels": torch.arange(index % 4)}


def test_a_low_limit_of_open_files_is_enough() -> None:
    """Tensors that were shared as open files would need about 600 of them here."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from test_loader import Mixed, make_loader\n"
        "kept = list(make_loader(Mixed(), [list(range(100)), list(range(100, 200))], workers=1))\n"
        "assert sum(len(images) for images, _ in kept) == 200"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


def test_fewer_workers_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "usable_workers", lambda workers: workers)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert workers_that_fit(2, batch_bytes=7_000_000) == 2
    for batch_bytes, processes, fitting, words in (
        (7_000_000, 1, 2, r"58 MB free, 4 workers need up to 112 MB .* using 2 workers"),
        (70_000_000, 1, 0, "using 0 workers.*--shm-size"),
        (7_000_000, 2, 1, "29 MB free.* using 1 workers"),  # they share it
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        with pytest.warns(UserWarning, match=words) as said:
            assert workers_that_fit(4, batch_bytes) == fitting
        assert len(said) == 1


class Failing(Mixed):
    def __init__(self, error: Exception | None):
        self.error = error

    def __getitem__(self, index: int) -> None:
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)  # as by a system without memory


def test_what_a_worker_fails_on_is_one_line_and_a_bug_keeps_its_trace(capfd) -> None:
    for error, words in (
        (None, r"[^\n]*\(DataLoader worker .*\)[^\n]* fewer --workers"),
        (UserError("a.jpg: cannot be read"), r"a\.jpg: cannot be read"),
    ):
        failing = make_loader(Failing(error), [[0], [1]], workers=1)
        assert run_main(lambda loader=failing: list(loader) and 0, "x.py") == 2
        assert re.fullmatch(rf"x\.py: {words}\n", capfd.readouterr().err)
    buggy = make_loader(Failing(RuntimeError("ours to mend")), [[0]], workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)Original Traceback.*ours to mend"):
        run_main(lambda: list(buggy) and 0, "x.py")

"""Loading: what travels from a worker, and what happens if it cannot."""

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from support import loader
from support.cli import run_main
from support.errors import UserError
from support.loader import make_loader, workers_that_fit


class Mixed(torch.utils.data.Dataset):
    """Images of odd sizes with 0, 1, … objects. Image 0 has channels last in memory."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, (3, 5 + index % 7, 9), dtype=torch.uint8, generator=generator)
        pixels = pixels if index else pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        boxes = torch.rand(index % 4, 4, generator=generator)
        return pixels, {"boxes": boxes, "labels": torch.arange(index % 4), "image_id": 1000 + index}


def test_a_batch_from_a_worker_is_the_batch_itself() -> None:
    batches = [[0, 3], [7, 6, 5], [1]]
    loaded = make_loader(Mixed(), batches, workers=1)
    assert loaded.num_workers == 1
    for indices, (images, targets) in zip(batches, loaded, strict=True):
        for index, image, target in zip(indices, images, targets, strict=True):
            pixels, expected = Mixed()[index]
            assert torch.equal(image, pixels) and image.stride() == pixels.stride()
            assert target.keys() == expected.keys() and target["image_id"] == 1000 + index
            assert torch.equal(target["boxes"], expected["boxes"])
            assert torch.equal(target["labels"], expected["labels"])


def test_a_low_limit_of_open_files_is_enough() -> None:
    """Tensors that were shared as open files would need about 600 of them here."""
    script = (
        "from test_loader import Mixed, make_loader\n"
        "kept = list(make_loader(Mixed(), [list(range(100)), list(range(100, 200))], workers=1))\n"
        "assert sum(len(images) for images, _ in kept) == 200"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    limited = f"ulimit -n 64 && exec '{sys.executable}' -c '{script}'"
    done = subprocess.run(["sh", "-c", limited], env=env, capture_output=True, timeout=200)
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
    def __init__(self, fail: Callable[[], None]):
        self.fail = fail

    def __getitem__(self, index: int) -> None:
        self.fail()


def get_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as by a system without memory


def refuse() -> None:
    raise UserError("a.jpg: cannot be read as an image")


def crash() -> None:
    raise RuntimeError("ours to mend")


KILLED = r"a process that loads images was killed \(.*\).*; give fewer --workers"


@pytest.mark.parametrize(
    ("fail", "words"), [(get_killed, KILLED), (refuse, r"a\.jpg: cannot be read as an image")]
)
def test_what_a_worker_fails_on_is_one_line(fail: Callable, words: str, capfd) -> None:
    failing = make_loader(Failing(fail), [[0], [1]], workers=1)
    assert run_main(lambda: list(failing) and 0, "x.py") == 2
    assert re.fullmatch(rf"x\.py: {words}\n", capfd.readouterr().err)


def test_a_bug_in_a_worker_keeps_its_trace() -> None:
    buggy = make_loader(Failing(crash), [[0]], workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)Original Traceback.*ours to mend"):
        run_main(lambda: list(buggy) and 0, "x.py")

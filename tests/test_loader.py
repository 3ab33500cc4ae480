"""Loading: what travels from a worker, and what happens if it cannot."""

import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU

from support import loader
from support.errors import LoadingFailed, UserError
from support.faults import Clock, StopSignal
from support.loader import GroupedBatches, fetch, make_loader, workers_that_fit


class Mixed(torch.utils.data.Dataset):
    """Items of every kind that a batch may hold: odd sizes and strides, no objects, no tensors."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        rng = np.random.default_rng(index)
        pixels = torch.from_numpy(rng.integers(0, 256, (5 + index, 7, 3), dtype=np.uint8))
        target = {
            "boxes": torch.from_numpy(rng.random((index, 4), dtype=np.float32)),
            "labels": torch.arange(index),
            "size_hw": (5 + index, 7),
            "note": None,
        }
        image = pixels.permute(2, 0, 1) if index else None  # channels last in memory
        return image, target


def test_a_batch_from_a_worker_is_the_batch_itself() -> None:
    batches = [[0, 3], [2, 1]]
    plain = list(make_loader(Mixed(), batches, workers=0))
    packed = list(make_loader(Mixed(), batches, workers=1))
    for (images, targets), (other_images, other_targets) in zip(plain, packed, strict=True):
        for image, other in zip(images, other_images, strict=True):
            if image is None:
                assert other is None
            else:
                assert torch.equal(image, other) and image.stride() == other.stride()
        for target, other in zip(targets, other_targets, strict=True):
            assert target.keys() == other.keys()
            assert torch.equal(target["boxes"], other["boxes"])
            assert torch.equal(target["labels"], other["labels"])
            assert other["labels"].dtype == torch.int64 and other["note"] is None
            assert target["size_hw"] == other["size_hw"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_a_batch_from_a_worker_is_one_open_file() -> None:
    batches = [[1, 2, 3] * 40, [3]]
    iterator = iter(make_loader(Mixed(), batches, workers=1))
    before = len(os.listdir("/proc/self/fd"))
    batch = next(iterator)
    assert len(batch[0]) == 120
    assert len(os.listdir("/proc/self/fd")) <= before + 12  # pipes of the worker among them


def test_fewer_workers_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
    assert workers_that_fit(2, batch_bytes=7_000_000) == 2
    with pytest.warns(UserWarning, match=r"58 MB free, 4 workers need up to 112 MB.*using 2"):
        assert workers_that_fit(4, batch_bytes=7_000_000) == 2
    with pytest.warns(UserWarning, match="using 0 workers.*--shm-size"):
        assert workers_that_fit(4, batch_bytes=70_000_000) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="29 MB free.*using 1 workers"):
        assert workers_that_fit(2, batch_bytes=7_000_000) == 1


@pytest.mark.parametrize("text", ["0", "", "two", "-1"])
def test_a_number_of_processes_that_is_none_is_one(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    monkeypatch.setattr(loader.os.path, "isdir", lambda path: path == "/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
    assert workers_that_fit(2, batch_bytes=7_000_000) == 2


def test_linux_without_shared_memory_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.os.path, "isdir", lambda path: False)
    monkeypatch.setattr(loader.sys, "platform", "linux")
    with pytest.warns(UserWarning, match="no /dev/shm.*--workers 0"):
        assert workers_that_fit(2, batch_bytes=1) == 0
    monkeypatch.setattr(loader.sys, "platform", "darwin")
    assert workers_that_fit(2, batch_bytes=1) == 2


def test_a_batch_that_does_not_fit_into_shared_memory_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker is forked, so it has the patched function too."""

    def full(*_: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match="shared memory .*No space.*fewer --workers.*--shm-size"):
        list(make_loader(Mixed(), [[1]], workers=1))


class Endless(torch.utils.data.Dataset):
    """An image that never comes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        time.sleep(600)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_is_obeyed_while_a_batch_is_waited_for(workers: int) -> None:
    batches = GroupedBatches(np.array([[2, 3], [2, 3]]), 2, seed=0)
    endless = make_loader(Endless(), batches, workers, reseeded=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with StopSignal() as stop:
            timer.start()
            assert list(fetch(endless, CPU, 0, 0, stop, Clock(1))) == []
            assert stop.signal == signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Decoder(torch.utils.data.Dataset):
    """Reads an image as data.py does: whatever goes wrong with a file becomes a `UserError`."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except Exception as error:
            raise UserError("a.jpg: cannot be read as an image") from error


def test_ctrl_c_while_an_image_is_decoded_does_not_blame_the_image() -> None:
    batches = GroupedBatches(np.array([[2, 3], [2, 3]]), 2, seed=0)
    before = signal.getsignal(signal.SIGINT)
    try:
        with StopSignal() as stop:
            loader = make_loader(Decoder(), batches, workers=0, reseeded=True)
            assert list(fetch(loader, CPU, 0, 0, stop, Clock(1))) == []
            assert stop.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Deadly(torch.utils.data.Dataset):
    """An image whose worker gets killed, as by a system without memory."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line() -> None:
    batches = GroupedBatches(np.array([[2, 3], [2, 3]]), 2, seed=0)
    deadly = make_loader(Deadly(), batches, workers=1, reseeded=True)
    with StopSignal() as stop, pytest.raises(LoadingFailed) as error:
        list(fetch(deadly, CPU, 0, 0, stop, Clock(1)))
    message = str(error.value)
    assert "was killed" in message and "--resume auto" in message and "\n" not in message


class Bug(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        raise KeyError("a bug of ours")


def test_a_bug_in_a_worker_keeps_its_trace() -> None:
    batches = GroupedBatches(np.array([[2, 3], [2, 3]]), 2, seed=0)
    with StopSignal() as stop, pytest.raises(KeyError, match="Original Traceback"):
        list(fetch(make_loader(Bug(), batches, 1, reseeded=True), CPU, 0, 0, stop, Clock(1)))

"""Loads batches: which images each process takes, in which order, and the workers that decode them.

The images of a step depend only on (seed, epoch, step), and process r of n takes every n-th of
them, starting with the r-th. How an image is augmented depends only on (seed, epoch, image), no
matter which process or worker does it. So one process and eight see the same batches, and a run
that is resumed sees what it would have seen.

Wide and tall images are shuffled separately, in batches of the whole effective size. The authors'
code groups them too, but separately in each process, in order of arrival, so that their order
depends on the number of processes.
"""

import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from support.distributed import World
from support.errors import LoadingFailed, UserError, first_line
from support.faults import Clock, Stopped, StopSignal

Target = dict[str, Any]
PREFETCHED_BATCHES = 4  # per worker


class Part(NamedTuple):
    """The images of a batch that go through the model at the same time."""

    images: list[Tensor]
    targets: list[Target]
    is_last: bool


class Batch(NamedTuple):
    """What one process trains on in one step, and what all processes agreed on beforehand."""

    images: list[Tensor]  # each (3, H, W) uint8
    targets: list[Target]  # see data.py
    num_objects: float  # in the whole batch, over all processes
    num_images: int = 0  # in the whole batch, over all processes
    is_save_due: bool = False  # a checkpoint is due after this step
    started: float = 0.0  # time.perf_counter() before the batch was loaded
    data_seconds: float = 0.0  # how long this process waited for it

    @property
    def image_ids(self) -> list[int]:
        """Of this process's images."""
        return [target["image_id"] for target in self.targets]

    def parts(self, size: int | None) -> Iterator[Part]:
        """The batch in parts of at most `size` images; None is the whole batch."""
        size = size or len(self.images)
        for first in range(0, len(self.images), size):
            end = first + size
            is_last = end >= len(self.images)
            yield Part(self.images[first:end], self.targets[first:end], is_last)


def fetch(
    loader: DataLoader, world: World, epoch: int, first: int, stop: StopSignal, clock: Clock
) -> Iterator[Batch]:
    """The batches of an epoch from number `first` on; ends early if any process gets a signal.

    Before each step the processes exchange how many objects they have, whether any of them was
    asked to stop or failed to load an image, and whether a checkpoint is due.

    Raises:
        LoadingFailed: in all processes, if one of them cannot load an image.
    """
    loader.batch_sampler.seek(epoch, first)
    batches = iter(loader)
    for _ in range(first, len(loader.batch_sampler)):
        started = time.perf_counter()
        images, targets, error = [], [], None
        try:
            with stop.ends_waiting():
                images, targets = next(batches)
        except Stopped:
            pass  # the others hear of it below
        except (UserError, OSError, RuntimeError) as problem:  # only this process has met it
            if stop.signal is None:  # otherwise the workers may have got the signal too
                error = LoadingFailed(loading_problem(problem))
        data_seconds = time.perf_counter() - started

        num_objects, num_images, stops, saves, errors = world.sum(
            sum(len(target["labels"]) for target in targets),
            len(images),
            stop.signal is not None,
            world.is_main and clock.is_due(),
            error is not None,
        )
        if errors:
            world.raise_together(error, LoadingFailed)
        if stops:
            return
        yield Batch(
            images, targets, num_objects, int(num_images), bool(saves), started, data_seconds
        )


def loading_problem(error: Exception) -> str:
    """What went wrong and what to do, in one line, for an error that a loader raised.

    Raises:
        Exception: the error itself, if it is none that a user can do something about.
    """
    if isinstance(error, UserError):
        return str(error)
    text = first_line(error)
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed" in text):
        return (
            f"a process that loads images was killed ({text}), often because the memory is full; "
            "continue with --resume auto and fewer --workers"
        )
    if "open files" in str(error) or "ancdata" in str(error):
        return f"too many open files ({text}); raise the limit (ulimit -n) or give fewer --workers"
    if isinstance(error, OSError):
        return text
    raise error


class GroupedBatches(Sampler):
    """This process's share of every batch of an epoch, as (index, augmentation seed) pairs.

    All batches but at most one hold only wide or only tall images, so that less is padding. What
    does not fill a batch is left out; the next epoch leaves out other images. A data set smaller
    than one batch is one smaller batch.

    Args:
        sizes_hw: (len, 2), height and width of each image.
        batch_size: of the whole batch, over all processes.
        seed: of the order and of the augmentation.
        rank: of this process.
        world_size: number of processes that share each batch.

    Raises:
        UserError: the batch cannot be shared equally, or not even one can be filled.
    """

    def __init__(
        self,
        sizes_hw: np.ndarray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise UserError(
                f"--batch-size {batch_size} cannot be shared equally by {world_size} processes"
            )
        if len(sizes_hw) < batch_size and world_size > 1:
            raise UserError(
                f"{len(sizes_hw)} images do not fill one batch of {batch_size}; give a smaller "
                "--batch-size"
            )
        self.is_wide = sizes_hw[:, 1] > sizes_hw[:, 0]
        self.batch_size = min(batch_size, len(sizes_hw))
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return len(self.is_wide) // self.batch_size

    @property
    def share(self) -> int:
        """Images of a batch that this process takes."""
        return self.batch_size // self.world_size

    def seek(self, epoch: int, first: int) -> None:
        """Makes the next iteration start at batch number `first` of `epoch`."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.is_wide))

        # Whole batches of wide images, whole batches of tall ones, and one mixed batch of the rest.
        whole, rest = [], []
        for group in (order[self.is_wide[order]], order[~self.is_wide[order]]):
            end = len(group) - len(group) % self.batch_size
            whole.append(group[:end])
            rest.append(group[end:])
        kept = np.concatenate(whole + rest)[: len(self) * self.batch_size]
        batches = kept.reshape(len(self), self.batch_size)

        for batch in batches[rng.permutation(len(self))][self.first :]:
            share = batch[self.rank :: self.world_size].tolist()
            yield [(index, self._augmentation_seed(index)) for index in share]

    def _augmentation_seed(self, index: int) -> int:
        sequence = np.random.SeedSequence((self.seed, self.epoch, index))
        return int(sequence.generate_state(1)[0])


class Reseeded(Dataset):
    """A data set indexed by (index, seed): its random transforms draw from that seed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        index, seed = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # the CPU's alone: the transforms run there
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(state)  # the model's dropout draws from the same generator


class _Guarded(Dataset):
    """A data set whose `UserError`s are items, so that they travel from a worker as they are.

    A DataLoader would raise them anew with the worker's whole stack trace as their message.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


class _Packed(NamedTuple):
    """A batch on its way from a worker to the main process: all of its tensors as one.

    Each tensor that travels is an open file and a piece of shared memory; a batch of 128 images
    would be 384 of them, more than some systems allow.
    """

    buffer: Tensor  # (bytes,) uint8
    layout: Any  # the batch, with a `_Slot` in place of every tensor


class _Slot(NamedTuple):
    """Where a tensor lies in the buffer."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor, which shares the buffer's memory."""
        size = math.prod(self.shape) * self.dtype.itemsize
        values = buffer[self.start : self.start + size].view(self.dtype)
        return values.as_strided(self.shape, self.stride, values.storage_offset())


def _pack(batch: Any) -> _Packed:
    """Raises RuntimeError if the batch does not fit into shared memory."""
    tensors, slots, end = [], [], 0

    def lay_out(value: Any) -> Any:
        nonlocal end
        if isinstance(value, list | tuple):
            return type(value)(map(lay_out, value))
        if isinstance(value, dict):
            return {key: lay_out(item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        value = value.as_subclass(Tensor)
        # The strides that a copy gets: the order of the dimensions in memory, without gaps.
        slots.append(_Slot(end, value.dtype, tuple(value.shape), torch.empty_like(value).stride()))
        tensors.append(value)
        end += -(-value.nbytes // 16) * 16  # the next one begins at a multiple of 16 bytes
        return slots[-1]

    layout = lay_out(batch)
    buffer = torch.empty(end, dtype=torch.uint8).share_memory_()
    for tensor, slot in zip(tensors, slots, strict=True):
        slot.view(buffer).copy_(tensor)
    return _Packed(buffer, layout)


def _unpack(packed: _Packed) -> Any:
    def fill(value: Any) -> Any:
        if isinstance(value, _Slot):
            return value.view(packed.buffer)
        if isinstance(value, list | tuple):
            return type(value)(map(fill, value))
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return value

    return fill(packed.layout)


def _collate(items: Sequence[Any]) -> Any:
    """`collate`, packed if this is a worker; or the first `UserError` among the items.

    The queue to the main process would put the batch into shared memory later, in a thread. There,
    a full /dev/shm loses the batch, and the main process waits for it forever.
    """
    for item in items:
        if isinstance(item, UserError):
            return item
    batch = collate(items)
    if get_worker_info() is None:
        return batch
    try:
        return _pack(batch)
    except RuntimeError as error:
        return UserError(
            f"a batch does not fit into shared memory ({first_line(error)}); give fewer --workers "
            "or a larger /dev/shm (docker run --shm-size=2g)"
        )


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """(image, target) pairs -> a list of images and a list of targets.

    Lists, because images differ in size; the model pads them.
    """
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


class Loader(DataLoader):
    """A DataLoader whose `UserError`s are those of the data set, with no stack trace in them."""

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Target]]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield _unpack(batch) if isinstance(batch, _Packed) else batch


def usable_workers(workers: int) -> int:
    """At most one worker per processor that this process may run on: more only get in the way."""
    return min(workers, processors())


def processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def workers_that_fit(workers: int, batch_bytes: int) -> int:
    """As many of the workers as shared memory has room for; fewer come with a warning.

    A batch travels from a worker to the main process through /dev/shm, which has only 64 MB in a
    container of Docker's defaults.

    Args:
        workers: of this process.
        batch_bytes: the most that a batch takes.
    """
    if workers == 0:
        return 0
    if not os.path.isdir("/dev/shm"):
        if sys.platform != "linux":  # macOS and Windows have other ways
            return workers
        warnings.warn(
            "there is no /dev/shm, which workers need: going on with --workers 0", stacklevel=2
        )
        return 0
    # The processes of torchrun share it, and it tells their number. A tenth is left for others.
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = max(1, int(told)) if told.isdecimal() else 1
    free = 0.9 * shutil.disk_usage("/dev/shm").free / processes
    fitting = min(workers, int(free // max(1, PREFETCHED_BATCHES * batch_bytes)))
    if fitting < workers:
        warnings.warn(
            f"/dev/shm has {free / 1e6:.0f} MB free, {workers} workers need up to "
            f"{workers * PREFETCHED_BATCHES * batch_bytes / 1e6:.0f} MB for the batches they load "
            f"ahead: using {fitting} workers. A larger one is faster (docker run --shm-size=2g)",
            stacklevel=2,
        )
    return fitting


def _start_worker(worker_id: int) -> None:
    """Runs once in every worker.

    Signals that go to the whole process group must not reach a worker: the step that the main
    process finishes still needs it. They are not ignored, because multiprocessing ends the workers
    that are left with SIGTERM and then waits for them.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # Windows has no process groups, and ends workers in another way
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def make_loader(
    dataset: Dataset,
    batches: Sequence | Sampler,
    workers: int,
    reseeded: bool = False,
    batch_bytes: int = 0,
) -> Loader:
    """Batches of images and targets, decoded ahead by workers that stay from epoch to epoch.

    Args:
        dataset: of (image, target).
        batches: yields lists of the data set's indices, or of (index, seed) pairs if `reseeded`.
        workers: processes that load images, at most one per processor; 0 loads them in this one.
        reseeded: augment each image with the seed that comes with its index.
        batch_bytes: the most that a batch takes; fewer workers are used if they do not fit into
            shared memory.

    Returns:
        An iterable of (images, targets), two lists; on a machine with a GPU in pinned memory.
    """
    workers = workers_that_fit(usable_workers(workers), batch_bytes)
    return Loader(
        _Guarded(Reseeded(dataset) if reseeded else dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # of the loader's own draws: the global one is the model's
    )

"""Loads batches: which images each process takes, in which order, and the workers that decode them.

The images of a step depend only on (seed, epoch, step), and process r of n takes every n-th of
them, starting with the r-th. How an image is augmented depends only on (seed, epoch, image), no
matter which process or worker does it. So one process and eight see the same batches, and a run
that is resumed sees what it would have seen.

Wide and tall images are shuffled separately, in batches of the whole effective size. The authors'
code groups them too, but separately in each process, in order of arrival, so that their order
depends on the number of processes.
"""

import os
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from support.distributed import World
from support.errors import UserError

Target = dict[str, Any]
PREFETCHED_BATCHES = 4  # per worker


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
        # The model's dropout draws from the same generator, so its state is put back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: the transforms run there
            return self.dataset[index]


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """(image, target) pairs -> a list of images and a list of targets.

    Lists, because images differ in size; the model pads them.
    """
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def usable_workers(workers: int) -> int:
    """At most one worker per processor that this process may run on: more only get in the way."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(workers, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def workers_that_fit(workers: int, batch_bytes: int) -> int:
    """As many of the workers as there are processors, and as shared memory has room for.

    A batch travels from a worker to the main process through /dev/shm, which has only 64 MB in a
    container of Docker's defaults. A batch that does not fit is lost, and the loader was seen to
    wait for it for a minute without an end (torch 2.14.1).

    Args:
        workers: of this process.
        batch_bytes: the most that a batch takes.
    """
    workers = usable_workers(workers)
    if workers == 0 or not os.path.isdir("/dev/shm"):  # macOS and Windows have other ways
        return workers
    # The processes of torchrun share it. A tenth is left for others.
    free = 0.9 * shutil.disk_usage("/dev/shm").free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
    """Runs once in every worker."""
    # Signals to the whole process group must not reach a worker: the step that the main process
    # finishes still needs it. They are not ignored, because that is how workers are ended.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")  # as in `make_loader`


def make_loader(
    dataset: Dataset,
    batches: Sequence | Sampler,
    workers: int,
    reseeded: bool = False,
    batch_bytes: int = 0,
) -> DataLoader:
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
    workers = workers_that_fit(workers, batch_bytes)
    # Tensors from workers are found by name; otherwise each would be an open file (ulimit -n).
    torch.multiprocessing.set_sharing_strategy("file_system")
    return DataLoader(
        Reseeded(dataset) if reseeded else dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # of the loader's own draws: the global one is the model's
    )


def make_train_loader(
    dataset: Dataset, batch_size: int, seed: int, world: World, workers: int, image_bytes: int
) -> DataLoader:
    """This process's share of the batches; `loader.batch_sampler.seek` chooses where they start.

    Args:
        dataset: of (image, target), with `sizes_hw`.
        batch_size: images per step, over all processes.
        seed: of the order and of the augmentation.
        world: the processes.
        workers: of this process.
        image_bytes: the most that an image takes.
    """
    batches = GroupedBatches(dataset.sizes_hw, batch_size, seed, world.rank, world.size)
    batch_bytes = image_bytes * batches.batch_size // world.size
    return make_loader(dataset, batches, workers, reseeded=True, batch_bytes=batch_bytes)

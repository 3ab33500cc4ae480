"""Batches by shape and process, workers, seeds."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from support.errors import UserError

Target = dict[str, Any]


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Lists, for images differ in size; the model pads them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def usable_workers(workers: int) -> int:
    """At most one worker a processor that this process may run on: more slow one another down."""
    return min(
        workers,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


class GroupedBatches(Sampler):
    """This process's share of every batch of an epoch, as (index, augmentation seed) pairs.

    All batches but at most one hold only wide or only tall images, so that less is padding. What does not fill a batch
    is left out; the next epoch leaves out others. A data set smaller than one batch is one smaller batch.

    Args:
        sizes_hw: (len, 2), height and width of each image.
        batch_size: of the whole batch, over all processes.
        seed: of the order and of the augmentation.
        rank, world_size: which share.

    Raises:
        UserError: the batch cannot be shared equally, or not even one can be filled.
    """

    def __init__(
        self, sizes_hw: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        if batch_size % world_size:
            raise UserError(
                f"--batch-size {batch_size} cannot be shared equally by {world_size} processes"
            )
        if len(sizes_hw) < batch_size and world_size > 1:
            raise UserError(
                f"{len(sizes_hw)} images do not fill one batch of {batch_size}; give a smaller --batch-size"
            )
        self.is_wide = sizes_hw[:, 1] > sizes_hw[:, 0]
        self.batch_size, self.seed = min(batch_size, len(sizes_hw)), seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return len(self.is_wide) // self.batch_size

    def seek(self, epoch: int, first: int) -> None:
        """The next iteration is that of `epoch`, from batch number `first` on."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.is_wide))
        groups = [order[self.is_wide[order]], order[~self.is_wide[order]]]
        # What is over in both groups makes one more batch at most, a mixed one.
        whole = [group[: len(group) - len(group) % self.batch_size] for group in groups]
        rest = np.concatenate(
            [group[len(group) - len(group) % self.batch_size :] for group in groups]
        )
        batches = np.concatenate([*whole, rest])[: len(self) * self.batch_size].reshape(
            len(self), self.batch_size
        )
        for batch in batches[rng.permutation(len(self))][self.first :]:
            share = batch[self.rank :: self.world_size]
            seeds = [
                int(np.random.SeedSequence((self.seed, self.epoch, i)).generate_state(1)[0])
                for i in share
            ]
            yield list(zip(share.tolist(), seeds, strict=True))


class Reseeded(Dataset):
    """A data set indexed by (index, seed): its random transforms draw from that seed and leave no trace."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        index, seed = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # the CPU's alone: the transforms run there
        item = self.dataset[index]
        torch.set_rng_state(state)
        return item


def _leave_the_group(worker_id: int) -> None:
    """Signals to the whole process group pass a worker by: the step that the main process finishes still needs it.

    They are not ignored: multiprocessing ends what is left of its workers with SIGTERM, and then waits for them.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    torch.set_num_threads(1)


def make_loader(
    dataset: Dataset, batches: Sequence | Sampler, workers: int, reseeded: bool = False
) -> DataLoader:
    """Batches of images and targets: workers decode ahead and stay from epoch to epoch, pinned where there is a GPU.

    Args:
        dataset: of (image, target).
        batches: yields lists of the data set's indices; of (index, seed) pairs where `reseeded`.
        workers: processes that load images, at most as many as there are processors; 0 loads them in this one.
    """
    workers = usable_workers(workers)
    return DataLoader(
        Reseeded(dataset) if reseeded else dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_the_group,
        generator=torch.Generator(),  # for the loader's own draws: the global one is the model's
    )

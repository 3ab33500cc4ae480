"""Several processes as one: which images each of them trains on, and what they tell one another.

The recipe is the same at any number of processes. The images of step s of epoch e depend on (seed, e, s) alone, and
process r of n takes every n-th of them from the r-th on. How an image is augmented depends on (seed, e, image) alone,
whichever process or worker does it. So one process and eight see the same batches, and a run that is resumed sees what
it would have seen. Two things depend on the division: padding, which is not masked and is to the largest of the images
that go through at a time, and trained batch norms (`--backbone small`, `--no-freeze-backbone`), whose statistics are of
the images that one process takes at a time.

Deviations (ours | paper | authors' code | why)
    wide and tall images are shuffled apart, in batches of the whole effective size | — | each process fills batches of
        its own as images come | the same grouping, but one that does not depend on the number of processes
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from config import UserError, pick_device
from data import collate, usable_workers


@dataclass(frozen=True)
class World:
    """The processes of a run; one process without torchrun is a world of its own."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes; all of them have to call this."""
        if self.size == 1:
            return list(values)
        # float64: counts stay exact
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def raise_together(self, error: Exception | None) -> None:
        """Ends all processes where one has met an error: its own there, a `UserError` of the same text elsewhere.

        All processes have to call this; without it the others would wait for the one that stopped.
        """
        texts = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if texts:
            raise error or UserError(texts[0])

    def copy_buffers(self, model: nn.Module) -> None:
        """Gives all processes the main one's buffers: the running statistics of trained batch norms."""
        for buffer in model.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; all of them have to call this. The values are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def world(device_name: str) -> Iterator[World]:
    """Joins the processes that torchrun started, each on its own GPU where there are GPUs; else a world of one.

    Args:
        device_name: "auto" or torch's name; under torchrun "cuda" becomes this process's own GPU.

    Raises:
        UserError: the device is not there.
    """
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and device_name in ("auto", "cuda"):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"  # at once: even a look at GPU 0 would take memory there
    device = pick_device(device_name)
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield World(device)
        return
    # A process that waits longer than this for the others gives up: a hang is worse than an error.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    is_done = False
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
        is_done = True
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise UserError(f"lost the other processes, the first error above is the cause ({error})") from None
        raise
    finally:
        # After an error NCCL would wait here for processes that wait for this one; gloo lets go.
        if is_done or device.type != "cuda":
            dist.destroy_process_group()


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

    def __init__(self, sizes_hw: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        if batch_size % world_size:
            raise UserError(f"--batch-size {batch_size} cannot be shared equally by {world_size} processes")
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
        rest = np.concatenate([group[len(group) - len(group) % self.batch_size :] for group in groups])
        batches = np.concatenate([*whole, rest])[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        for batch in batches[rng.permutation(len(self))][self.first :]:
            share = batch[self.rank :: self.world_size]
            seeds = [int(np.random.SeedSequence((self.seed, self.epoch, i)).generate_state(1)[0]) for i in share]
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


def make_loader(dataset: Dataset, batches: Sequence | Sampler, workers: int, reseeded: bool = False) -> DataLoader:
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

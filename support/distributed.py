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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from support.cli import pick_device
from support.errors import UserError


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
        texts = [
            text for text in self.gather(None if error is None else str(error)) if text is not None
        ]
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
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
    )
    is_done = False
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
        is_done = True
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise UserError(
                f"lost the other processes, the first error above is the cause ({error})"
            ) from None
        raise
    finally:
        # After an error NCCL would wait here for processes that wait for this one; gloo lets go.
        if is_done or device.type != "cuda":
            dist.destroy_process_group()

"""Several processes that train as one: their ranks, and the values they exchange.

The recipe is the same with any number of processes. Every loss is divided by the number of objects
in the whole batch, and gradients are summed over the processes, so eight processes compute the
gradient that one process would. Two things still depend on how a batch is divided: padding, which
is not masked and goes up to the largest image that one process takes at a time, and trained batch
norms (`--backbone small`, `--no-freeze-backbone`), whose statistics cover only those images.

A process that fails just ends. torchrun then ends the others.
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

from support.devices import pick_device
from support.errors import UserError, first_line


@dataclass(frozen=True)
class World:
    """The processes of a run; without torchrun, one process is a world of its own."""

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
        # float64, so that counts stay exact.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; all of them have to call this. The values are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def copy_buffers(self, model: nn.Module) -> None:
        """Gives all processes the main one's buffers: the statistics of trained batch norms."""
        for buffer in model.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, 0)


@contextlib.contextmanager
def join_world(device_name: str) -> Iterator[World]:
    """Joins the processes that torchrun started, each on its own GPU if there are GPUs.

    Without torchrun it gives a world of one process.

    Args:
        device_name: "auto" or torch's name; under torchrun "cuda" is this process's own GPU.

    Raises:
        UserError: the device is not there, or the processes cannot be joined.
    """
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and device_name in ("auto", "cuda"):
        # Right away: even a look at GPU 0 would take memory there.
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise UserError(
                "srun has started several processes that do not know of each other; start one per "
                "machine, and in it torchrun (srun --ntasks-per-node=1 torchrun …)"
            )
        yield World(device)
        return

    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        # A process that waits longer than this for the others gives up: better than a hang.
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except (ValueError, RuntimeError) as error:  # a variable is missing, or nobody answers
        raise UserError(
            "RANK is set in the environment, but the processes of a run cannot be joined "
            f"({first_line(error)}); start with torchrun, unset RANK, or check the network"
        ) from None
    yield World(device, dist.get_rank(), dist.get_world_size())
    # Not after an error: NCCL would wait here for processes that wait for this one.
    dist.destroy_process_group()

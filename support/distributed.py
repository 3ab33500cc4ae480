"""Several processes that train as one: their ranks, and the values they exchange.

The recipe is the same with any number of processes. Every loss is divided by the number of objects
in the whole batch, and gradients are summed over the processes, so eight processes compute the
gradient that one process would. Two things still depend on how a batch is divided: padding, which
is not masked and goes up to the largest image that one process takes at a time, and trained batch
norms (`--backbone small`, `--no-freeze-backbone`), whose statistics cover only those images.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.devices import pick_device
from support.errors import NotFinite, UserError, first_line


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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends all processes if one of them meets a `UserError` or an `OSError` inside.

        That process raises its own error, the others a `UserError` with the same text. All of them
        have to get here; without this the others would wait forever for the one that stopped.
        """
        error = None
        try:
            yield
        except (UserError, OSError) as problem:
            error = problem
        self.raise_together(error)

    def raise_together(self, error: Exception | None, kind: type[Exception] = UserError) -> None:
        """What `together` does at its end, for an error that was caught earlier.

        Processes without an error of their own raise one of the given kind.
        """
        texts = [text for text in self.gather(error and str(error)) if text is not None]
        if texts:
            raise error or kind(texts[0])

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
        UserError: the device is not there, the other processes are not, or one of them has died.
    """
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and device_name in ("auto", "cuda"):
        # Right away: even a look at GPU 0 would take memory there.
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.index is not None:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "mps":
        raise UserError(
            "--device mps: several processes need CUDA or the CPU; give --device cpu, or leave out "
            "torchrun"
        )

    # A process that waits longer than this for the others gives up: an error is better than a hang.
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except (ValueError, dist.DistError) as error:  # a variable is missing, or no number
        raise UserError(
            "RANK is set in the environment, but the processes of a run cannot be joined "
            f"({first_line(error)}); start with torchrun, or unset RANK"
        ) from None
    is_done = False
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
        is_done = True
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise UserError(
                f"lost the other processes; the first error above is the cause ({error})"
            ) from None
        raise
    finally:
        # After an error NCCL would wait here for processes that wait for this one; gloo lets go.
        if is_done or device.type != "cuda":
            dist.destroy_process_group()


class _KeepsError(nn.Module):
    """A model that keeps a `FloatingPointError` as `problem` and returns no losses."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.problem: str | None = None

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        self.problem = None
        try:
            return self.model(*inputs)
        except FloatingPointError as error:
            self.problem = str(error)
            return {}


class ParallelModel:
    """`DistributedDataParallel` in which a failed forward pass fails in all processes.

    A process that raised an error in the middle of DistributedDataParallel's forward pass would
    leave it in a state that the others do not share. One that went on alone would wait for the
    others forever. So an error is kept until the forward pass is over, and then raised by all.
    """

    def __init__(self, model: nn.Module, world: World):
        self.world = world
        self.guarded = _KeepsError(model)
        self.replica = self.guarded
        if world.size > 1:
            # Gradients are averaged where they are, without a second copy.
            self.replica = DistributedDataParallel(self.guarded, gradient_as_bucket_view=True)
            # Training does not read the norms' running statistics, and `copy_buffers` gives all
            # processes the main one's before an evaluation: no need to send them in every step.
            # (The argument of this name gives a warning from torch 2.14 on, its new name is not in
            # 2.11. The attribute is in both.)
            self.replica.broadcast_buffers = False

    def __call__(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Any]],
        num_objects: float,
        is_last: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of this process's images.

        Args:
            images, targets, num_objects: see `SparseRCNN.forward`.
            is_last: the next backward pass averages the gradients over the processes. False for all
                parts of a batch but its last: their gradients add up here first.

        Raises:
            NotFinite: in all processes, if the losses of one of them cannot be computed.
        """
        sync_or_not = contextlib.nullcontext()
        if not is_last and self.world.size > 1:
            sync_or_not = self.replica.no_sync()
        with sync_or_not:
            losses = self.replica(images, targets, num_objects)
        if self.world.sum(self.guarded.problem is not None)[0]:
            raise NotFinite(self.guarded.problem)
        return losses

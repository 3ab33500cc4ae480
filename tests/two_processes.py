"""Run by test_distributed.py under torchrun: what each process found goes to the folder given, as rank.pt."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import TINY, objects
from test_evaluate import AlmostRight

from evaluate import evaluate
from shapes import ShapesDataset
from support.distributed import world
from train import Trainer

FROZEN = replace(
    TINY, backbone="resnet18", batch_size=4
)  # frozen norms: no image depends on its batch


def batch() -> tuple[list[torch.Tensor], list[dict]]:
    """Four images of different sizes with 3, 0, 1 and 6 objects."""
    images, targets = [], []
    for i, (count, height, width) in enumerate(
        ((3, 64, 96), (0, 64, 80), (1, 50, 96), (6, 64, 96))
    ):
        generator = torch.Generator().manual_seed(i)
        images.append(
            torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        )
        targets.append(
            {**objects(count, TINY.num_classes, width, height, seed=i), "image_id": 100 + i}
        )
    return images, targets


def spread(model: torch.nn.Module) -> None:
    """Proposals in different places, and class scores that differ: matching is then the same on every machine."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.proposal_boxes[:, :2] = 0.3 + 0.4 * torch.rand(
            len(model.proposal_boxes), 2, generator=generator
        )
        model.proposal_boxes[:, 2:] = 0.2 + 0.4 * torch.rand(
            len(model.proposal_boxes), 2, generator=generator
        )


def gradients(here, micro_batch: int | None, rank: int, size: int) -> dict[str, torch.Tensor]:
    """The gradient of a step on this process's share of the batch, before clipping."""
    trainer = Trainer(
        replace(FROZEN, micro_batch=micro_batch, clip_norm=1e9), here, steps_per_epoch=10
    )
    spread(trainer.model)
    images, targets = batch()
    trainer.model.train()
    trainer.train_step(images[rank::size], targets[rank::size], num_objects=10)
    return {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def poisoned(here, micro_batch: int | None, rank: int, size: int) -> dict:
    """A NaN in one process: all skip the step, the next one is fine, and the run ends after too many in a row."""
    trainer = Trainer(
        replace(FROZEN, max_bad_steps=3, micro_batch=micro_batch), here, steps_per_epoch=10
    )
    images, targets = batch()
    images, targets = images[rank::size], targets[rank::size]
    trainer.model.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    bad_targets = [dict(target) for target in targets]
    if rank == size - 1:
        bad_targets[-1]["boxes"] = bad_targets[-1]["boxes"] * float("nan")
    skipped = trainer.train_step(images, bad_targets, 10)
    unchanged = all(
        torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()
    )
    fine = trainer.train_step(images, targets, 10)
    message = ""
    try:
        for _ in range(5):
            trainer.train_step(images, bad_targets, 10)
    except ValueError as error:
        message = str(error)
    return {"skipped": skipped, "unchanged": unchanged, "loss": fine["loss"], "message": message}


def buffers_after_a_step(here) -> list[float]:
    """The running statistics of trained batch norms, after each process saw other images, made equal."""
    trainer = Trainer(replace(TINY, batch_size=4), here, steps_per_epoch=10)
    images, targets = batch()
    trainer.model.train()
    trainer.train_step(images[here.rank :: here.size], targets[here.rank :: here.size], 10)
    own = sum(buffer.double().sum().item() for buffer in trainer.model.buffers())
    here.copy_buffers(trainer.model)
    return [own, sum(buffer.double().sum().item() for buffer in trainer.model.buffers())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with world("cpu") as here:
        metrics, detections = evaluate(
            AlmostRight(), ShapesDataset("demo", "val", 11), here, batch_size=2, progress=False
        )
        results = {
            "sum": here.sum(here.rank + 1, 0.5),
            "gather": here.gather(("rank", here.rank)),
            "whole": gradients(here, None, here.rank, here.size),
            "parts": gradients(here, 1, here.rank, here.size),
            "poisoned": poisoned(here, None, here.rank, here.size),
            "poisoned_parts": poisoned(here, 1, here.rank, here.size),
            "buffers": buffers_after_a_step(here),
            "metrics": {name: value for name, value in metrics.items() if name != "speed"},
            "detections": detections,
        }
        torch.save(results, Path(sys.argv[1]) / f"{here.rank}.pt")

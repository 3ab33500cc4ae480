"""test_distributed.py runs this under torchrun; each process writes what it found to RANK.pt."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from conftest import TINY, AlmostRight, new_training, objects, picture, take_step

from config import Config
from evaluate import evaluate
from shapes import ShapesDataset
from support.distributed import World, join_world

# Frozen norms: no image depends on its batch.
FROZEN = replace(TINY, backbone="resnet18", batch_size=4)


def share(world: World) -> tuple[list[torch.Tensor], list[dict]]:
    """What this process takes of four images of different sizes, with 3, 0, 1 and 6 objects."""
    images, targets = [], []
    sizes = ((3, 64, 96), (0, 64, 80), (1, 50, 96), (6, 64, 96))
    for i, (count, height, width) in enumerate(sizes):
        images.append(picture(height, width, seed=i))
        target = objects(count, TINY.num_classes, width, height, seed=i)
        targets.append({**target, "image_id": 100 + i})
    return images[world.rank :: world.size], targets[world.rank :: world.size]


def spread(model: torch.nn.Module) -> None:
    """Puts the proposals into different places, so that matching is the same on every machine."""
    rng = torch.Generator().manual_seed(5)
    where = torch.rand(2, len(model.proposal_boxes), 2, generator=rng)
    centres, sides = 0.3 + 0.4 * where[0], 0.2 + 0.4 * where[1]
    model.proposal_boxes.data.copy_(torch.cat((centres, sides), dim=1))


def gradients(world: World, micro_batch: int | None) -> dict[str, torch.Tensor]:
    """The gradient of a step on this process's share of the batch, before clipping."""
    training = new_training(replace(FROZEN, micro_batch=micro_batch, clip_norm=1e9), world)
    spread(training.model)
    take_step(training, *share(world), 10)
    parameters = training.model.named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def poisoned(world: World, config: Config) -> dict:
    """A NaN in the image of one process: all skip the step, and the next one is fine."""
    training = new_training(config, world)
    images, targets = share(world)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    bad_images = [image / 255 for image in images]
    if world.rank == world.size - 1:
        bad_images[-1] = bad_images[-1] * float("nan")
    skipped = take_step(training, bad_images, targets, 10)
    state = training.model.state_dict()
    changed = [name for name, value in state.items() if not torch.equal(value, before[name])]
    fine = take_step(training, images, targets, 10)
    return {"skipped": skipped["grad_norm"], "changed": changed, "loss": fine["loss"]}


def buffers_after_a_step(world: World) -> list[float]:
    """Running statistics after each process saw other images, and after they were made equal."""
    training = new_training(replace(TINY, batch_size=4), world)
    take_step(training, *share(world), 10)
    own = sum(buffer.double().sum().item() for buffer in training.model.buffers())
    world.copy_buffers(training.model)
    return [own, sum(buffer.double().sum().item() for buffer in training.model.buffers())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        metrics, detections = evaluate(
            AlmostRight(), ShapesDataset("demo", "val", 11), world, batch_size=2
        )
        results = {
            "sum": world.sum(world.rank + 1, 0.5),
            "gather": world.gather(("rank", world.rank)),
            "whole": gradients(world, None),
            "parts": gradients(world, 1),
            "poisoned": poisoned(world, FROZEN),
            # Trained batch norms too, whose statistics change in the forward pass.
            "poisoned_parts": poisoned(world, replace(TINY, batch_size=4, micro_batch=1)),
            "buffers": buffers_after_a_step(world),
            "metrics": {name: value for name, value in metrics.items() if name != "speed"},
            "detections": detections,
        }
        torch.save(results, Path(sys.argv[1]) / f"{world.rank}.pt")

"""Only a GPU shows this: the same figures as on the CPU, and training in every precision."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, new_training, take_step

from evaluate import evaluate
from model import build_model
from shapes import ShapesDataset
from support.distributed import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batch(count: int = 4) -> tuple[list[torch.Tensor], list[dict]]:
    dataset = ShapesDataset("demo", "train", count)
    images, targets = zip(*(dataset[i] for i in range(count)), strict=True)
    return list(images), list(targets)


def test_losses_and_gradients_equal_the_cpus() -> None:
    images, targets = batch()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = build_model(replace(TINY, backbone="resnet18")).to(device).train()
        losses = model(images, targets)
        sum(losses.values()).backward()
        results.append(
            (losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    (cpu_losses, cpu_grads), (gpu_losses, gpu_grads) = results
    for name, value in cpu_losses.items():
        assert gpu_losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
    whole = sum(g.double().norm() ** 2 for g in cpu_grads.values()) ** 0.5
    off = (
        sum((gpu_grads[name].cpu() - g).double().norm() ** 2 for name, g in cpu_grads.items())
        ** 0.5
    )
    assert off < 1e-3 * whole


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_in_every_precision_and_evaluation(amp: str) -> None:
    world = World(torch.device("cuda", 0))
    training = new_training(replace(TINY, amp=amp), world, steps_per_epoch=30)
    images, targets = batch()
    steps = [take_step(training, images, targets, 12) for _ in range(30)]
    losses = [values["loss"] for values in steps if "loss" in values]
    assert len(losses) >= 15 and losses[-1] < 0.8 * losses[0]
    metrics, _ = evaluate(
        training.model,
        ShapesDataset("demo", "val", 5),
        world,
        batch_size=2,
        amp=amp,
        progress=False,
    )
    assert 0 <= metrics["AP"] <= 1 and metrics["speed"]["fps"] > 0

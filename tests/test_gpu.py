"""Only a GPU shows this: the same losses and gradients as on the CPU, in every precision."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY, new_training, take_step
from torch import nn

from experiments.benchmark import under_autocast
from model import build_model
from shapes import ShapesDataset
from support.distributed import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
# By how much losses and the gradient may differ, relative: float32 rounds at 1e-7, float16 at
# 1e-3, bfloat16 at 8e-3.
TOLERANCES = {"off": 1e-3, "fp16": 0.03, "bf16": 0.2}


def batch(count: int = 4) -> tuple[list[torch.Tensor], list[dict]]:
    dataset = ShapesDataset("demo", "train", count)
    images, targets = zip(*(dataset[i] for i in range(count)), strict=True)
    return list(images), list(targets)


class Fixed(nn.Module):
    """Rounding must not change who is matched: that would change the losses by jumps."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, logits, *_):
        return type(self.pairs)(*(index.to(logits.device) for index in self.pairs))


@pytest.mark.parametrize("amp", TOLERANCES)
def test_losses_and_gradients_equal_the_cpus(amp: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_cpu = build_model(replace(TINY, backbone="resnet18")).train()
    on_gpu = copy.deepcopy(on_cpu).to(GPU)
    pairs = []
    on_cpu.criterion.matcher.register_forward_hook(lambda *call: pairs.append(call[2]))
    images, targets = batch()
    expected = on_cpu(images, targets)
    on_gpu.criterion.matcher = Fixed(pairs[0])
    found = under_autocast(on_gpu, GPU, amp)(images, targets)

    for losses in (expected, found):
        sum(losses.values()).backward()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=TOLERANCES[amp]), name
    gradients = []
    for model in (on_cpu, on_gpu):
        found = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    assert (gradients[1] - gradients[0]).norm() < TOLERANCES[amp] * gradients[0].norm()


@pytest.mark.parametrize("amp", TOLERANCES)
def test_training_in_every_precision(amp: str) -> None:
    training = new_training(replace(TINY, amp=amp), World(GPU), steps_per_epoch=30)
    steps = [take_step(training, *batch(), 12) for _ in range(30)]
    losses = [values["loss"] for values in steps if "loss" in values]
    assert len(losses) >= 15 and losses[-1] < 0.8 * losses[0]

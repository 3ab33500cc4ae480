"""Only a GPU shows this: the same losses and gradients as on the CPU, in every precision."""

import copy

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from matcher import Assignment
from model import load_model
from shapes import ShapesDataset
from support.devices import AMP_DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
# By how much a loss and the gradient may differ, relative. Half precision on a CPU differs by up to
# half of this. A gradient is a small sum of large terms, so rounding weighs more there.
TOLERANCES = {"off": (1e-3, 5e-3), "fp16": (0.04, 0.2), "bf16": (0.2, 0.8)}


class Fixed(nn.Module):
    """Rounding must not change which pairs are matched: the losses would jump."""

    def __init__(self, pairs: Assignment):
        super().__init__()
        self.pairs = pairs

    def forward(self, logits: Tensor, *_: object) -> Assignment:
        return Assignment(*(index.to(logits.device) for index in self.pairs))


@pytest.mark.parametrize("amp", TOLERANCES)
def test_losses_and_gradients_equal_the_cpus(amp: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    of_loss, of_gradient = TOLERANCES[amp]
    on_cpu = load_model(ROOT / "assets/shapes.pt")[0].train().requires_grad_(True)
    on_gpu = copy.deepcopy(on_cpu).to(GPU)
    pairs = []
    on_cpu.criterion.matcher.register_forward_hook(lambda *call: pairs.append(call[2]))
    images, targets = zip(*ShapesDataset("demo", "train", 8), strict=True)
    expected = on_cpu(images, targets)
    on_gpu.criterion.matcher = Fixed(pairs[0])
    with torch.autocast("cuda", AMP_DTYPES[amp], enabled=amp != "off"):
        found = on_gpu(images, targets)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=of_loss), name

    sum(expected.values()).backward()
    (1024 * sum(found.values())).backward()  # as a GradScaler does, for float16
    a, b = (
        torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        for model in (on_cpu, on_gpu)
    )
    assert (b / 1024 - a).norm() < of_gradient * a.norm()

"""The model on a GPU that is not there: fake tensors go through every operator up to its kernel.

They have shapes, dtypes and devices but no values, so what a GPU would refuse (a tensor left on the
CPU, two dtypes in one product) fails here too.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from config import PRESETS
from loss import SetCriterion
from matcher import Assignment, HungarianMatcher
from model import SparseRCNN, build_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=["shapes", "r50-100"])
def model(request: pytest.FixtureRequest) -> SparseRCNN:
    return build_model(PRESETS[request.param], pretrained_backbone=False)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors are fake; how many boxes a level has is a symbol."""
    # Without a GPU, autocast turns itself off.
    module = "torch.amp.autocast_mode.torch.cuda"
    monkeypatch.setattr(f"{module}.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(f"{module}.is_bf16_supported", lambda *_: True)
    shapes = ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True)
    with FakeTensorMode(shape_env=shapes):
        yield


def on_gpu(module: nn.Module) -> dict[str, Tensor]:
    """Fake weights and buffers of the same form."""
    return {
        name: torch.empty_strided(
            value.shape,
            value.stride(),
            dtype=value.dtype,
            device="cuda",
            requires_grad=value.requires_grad,
        )
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }


def images() -> list[Tensor]:
    return [torch.empty(3, *size_hw, dtype=torch.uint8) for size_hw in ((96, 96), (64, 90))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_detections_on_a_gpu(fake_gpu: None, model: SparseRCNN, dtype: torch.dtype) -> None:
    model.eval()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), torch.inference_mode():
        found = functional_call(model, on_gpu(model), (images(),))
    for detection in found:
        assert {value.device.type for value in detection.values()} == {"cuda"}
        assert detection["boxes"].dtype == detection["scores"].dtype == torch.float32


class PairsOnGpu(HungarianMatcher):
    """Computes the costs there; the assignment needs values, so it is made up."""

    def forward(self, *args: object) -> Assignment:
        assert self.cost(*args).device.type == "cuda"
        return Assignment(*torch.zeros(4, 3, dtype=torch.int64, device="cuda"))


class Losses(nn.Module):
    """A training step's forward pass, without the check of targets, which reads their values."""

    def __init__(self, model: SparseRCNN):
        super().__init__()
        self.model = model
        self.criterion = SetCriterion(PairsOnGpu())

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        logits, boxes_px, whwh_px = self.model._predict(images)
        self.dtype = logits.dtype
        return self.criterion(logits, boxes_px, targets, whwh_px)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_on_a_gpu(fake_gpu: None, model: SparseRCNN, dtype: torch.dtype) -> None:
    step = Losses(model.train())
    targets = [
        {
            "boxes": torch.empty(count, 4, device="cuda"),
            "labels": torch.zeros(count, dtype=torch.int64, device="cuda"),
        }
        for count in (2, 3)
    ]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        losses = functional_call(step, on_gpu(step), (images(), targets))
    assert step.dtype == dtype
    assert {(loss.device.type, loss.dtype) for loss in losses.values()} == {("cuda", torch.float32)}
    loss = sum(losses.values())
    assert loss.requires_grad and loss.shape == ()

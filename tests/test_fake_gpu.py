"""The model on a GPU that is not there: fake tensors go through every operator up to its kernel.

They have shapes, dtypes and devices but no values, so what a GPU would refuse (a tensor left on the
CPU, two dtypes in one product) fails here too.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from config import PRESETS
from matcher import Assignment, HungarianMatcher
from model import build_model


def on_gpu(module: nn.Module) -> dict[str, Tensor]:
    """Fake weights and buffers of the same form."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    fake = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
        for name, t in tensors.items()
    }
    return {name: t.requires_grad_(tensors[name].requires_grad) for name, t in fake.items()}


class PairsOnGpu(HungarianMatcher):
    """Computes the costs there; the assignment needs values, so it is made up."""

    def forward(self, *args: object) -> Assignment:
        assert self.cost(*args).device.type == "cuda"
        return Assignment(*torch.zeros(4, 3, dtype=torch.int64, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", ["shapes", "r50-100"])
def test_detections_and_losses_on_a_gpu(preset: str, dtype: torch.dtype, monkeypatch) -> None:
    # Without a GPU, autocast turns itself off.
    module = "torch.amp.autocast_mode.torch.cuda"
    monkeypatch.setattr(f"{module}.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(f"{module}.is_bf16_supported", lambda *_: True)
    # The check of targets reads their values.
    monkeypatch.setattr("model.check_target", lambda target, *_: target)
    model = build_model(PRESETS[preset], pretrained_backbone=False)
    model.criterion.matcher = PairsOnGpu()
    dtypes = set()
    model.head.register_forward_hook(lambda _, __, output: dtypes.add(output[0].dtype))
    # How many boxes a level has is a symbol.
    shapes = ShapeEnv(allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True)
    with FakeTensorMode(shape_env=shapes), torch.autocast("cuda", dtype, dtype != torch.float32):
        images = [torch.empty(3, *size_hw, dtype=torch.uint8) for size_hw in ((96, 96), (64, 90))]
        boxes = [torch.empty(count, 4, device="cuda") for count in (2, 3)]
        targets = [{"boxes": b, "labels": b[:, 0].long()} for b in boxes]
        with torch.inference_mode():
            found = functional_call(model.eval(), on_gpu(model), (images,))
        losses = functional_call(model.train(), on_gpu(model), (images, targets))
    values = [value for detection in found for value in detection.values()]
    assert {value.device.type for value in [*values, *losses.values()]} == {"cuda"}
    assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32
    assert dtypes == {dtype}
    assert {(loss.dtype, loss.requires_grad) for loss in losses.values()} == {(torch.float32, True)}

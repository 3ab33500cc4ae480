"""Shapes of the pyramid, and frozen norms."""

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from backbone import STRIDES, FrozenBatchNorm, ResNetFPN, SmallFPN


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_levels_have_the_documented_shapes(size: tuple[int, int]) -> None:
    height, width = size
    for network in (ResNetFPN("resnet18", 24, pretrained=False), SmallFPN(24)):
        levels = network(torch.rand(2, 3, height, width))
        expected = [(2, 24, height // stride, width // stride) for stride in STRIDES]
        assert [tuple(level.shape) for level in levels] == expected


def test_frozen_norms_are_torchvisions_and_keep_half_precision() -> None:
    ours, theirs = FrozenBatchNorm(5), FrozenBatchNorm2d(5)
    for norm in (ours, theirs):
        torch.manual_seed(1)
        for name, value in norm.named_buffers():
            is_scale = name in ("weight", "running_var")
            value.copy_(torch.rand(5) + 0.5 if is_scale else torch.randn(5))
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        found, expected = ours(x.to(dtype)), theirs(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
        gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=2 * tolerance, atol=10 * tolerance)


def test_under_autocast_nothing_between_two_convolutions_is_float32() -> None:
    network, seen = ResNetFPN("resnet18", 8, pretrained=False), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module is not network.body["conv1"]:
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.rand(1, 3, 64, 64))
    assert len(seen) == 27 and set(seen) == {torch.bfloat16}

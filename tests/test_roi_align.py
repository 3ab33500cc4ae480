"""support/roi_align.py against torchvision's RoIAlign, values and gradients."""

import pytest
import torch
import torchvision.ops

from support.roi_align import roi_align


def regions(n: int, batch: int, width_px: float, height_px: float) -> torch.Tensor:
    """(n, 5) float64 with boxes inside, across the border, far outside, empty and inverted."""
    centre = torch.rand(n, 2, dtype=torch.float64) * 1.4 - 0.2
    centre *= torch.tensor([width_px, height_px], dtype=torch.float64)
    size = torch.rand(n, 2, dtype=torch.float64) * 90
    size[0] = 0
    size[1] *= -1
    centre[2] += 10_000
    image = torch.randint(batch, (n, 1)).double()
    return torch.cat((image, centre - size / 2, centre + size / 2), dim=1)


@pytest.mark.parametrize(
    ("size_hw", "output_size", "stride", "samples"),
    [((20, 31), 5, 4, 2), ((3, 3), 7, 32, 2), ((1, 9), 2, 8, 3), ((24, 24), 5, 4, 1)],
)
def test_values_and_gradients_are_torchvisions(size_hw, output_size, stride, samples) -> None:
    features = torch.randn(3, 7, *size_hw, dtype=torch.float64, requires_grad=True)
    rois = regions(50, 3, size_hw[1] * stride, size_hw[0] * stride)
    arguments = (rois, output_size, 1 / stride, samples, True)

    expected = torchvision.ops.roi_align(features, *arguments)
    found = roi_align(features, *arguments)
    assert found.shape == (50, 7, output_size, output_size)
    torch.testing.assert_close(found, expected)

    weights = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, features, weights)
    (gradient,) = torch.autograd.grad(found, features, weights)
    torch.testing.assert_close(gradient, expected_gradient)


def test_other_settings_and_no_regions() -> None:
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    rois = torch.tensor([[0.0, 3.0, 5.0, 20.0, 30.0]])
    for arguments in ((rois, 3, 0.25, 2, False), (rois[:0], 3, 0.25, 2, True)):
        found = roi_align(features, *arguments)
        assert torch.equal(found, torchvision.ops.roi_align(features, *arguments))
        # A level without boxes has a gradient of zero, not none.
        (gradient,) = torch.autograd.grad(found.sum(), features)
        assert gradient.shape == features.shape and gradient.any() == bool(len(arguments[0]))


def test_boxes_that_are_not_finite_do_not_crash() -> None:
    # The loss is NaN then, and the step is skipped; an index error would end the run.
    bad = [float("nan"), float("inf"), float("-inf")]
    rois = torch.tensor([[0.0, value, 1.0, 9.0, 9.0] for value in bad])
    assert roi_align(torch.randn(1, 2, 8, 8), rois, 3, 0.25, 2, True).shape == (3, 2, 3, 3)

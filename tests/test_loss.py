"""The losses against a float64 NumPy computation, and what the gradient reaches."""

import numpy as np
import pytest
import torch
from conftest import objects, predictions

from loss import SetCriterion
from matcher import Assignment, HungarianMatcher

S, B, N, K = 2, 3, 6, 4  # all different


def make_targets(counts: tuple[int, ...], whwh_px: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [objects(m, K, *whwh_px[b, :2].tolist(), seed=90 + b) for b, m in enumerate(counts)]


def by_hand(
    logits: torch.Tensor,
    boxes_px: torch.Tensor,
    targets: list[dict[str, torch.Tensor]],
    whwh_px: torch.Tensor,
    assignment: Assignment,
    num_objects: float,
) -> dict[str, float]:
    """Every loss in float64 NumPy, pair by pair."""
    object_boxes = np.concatenate([target["boxes"].double().numpy() for target in targets])
    object_labels = np.concatenate([target["labels"].numpy() for target in targets])
    losses = {}
    for s in range(S):
        target, l1, giou = np.zeros((B, N, K)), 0.0, 0.0
        for stage, b, n, m in zip(*(field.tolist() for field in assignment), strict=True):
            if stage != s:
                continue
            target[b, n, object_labels[m]] = 1
            found, wanted = boxes_px[s, b, n].double().numpy(), object_boxes[m]
            l1 += np.abs((found - wanted) / whwh_px[b].double().numpy()).sum()

            overlap_wh = np.minimum(found[2:], wanted[2:]) - np.maximum(found[:2], wanted[:2])
            overlap = np.prod(np.maximum(overlap_wh, 0))
            union = np.prod(found[2:] - found[:2]) + np.prod(wanted[2:] - wanted[:2]) - overlap
            hull = np.prod(np.maximum(found[2:], wanted[2:]) - np.minimum(found[:2], wanted[:2]))
            giou += 1 - (overlap / union - (hull - union) / hull)

        p = 1 / (1 + np.exp(-logits[s].double().numpy()))
        positive = -0.25 * target * (1 - p) ** 2 * np.log(p)
        negative = -0.75 * (1 - target) * p**2 * np.log(1 - p)
        losses[f"loss_cls_{s}"] = 2 * (positive + negative).sum() / num_objects
        losses[f"loss_l1_{s}"] = 5 * l1 / num_objects
        losses[f"loss_giou_{s}"] = 2 * giou / num_objects
    return losses


@pytest.mark.parametrize(
    ("counts", "num_objects"),
    [((2, 0, 4), None), ((2, 0, 4), 10), ((0, 0, 0), None), ((9, 1, 0), None)],
)
def test_equals_numpy_in_float64(counts: tuple[int, ...], num_objects: float | None) -> None:
    logits, boxes_px, whwh_px = predictions(S, B, N, K)
    targets = make_targets(counts, whwh_px)
    matcher = HungarianMatcher()
    losses = SetCriterion(matcher)(logits, boxes_px, targets, whwh_px, num_objects)
    assignment = matcher(logits, boxes_px, targets, whwh_px)
    divisor = max(1, sum(counts) if num_objects is None else num_objects)
    expected = by_hand(logits, boxes_px, targets, whwh_px, assignment, divisor)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].shape == ()
        assert losses[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_tiny_logits_in_half_precision(dtype: torch.dtype) -> None:
    logits = torch.tensor([-6e4, -50.0, -1e-7, 1e-7, 50.0, 6e4], dtype=dtype).view(1, 1, 6, 1)
    boxes_px = torch.tensor([[0, 0, 1e-3, 1e-3], *[[5, 5, 9, 9]] * 4, [0, 0, 3e4, 3e4]])
    boxes_px = boxes_px.to(dtype).view(1, 1, 6, 4)
    logits.requires_grad_()
    boxes_px.requires_grad_()
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 9.0, 9.0], [0.0, 0.0, 2.0, 2.0]]),
        "labels": torch.tensor([0, 0]),
    }
    criterion = SetCriterion(HungarianMatcher())
    losses = criterion(logits, boxes_px, [target], torch.full((1, 4), 64.0))
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(boxes_px.grad).all()


@pytest.mark.parametrize("what", ["logits", "boxes"])
def test_a_prediction_that_is_not_finite_makes_the_loss_so_and_raises_nothing(what: str) -> None:
    """Whoever trains sees it in the norm of the gradient, and skips the step."""
    logits, boxes_px, whwh_px = predictions(S, B, N, K)
    (logits if what == "logits" else boxes_px)[1, 2] = float("nan")
    logits.requires_grad_()
    boxes_px.requires_grad_()
    losses = SetCriterion(HungarianMatcher())(
        logits, boxes_px, make_targets((2, 0, 3), whwh_px), whwh_px
    )
    spoilt = {"loss_cls_1"} if what == "logits" else {"loss_l1_1", "loss_giou_1"}
    assert {name for name, loss in losses.items() if not torch.isfinite(loss)} == spoilt
    sum(losses.values()).backward()
    assert not all(torch.isfinite(x.grad).all() for x in (logits, boxes_px))

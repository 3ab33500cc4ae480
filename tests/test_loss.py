"""The losses against a float64 NumPy computation, and what the gradient reaches."""

import numpy as np
import pytest
import torch
from conftest import objects
from test_matcher import predictions

from loss import SetCriterion
from matcher import Assignment, HungarianMatcher

S, B, N, K = 3, 3, 6, 4


def make_targets(counts: tuple[int, ...], whwh: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [objects(m, K, *whwh[b, :2].tolist(), seed=90 + b) for b, m in enumerate(counts)]


def by_hand(
    logits, boxes, targets, whwh, assignment: Assignment, num_objects: float
) -> dict[str, float]:
    """Every loss in float64 NumPy, element by element."""
    losses = {}
    all_boxes = np.concatenate([t["boxes"].double().numpy() for t in targets])
    all_labels = np.concatenate([t["labels"].numpy() for t in targets])
    for s in range(len(logits)):
        target, l1, giou = np.zeros(logits.shape[1:]), 0.0, 0.0
        for stage, b, n, m in zip(*(f.tolist() for f in assignment), strict=True):
            if stage != s:
                continue
            target[b, n, all_labels[m]] = 1
            p, t, size = boxes[s, b, n].double().numpy(), all_boxes[m], whwh[b].double().numpy()
            l1 += np.abs(p / size - t / size).sum()
            overlap = np.prod(np.maximum(np.minimum(p[2:], t[2:]) - np.maximum(p[:2], t[:2]), 0))
            union = np.prod(p[2:] - p[:2]) + np.prod(t[2:] - t[:2]) - overlap
            hull = np.prod(np.maximum(p[2:], t[2:]) - np.minimum(p[:2], t[:2]))
            giou += 1 - (overlap / union - (hull - union) / hull)
        p = 1 / (1 + np.exp(-logits[s].double().numpy()))
        focal = -0.25 * target * (1 - p) ** 2 * np.log(p) - 0.75 * (1 - target) * p**2 * np.log(
            1 - p
        )
        losses[f"loss_cls_{s}"] = 2 * focal.sum() / num_objects
        losses[f"loss_l1_{s}"] = 5 * l1 / num_objects
        losses[f"loss_giou_{s}"] = 2 * giou / num_objects
    return losses


@pytest.mark.parametrize(
    ("counts", "num_objects"),
    [((2, 0, 4), None), ((2, 0, 4), 10), ((0, 0, 0), None), ((9, 1, 0), None)],
)
def test_equals_numpy_in_float64(counts: tuple[int, ...], num_objects: float | None) -> None:
    logits, boxes, whwh = predictions(S, B, N, K)
    targets = make_targets(counts, whwh)
    matcher = HungarianMatcher()
    losses = SetCriterion(matcher)(logits, boxes, targets, whwh, num_objects)
    divisor = max(1, sum(counts) if num_objects is None else num_objects)
    expected = by_hand(logits, boxes, targets, whwh, matcher(logits, boxes, targets, whwh), divisor)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_unmatched_proposals_get_a_class_gradient_and_no_box_gradient() -> None:
    logits, boxes, whwh = predictions(S, B, N, K)
    targets = make_targets((2, 0, 3), whwh)
    logits.requires_grad_(), boxes.requires_grad_()
    sum(SetCriterion(HungarianMatcher())(logits, boxes, targets, whwh).values()).backward()
    assignment = HungarianMatcher()(logits, boxes, targets, whwh)
    matched = torch.zeros(S, B, N, dtype=torch.bool)
    matched[assignment.stage, assignment.image, assignment.proposal] = True
    assert (logits.grad != 0).all()
    assert ((boxes.grad != 0).any(-1) == matched).all()


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    logits, boxes, whwh = predictions(S, B, N, K)
    targets, criterion = make_targets((3, 0, 2), whwh), SetCriterion(HungarianMatcher())
    whole = criterion(logits, boxes, targets, whwh)
    parts = [
        criterion(
            logits[:, b : b + 1],
            boxes[:, b : b + 1],
            targets[b : b + 1],
            whwh[b : b + 1],
            num_objects=5,
        )
        for b in range(B)
    ]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-5)


def test_a_perfect_prediction_costs_nothing_and_a_duplicate_does() -> None:
    target = {"boxes": torch.tensor([[10.0, 10.0, 40.0, 30.0]]), "labels": torch.tensor([1])}
    boxes = target["boxes"].expand(1, 1, 2, 4)
    whwh, criterion = torch.full((1, 4), 64.0), SetCriterion(HungarianMatcher())
    perfect = torch.full((1, 1, 2, K), -20.0)
    perfect[0, 0, 0, 1] = 20.0
    assert sum(criterion(perfect, boxes, [target], whwh).values()).item() == pytest.approx(
        0, abs=1e-4
    )
    duplicate = perfect.clone()
    duplicate[0, 0, 1, 1] = 20.0
    assert criterion(duplicate, boxes, [target], whwh)["loss_cls_0"].item() == pytest.approx(
        2 * 0.75 * 20, rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_tiny_logits_in_half_precision(dtype: torch.dtype) -> None:
    logits = (
        torch.tensor([-6e4, -50.0, -1e-7, 1e-7, 50.0, 6e4], dtype=dtype)
        .view(1, 1, 6, 1)
        .requires_grad_()
    )
    boxes = (
        torch.tensor([[0, 0, 1e-3, 1e-3], *[[5, 5, 9, 9]] * 4, [0, 0, 3e4, 3e4]])
        .to(dtype)
        .view(1, 1, 6, 4)
    )
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 9.0, 9.0], [0.0, 0.0, 2.0, 2.0]]),
        "labels": torch.tensor([0, 0]),
    }
    losses = SetCriterion(HungarianMatcher())(
        logits, boxes.requires_grad_(), [target], torch.full((1, 4), 64.0)
    )
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert torch.isfinite(logits.grad).all() and torch.isfinite(boxes.grad).all()

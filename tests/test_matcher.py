"""The matcher against brute force, and what it does with unusual input."""

from itertools import permutations

import pytest
import torch
from conftest import objects, predictions
from torchvision.ops import generalized_box_iou

from matcher import Assignment, HungarianMatcher


def cost_by_hand(
    logits: torch.Tensor, boxes_px: torch.Tensor, target: dict, whwh_px: torch.Tensor
) -> torch.Tensor:
    """(N, M) float64 of one stage of one image, from the formula 2 · focal + 5 · L1 − 2 · GIoU."""
    p = logits.double().sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8) - 0.75 * p**2 * -torch.log(1 - p + 1e-8)
    l1 = torch.cdist((boxes_px / whwh_px).double(), (target["boxes"] / whwh_px).double(), p=1)
    giou = generalized_box_iou(boxes_px.double(), target["boxes"].double())
    return 2 * focal[:, target["labels"]] + 5 * l1 - 2 * giou


def best_proposals(cost: torch.Tensor) -> set[tuple[int, int]]:
    """(proposal, object) of the cheapest assignment of a cost (N, M), M ≤ N, by trying them all."""
    N, M = cost.shape
    cheapest = min(
        permutations(range(N), M), key=lambda rows: sum(cost[n, m] for m, n in enumerate(rows))
    )
    return {(n, m) for m, n in enumerate(cheapest)}


def pairs(
    assignment: Assignment, stage: int, image: int, first_object: int = 0
) -> set[tuple[int, int]]:
    """(proposal, object of the image) of one stage of one image."""
    chosen = (assignment.stage == stage) & (assignment.image == image)
    proposals = assignment.proposal[chosen].tolist()
    image_objects = (assignment.object[chosen] - first_object).tolist()
    return set(zip(proposals, image_objects, strict=True))


def test_equals_brute_force_over_permutations() -> None:
    S, B, N, K, counts = 3, 4, 6, 5, (2, 0, 4, 1)
    logits, boxes_px, whwh_px = predictions(S, B, N, K)
    targets = [objects(m, K, *whwh_px[b, :2].tolist(), seed=50 + b) for b, m in enumerate(counts)]
    assignment = HungarianMatcher()(logits, boxes_px, targets, whwh_px)
    for field in assignment:
        assert field.shape == (S * sum(counts),) and field.dtype == torch.int64
    assert ((assignment.image * S + assignment.stage).diff() >= 0).all()  # image, then stage
    for s in range(S):
        for b in range(B):
            cost = cost_by_hand(logits[s, b], boxes_px[s, b], targets[b], whwh_px[b])
            assert pairs(assignment, s, b, sum(counts[:b])) == best_proposals(cost)


def test_cost_equals_the_formulas() -> None:
    logits, boxes_px, whwh_px = predictions(S=2, B=3, N=5, K=4)
    counts = (1, 200, 99)  # more than are computed at a time
    targets = [objects(m, 4, *whwh_px[b, :2].tolist(), seed=b) for b, m in enumerate(counts)]
    cost = HungarianMatcher().cost(logits, boxes_px, targets, whwh_px)
    assert cost.shape == (300, 2, 5)  # (M, S, N)
    assert cost.dtype == torch.float32
    for s in range(2):
        by_hand = [
            cost_by_hand(logits[s, b], boxes_px[s, b], targets[b], whwh_px[b]).T for b in range(3)
        ]
        assert torch.allclose(cost[:, s].double(), torch.cat(by_hand), atol=1e-5)


def test_more_objects_than_proposals_uses_every_proposal_once() -> None:
    logits, boxes_px, whwh_px = predictions(S=2, B=1, N=3, K=4)
    target = objects(5, 4, 60, 50)
    assignment = HungarianMatcher()(logits, boxes_px, [target], whwh_px)
    for s in range(2):
        cost = cost_by_hand(logits[s, 0], boxes_px[s, 0], target, whwh_px[0])
        best = best_proposals(cost.T)  # here objects are chosen for proposals: (object, proposal)
        assert pairs(assignment, s, 0) == {(n, m) for m, n in best}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_tiny_values_in_half_precision(dtype: torch.dtype) -> None:
    logits = torch.tensor([-6e4, -100.0, -1e-7, 0.0, 1e-7, 100.0, 6e4], dtype=dtype)
    boxes_px = torch.tensor([[0, 0, 1e-4, 1e-4], [0, 0, 4e4, 4e4], *[[5, 5, 9, 9]] * 5])
    logits, boxes_px = logits.view(1, 1, 7, 1), boxes_px.to(dtype).view(1, 1, 7, 4)
    target = {"boxes": torch.tensor([[5.0, 5.0, 9.0, 9.0]]), "labels": torch.tensor([0])}
    matcher, whwh_px = HungarianMatcher(), torch.full((1, 4), 64.0)
    assert torch.isfinite(matcher.cost(logits, boxes_px, [target], whwh_px)).all()
    (pair,) = pairs(matcher(logits, boxes_px, [target], whwh_px), 0, 0)
    assert pair in {(5, 0), (6, 0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_predictions_that_are_not_finite_are_matched_and_spoil_no_other_image(value: float) -> None:
    """The loss is NaN then, and the step is skipped; scipy's error would end the run."""
    logits, boxes_px, whwh_px = predictions(S=2, B=3, N=4, K=2)
    targets = [objects(m, 2, 60, 50, seed=m) for m in (2, 1, 3)]
    matcher = HungarianMatcher()
    before = matcher(logits, boxes_px, targets, whwh_px)
    logits[0, 1], boxes_px[1, 1] = value, value
    after = matcher(logits, boxes_px, targets, whwh_px)
    assert len(after.stage) == len(before.stage)
    for stage in range(2):
        for image, first_object in ((0, 0), (2, 3)):
            expected = pairs(before, stage, image, first_object)
            assert pairs(after, stage, image, first_object) == expected
        ((_, only),) = pairs(after, stage, 1, 2)
        assert only == 0


def test_a_finite_proposal_is_preferred_to_one_that_is_not() -> None:
    logits, boxes_px, whwh_px = predictions(S=1, B=1, N=3, K=2)
    logits[0, 0, 0], boxes_px[0, 0, 2] = float("nan"), float("inf")
    assignment = HungarianMatcher()(logits, boxes_px, [objects(1, 2, 60, 50)], whwh_px)
    assert pairs(assignment, 0, 0) == {(1, 0)}

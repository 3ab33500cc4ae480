"""The matcher against brute force, and what it does with unusual input."""

from itertools import permutations

import pytest
import torch
from conftest import objects
from torchvision.ops import generalized_box_iou

from matcher import HungarianMatcher


def predictions(S: int, B: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits (S, B, N, K), boxes_px (S, B, N, 4), whwh_px (B, 4) of images of different sizes."""
    whwh_px = torch.tensor([[100.0 + 30 * b, 80.0 - 10 * b] * 2 for b in range(B)])
    boxes = torch.stack(
        [
            torch.stack(
                [objects(N, K, *whwh_px[b, :2].tolist(), seed=s * B + b)["boxes"] for b in range(B)]
            )
            for s in range(S)
        ]
    )
    return torch.randn(S, B, N, K) * 2, boxes, whwh_px


def cost_by_hand(
    logits: torch.Tensor, boxes: torch.Tensor, target: dict, whwh: torch.Tensor
) -> torch.Tensor:
    """(N, M) float64, from the formulas: 2 · focal + 5 · L1 + 2 · (−GIoU), for one stage of one image."""
    p = logits.double().sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8) - 0.75 * p**2 * -torch.log(1 - p + 1e-8)
    l1 = torch.cdist((boxes / whwh).double(), (target["boxes"] / whwh).double(), p=1)
    giou = generalized_box_iou(boxes.double(), target["boxes"].double())
    return 2 * focal[:, target["labels"]] + 5 * l1 - 2 * giou


def pairs(assignment, stage: int, image: int, first_object: int = 0) -> set[tuple[int, int]]:
    """(proposal, object of the image) of one stage of one image."""
    here = (assignment.stage == stage) & (assignment.image == image)
    found = zip(
        assignment.proposal[here].tolist(),
        (assignment.object[here] - first_object).tolist(),
        strict=True,
    )
    return set(found)


def test_equals_brute_force_over_permutations() -> None:
    S, B, N, K, counts = 3, 4, 6, 5, (2, 0, 4, 1)
    logits, boxes, whwh = predictions(S, B, N, K)
    targets = [objects(m, K, *whwh[b, :2].tolist(), seed=50 + b) for b, m in enumerate(counts)]
    assignment = HungarianMatcher()(logits, boxes, targets, whwh)
    assert len(assignment.stage) == S * sum(counts)
    for s in range(S):
        for b, m in enumerate(counts):
            cost = cost_by_hand(logits[s, b], boxes[s, b], targets[b], whwh[b])
            best = min(
                permutations(range(N), m),
                key=lambda rows: sum(cost[n, i] for i, n in enumerate(rows)),
            )
            assert pairs(assignment, s, b, sum(counts[:b])) == {(n, i) for i, n in enumerate(best)}


def test_cost_equals_the_formulas() -> None:
    logits, boxes, whwh = predictions(S=2, B=3, N=5, K=4)
    targets = [objects(m, 4, *whwh[b, :2].tolist(), seed=b) for b, m in enumerate((1, 3, 2))]
    cost = HungarianMatcher().cost(logits, boxes, targets, whwh)  # (M, S, N)
    assert cost.shape == (6, 2, 5) and cost.dtype == torch.float32
    for s in range(2):
        by_hand = [cost_by_hand(logits[s, b], boxes[s, b], targets[b], whwh[b]).T for b in range(3)]
        assert torch.allclose(cost[:, s].double(), torch.cat(by_hand), atol=1e-5)


def test_does_not_depend_on_the_other_images_of_the_batch() -> None:
    logits, boxes, whwh = predictions(S=2, B=3, N=8, K=4)
    targets = [objects(m, 4, *whwh[b, :2].tolist(), seed=b) for b, m in enumerate((5, 2, 3))]
    matcher = HungarianMatcher()
    together = matcher(logits, boxes, targets, whwh)
    for b, first in enumerate((0, 5, 7)):
        alone = matcher(
            logits[:, b : b + 1], boxes[:, b : b + 1], targets[b : b + 1], whwh[b : b + 1]
        )
        for s in range(2):
            assert pairs(together, s, b, first) == pairs(alone, s, 0)


def test_no_objects_at_all() -> None:
    logits, boxes, whwh = predictions(S=2, B=2, N=3, K=4)
    assignment = HungarianMatcher()(logits, boxes, [objects(0, 4, 50, 50)] * 2, whwh)
    assert [len(field) for field in assignment] == [
        0,
        0,
        0,
        0,
    ] and assignment.stage.dtype == torch.int64


def test_more_objects_than_proposals_uses_every_proposal_once() -> None:
    logits, boxes, whwh = predictions(S=2, B=1, N=3, K=4)
    target = objects(5, 4, 60, 50)
    assignment = HungarianMatcher()(logits, boxes, [target], whwh)
    for s in range(2):
        matched = pairs(assignment, s, 0)
        cost = cost_by_hand(logits[s, 0], boxes[s, 0], target, whwh[0])
        best = min(
            permutations(range(5), 3), key=lambda cols: sum(cost[n, m] for n, m in enumerate(cols))
        )
        assert matched == set(enumerate(best))


def test_a_single_class() -> None:
    logits, boxes, whwh = predictions(S=1, B=1, N=4, K=1)
    target = objects(2, 1, 60, 50)
    cost = cost_by_hand(logits[0, 0], boxes[0, 0], target, whwh[0])
    best = min(
        permutations(range(4), 2), key=lambda rows: sum(cost[n, i] for i, n in enumerate(rows))
    )
    assert pairs(HungarianMatcher()(logits, boxes, [target], whwh), 0, 0) == {
        (n, i) for i, n in enumerate(best)
    }


def test_the_class_decides_between_equal_boxes() -> None:
    boxes = torch.tensor([10.0, 10.0, 30.0, 30.0]).expand(1, 1, 2, 4)
    logits = torch.tensor([[[[3.0, -3.0], [-3.0, 3.0]]]])
    target = {"boxes": boxes[0, 0], "labels": torch.tensor([1, 0])}
    assignment = HungarianMatcher()(logits, boxes, [target], torch.full((1, 4), 50.0))
    assert pairs(assignment, 0, 0) == {(1, 0), (0, 1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_tiny_values_in_half_precision(dtype: torch.dtype) -> None:
    logits = torch.tensor([-6e4, -100.0, -1e-7, 0.0, 1e-7, 100.0, 6e4], dtype=dtype).view(
        1, 1, 7, 1
    )
    boxes = (
        torch.tensor([[0, 0, 1e-4, 1e-4], [0, 0, 4e4, 4e4], *[[5, 5, 9, 9]] * 5])
        .to(dtype)
        .view(1, 1, 7, 4)
    )
    target = {"boxes": torch.tensor([[5.0, 5.0, 9.0, 9.0]]), "labels": torch.tensor([0])}
    matcher, whwh = HungarianMatcher(), torch.full((1, 4), 64.0)
    assert torch.isfinite(matcher.cost(logits, boxes, [target], whwh)).all()
    (pair,) = pairs(matcher(logits, boxes, [target], whwh), 0, 0)
    assert pair in {(5, 0), (6, 0)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda logits, boxes, targets: logits[1, 2].fill_(float("nan")),
            ["image 2", "stage 1", "learning rate"],
        ),
        (
            lambda logits, boxes, targets: boxes[0, 1].fill_(float("inf")),
            ["image 1", "stage 0", "learning rate"],
        ),
        (
            lambda logits, boxes, targets: targets[1]["boxes"].fill_(float("nan")),
            ["image 1", "target boxes"],
        ),
    ],
)
def test_a_cost_that_is_not_finite_is_explained(spoil, words: list[str]) -> None:
    logits, boxes, whwh = predictions(S=2, B=3, N=4, K=2)
    targets = [objects(m, 2, 60, 50, seed=m) for m in (0, 2, 1)]
    spoil(logits, boxes, targets)
    with pytest.raises(FloatingPointError) as error:
        HungarianMatcher()(logits, boxes, targets, whwh)
    assert all(word in str(error.value) for word in words)

"""The mistakes that notebook 5 counts, by hand and against COCO's evaluation."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

from evaluate import coco_metrics
from notebooks.common import boxes_per_object
from notebooks.figures_05 import outcomes
from support.coco_json import Annotation, Category, CocoFile, Image, ground_truth

NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def test_each_kind_of_mistake_is_told_apart() -> None:
    objects = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    # Object 0, and once more; object 1, as another class; object 2, with an IoU of 0.25; nothing.
    boxes = [[0, 0, 10, 9], [0, 1, 10, 10], [20, 0, 30, 10], [40, 6, 50, 16], [80, 80, 90, 90]]
    target = {"boxes": torch.tensor(objects).float(), "labels": torch.tensor([0, 0, 1, 0])}
    found = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([0, 0, 1, 1, 0])}
    kinds = [outcome.kind for outcome in outcomes(target, found)]
    assert kinds == ["found", "wrong class", "misplaced", "missed", "duplicate", "false alarm"]
    assert boxes_per_object(found, target).tolist() == [2, 0, 0, 0]

    assert {outcome.kind for outcome in outcomes(target, NOTHING)} == {"missed"}
    assert {outcome.kind for outcome in outcomes(NOTHING, found)} == {"false alarm"}
    assert outcomes(NOTHING, NOTHING) == []


def test_what_is_found_is_what_coco_counts() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 80, (12, 2))
    objects = torch.tensor(np.concatenate([corners, corners + rng.uniform(8, 30, (12, 2))], 1))
    labels = torch.tensor(rng.permutation(12) % 3)
    found = {
        "boxes": objects.repeat(2, 1) + torch.tensor(rng.normal(0, 3, (24, 4))),
        "labels": torch.cat([labels, torch.ones(12, dtype=torch.int64)]),
    }
    recalls = []
    for iou in np.linspace(0.5, 0.95, 10):
        every = outcomes({"boxes": objects, "labels": labels}, found, iou)[:12]
        recalls += [np.mean([o.kind == "found" for o in every if o.label == k]) for k in range(3)]

    def records(boxes: torch.Tensor, classes: torch.Tensor) -> list[Annotation]:
        rows = zip(classes.tolist(), box_convert(boxes, "xyxy", "xywh").tolist(), strict=True)
        return [Annotation(1, k, xywh) for k, xywh in rows]

    categories = [Category(k, str(k)) for k in range(3)]
    coco = CocoFile([Image(1, "1.png", 110, 110)], categories, records(objects, labels))
    truth = ground_truth(coco, range(3))
    ranked = [
        {"image_id": 1, "category_id": r.category_id, "bbox": r.bbox, "score": 1 - i / 100}
        for i, r in enumerate(records(found["boxes"], found["labels"]))
    ]
    assert coco_metrics(truth, ranked)["AR"] == pytest.approx(np.mean(recalls))
    assert 0.2 < np.mean(recalls) < 0.8

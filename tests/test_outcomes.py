"""The mistakes that notebook 5 counts, by hand and against COCO's evaluation."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from notebooks.figures_05 import outcomes, size_name


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_each_kind_of_mistake_is_told_apart() -> None:
    objects = boxes((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (60, 0, 70, 10))
    target = {"boxes": objects, "labels": torch.tensor([0, 0, 1, 0])}
    found = {
        "boxes": boxes(
            (0, 0, 10, 9),  # object 0
            (0, 1, 10, 10),  # object 0 once more
            (20, 0, 30, 10),  # object 1, as another class
            (40, 6, 50, 16),  # object 2: an IoU of 0.25
            (80, 80, 90, 90),  # nothing
        ),
        "labels": torch.tensor([0, 0, 1, 1, 0]),
    }
    kinds = [outcome.kind for outcome in outcomes(target, found)]
    assert kinds == ["found", "wrong class", "misplaced", "missed", "duplicate", "false alarm"]

    nothing = {"boxes": boxes(), "labels": torch.zeros(0, dtype=torch.int64)}
    assert {outcome.kind for outcome in outcomes(target, nothing)} == {"missed"}
    assert {outcome.kind for outcome in outcomes(nothing, found)} == {"false alarm"}
    assert outcomes(nothing, nothing) == []


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_what_is_found_is_what_coco_counts(iou: float) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 80, (12, 2))
    objects = torch.tensor(np.concatenate([corners, corners + rng.uniform(8, 30, (12, 2))], 1))
    shaken = objects.repeat(2, 1) + torch.tensor(rng.normal(0, 3, (24, 4)))
    labels = torch.tensor(rng.integers(0, 3, 12))
    found = {"boxes": shaken, "labels": labels.repeat(2)}
    found["labels"][rng.integers(0, 24, 12)] = 1
    kinds = [o.kind for o in outcomes({"boxes": objects, "labels": labels}, found, iou)]
    assert len(kinds) >= 12

    def annotations(xyxy: torch.Tensor, classes: torch.Tensor) -> list[dict]:
        rows = zip(xyxy.tolist(), classes.tolist(), strict=True)
        return [
            {"id": i, "image_id": 1, "category_id": k, "iscrowd": 0,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            for i, ((x1, y1, x2, y2), k) in enumerate(rows, start=1)
        ]  # fmt: skip

    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1}],
        "categories": [{"id": k} for k in range(3)],
        "annotations": annotations(objects, labels),
    }
    truth.createIndex()
    results = annotations(shaken, found["labels"])
    scored = [row | {"score": 1 - i / 100} for i, row in enumerate(results)]
    evaluation = COCOeval(truth, truth.loadRes(scored), "bbox")
    evaluation.params.iouThrs = np.array([iou])
    evaluation.evaluate()
    matched = sum(
        int((cell["dtMatches"] > 0).sum())
        for cell in evaluation.evalImgs
        if cell is not None and cell["aRng"] == evaluation.params.areaRng[0]
    )
    assert 0 < kinds.count("found") == matched < 12


def test_sizes_are_cocos() -> None:
    names = [size_name((0, 0, side, side)) for side in (31, 32, 95, 96)]
    assert names == ["small", "medium", "medium", "large"]

"""Both evaluators, pycocotools and faster-coco-eval, give the same numbers on awkward data."""

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

import evaluate
from support.coco_json import Annotation, Category, CocoFile, Image, ground_truth

faster_coco_eval = pytest.importorskip("faster_coco_eval")

IMAGE_IDS, CATEGORY_IDS = [0, -7, 3, 2**62, -(2**62), 11], [0, -2, 40, 2**40]
# 32² and 96² are the borders of small, medium and large. Sides and steps of 8 pixels bring equal
# overlaps, and some that are exactly a threshold, such as 1/2.
SIDES_PX = [16, 32, 64, 96, 136]


@pytest.mark.parametrize("max_dets", [3, 100])
@pytest.mark.parametrize(("num_objects", "per_object"), [(80, 6), (80, 0), (0, 6), (0, 0)])
def test_evaluators_agree(
    num_objects: int, per_object: int, max_dets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    objects, detections = [], []
    for number in range(80):  # in no image, nor of a class, that is the last one
        image_id, category_id = rng.choice(IMAGE_IDS[:-1]), rng.choice(CATEGORY_IDS[:-1])
        box = np.array([*8.0 * rng.integers(0, 20, 2), *rng.choice(SIDES_PX, 2)])
        record = {"image_id": int(image_id), "category_id": int(category_id)}
        is_crowd = bool(rng.random() < 0.2)
        objects.append(Annotation(**record, bbox=box.tolist(), iscrowd=is_crowd, id=number - 5))
        for _ in range(per_object):  # with ties
            near, score = box + 8 * rng.integers(-1, 2, 4), rng.integers(1, 8) / 8
            detections.append({**record, "bbox": near.tolist(), "score": float(score)})

    images = [Image(i, f"{i}.jpg", 300, 300) for i in IMAGE_IDS]
    categories = [Category(i, f"class {i}") for i in CATEGORY_IDS]
    coco = CocoFile(images, categories, objects[:num_objects])
    truth = ground_truth(coco, CATEGORY_IDS)  # which numbers the objects anew
    found = []
    for evaluator in (faster_coco_eval.COCOeval_faster, COCOeval):
        monkeypatch.setattr(evaluate, "COCOeval", evaluator)
        metrics = evaluate.coco_metrics(truth, detections, max_dets)
        found.append(metrics.pop("per_class") | metrics)
    assert found[0] == pytest.approx(found[1], abs=1e-14)
    assert (0.05 < found[0]["AP"] < 0.95) == (num_objects > 0 and per_object > 0)

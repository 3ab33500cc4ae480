#!/usr/bin/env bash
# torchmetrics: MeanAveragePrecision rounds its recall levels to float32, which moves AP by a whole point.
#
# Expected: with its default settings and backend="pycocotools" it gives what pycocotools gives for the
#           same boxes.
# Seen:     the 101 levels are torch.linspace(0, 1, 101), in float32: 0.6 becomes 0.60000002. Where 6 of
#           10 objects are found, recall is 0.6 exactly, and the level no longer counts: 60 of 101 levels
#           instead of 61, AP 59.4 instead of 60.4. Levels given in float64 give pycocotools' AP.
# Versions: torchmetrics 1.9.0, pycocotools 2.0.11, torch 2.14.1 (CPU), Python 3.11.
# Hurt:     whoever compares a validation curve from torchmetrics with an evaluation by pycocotools. The
#           fewer objects a class has, the more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torchmetrics==1.9.0" "pycocotools==2.0.11" "torch==2.14.1" "torchvision==0.29.1"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import sys
from importlib.metadata import version

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

print(*(f"{name} {version(name)}" for name in ("torchmetrics", "pycocotools", "torch")))
xyxy = [[40.0 * i, 0.0, 40.0 * i + 30, 30.0] for i in range(10)]  # 10 objects in a row
num_found = 6  # each exactly

with contextlib.redirect_stdout(io.StringIO()):
    truth, found = COCO(), COCO()
    record = {"image_id": 1, "category_id": 1, "area": 900, "iscrowd": 0}
    boxes = [{**record, "id": i + 1, "bbox": [40.0 * i, 0.0, 30.0, 30.0]} for i in range(10)]
    rest = {"images": [{"id": 1}], "categories": [{"id": 1}]}
    truth.dataset = {**rest, "annotations": boxes}
    found.dataset = {**rest, "annotations": [{**box, "score": 0.9} for box in boxes[:num_found]]}
    truth.createIndex()
    found.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()


def torchmetrics_ap(**settings):
    metric = MeanAveragePrecision(**settings)
    labels = torch.zeros(10, dtype=torch.int64)
    found = {"boxes": torch.tensor(xyxy[:num_found]), "labels": labels[:num_found]}
    found["scores"] = torch.full((num_found,), 0.9)
    metric.update([found], [{"boxes": torch.tensor(xyxy), "labels": labels}])
    return float(metric.compute()["map"])


reference = evaluation.stats[0]
default = torchmetrics_ap()
float64 = torchmetrics_ap(rec_thresholds=np.linspace(0, 1, 101).tolist())
print(f"AP of 6 of 10 objects, pycocotools:          {reference:.4f}")
print(f"AP of 6 of 10 objects, torchmetrics:         {default:.4f}")
print(f"the same with recall levels in float64:      {float64:.4f}")
sys.exit(not (reference - default > 0.009 and abs(reference - float64) < 1e-6))
PYTHON

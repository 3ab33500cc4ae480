#!/usr/bin/env bash
# faster-coco-eval: an object whose annotation id is negative is never found.
#
# Expected: the numbers of pycocotools, whose drop-in replacement it is. An id is only a label there.
#           (pycocotools itself takes 0 for "no match", and faster-coco-eval warns of that one.)
# Seen:     perfect detections of objects with negative ids have an AP of 0, without a warning;
#           pycocotools says 1.
# Versions: faster-coco-eval 1.8.0, pycocotools 2.0.11, numpy 2.4.6, Python 3.11.
# Hurt:     whoever merges annotation files and keeps their ids apart by sign, or takes hashes for ids,
#           and then changes the evaluator for speed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "faster-coco-eval==1.8.0" "pycocotools==2.0.11" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import sys
from importlib.metadata import version

from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(evaluator, ids):
    """Three objects with these ids in one image, each detected exactly."""
    objects = []
    for number, annotation_id in enumerate(ids):
        box = [60 * number, 0, 50, 50]
        objects.append({"id": annotation_id, "image_id": 1, "category_id": 1, "bbox": box})
        objects[-1] |= {"area": 2500, "iscrowd": 0}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "width": 200, "height": 50}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": objects,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = [{**each, "score": 0.9} for each in objects]
        run = evaluator(truth, truth.loadRes(found), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    return round(float(run.stats[0]), 3)


print({name: version(name) for name in ("faster-coco-eval", "pycocotools", "numpy")})
seen = {}
for ids in ((1, 2, 3), (-1, -2, -3)):
    for evaluator in (COCOeval, COCOeval_faster):
        seen[ids, evaluator] = average_precision(evaluator, ids)
        print(f"ids {ids}: {evaluator.__name__} gives AP {seen[ids, evaluator]}")
sys.exit(list(seen.values()) != [1.0, 1.0, 1.0, 0.0])
PYTHON

#!/usr/bin/env bash
# datumaro: from Pascal VOC to COCO it gives two objects of an image one id, and pycocotools loses one.
#
# Expected: every annotation in the JSON has an id of its own, as COCO's format says.
# Seen:     VOC has no ids; datumaro counts the objects of each image from 0 and takes 0 for "no id yet".
#           The two objects of the image below are both written with id 1. pycocotools keeps annotations
#           by id: it gives the second one twice, and the first one, of another class, never. Both are
#           there with `reindex=True`.
# Versions: datumaro 1.13.12, pycocotools 2.0.11, Python 3.11.
# Hurt:     whoever evaluates or trains with that JSON through pycocotools, on which most detectors'
#           data loaders are built: objects are missing and others count twice, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "datumaro==1.13.12" "pycocotools==2.0.11" pillow
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import contextlib
import io
import sys
from importlib.metadata import version
from pathlib import Path

from datumaro import Dataset
from PIL import Image
from pycocotools.coco import COCO

print("datumaro", version("datumaro"), "pycocotools", version("pycocotools"))
folder = Path(sys.argv[1])
voc = folder / "voc"
for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
    (voc / name).mkdir(parents=True)
Image.new("RGB", (100, 60)).save(voc / "JPEGImages" / "a.jpg")
(voc / "ImageSets" / "Main" / "train.txt").write_text("a\n")
(voc / "labelmap.txt").write_text("cat:255,0,0::\ndog:0,0,255::\n")
objects = "".join(
    f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>11</ymin><xmax>{x + 29}</xmax>"
    "<ymax>40</ymax></bndbox></object>"
    for name, x in (("cat", 11), ("dog", 61))
)
(voc / "Annotations" / "a.xml").write_text(
    "<annotation><filename>a.jpg</filename><size><width>100</width><height>60</height>"
    f"<depth>3</depth></size>{objects}</annotation>"
)


def read_classes(**options):
    """The ids in the exported JSON, and the classes of all objects as pycocotools gives them."""
    out = folder / f"coco{len(options)}"
    Dataset.import_from(str(voc), "voc").export(str(out), "coco_instances", **options)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "annotations" / "instances_train.json"))
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    ids = [annotation["id"] for annotation in coco.dataset["annotations"]]
    return ids, [names[a["category_id"]] for a in coco.loadAnns(coco.getAnnIds())]


default, reindexed = read_classes(), read_classes(reindex=True)
print("ids, and classes that pycocotools gives:", *default)
print("the same with reindex=True:             ", *reindexed)
sys.exit(not (default == ([1, 1], ["dog", "dog"]) and reindexed == ([1, 2], ["cat", "dog"])))
PYTHON

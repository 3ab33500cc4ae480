#!/usr/bin/env bash
# Label Studio: the export to COCO misplaces rotated boxes in images that are not square.
#
# Expected: a box is stored in percent of the image's width and height, with a clockwise rotation about
#           its top left corner. Turned by 90 degrees, a box of 40 x 20 pixels at (90, 10) covers x from
#           70 to 90 and y from 10 to 50, whatever the image's size.
# Seen:     it does in an image of 120 x 120 pixels. In one of 120 x 60 the JSON says x from 50 to 90 and
#           y from 10 to 30: percent of the width and of the height are mixed as if they were the same
#           length.
# Versions: label-studio-sdk 2.1.2 (its converter, which Label Studio's own export uses), Python 3.11.
# Hurt:     whoever trains on such an export: most photographs are not square, the boxes are plausible
#           and lie beside the objects.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "label-studio-sdk==2.1.2"
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from label_studio_sdk.converter import Converter

print("label-studio-sdk", version("label-studio-sdk"))
CONFIG = """<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">
<Label value="cat"/></RectangleLabels></View>"""
folder = Path(sys.argv[1])


def exported_xyxy(width, height):
    """Of a box of 40 x 20 pixels whose top left corner is at (90, 10), turned by 90 degrees."""
    value = {"x": 90 / width * 100, "y": 10 / height * 100, "rotation": 90}
    value |= {"width": 40 / width * 100, "height": 20 / height * 100, "rectanglelabels": ["cat"]}
    box = {"id": "a", "type": "rectanglelabels", "from_name": "label", "to_name": "image"}
    box |= {"value": value, "original_width": width, "original_height": height}
    annotation = {"id": 1, "completed_by": 1, "was_cancelled": False, "result": [box]}
    task = {"id": 1, "data": {"image": "a.png"}, "annotations": [annotation], "predictions": []}
    (folder / "tasks.json").write_text(json.dumps([task]))
    converter = Converter(CONFIG, project_dir=str(folder), download_resources=False)
    converter.convert_to_coco(str(folder / "tasks.json"), str(folder / "out"), is_dir=False)
    (record,) = json.loads((folder / "out" / "result.json").read_text())["annotations"]
    x, y, width, height = record["bbox"]
    return [round(number) for number in (x, y, x + width, y + height)]


square, wide = exported_xyxy(120, 120), exported_xyxy(120, 60)
print("xyxy in an image of 120 x 120:", square)
print("xyxy in an image of 120 x 60: ", wide)
sys.exit(not (square == [70, 10, 90, 50] and wide == [50, 10, 90, 30]))
PYTHON

"""DATA.md, "Other formats": its code turns other tools' labels into COCO's JSON."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data import CocoDataset

COLOURS = {"cat": (250, 20, 20), "dog": (20, 20, 250)}
CLASSES = ["cat", "dog", "cow"]  # YOLO's ids 0, 1 and 2; nothing is a cow

# Width and height as people see the image, turned as EXIF says; and for each object its class and
# xyxy, edges in pixels from 0.
IMAGES = {
    "a.jpg": (64, 48, [("cat", 0, 0, 20, 16), ("dog", 30, 8, 64, 48)]),
    "b.jpg": (80, 60, [("dog", 8, 10, 40, 50)]),
    "c d.jpeg": (50, 70, [("cat", 5, 33, 49, 69), ("cat", 10, 4, 22, 21)]),
    "e.JPG": (97, 53, [("dog", 1, 2, 60, 47)]),
    "empty.jpg": (64, 64, []),
    "turned.jpg": (40, 72, [("cat", 3, 40, 33, 70), ("dog", 20, 5, 38, 30)]),
}

# supervision warns where OpenCV is missing, but it does the same without it.
pytestmark = pytest.mark.filterwarnings("ignore:OpenCV", "ignore:Skipped unsupported LabelMe")


def write_images(folder: str) -> None:
    Path(folder).mkdir()
    for name, (width, height, objects) in IMAGES.items():
        pixels = np.full((height, width, 3), 90, dtype=np.uint8)
        for label, x1, y1, x2, y2 in objects:
            pixels[y1:y2, x1:x2] = COLOURS[label]
        image, exif = Image.fromarray(pixels), Image.Exif()
        if name == "turned.jpg":
            image = image.transpose(Image.Transpose.ROTATE_90)  # as stored: 72 x 40
            exif[0x0112] = 6  # to be shown turned back
        image.save(Path(folder, name), quality=95, exif=exif)


def write_labels(folder: str, suffix: str, texts: list[str]) -> None:
    """One file for each image that has a text."""
    Path(folder).mkdir(exist_ok=True)
    for name, text in zip(IMAGES, texts, strict=True):
        if text:
            Path(folder, name).with_suffix(suffix).write_text(text)


def write_yolo() -> None:
    Path("data.yaml").write_text(f"train: images\nnames: {CLASSES}\n")
    texts = []
    for width, height, objects in IMAGES.values():
        lines = [
            f"{CLASSES.index(label)} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
            for label, x1, y1, x2, y2 in objects
        ]
        texts.append("".join(lines))
    write_labels("labels", ".txt", texts)


def write_voc() -> None:
    """Every object is marked as difficult, which is lost."""
    texts = []
    for name, (width, height, objects) in IMAGES.items():
        # VOC names the first and the last pixel of a box, and the pixels start at 1.
        records = [
            f"<object><name>{label}</name><difficult>1</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, x1, y1, x2, y2 in objects
        ]
        texts.append(
            f"<annotation><filename>{name}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{''.join(records)}</annotation>"
        )
    write_labels("Annotations", ".xml", texts)


def write_labelme() -> None:
    """Cats are polygons, dogs rectangles from their last to their first corner; circles are lost.

    An image in which nothing is marked has no file.
    """
    texts = []
    for name, (width, height, objects) in IMAGES.items():
        shapes = [("cat", "circle", [(20, 20), (25, 20)])] if objects else []
        for label, x1, y1, x2, y2 in objects:
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            if label == "cat":
                shapes.append((label, "polygon", [(x1, y), (x, y1), (x2, y), (x, y2)]))
            else:
                shapes.append((label, "rectangle", [(x2, y2), (x1, y1)]))
        keys = ("label", "shape_type", "points")
        record = {"imagePath": name, "imageData": None, "imageWidth": width, "imageHeight": height}
        record["shapes"] = [dict(zip(keys, shape, strict=True)) for shape in shapes]
        texts.append(json.dumps(record) if objects else "")
    write_labels("images", ".json", texts)


def run_code_of_data_md(loader: str) -> None:
    """With the line of one format, in the current folder."""
    text = (ROOT / "DATA.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    others = [line for line in block.splitlines() if ".from_" in line and f".{loader}(" not in line]
    assert len(others) == 2
    for line in others:
        block = block.replace(line, "")
    exec(compile(block, "DATA.md", "exec"), {})


@pytest.mark.parametrize(
    ("loader", "write", "folder"),
    [
        ("from_yolo", write_yolo, "images"),
        ("from_pascal_voc", write_voc, "JPEGImages"),
        ("from_labelme", write_labelme, "images"),
    ],
)
def test_labels_of_other_tools_are_converted(
    loader: str,
    write: Callable[[], None],
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("supervision", minversion="0.31.2")
    monkeypatch.chdir(tmp_path)
    write_images(folder)
    write()
    run_code_of_data_md(loader)

    found = {}
    for json_file in ("train.json", "val.json"):
        dataset = CocoDataset(json_file, folder)
        for name, (image, target) in zip(dataset.file_names.tolist(), dataset, strict=True):
            found[name] = []
            for label, box in zip(target["labels"], target["boxes"].tolist(), strict=True):
                x1, y1, x2, y2 = box = [round(number, 2) for number in box]
                found[name].append((dataset.class_names[label], *box))
                pixel = image[:, round((y1 + y2) / 2), round((x1 + x2) / 2)]
                assert np.allclose(pixel, COLOURS[dataset.class_names[label]], atol=30)

    assert {name: sorted(objects) for name, objects in found.items()} == {
        name: sorted(objects)
        for name, (_, _, objects) in IMAGES.items()
        if objects or loader != "from_labelme"
    }

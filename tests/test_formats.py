"""DATA.md, "Other formats": its code turns other tools' labels into JSON for train.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import CocoDataset

DATA = (Path(__file__).parents[1] / "DATA.md").read_text(encoding="utf-8")
COLOURS = {"cat": (250, 20, 20), "dog": (20, 20, 250)}
CLASSES = ["cat", "dog", "cow"]  # YOLO's ids 0, 1 and 2; nothing is a cow

# supervision warns where OpenCV is missing, but it does the same without it.
pytestmark = pytest.mark.filterwarnings("ignore:OpenCV")


class Shown(NamedTuple):
    """An image as people see it, turned as EXIF says."""

    width: int
    height: int
    objects: list[tuple[str, int, int, int, int]]  # class and xyxy, edges in pixels from 0


IMAGES = {
    "a.jpg": Shown(64, 48, [("cat", 0, 0, 20, 16), ("dog", 30, 8, 64, 48)]),
    "b.jpg": Shown(80, 60, [("dog", 8, 10, 40, 50)]),
    "c d.jpeg": Shown(50, 70, [("cat", 5, 33, 49, 69), ("cat", 10, 4, 22, 21)]),
    "e.JPG": Shown(97, 53, [("dog", 1, 2, 60, 47)]),
    "empty.jpg": Shown(64, 64, []),
    "turned.jpg": Shown(40, 72, [("cat", 3, 40, 33, 70), ("dog", 20, 5, 38, 30)]),
}


def write_images(folder: str) -> None:
    Path(folder).mkdir()
    for name, shown in IMAGES.items():
        pixels = np.full((shown.height, shown.width, 3), 90, dtype=np.uint8)
        for label, x1, y1, x2, y2 in shown.objects:
            pixels[y1:y2, x1:x2] = COLOURS[label]
        image, exif = Image.fromarray(pixels), Image.Exif()
        if name == "turned.jpg":
            image = image.transpose(Image.Transpose.ROTATE_90)  # as stored: 72 x 40
            exif[0x0112] = 6  # to be shown turned back
        image.save(Path(folder, name), quality=95, exif=exif)


def write_yolo() -> None:
    write_images("images")
    Path("data.yaml").write_text(f"train: images\nnames: {CLASSES}\n")
    Path("labels").mkdir()
    for name, (width, height, objects) in IMAGES.items():
        lines = [
            f"{CLASSES.index(label)} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
            for label, x1, y1, x2, y2 in objects
        ]
        if lines:
            Path("labels", name).with_suffix(".txt").write_text("".join(lines))


def write_voc() -> None:
    write_images("JPEGImages")
    Path("Annotations").mkdir()
    for name, (width, height, objects) in IMAGES.items():
        # VOC names the first and the last pixel of a box, and the pixels start at 1.
        records = [
            f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, x1, y1, x2, y2 in objects
        ]
        Path("Annotations", name).with_suffix(".xml").write_text(
            f"<annotation><filename>{name}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{''.join(records)}</annotation>"
        )


def shape(label: str, points: list[tuple[float, float]], **more: Any) -> dict[str, Any]:
    """A shape of a LabelMe file, a rectangle of two points or a polygon of several."""
    kind = "rectangle" if len(points) == 2 else "polygon"
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, **more}


def write_labelme_file(name: str, shapes: list[dict[str, Any]]) -> None:
    record = {
        "version": "5.5.0",
        "shapes": shapes,
        "imagePath": name,
        "imageData": None,
        "imageWidth": IMAGES[name].width,
        "imageHeight": IMAGES[name].height,
    }
    Path("images", name).with_suffix(".json").write_text(json.dumps(record))


def write_labelme() -> None:
    write_images("images")
    for name, (_, _, objects) in IMAGES.items():
        shapes = []
        for label, x1, y1, x2, y2 in objects:
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            diamond = [(x1, y), (x, y1), (x2, y), (x, y2)]
            shapes.append(shape(label, diamond if label == "cat" else [(x2, y2), (x1, y1)]))
        if shapes:  # LabelMe writes no file for an image in which nothing is marked
            write_labelme_file(name, shapes)


def run_readme(loader: str) -> None:
    """Runs the code of DATA.md with the line of one format, in the current folder."""
    pytest.importorskip("supervision", minversion="0.31.2")
    blocks = re.findall(r"```python\n(.*?)```", DATA, re.DOTALL)
    (block,) = [block for block in blocks if "supervision" in block]
    loaders = [line for line in block.splitlines() if ".from_" in line]
    assert len(loaders) == 3 and loader in block
    for line in loaders:
        if f".{loader}(" not in line:
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
def test_labels_of_other_tools_are_converted_and_trained_on(
    loader: str,
    write: Callable[[], None],
    folder: str,
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write()
    run_readme(loader)

    found = {}
    for json_file in ("train.json", "val.json"):
        dataset = CocoDataset(json_file, folder)
        expected = CLASSES if loader == "from_yolo" else ["cat", "dog"]
        assert sorted(dataset.class_names) == sorted(expected)
        for index, name in enumerate(dataset.file_names):
            image, target = dataset[index]
            labels = [dataset.class_names[label] for label in target["labels"]]
            boxes = [[round(number, 2) for number in box] for box in target["boxes"].tolist()]
            found[str(name)] = sorted(
                (label, *box) for label, box in zip(labels, boxes, strict=True)
            )
            for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
                colour = image[:, round((y1 + y2) / 2), round((x1 + x2) / 2)]
                assert torch.allclose(colour.float(), torch.tensor(COLOURS[label]).float(), atol=30)

    assert found == {
        name: sorted(shown.objects)
        for name, shown in IMAGES.items()
        if shown.objects or loader != "from_labelme"
    }

    flags = ["--train-json", "train.json", "--val-json", "val.json", "--output", "run"]
    flags += ["--train-images", folder, "--val-images", folder]
    assert train.main([*tiny_flags, *flags]) == 0


@pytest.mark.parametrize("are_renamed", [False, True])
def test_a_group_in_labelme_is_a_crowd_unless_its_polygons_are_called_rectangles(
    are_renamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_labelme()
    parts = [[(5, 5), (15, 5), (15, 15)], [(40, 20), (60, 20), (60, 45)]]
    for name in IMAGES:
        shapes = [shape("cat", points, group_id=1) for points in parts]
        if are_renamed:
            shapes = [part | {"shape_type": "rectangle"} for part in shapes]
        write_labelme_file(name, shapes)
    run_readme("from_labelme")

    annotations = json.loads(Path("train.json").read_text())["annotations"]
    assert [annotation["bbox"] for annotation in annotations] == [[5, 5, 55, 40]] * 4
    assert {annotation["iscrowd"] for annotation in annotations} == {0 if are_renamed else 1}

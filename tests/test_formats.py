"""DATA.md, "Other formats": its code turns other tools' labels into JSON for train.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
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


def write_labelme() -> None:
    """Cats are polygons, dogs rectangles from their last to their first corner."""
    write_images("images")
    for name, (width, height, objects) in IMAGES.items():
        record = {"version": "5.5.0", "imagePath": name, "imageData": None, "shapes": []}
        for label, x1, y1, x2, y2 in objects:
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            diamond = [(x1, y), (x, y1), (x2, y), (x, y2)]
            kind, points = {
                "cat": ("polygon", diamond),
                "dog": ("rectangle", [(x2, y2), (x1, y1)]),
            }[label]
            record["shapes"].append(
                {"label": label, "points": points, "group_id": None, "shape_type": kind}
            )
        record |= {"imageWidth": width, "imageHeight": height}
        if objects:  # LabelMe writes no file for an image in which nothing is marked
            Path("images", name).with_suffix(".json").write_text(json.dumps(record))


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
        assert set(dataset.class_names) >= set(COLOURS)
        for name, (image, target) in zip(dataset.file_names.tolist(), dataset, strict=True):
            found[name] = []
            for label, box in zip(target["labels"], target["boxes"].tolist(), strict=True):
                x1, y1, x2, y2 = box = [round(number, 2) for number in box]
                found[name].append((dataset.class_names[label], *box))
                pixel = image[:, round((y1 + y2) / 2), round((x1 + x2) / 2)]
                assert np.allclose(pixel, COLOURS[found[name][-1][0]], atol=30)

    assert {name: sorted(objects) for name, objects in found.items()} == {
        name: sorted(shown.objects)
        for name, shown in IMAGES.items()
        if shown.objects or loader != "from_labelme"
    }

    flags = ["--train-json", "train.json", "--val-json", "val.json", "--output", "run"]
    flags += ["--train-images", folder, "--val-images", folder]
    assert train.main([*tiny_flags, *flags]) == 0

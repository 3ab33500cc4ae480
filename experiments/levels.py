"""Two harder kinds of Shapes, as files: `python -m experiments.levels LEVEL FOLDER`.

    lookalikes   24 classes: six outlines, each in four directions. Nothing but the direction tells
                 "arrow up" from "arrow left". Everything else is as on the crowded level.
    twins        the six classes of the crowded level, but every object has a twin: one more of the
                 same class and size that covers or is covered by it (IoU 0.25 to 0.7).

They are for one question: when does a dynamic head pay? (`experiments/README.md`)

Out: train.json, val.json and tune.json in COCO's format, and images/ with PNGs of 96×96 pixels, to
     train on with `--train-json` and the other flags. "tune" is for choosing learning rates.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

import shapes
from support.cli import parse_args, run_main

SPLITS = {"train": 4000, "val": 400, "tune": 400}  # images
SEEDS = {"lookalikes": 100, "twins": 200}  # of a level; one more for each split

# --- outlines that point up; see the shapes in shapes.py ---


def union(*parts: np.ndarray) -> np.ndarray:
    """Where any part is: a shape is where its function is at most 0."""
    return np.minimum.reduce(np.broadcast_arrays(*parts))


def bar(u: np.ndarray, v: np.ndarray, left: float, top: float, right: float, bottom: float):
    """A rectangle with these sides, in the coordinates of the box."""
    return np.maximum(
        abs(u - (left + right) / 2) - (right - left) / 2,
        abs(v - (top + bottom) / 2) - (bottom - top) / 2,
    )


def dome(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(shapes.ellipse(u, (v - 1) / 2), abs(v) - 1)


def tee(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return union(bar(u, v, -1, -1, 1, -0.4), bar(u, v, -0.3, -1, 0.3, 1))


def ell(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return union(bar(u, v, -1, -1, -0.4, 1), bar(u, v, -1, 0.4, 1, 1))


def cup(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return union(ell(u, v), bar(u, v, 0.4, -1, 1, 1))


def arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return union(shapes.triangle(u, v + v + 1), bar(u, v, -0.3, 0, 0.3, 1))


OUTLINES = {
    "triangle": shapes.triangle,
    "dome": dome,
    "tee": tee,
    "ell": ell,
    "cup": cup,
    "arrow": arrow,
}


def turned(outline: shapes.Shape, direction: str) -> shapes.Shape:
    """The outline, pointing in another direction."""
    return {
        "up": lambda u, v: outline(u, v),
        "left": lambda u, v: outline(-v, u),
        "down": lambda u, v: outline(-u, -v),
        "right": lambda u, v: outline(v, -u),
    }[direction]


LOOKALIKES: dict[str, shapes.Shape] = {
    f"{name} {direction}": turned(outline, direction)
    for name, outline in OUTLINES.items()
    for direction in ("up", "left", "down", "right")
}


# --- images ---


def add_twins(
    rng: np.random.Generator, boxes_px: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 4) xyxy and labels (M,) with a twin right after each object: (2·M, 4), (2·M,)."""
    sizes_px = boxes_px[:, 2:] - boxes_px[:, :2]
    shifts_px = rng.uniform(0.1, 0.3, boxes_px[:, :2].shape) * sizes_px
    # Towards the centre of the image, so that a twin stays inside.
    centres_px = (boxes_px[:, :2] + boxes_px[:, 2:]) / 2
    shifts_px *= np.where(centres_px < shapes.SIZE_PX / 2, 1, -1)
    twins_px = (boxes_px + np.tile(shifts_px, 2)).clip(0, shapes.SIZE_PX)
    both_px = np.stack((boxes_px, twins_px), axis=1).reshape(-1, 4)
    return both_px.astype(np.float32), np.repeat(labels, 2)


def draw(name: str, split: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image (3, H, W) uint8, its boxes (M, 4) xyxy in pixels, and its labels (M,) from 0."""
    rng = np.random.default_rng([SEEDS[name] + list(SPLITS).index(split), index])
    level, forms = shapes.LEVELS["crowded"], shapes.SHAPES
    if name == "lookalikes":
        forms = LOOKALIKES
        level = replace(level, class_names=tuple(forms))
    else:
        level = replace(level, max_objects=level.max_objects // 2, max_iou=0.1)

    boxes_px, labels = shapes.draw_layout(rng, level)
    if name == "twins":
        boxes_px, labels = add_twins(rng, boxes_px, labels)
    canvas, avoid = shapes.draw_background(rng, level)
    colours = shapes.draw_colours(rng, len(labels), avoid)
    for box_px, label, colour in zip(boxes_px, labels, colours, strict=True):
        shapes.paint(canvas, box_px, forms[level.class_names[label]], colour)
    return canvas.round().clip(0, 255).astype(np.uint8), boxes_px, labels


def write(name: str, folder: Path, splits: dict[str, int]) -> None:
    """Writes the images of each split, and its annotations in COCO's format."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    class_names = LOOKALIKES if name == "lookalikes" else shapes.SHAPES
    categories = [{"id": number, "name": text} for number, text in enumerate(class_names, 1)]
    for split, length in splits.items():
        images, annotations = [], []
        for index in range(length):
            pixels, boxes_px, labels = draw(name, split, index)
            file_name = f"{split}-{index:05d}.png"
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "images" / file_name)
            side = shapes.SIZE_PX
            images.append({"id": index, "file_name": file_name, "width": side, "height": side})
            for (x1, y1, x2, y2), label in zip(boxes_px.tolist(), labels.tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        values = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(values), encoding="utf-8")


@dataclass(frozen=True)
class LevelsArgs:
    level: tyro.conf.Positional[Literal["lookalikes", "twins"]]
    output: tyro.conf.Positional[Path]  # folder to write into


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse_args(argv, LevelsArgs, "python -m experiments.levels", __doc__.split("\n\n")[0])
    write(args.level, args.output, SPLITS)
    print(f"written: {', '.join(SPLITS)} and their images in {args.output}")


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.levels"))

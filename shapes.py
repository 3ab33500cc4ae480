"""The embedded Shapes data set: pictures of coloured shapes with boxes and labels, drawn when they are asked for.

No files and no network: `make demo` and the tests run on it. In goes (level, split,
length); out come (image, target) pairs and COCO-format ground truth, by the same interface as `data.CocoDataset`.

    demo      1-5 objects of 3 classes, sides 12-50 % of the picture (uniform), boxes overlap up to an IoU of 0.1,
              on a smooth background of low contrast (standard deviation at most 30 of 255 within a picture)
    crowded   1-8 objects of 6 classes, sides 10-50 % (log-uniform), boxes overlap up to an IoU of 0.4,
              on a marbled background as contrasty as the objects

Shapes: M objects in a picture, K classes; pictures are (3, 96, 96), H = W = 96.

Determinism: a picture is a function of (level, split, index) alone. Each draws from a random generator of its own, so
neither order, process, length nor anybody's global seed matters; the two splits have different seeds, so they share no
picture. (NumPy may change its random streams between versions: compare figures made with one version.)

Boxes are amodal: they enclose the whole object, also where another one covers a part of it.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torchvision import tv_tensors

from support.errors import UserError

SIZE_PX = 96  # height and width of every picture
# Colours closer than this are too hard to tell apart (Euclidean, channels 0-255). The balls of this radius around all
# the colours that an object must avoid, at most 10, have less volume than the RGB cube: there always is another.
MIN_COLOUR_DISTANCE = 70.0
MAX_SIDE = 0.5  # longest side of an object, as a share of the picture's
MAX_HIDDEN = 0.75  # share of a box that smaller ones may cover together, lest its object disappear under them
SHADING = 22.0  # of 255: how much an object brightens to its upper left corner and darkens to its lower right one
SUPERSAMPLE = 3  # points a pixel and axis: anti-aliased edges
TRIES, RESTARTS = (
    50,
    20,
)  # positions for one object; times that all objects of a picture are placed anew
SEEDS = {("demo", "train"): 1, ("demo", "val"): 2, ("crowded", "train"): 3, ("crowded", "val"): 4}

# A shape is where f(u, v) <= 0; u runs right and v down, and the box is [-1, 1] x [-1, 1]. Every shape touches all four
# sides. The tips of triangle and diamond are cut by 6 %: a sharper one would vanish between the pixels, and its box
# would not be tight any more.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ellipse": lambda u, v: u * u + v * v - 1,
    "rectangle": lambda u, v: np.maximum(abs(u), abs(v)) - 1,
    "triangle": lambda u, v: np.maximum(abs(u) - 0.53 - 0.47 * v, abs(v) - 1),
    "diamond": lambda u, v: np.maximum(abs(u) + abs(v) - 1.06, np.maximum(abs(u), abs(v)) - 1),
    "cross": lambda u, v: np.maximum(
        np.minimum(abs(u), abs(v)) - 0.35, np.maximum(abs(u), abs(v)) - 1
    ),
    "ring": lambda u, v: abs(np.sqrt(u * u + v * v) - 0.77) - 0.23,
}


@dataclass(frozen=True)
class Level:
    """What the pictures of a level have in common."""

    class_names: tuple[str, ...]
    max_objects: int
    min_side: float  # as MAX_SIDE
    log_uniform: bool  # sides: uniform in their logarithm, or in themselves
    max_iou: float  # between any two boxes of a picture
    waves: int  # cosines an axis that the background is made of
    marbled: bool  # background: veins of two colours far apart, or clouds of one


LEVELS = {
    "demo": Level(
        ("ellipse", "rectangle", "triangle"), 5, 0.12, False, 0.1, waves=4, marbled=False
    ),
    "crowded": Level(tuple(SHAPES), 8, 0.10, True, 0.4, waves=6, marbled=True),
}


def draw_count(rng: np.random.Generator, level: Level) -> int:
    """The number of objects M: a picture's first draw, so that it is known without all the others."""
    return int(rng.integers(1, level.max_objects + 1))


def draw_layout(rng: np.random.Generator, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """What is where: boxes (M, 4) float32, xyxy pixels, and labels (M,) int64 from 0.

    The largest come first: they are the hardest to place, and painted first they do not hide the small ones. All sizes
    are drawn before any position, and a picture that does not fit gets new positions before it gets new sizes:
    rejecting object by object would leave fewer large ones than the level promises.
    """
    count = draw_count(rng, level)
    labels = rng.integers(0, len(level.class_names), count)
    while True:
        low, high = SIZE_PX * level.min_side, SIZE_PX * MAX_SIDE
        share = rng.random((count, 2))
        whs_px = low * (high / low) ** share if level.log_uniform else low + (high - low) * share
        whs_px = whs_px[np.argsort(-whs_px.prod(axis=1))]
        for _ in range(RESTARTS):
            boxes_px = place(rng, whs_px, level.max_iou)
            if boxes_px is not None:
                return np.array(boxes_px, dtype=np.float32), labels


def place(
    rng: np.random.Generator, whs_px: np.ndarray, max_iou: float
) -> list[tuple[float, ...]] | None:
    """Boxes of the given sizes (M, 2), anywhere they fit, as M xyxy tuples in pixels; None if one found no place."""
    placed: list[tuple[float, ...]] = []
    areas: list[float] = []
    spare: list[float] = []  # how much more of each box may be covered, in square pixels
    for w, h in whs_px.tolist():
        # Plain Python: on so few boxes at a time it is several times faster than arrays.
        for x, y in (rng.random((TRIES, 2)) * (SIZE_PX - w, SIZE_PX - h)).tolist():
            box = (x, y, x + w, y + h)
            shared = [overlap(box, other) for other in placed]
            checks = zip(shared, areas, spare, strict=True)
            if all(o <= max_iou * (w * h + area - o) and o <= room for o, area, room in checks):
                break
        else:
            return None
        placed.append(box)
        areas.append(w * h)
        spare = [room - o for room, o in zip(spare, shared, strict=True)] + [MAX_HIDDEN * w * h]
    return placed


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two xyxy boxes share."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0


def draw_background(rng: np.random.Generator, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """A texture (3, H, W) float32 of 0-255, and three of its colours (3, 3): its mean and those to both sides."""
    waves = np.arange(level.waves)
    # Cosines are orthogonal over the pixels and scaled to unit power here, so the coefficients' norm is the field's
    # standard deviation: exactly 1. Without the constant wave its mean is 0.
    cosines = np.cos(np.pi * waves[:, None] * (np.arange(SIZE_PX) + 0.5) / SIZE_PX)  # (waves, W)
    cosines[1:] *= 2**0.5
    coefficients = rng.standard_normal((level.waves, level.waves)) / (1 + waves[:, None] + waves)
    coefficients[0, 0] = 0
    field = (cosines.T @ (coefficients / np.linalg.norm(coefficients)) @ cosines).astype(
        np.float32
    )  # (H, W)
    if level.marbled:
        field = np.tanh(4 * np.sin(3 * field))  # veins with soft edges, within -1 … 1
        ends = rng.uniform(0, 255, (2, 3))
        while (
            np.linalg.norm(ends[1] - ends[0]) < 240
        ):  # makes it as contrasty as the objects; a test measures it
            ends = rng.uniform(0, 255, (2, 3))
        centre, deviation = ends.mean(axis=0), (ends[1] - ends[0]) / 2
    else:
        centre = rng.uniform(60, 195) + rng.uniform(-18, 18, 3)  # a grey with a tint
        deviation = rng.uniform(6, 14) + rng.uniform(-6, 6, 3)
    texture = (centre[:, None, None] + deviation[:, None, None] * field).astype(np.float32)
    return texture, centre + np.array([[field.mean()], [-1], [1]]) * deviation


def draw_colours(rng: np.random.Generator, count: int, avoid: np.ndarray) -> np.ndarray:
    """`count` RGB colours (M, 3) of 0-255, each far enough from the colours `avoid` (·, 3) and from one another."""
    taken = avoid
    while len(taken) < len(avoid) + count:
        colour = rng.uniform(0, 255, 3)
        if ((taken - colour) ** 2).sum(axis=1).min() >= MIN_COLOUR_DISTANCE**2:
            taken = np.vstack([taken, colour])
    return taken[len(avoid) :].astype(np.float32)


def paint(canvas: np.ndarray, box_px: np.ndarray, name: str, colour: np.ndarray) -> None:
    """Paints the shape `name` over `canvas` (3, H, W) float32, in place; box (4,) xyxy pixels, colour (3,) of 0-255."""
    x1, y1, x2, y2 = box_px.tolist()
    left, top, right, bottom = (
        int(x1),
        int(y1),
        int(np.ceil(x2)),
        int(np.ceil(y2)),
    )  # the only pixels it can touch
    offsets = (np.arange(SUPERSAMPLE * SIZE_PX, dtype=np.float32) + 0.5) / SUPERSAMPLE
    u = (2 * (left + offsets[: SUPERSAMPLE * (right - left)]) - x1 - x2) / (x2 - x1)
    v = (2 * (top + offsets[: SUPERSAMPLE * (bottom - top)]) - y1 - y2) / (y2 - y1)
    inside = SHAPES[name](u[None, :], v[:, None]) <= 0
    cells = inside.reshape(bottom - top, SUPERSAMPLE, right - left, SUPERSAMPLE)
    coverage = cells.mean(axis=(1, 3), dtype=np.float32)  # (h, w) shares of each pixel
    middle = SUPERSAMPLE // 2
    light = -SHADING / 2 * (u[None, middle::SUPERSAMPLE] + v[middle::SUPERSAMPLE, None])
    region = canvas[:, top:bottom, left:right]
    region += coverage * (colour[:, None, None] + light - region)


class ShapesDataset(torch.utils.data.Dataset):
    """Pictures of one level and split; see the module's docstring.

    Args:
        level: "demo" or "crowded".
        split: "train" or "val"; they share no picture.
        length: the number of pictures, at least 1. A shorter data set is the beginning of a longer one.
        transforms: a torchvision.transforms.v2 callable on (image, target), or None.

    Attributes:
        class_names: K names, in the labels' order.
        category_ids: K ids for COCO files, 1 … K.
        image_ids: `len(self)` ids, equal to the indices.
        sizes_hw: (len, 2) int64, height and width of each picture in pixels.

    Raises:
        UserError: a level, split or length that there is not.
    """

    def __init__(
        self,
        level: str,
        split: str,
        length: int,
        transforms: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    ) -> None:
        if level not in LEVELS:
            raise UserError(
                f"shapes: there is no level {level!r}; choose one of {', '.join(LEVELS)}"
            )
        if (level, split) not in SEEDS:
            raise UserError(f"shapes: there is no split {split!r}; choose one of train, val")
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise UserError(f"shapes: length={length!r} should be a whole number, 1 or more")
        self.level, self.seed, self.transforms = LEVELS[level], SEEDS[level, split], transforms
        self.class_names = self.level.class_names
        self.category_ids = tuple(range(1, len(self.class_names) + 1))
        self.image_ids = list(range(length))
        self.sizes_hw = np.full((length, 2), SIZE_PX)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """One picture: uint8 (3, H, W), and its target, both after `transforms`.

        The target holds "boxes" (M, 4) float32 xyxy pixels, "labels" (M,) int64 from 0, "image_id", and "size_hw",
        (height, width) before transforms.

        Raises:
            IndexError: no such picture.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of a data set of {len(self)}")
        rng = self._rng(index)
        boxes_px, labels = draw_layout(rng, self.level)
        canvas, avoid = draw_background(rng, self.level)
        colours = draw_colours(rng, len(labels), avoid)
        for box_px, label, colour in zip(boxes_px, labels, colours, strict=True):
            paint(canvas, box_px, self.class_names[label], colour)
        image = tv_tensors.Image(torch.from_numpy(canvas.round().clip(0, 255).astype(np.uint8)))
        hw = (SIZE_PX, SIZE_PX)
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(boxes_px), format="XYXY", canvas_size=hw)
        image_id = self.image_ids[index]  # an int, whatever kind of integer the index is
        target = {
            "boxes": boxes,
            "labels": torch.from_numpy(labels),
            "image_id": image_id,
            "size_hw": hw,
        }
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index])

    @cached_property
    def objects_per_image(self) -> np.ndarray:
        """The number of objects M of each picture, (len,) int64, without drawing any."""
        return np.array([draw_count(self._rng(index), self.level) for index in self.image_ids])

    def coco(self) -> COCO:
        """The ground truth in COCO's format; an annotation's "area" is its box's, as there are no masks."""
        coco = COCO()
        categories = [
            {"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)
        ]
        images, annotations = [], []
        for image_id in self.image_ids:
            file_name = f"{image_id:06d}.png"
            images.append(
                {"id": image_id, "width": SIZE_PX, "height": SIZE_PX, "file_name": file_name}
            )
            boxes_px, labels = draw_layout(self._rng(image_id), self.level)
            for (x1, y1, x2, y2), label in zip(boxes_px.tolist(), labels, strict=True):
                w, h = x2 - x1, y2 - y1
                # COCOeval takes an annotation of id 0 for none at all: ids start at 1.
                ids = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": self.category_ids[label],
                }
                annotations.append(ids | {"bbox": [x1, y1, w, h], "area": w * h, "iscrowd": 0})
        coco.dataset = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

"""Shapes: images of coloured shapes with their boxes and labels, drawn on demand.

`make demo` and the tests run on them: they need no files and no network. A level, a split and a
length go in; out comes what `data.CocoDataset` gives as well, pairs (image, target) and the ground
truth for pycocotools.

    demo      1–5 objects of 3 classes per image. Their sides are 12–50 % of the image's
              (uniform), and boxes overlap up to an IoU of 0.1. The background is smooth and of low
              contrast: its standard deviation is at most 30 of 255 per image.
    crowded   1–8 objects of 6 classes per image. Their sides are 10–50 % of the image's
              (log-uniform), and boxes overlap up to an IoU of 0.4. The background is marbled, with
              as much contrast as the objects.

An image depends on (level, split, index) alone, whatever else is drawn. NumPy may change its random
streams between versions, so compare numbers only if they come from one version. Boxes enclose the
whole object even if another one covers a part of it.

Shapes: M objects of an image, K classes. Images are (3, H, W) with H = W = 96.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torchvision import tv_tensors

from support.coco_json import Annotation, Category, CocoFile, Image, ground_truth
from support.errors import UserError

SIZE_PX = 96  # height and width of every image

# Two colours closer than this are too hard to tell apart (Euclidean distance, channels 0–255). An
# object must avoid at most 10 colours. The balls of this radius around them have less volume than
# the RGB cube, so there always is another colour.
MIN_COLOUR_DISTANCE = 70.0
SHADING = 22.0  # of 255: how much brighter an object is at its upper left than at its lower right

MAX_SIDE = 0.5  # longest side of an object, as a share of the image's
MAX_HIDDEN = 0.75  # share of a box that smaller ones may cover together; the object stays visible
TRIES = 50  # positions to try for one object
RESTARTS = 20  # times to place all objects of an image again, before their sizes are drawn again
SUPERSAMPLE = 3  # points per pixel and axis, for anti-aliased edges

# "tune" is for choosing settings, so that "val" stays unseen until a result is reported.
SEEDS = {
    ("demo", "train"): 1,
    ("demo", "val"): 2,
    ("crowded", "train"): 3,
    ("crowded", "val"): 4,
    ("demo", "tune"): 5,
    ("crowded", "tune"): 6,
}


# --- the shapes ---

# A shape is where its function of (u, v) is at most 0. u points right, v down, and the object's box
# is [-1, 1] x [-1, 1]. Every shape touches all four sides of its box.
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def rectangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) - 1


def ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v - 1


def triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # The tip is cut off by 6 %, as are the diamond's. A sharper tip would vanish between the
    # pixels, and the box would no longer be tight.
    return np.maximum(abs(u) - 0.53 - 0.47 * v, abs(v) - 1)


def diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u) + abs(v) - 1.06, rectangle(u, v))


def cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(abs(u), abs(v)) - 0.35, rectangle(u, v))


def ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return abs(np.sqrt(u * u + v * v) - 0.77) - 0.23


SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (ellipse, rectangle, triangle, diamond, cross, ring)
}


@dataclass(frozen=True)
class Level:
    """What the images of a level have in common."""

    class_names: tuple[str, ...]
    max_objects: int
    min_side: float  # shortest side of an object, as a share of the image's
    log_uniform: bool  # whether sides are uniform in their logarithm, or in themselves
    max_iou: float  # between any two boxes of an image
    waves: int  # cosines per axis that make up the background
    marbled: bool  # whether the background has veins of two distant colours, or clouds of one


LEVELS = {
    "demo": Level(
        class_names=("ellipse", "rectangle", "triangle"),
        max_objects=5,
        min_side=0.12,
        log_uniform=False,
        max_iou=0.1,
        waves=4,
        marbled=False,
    ),
    "crowded": Level(
        class_names=tuple(SHAPES),
        max_objects=8,
        min_side=0.10,
        log_uniform=True,
        max_iou=0.4,
        waves=6,
        marbled=True,
    ),
}


# --- where objects are ---


def draw_count(rng: np.random.Generator, level: Level) -> int:
    """The number of objects M. It is an image's first draw, so it is known without the others."""
    return int(rng.integers(1, level.max_objects + 1))


def draw_layout(rng: np.random.Generator, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Draws the objects of one image and their places.

    The largest objects come first: they are the hardest to place, and since they are painted first
    they do not hide the small ones. All sizes are drawn before any position, and objects that do
    not fit get new positions several times before they get new sizes. Rejecting one object at a
    time would leave fewer large ones than the level promises.

    Returns:
        Boxes (M, 4) float32 xyxy in pixels, and labels (M,) int64 from 0.
    """
    count = draw_count(rng, level)
    labels = rng.integers(0, len(level.class_names), count)
    low_px = SIZE_PX * level.min_side
    high_px = SIZE_PX * MAX_SIDE
    while True:
        share = rng.random((count, 2))
        if level.log_uniform:
            whs_px = low_px * (high_px / low_px) ** share
        else:
            whs_px = low_px + (high_px - low_px) * share
        whs_px = whs_px[np.argsort(-whs_px.prod(axis=1))]

        for _ in range(RESTARTS):
            boxes_px = place(rng, whs_px, level.max_iou)
            if boxes_px is not None:
                return np.array(boxes_px, dtype=np.float32), labels


def place(
    rng: np.random.Generator, whs_px: np.ndarray, max_iou: float
) -> list[tuple[float, ...]] | None:
    """Boxes of the given sizes (M, 2), at random places where they fit.

    Returns:
        M xyxy tuples in pixels, or None if one of them found no place.
    """
    # Plain Python is several times faster than arrays on so few boxes at a time.
    placed: list[tuple[float, ...]] = []
    areas: list[float] = []
    spare: list[float] = []  # how much more of each box may be covered, in square pixels
    for w, h in whs_px.tolist():
        for x, y in (rng.random((TRIES, 2)) * (SIZE_PX - w, SIZE_PX - h)).tolist():
            box = (x, y, x + w, y + h)
            shared = [overlap(box, other) for other in placed]
            # IoU = shared / union <= max_iou, without the division.
            fits = all(
                overlap_px <= max_iou * (w * h + area - overlap_px) and overlap_px <= room
                for overlap_px, area, room in zip(shared, areas, spare, strict=True)
            )
            if fits:
                break
        else:
            return None
        placed.append(box)
        areas.append(w * h)
        spare = [room - covered for room, covered in zip(spare, shared, strict=True)]
        spare.append(MAX_HIDDEN * w * h)
    return placed


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two xyxy boxes share."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0


# --- what they look like ---


def draw_background(rng: np.random.Generator, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Draws a texture.

    Returns:
        The texture (3, H, W) float32, 0–255, and three of its colours (3, 3): its mean, and one on
        either side of it.
    """
    waves = np.arange(level.waves)
    # Cosines are orthogonal over the pixels and scaled to unit power here, so the norm of the
    # coefficients is the standard deviation of the field: exactly 1. Without the constant wave its
    # mean is 0.
    cosines = np.cos(np.pi * waves[:, None] * (np.arange(SIZE_PX) + 0.5) / SIZE_PX)  # (waves, W)
    cosines[1:] *= 2**0.5
    coefficients = rng.standard_normal((level.waves, level.waves)) / (1 + waves[:, None] + waves)
    coefficients[0, 0] = 0
    coefficients /= np.linalg.norm(coefficients)
    field = (cosines.T @ coefficients @ cosines).astype(np.float32)  # (H, W)

    if level.marbled:
        field = np.tanh(4 * np.sin(3 * field))  # veins with soft edges, within -1 … 1
        ends = rng.uniform(0, 255, (2, 3))
        # Colours this far apart give as much contrast as the objects have; a test measures it.
        while np.linalg.norm(ends[1] - ends[0]) < 240:
            ends = rng.uniform(0, 255, (2, 3))
        centre = ends.mean(axis=0)
        deviation = (ends[1] - ends[0]) / 2
    else:
        centre = rng.uniform(60, 195) + rng.uniform(-18, 18, 3)  # a grey with a tint
        deviation = rng.uniform(6, 14) + rng.uniform(-6, 6, 3)

    texture = (centre[:, None, None] + deviation[:, None, None] * field).astype(np.float32)
    return texture, centre + np.array([[field.mean()], [-1], [1]]) * deviation


def draw_colours(rng: np.random.Generator, count: int, avoid: np.ndarray) -> np.ndarray:
    """RGB colours (count, 3), 0–255, far enough from those to avoid (·, 3) and from one another."""
    taken = avoid
    while len(taken) < len(avoid) + count:
        colour = rng.uniform(0, 255, 3)
        if ((taken - colour) ** 2).sum(axis=1).min() >= MIN_COLOUR_DISTANCE**2:
            taken = np.vstack([taken, colour])
    return taken[len(avoid) :].astype(np.float32)


def paint(canvas: np.ndarray, box_px: np.ndarray, shape: Shape, colour: np.ndarray) -> None:
    """Paints one object over what is there.

    Args:
        canvas: (3, H, W) float32, 0–255, changed in place.
        box_px: (4,) xyxy.
        shape: a function such as those in `SHAPES`.
        colour: (3,) RGB, 0–255.
    """
    x1, y1, x2, y2 = box_px.tolist()
    # The only pixels that the object can touch.
    left, right = int(x1), int(np.ceil(x2))
    top, bottom = int(y1), int(np.ceil(y2))

    offsets = (np.arange(SUPERSAMPLE * SIZE_PX, dtype=np.float32) + 0.5) / SUPERSAMPLE
    u = (2 * (left + offsets[: SUPERSAMPLE * (right - left)]) - x1 - x2) / (x2 - x1)
    v = (2 * (top + offsets[: SUPERSAMPLE * (bottom - top)]) - y1 - y2) / (y2 - y1)
    inside = shape(u[None, :], v[:, None]) <= 0
    points = inside.reshape(bottom - top, SUPERSAMPLE, right - left, SUPERSAMPLE)
    coverage = points.mean(axis=(1, 3), dtype=np.float32)  # (h, w) share of each pixel

    middle = SUPERSAMPLE // 2  # the point at the centre of a pixel
    light = -SHADING / 2 * (u[None, middle::SUPERSAMPLE] + v[middle::SUPERSAMPLE, None])
    region = canvas[:, top:bottom, left:right]
    region += coverage * (colour[:, None, None] + light - region)


# --- the data set ---


class ShapesDataset(torch.utils.data.Dataset):
    """The images of one level and split; see the top of this file.

    Args:
        level: "demo" or "crowded".
        split: "train", "val" or "tune". They share no image.
        length: the number of images, at least 1. A shorter data set is the beginning of a longer
            one.
        transforms: a callable on (image, target), or None.

    Attributes:
        class_names: K names, in the order of the labels.
        category_ids: K ids for COCO files, 1 … K.
        image_ids: `len(self)` ids, equal to the indices.
        sizes_hw: (len, 2) int64, height and width of each image in pixels.
        notes: empty, as there are no files to say anything about.

    Raises:
        UserError: there would be no image.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        level: str,
        split: str,
        length: int,
        transforms: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    ) -> None:
        if length < 1:
            raise UserError(f"shapes: {length} images of {level}; give 1 or more")
        self.level = LEVELS[level]
        self.seed = SEEDS[level, split]
        self.transforms = transforms
        self.class_names = self.level.class_names
        self.category_ids = tuple(range(1, len(self.class_names) + 1))
        self.image_ids = list(range(length))
        self.sizes_hw = np.full((length, 2), SIZE_PX)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """One image (3, H, W) uint8 and its target, both after `transforms`.

        The target holds "boxes" (M, 4) float32 xyxy in pixels, "labels" (M,) int64 from 0,
        "image_id", and "size_hw", the (height, width) before transforms.

        Raises:
            IndexError: there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a data set of {len(self)}")
        rng = self._rng(index)
        boxes_px, labels = draw_layout(rng, self.level)
        canvas, avoid = draw_background(rng, self.level)
        colours = draw_colours(rng, len(labels), avoid)
        for box_px, label, colour in zip(boxes_px, labels, colours, strict=True):
            paint(canvas, box_px, SHAPES[self.class_names[label]], colour)

        image = tv_tensors.Image(torch.from_numpy(canvas.round().clip(0, 255).astype(np.uint8)))
        size_hw = (SIZE_PX, SIZE_PX)
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes_px), format="XYXY", canvas_size=size_hw
            ),
            "labels": torch.from_numpy(labels),
            "image_id": self.image_ids[index],  # an int, whatever kind of integer the index is
            "size_hw": size_hw,
        }
        if self.transforms is None:
            return image, target
        return self.transforms(image, target)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index])

    @cached_property
    def objects_per_image(self) -> np.ndarray:
        """The number of objects M of each image, (len,) int64. No image is drawn for it."""
        return np.array([draw_count(self._rng(index), self.level) for index in self.image_ids])

    def coco(self) -> COCO:
        """The ground truth for pycocotools. There are no masks: an "area" is that of the box."""
        annotations = []
        for image_id in self.image_ids:
            boxes_px, labels = draw_layout(self._rng(image_id), self.level)
            for (x1, y1, x2, y2), label in zip(boxes_px.tolist(), labels, strict=True):
                xywh = (x1, y1, x2 - x1, y2 - y1)
                annotations.append(Annotation(image_id, self.category_ids[label], xywh))
        images = [Image(i, f"{i:06d}.png", SIZE_PX, SIZE_PX) for i in self.image_ids]
        categories = list(map(Category, self.category_ids, self.class_names))
        return ground_truth(CocoFile(images, categories, annotations), self.category_ids)

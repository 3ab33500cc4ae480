"""The error breakdown of notebook 5: what became of every annotated object, and of every other box.

Shapes: M annotated objects and n detections of an image. Boxes are xyxy in pixels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from notebooks.figures import takeaway, write
from visualize import colour, draw_boxes, show_image

Box = tuple[float, float, float, float]

# The letter that is written into a box, and the shade of the bars.
OF_OBJECTS = {
    "found": ("", "#D9D9D9"),
    "misplaced": ("P", "#A6A6A6"),
    "wrong class": ("W", "#737373"),
    "missed": ("M", "#404040"),
}
OF_DETECTIONS = {"duplicate": ("D", "#8A3D6E"), "false alarm": ("F", "#A64B00")}
KINDS = OF_OBJECTS | OF_DETECTIONS


class Outcome(NamedTuple):
    kind: str  # one of KINDS
    label: int  # class of the object, or of the detection if the outcome is a detection's
    box: Box  # of the object, or of the detection


def outcomes(
    target: Mapping[str, Tensor], found: Mapping[str, Tensor], iou: float = 0.5, touch: float = 0.1
) -> list[Outcome]:
    """One outcome for each object of an image, and one for each detection that took no object.

    A detection takes at most one object and an object is taken at most once. First come the pairs
    that COCO's AP counts, then those that nearly were.

    Args:
        target: `boxes` (M, 4) and `labels` (M,).
        found: `boxes` (n, 4) and `labels` (n,), by falling score.
        iou: how much a box has to overlap an object to be at the right place.
        touch: how much, to be meant for it.

    Returns:
        M outcomes in the order of the objects: found (class and place are right), wrong class
        (only the place is), misplaced (only the class is), missed. Then those of detections:
        duplicate (class and place are right, but another detection found the object), false alarm
        (all others).
    """
    boxes, labels = target["boxes"].as_subclass(Tensor), target["labels"]
    overlap = box_iou(found["boxes"], boxes)  # (n, M)
    is_same = found["labels"][:, None] == labels  # (n, M)
    kind_of_object: dict[int, str] = {}
    kind_of_detection: dict[int, str] = {}

    def take(kind: str, allowed: Tensor) -> None:
        """Each detection, by falling score, takes the free object that it overlaps most."""
        for d in (d for d in range(len(overlap)) if d not in kind_of_detection):
            free = [m for m in allowed[d].nonzero()[:, 0].tolist() if m not in kind_of_object]
            if free:
                best = max(free, key=lambda m: overlap[d, m].item())
                kind_of_object[best] = kind_of_detection[d] = kind

    take("found", is_same & (overlap >= iou))
    take("wrong class", ~is_same & (overlap >= iou))
    for d in (is_same & (overlap >= iou)).any(1).nonzero()[:, 0].tolist():
        kind_of_detection.setdefault(d, "duplicate")
    take("misplaced", is_same & (overlap >= touch))

    result = []
    for m, (label, box) in enumerate(zip(labels.tolist(), boxes.tolist(), strict=True)):
        result.append(Outcome(kind_of_object.get(m, "missed"), label, tuple(box)))
    rows = zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True)
    for d, (label, box) in enumerate(rows):
        kind = kind_of_detection.get(d, "false alarm")
        if kind in OF_DETECTIONS:
            result.append(Outcome(kind, label, tuple(box)))
    return result


def draw_outcomes(
    per_image: Sequence[Sequence[Outcome]], class_names: Sequence[str], index: int, image: Tensor
) -> Figure:
    """Draws bars of what became of the objects of all images, and beside them one of the images.

    Args:
        per_image: what `outcomes` returned for each image.
        class_names: K names.
        index: of the image to draw.
        image: (3, H, W), as large as its file.
    """
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    bars, axes = figure.subplots(1, 2, width_ratios=[3, 5])

    every = [outcome for found in per_image for outcome in found]
    groups = {
        name: Counter(o.kind for o in every if o.label == k and o.kind in OF_OBJECTS)
        for k, name in enumerate(class_names)
    }
    groups["extra boxes"] = Counter(o.kind for o in every if o.kind in OF_DETECTIONS)
    left = [0] * len(groups)
    for kind, (letter, shade) in KINDS.items():
        counts = [group[kind] for group in groups.values()]
        bars.barh(list(groups), counts, left=left, color=shade, label=f"{kind} {letter}")
        for row, count in enumerate(counts):
            if count:
                write(bars, left[row] + count / 2, row, str(count), 8)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    bars.invert_yaxis()
    bars.set_xlabel("objects, boxes")
    bars.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(KINDS), fontsize=8, frameon=False)
    total = Counter(o.kind for o in every)
    num_objects = sum(total[kind] for kind in OF_OBJECTS)
    takeaway(bars, f"{total['found']} of {num_objects} objects found")

    show_image(axes, image)
    for kind, label, box in per_image[index]:
        width = 1.2 if kind == "found" else 2.2
        draw_boxes(axes, torch.tensor([box]), [colour(label)], linewidth=width)
        write(axes, box[0] + 14, box[1] + 14, KINDS[kind][0])
    takeaway(axes, "One of the photographs")
    return figure

"""The error breakdown and the figures of notebook 5, `05_your_own_data.ipynb`.

`outcomes` says what became of every annotated object of an image, and of every detection that is
left over. The other functions draw it.

Shapes: M annotated objects and n detections of an image. Boxes are xyxy in pixels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor
from torchvision.ops import box_iou

from visualize import (
    colour,
    draw_boxes,
    drawable,
    new_figure,
    plot_named_lines,
    show_image,
    takeaway,
)

Box = tuple[float, float, float, float]

OF_OBJECTS = ("found", "misplaced", "wrong class", "missed")
OF_DETECTIONS = ("duplicate", "false alarm")
# How a box is drawn. Colour is left to the classes.
STYLES: dict[str, Any] = {
    "found": "-",
    "misplaced": "--",
    "wrong class": "-.",
    "missed": ":",
    "duplicate": (0, (1, 1)),
    "false alarm": (0, (5, 1)),
}
SHADES = ("#DDDDDD", "#A8A8A8", "#707070", "#000000")  # of the bars of OF_OBJECTS
HATCHES = ("", "//", "..", "")
SIZES = ("small", "medium", "large")  # of COCO, by area: up to 32² and from 96² pixels of the file


# --- what became of the objects ---


class Outcome(NamedTuple):
    kind: str  # one of OF_OBJECTS or OF_DETECTIONS
    label: int  # class of the object, or of the detection if the outcome is a detection's
    box: Box  # of the object, or of the detection
    found_label: int | None = None  # class of the detection that took the object
    found_box: Box | None = None  # its box


def outcomes(
    target: Mapping[str, Any], found: Mapping[str, Any], iou: float = 0.5, touch: float = 0.1
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
    boxes, labels = torch.as_tensor(target["boxes"]), target["labels"]
    overlap = box_iou(found["boxes"], boxes)  # (n, M)
    is_same = found["labels"][:, None] == labels  # (n, M)
    taken_by: dict[int, tuple[str, int]] = {}  # object -> outcome, detection
    kind_of: dict[int, str] = {}  # detection -> what it is

    def take(kind: str, allowed: Tensor) -> None:
        """Each detection, by falling score, takes the free object that it overlaps most."""
        for d in (d for d in range(len(overlap)) if d not in kind_of):
            free = [m for m in allowed[d].nonzero()[:, 0].tolist() if m not in taken_by]
            if free:
                best = max(free, key=lambda m: overlap[d, m].item())
                taken_by[best], kind_of[d] = (kind, d), kind

    take("found", is_same & (overlap >= iou))
    take("wrong class", ~is_same & (overlap >= iou))
    for d in (is_same & (overlap >= iou)).any(1).nonzero()[:, 0].tolist():
        kind_of.setdefault(d, "duplicate")
    take("misplaced", is_same & (overlap >= touch))

    result = []
    for m, (label, box) in enumerate(zip(labels.tolist(), boxes.tolist(), strict=True)):
        kind, d = taken_by.get(m, ("missed", -1))
        if d < 0:
            result.append(Outcome(kind, label, tuple(box)))
            continue
        found_box = tuple(found["boxes"][d].tolist())
        result.append(Outcome(kind, label, tuple(box), int(found["labels"][d]), found_box))
    for d, (label, box) in enumerate(
        zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True)
    ):
        kind = kind_of.get(d, "false alarm")
        if kind in OF_DETECTIONS:
            result.append(Outcome(kind, label, tuple(box)))
    return result


def size_name(box: Box) -> str:
    """COCO's name for the size of a box in pixels of the file."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return SIZES[(area >= 32**2) + (area >= 96**2)]


# --- figures ---


def draw_annotations(panels: Mapping[str, tuple[Tensor, Mapping[str, Any]]]) -> Figure:
    """Draws images with the boxes that were read, side by side.

    Args:
        panels: takeaway -> image (3, H, W) and its target (`boxes`, `labels`).
    """
    figure, grid = new_figure(1, len(panels), (3.3, 2.7))
    for axes, (text, (image, target)) in zip(grid[0], panels.items(), strict=True):
        show_image(axes, image)
        limits = axes.get_xlim(), axes.get_ylim()
        colours = [colour(label) for label in target["labels"].tolist()]
        draw_boxes(axes, torch.as_tensor(target["boxes"]), colours, linewidth=1.4)
        axes.set(xlim=limits[0], ylim=limits[1])
        takeaway(axes, text)
    return figure


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draws the loss and the AP of training runs over their epochs.

    Args:
        runs: name -> the lines of its metrics.jsonl. They have the same epochs.
    """
    figure, grid = new_figure(1, 2, (4.4, 2.7))
    for axes, (key, factor, label) in zip(
        grid[0],
        (("loss", 1, "training loss"), ("AP", 100, "AP (points of 100)")),
        strict=True,
    ):
        lines = {
            name: [(line["epoch"], factor * line[key]) for line in epochs if key in line]
            for name, epochs in runs.items()
        }
        x = [epoch for epoch, _ in next(iter(lines.values()))]
        series = {name: [value for _, value in points] for name, points in lines.items()}
        plot_named_lines(axes, x, series, margin=0.35)
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        ends = sorted((values[-1], name) for name, values in series.items())
        (low, low_name), (high, high_name) = ends[0], ends[-1]
        what = "Loss at the end" if key == "loss" else "Held-out AP"
        takeaway(axes, f"{what}: {high_name} {high:.1f}, {low_name} {low:.1f}")
    return figure


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
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    bars, axes = figure.subplots(1, 2, width_ratios=[3, 5])
    _plot_shares(bars, [outcome for found in per_image for outcome in found], class_names)
    _draw_image(axes, image, per_image[index], class_names)
    return figure


def draw_thresholds(
    thresholds: Sequence[float], counts: Mapping[str, Sequence[int]], objects: int
) -> Figure:
    """Draws how many objects are found, and how many boxes are extra, by score threshold.

    Args:
        thresholds: rising.
        counts: name of a line -> a count for each threshold; first the objects that are found.
        objects: how many there are to find.
    """
    figure, grid = new_figure(1, 1, (5.6, 2.7))
    axes = grid[0, 0]
    plot_named_lines(axes, thresholds, counts, margin=0.3)
    axes.axhline(objects, color="#A0A0A0", linewidth=0.8)
    axes.annotate(
        f"{objects} objects",
        (thresholds[0], objects),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#6E6E6E",
    )
    axes.set(xlabel="score threshold", ylabel="number")
    axes.set_ylim(bottom=-0.05 * axes.get_ylim()[1])
    found = next(iter(counts.values()))
    takeaway(
        axes,
        f"Found: {found[0]} of {objects} at threshold {thresholds[0]:.2g}, "
        f"{found[-1]} at {thresholds[-1]:.2g}",
    )
    return figure


def _plot_shares(axes: Axes, found: Sequence[Outcome], class_names: Sequence[str]) -> None:
    """Horizontal bars: the shares of the outcomes among the objects of a class, and of a size."""
    objects = [outcome for outcome in found if outcome.kind in OF_OBJECTS]
    groups = [
        (name, [o.kind for o in objects if o.label == k]) for k, name in enumerate(class_names)
    ]
    groups += [(name, [o.kind for o in objects if size_name(o.box) == name]) for name in SIZES]
    # A gap between classes and sizes; a group without objects has no shares.
    y = [row + 0.5 * (row >= len(class_names)) for row in range(len(groups))]
    rows = [
        (at, name, Counter(kinds)) for at, (name, kinds) in zip(y, groups, strict=True) if kinds
    ]

    left = np.zeros(len(rows))
    for kind, shade, hatch in zip(OF_OBJECTS, SHADES, HATCHES, strict=True):
        shares = np.array([100 * counts[kind] / counts.total() for _, _, counts in rows])
        bars = axes.barh(
            [at for at, _, _ in rows],
            shares,
            left=left,
            color=shade,
            hatch=hatch,
            edgecolor="white",
            label=kind,
        )
        numbers = [str(row[2][kind]) if row[2][kind] else "" for row in rows]
        for text in axes.bar_label(bars, numbers, label_type="center", fontsize=8):
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        left += shares
    axes.set_yticks(
        [at for at, _, _ in rows],
        [f"{drawable(name)} ({counts.total()})" for _, name, counts in rows],
        parse_math=False,
    )
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the objects, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, -0.2), ncols=2, fontsize=8, frameon=False)

    total = Counter(outcome.kind for outcome in found)
    title = f"{total['found']} of {len(objects)} objects found"
    if total["found"] < len(objects):
        # The class of the lowest share; a frequent class may lose more objects and yet do better.
        of_class = [(Counter(kinds), name) for name, kinds in groups[: len(class_names)] if kinds]
        counts, name = min(of_class, key=lambda pair: pair[0]["found"] / pair[0].total())
        title += f"; worst: {name}, {counts['found']} of {counts.total()}"
    takeaway(axes, f"{title}\nExtra boxes: {_say(total, OF_DETECTIONS)}")


def _say(counts: Counter[str], kinds: Sequence[str]) -> str:
    """Numbers in words, such as "3 found, 1 false alarm, 2 duplicates"."""
    plurals = {kind: f"{kind}s" for kind in OF_DETECTIONS}
    return ", ".join(
        # A space at which the title is not broken into lines.
        f"{counts[kind]}\N{NO-BREAK SPACE}{kind if counts[kind] == 1 else plurals.get(kind, kind)}"
        for kind in kinds
    )


def _draw_image(
    axes: Axes, image: Tensor, found: Sequence[Outcome], class_names: Sequence[str]
) -> None:
    """An image with its boxes: thin what was found, thick and with a name what was not."""
    show_image(axes, image)
    counts = Counter(outcome.kind for outcome in found)
    takeaway(axes, fill(_say(counts, [kind for kind in STYLES if counts[kind]]) or "nothing", 50))
    avoided = [outcome.box for outcome in found]
    for outcome in sorted(found, key=lambda outcome: outcome.kind != "found"):
        style, text = STYLES[outcome.kind], outcome.kind
        box, label = outcome.box, outcome.label
        if outcome.kind in ("found", "wrong class"):  # the box and the class that were found
            box, label = outcome.found_box, outcome.found_label
        if outcome.kind == "wrong class":
            text = f"{class_names[outcome.label]} taken for {class_names[label]}"
        if outcome.kind == "duplicate":  # around the box that was found, not on it
            gap = 0.011 * image.shape[2]
            box = (box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)
        _draw_box(axes, box, colour(label), style, 1.1 if outcome.kind == "found" else 2.0)
        if outcome.kind == "misplaced":  # the box that was found, beside the annotation
            _draw_box(axes, outcome.found_box, colour(label), "-", 1.1)
        if outcome.kind != "found":
            avoided.append(_write_beside(axes, box, text, avoided, image.shape[1:]))

    handles = [Patch(facecolor=colour(k), edgecolor="black") for k in range(len(class_names))]
    legend = axes.legend(
        handles,
        [drawable(name) for name in class_names],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=min(4, len(class_names)),
        fontsize=8,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_box(axes: Axes, box: Box, edge: str, style: Any, width: float) -> None:
    """A box without the dark rim of `visualize.draw_boxes`, which would hide small objects."""
    x1, y1, x2, y2 = box
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linestyle=style, linewidth=width
        )
    )


def _write_beside(
    axes: Axes, box: Box, text: str, avoided: Sequence[Box], size_hw: tuple[int, int]
) -> Box:
    """Writes a text outside of a box, where it covers the least of other boxes and texts.

    Returns:
        Where it was written.
    """
    bottom, right = size_hw
    scale = right / 640  # an image is drawn about 4 inches wide
    w, h, gap = 10 * scale * len(text) + 8 * scale, 20 * scale, 4 * scale
    x1, y1, x2, y2 = box
    corners = [
        (x, y) for x in (x1, x2 - w, (x1 + x2 - w) / 2) for y in (y1 - h - gap, y2 + gap)
    ] + [(x, y) for x in (x1 - w - gap, x2 + gap) for y in (y1, y2 - h, (y1 + y2 - h) / 2)]

    def cost(corner: tuple[float, float]) -> float:
        x, y = corner
        outside = x < 0 or y < 0 or x + w > right or y + h > bottom
        covered = 0.0
        for a1, b1, a2, b2 in avoided:
            common = max(0, min(x + w, a2) - max(x, a1)) * max(0, min(y + h, b2) - max(y, b1))
            covered += common / max(1.0, (a2 - a1) * (b2 - b1))  # of a small box more
        return covered + 10 * outside

    x, y = min(corners, key=cost)
    axes.text(
        x + w / 2,
        y + h / 2,
        drawable(text),
        fontsize=6.5,
        ha="center",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        clip_on=True,
        parse_math=False,
    )
    return x, y, x + w, y + h

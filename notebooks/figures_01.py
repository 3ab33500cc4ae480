"""The figures of notebook 1. Each function takes data and returns a figure.

The colour of a box is that of its class, or grey. Maps, here counts per pixel, are drawn in
cividis, as everywhere. Lines are black and grey, with their names at their ends.

Shapes: n boxes, A anchors, M objects in one image, N proposals. Images are RGB (3, H, W), boxes
xyxy in pixels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from visualize import (
    DASHES,
    GREYS,
    colour,
    draw_boxes,
    new_figure,
    plot_named_lines,
    show_image,
    takeaway,
)

NOBODY = GREYS[3]  # the colour of a box that belongs to no object


def draw_candidates(
    image: Tensor, candidates: Mapping[str, Tensor], margin: float = 0.25
) -> Figure:
    """Draws every outline of every candidate; the colour counts them, on one log scale.

    Args:
        image: (3, H, W).
        candidates: title of a panel -> boxes (n, 4).
        margin: room around the image, in widths and heights of it.
    """
    height, width = image.shape[1:]
    cell = (1 + 2 * margin) * max(width, height) / 300  # image pixels per cell of a map
    left, top = -margin * width, -margin * height
    columns, rows = int((width - 2 * left) / cell), int((height - 2 * top) / cell)
    maps = [
        _count_outlines((boxes - torch.tensor([left, top] * 2)) / cell, rows, columns)
        for boxes in candidates.values()
    ]

    figure, grid = new_figure(1, len(maps), (3.2, 3.0 * rows / columns + 0.3))
    highest = max(10, *(counts.max() for counts in maps))
    extent = (left, left + columns * cell, top + rows * cell, top)
    for axes, title, counts in zip(grid[0], candidates, maps, strict=True):
        show_image(axes, _faded(image))
        shown = axes.imshow(
            np.ma.masked_equal(counts, 0),
            cmap="cividis",
            norm=LogNorm(1, highest),
            alpha=0.8,
            extent=extent,
            interpolation="nearest",
        )
        axes.set_facecolor("#EEEEEE")
        axes.set_axis_on()
        axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
        takeaway(axes, title)
    bar = figure.colorbar(shown, ax=grid, shrink=0.8, pad=0.01)
    bar.set_label("outlines through a point", fontsize=9)
    return figure


def _count_outlines(boxes: Tensor, rows: int, columns: int) -> np.ndarray:
    """How many outlines of the boxes (n, 4), in cells, run through each cell: (rows, columns)."""
    x1, y1, x2, y2 = boxes.floor().long().numpy().T
    counts = np.zeros((rows, columns))
    for line in (y1, y2):
        counts += _count_segments(line, x1, x2, rows, columns)
    for line in (x1, x2):
        counts += _count_segments(line, y1, y2, columns, rows).T
    return counts


def _count_segments(
    line: np.ndarray, start: np.ndarray, end: np.ndarray, lines: int, length: int
) -> np.ndarray:
    """Counts segments from start to end on lines: (lines, length). What lies outside is cut off."""
    inside = (line >= 0) & (line < lines)
    steps = np.zeros((lines, length + 1))
    np.add.at(steps, (line[inside], start[inside].clip(0, length)), 1)
    np.add.at(steps, (line[inside], (end[inside] + 1).clip(0, length)), -1)
    return steps.cumsum(1)[:, :length]


def _faded(image: Tensor) -> Tensor:
    """The image in light grey, so that what is drawn on it stands out."""
    pixels = image.as_subclass(Tensor).float()
    pixels = pixels / 255 if image.dtype == torch.uint8 else pixels
    return (0.55 + 0.45 * pixels.mean(0, keepdim=True)).expand(3, -1, -1)


def draw_labels(
    image: Tensor,
    object_px: Tensor,
    label: int,
    positives_px: Tensor,
    proposals_px: Tensor,
    matched: Sequence[int],
    class_name: str,
    per_object: Tensor,
) -> Figure:
    """Who is taught to find one object: many anchors, or one proposal; and how many for each.

    Args:
        image: (3, H, W).
        object_px: (4,).
        label: of its class.
        positives_px: (n, 4), the anchors that get this object.
        proposals_px: (N, 4), the boxes of the last stage.
        matched: the proposal that gets this object; empty if none does.
        class_name: of the object.
        per_object: (M,), positive anchors of every object of all images.
    """
    figure, grid = new_figure(1, 3, (3.2, 2.95))
    dense, sparse, chart = grid[0]
    height, width = image.shape[1:]

    for axes in (dense, sparse):
        show_image(axes, _faded(image))
    count = len(positives_px)
    draw_boxes(dense, positives_px, [colour(label)] * count, linewidth=1, alphas=[0.6] * count)
    others = [row for row in range(len(proposals_px)) if row not in matched]
    draw_boxes(sparse, proposals_px[others], [NOBODY] * len(others), linewidth=0.7)
    for row in matched:
        draw_boxes(
            sparse, proposals_px[row][None], [colour(label)], [f"proposal {row}"], linewidth=1.6
        )
    for axes in (dense, sparse):
        draw_boxes(axes, object_px[None], ["#000000"], linewidth=1, linestyle=DASHES[2])
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    many = "1 anchor is" if count == 1 else f"{count} anchors are"
    takeaway(dense, f"{many} taught “{class_name}” here")
    one = "One proposal is" if matched else "No proposal is"
    takeaway(sparse, f"{one} taught “{class_name}” here")

    values = per_object.sort(descending=True).values.tolist()
    chart.bar(range(1, len(values) + 1), values, width=1, color=GREYS[3])
    chart.axhline(1, color=GREYS[0], linewidth=1.5)
    chart.text(1, 1.5, "Sparse R-CNN: 1 proposal each, per stage", va="bottom", fontsize=8)
    chart.set(xlabel="objects of all images, sorted", ylabel="positive anchors")
    chart.set(xlim=(0.5, len(values) + 0.5), ylim=(0, 1.1 * max(values)))
    chart.spines[["top", "right"]].set_visible(False)
    takeaway(chart, f"On average {per_object.float().mean():.0f} anchors per object")
    return figure


def draw_outputs(
    image: Tensor, outputs: Mapping[str, dict[str, Tensor]], class_names: Sequence[str]
) -> Figure:
    """Draws what detectors found in one image, each box in the colour of its class.

    Args:
        image: (3, H, W).
        outputs: title of a panel -> `boxes` (n, 4) and `labels` (n,).
        class_names: K names.
    """
    height, width = image.shape[1:]
    figure, grid = new_figure(1, len(outputs), (3.2, 3.1 * height / width + 0.75))
    for axes, (title, found) in zip(grid[0], outputs.items(), strict=True):
        show_image(axes, _faded(image))
        colours = [colour(label) for label in found["labels"].tolist()]
        draw_boxes(axes, found["boxes"], colours, linewidth=1)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        takeaway(axes, title)
    seen = sorted({label for found in outputs.values() for label in found["labels"].tolist()})
    for label in seen:
        grid[0, 0].plot([], [], color=colour(label), linewidth=3, label=class_names[label])
    if seen:
        figure.legend(loc="outside lower center", ncols=len(seen), fontsize=8, frameon=False)
    return figure


def plot_ap(thresholds: Sequence[float], ap: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """AP with NMS at several thresholds, and without.

    Args:
        thresholds: of NMS (IoU), ascending.
        ap: title of a panel -> detector -> AP in points, per threshold, then without NMS.
    """
    figure, grid = new_figure(1, len(ap), (4.6, 2.9), sharey=True)
    x = list(range(len(thresholds) + 1))
    for axes, (title, series) in zip(grid[0], ap.items(), strict=True):
        plot_named_lines(axes, x, series, margin=0.35)
        axes.set_xticks(x, [*(f"{threshold:g}" for threshold in thresholds), "no NMS"])
        axes.set(xlabel="NMS: IoU above which the lower score is removed", ylim=(0, 103))
        takeaway(axes, title)
    grid[0, 0].set_ylabel("AP (points of 100)")
    return figure


def draw_neighbours(
    image: Tensor,
    pair_px: Tensor,
    label: int,
    class_name: str,
    iou: float,
    thresholds: Sequence[float],
    lost: Mapping[str, Sequence[float]],
) -> Figure:
    """Two objects that overlap, without and with their boxes; what NMS takes from perfect boxes.

    Args:
        image: (3, H, W). Its contrast is stretched, so that the border of the objects shows.
        pair_px: (2, 4), the two boxes.
        label, class_name: of both objects.
        iou: of the two boxes.
        thresholds: of NMS (IoU), ascending.
        lost: data set -> share of its annotated objects that NMS removes, in percent.
    """
    figure, grid = new_figure(1, 3, (3.2, 2.9))
    plain, boxed, chart = grid[0]
    height, width = image.shape[1:]
    low, high = pair_px[:, :2].amin(0), pair_px[:, 2:].amax(0)
    centre, reach = (low + high) / 2, 0.65 * (high - low).max()  # half the side of what is shown
    left, top = (centre - reach).long().clamp(min=0).tolist()
    right, bottom = (centre + reach).long().minimum(torch.tensor([width, height])).tolist()

    grey = image.as_subclass(Tensor).float().mean(0)[top:bottom, left:right]
    dark, light = grey.quantile(0.01), grey.quantile(0.99)
    grey = ((grey - dark) / (light - dark).clamp(min=1e-6)).clamp(0, 1)
    for axes in (plain, boxed):
        show_image(axes, grey.expand(3, -1, -1))
    for i, box in enumerate(pair_px - torch.tensor([left, top] * 2)):
        draw_boxes(boxed, box[None], [colour(label)], linewidth=2.2, linestyle=DASHES[i])
    takeaway(plain, f"Two objects, both {class_name}")
    takeaway(boxed, f"NMS sees two boxes, IoU {iou:.2f}")

    worst = max(max(values) for values in lost.values())
    chart.set_ylim(-0.05 * max(1, worst), 1.05 * max(1, worst))
    plot_named_lines(chart, list(thresholds), lost, margin=0.3)
    chart.set_xticks(list(thresholds))
    chart.set(xlabel="NMS: IoU above which a box is removed", ylabel="annotated objects lost (%)")
    takeaway(chart, "Strict NMS deletes perfect boxes" if worst > 0 else "NMS deletes nothing here")
    return figure


def plot_growth(
    megapixels: Sequence[float],
    candidates: Mapping[str, Sequence[float]],
    gflop: Mapping[str, Sequence[float]],
) -> Figure:
    """How candidates and operations grow with the image.

    Args:
        megapixels: of the images, ascending.
        candidates: detector -> how many.
        gflop: detector -> operations after the backbone, in 1e9.
    """
    figure, grid = new_figure(1, 2, (4.6, 3.0))
    left, right = grid[0]
    exponents = {
        name: [math.log10(count) for count in counts] for name, counts in candidates.items()
    }
    plot_named_lines(left, megapixels, exponents, margin=0.6)
    low, high = (int(edge(sum(exponents.values(), []))) for edge in (min, max))
    ticks = range(low, high + 1)
    left.set_yticks(ticks, [f"{10**tick:,}" for tick in ticks])
    left.set(ylabel="candidates (log scale)", ylim=(low - 0.2, high + 0.9))
    takeaway(left, "Anchors grow with the image, proposals do not")

    plot_named_lines(right, megapixels, gflop, margin=0.6)
    right.set(ylabel="GFLOP after the backbone", ylim=(0, None))
    takeaway(right, "After the backbone,\nonly Sparse R-CNN's work stays the same")
    for axes in (left, right):
        axes.set_xticks(megapixels, [f"{value:.2f}" for value in megapixels], fontsize=8)
        axes.set_xlabel("image (megapixels)")
    return figure

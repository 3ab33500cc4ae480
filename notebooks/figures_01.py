"""The figures of notebook 1, from dense to sparse.

Shapes: n boxes, N proposals. Images are RGB (3, H, W), boxes xyxy in pixels.
"""

from collections.abc import Mapping

import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from notebooks.figures import DASHES, pad_canvas, takeaway
from visualize import colour, draw_boxes, new_figure, show_image


def draw_candidates(image: Tensor, panels: Mapping[str, Tensor]) -> Figure:
    """Draws every outline of every candidate: title of a panel -> boxes (n, 4)."""
    figure, [row] = new_figure(1, len(panels), (3.2, 2.7))
    for axes, (title, boxes_px) in zip(row, panels.items(), strict=True):
        show_image(axes, image)
        pad_canvas(axes, image, 0.2)
        x1, y1, x2, y2 = boxes_px.T
        corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=1).view(-1, 4, 2)
        outlines = PolyCollection(corners.numpy(), facecolors="none", edgecolors="black")
        outlines.set(linewidth=0.5, alpha=0.5)
        axes.add_collection(outlines)
        takeaway(axes, title)
    return figure


def draw_labels(
    image: Tensor,
    object_px: Tensor,
    label: int,
    panels: Mapping[str, tuple[Tensor, Tensor]],
) -> Figure:
    """Draws who is taught to find one object.

    Args:
        object_px: (4,), dotted.
        label: of its class, which gives the colour.
        panels: title -> the boxes that are taught it, and all others that are drawn, thin.
    """
    figure, [row] = new_figure(1, len(panels), (4.4, 3.5))
    for axes, (title, (taught_px, others_px)) in zip(row, panels.items(), strict=True):
        show_image(axes, image)
        pad_canvas(axes, image, 0.02)
        draw_boxes(axes, others_px, ["#FFFFFF"] * len(others_px), linewidth=0.7)
        draw_boxes(axes, taught_px, [colour(label)] * len(taught_px), linewidth=1.2)
        draw_boxes(axes, object_px[None], ["#000000"], linewidth=1, linestyle=DASHES[2])
        takeaway(axes, title)
    return figure


def draw_pair(image: Tensor, pair_px: Tensor, label: int, titles: tuple[str, str]) -> Figure:
    """Draws two neighbours (2, 4), without and with their boxes."""
    figure, [row] = new_figure(1, 2, (2.3, 2.8))
    low, high = pair_px[:, :2].amin(0), pair_px[:, 2:].amax(0)
    (x1, y1), (x2, y2) = (low - 12).tolist(), (high + 12).tolist()
    for axes, title in zip(row, titles, strict=True):
        show_image(axes, image)
        axes.set(xlim=(x1, x2), ylim=(y2, y1))
        takeaway(axes, title)
    for box, style in zip(pair_px, DASHES, strict=False):
        draw_boxes(row[1], box[None], [colour(label)], linewidth=2.2, linestyle=style)
    return figure

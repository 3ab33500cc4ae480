"""The figures of notebook 4, set prediction.

Shapes: N proposals, M objects, S stages, n boxes. Boxes are xyxy in pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from notebooks.figures import pad_canvas, plot_matrix, takeaway, write
from visualize import colour, draw_boxes, new_figure, show_image


def draw_found(
    image: Tensor, panels: Mapping[str, tuple[Mapping[str, Tensor], Tensor]], objects_px: Tensor
) -> Figure:
    """What detectors find in one image, and how many boxes lie on each object.

    Args:
        panels: title -> detections (`boxes`, `labels`), and their number on each object (M,).
        objects_px: (M, 4).
    """
    figure, [row] = new_figure(1, len(panels), (3.2, 3.3))
    for axes, (title, (found, counts)) in zip(row, panels.items(), strict=True):
        show_image(axes, image)
        pad_canvas(axes, image, 0.08)
        colours = [colour(label) for label in found["labels"].tolist()]
        draw_boxes(axes, _nested(found["boxes"]), colours, linewidth=1)
        for (x1, y1, x2, y2), count in zip(objects_px.tolist(), counts.tolist(), strict=True):
            write(axes, (x1 + x2) / 2, (y1 + y2) / 2, f"{count}×", 11)
        takeaway(axes, title)
    return figure


def draw_costs(
    image: Tensor,
    target: Mapping[str, Tensor],
    class_names: Sequence[str],
    costs: Mapping[str, Tensor],
    match: Mapping[int, int],
) -> Figure:
    """An image with its objects, and cost matrices (M, N) with the assignment.

    Args:
        costs: title -> (M, N).
        match: object -> its proposal; these come first and have an H.
    """
    figure = Figure(figsize=(9.6, 0.6 + 1.3 * len(costs)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.2))
    axes = left.subplots()
    show_image(axes, image)
    labels = target["labels"].tolist()
    draw_boxes(
        axes, target["boxes"], [colour(k) for k in labels], list(map(str, range(len(labels))))
    )

    N = next(iter(costs.values())).shape[1]
    order = [*match.values(), *(n for n in range(N) if n not in match.values())]
    rows = [f"{m} {class_names[k]}" for m, k in enumerate(labels)]
    grid = right.subplots(len(costs), 1, squeeze=False)[:, 0]
    for axes, (title, cost) in zip(grid, costs.items(), strict=True):
        plot_matrix(axes, cost[:, order], rows, list(map(str, order)))
        for m, n in match.items():
            write(axes, order.index(n) - 0.33, m - 0.22, "H", 7)
        takeaway(axes, title)
    grid[-1].set_xlabel("proposal", fontsize=8)
    return figure


def _nested(boxes_px: Tensor) -> Tensor:
    """Boxes (n, 4); one that overlaps earlier ones by half is some px larger for each of them."""
    earlier = (box_iou(boxes_px, boxes_px) >= 0.5).tril(-1).sum(dim=1)  # (n,)
    step = min(2.0, 8.0 / max(1, int(earlier.max())))
    return boxes_px + step * earlier[:, None] * torch.tensor([-1, -1, 1, 1])

"""The figures of notebook 2: who trains which box layer, and which proposal gets which objects.

Shapes: S stages, M objects.
"""

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from notebooks.figures import INKS, MARKERS, plot_matrix, takeaway, write
from visualize import new_figure


def draw_reach(panels: Mapping[str, Tensor]) -> Figure:
    """Gradient norms (S, S): a row's loss at a column's box layer."""
    figure, [row] = new_figure(1, len(panels), (4.4, 3.0))
    for axes, (title, norms) in zip(row, panels.items(), strict=True):
        stages = [str(stage + 1) for stage in range(len(norms))]
        plot_matrix(axes, norms, stages, stages, "{:.2f}")
        axes.set(xlabel="box layer of stage", ylabel="loss of stage")
        takeaway(axes, title)
    return figure


def draw_territories(panels: Mapping[str, tuple[Tensor, Tensor]], size_px: int) -> Figure:
    """Where the objects of each proposal lie. A proposal has its own colour, marker and number.

    Args:
        panels: title -> centres (M, 2) in pixels and the proposal (M,) that is matched to each.
        size_px: sides of an image.
    """
    figure, [row] = new_figure(1, len(panels), (3.0, 3.2))
    for axes, (title, (centres_px, proposals)) in zip(row, panels.items(), strict=True):
        for n in proposals.unique().tolist():
            mine = centres_px[proposals == n]
            x, y = mine.mean(0).tolist()
            ink, marker = INKS[n % len(INKS)], MARKERS[n // len(INKS) % len(MARKERS)]
            to_centre = torch.stack([mine, mine.mean(0).expand_as(mine)])  # (2, M, 2)
            axes.plot(*to_centre.unbind(-1), color=ink, linewidth=0.6)
            axes.scatter(*mine.T, s=14, color=ink, marker=marker)
            if len(mine) > 3:
                write(axes, x, y, str(n))
        axes.set(xlim=(0, size_px), ylim=(size_px, 0), xticks=[], yticks=[], aspect="equal")
        takeaway(axes, title)
    return figure

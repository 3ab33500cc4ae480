"""The charts of the notebooks, and the frame for a page that can be played with.

The titles of charts are typed in the notebooks: they say what to see. Lines and bars are named
where they are, not in a legend. Colours are dark enough to be read as text on white.

Shapes: n boxes. Images are RGB (3, H, W), boxes xyxy in pixels.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from visualize import colour, draw_boxes, new_figure, show_image

# Of lines and bars; each has a contrast of at least 4.5 on white.
INKS = ("#000000", "#0072B2", "#A64B00", "#00694D", "#8A3D6E", "#5F5F5F")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P")
Panels = Mapping[str, Mapping[str, Any]]  # title -> name -> values


def takeaway(axes: Axes, text: str) -> None:
    """Writes above the axes what a reader should see in them."""
    axes.set_title(text, loc="left", fontsize=9.5, fontweight="bold")


# --- charts ---


def draw_lines(
    panels: Panels,
    x: Sequence[float],
    xlabel: str,
    ylabel: str,
    xticks: Sequence[str] | None = None,
    ylim: tuple[float, float] | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    margin: float = 0.35,
) -> Figure:
    """Draws panels of lines over common x values, each with its name at its right end.

    Args:
        panels: title of a panel -> name of a line -> y values; NaN where there is none.
        xticks: the names of the x values, if they are not numbers.
        ylim: limits of y; by default where the lines end.
        styles: name of a line -> what is special about it, in matplotlib's words.
        margin: room for the names, as a share of the width of the lines.
    """
    figure, [row] = new_figure(
        1, len(panels), (max(4.4, 6.2 - 1.2 * len(panels)), 2.8), sharey=True
    )
    for axes, (title, lines) in zip(row, panels.items(), strict=True):
        for i, (name, values) in enumerate(lines.items()):
            style = {"color": INKS[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
            axes.plot(x, values, markersize=4, **style | (styles or {}).get(name, {}))
        if xticks or len(x) <= 12:
            axes.set_xticks(x, xticks or [f"{value:g}" for value in x], fontsize=8)
        axes.set_xlim(right=x[-1] + margin * (x[-1] - x[0]))
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        takeaway(axes, title)
    row[0].set_ylabel(ylabel)
    if ylim:
        row[0].set_ylim(*ylim)
    for axes, lines in zip(row, panels.values(), strict=True):
        _name_lines(axes, list(lines))
    return figure


def _name_lines(axes: Axes, names: Sequence[str]) -> None:
    """Writes names at the ends of lines, from the lowest up, one line of text apart."""
    low, high = axes.get_ylim()
    floor = -math.inf
    ends = [
        (line.get_ydata()[-1], line, name) for line, name in zip(axes.lines, names, strict=True)
    ]
    for y, line, name in sorted(ends, key=lambda end: end[0]):
        floor = max(float(y), floor + 0.075 * (high - low))
        axes.annotate(
            name,
            (line.get_xdata()[-1], floor),
            xytext=(6, 0),
            textcoords="offset points",
            annotation_clip=False,
            va="center",
            fontsize=8,
            color=line.get_color(),
        )


def draw_bars(panels: Panels, xlabel: str, xlim: float, form: str = "{:.1f}") -> Figure:
    """Draws panels of horizontal bars, the first one on top, each with its value."""
    rows = max(map(len, panels.values()))
    figure, [row] = new_figure(1, len(panels), (4.6, 0.9 + 0.28 * rows))
    for axes, (title, values) in zip(row, panels.items(), strict=True):
        bars = axes.barh(list(values), list(values.values()), color=INKS[1])
        axes.bar_label(bars, [form.format(v) for v in values.values()], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel=xlabel, xlim=(0, xlim))
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        takeaway(axes, title)
    return figure


def plot_matrix(
    axes: Axes,
    matrix: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str = "{:.1f}",
) -> None:
    """Draws a matrix as colours from dark (low) to light, with its numbers."""
    # Colours stop at the 90th percentile: a few large values would hide the others.
    low, high = float(matrix.min()), float(matrix.flatten().quantile(0.9))
    axes.imshow(matrix, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for i in range(len(rows)):
        for j in range(len(columns)):
            value = float(matrix[i, j])
            ink = "black" if value > (low + high) / 2 else "white"
            text = form.format(value).replace("-", "−")
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=ink)


# --- images ---


def pad_canvas(axes: Axes, image: Tensor, margin: float) -> None:
    """Makes room around an image that is shown already, in widths and heights of it."""
    height, width = image.shape[1:]
    axes.set_xlim(-margin * width - 0.5, (1 + margin) * width - 0.5)
    axes.set_ylim((1 + margin) * height - 0.5, -margin * height - 0.5)
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, color="#EEEEEE", zorder=-1))


def write(axes: Axes, x: float, y: float, text: str, size: float = 9) -> None:
    """A white text with a dark rim, which can be read on any image."""
    rim = [withStroke(linewidth=2.5, foreground="black")]
    axes.text(x, y, text, color="white", ha="center", va="center", fontsize=size, path_effects=rim)


def draw_panels(
    image: Tensor, panels: Mapping[str, Mapping[str, Tensor]], class_names: Sequence[str]
) -> Figure:
    """Draws one image several times, each time with other boxes, in the colours of their classes.

    Args:
        panels: title -> `boxes` (n, 4) and `labels` (n,).
        class_names: K names.
    """
    height, width = image.shape[1:]
    figure, [row] = new_figure(1, len(panels), (3.2, 3.2 * height / width + 0.5))
    seen: set[int] = set()
    for axes, (title, found) in zip(row, panels.items(), strict=True):
        show_image(axes, image)
        labels = found["labels"].tolist()
        draw_boxes(axes, found["boxes"], [colour(k) for k in labels], linewidth=1.2)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        takeaway(axes, title)
        seen |= set(labels)
    for k in sorted(seen):
        row[0].plot([], [], color=colour(k), linewidth=3, label=class_names[k])
    figure.legend(loc="outside lower center", ncols=len(seen), fontsize=8, frameon=False)
    return figure


# --- a page in a cell ---


def live(page: str, still: Figure, height: int) -> HTML:
    """A self-contained HTML page as the output of a cell; it needs no kernel.

    A viewer that does not trust the notebook removes the frame. Then the picture behind it shows.

    Args:
        page: HTML text.
        still: what is seen instead.
        height: of the frame in pixels.
    """
    png = io.BytesIO()
    still.savefig(png, format="png", dpi=110)
    picture = base64.b64encode(png.getvalue()).decode()
    return HTML(
        '<div style="display: grid"><div style="grid-area: 1 / 1">'
        f'<img src="data:image/png;base64,{picture}" alt="A still of the page">'
        "<p>This is a still. Run this cell, or trust the notebook, to play with it.</p></div>"
        f'<iframe srcdoc="{html.escape(page)}" width="100%" height="{height}" '
        'style="grid-area: 1 / 1; border: 0; background: white; z-index: 1"></iframe></div>'
    )

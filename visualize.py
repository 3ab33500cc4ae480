"""Everything that is drawn: detections, the proposals of every stage, training curves.

One colour for one class and one proposal everywhere, from a palette that can be told apart with colour-blind eyes and,
with the names beside the boxes, in print.

Shapes: N proposals, S stages, n detections of one image; images are RGB (3, H, W), boxes xyxy in their pixels.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from data import validation_set
from model import SparseRCNN
from support.checkpoint import load_model
from support.cli import parse_args, pick_device, run_main
from support.errors import UserError
from support.plots import LINES

# Okabe and Ito's colours, the lighter ones first: they stand out on photographs.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF")


def colour(index: int) -> str:
    """The colour of a class (its label) or of a proposal (its index)."""
    return PALETTE[index % len(PALETTE)]


def new_figure(
    rows: int, columns: int, panel: tuple[float, float] = (2.6, 2.6), **kwargs
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each `panel` inches wide and high; it needs no pyplot."""
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """An RGB image (3, H, W), uint8 or float 0–1, without ticks."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def draw_boxes(
    axes: Axes,
    boxes: Tensor,
    colours: Sequence[str],
    texts: Sequence[str] | None = None,
    linewidth: float = 1.8,
    linestyle: str = "-",
) -> None:
    """Boxes (n, 4) xyxy px over a shown image, each in its colour, its text, if any, at its upper left corner."""
    outline = [withStroke(linewidth=linewidth + 1.2, foreground="black")]
    x_limits, y_limits = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        patch = Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colours[i],
            linewidth=linewidth,
            ls=linestyle,
        )
        if linewidth > 1:  # a dark rim, to be seen on any background
            patch.set_path_effects(outline)
        axes.add_patch(patch)
        if texts:
            is_right = x1 > x_limits[0] + 0.7 * (
                x_limits[1] - x_limits[0]
            )  # else the text would leave the picture
            axes.text(
                min(max(x2 if is_right else x1, x_limits[0]), x_limits[1]),
                min(max(y1, y_limits[0]), y_limits[1]),
                texts[i],
                fontsize=6.5,
                color="black",
                ha="right" if is_right else "left",
                va="bottom" if y1 > y_limits[0] + 0.08 * (y_limits[1] - y_limits[0]) else "top",
                bbox={"facecolor": colours[i], "edgecolor": "none", "pad": 1.0, "alpha": 0.9},
                clip_on=True,
            )


def draw_detections(
    axes: Axes,
    image: Tensor,
    detection: dict[str, Tensor],
    class_names: Sequence[str],
    threshold: float = 0.4,
    title: str = "",
) -> None:
    """What the model found in an image: boxes, scores and labels of `SparseRCNN`, those of at least `threshold`."""
    show_image(axes, image, title)
    keep = detection["scores"] >= threshold
    labels, scores = detection["labels"][keep].tolist(), detection["scores"][keep].tolist()
    texts = [
        f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)
    ]
    draw_boxes(axes, detection["boxes"][keep], [colour(label) for label in labels], texts)


@torch.inference_mode()
def draw_stages(
    model: SparseRCNN,
    images: Sequence[Tensor],
    class_names: Sequence[str],
    threshold: float = 0.4,
    stages: Sequence[int] | None = None,
) -> Figure:
    """The slides' figure (a)–(d): the learned proposal boxes, then the boxes after the `stages`, a row an image.

    A proposal has one colour in its whole row, that of the class it ends with where its last score reaches
    `threshold`; all others are drawn thin and white. Stages count from 1; by default all are drawn.
    """
    stages = range(1, len(model.head.stages) + 1) if stages is None else stages
    rows, columns = len(images), len(stages) + 1
    figure, grid = new_figure(rows, columns, (2.1, 2.25))
    for number, (row, image) in enumerate(zip(grid, images, strict=True)):
        outputs = model.stages([image])
        _, whwh_px = model.prepare([image])
        scores, labels = outputs.logits[-1, 0].sigmoid().max(-1)  # (N,) each
        found = scores >= threshold
        panels = [
            model.initial_boxes_px(whwh_px)[0],
            *(outputs.boxes[stage - 1, 0] for stage in stages),
        ]
        titles = ["learned proposals", *(f"stage {stage}" for stage in stages)]
        for axes, boxes, title in zip(row, panels, titles, strict=True):
            show_image(axes, image, "" if number else title)
            draw_boxes(axes, boxes[~found], ["#FFFFFF"] * int((~found).sum()), linewidth=0.6)
            is_last = axes is row[-1]
            texts = [
                f"{class_names[label]} {s:.2f}"
                for label, s in zip(labels[found], scores[found], strict=True)
            ]
            colours = [colour(label) for label in labels[found].tolist()]
            draw_boxes(axes, boxes[found], colours, texts if is_last else None)
            axes.set_xlim(-0.5, image.shape[2] - 0.5)
            axes.set_ylim(image.shape[1] - 0.5, -0.5)
    return figure


def plot_lines(
    axes: Axes, x: Sequence, series: Mapping[str, Sequence[float]], colours: Sequence[str] = LINES
) -> None:
    """One line a name of `series` over common x; markers differ too, for print."""
    for (name, values), line_colour, marker in zip(
        series.items(), colours, "osD^vP*X", strict=False
    ):
        axes.plot(x, values, marker=marker, markersize=4, color=line_colour, label=name)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)


def plot_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], form: str = "{:.2f}"
) -> None:
    """Horizontal bars, the first on top, each with its value."""
    bars = axes.barh(range(len(names)), values, color=LINES[0])
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def plot_heatmap(
    axes: Axes,
    matrix: Tensor,
    row_names: Sequence[str],
    column_names: Sequence[str],
    form: str | None = "{:.1f}",
    limits: tuple[float, float] | None = None,
) -> None:
    """A matrix (rows, columns) as colours, dark to light, with its numbers unless `form` is None.

    `limits` are the values of the darkest and the lightest colour, by default the matrix's own.
    """
    values = matrix.detach().cpu().numpy()
    low, high = limits or (values.min(), values.max())
    shown = axes.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    axes.set_xticks(range(len(column_names)), column_names, fontsize=8)
    axes.set_yticks(range(len(row_names)), row_names, fontsize=8)
    if form is not None:
        middle = (low + high) / 2
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            ink = "black" if value > middle else "white"
            axes.text(
                column, row, form.format(value), ha="center", va="center", fontsize=7, color=ink
            )


def show_map(
    axes: Axes, values: Tensor, title: str = "", limits: tuple[float, float] | None = None, **kwargs
):
    """A map (h, w), such as a channel of features, as colours from dark (low) to light, without ticks.

    `limits` are the values of the darkest and the lightest colour, by default the map's own; `extent=(left, right,
    bottom, top)` places it in the pixels of an image. Returns what `Figure.colorbar` takes.
    """
    low, high = limits or (None, None)
    shown = axes.imshow(
        values.detach().cpu().numpy(), cmap="cividis", vmin=low, vmax=high, **kwargs
    )
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
    return shown


def plot_stacked(
    axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], form: str = "{:.0f}"
) -> None:
    """Horizontal bars, the first on top, each divided into `parts` (name -> a value a bar), with its total."""
    left = np.zeros(len(names))
    for (part, values), part_colour, hatch in zip(
        parts.items(), LINES, ("", "//", "..", "xx", "--", "oo"), strict=False
    ):
        axes.barh(
            range(len(names)),
            values,
            left=left,
            color=part_colour,
            hatch=hatch,
            edgecolor="white",
            label=part,
        )
        left += values
    for row, total in enumerate(left):
        axes.text(total, row, f"  {form.format(total)}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=len(parts), frameon=False)


@dataclass(frozen=True)
class PictureArgs:
    weights: Path  # checkpoint
    val_json: str | None = None  # annotations (COCO format); by default those of the training run
    val_images: str | None = None  # folder that the file names in --val-json start from
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    output: Path = Path("runs/pictures")  # folder for detections.png and stages.png
    images: int = 8  # pictures of the validation data to draw
    score_threshold: float = (
        0.3  # detections below it are not drawn; scores are still low after minutes of training
    )


@dataclass(frozen=True)
class ReadmeArgs:
    weights: Path = Path("assets/shapes.pt")  # checkpoint
    output: Path = Path("assets")  # folder for detections.png and stages.png


@torch.inference_mode()
def draw_readme(args: ReadmeArgs) -> None:
    """The README's pictures: the slides' figure (a)–(d) on three held-out pictures, detections on the first twelve."""
    model, checkpoint = load_model(args.weights)
    dataset, class_names = validation_set(checkpoint), checkpoint["class_names"]
    if len(dataset) < 23:
        raise UserError(
            f"{args.weights}: its validation data has {len(dataset)} pictures, 23 are needed"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    images = [dataset[i][0] for i in range(23)]
    last = len(model.head.stages)
    # Pictures whose objects lie apart, so that boxes can be followed; of six stages the slides show 1, 3 and 6.
    figure = draw_stages(
        model,
        [images[i] for i in (5, 10, 22)],
        class_names,
        stages=sorted({1, (last + 1) // 2, last}),
    )
    figure.savefig(args.output / "stages.png", dpi=120)
    figure, grid = new_figure(3, 4, (2.1, 2.1))
    for axes, image in zip(grid.flat, images, strict=False):
        draw_detections(axes, image, model([image])[0], class_names)
    figure.savefig(args.output / "detections.png", dpi=120)
    print(f"pictures: {args.output / 'stages.png'}, {args.output / 'detections.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Detections, and the proposals of every stage, on validation pictures; `readme`: the README's pictures."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["readme"]:
        return draw_readme(
            parse_args(argv[1:], ReadmeArgs, "visualize.py readme", "The README's pictures.")
        )
    description = "Pictures of a checkpoint's detections on its validation data. `visualize.py readme` draws the README's."
    args = parse_args(argv, PictureArgs, "visualize.py", description)
    if args.images < 1:
        raise UserError("visualize: --images should be at least 1")
    model, checkpoint = load_model(args.weights, pick_device(args.device))
    dataset = validation_set(checkpoint, val_json=args.val_json, val_images=args.val_images)
    args.output.mkdir(parents=True, exist_ok=True)
    images = [dataset[i][0] for i in range(min(args.images, len(dataset)))]
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure, grid = new_figure(rows, columns, (3, 3))
    with torch.inference_mode():
        for axes, image in zip(grid.flat, images, strict=False):
            draw_detections(
                axes, image, model([image])[0], checkpoint["class_names"], args.score_threshold
            )
    figure.savefig(args.output / "detections.png", dpi=120)
    draw_stages(model, images[:4], checkpoint["class_names"], args.score_threshold).savefig(
        args.output / "stages.png", dpi=120
    )
    print(f"pictures: {args.output / 'detections.png'}, {args.output / 'stages.png'}")


if __name__ == "__main__":
    sys.exit(run_main(main, "visualize.py"))

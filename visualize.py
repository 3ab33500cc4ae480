"""Everything that is drawn: detections, the boxes of every stage, bars, lines and heat maps.

As a command it draws a checkpoint's detections on its validation data:

In:  a checkpoint, and a data set in COCO's format (by default the one it was validated on).
Out: `OUTPUT/detections.png`, and `OUTPUT/stages.png` with the boxes of every stage.

The functions are what `predict.py` and the notebooks draw with. A class has the same colour
everywhere. The colours can be told apart by colour-blind readers; in print the names beside the
boxes tell the classes apart.

Texts such as class names and titles are drawn as they are (`parse_math=False`): matplotlib would
otherwise take what is between two dollar signs for mathematics.

Shapes: N proposals, S stages, K classes, n boxes in an image. Images are RGB (3, H, W), boxes xyxy
in pixels.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from data import validation_set
from model import SparseRCNN, StageOutputs, load_model
from support.animation import Panel, write_gif
from support.cli import parse_args, run_main
from support.devices import choose_threads, pick_device
from support.errors import UserError
from support.plots import LINES
from support.results import make_folder, replacing

# The colours of Okabe and Ito, the lighter ones first: they stand out on photographs.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF")
MARKERS = ("o", "s", "D", "^", "v", "P", "*", "X")  # of lines, to tell them apart in print
HATCHES = ("", "//", "..", "xx", "--", "oo")  # of the parts of a bar, likewise
# What is not a class is black or grey. Lines differ by shade, dashes and marker, objects by dashes.
GREYS = ("#000000", "#6E6E6E", "#3C3C3C", "#8C8C8C", "#555555", "#A0A0A0")
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MAX_IMAGES = 400  # on one page; matplotlib draws none of more than 65,535 pixels a side


def colour(index: int) -> str:
    """The colour of a class, by its label."""
    return PALETTE[index % len(PALETTE)]


def drawable(text: object) -> str:
    """A text without the lone surrogates of file names that are not UTF-8: fonts refuse them."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


# --- figures ---


def new_figure(
    rows: int, columns: int, panel: tuple[float, float] = (2.6, 2.6), **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, an array (rows, columns).

    It is not one of pyplot's, which would keep it in memory.

    Args:
        rows, columns: how many axes there are.
        panel: width and height of each in inches.
        kwargs: for `Figure.subplots`.
    """
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save_figure(figure: Figure, path: Path, dpi: float = 120) -> None:
    """Writes a figure as PNG; if that fails, a file that was there before is still whole.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


# --- images and boxes ---


def show_image(
    axes: Axes, image: Tensor, title: str = "", size_hw: tuple[int, int] | None = None
) -> None:
    """Draws an RGB image without ticks.

    Args:
        image: (3, H, W), uint8 or float 0–1.
        title: above it.
        size_hw: the height and width that the axes count, if `image` is a smaller or larger copy of
            the one that the boxes belong to; by default its own.
    """
    height, width = image.shape[1:] if size_hw is None else size_hw
    # The centres of the first pixels are at 0, as matplotlib has it by default.
    half_w, half_h = width / image.shape[2] / 2, height / image.shape[1] / 2
    extent = (-half_w, width - half_w, height - half_h, -half_h)
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest", extent=extent)
    axes.set_axis_off()
    axes.set_title(drawable(title), fontsize=9, parse_math=False)


def pad_canvas(axes: Axes, image: Tensor, margin: float = 0.3) -> None:
    """Makes room around an image that is shown already, for boxes that extend beyond it.

    Args:
        image: (3, H, W), the one that is shown.
        margin: in widths of the image at the left and right, in heights above and below.
    """
    height, width = image.shape[1:]
    axes.set_xlim(-margin * width - 0.5, (1 + margin) * width - 0.5)
    axes.set_ylim((1 + margin) * height - 0.5, -margin * height - 0.5)
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, color="#EEEEEE", zorder=-1))


def draw_boxes(
    axes: Axes,
    boxes: Tensor,
    colours: Sequence[str],
    texts: Sequence[str] | None = None,
    linewidth: float = 1.8,
    linestyle: Any = "-",
    alphas: Sequence[float] | None = None,
) -> None:
    """Draws boxes over an image that is shown already.

    Args:
        boxes: (n, 4) xyxy px.
        colours: n, of the lines.
        texts: n, drawn inside or right above a corner of each box; none by default.
        linewidth, linestyle: as matplotlib takes them.
        alphas: n, from 0 (invisible) to 1; by default all are 1.
    """
    outline = [withStroke(linewidth=linewidth + 1.2, foreground="black")]
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        box = Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colours[i],
            linewidth=linewidth,
            linestyle=linestyle,
            alpha=1.0 if alphas is None else alphas[i],
        )
        # A dark rim makes a line visible on any background.
        if linewidth > 1 and (alphas is None or alphas[i] == 1):
            box.set_path_effects(outline)
        axes.add_patch(box)
        if texts:
            _draw_label(axes, (x1, y1, x2, y2), texts[i], colours[i])


def _draw_label(
    axes: Axes, box: tuple[float, float, float, float], text: str, background: str
) -> None:
    """A text at the upper left corner of a box; elsewhere if it would leave the image there."""
    x1, y1, x2, _ = box
    left, right = sorted(axes.get_xlim())
    top, bottom = sorted(axes.get_ylim())
    is_right = x1 > left + 0.7 * (right - left)
    is_above = y1 > top + 0.08 * (bottom - top)
    axes.text(
        min(max(x2 if is_right else x1, left), right),
        min(max(y1, top), bottom),
        drawable(text),
        fontsize=6.5,
        color="black",
        ha="right" if is_right else "left",
        va="bottom" if is_above else "top",
        bbox={"facecolor": background, "edgecolor": "none", "pad": 1.0, "alpha": 0.9},
        clip_on=True,
        parse_math=False,
    )


def draw_detections(
    axes: Axes,
    image: Tensor,
    detection: dict[str, Tensor],
    class_names: Sequence[str],
    threshold: float = 0.4,
    title: str = "",
    size_hw: tuple[int, int] | None = None,
) -> None:
    """Draws what the model found in an image.

    Args:
        image: (3, H, W), uint8 or float 0–1.
        detection: `boxes`, `scores` and `labels` as `SparseRCNN` returns them for an image.
        class_names: K names.
        threshold: detections that score less are left out.
        title: above the image.
        size_hw: see `show_image`.
    """
    show_image(axes, image, title, size_hw)
    keep = detection["scores"] >= threshold
    labels = detection["labels"][keep].tolist()
    scores = detection["scores"][keep].tolist()
    texts = [_label_text(*pair, class_names) for pair in zip(labels, scores, strict=True)]
    colours = [colour(label) for label in labels]
    draw_boxes(axes, detection["boxes"][keep], colours, texts)


def _label_text(label: int, score: float, class_names: Sequence[str]) -> str:
    return f"{class_names[label]} {score:.2f}"


# --- stages ---


@torch.inference_mode()
def draw_stages(
    model: SparseRCNN,
    images: Sequence[Tensor],
    class_names: Sequence[str],
    threshold: float = 0.4,
    stages: Sequence[int] | None = None,
    outputs: Sequence[StageOutputs] | None = None,
) -> Figure:
    """Draws one row per image: the learned proposal boxes, then the boxes after some stages.

    A proposal keeps its colour from stage to stage: that of the class that it ends with, if its
    last score reaches `threshold`. All other proposals are thin and white.

    Args:
        model: in eval mode.
        images: each (3, H, W), at the size that the model takes.
        class_names: K names.
        threshold: for the scores of the last stage.
        stages: which ones to draw, the first one being 1; by default all.
        outputs: what `model.stages([image])` gave for each image; by default it is called here.

    Raises:
        ValueError: there is no such stage.
    """
    last_stage = len(model.head.stages)
    stages = range(1, last_stage + 1) if stages is None else stages
    if not all(1 <= stage <= last_stage for stage in stages):
        raise ValueError(f"draw_stages: stages {list(stages)} are not all in 1 … {last_stage}")
    if outputs is None:
        outputs = [model.stages([image]) for image in images]

    figure, grid = new_figure(len(images), len(stages) + 1, (2.1, 2.25))
    for row, image, output in zip(grid, images, outputs, strict=True):
        _draw_row_of_stages(row, model, image, output, class_names, threshold, stages)
    for axes, stage in zip(grid[0], ("", *stages), strict=True):
        axes.set_title(f"stage {stage}" if stage else "learned proposals", fontsize=9)
    return figure


def _draw_row_of_stages(
    row: Sequence[Axes],
    model: SparseRCNN,
    image: Tensor,
    output: StageOutputs,
    class_names: Sequence[str],
    threshold: float,
    stages: Sequence[int],
) -> None:
    """One image of `draw_stages`."""
    height, width = image.shape[1:]
    whwh_px = torch.tensor([[width, height, width, height]], device=output.boxes.device)
    panels = [model.initial_boxes_px(whwh_px)[0]]  # (N, 4) each
    panels += [output.boxes[stage - 1, 0] for stage in stages]

    scores, labels = output.logits[-1, 0].float().sigmoid().max(-1)  # (N,) each
    found = scores >= threshold
    labels, scores = labels[found].tolist(), scores[found].tolist()
    colours = [colour(label) for label in labels]
    texts = [_label_text(*pair, class_names) for pair in zip(labels, scores, strict=True)]

    for axes, boxes_px in zip(row, panels, strict=True):
        show_image(axes, image)
        others = boxes_px[~found]
        draw_boxes(axes, others, ["#FFFFFF"] * len(others), linewidth=0.6)
        is_last = axes is row[-1]
        draw_boxes(axes, boxes_px[found], colours, texts if is_last else None)
        # Boxes may extend beyond the image.
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)


# --- charts ---


def plot_lines(
    axes: Axes, x: Sequence, series: Mapping[str, Sequence[float]], colours: Sequence[str] = LINES
) -> None:
    """Draws one line per name over common x values.

    Args:
        series: name -> y values.
        colours: of the lines.
    """
    for (name, values), line_colour, marker in zip(series.items(), colours, MARKERS, strict=False):
        axes.plot(x, values, marker=marker, markersize=4, color=line_colour, label=drawable(name))
    axes.grid(alpha=0.3)
    if len(series) > 1:
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)


def plot_named_lines(
    axes: Axes, x: Sequence[float], series: Mapping[str, Sequence[float]], margin: float = 0.3
) -> None:
    """Draws one black or grey line per name, and writes the name at its right end.

    Colour is left to the classes: these lines differ by shade, dashes and marker. If y is to have
    certain limits, set them before. A line without any finite value has no name.

    Args:
        x: common x values.
        series: name -> y values.
        margin: room for the names, as a share of the width of the lines.
    """
    ends = []
    for number, (name, values) in enumerate(series.items()):
        kind = number % len(GREYS)
        axes.plot(
            x,
            values,
            color=GREYS[kind],
            linestyle=DASHES[kind],
            marker=MARKERS[kind],
            markersize=4,
        )
        finite = [float(value) for value in values if np.isfinite(value)]
        if finite:
            ends.append([finite[-1], drawable(name), GREYS[kind]])
    axes.set_xticks([tick for tick in axes.get_xticks() if x[0] <= tick <= x[-1]])
    axes.set_xlim(right=x[-1] + margin * (x[-1] - x[0]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)

    # From the lowest to the highest, each name at least one line of text above the last.
    low, high = axes.get_ylim()
    gap, floor = 0.07 * (high - low), -np.inf
    for y, name, shade in sorted(ends):
        floor = max(y, floor + gap)
        axes.annotate(
            name,
            (x[-1], floor),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=shade,
            fontsize=8,
            annotation_clip=False,
            parse_math=False,
        )


def takeaway(axes: Axes, text: str) -> None:
    """Writes above the axes what a reader should see in them."""
    axes.set_title(drawable(text), loc="left", fontsize=9.5, fontweight="bold", parse_math=False)


def plot_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], form: str = "{:.2f}"
) -> None:
    """Draws horizontal bars, the first one on top, each with its value in the given form."""
    bars = axes.barh(range(len(names)), values, color=LINES[0])
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    _name_bars(axes, names, margin=0.18)


def plot_stacked(
    axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], form: str = "{:.0f}"
) -> None:
    """Draws horizontal bars, the first one on top, each divided into parts, with its total.

    Args:
        names: of the bars.
        parts: name of a part -> its values, one per bar.
        form: of the total.
    """
    left = np.zeros(len(names))
    for (part, values), part_colour, hatch in zip(parts.items(), LINES, HATCHES, strict=False):
        axes.barh(
            range(len(names)),
            values,
            left=left,
            color=part_colour,
            hatch=hatch,
            edgecolor="white",
            label=drawable(part),
        )
        left += values
    for row, total in enumerate(left):
        axes.text(total, row, f"  {form.format(total)}", va="center", fontsize=8)
    _name_bars(axes, names, margin=0.15)

    legend = axes.figure.legend(
        fontsize=8, loc="outside lower center", ncols=len(parts), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _name_bars(axes: Axes, names: Sequence[str], margin: float) -> None:
    """Writes the names beside horizontal bars; `margin` is the room for their values."""
    axes.set_yticks(range(len(names)), [drawable(name) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=margin)
    axes.spines[["top", "right"]].set_visible(False)


def plot_heatmap(
    axes: Axes,
    matrix: Tensor,
    row_names: Sequence[str],
    column_names: Sequence[str],
    form: str | None = "{:.1f}",
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws a matrix as colours from dark (low) to light, with its numbers.

    Args:
        matrix: (rows, columns).
        row_names, column_names: beside and below it.
        form: of the numbers; None for no numbers.
        limits: the values of the darkest and the lightest colour, by default the matrix's own.
    """
    values = matrix.detach().cpu().numpy()
    low, high = limits or (values.min(), values.max())
    shown = axes.imshow(values, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    for set_ticks, names in ((axes.set_xticks, column_names), (axes.set_yticks, row_names)):
        texts = [drawable(name) for name in names]
        set_ticks(range(len(texts)), texts, fontsize=8, parse_math=False)
    if form is None:
        return
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        axes.text(
            column,
            row,
            form.format(value),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if value > (low + high) / 2 else "white",
        )


def show_map(
    axes: Axes,
    values: Tensor,
    title: str = "",
    limits: tuple[float, float] | None = None,
    **kwargs: Any,
) -> ScalarMappable:
    """Draws a map, such as a channel of features, as colours from dark (low) to light.

    Args:
        values: (h, w).
        title: above it.
        limits: the values of the darkest and the lightest colour, by default the map's own.
        kwargs: for `Axes.imshow`; `extent=(left, right, bottom, top)` places the map in the pixels
            of an image.

    Returns:
        What `Figure.colorbar` takes.
    """
    low, high = limits or (None, None)
    pixels = values.detach().cpu().numpy()
    shown = axes.imshow(pixels, cmap="cividis", vmin=low, vmax=high, **kwargs)
    axes.set_axis_off()
    axes.set_title(drawable(title), fontsize=9, parse_math=False)
    return shown


# --- command lines ---


@dataclass(frozen=True)
class PictureArgs:
    weights: Path  # checkpoint
    val_json: str | None = None  # annotations (COCO format); by default those of the training run
    val_images: str | None = None  # folder that the file names in --val-json are relative to
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    output: Path = Path("runs/pictures")  # folder for detections.png and stages.png
    images: int = 8  # how many images of the validation data to draw
    # Detections that score less are not drawn. The default is low, because scores are low after
    # minutes of training.
    score_threshold: float = 0.3


@dataclass(frozen=True)
class ReadmeArgs:
    shapes_weights: Path = Path("assets/shapes.pt")  # checkpoint that was trained on Shapes
    blood_weights: Path = Path("assets/blood.pt")  # checkpoint that was trained on blood cells
    blood_json: str = "assets/blood/val.json"  # annotations of photographs that lie beside them
    output: Path = Path("assets")  # folder for refinement.gif and refinement.png


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["readme"]:
        description = "Draws the figures of the README."
        draw_readme(parse_args(argv[1:], ReadmeArgs, "visualize.py readme", description))
        return

    description = (
        "Draws a checkpoint's detections on its validation data, and the boxes of every stage on "
        "the first four images. `visualize.py readme` draws the figures of the README."
    )
    args = parse_args(argv, PictureArgs, "visualize.py", description)
    if not 1 <= args.images <= MAX_IMAGES:
        raise UserError(f"--images {args.images} should be in 1 … {MAX_IMAGES}")
    device = pick_device(args.device)
    model, checkpoint = load_model(args.weights, device)
    choose_threads(device, checkpoint["config"], checkpoint["config"].test_size)
    class_names = checkpoint["class_names"]
    dataset = validation_set(checkpoint, val_json=args.val_json, val_images=args.val_images)
    make_folder(args.output)
    images = [dataset[i][0] for i in range(min(args.images, len(dataset)))]

    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = draw_grid(model, images, class_names, (rows, columns), (3, 3), args.score_threshold)
    save_figure(figure, args.output / "detections.png")
    figure = draw_stages(model, images[:4], class_names, args.score_threshold)
    save_figure(figure, args.output / "stages.png")
    print(f"pictures: {args.output / 'detections.png'}, {args.output / 'stages.png'}")


@torch.inference_mode()
def draw_readme(args: ReadmeArgs) -> None:
    """Draws the animation of the README: the proposals on a photograph and on an image of Shapes.

    Raises:
        UserError: a checkpoint or its data cannot be used.
    """
    blood, blood_checkpoint = load_model(args.blood_weights)
    photographs = validation_set(
        blood_checkpoint, val_json=args.blood_json, val_images=str(Path(args.blood_json).parent)
    )
    shapes, shapes_checkpoint = load_model(args.shapes_weights)
    panels = [
        refinement_panel(blood, photographs[3][0], blood_checkpoint["class_names"]),
        # On this image the objects lie apart, so that a reader can follow the boxes.
        refinement_panel(
            shapes, validation_set(shapes_checkpoint)[10][0], shapes_checkpoint["class_names"]
        ),
    ]
    make_folder(args.output)
    path = args.output / "refinement.gif"
    write_gif(panels, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, and {path.with_suffix('.png')} for print")


def refinement_panel(model: SparseRCNN, image: Tensor, class_names: Sequence[str]) -> Panel:
    """What the model makes of its learned proposals on one image, for `write_gif`.

    Args:
        model: in eval mode.
        image: (3, H, W) uint8, at the size that the model takes.
        class_names: K names.
    """
    height, width = image.shape[1:]
    outputs = model.stages([image])
    learned_px = model.initial_boxes_px(torch.tensor([[width, height, width, height]]))
    probabilities = outputs.logits[:, 0].sigmoid()  # (S, N, K)
    labels = probabilities[-1].argmax(-1)  # (N,)
    scores = probabilities.gather(2, labels.expand(len(probabilities), -1)[..., None])[..., 0]
    return Panel(
        image.as_subclass(Tensor),
        boxes_px=torch.cat([learned_px, outputs.boxes[:, 0]]),
        scores=scores,
        colours=[colour(label) for label in labels.tolist()],
        names=[class_names[label] for label in labels.tolist()],
    )


@torch.inference_mode()
def draw_grid(
    model: SparseRCNN,
    images: Sequence[Tensor],
    class_names: Sequence[str],
    shape: tuple[int, int],
    panel: tuple[float, float],
    threshold: float = 0.4,
) -> Figure:
    """Draws detections on several images.

    Args:
        model: in eval mode.
        images: each (3, H, W), at the size that the model takes.
        class_names: K names.
        shape: how many rows and columns there are.
        panel: width and height of an image in inches.
        threshold: detections that score less are left out.
    """
    figure, grid = new_figure(*shape, panel)
    for axes in grid.flat:
        axes.set_axis_off()  # also those that no image is left for
    for axes, image in zip(grid.flat, images, strict=False):
        draw_detections(axes, image, model([image])[0], class_names, threshold)
    return figure


if __name__ == "__main__":
    sys.exit(run_main(main, "visualize.py"))

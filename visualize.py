"""Everything that is drawn: detections, and the boxes of every stage.

As a command it draws a checkpoint's detections on its validation data:

In:  a checkpoint, and a data set in COCO's format (by default the one it was validated on).
Out: `OUTPUT/detections.png`, and `OUTPUT/stages.png` with the boxes of every stage.

The functions are what `predict.py` and the notebooks draw with: `draw_image` gives the pixels of an
image with its detections, the others draw on matplotlib's axes. A class has the same colour
everywhere. The colours can be told apart by colour-blind readers; in print the names beside the
boxes tell the classes apart. Texts are drawn as they are (`parse_math=False`): matplotlib would
take what is between two dollar signs for mathematics.

Shapes: N proposals, S stages, K classes, n boxes in an image. Images are RGB (3, H, W), boxes xyxy
in pixels.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from data import validation_set
from model import SparseRCNN, StageOutputs, load_model
from support.cli import parse_args, run_main
from support.devices import choose_threads, pick_device
from support.errors import UserError
from support.files import make_folder, replacing

# The colours of Okabe and Ito, the lighter ones first: they stand out on photographs.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF")
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def colour(index: int) -> str:
    """The colour of a class, by its label."""
    return PALETTE[index % len(PALETTE)]


def drawable(text: object) -> str:
    """A text without the lone surrogates of file names that are not UTF-8: fonts refuse them."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def colours_and_texts(
    labels: Tensor, scores: Tensor, class_names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What labels (n,) and scores (n,) are drawn with: n colours, and n texts of one line."""
    names = [drawable(class_names[label]).replace("\n", " ") for label in labels.tolist()]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
    return [colour(label) for label in labels.tolist()], texts


# --- pixels ---


def draw_image(image: Tensor, detections: dict[str, Tensor], class_names: Sequence[str]) -> Tensor:
    """Draws detections into an image, with lines and letters as large as suits its size.

    Args:
        image: (3, H, W) uint8.
        detections: `boxes` (n, 4), `scores` and `labels` as `SparseRCNN` returns them.
        class_names: K names. Letters that the font lacks become empty boxes.

    Returns:
        (3, H, W) uint8.
    """
    if not len(detections["boxes"]):
        return image
    height, width = image.shape[1:]
    side_px = math.sqrt(height * width)
    font_px, line_px = max(10, round(side_px / 46)), max(2, round(side_px / 280))
    font = ImageFont.truetype(FONT, font_px)

    boxes_px = detections["boxes"].round()
    boxes_px = boxes_px.minimum(torch.tensor([width, height, width, height]) - 1)
    colours, texts = colours_and_texts(detections["labels"], detections["scores"], class_names)
    places_px = []
    for (x1, y1, _, _), text in zip(boxes_px.tolist(), texts, strict=True):
        # Above the upper left corner of the box, as far as the image reaches. torchvision leaves a
        # margin of one pixel around a text.
        _, top, right, bottom = font.getbbox(text)
        x, y = max(0, min(x1, width - right - 3)), max(-top, y1 - bottom - 2)
        places_px.append([x, y, x, y])

    # A dark rim makes a line visible on any background.
    rims_px = boxes_px + torch.tensor([-1, -1, 1, 1]) * (line_px // 2)
    image = draw_bounding_boxes(image, rims_px, colors="black", width=2 * line_px)
    image = draw_bounding_boxes(image, boxes_px, colors=colours, width=line_px)
    # The texts come last, so that no line crosses them, and the best detection's on top.
    style = {"width": 0, "fill_labels": True, "font": str(FONT), "font_size": font_px}
    places_px = torch.tensor(places_px).flip(0)
    return draw_bounding_boxes(image, places_px, texts[::-1], colours[::-1], **style)


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
    """Writes a figure as .png or .jpg; if that fails, a file that was there is still whole.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:])


# --- images and boxes ---


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """Draws an RGB image without ticks.

    Args:
        image: (3, H, W), uint8 or float 0–1.
        title: above it.
    """
    axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(drawable(title), fontsize=9, parse_math=False)


def draw_boxes(
    axes: Axes,
    boxes: Tensor,
    colours: Sequence[str],
    texts: Sequence[str] | None = None,
    linewidth: float = 1.8,
    linestyle: Any = "-",
) -> None:
    """Draws boxes over an image that is shown already.

    Args:
        boxes: (n, 4) xyxy px.
        colours: n, of the lines.
        texts: n, drawn inside or right above a corner of each box; none by default.
        linewidth, linestyle: as matplotlib takes them.
    """
    outline = [withStroke(linewidth=linewidth + 1.2, foreground="black")]
    style = {"linewidth": linewidth, "linestyle": linestyle, "fill": False}
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        box = Rectangle((x1, y1), x2 - x1, y2 - y1, edgecolor=colours[i], **style)
        # A dark rim makes a line visible on any background.
        if linewidth > 1:
            box.set_path_effects(outline)
        axes.add_patch(box)
        if texts:
            _draw_label(axes, (x1, y1, x2), texts[i], colours[i])


def _draw_label(axes: Axes, box: tuple[float, float, float], text: str, background: str) -> None:
    """A text at the upper left corner of a box; elsewhere if it would leave the image there."""
    x1, y1, x2 = box
    left, right = sorted(axes.get_xlim())
    top, bottom = sorted(axes.get_ylim())
    is_right = x1 > left + 0.7 * (right - left)
    is_above = y1 > top + 0.08 * (bottom - top)
    axes.text(
        min(max(x2 if is_right else x1, left), right),
        min(max(y1, top), bottom),
        drawable(text),
        fontsize=6.5,
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
) -> None:
    """Draws what the model found in an image.

    Args:
        image: (3, H, W), uint8 or float 0–1.
        detection: `boxes`, `scores` and `labels` as `SparseRCNN` returns them for an image.
        class_names: K names.
        threshold: detections that score less are left out.
    """
    show_image(axes, image)
    keep = detection["scores"] >= threshold
    labels, scores = detection["labels"][keep], detection["scores"][keep]
    draw_boxes(axes, detection["boxes"][keep], *colours_and_texts(labels, scores, class_names))


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
    outputs = [model.stages([image]) for image in images] if outputs is None else outputs

    figure, grid = new_figure(len(images), len(stages) + 1, (2.1, 2.25))
    for row, image, output in zip(grid, images, outputs, strict=True):
        height, width = image.shape[1:]
        whwh_px = torch.tensor([[width, height, width, height]], device=output.boxes.device)
        boxes_px = [model.initial_boxes_px(whwh_px)[0]]  # (N, 4) each
        boxes_px += [output.boxes[stage - 1, 0] for stage in stages]

        scores, labels = output.logits[-1, 0].float().sigmoid().max(-1)  # (N,) each
        found = scores >= threshold
        colours, texts = colours_and_texts(labels[found], scores[found], class_names)
        for axes, boxes in zip(row, boxes_px, strict=True):
            show_image(axes, image)
            draw_boxes(axes, boxes[~found], ["#FFFFFF"] * len(boxes), linewidth=0.6)
            draw_boxes(axes, boxes[found], colours, texts if axes is row[-1] else None)
            # Boxes may extend beyond the image.
            axes.set_xlim(-0.5, width - 0.5)
            axes.set_ylim(height - 0.5, -0.5)
    for axes, stage in zip(grid[0], ("", *stages), strict=True):
        axes.set_title(f"stage {stage}" if stage else "learned proposals", fontsize=9)
    return figure


# --- command line ---


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


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    description = "Draws a checkpoint's detections, and the boxes of every stage on four images."
    args = parse_args(argv, PictureArgs, "visualize.py", description)
    if args.images < 1:
        raise UserError(f"--images {args.images} should be at least 1")
    device = pick_device(args.device)
    model, checkpoint = load_model(args.weights, device)
    choose_threads(device, checkpoint["config"].backbone)
    class_names = checkpoint["class_names"]
    dataset = validation_set(checkpoint, val_json=args.val_json, val_images=args.val_images)
    make_folder(args.output)
    images = [dataset[i][0] for i in range(min(args.images, len(dataset)))]

    columns = min(4, len(images))
    figure, grid = new_figure(-(-len(images) // columns), columns, (3, 3))
    for axes in grid.flat:
        axes.set_axis_off()  # also those that no image is left for
    for axes, image in zip(grid.flat, images, strict=False):
        draw_detections(axes, image, model([image])[0], class_names, args.score_threshold)
    save_figure(figure, args.output / "detections.png")
    stages = draw_stages(model, images[:4], class_names, args.score_threshold)
    save_figure(stages, args.output / "stages.png")
    print(f"pictures: {args.output / 'detections.png'}, {args.output / 'stages.png'}")


if __name__ == "__main__":
    sys.exit(run_main(main, "visualize.py"))

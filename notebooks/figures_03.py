"""The figures of notebook 3, dynamic instance interaction. They take tensors, not models.

Shapes: N proposals, C channels, D dynamic channels, S stages, K classes, M objects, R×R bins. Images
are RGB (3, H, W), boxes xyxy in pixels of the image.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.functional import crop

from visualize import (
    GREYS,
    colour,
    draw_boxes,
    drawable,
    new_figure,
    pad_canvas,
    plot_named_lines,
    show_image,
    show_map,
    takeaway,
)

HIT = 0.5  # a box hits an object if their IoU is at least this
COLOUR_NAMES = ("orange", "light blue", "green", "yellow", "pink", "red", "dark blue", "white")


def draw_same_region(
    image: Tensor,
    target: Mapping[str, Tensor],
    panels: Mapping[str, Tensor],
    class_names: Sequence[str],
) -> Figure:
    """Draws what becomes of proposals that all start with the whole image.

    The box that fits an object best has the colour of the object's class, its number and its IoU;
    the other boxes are thin and white.

    Args:
        image: (3, H, W).
        target: `boxes` (M, 4) px and `labels` (M,) of the objects.
        panels: what was done -> boxes (N, 4) px afterwards.
        class_names: K names.
    """
    height, width = image.shape[1:]
    labels = target["labels"].tolist()
    figure, grid = new_figure(1, len(panels), (3.0, 3.45))
    for axes, (name, boxes) in zip(grid[0], panels.items(), strict=True):
        show_image(axes, image)
        pad_canvas(axes, image, 0.1)
        _dashed_box(axes, torch.tensor([-0.5, -0.5, width - 0.5, height - 0.5]), 2.0)

        fits, best = box_iou(target["boxes"], boxes).max(1)  # (M,) each
        touching = torch.nonzero(fits >= 0.01).flatten().tolist()
        is_other = torch.ones(len(boxes), dtype=torch.bool)
        is_other[best[touching]] = False
        draw_boxes(axes, boxes[is_other], ["#FFFFFF"] * int(is_other.sum()), linewidth=0.8)
        texts = [f"{best[m]}: {fits[m]:.2f}" for m in touching]
        draw_boxes(axes, boxes[best[touching]], [colour(labels[m]) for m in touching], texts)
        takeaway(axes, f"{name}:\n{int((fits >= HIT).sum())} of {len(fits)} objects hit")

    names = [f"{class_names[k]} {COLOUR_NAMES[k % len(COLOUR_NAMES)]}" for k in sorted({*labels})]
    figure.supxlabel(
        "After stage 1. Dashed: the box in which all proposals start. Coloured: the box that fits an "
        f"object best, its number and its IoU\n({', '.join(names)}; {HIT} or more is a hit). "
        "White: the others.",
        fontsize=8,
        parse_math=False,
    )
    return figure


def draw_followed(
    image: Tensor,
    name: str,
    boxes: tuple[Tensor, Tensor],
    kernel: Tensor,
    response: Tensor,
    scores: tuple[Tensor | None, Tensor],
    objects: Tensor,
    class_names: Sequence[str],
) -> Figure:
    """Draws one proposal on its way through one stage.

    Args:
        image: (3, H, W).
        name: of the proposal and the stage.
        boxes: (4,) px, before and after the stage.
        kernel: (C, D), the first one that the proposal generates.
        response: (R·R, D), what this kernel finds in the region.
        scores: (K,) before (None in the first stage) and after the stage.
        objects: (M, 4) px, where the objects are.
        class_names: K names.
    """
    before, after = boxes
    label = int(scores[1].argmax())
    side = round(len(response) ** 0.5)
    height, width = image.shape[1:]
    # Panels of one height: an image is as wide as its canvas.
    canvas = (1.16 * width) / (1.16 * height)
    widths = (canvas, 1.0, 0.5, 1.0, 0.6, canvas)
    figure = Figure(figsize=(12.5, 3.3), layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths)

    show_image(panels[0], image)
    pad_canvas(panels[0], image, 0.08)
    _dashed_box(panels[0], before, 1.6)
    takeaway(panels[0], "Pool: its box")

    _draw_bins(panels[1], image, before, side)
    takeaway(panels[1], f"… in {side}×{side} bins")

    _draw_kernel(panels[2], kernel)
    takeaway(panels[2], "Generate")

    show_map(panels[3], _mosaic(response, side))
    takeaway(panels[3], f"Filter: {response.shape[1]} outputs")
    panels[3].text(
        0.5, -0.02, "dark: 0", fontsize=8, ha="center", va="top", transform=panels[3].transAxes
    )

    _draw_scores(panels[4], scores, class_names)
    takeaway(panels[4], "Predict: scores")

    show_image(panels[5], image)
    pad_canvas(panels[5], image, 0.08)
    _dashed_box(panels[5], before, 1.2)
    text = f"{class_names[label]} {float(scores[1][label]):.2f}"
    draw_boxes(panels[5], after[None], [colour(label)], [text])
    takeaway(panels[5], "… and its new box")

    title = name
    if len(objects):
        fits = box_iou(torch.stack(boxes), objects)  # (2, M)
        nearest = fits[1].argmax()
        title += f": its IoU with the nearest object goes from {fits[0, nearest]:.2f} to "
        title += f"{fits[1, nearest]:.2f}"
        if scores[0] is not None:
            title += f", its score for {class_names[label]} from {float(scores[0][label]):.2f} to "
            title += f"{float(scores[1][label]):.2f}"
    figure.suptitle(title, fontsize=10.5, fontweight="bold", parse_math=False)
    return figure


def _draw_bins(axes: Axes, image: Tensor, box: Tensor, side: int) -> None:
    """The region of an image (3, H, W) in a box (4,) px, divided into side × side bins."""
    x1, y1, x2, y2 = _pixels(box)
    show_image(axes, crop(image, y1, x1, y2 - y1, x2 - x1))  # black beyond the image
    axes.set_aspect((x2 - x1) / (y2 - y1))
    for line in range(side + 1):
        axes.axvline((x2 - x1) * line / side - 0.5, color="white", linewidth=0.8)
        axes.axhline((y2 - y1) * line / side - 0.5, color="white", linewidth=0.8)


def _draw_kernel(axes: Axes, kernel: Tensor) -> None:
    """A kernel (C, D) as a map, with 0 in the middle of the colours."""
    limit = float(kernel.abs().quantile(0.99)) or 1.0
    show_map(axes, kernel, limits=(-limit, limit), aspect="auto")
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    legend = f"kernel 1: {kernel.shape[1]} outputs\nyellow: positive\ndark: negative"
    axes.set_xlabel(legend, fontsize=8)
    axes.set_ylabel(f"{kernel.shape[0]} channels of a bin", fontsize=8)


def _dashed_box(axes: Axes, box: Tensor, linewidth: float) -> None:
    """A box (4,) px that no class is known for: black dashes on white."""
    x1, y1, x2, y2 = box.tolist()
    for shade, style in (("white", "-"), ("black", (0, (4, 3)))):
        axes.add_patch(
            Rectangle(
                (x1, y1),
                x2 - x1,
                y2 - y1,
                fill=False,
                edgecolor=shade,
                linestyle=style,
                linewidth=linewidth,
            )
        )


def _pixels(box: Tensor) -> tuple[int, int, int, int]:
    """A box (4,) as whole pixels, at least two wide and high."""
    x1, y1, x2, y2 = box.round().int().tolist()
    return x1, y1, max(x2, x1 + 2), max(y2, y1 + 2)


def _mosaic(response: Tensor, side: int) -> Tensor:
    """D maps (R·R, D) in rows and columns of one map, with gaps of NaN between them."""
    maps = response.T.reshape(-1, side, side)
    columns = math.ceil(len(maps) ** 0.5)
    rows = math.ceil(len(maps) / columns)
    canvas = torch.full((rows * (side + 1), columns * (side + 1)), torch.nan)
    for i, values in enumerate(maps):
        y, x = i // columns * (side + 1), i % columns * (side + 1)
        canvas[y : y + side, x : x + side] = values
    return canvas[:-1, :-1]


def _draw_scores(
    axes: Axes, scores: tuple[Tensor | None, Tensor], class_names: Sequence[str]
) -> None:
    """Bars for the best classes after the stage, with dashes at their scores before it."""
    before, after = scores
    best = after.argsort(descending=True)[:4].tolist()
    axes.bar(range(len(best)), after[best].tolist(), color=[colour(k) for k in best])
    for x, k in enumerate(best):
        if before is not None:
            axes.plot([x - 0.4, x + 0.4], [float(before[k])] * 2, color="black", linestyle="--")
    axes.set_xticks(range(len(best)))
    names = [drawable(class_names[k]) for k in best]
    axes.set_xticklabels(names, rotation=50, ha="right", fontsize=8, parse_math=False)
    axes.set_ylim(0, 1)
    axes.set_ylabel("score" if before is None else "score (dashes: before)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_likeness(centred: Sequence[Mapping[str, float]]) -> Figure:
    """Draws mean cosines of the kernels of two proposals over the stages.

    Args:
        centred: for each of S stages: which pairs -> mean cosine of their kernels, less the mean of
            all. NaN: there were no such pairs. The title needs the names "other proposal, same
            class", "other proposal, other class" and "any two".
    """
    known = [kind for kind in centred[0] if all(math.isfinite(one[kind]) for one in centred)]
    stages = range(1, 1 + len(centred))
    figure, grid = new_figure(1, 1, (6.6, 3.6))
    axes = grid[0, 0]
    if len(stages) > 1:
        series = {kind: [one[kind] for one in centred] for kind in known}
        plot_named_lines(axes, stages, series, 0.55)
        axes.set_ylim(min(axes.get_ylim()[0], -0.2), 1.25)  # room for the names
    axes.set(xlabel="stage", xticks=stages)
    axes.set_ylabel("mean cosine of two\nproposals' centred kernels")
    axes.spines["bottom"].set_bounds(1, len(stages))

    same, other, any_two = (
        [one[kind] for one in centred]
        for kind in ("other proposal, same class", "other proposal, other class", "any two")
    )
    is_hit = [min(a, b) > c + 0.1 for a, b, c in zip(same, other, any_two, strict=True)]
    is_class = [a > b + 0.03 and h for a, b, h in zip(same, other, is_hit, strict=True)]
    parts = [
        f"{what} from stage {1 + shows.index(True)}"
        for what, shows in (("hit or miss shows", is_hit), ("the class", is_class))
        if True in shows and all(shows[shows.index(True) :])
    ]
    takeaway(axes, "Centred: " + (", ".join(parts) or "kernels less their mean"))
    return figure


def draw_costs(
    replaced_later: Mapping[str, float], shared_in: Mapping[str, float], num_images: int
) -> Figure:
    """Draws APs as grey bars, with a dashed line at the model's own.

    Args:
        replaced_later: what all stages but the first use for kernels -> AP; the first one is the
            model's own.
        shared_in: the one stage in which all proposals share one pair -> AP; all S stages.
        num_images: on which the APs were measured.
    """
    figure, grid = new_figure(1, 2, (4.9, 2.9))
    own = next(iter(replaced_later.values()))
    for axes, aps in zip(grid[0], (replaced_later, shared_in), strict=True):
        axes.barh(range(len(aps)), list(aps.values()), color=GREYS[5])
        for row, ap in enumerate(aps.values()):
            text = f"{ap:.1f}"
            if aps is shared_in or row:
                text += f" ({round(ap, 1) - round(own, 1):+.1f})".replace("-", "−")
            axes.text(101, row, text, va="center", fontsize=9)
        axes.set_yticks(range(len(aps)), list(aps), fontsize=8.5)
        axes.invert_yaxis()
        axes.axvline(own, color="black", linestyle="--", linewidth=1)
        label = f"AP (points of 100) on {num_images} images (dashed: own kernels)"
        axes.set(xlim=(0, 136), xticks=range(0, 101, 20))
        axes.set_xlabel(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)

    worst = min(replaced_later, key=replaced_later.get)
    worst_stage = min(shared_in, key=shared_in.get)
    is_trained = own >= 1  # otherwise there is nothing to lose
    hints = (f"worst is “{worst}”", f"it costs most in {worst_stage}") if is_trained else ("", "")
    takeaway(grid[0, 0], f"Kernels replaced in all stages but the first:\n{hints[0]}")
    takeaway(grid[0, 1], f"One pair for all in one stage:\n{hints[1]}")
    return figure

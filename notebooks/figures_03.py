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

    x1, y1, x2, y2 = _pixels(before)
    show_image(panels[1], crop(image, y1, x1, y2 - y1, x2 - x1))  # black beyond the image
    panels[1].set_aspect((x2 - x1) / (y2 - y1))
    for line in range(side + 1):
        panels[1].axvline((x2 - x1) * line / side - 0.5, color="white", linewidth=0.8)
        panels[1].axhline((y2 - y1) * line / side - 0.5, color="white", linewidth=0.8)
    takeaway(panels[1], f"… in {side}×{side} bins")

    limit = float(kernel.abs().quantile(0.99)) or 1.0
    show_map(panels[2], kernel, limits=(-limit, limit), aspect="auto")
    panels[2].set_axis_on()
    panels[2].set(xticks=[], yticks=[])
    panels[2].set_xlabel(f"kernel 1: {kernel.shape[1]} outputs", fontsize=8)
    panels[2].set_ylabel(f"{kernel.shape[0]} channels of a bin", fontsize=8)
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


def draw_likeness(
    raw: Sequence[Mapping[str, float]], centred: Sequence[Mapping[str, float]]
) -> Figure:
    """Draws mean cosines of the kernels of two proposals over the stages.

    Args:
        raw: for each of S stages: which pairs -> mean cosine. NaN: there were no such pairs.
        centred: the same of kernels less their mean. The names are written here.
    """
    known = [kind for kind in raw[0] if all(math.isfinite(one[kind]) for one in (*raw, *centred))]
    stages = range(1, 1 + len(raw))
    figure, grid = new_figure(1, 2, (4.4, 3.5), width_ratios=(1, 1.75), sharey=True)
    for axes, cosines, margin in zip(grid[0], (raw, centred), (0.02, 0.8), strict=True):
        series = {kind: [one[kind] for one in cosines] for kind in known}
        if len(stages) > 1:
            plot_named_lines(axes, stages, series, margin)
        axes.set(xlabel="stage", xticks=stages)
        axes.spines["bottom"].set_bounds(1, len(stages))
    for name in list(grid[0, 0].texts):  # the names stand beside the other panel
        name.remove()
    grid[0, 0].set_ylabel("mean cosine of two proposals' kernels")
    takeaway(grid[0, 0], "Kernels as they are")

    found = [kind for kind in known if "found something" in kind]
    grew = found and centred[-1][found[0]] < centred[0][found[0]] - 0.1
    takeaway(
        grid[0, 1],
        "Centred: what was found shows from stage 2 on" if grew else "Centred: less their mean",
    )
    return figure


def draw_costs(in_all: Mapping[str, float], shared_in: Mapping[str, float]) -> Figure:
    """Draws APs as grey bars, with a dashed line at the model's own.

    Args:
        in_all: what all stages use for kernels -> AP; the first one is the model's own.
        shared_in: the stages in which all proposals share one pair -> AP.
    """
    figure, grid = new_figure(1, 2, (4.8, 3.0))
    own = next(iter(in_all.values()))
    for axes, aps in zip(grid[0], (in_all, shared_in), strict=True):
        axes.barh(range(len(aps)), list(aps.values()), color=GREYS[5])
        for row, ap in enumerate(aps.values()):
            axes.text(104, row, f"{ap:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(aps)), list(aps), fontsize=8.5)
        axes.invert_yaxis()
        axes.axvline(own, color="black", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 118), xticks=range(0, 101, 20), xlabel="AP (dashed: own kernels)")
        axes.spines[["top", "right"]].set_visible(False)

    worst = min(in_all, key=in_all.get)
    single = {name: ap for name, ap in shared_in.items() if name.endswith("only")}
    worst_stage = min(single, key=single.get).removesuffix(" only")
    is_trained = own >= 1  # otherwise there is nothing to lose
    hints = (f"worst is “{worst}”", f"it costs most in {worst_stage}") if is_trained else ("", "")
    takeaway(grid[0, 0], f"Kernels replaced in all stages:\n{hints[0]}")
    takeaway(grid[0, 1], f"One pair for all in some stages:\n{hints[1]}")
    return figure

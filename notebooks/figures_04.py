"""The figures of notebook 4, set prediction. Each takes tensors and returns a figure.

Colour is the class and nothing else; an object is known by its number, a proposal by its number.

Shapes: N proposals, M objects, S stages, n boxes or scores. Boxes are xyxy in pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor
from torchvision.ops import box_iou

from visualize import (
    DASHES,
    GREYS,
    colour,
    draw_boxes,
    drawable,
    new_figure,
    pad_canvas,
    plot_heatmap,
    plot_named_lines,
    show_image,
    takeaway,
)

UP, DOWN = "#000000", "#A8A8A8"  # bars of proposals that are pushed up, and down
MAX_NUMBERED = 24  # columns of a matrix up to which its cells have numbers


def draw_trained_twice(
    image: Tensor,
    found: Mapping[str, dict[str, Tensor]],
    counts: Mapping[str, Sequence[int]],
    objects_px: Tensor,
    aps: Mapping[tuple[str, str], tuple[float, float]],
) -> Figure:
    """What each training finds in one image, and what NMS does to its AP.

    Boxes that nearly coincide are drawn one around the other.

    Args:
        image: (3, H, W).
        found: name of a training -> its detections: `boxes` (n, 4), `labels` (n,), `scores` (n,).
        counts: name -> M numbers, the boxes on each object.
        objects_px: (M, 4).
        aps: (start, name) -> AP without and with NMS, in points of 100.
    """
    ratios = [1] * len(found) + [1.55]
    figure, grid = new_figure(1, len(found) + 1, (3.3, 3.0), width_ratios=ratios)
    for axes, (name, boxes) in zip(grid[0], found.items(), strict=False):
        show_image(axes, image)
        pad_canvas(axes, image, 0.08)
        colours = [colour(label) for label in boxes["labels"].tolist()]
        draw_boxes(axes, _nested(boxes["boxes"]), colours, linewidth=1.0)
        for box, count in zip(objects_px, counts[name], strict=True):
            _write(axes, box, f"{count}×")
        takeaway(axes, f"{name}: {sum(counts[name])} boxes\non {len(objects_px)} objects")

    axes = grid[0, -1]
    axes.set_ylim(0, max(1.0, 1.1 * max(max(pair) for pair in aps.values())))
    lines = {f"{name}, {start}": list(pair) for (start, name), pair in aps.items()}
    plot_named_lines(axes, [0, 1], lines, margin=1.1)
    axes.set_xticks([0, 1], ["without NMS", "with NMS"], fontsize=8)
    axes.set_ylabel("AP (points of 100)", fontsize=8)
    gains: dict[str, list[str]] = {}
    for (start, _), (before, after) in aps.items():  # of the values that are printed
        gains.setdefault(start, []).append(f"{round(after, 1) - round(before, 1):+.1f}")
    texts = [f"{' / '.join(values)} ({start})" for start, values in gains.items()]
    takeaway(axes, minus(f"NMS adds to AP ({' / '.join(found)}):\n{', '.join(texts)}"))
    return figure


def draw_class_cost(scores: Tensor, as_object: Tensor, as_nothing: Tensor) -> Figure:
    """The class term of the cost for every score: one focal loss minus the other.

    Args:
        scores: (n,) rising, of the object's class.
        as_object, as_nothing: (n,), the focal loss if the proposal gets the object, and if not.
    """
    figure, [[axes]] = new_figure(1, 1, (5.6, 2.9))
    cost = as_object - as_nothing
    lines = {"gets the object": as_object, "gets nothing": as_nothing, "cost: difference": cost}
    for (name, values), style, width in zip(
        lines.items(), ("--", ":", "-"), (1.2, 1.6, 2.2), strict=True
    ):
        axes.plot(scores, values, color="black", linestyle=style, linewidth=width)
        axes.annotate(
            name,
            (scores[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("score p of the object's class", fontsize=8)
    axes.set_ylabel("focal loss, cost", fontsize=8)
    zero = float(scores[cost < 0].min()) if (cost < 0).any() else 1.0
    takeaway(axes, f"Above a score of {zero:.2f} the class cost is negative")
    return figure


def draw_costs(
    image: Tensor,
    objects_px: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    costs: Mapping[str, Tensor],
    assigned: Mapping[int, int],
    height: float = 1.5,
    show_cheapest: bool = False,
) -> Figure:
    """An image with its objects, and cost matrices with the assignment framed.

    The columns are sorted: first the assigned proposals, in the order of their objects.

    Args:
        image: (3, H, W).
        objects_px, labels: (M, 4), (M,).
        class_names: K names.
        costs: title -> (M, N).
        assigned: object -> its proposal.
        height: of a matrix, in inches.
        show_cheapest: also frames, dashed, the cheapest proposal of an object that gets another.
    """
    height = max(height, 0.6 + 0.13 * len(labels))  # room for the names of the rows
    total_height = max(2.4, height * len(costs))
    figure = Figure(figsize=(9.6, total_height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.1))
    _show_objects(left.subplots(), image, objects_px, labels)

    numbers = range(next(iter(costs.values())).shape[1])
    order = [*assigned.values(), *(n for n in numbers if n not in set(assigned.values()))]
    rows = [f"{m} {class_names[label]}" for m, label in enumerate(labels.tolist())]
    grid = right.subplots(len(costs), 1, squeeze=False)[:, 0]
    for axes, (title, cost) in zip(grid, costs.items(), strict=True):
        _show_matrix(axes, cost[:, order], rows, order)
        _frame(axes, assigned, order, "-", 0.06)
        if show_cheapest:
            cheapest = dict(enumerate(cost.argmin(dim=1).tolist()))
            missed = {m: n for m, n in cheapest.items() if assigned.get(m) != n}
            _frame(axes, missed, order, (0, (1.5, 1)), 0.0)
        takeaway(axes, title)
    grid[-1].set_xlabel("proposal: those that are assigned first, then the others", fontsize=8)
    return figure


def draw_greedy_example(
    objects_px: Tensor, boxes_px: Tensor, cost: Tensor, choices: Mapping[str, Mapping[int, int]]
) -> Figure:
    """Objects (grey) and proposals; a proposal has the line style of the object that it is given.

    Args:
        objects_px: (M, 4).
        boxes_px: (N, 4).
        cost: (M, N).
        choices: name of a method -> object -> its proposal.
    """
    figure, grid = new_figure(1, len(choices) + 1, (3.1, 2.6))
    middle = float(boxes_px[:, ::2].mean())
    for axes, (name, choice) in zip(grid[0], choices.items(), strict=False):
        for m, n in choice.items():
            box = objects_px[m]
            style = DASHES[m % len(DASHES)]
            _outline(axes, box, style, facecolor="#DDDDDD", edgecolor="#666666")
            _outline(axes, boxes_px[n], style, fill=False, linewidth=2)
            axes.text(
                float(box[2]) - 2, float(box[1]) + 2, str(m), ha="right", va="top", fontsize=9
            )
        for n, (x1, _, x2, y2) in enumerate(boxes_px.tolist()):
            is_left = x1 + x2 < 2 * middle
            x, side = (x1, "left") if is_left else (x2, "right")
            y = y2 + (1.5 if is_left else 6.5)
            axes.text(x, y, f"proposal {n}", ha=side, va="top", fontsize=8)
        pairs = [
            f"object {m} gets proposal {n}: {float(cost[m, n]):+.2f}" for m, n in choice.items()
        ]
        axes.text(
            0.02, 0, minus("\n".join(pairs)), transform=axes.transAxes, va="bottom", fontsize=8
        )
        axes.set_xlim(4, 84)
        axes.set_ylim(92, 18)
        axes.set_aspect("equal")
        axes.set_axis_off()
        takeaway(axes, minus(f"{name}: total cost {total(cost, choice):+.2f}"))
    axes = grid[0, -1]
    _show_matrix(axes, cost, [f"object {m}" for m in range(len(cost))], range(cost.shape[1]))
    for choice, style, inset in zip(choices.values(), ("--", "-"), (0.2, 0.04), strict=True):
        _frame(axes, choice, range(cost.shape[1]), style, inset)
    axes.set_xlabel("proposal", fontsize=8)
    takeaway(
        axes, "Cost: " + ", ".join(map(" ".join, zip(choices, ("dashed", "solid"), strict=True)))
    )
    return figure


def draw_two_choices(
    cost: Tensor, rows: Sequence[str], choices: Mapping[str, Mapping[int, int]], what: str
) -> Figure:
    """A cost matrix with the assignments of two methods, the first dashed and the second solid.

    Args:
        cost: (M, N).
        rows: M names.
        choices: name of a method -> object -> its proposal.
        what: which matrix it is, for the title.
    """
    figure, [[axes]] = new_figure(1, 1, (9.6, max(1.9, 0.36 * len(cost) + 0.9)))
    second = list(list(choices.values())[-1].values())
    order = [*second, *(n for n in range(cost.shape[1]) if n not in set(second))]
    _show_matrix(axes, cost[:, order], rows, order)
    for choice, style, inset in zip(choices.values(), ("--", "-"), (0.18, 0.04), strict=True):
        _frame(axes, choice, order, style, inset)
    totals = [
        f"{name} ({line}) {total(cost, choice):.2f}"
        for (name, choice), line in zip(choices.items(), ("dashed", "solid"), strict=True)
    ]
    axes.set_xlabel("proposal", fontsize=8)
    takeaway(axes, minus(f"{what}: total cost " + ", ".join(totals)))
    return figure


def draw_pushes(
    pushes: Mapping[str, Tensor],
    matched: Mapping[str, Sequence[int]],
    scores: Tensor,
    nearest: Tensor,
    objects: Sequence[str],
) -> Figure:
    """How the class loss pushes the score of each proposal: upwards or downwards.

    The proposals are grouped by the object that they overlap most, the highest score first.

    Args:
        pushes: name of a matching -> (N,), minus the gradient of the class loss.
        matched: name -> the proposals that have an object.
        scores: (N,), of the class of that object.
        nearest: (N,) int64, the object that a proposal overlaps most.
        objects: M names.
    """
    figure, grid = new_figure(len(pushes), 1, (9.6, 1.75), sharex=True, sharey=True)
    order = sorted(range(len(scores)), key=lambda n: (int(nearest[n]), -float(scores[n])))
    places = [
        [place for place, n in enumerate(order) if nearest[n] == m] for m in range(len(objects))
    ]
    for axes, (name, push) in zip(grid[:, 0], pushes.items(), strict=True):
        is_matched = [n in set(matched[name]) for n in order]
        _show_pushes(axes, [float(push[n]) for n in order], is_matched, name)
        for group in places:
            if group and group[0] > 0:
                axes.axvline(group[0] - 0.5, color="#999999", linewidth=0.8, linestyle=":")
    values = torch.stack(list(pushes.values()))
    high = max(float(values.max()), 1e-6)  # room for the names above, for the triangles below
    grid[0, 0].set_ylim(min(1.1 * float(values.min()), -0.25 * high), 1.35 * high)
    _name_groups(grid[0, 0], places, objects)

    bottom = grid[-1, 0]
    texts = [f"{n}\n{float(scores[n]):.2f}" for n in order]
    bottom.set_xticks(range(len(order)), texts, fontsize=7 if len(order) <= MAX_NUMBERED else 4.5)
    bottom.set_xlabel(
        "proposal and its score, grouped by the object that its box overlaps most", fontsize=8
    )
    return figure


def draw_balance(scores: Tensor, up: Tensor, down: Tensor) -> Figure:
    """How hard the focal loss pushes at each score, and where the two pushes balance.

    Args:
        scores: (n,) rising.
        up: (n,), the push on the logit of a matched proposal.
        down: (n,), the push on that of an unmatched one, as a positive number.
    """
    figure, [[left, right]] = new_figure(1, 2, (4.7, 2.9))
    left.plot(scores, up, color="black")
    left.plot(scores, down, color="black", linestyle="--")
    for text, values, at, side in (
        ("matched: up", up, 0.12, "left"),
        ("unmatched: down", down, 0.66, "right"),
    ):
        i = int((scores - at).abs().argmin())
        left.annotate(
            text,
            (float(scores[i]), float(values[i])),
            xytext=(6 if side == "left" else -8, 4),
            textcoords="offset points",
            ha=side,
            fontsize=8,
        )
    left.set_xlabel("score of the proposal", fontsize=8)
    left.set_ylabel("size of the push on its logit", fontsize=8)
    takeaway(left, "A confident duplicate is pushed down hard")

    share = down / (up + down)  # (n,), where share · up = (1 − share) · down
    right.plot(1 - share, scores, color="black")
    right.set_xscale("log")
    right.invert_xaxis()
    right.minorticks_off()
    right.set_xticks([0.5, 0.1, 0.01, 0.001, 0.0001], ["50", "90", "99", "99.9", "99.99"])
    right.set_xlabel("share of the cases in which a proposal is matched (%)", fontsize=8)
    right.set_ylabel("score at which the pushes balance", fontsize=8)
    at = int((scores - 0.9).abs().argmin())
    needed = 100 * float(share[at])
    takeaway(
        right, f"For a score of {float(scores[at]):.2f}: matched in {needed:.1f} % of the cases"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_rivals(
    image: Tensor,
    object_px: Tensor,
    label: int,
    boxes_px: Tensor,
    names: Sequence[str],
    scores: Tensor,
    ious: Tensor,
    stage: int,
) -> Figure:
    """The proposals that fit one object, and their scores and overlaps from stage to stage.

    Boxes that nearly coincide are drawn one around the other.

    Args:
        image: (3, H, W).
        object_px: (4,).
        label: its class.
        boxes_px: (n, 4), of these proposals after `stage`.
        names: n, what to call them.
        scores: (S, n), of the object's class.
        ious: (S, n), with the object.
        stage: which one the image shows, from 1.
    """
    figure, [[left, middle, right]] = new_figure(1, 3, (3.2, 2.8))
    show_image(left, image)
    for box, style in zip(_nested(boxes_px), DASHES, strict=False):
        draw_boxes(left, box[None], [colour(label)], None, 1.8, style)
    x1, y1, x2, y2 = object_px.tolist()
    margin = 0.6 * max(x2 - x1, y2 - y1)
    left.set_xlim(x1 - margin, x2 + margin)
    left.set_ylim(y2 + margin, y1 - margin)
    takeaway(left, f"Stage {stage}: {len(names)} boxes, one object")

    stages = list(range(1, len(scores) + 1))
    for axes, values, what in ((middle, ious, "IoU with the object"), (right, scores, "score")):
        lines = {name: values[:, i].tolist() for i, name in enumerate(names)}
        axes.set_ylim(-0.03, 1.08)  # before the names are placed
        plot_named_lines(axes, stages, lines, margin=0.85)
        axes.set_xticks(stages)
        axes.set_xlabel("after stage", fontsize=8)
        axes.set_ylabel(what, fontsize=8)
    ends = [", ".join(f"{value:.2f}" for value in values[-1].tolist()) for values in (ious, scores)]
    takeaway(middle, f"IoU at the end: {ends[0]}")
    takeaway(right, f"Scores at the end: {ends[1]}")
    return figure


def draw_stages(
    changes: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]
) -> Figure:
    """How the assignment settles, and what each stage adds to the loss.

    Args:
        changes: name -> S − 1 shares in percent: objects with another proposal than one stage ago.
        losses: name of a term -> S values, weighted by λ.
    """
    figure, [[left, right]] = new_figure(1, 2, (4.7, 2.9))
    left.set_ylim(-3, 100)
    lengths = {len(values) for values in changes.values()}
    count = max(lengths)
    if len(lengths) == 1 and count:
        plot_named_lines(left, list(range(2, count + 2)), changes, margin=0.6)
    else:  # models with different numbers of stages: the lines end at different places
        for (name, values), grey, dash in zip(changes.items(), GREYS, DASHES, strict=False):
            stages = list(range(2, len(values) + 2))
            left.plot(stages, values, color=grey, linestyle=dash, marker="o", markersize=4)
            if stages:
                left.text(stages[-1], values[-1] + 3, drawable(name), color=grey, fontsize=8)
        left.margins(x=0.2)
    left.set_xticks(range(2, count + 2))
    left.set_xlabel("stage", fontsize=8)
    left.set_ylabel("objects with another proposal (%)", fontsize=8)
    trained = list(changes.values())[0]
    falls = len(trained) > 1 and trained[-1] < trained[0]
    takeaway(left, "The assignment settles" if falls else "The assignment, stage by stage")

    stages = list(range(1, len(next(iter(losses.values()))) + 1))
    plot_named_lines(right, stages, losses, margin=0.35)
    right.set_xticks(stages)
    right.set_ylim(0, None)
    right.set_xlabel("stage", fontsize=8)
    right.set_ylabel("loss per object, weighted by λ", fontsize=8)
    totals = [sum(values) for values in zip(*losses.values(), strict=True)]
    most = max(range(len(totals)), key=totals.__getitem__)
    share = 100 * totals[most] / max(sum(totals), 1e-9)
    takeaway(right, f"Stage {most + 1} has {share:.0f} % of the loss")
    return figure


# --- parts of figures ---


def _outline(axes: Axes, box: Tensor, style: Any, **kwargs: Any) -> None:
    """A box; `kwargs` are those of `Rectangle`."""
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, linestyle=style, **kwargs))


def _show_objects(axes: Axes, image: Tensor, objects_px: Tensor, labels: Tensor) -> None:
    """An image with its objects in the colours of their classes, numbered."""
    show_image(axes, image)
    colours = [colour(label) for label in labels.tolist()]
    draw_boxes(axes, objects_px, colours, linewidth=1.4)
    for m, box in enumerate(objects_px):
        _write(axes, box, str(m))
    takeaway(axes, f"{len(objects_px)} objects")


def _show_matrix(axes: Axes, cost: Tensor, rows: Sequence[str], columns: Sequence[Any]) -> None:
    """A cost matrix. Its colours stop at the 90th percentile: a few large costs hide the others."""
    high = float(cost.flatten().quantile(0.9))
    low = min(float(cost.min()), high - 1e-6)
    is_wide = cost.shape[1] > MAX_NUMBERED
    form = None if is_wide else "{:.1f}" if cost.shape[1] > 3 else "{:.2f}"
    plot_heatmap(axes, cost, rows, list(columns), form, (low, high))
    for text in axes.texts:
        text.set_text(minus(text.get_text()))
    axes.tick_params(axis="x", labelsize=5 if is_wide else 7, length=0)
    axes.tick_params(axis="y", labelsize=7, length=0)


def _frame(
    axes: Axes, choice: Mapping[int, int], columns: Sequence[int], style: Any, inset: float
) -> None:
    """Outlines the cell of each object's (row's) proposal; `columns` are the proposals shown."""
    side, width = 1 - 2 * inset, 1.8 if len(columns) <= MAX_NUMBERED else 1.2
    for row, proposal in choice.items():
        corner = (columns.index(proposal) - 0.5 + inset, row - 0.5 + inset)
        frame = Rectangle(
            corner, side, side, fill=False, edgecolor="white", linewidth=width, linestyle=style
        )
        frame.set_path_effects([withStroke(linewidth=width + 1.4, foreground="black")])
        axes.add_patch(frame)


def _show_pushes(
    axes: Axes, values: Sequence[float], is_matched: Sequence[bool], name: str
) -> None:
    """One bar per proposal, and a triangle below those that are matched."""
    axes.bar(range(len(values)), values, color=[UP if v > 0 else DOWN for v in values])
    axes.axhline(0, color="black", linewidth=0.8)
    for place in (place for place, one in enumerate(is_matched) if one):
        axes.annotate(
            "△",
            (place, 0),
            xytext=(0, -3),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)
    axes.set_ylabel("push on the logit", fontsize=8)
    up, down = sum(v > 0 for v in values), sum(v <= 0 for v in values)
    takeaway(axes, f"{name}: {up} proposals are pushed up (△ matched), {down} down")


def _name_groups(axes: Axes, places: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Writes the name of each object above its bars; only its number if there are many."""
    for m, (group, name) in enumerate(zip(places, names, strict=True)):
        if group:
            axes.text(
                (group[0] + group[-1]) / 2,
                0.97,
                drawable(name if len(names) <= 8 else m),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
                parse_math=False,
            )


def _nested(boxes_px: Tensor) -> Tensor:
    """Boxes (n, 4); one that overlaps earlier ones by half is some px larger for each of them."""
    earlier = (box_iou(boxes_px, boxes_px) >= 0.5).tril(-1).sum(dim=1)  # (n,)
    step = 2.0 if len(earlier) == 0 else min(2.0, 8.0 / max(int(earlier.max()), 1))
    return boxes_px + step * earlier[:, None] * boxes_px.new_tensor([-1, -1, 1, 1])


def _write(axes: Axes, box: Tensor, text: str) -> None:
    """A text in the middle of a box."""
    x, y = _centre(box)
    rim = [withStroke(linewidth=2.5, foreground="black")]
    axes.text(x, y, text, color="white", ha="center", va="center", fontsize=9, path_effects=rim)


def _centre(box: Tensor) -> tuple[float, float]:
    x1, y1, x2, y2 = box.tolist()
    return (x1 + x2) / 2, (y1 + y2) / 2


def total(cost: Tensor, choice: Mapping[int, int]) -> float:
    """The cost (M, N) of an assignment, object -> its proposal."""
    return sum(float(cost[m, n]) for m, n in choice.items())


def nothing_to_show(text: str) -> Figure:
    """A figure that says why it is empty."""
    figure = Figure(figsize=(6, 0.7))
    figure.text(0.5, 0.5, drawable(text), ha="center", va="center", fontsize=10)
    return figure


def as_plain(boxes: Tensor) -> Tensor:
    """Boxes without the bookkeeping of torchvision's tv_tensors."""
    return boxes.as_subclass(torch.Tensor)


def minus(text: str) -> str:
    """With the minus sign of print."""
    return text.replace("-", "−")

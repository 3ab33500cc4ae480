"""The figures of notebook 2: what the learned proposals become, stage by stage.

Each function takes data, not a model, and returns a figure with its takeaway as title. A takeaway
that another image or checkpoint could make false is made from the data.

Colour is the class and nothing else. Numbers and line styles tell proposals apart.

Shapes: S stages, B images, N proposals, K classes, M objects, h attention heads. Boxes are xyxy in
pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from support.animation import Panel
from visualize import (
    DASHES,
    colour,
    draw_boxes,
    new_figure,
    pad_canvas,
    plot_heatmap,
    plot_named_lines,
    show_image,
    takeaway,
)

NO_OBJECT = "#FFFFFF"  # of proposals that end with no object
MARGIN = 0.16  # of the canvas around an image


# --- sections 1 and 3: the refinement ---


def draw_refinement(panels: Sequence[Panel], threshold: float) -> Figure:
    """Learned proposals, then the boxes after stage 1, a middle stage and the last one.

    Args:
        panels: one per row, as `visualize.refinement_panel` gives them.
        threshold: proposals whose last score is lower end with no object, and are faded.
    """
    width = max(panel.image.shape[2] / panel.image.shape[1] for panel in panels)
    figure, grid = new_figure(len(panels), 4, (1.8 * width, 2.1))
    is_empty = False
    for row, panel in zip(grid, panels, strict=True):
        num_stages = len(panel.scores)
        count = int((panel.scores[-1] >= threshold).sum())
        is_empty = is_empty or count == 0
        for axes in row:
            axes.set_axis_off()
        for axes, stage in zip(row, _shown_stages(num_stages), strict=False):
            _draw_winners(axes, panel, stage, threshold)
            num_proposals = len(panel.colours)
            text = f"After stage {stage}" if stage else f"{num_proposals} learned proposals"
            if stage == num_stages:
                text = f"Stage {stage}: {count} score ≥ {threshold:.2f}"
            takeaway(axes, text)
    text = "Every image starts from the same large boxes; each stage moves them onto objects"
    if is_empty:
        text = f"Where no proposal ends with a score ≥ {threshold:.2f}, nothing is found"
    figure.suptitle(text, fontsize=11, fontweight="bold")
    return figure


def play(panel: Panel, threshold: float) -> Any:
    """Sliders over stage and threshold in a live notebook; elsewhere a figure that needs none.

    Every request to run a cell says whether somebody is there to answer `input()` ("allow_stdin" in
    Jupyter's messaging protocol). If not, as when nbconvert runs the notebook, and without
    ipywidgets, the result is `draw_sheet`.
    """
    try:
        from IPython import get_ipython
        from IPython.display import display
        from ipywidgets import FloatSlider, IntSlider, interactive

        request = get_ipython().get_parent()
    except (ImportError, AttributeError):  # no ipywidgets; no kernel
        return draw_sheet(panel, (0.05, threshold))
    if not request.get("content", {}).get("allow_stdin"):
        return draw_sheet(panel, (0.05, threshold))

    num_stages = len(panel.scores)
    # Redrawn when a slider is let go, not while it moves.
    return interactive(
        lambda stage, score: display(draw_stage(panel, stage, score)),
        stage=IntSlider(0, 0, num_stages, description="stage", continuous_update=False),
        score=FloatSlider(
            threshold, min=0, max=1, step=0.05, description="score ≥", continuous_update=False
        ),
    )


def draw_stage(panel: Panel, stage: int, threshold: float) -> Figure:
    """One image after one stage, which is what the sliders choose.

    Args:
        panel: as `visualize.refinement_panel` gives it.
        stage: 0 for the learned boxes, or 1 … S.
        threshold: proposals that score less at this stage are faded.
    """
    _, height, width = panel.image.shape
    figure, [[axes]] = new_figure(1, 1, (4.6 * width / height, 4.8))
    count = _draw_by_score(axes, panel, stage, threshold, with_texts=True)
    if stage:
        text = f"Stage {stage}: {count} of {len(panel.colours)} proposals score ≥ {threshold:.2f}"
    else:
        text = f"{len(panel.colours)} learned proposals, which have no scores yet"
    takeaway(axes, text)
    return figure


def draw_sheet(panel: Panel, thresholds: Sequence[float]) -> Figure:
    """Some of what the sliders show: stages 1 and S, a row for each threshold.

    The first box of a class names it.
    """
    stages = sorted({1, len(panel.scores)})
    _, height, width = panel.image.shape
    figure, grid = new_figure(len(thresholds), len(stages), (1.75 * width / height, 2.0))
    for row, threshold in zip(grid, thresholds, strict=True):
        for axes, stage in zip(row, stages, strict=True):
            count = _draw_by_score(axes, panel, stage, threshold, with_texts=False)
            takeaway(axes, f"Stage {stage}: {count} score ≥ {threshold:.2f}")
    return figure


def _shown_stages(num_stages: int) -> list[int]:
    """0 for the learned boxes, stage 1, one in the middle, the last; each once."""
    return sorted({0, 1, (num_stages + 1) // 2, num_stages})


def _draw_winners(axes: Axes, panel: Panel, stage: int, threshold: float) -> None:
    """One stage: proposals that end with an object, with its number and line style."""
    show_image(axes, panel.image)
    pad_canvas(axes, panel.image, 0.05 if stage else 0.17)
    boxes_px, last_scores = panel.boxes_px[stage], panel.scores[-1]
    is_winner = last_scores >= threshold
    _draw_faint(axes, boxes_px[~is_winner], last_scores[~is_winner] / threshold)

    winners = torch.nonzero(is_winner)[:, 0].tolist()
    is_crowded = len(winners) > 6  # then the first of a class names it for all
    named: set[str] = set()
    for number, n in enumerate(winners):
        text, name = f"{number + 1}", panel.names[n]
        if stage == len(panel.scores) and not (is_crowded and name in named):
            text += f" {name}"
            named.add(name)
        draw_boxes(
            axes,
            boxes_px[n : n + 1],
            [panel.colours[n]],
            None if stage == 0 and is_crowded else [text],  # learned boxes share a corner
            linewidth=1.5,
            linestyle=DASHES[number % len(DASHES)],
        )


def _draw_by_score(axes: Axes, panel: Panel, stage: int, threshold: float, with_texts: bool) -> int:
    """One stage: proposals that score enough at it; says how many they are."""
    show_image(axes, panel.image)
    pad_canvas(axes, panel.image, 0.05 if stage else 0.17)
    boxes_px = panel.boxes_px[stage]
    scores = panel.scores[stage - 1] if stage else torch.zeros_like(panel.scores[0])
    is_found = (scores >= threshold) & (stage > 0)
    _draw_faint(axes, boxes_px[~is_found], scores[~is_found] / max(threshold, 1e-6))

    found = torch.nonzero(is_found)[:, 0].tolist()
    linewidth = 1.6 if len(found) <= 20 else 0.9
    draw_boxes(axes, boxes_px[found], [panel.colours[n] for n in found], None, linewidth)
    first = {panel.names[n]: n for n in reversed(found)}.values()
    for n in found if with_texts else first:
        text = f"{panel.names[n]} {scores[n]:.2f}" if with_texts else panel.names[n]
        draw_boxes(axes, boxes_px[n : n + 1], [panel.colours[n]], [text], linewidth)
    return len(found)


def _draw_faint(axes: Axes, boxes_px: Tensor, shares: Tensor) -> None:
    """Thin white boxes with a grey rim: visible on dark images, bright ones, and the canvas.

    Args:
        boxes_px: (n, 4).
        shares: (n,), 0 for the faintest, 1 for the strongest.
    """
    strengths = (0.25 + 0.6 * shares).clamp(0, 0.85).tolist()
    for width, shade in ((1.4, "#555555"), (0.6, "#FFFFFF")):
        for (x1, y1, x2, y2), alpha in zip(boxes_px.tolist(), strengths, strict=True):
            box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False)
            box.set(edgecolor=shade, linewidth=width, alpha=alpha)
            axes.add_patch(box)


# --- section 4: stage by stage ---


def draw_progress(ious: Tensor, scores: Tensor, aps: Sequence[float]) -> Figure:
    """How well boxes fit, how high they score, and AP, over the stages.

    Args:
        ious: (S + 1, M), of each object and the proposal that ends on it, before and after stages.
        scores: (S, M), of these proposals for the objects' classes.
        aps: S, in points of 100.
    """
    num_stages = len(aps)
    second = min(2, num_stages)
    figure, [[left, middle, right]] = new_figure(1, 3, (3.25, 2.8))
    stages = range(1, num_stages + 1)
    _draw_band(left, [0, *stages], ious)
    _draw_band(middle, stages, scores)
    right.plot(stages, aps, color="black", marker="o", markersize=4)
    for stage, ap in zip(stages, aps, strict=True):
        place, side = ((3, -6), "top") if ap > 10 else ((8, 2), "bottom")
        right.annotate(
            f"{ap:.1f}", (stage, ap), place, textcoords="offset points", va=side, fontsize=8
        )
    right.set_xlim(right=num_stages + 0.6)

    iou, score = ious.mean(1), scores.mean(1)
    titles = [
        f"IoU: first {iou[0]:.2f}, last {iou[-1]:.2f}",
        f"Scores: first {score[0]:.2f}, last {score[-1]:.2f}",
        f"AP: first {aps[0]:.1f}, last {aps[-1]:.1f}",
    ]
    if num_stages > second:
        if (iou[-1] - iou[second]).abs() < 0.1 * (iou[-1] - iou[0]).abs():
            titles[0] = f"After stage {second} the boxes move little:\n"
            titles[0] += f"IoU {iou[second]:.2f} to {iou[-1]:.2f}"
        if score[-1] > score[second - 1] + 0.02:
            titles[1] = f"Scores rise: {score[second - 1]:.2f} to {score[-1]:.2f}"
        titles[2] = f"AP: {aps[second - 1]:.1f} after stage {second},\n{aps[-1]:.1f} at the end"
    for axes, title in zip((left, middle, right), titles, strict=True):
        takeaway(axes, title)

    left.set(ylabel="IoU with its object", ylim=(0, 1.02), xticks=[0, *stages])
    left.set_xticklabels(["learned", *map(str, stages)])
    middle.set(ylabel="score for the object's class", ylim=(0, 1.02), xticks=stages)
    right.set(ylabel="AP (points of 100)", ylim=(0, 102), xticks=stages)
    for axes in (left, middle, right):
        axes.set_xlabel("stage")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_band(axes: Axes, x: Sequence[int], values: Tensor) -> None:
    """The mean of values (len(x), M), and in grey the middle 80% of them."""
    low, high = values.quantile(torch.tensor([0.1, 0.9]), dim=1)
    axes.fill_between(x, low, high, color="#CCCCCC", linewidth=0)
    axes.plot(x, values.mean(1), color="black", marker="o", markersize=4)
    axes.annotate(
        "mean, and the middle 80%",
        (0.97, 0.05),
        xycoords="axes fraction",
        ha="right",
        fontsize=8,
        color="#444444",
    )


# --- section 5: detach ---


def draw_reach(norms: Mapping[str, Tensor]) -> Figure:
    """Which stage's loss trains which stage's box layer.

    Args:
        norms: name -> (S, S), norm of the gradient of a row's loss at a column's box layer.
    """
    figure, [row] = new_figure(1, len(norms), (3.9, 2.9))
    high = max(float(matrix.max()) for matrix in norms.values())
    for axes, (name, matrix) in zip(row, norms.items(), strict=True):
        stages = [str(stage + 1) for stage in range(len(matrix))]
        plot_heatmap(axes, matrix, stages, stages, "{:.2f}", (0, high))
        away = float(matrix.tril(-1).square().sum() / matrix.square().sum().clamp(min=1e-12))
        share = "none" if away == 0 else f"{away:.0%}"
        takeaway(axes, f"{name}: {share} of the squared\nnorms come from later losses")
        axes.set(xlabel="box layer of stage (number: gradient norm)", ylabel="loss of stage")
    return figure


# --- section 6: learned proposals ---


@dataclass(frozen=True)
class Territories:
    """Which proposal is matched to which object at one moment of training."""

    name: str
    centres_px: Tensor  # (M, 2), of the objects
    labels: Tensor  # (M,)
    proposals: Tensor  # (M,), the one that is matched to each object
    spread_px: float  # mean distance of an object to the common centre of its proposal's objects
    shuffled_px: float  # the same with proposals dealt out at random
    over_images_px: float  # how far a proposal's stage-1 box is from its mean over the images
    over_proposals_px: float  # how far these means are from each other's mean


def draw_territories(
    shown: Sequence[Territories], steps: Sequence[int], moments: Sequence[Territories]
) -> Figure:
    """Where each proposal's objects lie, at a few moments, and their spread over all moments.

    Args:
        shown: one map each.
        steps: of training, one per moment.
        moments: for the lines.
    """
    figure, [row] = new_figure(1, len(shown) + 1, (2.45, 2.6))
    for axes, moment in zip(row, shown, strict=False):
        for n in moment.proposals.unique().tolist():
            mine = moment.centres_px[moment.proposals == n]
            x, y = mine.mean(0).tolist()
            for to_x, to_y in mine.tolist():
                axes.plot([x, to_x], [y, to_y], color="#999999", linewidth=0.6, zorder=1)
        x, y = moment.centres_px.unbind(1)
        colours = [colour(label) for label in moment.labels.tolist()]
        axes.scatter(x, y, s=9, c=colours, edgecolors="black", linewidths=0.3, zorder=2)
        for n in moment.proposals.unique().tolist():
            is_mine = moment.proposals == n
            if int(is_mine.sum()) > 3:
                x, y = moment.centres_px[is_mine].mean(0).tolist()
                _write_number(axes, x, y, n)
        takeaway(axes, f"{moment.name}: spread {moment.spread_px:.0f} px")
        axes.set(xlim=(0, 96), ylim=(96, 0), xticks=(0, 48, 96), yticks=(0, 48, 96), aspect="equal")
        axes.set_xlabel("x of the object's centre (px)", fontsize=8)
    row[0].set_ylabel("y (px)", fontsize=8)

    axes = row[-1]
    series = {
        "shuffled": [moment.shuffled_px for moment in moments],
        "matched": [moment.spread_px for moment in moments],
    }
    plot_named_lines(axes, steps, series, margin=0.45)
    axes.set_ylim(bottom=0)
    axes.set_xticks([steps[0], steps[-1]])
    axes.set_xlabel("training step", fontsize=8)
    axes.set_ylabel("spread (px)", fontsize=8)
    is_real = moments[-1].spread_px < 0.7 * moments[-1].shuffled_px
    takeaway(axes, "Territories form" if is_real else "No territories yet")
    return figure


def _write_number(axes: Axes, x: float, y: float, number: int) -> None:
    text = axes.text(x, y, f"{number}", ha="center", va="center", fontsize=7.5, fontweight="bold")
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])


# --- sections 7 and 8: lines over the stages ---


def draw_lines(
    series: Mapping[str, Sequence[float]], title: str, ylabel: str, width: float = 5.4
) -> Figure:
    """One named line each over the stages.

    Args:
        series: name -> S values.
        title: the takeaway.
        ylabel: with its unit.
        width: of the figure in inches.
    """
    figure, [[axes]] = new_figure(1, 1, (width, 2.7))
    stages = range(1, len(next(iter(series.values()))) + 1)
    _draw_lines(axes, stages, series, title, ylabel)
    return figure


def _draw_lines(
    axes: Axes,
    stages: Sequence[int],
    series: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str,
) -> None:
    axes.set_xticks(stages)
    high = max(max(values) for values in series.values()) or 1
    axes.set_ylim(-0.04 * high, 1.08 * high)
    longest = max(len(name) for name in series)
    plot_named_lines(axes, list(stages), series, margin=0.1 + 0.02 * longest)
    axes.set(xlabel="stage", ylabel=ylabel)
    takeaway(axes, title)


# --- section 9: self-attention ---


def draw_nothing(text: str) -> Figure:
    """A figure that says that there is nothing to draw."""
    figure, [[axes]] = new_figure(1, 1, (5.4, 0.5))
    axes.set_axis_off()
    takeaway(axes, text)
    return figure


def draw_rivals(
    image: Tensor,
    pair: tuple[int, int],
    boxes_px: Tensor,
    scores: Tensor,
    attention: Tensor,
    label: int,
    num_proposals: int,
) -> Figure:
    """Two proposals on one object, stage by stage.

    Args:
        image: (3, H, W).
        pair: numbers of the winner and of its rival.
        boxes_px: (S, 2, 4), theirs.
        scores: (S, 2), for the object's class.
        attention: (S,), how much of its attention the rival gives to the winner.
        label: of the object.
        num_proposals: N; 1/N is what uniform attention would give.
    """
    num_stages = len(scores)
    winner, rival = pair
    figure, [row] = new_figure(1, num_stages, (1.65, 2.2))
    # As much of the image as shows both boxes at every stage, the rival's a little outside its place:
    # at the end the two nearly coincide.
    corner, opposite = boxes_px[..., :2].amin((0, 1)), boxes_px[..., 2:].amax((0, 1))
    x, y = ((corner + opposite) / 2).tolist()
    half = float((opposite - corner).max()) * 0.6
    outside = torch.tensor([-1.0, -1, 1, 1]) * 0.07 * half
    for stage, axes in enumerate(row):
        show_image(axes, image)
        axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half))
        draw_boxes(axes, boxes_px[stage, :1], [colour(label)], linewidth=2)
        around_px = boxes_px[stage, 1:] + outside
        draw_boxes(axes, around_px, [colour(label)], linewidth=1.4, linestyle="--")
        text = f"stage {stage + 1}\n{winner} scores {scores[stage, 0]:.2f}\n"
        text += f"{rival} scores {scores[stage, 1]:.2f}\n{rival} → {winner}: {attention[stage]:.2f}"
        axes.set_title(text, fontsize=8)
    peak, most = int(scores[:, 1].argmax()), int(attention.argmax())
    ours, its = scores[peak].tolist()
    text = f"Winner {winner} (solid) and its rival {rival} (dashed)"
    if its > ours and scores[-1, 0] > scores[-1, 1]:
        text = (
            f"After stage {peak + 1}, rival {rival} (dashed) is ahead of winner {winner} (solid): "
        )
        text += f"{its:.2f} against {ours:.2f}"
    text += f".\nIn stage {most + 1} the rival gives the winner {attention[most]:.2f} of its "
    text += f"attention; uniform would be {1 / num_proposals:.2f}"
    figure.suptitle(text, fontsize=9.5, fontweight="bold")
    figure.get_layout_engine().set(h_pad=0.1)
    return figure


def draw_attention(entropy: Tensor, links: Mapping[str, Sequence[float]]) -> Figure:
    """How evenly proposals look at one another, and who looks at whom.

    Args:
        entropy: (S, h), mean entropy per stage and head, as a share of the largest possible one.
        links: name -> mean attention weight per stage, of "rival → winner", "bystander → winner"
            and any more.
    """
    figure, [[left, right]] = new_figure(1, 2, (4.4, 2.8))
    stages = range(1, len(entropy) + 1)
    for head in entropy.T:
        left.plot(stages, head, color="#BBBBBB", linewidth=0.8)
    left.plot(stages, entropy.mean(1), color="black", marker="o", markersize=4)
    left.axhline(1, color="black", linestyle=":", linewidth=1)
    left.annotate("uniform", (stages[-1], 1), ha="right", va="bottom", fontsize=8)
    left.annotate(
        "black: mean; grey: each head",
        (0.03, 0.05),
        xycoords="axes fraction",
        fontsize=8,
        color="#444444",
    )
    left.set(ylim=(0, 1.1), xticks=stages, xlabel="stage", ylabel="entropy, share of uniform")
    left.grid(alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    takeaway(left, f"Stage 1 looks at all alike: {entropy[0].mean():.0%} of uniform")
    if entropy[0].mean() < 0.9:
        text = f"Entropy: first {entropy[0].mean():.0%}, last {entropy[-1].mean():.0%}"
        takeaway(left, text)

    to_winner, bystanders = links["rival → winner"], links["bystander → winner"]
    best = max(range(len(to_winner)), key=lambda stage: to_winner[stage])
    title = f"At stage {best + 1} rivals give the winner {to_winner[best]:.2f},\n"
    title += f"bystanders give it {bystanders[best]:.2f}"
    _draw_lines(right, stages, links, title, "mean attention weight")
    return figure


def draw_blindness(
    aps: Mapping[str, float], counts: Mapping[str, Sequence[float]], threshold: float
) -> Figure:
    """What happens if proposals cannot see one another; the first name is the model as trained.

    Args:
        aps: name -> AP after the last stage, in points of 100.
        counts: name -> duplicates per image after each stage; the first names of `aps`.
        threshold: of the score, for a duplicate to count.
    """
    figure, [[left, right]] = new_figure(1, 2, (4.6, 2.9))
    names, values = list(aps), list(aps.values())
    bars = left.barh(range(len(names)), values, color="#8C8C8C", edgecolor="black")
    left.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set(xlim=(0, 115), xlabel="AP (points of 100)")
    takeaway(left, "After the last stage")
    left.spines[["top", "right"]].set_visible(False)

    stages = range(1, len(counts[names[0]]) + 1)
    _draw_lines(right, stages, counts, "", f"duplicates per image (≥ {threshold})")
    before, after = counts[names[0]][-1], counts[names[1]][-1]
    text = f"{names[1].capitalize()}: {after:.2f} duplicates per image, {names[0]} {before:.2f}"
    if after > 1.5 * before:
        text = "Rivals that cannot see the winner give up less often: "
        text += f"{after:.2f} duplicates per image instead of {before:.2f}"
    figure.suptitle(text, fontsize=9.5, fontweight="bold")
    return figure

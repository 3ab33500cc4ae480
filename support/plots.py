"""The curves of a training run."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LINES = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # the darker ones first, on white


def plot_curves(metrics_jsonl: Path, output: Path) -> None:
    """A training run's `metrics.jsonl` as a picture: losses, AP, and learning rate over the epochs."""
    lines = [json.loads(line) for line in Path(metrics_jsonl).read_text().splitlines()]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss_axes, ap_axes, rate_axes = figure.subplots(1, 3)

    def plot(axes: Axes, labels: dict[str, str]) -> None:
        for (key, label), line_colour in zip(labels.items(), LINES, strict=False):
            points = [
                (line["epoch"], line[key]) for line in lines if line.get(key, -1) >= 0
            ]  # −1: not defined
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    label=label,
                    color=line_colour,
                )
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)

    plot(
        loss_axes,
        {"loss": "sum", "loss_cls": "class (focal)", "loss_l1": "L1", "loss_giou": "GIoU"},
    )
    loss_axes.set(title="training loss, summed over stages", ylabel="loss", ylim=(0, None))
    if loss_axes.lines:
        loss_axes.legend()
    plot(ap_axes, {"AP": "AP", "AP50": "AP50", "AP75": "AP75"})
    ap_axes.set(title="validation", ylabel="AP (fraction of 1)", ylim=(0, 1))
    if ap_axes.lines:
        ap_axes.legend(loc="lower right")
    plot(rate_axes, {"lr": "learning rate"})
    rate_axes.set(title="rate at the end of the epoch", ylabel="learning rate", ylim=(0, None))
    figure.savefig(output, dpi=110)

"""The curves of a training run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support.results import replacing

# The colours of Okabe and Ito, the darker ones first: they stand out on white.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_curves(metrics_jsonl: Path, output: Path) -> None:
    """Draws the losses, the AP and the learning rate of a training run over its epochs.

    Args:
        metrics_jsonl: written by `train.py`, one line per epoch.
        output: the picture to write, as PNG.

    Raises:
        OSError: it cannot be written; what was there is whole.
    """
    text = Path(metrics_jsonl).read_text(encoding="utf-8")
    epochs = [json.loads(line) for line in text.splitlines()]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss_axes, ap_axes, rate_axes = figure.subplots(1, 3)

    losses = {"loss": "sum", "loss_cls": "class (focal)", "loss_l1": "L1", "loss_giou": "GIoU"}
    _plot(loss_axes, epochs, losses)
    loss_axes.set(title="training loss, summed over stages", ylabel="loss", ylim=(0, None))
    if loss_axes.lines:
        loss_axes.legend()

    _plot(ap_axes, epochs, {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}, scale=100)
    ap_axes.set(title="validation", ylabel="AP, points of 100", ylim=(0, 100))
    if ap_axes.lines:
        ap_axes.legend(loc="lower right")

    _plot(rate_axes, epochs, {"lr": "learning rate"})
    rate_axes.set(title="rate at the end of the epoch", ylabel="learning rate", ylim=(0, None))

    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _plot(
    axes: Axes,
    epochs: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    scale: float = 1.0,
) -> None:
    """One line per key of `labels`, over the epochs that have a value for it, times `scale`."""
    for (key, label), colour in zip(labels.items(), LINES, strict=False):
        # −1 stands for an AP that is not defined.
        known = [line for line in epochs if line.get(key, -1) >= 0]
        if known:
            x = [line["epoch"] for line in known]
            y = [scale * line[key] for line in known]
            axes.plot(x, y, marker="o", markersize=3, label=label, color=colour)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)

"""Draws the README's figure: learned proposals that move onto the objects, stage by stage.

`python assets/make_gif.py` writes `assets/refinement.gif`, of a photograph of blood cells and an
image of Shapes, and its last frame as `assets/refinement.png`, for print. The model gives boxes
before the first and after every stage; the frames between two stages are interpolated for the eye.

Shapes: S stages, N proposals.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))  # Python looks for modules beside this file only

from notebooks.common import Trained  # noqa: E402
from visualize import colour, draw_boxes, show_image  # noqa: E402

MARGIN = 0.12  # around an image, as a share of its height: proposals may extend beyond it
STEPS = 4  # frames from one stage to the next
FRAME_MS, START_MS, HOLD_MS, END_MS = 90, 2000, 500, 2500  # between stages, at 0, at each, last
COLOURS = 256  # in the palette of the GIF
THRESHOLD = 0.4  # proposals that end with a lower score are white, and fade


# An image (3, H, W) uint8; boxes (S + 1, N, 4) xyxy in its pixels, the learned ones first; scores
# (S + 1, N) of the class that each proposal ends with, 0 at first; N colours; N class names.
Panel = tuple[Tensor, Tensor, Tensor, list[str], list[str]]


def make_panel(trained: Trained, index: int) -> Panel:
    """What a checkpoint makes of its learned proposals on one of its images."""
    probabilities = trained.logits[:, index].sigmoid()  # (S, N, K)
    labels = probabilities[-1].argmax(-1)  # (N,)
    scores = probabilities[:, torch.arange(len(labels)), labels]  # (S, N)
    scores = torch.cat([torch.zeros(1, len(labels)), scores])
    boxes_px = torch.cat([trained.learned_px[None, index], trained.boxes_px[:, index]])
    names = [trained.class_names[label] for label in labels.tolist()]
    colours = [colour(label) for label in labels.tolist()]
    return trained.images[index].as_subclass(Tensor), boxes_px, scores, colours, names


def draw_panel(axes: Axes, panel: Panel, time: float) -> None:
    """The image and its boxes at a time in 0 … S."""
    image, boxes_px, scores, colours, names = panel
    last = len(boxes_px) - 1
    stage = min(int(time), last - 1)
    part = time - stage  # of the way to the next stage
    now_px = torch.lerp(boxes_px[stage], boxes_px[stage + 1], part)
    score = torch.lerp(scores[stage], scores[stage + 1], part)

    show_image(axes, image)
    _, height, width = image.shape
    axes.set_xlim(-MARGIN * height, width + MARGIN * height)
    axes.set_ylim(height * (1 + MARGIN), -MARGIN * height)
    is_found = scores[-1] >= THRESHOLD
    faded = f"#FFFFFF{round(170 * (1 - time / last)):02X}"
    draw_boxes(axes, now_px[~is_found], [faded] * len(names), linewidth=0.8)
    best = {names[i]: i for i in torch.argsort(scores[-1]).tolist()}  # each class is named once
    for i in is_found.nonzero()[:, 0].tolist():
        is_named = score[i] >= 0.3 and best[names[i]] == i
        draw_boxes(axes, now_px[i, None], [colours[i]], [names[i]] if is_named else None, 1.4)


def draw_frame(panels: list[Panel], time: float) -> Image.Image:
    """The panels side by side at a time in 0 … S, below a title."""
    figure = Figure(figsize=(6.4, 3.1), facecolor="#DDDDDD")
    figure.suptitle("learned proposals" if time < 0.5 else f"stage {max(1, round(time))}")
    widths = [panel[0].shape[2] / panel[0].shape[1] + 2 * MARGIN for panel in panels]
    places = {"left": 0, "right": 1, "bottom": 0, "top": 0.91, "wspace": 0.02}
    row = figure.subplots(1, len(panels), width_ratios=widths, gridspec_kw=places)
    for axes, panel in zip(row, panels, strict=True):
        draw_panel(axes, panel, time)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def main() -> None:
    """Writes both files."""
    blood = make_panel(Trained("blood"), 3)
    # Here the objects lie apart, so that a reader can follow the boxes.
    shapes = make_panel(Trained("shapes", 11), 10)
    num_stages = len(blood[1]) - 1
    frames = [draw_frame([blood, shapes], i / STEPS) for i in range(num_stages * STEPS + 1)]
    frames[-1].save(ASSETS / "refinement.png", optimize=True)

    # One palette for all frames: pixels that do not change are then not stored again.
    samples = [np.asarray(frames[i]) for i in (0, len(frames) // 2, -1)]
    # Enough of each class's colour that it gets an entry of its own.
    swatches = [Image.new("RGB", (frames[0].width, 40), colour(label)) for label in range(3)]
    samples += [np.asarray(swatch) for swatch in swatches]
    palette = Image.fromarray(np.concatenate(samples)).quantize(COLOURS, dither=0)
    first, *rest = (frame.quantize(palette=palette, dither=0) for frame in frames)
    durations = ([HOLD_MS] + [FRAME_MS] * (STEPS - 1)) * num_stages + [END_MS]
    style = {"duration": [START_MS, *durations[1:]], "loop": 0}
    path = ASSETS / "refinement.gif"
    first.save(path, save_all=True, append_images=rest, optimize=False, disposal=1, **style)
    print(f"written: {path}, and its last frame as refinement.png")


if __name__ == "__main__":
    main()

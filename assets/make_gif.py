"""An animated GIF of the refinement: learned proposals that move onto the objects, stage by stage.

The model gives boxes before the first and after every stage. The frames between two stages are
interpolated for the eye.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 0.12  # around an image, as a share of its height: proposals may extend beyond it
STEPS = 6  # frames from one stage to the next
FRAME_MS, HOLD_MS, END_MS = 60, 500, 2500  # a frame; one at a stage; the last one
TITLE_PX = 26


@dataclass(frozen=True)
class Panel:
    """One image of the animation.

    Shapes: S stages, N proposals.
    """

    image: Tensor  # (3, H, W) uint8
    boxes_px: Tensor  # (S + 1, N, 4) xyxy in pixels of the image, the learned boxes first
    scores: Tensor  # (S, N) of the class that each proposal ends with
    colours: Sequence[str]  # N, "#RRGGBB"
    names: Sequence[str]  # N class names
    threshold: float = 0.4  # proposals that end with less are losers, and fade


def write_gif(panels: Sequence[Panel], path: Path, height_px: int = 280, colours: int = 64) -> None:
    """Writes the panels side by side as a GIF, and the last frame beside it as PNG for print.

    Args:
        panels: of the same number of stages.
        path: of the GIF.
        height_px: of every panel, its margin included.
        colours: in the GIF's palette.

    Raises:
        OSError: the files cannot be written.
    """
    num_stages = len(panels[0].scores)
    times, durations = [], []
    for stage in range(num_stages):
        times += [stage + step / STEPS for step in range(STEPS)]
        durations += [HOLD_MS] + [FRAME_MS] * (STEPS - 1)
    times.append(float(num_stages))
    durations.append(END_MS)

    frames = [_frame(panels, time, height_px) for time in times]
    frames[-1].save(path.with_suffix(".png"), optimize=True)
    # One palette for all frames: pixels that do not change are then not stored again.
    strip = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for row, index in enumerate((0, len(frames) // 2, -1)):
        strip.paste(frames[index], (0, row * frames[0].height))
    palette = strip.quantize(colours, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=False,
        disposal=1,
    )


def _frame(panels: Sequence[Panel], time: float, height_px: int) -> Image.Image:
    """The panels side by side at a time in 0 … S, below a title."""
    drawn = [_draw_panel(panel, time, height_px) for panel in panels]
    gap = 6
    width = sum(picture.width for picture in drawn) + gap * (len(drawn) - 1)
    frame = Image.new("RGB", (width, height_px + TITLE_PX), "white")

    stage = int(time)
    title = "learned proposals" if time < 0.5 else f"stage {max(1, round(time))}"
    if time == stage and stage:
        title = f"stage {stage}"
    font = _font(16)
    ImageDraw.Draw(frame).text((width / 2, TITLE_PX / 2), title, "black", font, anchor="mm")

    left = 0
    for picture in drawn:
        frame.paste(picture, (left, TITLE_PX))
        left += picture.width + gap
    return frame


def _draw_panel(panel: Panel, time: float, height_px: int) -> Image.Image:
    _, height, width = panel.image.shape
    scale = height_px / (height * (1 + 2 * MARGIN))
    margin_px = round(MARGIN * height * scale)
    size = (round(width * scale), round(height * scale))
    picture = Image.fromarray(panel.image.permute(1, 2, 0).numpy()).resize(size)
    canvas = Image.new("RGB", (size[0] + 2 * margin_px, height_px), "#DDDDDD")
    canvas.paste(picture, (margin_px, margin_px))

    stage = min(int(time), len(panel.scores) - 1)
    share = time - stage  # of the way to the next stage
    boxes_px = torch.lerp(panel.boxes_px[stage], panel.boxes_px[stage + 1], share)
    boxes_px = boxes_px * scale + margin_px
    before = panel.scores[stage - 1] if stage else torch.zeros_like(panel.scores[0])
    scores = torch.lerp(before, panel.scores[stage], share)
    is_winner = panel.scores[-1] >= panel.threshold

    layer = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(layer)
    fading = 1 - time / len(panel.scores)
    for i in torch.argsort(scores).tolist():
        box = boxes_px[i].tolist()
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if not is_winner[i]:
            draw.rectangle(box, outline=(255, 255, 255, round(170 * fading)))
            continue
        draw.rectangle(box, outline=panel.colours[i], width=2)
        if scores[i] >= 0.3:
            text = f"{panel.names[i]} {scores[i]:.2f}"
            place = (max(1, box[0]), max(1, box[1] - 12))
            font = _font(10)
            draw.rectangle(draw.textbbox(place, text, font), fill=panel.colours[i])
            draw.text(place, text, "black", font)
    canvas.paste(layer, mask=layer)
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib brings this one along."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)

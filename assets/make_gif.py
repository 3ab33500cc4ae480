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
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))  # Python looks for modules beside this file only

from data import validation_set  # noqa: E402
from model import load_model  # noqa: E402
from visualize import FONT, colour  # noqa: E402

HEIGHT_PX = 280  # of an image with the margin around it: proposals may extend beyond the image
MARGIN = 0.12  # as a share of the image's height
TITLE_PX = 26
STEPS = 4  # frames from one stage to the next
FRAME_MS, START_MS, HOLD_MS, END_MS = 90, 2000, 500, 2500  # between stages, at 0, at each, last
COLOURS = 256  # in the palette of the GIF
THRESHOLD = 0.4  # proposals that end with a lower score are white, and fade


# An image (3, H, W) uint8; boxes (S + 1, N, 4) xyxy in its pixels, the learned ones first; scores
# (S + 1, N) of the class that each proposal ends with, 0 at first; N colours; N class names.
Panel = tuple[Tensor, Tensor, Tensor, list[str], list[str]]


@torch.inference_mode()
def make_panel(weights: Path, index: int, **data: str) -> Panel:
    """What a checkpoint makes of its learned proposals on an image of its validation data."""
    model, checkpoint = load_model(weights)
    image = validation_set(checkpoint, **data)[index][0].as_subclass(Tensor)
    outputs = model.stages([image])
    height, width = image.shape[1:]
    learned_px = model.initial_boxes_px(torch.tensor([[width, height, width, height]]))
    probabilities = outputs.logits[:, 0].sigmoid()  # (S, N, K)
    labels = probabilities[-1].argmax(-1)  # (N,)
    scores = probabilities[:, torch.arange(len(labels)), labels]  # (S, N)
    scores = torch.cat([torch.zeros(1, len(labels)), scores])
    boxes_px = torch.cat([learned_px, outputs.boxes[:, 0]])
    names = [checkpoint["class_names"][label] for label in labels.tolist()]
    return image, boxes_px, scores, [colour(label) for label in labels.tolist()], names


def draw_panel(panel: Panel, time: float) -> Image.Image:
    """The image and its boxes at a time in 0 … S."""
    image, boxes_px, scores, colours, names = panel
    _, height, width = image.shape
    scale = HEIGHT_PX / (height * (1 + 2 * MARGIN))
    margin_px = round(MARGIN * height * scale)
    size = (round(width * scale), round(height * scale))
    canvas = Image.new("RGB", (size[0] + 2 * margin_px, HEIGHT_PX), "#DDDDDD")
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size)
    canvas.paste(pixels, (margin_px, margin_px))

    last = len(boxes_px) - 1
    stage = min(int(time), last - 1)
    part = time - stage  # of the way to the next stage
    now_px = torch.lerp(boxes_px[stage], boxes_px[stage + 1], part) * scale + margin_px
    score = torch.lerp(scores[stage], scores[stage + 1], part)
    has_area = (now_px[:, 2:] > now_px[:, :2]).all(1)

    layer = Image.new("RGBA", canvas.size)
    draw = ImageDraw.Draw(layer)
    font = ImageFont.truetype(FONT, 10)
    faded = (255, 255, 255, round(170 * (1 - time / last)))
    best = {names[i]: i for i in torch.argsort(scores[-1]).tolist()}  # each class is named once
    for i in [i for i in torch.argsort(score).tolist() if has_area[i]]:
        box = now_px[i].tolist()
        is_found = bool(scores[-1, i] >= THRESHOLD)
        draw.rectangle(box, outline=colours[i] if is_found else faded, width=1 + is_found)
        if is_found and score[i] >= 0.3 and best[names[i]] == i:
            text = names[i]
            place = (max(1, box[0]), max(1, box[1] - 12))
            draw.rectangle(draw.textbbox(place, text, font), fill=colours[i])
            draw.text(place, text, "black", font)
    canvas.paste(layer, mask=layer)
    return canvas


def draw_frame(panels: list[Panel], time: float) -> Image.Image:
    """The panels side by side at a time in 0 … S, below a title."""
    drawn = [draw_panel(panel, time) for panel in panels]
    gap = 6
    width = sum(image.width + gap for image in drawn) - gap
    frame = Image.new("RGB", (width, HEIGHT_PX + TITLE_PX), "white")
    title = "learned proposals" if time < 0.5 else f"stage {max(1, round(time))}"
    font = ImageFont.truetype(FONT, 16)
    ImageDraw.Draw(frame).text((width / 2, TITLE_PX / 2), title, "black", font, anchor="mm")
    for i, image in enumerate(drawn):
        frame.paste(image, (sum(left.width + gap for left in drawn[:i]), TITLE_PX))
    return frame


def main() -> None:
    """Writes both files."""
    photographs = {"val_json": str(ASSETS / "blood/val.json"), "val_images": str(ASSETS / "blood")}
    blood = make_panel(ASSETS / "blood.pt", 3, **photographs)
    # Here the objects lie apart, so that a reader can follow the boxes.
    shapes = make_panel(ASSETS / "shapes.pt", 10)
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

"""visualize.py: boxes are drawn where they are, and texts as they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, CocoFactory, tiny_checkpoint
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from model import build_model
from support.checkpoint import save_checkpoint
from support.errors import UserError
from visualize import PALETTE, draw_boxes, draw_image, draw_stages, main, show_image

CLASSES = ["ellipse", "rectangle", "triangle"]


def test_the_command_draws_detections_and_stages(tmp_path: Path, make_coco: CocoFactory) -> None:
    config = replace(TINY, train_json="a.json", train_images="a").to_dict()
    contents = tiny_checkpoint(config=config, class_names=CLASSES)
    save_checkpoint(tmp_path / "own.pt", contents)
    flags = ["--weights", str(tmp_path / "own.pt"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--val-json"):
        main(flags)
    json_file, folder = make_coco(categories=dict(enumerate(CLASSES, 1)))
    main([*flags, "--val-json", str(json_file), "--val-images", str(folder), "--images", "3"])
    for name in ("detections.png", "stages.png"):
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 9  # not a blank page


def pixels_of(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_stages_are_drawn_as_chosen_and_outputs_are_not_computed_again() -> None:
    model = build_model(TINY).eval()
    images = [torch.randint(256, (3, 32, side), dtype=torch.uint8) for side in (32, 64)]
    with torch.inference_mode():
        outputs = [model.stages([image]) for image in images]
    pages = [draw_stages(model, images, CLASSES, 0.01, stages=(2,))]
    model.stages = lambda _: pytest.fail("was run again")
    pages.append(draw_stages(model, images, CLASSES, 0.01, stages=(2,), outputs=outputs))
    assert np.array_equal(*map(pixels_of, pages))
    drawn = [patch.get_bbox().extents for patch in pages[0].axes[1].patches]  # first row, stage 2
    expected = outputs[0].boxes[-1, 0].tolist()
    assert np.allclose(sorted(map(tuple, drawn)), sorted(map(tuple, expected)), atol=1e-3)
    with pytest.raises(ValueError, match=r"not all in 1 … 2"):
        draw_stages(model, images, CLASSES, stages=[0, 1], outputs=outputs)


def test_boxes_are_drawn_where_they_are_and_texts_as_they_are() -> None:
    figure = Figure(figsize=(2, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    show_image(axes, torch.full((3, 100, 100), 255, dtype=torch.uint8), title="$\\frac{$")
    draw_boxes(axes, torch.tensor([[20.0, 30.0, 60.0, 80.0]]), ["#FF0000"], linewidth=0.9)
    pixels = pixels_of(figure)
    rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 120))
    found = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / 2  # 200 dots
    assert np.abs(found - [20.5, 30.5, 60.5, 80.5]).max() < 1
    texts = ["$$", "$\\frac{$", "\ud800", "a\nb"]  # names that matplotlib trips over
    draw_boxes(axes, torch.tensor([[5.0, 5.0, 30.0, 30.0]] * 4), ["#FFFFFF"] * 4, texts)
    assert not np.array_equal(pixels_of(figure), pixels)
    assert [text.get_text() for text in axes.texts] == ["$$", "$\\frac{$", "?", "a\nb"]


def test_boxes_and_whole_texts_are_drawn_inside_the_image() -> None:
    boxes = torch.tensor([[150.0, 0.0, 200.0, 99.6], [0.0, 90.0, 20.0, 100.0]])
    found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 2])}
    names = ["$ a long name", "", "猫"]
    blank, larger = (torch.full((3, side, 2 * side), 255, dtype=torch.uint8) for side in (100, 300))
    inside = draw_image(blank, found, names)
    # With room around them the texts are not moved. Letters are of the smallest size in both.
    moved = draw_image(larger, {**found, "boxes": boxes + 100}, names)
    inks = [torch.tensor([int(PALETTE[i][j : j + 2], 16) for j in (1, 3, 5)]) for i in (0, 2)]
    for ink, box_px in zip(inks, (50, 20), strict=True):
        masks = [(image == ink[:, None, None]).all(0) for image in (inside, moved)]
        widths = [int(mask.sum(1).max()) for mask in masks]  # of the plate below the text
        assert widths[0] == widths[1] > box_px
    row = inside[:, 60].T  # (200, 3), through the first box
    assert (row[[150, 151, 198, 199]] == inks[0]).all() and (row[153:197] == 255).all()

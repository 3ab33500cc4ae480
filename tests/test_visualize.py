"""Pictures: the command line, and what it refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from matplotlib import image as mpl_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model import build_model
from support.checkpoint import save_checkpoint
from support.errors import UserError
from support.plots import plot_curves
from visualize import draw_boxes, draw_stages, main, show_image

ROOT = Path(__file__).parents[1]


def checkpoint(path: Path, **config) -> Path:
    contents = {"class_names": ["ellipse", "rectangle", "triangle"], "category_ids": [1, 2, 3]}
    changed = replace(TINY, **config)
    save_checkpoint(
        path, {"model": build_model(TINY).state_dict(), "config": changed.to_dict(), **contents}
    )
    return path


def test_the_command_line_draws_detections_and_stages(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "tiny.pt")
    command = [
        sys.executable,
        str(ROOT / "visualize.py"),
        "--weights",
        str(weights),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--images", "3", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("detections.png", "stages.png"):
        assert str(tmp_path / "out" / name) in done.stdout
        assert mpl_image.imread(tmp_path / "out" / name).std() > 0.05  # not a blank page


def test_readme_draws_the_pictures_of_the_readme(tmp_path: Path) -> None:
    main(
        [
            "readme",
            "--weights",
            str(ROOT / "assets" / "shapes.pt"),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    for name in ("detections.png", "stages.png"):
        assert f"assets/{name}" in (ROOT / "README.md").read_text()
        drawn, committed = (
            mpl_image.imread(folder / name) for folder in (tmp_path / "out", ROOT / "assets")
        )
        assert drawn.std() > 0.05
        assert drawn.shape == committed.shape
    with pytest.raises(UserError, match="23 are needed"):
        main(
            [
                "readme",
                "--weights",
                str(checkpoint(tmp_path / "few.pt", shapes_val=22)),
                "--output",
                str(tmp_path),
            ]
        )


def test_stages_are_drawn_as_chosen() -> None:
    model, images = build_model(TINY).eval(), [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2
    for chosen, titles in ((None, ["stage 1", "stage 2"]), ((2,), ["stage 2"])):
        axes = draw_stages(model, images, ["a", "b", "c"], stages=chosen).axes
        assert [panel.get_title() for panel in axes[: len(axes) // 2]] == [
            "learned proposals",
            *titles,
        ]
        boxes = [[patch.get_bbox().extents for patch in panel.patches] for panel in axes]
        with torch.inference_mode():
            last = model.stages(images[:1]).boxes[-1, 0]
        assert np.allclose(
            sorted(map(tuple, boxes[len(titles)])), sorted(map(tuple, last.tolist())), atol=1e-3
        )


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--val-json"):
        weights = checkpoint(tmp_path / "own.pt", train_json="a.json", train_images="a")
        main(["--weights", str(weights), "--output", str(tmp_path), "--device", "cpu"])
    with pytest.raises(UserError, match="--images"):
        main(["--weights", str(weights), "--images", "0"])


def test_boxes_are_drawn_where_they_are() -> None:
    figure = Figure(figsize=(2, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    show_image(axes, torch.full((3, 100, 100), 255, dtype=torch.uint8))
    draw_boxes(axes, torch.tensor([[20.0, 30.0, 60.0, 80.0]]), ["#FF0000"], linewidth=0.9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 120))
    found = (
        np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / 2
    )  # 200 dots for 100 pixels
    assert np.abs(found - [20.5, 30.5, 60.5, 80.5]).max() < 1


def test_curves_of_a_run_without_any_evaluation(tmp_path: Path) -> None:
    lines = [
        {"epoch": e, "loss": 9 - e, "loss_cls": 1, "loss_l1": 1, "loss_giou": 1, "lr": 0.1}
        for e in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert mpl_image.imread(tmp_path / "curves.png").std() > 0.05

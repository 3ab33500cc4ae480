"""visualize.py: boxes are drawn where they are, and texts as they are."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, CocoFactory
from matplotlib import image as mpl_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from model import build_model
from support.checkpoint import save_checkpoint
from support.errors import UserError
from support.plots import plot_curves
from visualize import (
    colour,
    draw_boxes,
    draw_stages,
    main,
    new_figure,
    pad_canvas,
    plot_bars,
    plot_heatmap,
    plot_lines,
    plot_named_lines,
    plot_stacked,
    save_figure,
    show_image,
    show_map,
)


def checkpoint(path: Path, **config) -> Path:
    contents = {"class_names": ["ellipse", "rectangle", "triangle"], "category_ids": [1, 2, 3]}
    changed = replace(TINY, **config)
    save_checkpoint(
        path, {"model": build_model(TINY).state_dict(), "config": changed.to_dict(), **contents}
    )
    return path


def test_the_command_line_draws_detections_and_stages(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "tiny.pt")
    command = [sys.executable, str(ROOT / "visualize.py"), "--weights", str(weights)]
    command += ["--output", str(tmp_path / "out"), "--images", "3", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("detections.png", "stages.png"):
        assert str(tmp_path / "out" / name) in done.stdout
        assert mpl_image.imread(tmp_path / "out" / name).std() > 0.05  # not a blank page


def test_readme_draws_the_animation_of_the_readme(tmp_path: Path, make_coco: CocoFactory) -> None:
    # In place of the blood cells: five images, as the fifth is shown, with the classes of Shapes.
    classes = {1: "ellipse", 2: "rectangle", 3: "triangle"}
    json_file, folder = make_coco(num_images=5, categories=classes)
    for image in folder.iterdir():
        image.rename(json_file.parent / image.name)
    weights = str(ROOT / "assets" / "shapes.pt")
    flags = [
        "--shapes-weights",
        weights,
        "--blood-weights",
        weights,
        "--blood-json",
        str(json_file),
    ]
    main(["readme", *flags, "--output", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "refinement.gif") as animation:
        stages = 6
        assert animation.n_frames > stages
        first = np.asarray(animation.convert("RGB")).astype(int)
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB")).astype(int)
    assert (np.abs(first - last).max(-1) > 50).mean() > 0.05  # the boxes have moved
    still = np.asarray(Image.open(tmp_path / "out" / "refinement.png").convert("RGB")).astype(int)
    assert still.shape == last.shape
    assert (np.abs(still - last).max(-1) < 40).mean() > 0.95  # but for the colours of the palette


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


def test_stages_of_an_earlier_pass_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(TINY).eval()
    images = [torch.randint(256, (3, 32, side), dtype=torch.uint8) for side in (32, 64)]
    with torch.inference_mode():
        outputs = [model.stages([image]) for image in images]
    expected = draw_stages(model, images, ["a", "b", "c"], threshold=0.01)
    monkeypatch.setattr(model, "stages", lambda _: pytest.fail("was run again"))
    found = draw_stages(model, images, ["a", "b", "c"], threshold=0.01, outputs=outputs)
    pixels = []
    for figure in (expected, found):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels.append(np.asarray(canvas.buffer_rgba()))
    assert np.array_equal(*pixels)


def test_a_stage_that_does_not_exist_is_refused() -> None:
    model, images = build_model(TINY).eval(), [torch.zeros(3, 32, 32, dtype=torch.uint8)]
    for stages in ([0, 1], [3]):
        with pytest.raises(ValueError, match=r"not all in 1 … 2"):
            draw_stages(model, images, ["a", "b", "c"], stages=stages)


def test_what_cannot_be_drawn(tmp_path: Path, make_coco: CocoFactory) -> None:
    with pytest.raises(UserError, match="--val-json"):
        weights = checkpoint(tmp_path / "own.pt", train_json="a.json", train_images="a")
        main(["--weights", str(weights), "--output", str(tmp_path), "--device", "cpu"])
    for images in ("0", "401"):
        with pytest.raises(UserError, match="--images"):
            main(["--weights", str(weights), "--images", images])
    with pytest.raises(OSError, match=r"own\.pt"):
        main(["--weights", str(checkpoint(tmp_path / "tiny.pt")), "--output", str(weights)])
    classes = {1: "ellipse", 2: "rectangle", 3: "triangle"}
    json_file, folder = make_coco(categories=classes)
    (folder / "2.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2\.jpg: cannot be read"):
        main(
            ["--weights", str(tmp_path / "tiny.pt"), "--output", str(tmp_path / "out")]
            + ["--val-json", str(json_file), "--val-images", str(folder)]
        )


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


TEXTS = ["$$", "$\\frac{$", "\ud800", "a\nb"]  # names that matplotlib trips over


def drawn_texts(figure: Figure) -> set[str]:
    """What is written in a figure, once it has been drawn."""
    FigureCanvasAgg(figure).draw()
    texts = figure.findobj(lambda artist: hasattr(artist, "get_parse_math"))
    assert not [text for text in texts if text.get_parse_math() and "$" in text.get_text()]
    return {text.get_text() for text in texts}


def test_texts_are_drawn_as_they_are() -> None:
    expected = {text.replace("\ud800", "?") for text in TEXTS}
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 5.0, 30.0, 30.0]] * len(TEXTS))
    figure, grid = new_figure(3, 3)
    show_image(grid[0, 0], image)
    draw_boxes(grid[0, 0], boxes, ["#FFFFFF"] * len(TEXTS), TEXTS)
    assert drawn_texts(figure) >= expected
    for text in TEXTS:
        show_image(grid[0, 1], image, title=text)
        assert drawn_texts(figure) >= {text.replace("\ud800", "?")}
        show_map(grid[0, 1], image[0], title=text)
        assert drawn_texts(figure) >= {text.replace("\ud800", "?")}

    values = [1.0, 2.0, 3.0, 4.0]
    for plot in (
        lambda axes: plot_bars(axes, TEXTS, values),
        lambda axes: plot_stacked(axes, TEXTS, {"part": values}),
        lambda axes: plot_stacked(axes, "abcd", dict.fromkeys(TEXTS, values)),
        lambda axes: plot_heatmap(axes, torch.rand(4, 4), TEXTS, "abcd"),
        lambda axes: plot_heatmap(axes, torch.rand(4, 4), "abcd", TEXTS),
        lambda axes: plot_lines(axes, range(4), dict.fromkeys(TEXTS, values)),
    ):
        figure, grid = new_figure(1, 1)
        plot(grid[0, 0])
        assert drawn_texts(figure) >= expected


def test_the_boxes_of_an_image_are_drawn_in_place_on_a_smaller_copy() -> None:
    figure, grid = new_figure(1, 2)
    for axes, image in zip(grid[0], (torch.zeros(3, 60, 90), torch.zeros(3, 20, 30)), strict=True):
        show_image(axes, image, size_hw=(60, 90))
        # The first pixel's centre is at 0, and a pixel of the copy is 3 pixels wide.
        half = 90 / image.shape[2] / 2
        assert axes.get_xlim() == (-half, 90 - half) and axes.get_ylim() == (60 - half, -half)


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("yesterday's")
    figure, grid = new_figure(1, 1)
    grid[0, 0].set_title("$$")  # fails while it is drawn
    with pytest.raises(ValueError, match=r"\$\$"):
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "yesterday's"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_curves_of_a_run_without_any_evaluation(tmp_path: Path) -> None:
    lines = [
        {"epoch": e, "loss": 9 - e, "loss_cls": 1, "loss_l1": 1, "loss_giou": 1, "lr": 0.1}
        for e in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert mpl_image.imread(tmp_path / "curves.png").std() > 0.05


def test_lines_are_named_at_their_ends_and_names_do_not_overlap() -> None:
    figure, ((axes,),) = new_figure(1, 1)
    series = {"first": [1.0, 9.0], "second": [2.0, 9.1], "low $x$": [0.0, 0.0]}
    plot_named_lines(axes, [1, 3], series)
    figure.canvas.draw()
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(names) == set(series)
    boxes = sorted(names.values(), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))
    assert names["second"].y0 > names["first"].y0  # in the order of the lines
    ends = axes.transData.transform((3, 0))[0]
    assert all(box.x0 > ends for box in names.values())
    # No colour, and told apart without it.
    rgb = [to_rgb(line.get_color()) for line in axes.lines]
    assert all(len(set(channels)) == 1 for channels in rgb)
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 3


def test_a_padded_canvas_shows_boxes_beyond_the_image() -> None:
    figure, ((axes,),) = new_figure(1, 1)
    image = torch.zeros(3, 40, 80)
    show_image(axes, image)
    pad_canvas(axes, image, margin=0.5)
    draw_boxes(axes, torch.tensor([[-30.0, -10, 20, 30]]), [colour(0)], alphas=[0.3])
    assert axes.get_xlim() == (-40.5, 119.5) and axes.get_ylim() == (59.5, -20.5)
    (box,) = [patch for patch in axes.patches if not patch.get_fill()]
    assert box.get_alpha() == 0.3

"""The harder kinds of Shapes that `experiments.levels` writes."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import shapes
from data import CocoDataset
from experiments import levels


@pytest.mark.parametrize("name", levels.LOOKALIKES)
def test_lookalikes_fill_their_boxes(name: str) -> None:
    box = np.array([10.3, 20.6, 53.7, 61.9], np.float32)
    black, white = np.zeros((3, 96, 96), np.float32), np.full(3, 255, np.float32)
    shapes.paint(black, box, levels.LOOKALIKES[name], white)
    ys, xs = np.nonzero(black[0] > 25.5)
    extent = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert np.abs(extent - box).max() < 1


def test_no_two_lookalikes_are_the_same_and_a_direction_is_a_turn() -> None:
    axis = np.linspace(-0.99, 0.99, 100)
    masks = {name: f(axis[None, :], axis[:, None]) <= 0 for name, f in levels.LOOKALIKES.items()}
    assert len(masks) == 24
    for a, b in itertools.combinations(masks, 2):
        assert (masks[a] != masks[b]).mean() > 0.05, (a, b)
    for name in levels.OUTLINES:
        up = masks[f"{name} up"]
        for turns, direction in enumerate(("left", "down", "right"), 1):
            assert np.array_equal(masks[f"{name} {direction}"], np.rot90(up, turns)), name


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    for name in levels.SEEDS:
        levels.write(name, folder / name, {"train": 12, "val": 6})
    return folder


@pytest.mark.parametrize("name", levels.SEEDS)
def test_the_files_load_and_the_splits_differ(written, name: str) -> None:
    folder = written / name
    sets = [
        CocoDataset(folder / f"{split}.json", folder / "images", None) for split in ("train", "val")
    ]
    assert [len(data) for data in sets] == [12, 6]
    assert len(sets[0].class_names) == (24 if name == "lookalikes" else 6)
    image, target = sets[0][3]
    pixels, boxes_px, labels = levels.draw(name, "train", 3)
    assert np.array_equal(image.numpy(), pixels)
    assert torch.allclose(target["boxes"].as_subclass(torch.Tensor), torch.from_numpy(boxes_px))
    assert target["labels"].tolist() == labels.tolist()
    assert not np.array_equal(pixels, levels.draw(name, "val", 3)[0])


def test_every_twin_overlaps_one_of_its_class() -> None:
    for index in range(50):
        _, boxes_px, labels = levels.draw("twins", "val", index)
        boxes_px = torch.from_numpy(boxes_px)
        ious = box_iou(boxes_px[::2], boxes_px[1::2]).diagonal()
        assert ious.min() >= 0.25 and ious.max() <= 0.75
        assert labels[::2].tolist() == labels[1::2].tolist()
        assert boxes_px.min() >= 0 and boxes_px.max() <= shapes.SIZE_PX


def test_the_command_writes_three_splits(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(levels, "SPLITS", {"train": 2, "val": 1, "tune": 1})
    levels.main(["twins", str(tmp_path)])
    assert "written: train, val, tune" in capsys.readouterr().out
    values = json.loads((tmp_path / "tune.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in values["images"]] == ["tune-00000.png"]
    assert Image.open(tmp_path / "images" / "tune-00000.png").size == (96, 96)

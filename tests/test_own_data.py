"""train.py on data sets as other tools write them: resolved, or refused at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import data_flags
from PIL import Image

import train
from support.checkpoint import load_checkpoint
from support.errors import UserError

Raw = dict[str, Any]


@pytest.fixture
def run(tiny_flags: list[str], tmp_path: Path, capsys) -> Callable[..., str]:
    """Trains for an epoch, and returns what was printed."""

    def train_and_read(*flags: str) -> str:
        assert train.main([*tiny_flags, "--output", str(tmp_path / "run"), *flags]) == 0
        return capsys.readouterr().out

    return train_and_read


def metrics(folder: Path) -> Raw:
    return json.loads((folder / "run/metrics.jsonl").read_text(encoding="utf-8"))


def test_a_phone_image_in_the_validation_set_is_found_before_training(
    make_coco, run, tmp_path: Path
) -> None:
    val = make_coco("val")
    path = val[1] / "3.jpg"
    image, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6  # to be shown turned; the JSON has the size as stored
    image.load()
    image.save(path, exif=exif)
    with pytest.raises(UserError, match=r"1 of 4 images .*3\.jpg: is 48 x 64 pixels, but 64 x 48"):
        run(*data_flags(make_coco("train"), val), "--check-data")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def without_cow(coco: Raw) -> None:
    cow = coco["categories"].pop()["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != cow]


def test_a_validation_set_with_fewer_classes(make_coco, run, tmp_path: Path) -> None:
    val = make_coco("val", edit=without_cow)
    printed = run(*data_flags(make_coco("train"), val))
    note = "val.json: lacks 1 of the 3 classes: 'cow'; AP is over the others"
    assert note in printed and metrics(tmp_path)["AP"] >= 0
    assert load_checkpoint(tmp_path / "run/last.pt")["class_names"] == ["dog", "cat", "cow"]


def test_a_validation_set_with_more_classes(make_coco, run, tmp_path: Path) -> None:
    flags = data_flags(make_coco("train", edit=without_cow), make_coco("val"))
    with pytest.raises(UserError, match=r"new \['cow'\].*--ignore-new-classes"):
        run(*flags)
    printed = run(*flags, "--ignore-new-classes")
    note = "val.json: ignored ['cow'], new to the model, and 3 annotations"
    assert note in printed
    assert metrics(tmp_path)["AP"] >= 0

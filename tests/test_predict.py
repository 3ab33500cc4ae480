"""predict.py: every kind of picture gives the same detections in its own pixels; what cannot be read is skipped."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from predict import Predictor, main, output_names
from shapes import ShapesDataset
from support.checkpoint import load_model
from support.errors import UserError
from support.pictures import to_image
from tools import export
from visualize import colour

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "assets" / "shapes.pt"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(WEIGHTS, device="cpu")


@pytest.fixture(scope="module")
def shape() -> Image.Image:
    """A held-out picture, 96×96 RGB."""
    return Image.fromarray(ShapesDataset("demo", "val", 2)[1][0].permute(1, 2, 0).numpy())


def run(*arguments: object) -> int:
    return main(
        [*map(str, arguments), "--weights", str(WEIGHTS), "--device", "cpu", "--workers", "0"]
    )


def same(a: dict, b: dict, boxes_px: float = 0.05) -> None:
    assert a["names"] == b["names"] and len(a["names"])
    assert (a["boxes"] - b["boxes"]).abs().max() < boxes_px and (
        a["scores"] - b["scores"]
    ).abs().max() < 1e-4


def test_detections_are_the_models_own_and_find_the_objects(
    predictor: Predictor, shape: Image.Image
) -> None:
    found = predictor(shape)
    model, _ = load_model(WEIGHTS)
    with torch.inference_mode():
        expected = model([torch.from_numpy(np.array(shape)).permute(2, 0, 1)])[0]
    count = int((expected["scores"] >= 0.4).sum())
    names = ["ellipse", "rectangle", "triangle"]
    expected = {key: value[:count] for key, value in expected.items()}
    same(
        found,
        {
            **{k: v[:count] for k, v in expected.items()},
            "names": [names[i] for i in expected["labels"][:count]],
        },
    )
    target = ShapesDataset("demo", "val", 2)[1][1]
    assert sorted(found["labels"].tolist()) == sorted(target["labels"].tolist())


FORMS: dict[str, Callable[[Image.Image], object]] = {
    "RGBA": lambda picture: picture.convert("RGBA"),
    "array": np.array,
    "array RGBA": lambda picture: np.array(picture.convert("RGBA")),
    "reversed strides": lambda picture: np.array(picture)[:, :, ::-1].copy()[:, :, ::-1],
    "uint16": lambda picture: np.array(picture).astype(np.uint16) * 257,
    "float64": lambda picture: np.array(picture) / 255,
    "tensor": lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
    "float tensor": lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_same(
    predictor: Predictor, shape: Image.Image, form: str
) -> None:
    same(predictor(FORMS[form](shape)), predictor(shape))


def test_grey_pictures_of_every_form_give_the_same(
    predictor: Predictor, shape: Image.Image, tmp_path: Path
) -> None:
    grey = shape.convert("L")
    deep = np.array(grey).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = predictor(grey)
    for form in (
        np.array(grey),
        np.array(grey)[..., None],
        torch.from_numpy(np.array(grey)),
        deep,
        tmp_path / "deep.png",
    ):
        same(predictor(form), expected)


def test_files_of_every_format_and_orientation(
    predictor: Predictor, shape: Image.Image, tmp_path: Path
) -> None:
    shape.save(tmp_path / "a.png")
    shape.save(tmp_path / "a.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: stored turned back
    shape.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    shape.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    expected = predictor(shape)
    for name in ("a.png", "a.webp", "turned.png"):
        same(predictor(tmp_path / name), expected)
    same(predictor(Image.open(tmp_path / "turned.png")), expected)
    found = predictor(str(tmp_path / "a.jpg"))
    assert (
        found["names"] == expected["names"] and (found["boxes"] - expected["boxes"]).abs().max() < 2
    )


def test_boxes_are_in_the_pixels_of_the_picture_given(
    predictor: Predictor, shape: Image.Image
) -> None:
    found = predictor(shape)
    twice = predictor(shape.resize((192, 192), Image.Resampling.BICUBIC))
    assert (
        twice["names"] == found["names"] and (twice["boxes"] / 2 - found["boxes"]).abs().max() < 2
    )


def test_a_list_gives_a_list_and_sizes_do_not_mix(shape: Image.Image) -> None:
    predictor = Predictor(WEIGHTS, device="cpu", batch_size=3)
    pictures = [shape, shape.crop((0, 0, 96, 64)), shape, shape.crop((0, 0, 64, 96))]
    found = predictor(pictures)
    assert len(found) == 4 and predictor([]) == []
    for picture, one in zip(pictures, found, strict=True):
        same(one, predictor(picture))


def test_threshold_and_classes(shape: Image.Image) -> None:
    everything = Predictor(WEIGHTS, device="cpu", score_threshold=0.0)(shape)
    assert len(everything["names"]) == 20 and (everything["scores"].diff() <= 0).all()
    some = Predictor(WEIGHTS, device="cpu", score_threshold=0.0, classes=["triangle", "ellipse"])(
        shape
    )
    assert set(some["names"]) == {"triangle", "ellipse"}
    assert len(some["names"]) == sum(name != "rectangle" for name in everything["names"])
    with pytest.raises(UserError, match=r"'cat'.*ellipse, rectangle, triangle"):
        Predictor(WEIGHTS, device="cpu", classes=["cat"])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5, 2), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "shape"),
        (np.zeros((4, 5, 3), np.int64), "uint8"),
        (np.full((4, 5, 3), 255.0), "0 … 1"),
        (np.full((4, 5, 3), np.nan), "0 … 1"),
        (torch.zeros(1, 3, 4, 5), "shape"),
        (None, "NoneType"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_is_no_picture_is_refused(image: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        to_image(image)


def test_the_command_line_on_a_folder_with_a_broken_file(
    shape: Image.Image, tmp_path: Path
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shape.save(folder / "a.png")
    shape.convert("L").resize((200, 100)).save(folder / "A.jpg")
    shape.resize((1, 1)).save(folder / "one.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "notes.txt").write_text("not taken")
    (folder / ".hidden.png").write_bytes(b"not taken")
    command = [
        sys.executable,
        str(ROOT / "predict.py"),
        str(folder),
        str(folder / "a.png"),
        "--weights",
        str(WEIGHTS),
    ]
    done = subprocess.run(
        [*command, "--output", str(output), "--device", "cpu", "--stages", "--workers", "2", "--batch-size", "2"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "skipped" in done.stderr and "broken.jpg" in done.stderr
    assert "3 pictures" in done.stdout and "1 skipped" in done.stdout
    records = json.loads((output / "detections.json").read_text())
    assert [(Path(r["file"]).name, r["width"], r["height"]) for r in records] == [
        ("A.jpg", 200, 100), ("a.png", 96, 96), ("one.png", 1, 1)]  # fmt: skip
    assert set(records[1]) == {"file", "width", "height", "boxes", "scores", "labels", "names"}
    expected = Predictor(WEIGHTS, device="cpu")(folder / "a.png")
    assert records[1]["names"] == expected["names"]
    assert np.abs(np.array(records[1]["boxes"]) - expected["boxes"].numpy()).max() < 0.05
    written = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.png"))
    assert written == [
        "A.png",
        "a_2.png",
        "one.png",
        "stages/A.png",
        "stages/a_2.png",
        "stages/one.png",
    ]
    picture = np.asarray(Image.open(output / "a_2.png").convert("RGB")).astype(int)
    assert picture.shape == (480, 480, 3)
    # The boxes are drawn where they are: pixels of the class's colour on the upper side of the first box.
    x1, y1, x2, _ = (expected["boxes"][0] * 5).round().int().tolist()
    drawn = tuple(int(colour(records[1]["labels"][0])[i : i + 2], 16) for i in (1, 3, 5))
    side = picture[y1 - 3 : y1 + 6, (x1 + x2) // 2 + np.arange(-2, 3)]
    assert (np.abs(side - drawn).max(-1) < 30).any()


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # pytest undoes the filter of data.py
def test_a_very_large_picture(tmp_path: Path) -> None:
    Image.new("RGB", (12_000, 9_000), (90, 120, 60)).save(tmp_path / "large.jpg", quality=60)
    assert run(tmp_path / "large.jpg", "--output", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "detections.json").read_text())[0]
    assert (record["width"], record["height"]) == (12_000, 9_000)
    assert Image.open(tmp_path / "out" / "large.png").size == (1600, 1200)


def test_wrong_arguments(shape: Image.Image, tmp_path: Path) -> None:
    shape.save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for arguments, words in {
        (tmp_path / "none.jpg",): "none.jpg: no such file",
        (tmp_path / "empty",): "no pictures in this folder",
        (): "give pictures",
        (tmp_path / "a.png", "--score-threshold", "2"): "0 … 1",
        (tmp_path / "a.png", "--batch-size", "0"): "--batch-size",
        (tmp_path / "a.png", "--classes", "cat"): "ellipse, rectangle, triangle",
        (tmp_path / "a.png", "--output", tmp_path): r"a\.png there is one of the inputs",
    }.items():
        with pytest.raises(UserError, match=words):
            run(*arguments)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "empty"]


def test_output_names_never_collide() -> None:
    files = [Path(name) for name in ("x/a.jpg", "x/a.png", "y/A.png", "x/a_2.jpg", "b.png")]
    assert output_names(files) == ["a", "a_2", "A_3", "a_2_2", "b"]


def test_an_onnx_file_takes_the_place_of_the_checkpoint(
    predictor, shape, tmp_path: Path, capsys
) -> None:
    shape.crop((0, 0, 96, 70)).save(tmp_path / "a.png")
    export.main([str(WEIGHTS), str(tmp_path / "model.onnx")])
    onnx = ["--weights", str(tmp_path / "model.onnx"), "--device", "cpu", "--workers", "0"]
    assert main([str(tmp_path / "a.png"), *onnx, "--output", str(tmp_path / "out")]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "detections.json").read_text())[0]
    found = {key: torch.tensor(record[key]) for key in ("boxes", "scores")}
    same({**found, "names": record["names"]}, predictor(tmp_path / "a.png"))
    with pytest.raises(UserError, match="--amp"):
        main([str(tmp_path / "a.png"), *onnx, "--amp", "bf16", "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--stages"):
        main([str(tmp_path / "a.png"), *onnx, "--stages", "--output", str(tmp_path / "out")])
    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.onnx.*damaged"):
        main([str(tmp_path / "a.png"), *onnx])

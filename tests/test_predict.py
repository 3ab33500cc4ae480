"""predict.py: every form of an image gives the same detections; what fails costs only itself."""

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, features

import predict
from model import SparseRCNN
from predict import ImageFiles, Predictor, main, output_names
from shapes import ShapesDataset
from support.checkpoint import load_checkpoint, load_model, save_checkpoint
from support.cli import run_main
from support.errors import UserError
from support.pictures import to_image
from tools import export
from visualize import colour

WEIGHTS = ROOT / "assets" / "shapes.pt"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(WEIGHTS, device="cpu")


@pytest.fixture(scope="module")
def shape() -> Image.Image:
    """A held-out image, 96×96 RGB."""
    return Image.fromarray(ShapesDataset("demo", "val", 2)[1][0].permute(1, 2, 0).numpy())


@pytest.fixture
def folder(shape: Image.Image, tmp_path: Path) -> Path:
    """A folder of five images, the third one smaller than the others."""
    path = tmp_path / "in"
    path.mkdir()
    for name in "abcde":
        image = shape.crop((0, 0, 96, 64)) if name == "c" else shape
        image.save(path / f"{name}.png")
    return path


def run(*arguments: object) -> int:
    common = ["--weights", str(WEIGHTS), "--device", "cpu", "--workers", "0"]
    return main([*map(str, arguments), *common])


def read_records(output: Path) -> list[dict]:
    return json.loads((output / "detections.json").read_text(encoding="utf-8"))


def stems(records: list[dict]) -> str:
    return "".join(Path(record["file"]).stem for record in records)


def same(a: dict, b: dict, boxes_px: float = 0.05) -> None:
    assert a["names"] == b["names"] and len(a["names"])
    assert (a["boxes"] - b["boxes"]).abs().max() < boxes_px
    assert (a["scores"] - b["scores"]).abs().max() < 1e-4


# --- Predictor ---


def test_detections_are_the_models_and_find_the_objects(
    predictor: Predictor, shape: Image.Image
) -> None:
    found = predictor(shape)
    model, _ = load_model(WEIGHTS)
    with torch.inference_mode():
        expected = model([torch.from_numpy(np.array(shape)).permute(2, 0, 1)])[0]
    count = int((expected["scores"] >= 0.4).sum())
    expected = {key: value[:count] for key, value in expected.items()}
    names = ["ellipse", "rectangle", "triangle"]
    same(found, {**expected, "names": [names[i] for i in expected["labels"]]})
    target = ShapesDataset("demo", "val", 2)[1][1]
    assert sorted(found["labels"].tolist()) == sorted(target["labels"].tolist())


FORMS: dict[str, Callable[[Image.Image], object]] = {
    "RGBA": lambda image: image.convert("RGBA"),
    "array": np.array,
    "array RGBA": lambda image: np.array(image.convert("RGBA")),
    "reversed strides": lambda image: np.array(image)[:, :, ::-1].copy()[:, :, ::-1],
    "uint16": lambda image: np.array(image).astype(np.uint16) * 257,
    "float64": lambda image: np.array(image) / 255,
    "tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "float tensor": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same(
    predictor: Predictor, shape: Image.Image, form: str
) -> None:
    same(predictor(FORMS[form](shape)), predictor(shape))


def test_grey_images_of_every_form_give_the_same(
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
    assert found["names"] == expected["names"]
    assert (found["boxes"] - expected["boxes"]).abs().max() < 2


def test_boxes_are_in_pixels_of_the_image_given(predictor: Predictor, shape: Image.Image) -> None:
    found = predictor(shape)
    twice = predictor(shape.resize((192, 192), Image.Resampling.BICUBIC))
    assert twice["names"] == found["names"]
    assert (twice["boxes"] / 2 - found["boxes"]).abs().max() < 2


def test_a_list_gives_a_list_and_sizes_do_not_mix(shape: Image.Image) -> None:
    predictor = Predictor(WEIGHTS, device="cpu", batch_size=3)
    images = [shape, shape.crop((0, 0, 96, 64)), shape, shape.crop((0, 0, 64, 96))]
    found = predictor(images)
    assert len(found) == 4 and predictor([]) == []
    for image, one in zip(images, found, strict=True):
        same(one, predictor(image))


def test_threshold_and_classes(shape: Image.Image) -> None:
    everything = Predictor(WEIGHTS, device="cpu", score_threshold=0.0)(shape)
    assert len(everything["names"]) == 20 and (everything["scores"].diff() <= 0).all()
    some = Predictor(WEIGHTS, device="cpu", score_threshold=0.0, classes=["triangle", "ellipse"])
    found = some(shape)
    assert set(found["names"]) == {"triangle", "ellipse"}
    assert len(found["names"]) == sum(name != "rectangle" for name in everything["names"])
    some.select_classes("rectangle")  # one name is not five letters
    assert set(some(shape)["names"]) == {"rectangle"}
    some.select_classes(())
    same(some(shape), everything)


def test_unknown_classes_are_named_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"'cat'.*ellipse, rectangle, triangle"):
        Predictor(WEIGHTS, device="cpu", classes=["cat"])
    with pytest.raises(UserError, match="did you mean rectangle"):
        Predictor(WEIGHTS, device="cpu", classes=["rectangel"])


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
def test_what_is_no_image_is_refused(image: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        to_image(image)


# --- the command line ---


def test_the_command_line_on_a_folder_with_a_broken_file(
    shape: Image.Image, tmp_path: Path
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shape.save(folder / "a.png")
    shape.convert("L").resize((200, 100)).save(folder / "A.jpg")
    shape.resize((1, 1)).save(folder / "one.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("not taken")
    (folder / ".hidden.png").write_bytes(b"not taken")
    command = [sys.executable, str(ROOT / "predict.py"), str(folder), str(folder / "a.png")]
    command += ["--weights", str(WEIGHTS), "--output", str(output), "--device", "cpu"]
    command += ["--stages", "--workers", "2", "--batch-size", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "skipped" in done.stderr and "broken.jpg" in done.stderr
    assert "3 images" in done.stdout and "1 skipped" in done.stdout
    assert "passed over in the folders: 1 hidden, 1 .txt" in done.stdout

    records = read_records(output)
    assert [(Path(r["file"]).name, r["width"], r["height"]) for r in records] == [
        ("A.jpg", 200, 100),
        ("a.png", 96, 96),
        ("one.png", 1, 1),
    ]
    assert set(records[1]) == {"file", "width", "height", "boxes", "scores", "labels", "names"}
    expected = Predictor(WEIGHTS, device="cpu")(folder / "a.png")
    assert records[1]["names"] == expected["names"]
    assert np.abs(np.array(records[1]["boxes"]) - expected["boxes"].numpy()).max() < 0.05
    written = {path.relative_to(output).as_posix() for path in output.rglob("*.*")}
    pictures = {f"{where}{name}.png" for where in ("", "stages/") for name in ("A", "a_2", "one")}
    assert written == pictures | {"detections.json"}

    picture = np.asarray(Image.open(output / "a_2.png").convert("RGB")).astype(int)
    assert picture.shape == (480, 480, 3)
    # The boxes are drawn where they are: the upper side of the first box has its class's colour.
    x1, y1, x2, _ = (expected["boxes"][0] * 5).round().int().tolist()
    drawn = tuple(int(colour(records[1]["labels"][0])[i : i + 2], 16) for i in (1, 3, 5))
    side = picture[y1 - 3 : y1 + 6, (x1 + x2) // 2 + np.arange(-2, 3)]
    assert (np.abs(side - drawn).max(-1) < 30).any()


# pytest undoes the filter of support/pictures.py.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_very_large_image(tmp_path: Path) -> None:
    Image.new("RGB", (12_000, 9_000), (90, 120, 60)).save(tmp_path / "large.jpg", quality=60)
    assert run(tmp_path / "large.jpg", "--output", tmp_path / "out") == 0
    record = read_records(tmp_path / "out")[0]
    assert (record["width"], record["height"]) == (12_000, 9_000)
    assert Image.open(tmp_path / "out" / "large.png").size == (1600, 1200)


def test_boxes_are_drawn_in_place_on_a_smaller_copy(
    shape: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The outer frame of a box of known place, in an image that is drawn at half its size.
    Image.new("RGB", (3200, 1600)).save(tmp_path / "a.png")
    detection = {
        "boxes": torch.tensor([[800.0, 400.0, 2400.0, 1200.0]]),
        "scores": torch.ones(1),
        "labels": torch.zeros(1, dtype=torch.int64),
        "names": ["ellipse"],
    }
    monkeypatch.setattr(Predictor, "_report", lambda *_: detection)
    assert run(tmp_path / "a.png", "--output", tmp_path / "out") == 0
    picture = np.asarray(Image.open(tmp_path / "out" / "a.png").convert("RGB")).astype(int)
    assert picture.shape == (800, 1600, 3)
    ink = np.array([int(colour(0)[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(picture - ink).max(-1) < 30)
    below_label = rows > 230
    found = columns[below_label].min(), columns[below_label].max(), rows.max()
    assert np.abs(np.array(found) - [400, 1200, 600]).max() <= 3


def test_the_stages_come_from_the_same_pass_as_the_detections(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, seen = SparseRCNN.prepare, []

    def counted(model: SparseRCNN, images: list[torch.Tensor]) -> object:
        seen.append(len(images))
        return prepare(model, images)

    monkeypatch.setattr(SparseRCNN, "prepare", counted)
    assert run(folder, "--output", tmp_path / "with", "--stages") == 0
    assert sum(seen) == 5
    assert run(folder, "--output", tmp_path / "without") == 0
    with_stages, without = read_records(tmp_path / "with"), read_records(tmp_path / "without")
    for a, b in zip(with_stages, without, strict=True):
        assert a["names"] == b["names"] and np.allclose(a["boxes"], b["boxes"], atol=0.01)
    assert len(list((tmp_path / "with" / "stages").iterdir())) == 5


def test_the_help_says_that_the_default_downloads_much(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "420 MB" in text and "~/.cache/torch/hub/checkpoints" in text


def test_wrong_arguments(shape: Image.Image, tmp_path: Path) -> None:
    shape.save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for arguments, words in {
        (tmp_path / "none.jpg",): "none.jpg: no such file",
        (tmp_path / "empty",): "no images in this folder",
        (): "give images",
        ("",): "empty text",
        ("/dev/zero",): "/dev/zero: this is a device",
        ("https://example.org/bus.jpg",): "https://example.org/bus.jpg: this is a URL; download",
        (tmp_path / "a.png", "--score-threshold", "2"): "0 … 1",
        (tmp_path / "a.png", "--batch-size", "0"): "--batch-size",
        (tmp_path / "a.png", "--test-size", "0"): "--test-size",
        (tmp_path / "a.png", "--classes", "cat"): "ellipse, rectangle, triangle",
        ("--classes", "ellipse", "none.jpg"): "none.jpg after --classes: no such file; give images",
        (tmp_path / "a.png", "--output", tmp_path): r"a\.png there is one of the inputs",
    }.items():
        with pytest.raises(UserError, match=words):
            run(*arguments)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "empty"]


def test_an_input_in_the_folder_of_the_stages_is_not_overwritten(
    shape: Image.Image, tmp_path: Path
) -> None:
    (tmp_path / "stages").mkdir()
    shape.save(tmp_path / "stages" / "a.png")
    with pytest.raises(UserError, match=r"a\.png there is one of the inputs"):
        run(tmp_path / "stages" / "a.png", "--output", tmp_path, "--stages")


def test_output_names_never_collide() -> None:
    files = [Path(name) for name in ("x/a.jpg", "x/a.png", "y/A.png", "x/a_2.jpg", "b.png")]
    assert output_names(files) == ["a", "a_2", "A_3", "a_2_2", "b"]
    # é as one character and as two; macOS does not tell them apart.
    assert output_names([Path("\u00e9.png"), Path("e\u0301.png")]) == ["\u00e9", "e\u0301_2"]


# --- which files ---


def test_every_suffix_that_pillow_reads_is_taken_and_the_rest_is_counted(
    shape: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    formats = {"PNG": "png", "jfif": "jpeg", "jpe": "jpeg", "tga": "tga", "ppm": "ppm"}
    if features.check("jpg_2000"):
        formats["jp2"] = "jpeg2000"
    if features.check("avif"):
        formats["avif"] = "avif"
    for suffix, kind in formats.items():
        shape.save(folder / f"{suffix}.{suffix}", format=kind)
    for name in ("a.txt", "b.TXT", "labels.json", "movie.mp4", "table.h5", "README"):
        (folder / name).write_text("not an image")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    assert run(folder, "--output", tmp_path / "out") == 0
    assert stems(read_records(tmp_path / "out")) == "".join(sorted(formats))
    line = capsys.readouterr().out.splitlines()[0]
    counts = line.removeprefix("passed over in the folders: ").split(", ")
    assert counts[0] == "2 .txt"
    others = ["1 .h5", "1 .json", "1 .mp4", "1 broken link", "1 folder", "1 without a suffix"]
    assert sorted(counts[1:]) == others


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "labels.json").write_text("")
    with pytest.raises(UserError, match=r"only 1 \.json, 1 folder"):
        run(tmp_path)


@pytest.mark.parametrize(
    "order",
    [
        "--classes triangle INPUT",
        "--classes triangle ellipse INPUT",
        "INPUT --classes ellipse triangle",
    ],
)
def test_an_image_after_the_classes_is_an_image(
    order: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "triangle").mkdir()  # a class, even if there is a folder of that name
    arguments = order.replace("INPUT", str(folder / "a.png")).split()
    assert run(*arguments, "--output", tmp_path / "out", "--score-threshold", "0") == 0
    [record] = read_records(tmp_path / "out")
    assert set(record["names"]) == {"triangle", "ellipse"} & set(arguments)


def test_classes_alone_are_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ellipse").mkdir()
    with pytest.raises(UserError, match="give images"):
        run("--classes", "ellipse")


# --- what fails costs only itself ---


def test_very_long_images(folder: Path, tmp_path: Path) -> None:
    for size in ((3000, 1), (1, 3000), (60_000, 2)):
        Image.new("RGB", size).save(folder / f"{size[0]}.png")
    assert run(folder, "--output", tmp_path / "out", "--stages") == 0
    assert len(read_records(tmp_path / "out")) == 8
    assert Image.open(tmp_path / "out" / "3000.png").size == (1600, 1)
    assert Image.open(tmp_path / "out" / "1.png").size == (1, 1600)


def test_a_file_name_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    name = b"\xc4\xe3.png"  # from a zip file of another locale
    try:
        os.rename(folder / "b.png", os.path.join(os.fsencode(folder), name))
    except OSError:
        pytest.skip("this file system has only names in Unicode")
    assert run(folder, "--output", tmp_path / "out") == 0
    records = read_records(tmp_path / "out")
    assert len(records) == 5
    assert os.fsencode(records[-1]["file"]) == os.path.join(os.fsencode(folder), name)


@pytest.mark.parametrize(
    "name", ["$$", "$\\frac{$", "a\nb", "猫", "%s {x} \\", "x" * 500, "\ud800"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_class_names_are_drawn_as_they_are(name: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(WEIGHTS)
    checkpoint["class_names"] = [name, "rectangle", "triangle"]
    save_checkpoint(tmp_path / "named.pt", checkpoint)
    command = [str(folder / "a.png"), "--weights", str(tmp_path / "named.pt"), "--device", "cpu"]
    command += ["--workers", "0", "--output", str(tmp_path / "out"), "--score-threshold", "0"]
    assert main([*command, "--stages"]) == 0
    assert name in read_records(tmp_path / "out")[0]["names"]
    for where in ("a.png", "stages/a.png"):
        assert np.asarray(Image.open(tmp_path / "out" / where)).std() > 1


def test_what_is_written_is_utf8_in_any_locale(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(WEIGHTS)
    checkpoint["class_names"] = ["猫", "собака", "Kätzchen"]
    save_checkpoint(tmp_path / "named.pt", checkpoint)
    os.rename(folder / "a.png", folder / "猫 ×.png")
    command = [sys.executable, str(ROOT / "predict.py"), str(folder), "--device", "cpu"]
    command += ["--weights", str(tmp_path / "named.pt"), "--output", str(tmp_path / "out")]
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [*command, "--workers", "0"], env=os.environ | locale, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out")
    assert records[-1]["file"] == str(folder / "猫 ×.png")
    found = {name for record in records for name in record["names"]}
    assert found and found <= set(checkpoint["class_names"])
    assert (tmp_path / "out" / "猫 ×.png").exists()


def fail_on(name: str, error: BaseException) -> Callable:
    """`save_picture`, but raising an error at a picture of that name."""
    save_picture = predict.save_picture

    def save(path: Path, *rest: object) -> None:
        if path.name == name:
            raise error
        save_picture(path, *rest)

    return save


def test_a_picture_that_cannot_be_drawn_is_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(predict, "save_picture", fail_on("b.png", ValueError("no\nway")))
    assert run(folder, "--output", tmp_path / "out") == 1
    assert stems(read_records(tmp_path / "out")) == "acde"
    printed = capsys.readouterr()
    assert printed.err == f"predict.py: skipped {folder / 'b.png'}: ValueError: no\n"
    assert "4 images" in printed.out and "1 skipped" in printed.out


def test_an_image_that_the_model_fails_on_does_not_take_its_batch_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward = SparseRCNN.forward

    def limited(model: SparseRCNN, images: list[torch.Tensor]) -> list[dict]:
        if len(images) > 2 or images[0].shape[1] != images[0].shape[2]:
            raise RuntimeError("out of memory")
        return forward(model, images)

    monkeypatch.setattr(SparseRCNN, "forward", limited)
    assert run(folder, "--output", tmp_path / "out", "--batch-size", "4") == 1
    assert stems(read_records(tmp_path / "out")) == "abde"
    assert "c.png: RuntimeError: out of memory" in capsys.readouterr().err


def test_too_little_memory_for_every_image_is_a_mistake_of_the_user(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="memory") as full:
        torch.empty(2**60)
    monkeypatch.setattr(SparseRCNN, "forward", Mock(side_effect=full.value))
    assert run_main(lambda: run(folder, "--output", tmp_path / "out"), "predict.py") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("predict.py: the memory is full; take a smaller --max-size")


@pytest.mark.parametrize("name", ["folder", "loop", "long", "equal"])
def test_a_picture_that_cannot_have_its_name_is_skipped(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Alone too, where a bug would be raised."""
    output, file = tmp_path / "out", folder / "a.png"
    output.mkdir()
    inputs = [file]
    if name == "folder":
        (output / "a.png").mkdir()
    elif name == "loop":  # the link is replaced
        (output / "a.png").symlink_to("a.png")
    elif name == "long":  # 253 letters without a suffix; with .png they are 257
        inputs = [file.rename(folder / ("a" * 253))]
    elif name == "equal":  # the second one is to be called …_2.png
        inputs = [file.rename(folder / ("a" * 251)), folder / ("a" * 251 + ".bmp")]
        Image.open(inputs[0]).save(inputs[1])
    status = run(*inputs, "--output", output)
    assert status == int(name != "loop")
    assert len(read_records(output)) == len(inputs) - status
    printed = capsys.readouterr().err
    assert printed.count("\n") == status and ("a.png: Is a dir" in printed) == (name == "folder")


def test_an_output_that_links_to_itself_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OSError, match="out"):
        run(folder, "--output", tmp_path / "out")


def test_a_bug_that_every_image_meets_is_raised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.json").write_text("yesterday's")
    monkeypatch.setattr(predict, "save_picture", lambda *_: undefined_name)  # noqa: F821
    with pytest.raises(RuntimeError, match=r"(?s)all 5 images failed.*NameError.*undefined_name"):
        run(folder, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "detections.json").read_text() == "yesterday's"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_done(
    number: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    save_picture = predict.save_picture

    def save(path: Path, *rest: object) -> None:
        if path.name == "d.png":
            signal.raise_signal(number)
        save_picture(path, *rest)

    monkeypatch.setattr(predict, "save_picture", save)
    assert run(folder, "--output", tmp_path / "out") == 128 + number
    assert stems(read_records(tmp_path / "out")) == "abc"
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.png", "c.png", "detections.json"]
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "3 of 5 images are done" in printed.err


def test_a_full_disk_ends_the_run_with_what_was_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(predict, "save_picture", fail_on("c.png", full))
    with pytest.raises(UserError, match="No space left on device; 2 of 5 images are done"):
        run(folder, "--output", tmp_path / "out")
    assert stems(read_records(tmp_path / "out")) == "ab"


def test_results_of_before_stay_until_there_are_new_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "detections.json").write_text("yesterday's")
    monkeypatch.setattr(predict, "save_picture", fail_on("a.png", KeyboardInterrupt()))
    assert run(folder, "--output", output) == 130
    assert (output / "detections.json").read_text() == "yesterday's"
    seen = []
    monkeypatch.undo()
    save_picture = predict.save_picture
    monkeypatch.setattr(
        predict,
        "save_picture",
        lambda *a: seen.append((output / "detections.json").read_text()) or save_picture(*a),
    )
    assert run(folder, "--output", output) == 0
    assert seen == ["yesterday's"] * 5
    assert stems(read_records(output)) == "abcde"


def test_a_place_that_cannot_be_written_to_is_found_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "detect_in_files", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(folder, "--output", tmp_path / "file")
    (tmp_path / "out" / "detections.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"detections\.json'; no image was done"):
        run(folder, "--output", tmp_path / "out")


def test_a_closed_standard_error_does_not_end_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "b.png").write_bytes(b"broken")
    for stream in (None, FullDisk()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert run(folder, "--output", tmp_path / "out") == 1
        assert stems(read_records(tmp_path / "out")) == "acde"
        monkeypatch.undo()


# --- worker processes ---


def test_the_workers_get_no_model(predictor: Predictor, folder: Path) -> None:
    files = sorted(folder.iterdir())
    assert len(pickle.dumps(ImageFiles(files, predictor.transforms))) < 5_000


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_way_to_start_a_worker(method: str, folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").write_bytes(b"broken")
    program = f"""
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    import predict
    # A model that cannot be sent, such as a session of onnxruntime.
    load = predict.Predictor._load
    def load_and_lock(predictor):
        loaded = load(predictor)
        loaded[0].session = sys.stdout
        return loaded
    predict.Predictor._load = load_and_lock
    sys.exit(predict.main(sys.argv[1:]))
"""
    (tmp_path / "start.py").write_text(program)
    command = [sys.executable, str(tmp_path / "start.py"), str(folder), "--weights", str(WEIGHTS)]
    command += ["--device", "cpu", "--workers", "1", "--output", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "b.png: cannot be read" in done.stderr
    assert stems(read_records(tmp_path / "out")) == "acde"


# --- ONNX ---


def test_an_onnx_file_takes_the_place_of_the_checkpoint(
    shape: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shape.crop((0, 0, 96, 70)).save(tmp_path / "a.png")
    # With two of the six stages, which are exported in a third of the time.
    checkpoint = load_checkpoint(WEIGHTS)
    checkpoint["config"]["num_stages"] = 2
    later = tuple(f"head.stages.{stage}." for stage in range(2, 6))
    model = {key: v for key, v in checkpoint["model"].items() if not key.startswith(later)}
    save_checkpoint(tmp_path / "model.pt", {**checkpoint, "model": model})
    export.main([str(tmp_path / "model.pt"), str(tmp_path / "model.onnx")])
    onnx = ["--weights", str(tmp_path / "model.onnx"), "--device", "cpu", "--workers", "0"]
    onnx += ["--output", str(tmp_path / "out")]
    assert main([str(tmp_path / "a.png"), *onnx]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    record = read_records(tmp_path / "out")[0]
    found = {key: torch.tensor(record[key]) for key in ("boxes", "scores")}
    predictor = Predictor(tmp_path / "model.pt", device="cpu")
    same({**found, "names": record["names"]}, predictor(tmp_path / "a.png"))

    with pytest.raises(UserError, match="--amp"):
        main([str(tmp_path / "a.png"), *onnx, "--amp", "bf16"])
    with pytest.raises(UserError, match="--stages"):
        main([str(tmp_path / "a.png"), *onnx, "--stages"])
    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.onnx.*damaged"):
        main([str(tmp_path / "a.png"), *onnx])

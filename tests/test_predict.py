"""predict.py: every form of an image gives the same detections; nothing that was found is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import predict
from model import load_model
from predict import Predictor, main, output_names
from shapes import ShapesDataset
from support.checkpoint import load_checkpoint, save_checkpoint
from support.cli import run_main
from support.errors import UserError
from visualize import colour

WEIGHTS = ROOT / "assets" / "shapes.pt"


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
    return main([*common, *map(str, arguments)])


def read_records(output: Path) -> list[dict]:
    return json.loads((output / "detections.json").read_text(encoding="utf-8"))


def stems(output: Path) -> str:
    return "".join(Path(record["file"]).stem for record in read_records(output))


# --- Predictor ---


def test_detections_are_the_models_in_pixels_of_the_image_given(shape: Image.Image) -> None:
    predictor = Predictor(WEIGHTS, device="cpu")
    found = predictor(shape)
    pixels = torch.from_numpy(np.array(shape)).permute(2, 0, 1)
    with torch.inference_mode():
        [expected] = load_model(WEIGHTS)[0]([pixels])
    count = int((expected["scores"] >= 0.4).sum())
    assert (found["boxes"] - expected["boxes"][:count]).abs().max() < 0.05
    assert (found["scores"] - expected["scores"][:count]).abs().max() < 1e-4
    target = ShapesDataset("demo", "val", 2)[1][1]
    assert sorted(found["labels"].tolist()) == sorted(target["labels"].tolist())
    classes = ["ellipse", "rectangle", "triangle"]
    assert found["names"] == [classes[label] for label in found["labels"].tolist()]
    twice = predictor(shape.resize((192, 192), Image.Resampling.BICUBIC))
    assert (twice["boxes"] / 2 - found["boxes"]).abs().max() < 2


def test_a_list_gives_a_list_and_sizes_do_not_mix(shape: Image.Image) -> None:
    predictor = Predictor(WEIGHTS, device="cpu", batch_size=2)
    sizes, model = [], predictor.model
    predictor.model = lambda images: sizes.append([i.shape[1] for i in images]) or model(images)
    images = [shape, shape, shape, shape.crop((0, 0, 96, 64)), shape]
    found = predictor(images)
    assert sizes == [[96, 96], [96], [64], [96]] and predictor([]) == []
    for image, one in zip(images, found, strict=True):
        assert (one["boxes"] - predictor(image)["boxes"]).abs().max() < 0.05


def test_threshold_and_classes(shape: Image.Image) -> None:
    everything = Predictor(WEIGHTS, device="cpu", score_threshold=0.0)(shape)
    assert len(everything["names"]) == 20 and (everything["scores"].diff() <= 0).all()
    wanted = {"triangle", "ellipse"}
    found = Predictor(WEIGHTS, device="cpu", score_threshold=0.0, classes=wanted)(shape)
    assert found["names"] == [name for name in everything["names"] if name in wanted]
    assert set(found["names"]) == wanted


# --- the command line ---


def test_a_folder_with_a_broken_file(
    shape: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    shape.save(folder / "a.png")
    shape.convert("L").resize((200, 100)).save(folder / "A.jpg")
    shape.resize((1, 1)).save(folder / "one.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("not taken")
    (folder / ".hidden.png").write_bytes(b"not taken")
    assert run(folder, folder / "a.png", "--output", output, "--stages") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"predict.py: skipped {folder / 'broken.jpg'}: cannot be read")
    assert printed.err.count("\n") == 1
    assert "4 images and 2 other entries" in printed.out and "3 of 4 images" in printed.out

    records = read_records(output)
    sizes = [(Path(r["file"]).name, r["width"], r["height"]) for r in records]
    assert sizes == [("A.jpg", 200, 100), ("a.png", 96, 96), ("one.png", 1, 1)]
    assert list(records[1]) == ["file", "width", "height", "boxes", "scores", "labels", "names"]
    expected = Predictor(WEIGHTS, device="cpu")(folder / "a.png")
    assert records[1]["boxes"] == expected["boxes"].tolist()
    written = {path.relative_to(output).as_posix() for path in output.rglob("*.*")}
    pictures = {f"{where}{name}.jpg" for where in ("", "stages/") for name in ("A", "a_2", "one")}
    assert written == pictures | {"detections.json"}


def test_wanted_classes_are_drawn_in_place_on_a_smaller_copy(
    shape: Image.Image, tmp_path: Path
) -> None:
    shape.resize((3200, 1600)).save(tmp_path / "a.png")
    # The classes are one word, so that they do not swallow the input behind them.
    inputs = ("--classes", "triangle,ellipse", tmp_path / "a.png")
    assert run(*inputs, "--output", tmp_path / "out") == 0
    picture = np.asarray(Image.open(tmp_path / "out" / "a.jpg")).astype(int)
    assert picture.shape == (800, 1600, 3)
    [record] = read_records(tmp_path / "out")
    assert set(record["names"]) == {"triangle", "ellipse"}
    for (x1, _, x2, y2), label in zip(record["boxes"], record["labels"], strict=True):
        ink = [int(colour(label)[i : i + 2], 16) for i in (1, 3, 5)]
        lower_side = picture[round(y2 / 2) - 2 : round(y2 / 2) + 1, round(x1 / 2) : round(x2 / 2)]
        assert (np.abs(lower_side - ink) < 12).all()


def test_wrong_arguments(shape: Image.Image, tmp_path: Path) -> None:
    shape.save(tmp_path / "a.png")
    shape.save(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    shape.save(tmp_path / "photos" / "b.png")
    with pytest.raises(UserError, match=r"--weights .*assets/blood\.pt.*sparse-rcnn-r50-100"):
        main([str(tmp_path / "a.png")])
    for arguments, words in {
        (tmp_path / "none.jpg",): "none.jpg' is neither a file nor a folder",
        (tmp_path / "empty",): "0 images and 0 other entries",
        (): "give images",
        ("", "/dev/zero"): "'' is neither",
        (tmp_path / "a.png", "--score-threshold", "2"): "0 … 1",
        (tmp_path / "a.png", "--classes", "cat"): r"\['cat'\]; it has ellipse, rectangle, triangle",
        (tmp_path / "a.jpg", "--output", tmp_path): r"a\.jpg is one of the inputs",
        (tmp_path / "photos", "--output", tmp_path / "photos"): "inputs of the next run",
    }.items():
        with pytest.raises(UserError, match=words):
            run(*arguments)
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.png", "empty", "photos"]
    for wrong in ({"score_threshold": 40}, {"batch_size": 0}, {"amp": "fp8"}):
        with pytest.raises(UserError, match="should"):
            Predictor(WEIGHTS, "cpu", **wrong)


def test_no_picture_overwrites_another_or_an_input(shape: Image.Image, tmp_path: Path) -> None:
    files = [Path(name) for name in ("x/a.png", "x/a.jpg", "y/A.png", "x/a_2.jpg", "b.png")]
    assert output_names(files) == ["a.jpg", "a_2.jpg", "A_3.jpg", "a_2_2.jpg", "b.jpg"]
    # é as one character and as two; macOS does not tell them apart.
    assert output_names([Path("\u00e9"), Path("e\u0301")]) == ["\u00e9.jpg", "e\u0301_2.jpg"]
    (tmp_path / "stages").mkdir()
    shape.save(tmp_path / "stages" / "a.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "stages" / "a.jpg")
    with pytest.raises(UserError, match="is one of the inputs"):
        run(tmp_path / "stages" / "a.jpg", "--output", tmp_path, "--stages")
    with pytest.raises(UserError, match="is one of the inputs"):
        run(tmp_path / "link.jpg", "--output", tmp_path)


def test_images_of_any_shape_without_detections(folder: Path, tmp_path: Path) -> None:
    for size in ((3000, 1), (1, 3000), (60_000, 2), (640, 480)):
        Image.new("RGB", size, (9, 99, 199)).save(folder / f"{size[0]}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(folder, "--output", tmp_path / "out", "--score-threshold", "0.9") == 0
    assert len(read_records(tmp_path / "out")) == 9
    for name, size in (("3000", (1600, 1)), ("1", (1, 1600)), ("640", (640, 480))):
        assert Image.open(tmp_path / "out" / f"{name}.jpg").size == size
    colours = np.asarray(Image.open(tmp_path / "out" / "640.jpg")).astype(int)
    assert (np.abs(colours - (9, 99, 199)) < 3).all()


def test_names_of_classes_and_files_are_right_in_any_locale(folder: Path, tmp_path: Path) -> None:
    classes = ["$\\frac{$", "a\nb 猫\ud800", "x" * 500]
    save_checkpoint(tmp_path / "named.pt", {**load_checkpoint(WEIGHTS), "class_names": classes})
    files = [os.fsencode("猫 ×.png"), b"\xc4\xe3.png"]  # the second from a zip of another locale
    for old, name in zip("ab", files, strict=True):
        os.rename(folder / f"{old}.png", os.path.join(os.fsencode(folder), name))
    command = [sys.executable, str(ROOT / "predict.py"), str(folder), "--device", "cpu", "--stages"]
    command += ["--weights", str(tmp_path / "named.pt"), "--output", str(tmp_path / "out")]
    command += ["--score-threshold", "0"]  # all classes
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(command, env=os.environ | locale, capture_output=True)
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out")
    assert {name for record in records for name in record["names"]} == set(classes)
    found = [os.path.basename(os.fsencode(record["file"])) for record in records]
    assert len(found) == 5 and set(files) < set(found)
    assert (tmp_path / "out" / "stages" / "猫 ×.jpg").exists()


# --- threads, and how a run ends ---


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_decode_ahead_in_order(
    workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_image, threads = predict.to_image, set()

    def decode(image: object) -> torch.Tensor:
        if isinstance(image, Path):
            threads.add(threading.current_thread())
        return to_image(image)

    monkeypatch.setattr(predict, "to_image", decode)
    (folder / "b.png").write_bytes(b"broken")
    assert run(folder, "--output", tmp_path / "out", "--workers", workers) == 1
    assert stems(tmp_path / "out") == "acde"
    assert (threading.main_thread() in threads) == (workers == 0)


ENDS = {  # what happens, and the exit code
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), 130),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), 143),
    "a full disk": (lambda: Path("/dev/full").write_text("x"), 2),
    "a bug": (lambda: 1 / 0, None),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", ["a.jpg", "d.jpg"])
def test_whatever_ends_a_run_what_was_done_is_kept(
    name: str, end: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stop, status), output, save = ENDS[end], tmp_path / "out", predict.save_picture

    def save_or_stop(path: Path, *rest: object) -> None:
        stop() if path.name == name else save(path, *rest)

    monkeypatch.setattr(predict, "save_picture", save_or_stop)
    output.mkdir()
    (output / "detections.json").write_text("yesterday's")
    with pytest.raises((SystemExit, ZeroDivisionError)) as caught:
        sys.exit(run_main(lambda: run(folder, "--output", output), "predict.py"))
    assert getattr(caught.value, "code", None) == status
    if name == "a.jpg":  # nothing was done: the earlier results stay
        assert (output / "detections.json").read_text() == "yesterday's"
        assert os.listdir(output) == ["detections.json"]
    else:
        assert stems(output) == "abc"
        assert sorted(os.listdir(output)) == ["a.jpg", "b.jpg", "c.jpg", "detections.json"]

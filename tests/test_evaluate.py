"""Evaluation against pycocotools called directly, and on the data sets that break evaluators."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, CocoFactory, torchrun
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from data import CocoDataset, eval_transforms
from evaluate import (
    coco_metrics,
    coco_results,
    detect,
    evaluate,
    format_table,
    main,
    same_padding_batches,
)
from model import SparseRCNN, build_model
from shapes import ShapesDataset
from support.checkpoint import save_checkpoint
from support.errors import UserError


def random_truth(num_images: int = 12, seed: int = 0) -> tuple[COCO, list[dict]]:
    """Ground truth with crowds, empty images and all sizes, and detections near and far from it."""
    rng = np.random.default_rng(seed)
    images = [{"id": 10 * i + 1, "width": 400, "height": 300} for i in range(num_images)]
    annotations, detections = [], []
    for image in images[2:]:  # two images without objects
        for _ in range(rng.integers(1, 7)):
            side = rng.choice([15, 60, 150])
            x, y, w, h = *rng.uniform(0, 140, 2), *(side * rng.uniform(0.8, 1.2, 2))
            category = int(rng.choice([5, -2, 40]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 3)):
                box = [float(v) for v in np.array([x, y, w, h]) + rng.normal(0, side / 12, 4)]
                detections.append(
                    {
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": box,
                        "score": float(rng.random()),
                    }
                )
    detections += [
        {
            "image_id": image["id"],
            "category_id": 5,
            "bbox": [0, 0, 30, 30],
            "score": float(rng.random()),
        }
        for image in images
    ]
    truth = COCO()
    truth.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in (5, -2, 40)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, detections


def test_equals_pycocotools_called_directly() -> None:
    truth, detections = random_truth()
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    metrics = coco_metrics(truth, detections)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [metrics[name] for name in names] == pytest.approx(run.stats[:6].tolist(), abs=1e-12)
    assert metrics["AR"] == pytest.approx(run.stats[8], abs=1e-12)
    assert 0.1 < metrics["AP"] < 0.9  # otherwise this shows little
    for k, category in enumerate(run.params.catIds):
        precision = run.eval["precision"][:, :, k, 0, -1]
        assert metrics["per_class"][f"class {category}"] == pytest.approx(
            precision[precision > -1].mean()
        )


def test_max_dets_counts_the_best_detections_only() -> None:
    truth, detections = random_truth()
    best = []
    for image_id in truth.getImgIds():
        for category in (5, -2, 40):  # pycocotools counts them class by class
            own = [
                d for d in detections if d["image_id"] == image_id and d["category_id"] == category
            ]
            best += sorted(own, key=lambda d: -d["score"])[:2]
    expected, limited, unlimited = (
        coco_metrics(truth, best),
        coco_metrics(truth, detections, 2),
        coco_metrics(truth, detections),
    )
    assert limited == expected and limited["AR"] < unlimited["AR"]


def test_no_detection_at_all_is_zero_and_no_object_at_all_is_undefined() -> None:
    truth, detections = random_truth()
    nothing_found = coco_metrics(truth, [])
    assert nothing_found["AP"] == nothing_found["AR"] == 0.0
    truth.dataset["annotations"] = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    for found in (detections, []):
        assert coco_metrics(truth, found)["AP"] == -1.0
    metrics = coco_metrics(truth, []) | {"images": 12, "max_dets": 100}
    metrics["speed"] = {
        "fps": 1.0,
        "device": "cpu",
        "dtype": "float32",
        "resolution": "1×1",
        "batch_size": 1,
    }
    assert "–" in format_table(metrics) and "-1" not in format_table(metrics, per_class=True)


class Oracle(nn.Module):
    """Answers with what it is given: the boxes in the pixels of the *resized* images."""

    def __init__(self, answers: list[dict]) -> None:
        super().__init__()
        self.answers, self.sizes = answers, []

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        self.sizes.append([tuple(image.shape[1:]) for image in images])
        first = sum(len(sizes) for sizes in self.sizes[:-1])
        return self.answers[first : first + len(images)]


def test_boxes_come_back_in_the_pixels_of_the_file(make_coco: CocoFactory) -> None:
    json_file, folder = make_coco(size=(64, 48), num_images=3)
    dataset = CocoDataset(json_file, folder, eval_transforms(TINY))
    answers = [
        {
            "boxes": dataset[i][1]["boxes"].as_subclass(
                torch.Tensor
            ),  # as large as the transforms made them
            "labels": dataset[i][1]["labels"],
            "scores": torch.linspace(0.9, 0.5, len(dataset[i][1]["labels"])),
        }
        for i in range(3)
    ]
    results, speed = detect(Oracle(answers), dataset, CPU, batch_size=2, progress=False)
    assert coco_metrics(dataset.coco(), results)["AP"] == pytest.approx(1.0)
    assert {result["category_id"] for result in results} <= {7, -3, 1000}
    assert speed["resolution"] == "72×96" and speed["dtype"] == "float32" and speed["fps"] > 0


def test_only_images_of_one_size_are_batched() -> None:
    dataset = ShapesDataset("demo", "val", 7)
    dataset.sizes_hw = np.array(
        [[96, 96], [50, 96], [96, 96], [96, 96], [50, 96], [96, 50], [96, 96]]
    )
    batches = same_padding_batches(dataset, 3)
    assert sorted(sum(batches, [])) == list(range(7)) and max(map(len, batches)) == 3
    assert all(len({tuple(dataset.sizes_hw[i]) for i in batch}) == 1 for batch in batches)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.manual_seed(0)
    model = build_model(TINY)
    for stage in model.head.stages:  # boxes stay what the proposals are: the whole image
        nn.init.zeros_(stage.box_deltas.weight)
        nn.init.zeros_(stage.box_deltas.bias)
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "config": TINY.to_dict(),
            "class_names": ["cat", "dog", "cow"],
            "category_ids": [1, 2, 3],
        },
    )
    return path


def test_the_command_line_writes_what_it_prints(
    weights: Path, make_coco: CocoFactory, tmp_path: Path
) -> None:
    def empty(coco: dict) -> None:
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != 2]
        coco["annotations"][0]["iscrowd"] = 1
        # With objects as large as the image the AP is not 0.
        whole = {"bbox": [0, 0, 64, 48], "area": 64 * 48, "iscrowd": 0}
        coco["annotations"] += [
            {**whole, "id": 90 + 3 * k + c, "image_id": image_id, "category_id": category}
            for k, image_id in enumerate((1, 3, 4))
            for c, category in enumerate((7, -3, 1000))
        ]

    json_file, folder = make_coco(num_images=5, edit=empty)
    command = [sys.executable, str(ROOT / "evaluate.py"), "--weights", str(weights)]
    command += ["--val-json", str(json_file), "--val-images", str(folder), "--device", "cpu"]
    command += ["--workers", "0", "--per-class", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    detections = json.loads((tmp_path / "out/detections.json").read_text())
    assert metrics["AP"] > 0 and f"{100 * metrics['AP']:.1f}" in done.stdout
    assert "5 images" in done.stdout and "cow" in done.stdout
    assert "float32" in done.stdout and "72×96" in done.stdout and "cpu" in done.stdout
    # The saved detections give the printed figures.
    truth = CocoDataset(json_file, folder).coco()
    assert coco_metrics(truth, detections)["AP"] == metrics["AP"]
    assert {d["image_id"] for d in detections} <= set(range(1, 6))


def test_mistakes_of_the_user(weights: Path, make_coco: CocoFactory, tmp_path: Path) -> None:
    json_file, folder = make_coco(categories={1: "cat", 2: "bird", 3: "cow"})
    data = ["--val-json", str(json_file), "--val-images", str(folder)]
    common = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(UserError, match="bird"):
        main(["--weights", str(weights), *data, *common])
    with pytest.raises(UserError, match="no such checkpoint"):
        main(["--weights", str(tmp_path / "none.pt"), *data, *common])
    for flag in ("--max-dets", "--batch-size", "--test-size", "--max-size"):
        with pytest.raises(UserError, match=flag):
            main(["--weights", str(weights), *data, *common, flag, "0"])
    with pytest.raises(UserError, match=r"model\.onnx: an ONNX file cannot be evaluated"):
        main(["--weights", str(tmp_path / "model.onnx"), *data, *common])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main(["--weights", str(weights), *data, "--output", str(tmp_path / "file" / "out")])


# --- other classes ---


def test_detections_of_classes_that_the_data_lacks_are_left_out() -> None:
    found = {
        "boxes": torch.tensor([[0.0, 0, 4, 4], [2, 4, 6, 10], [1, 1, 3, 3]]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.tensor([0, 2, 1]),
    }
    target = {"image_id": 5, "size_hw": (30, 20)}
    [record] = coco_results(found, target, (15, 10), category_ids=(None, None, 40))
    expected = {"image_id": 5, "category_id": 40, "bbox": [4.0, 8.0, 8.0, 12.0]}
    assert record == expected | {"score": pytest.approx(0.8)}


def test_ap_is_over_the_classes_that_are_there(
    weights: Path, make_coco: CocoFactory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = {}
    for name, categories in {
        "all": {1: "cat", 2: "dog", 3: "cow"},
        "fewer": {9: "cow", 4: "cat"},
        "more": {1: "cat", 2: "dog", 3: "cow", 4: "bird"},
    }.items():
        json_file, folder = make_coco(name, categories=categories)
        data[name] = ["--val-json", str(json_file), "--val-images", str(folder)]
    common = ["--weights", str(weights), "--device", "cpu", "--workers", "0", "--per-class"]
    output = tmp_path / "out"

    assert main([*common, *data["all"], "--output", str(output)]) == 0
    assert "note" not in capsys.readouterr().out

    assert main([*common, *data["fewer"], "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "lacks 1 of the 3 classes: 'dog'" in printed and "left out" in printed
    metrics = json.loads((output / "metrics.json").read_text())
    detections = json.loads((output / "detections.json").read_text())
    assert set(metrics["per_class"]) == {"cat", "cow"}
    assert detections and {detection["category_id"] for detection in detections} <= {9, 4}
    # Each image gives N = 7 detections, or fewer where boxes have no area.
    assert metrics["other_classes"] > 0
    assert len(detections) + metrics["other_classes"] <= 4 * TINY.num_proposals

    with pytest.raises(UserError, match="bird.*--ignore-new-classes"):
        main([*common, *data["more"], "--output", str(output)])
    assert main([*common, *data["more"], "--output", str(output), "--ignore-new-classes"]) == 0
    assert "'bird'" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["per_class"]) == {"cat", "dog", "cow"}


# --- what fails costs only itself ---


@pytest.fixture
def command(weights: Path, make_coco: CocoFactory, tmp_path: Path) -> list[str]:
    """A command line on five images, one at a time."""
    json_file, folder = make_coco(num_images=5, categories={1: "cat", 2: "dog", 3: "cow"})
    flags = ["--weights", str(weights), "--device", "cpu", "--workers", "0"]
    flags += ["--val-json", str(json_file), "--val-images", str(folder)]
    return [*flags, "--output", str(tmp_path / "out")]


def read_results(output: Path) -> tuple[dict, list[dict]]:
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return metrics, json.loads((output / "detections.json").read_text(encoding="utf-8"))


def break_images(tmp_path: Path, *numbers: int) -> None:
    for number in numbers:
        (tmp_path / "train_images" / f"{number}.jpg").write_bytes(b"broken")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_skipped_and_said(
    workers: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    break_images(tmp_path, 3)
    assert main([*command, "--workers", workers, "--batch-size", "2"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("evaluate.py: skipped ") and "3.jpg" in printed.err
    assert "on 4 of 5 images" in printed.out
    metrics, detections = read_results(tmp_path / "out")
    assert metrics["images"] == 4
    assert len(metrics["skipped"]) == 1 and "3.jpg" in metrics["skipped"][0]
    assert {detection["image_id"] for detection in detections} == {1, 2, 4, 5}
    # The objects of the skipped image do not count as missed.
    truth = CocoDataset(tmp_path / "train.json", tmp_path / "train_images").coco()
    kept = coco_metrics(truth, detections, image_ids=[1, 2, 4, 5])
    assert {name: metrics[name] for name in kept} == kept


def test_a_broken_image_is_an_error_in_python(command: list[str], tmp_path: Path) -> None:
    break_images(tmp_path, 3)
    dataset = CocoDataset(tmp_path / "train.json", tmp_path / "train_images", eval_transforms(TINY))
    with pytest.raises(UserError, match=r"3\.jpg"):
        evaluate(build_model(TINY), dataset, CPU, progress=False)


def test_two_processes_skip_what_each_of_them_meets(command: list[str], tmp_path: Path) -> None:
    break_images(tmp_path, 2, 3)
    done = torchrun(str(ROOT / "evaluate.py"), *command)
    assert done.returncode == 1
    metrics, detections = read_results(tmp_path / "out")
    assert metrics["images"] == 3 and len(metrics["skipped"]) == 2
    assert {detection["image_id"] for detection in detections} == {1, 4, 5}
    assert done.stderr.count("evaluate.py: skipped") == 2


def test_no_usable_image_is_an_error_that_leaves_earlier_results(
    command: list[str], tmp_path: Path
) -> None:
    break_images(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.json").write_text("yesterday's")
    with pytest.raises(UserError, match=r"none of the 5 images can be used: .*1\.jpg"):
        main(command)
    assert os.listdir(tmp_path / "out") == ["detections.json"]
    assert (tmp_path / "out" / "detections.json").read_text() == "yesterday's"


def fail_at(call: int, problem: object) -> object:
    """`SparseRCNN.forward`, but with a problem in one of its calls."""
    forward, calls = SparseRCNN.forward, []

    def failing(model: SparseRCNN, images: list[torch.Tensor]) -> list[dict]:
        calls.append(images)
        if len(calls) == call:
            problem()
        return forward(model, images)

    return failing


def out_of_memory() -> None:
    raise RuntimeError("out of memory")


def test_an_image_that_the_model_fails_on_is_skipped(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseRCNN, "forward", fail_at(2, out_of_memory))
    assert main(command) == 1
    metrics, _ = read_results(tmp_path / "out")
    assert metrics["images"] == 4
    assert metrics["skipped"] == ["image id 2: RuntimeError: out of memory"]


def test_a_batch_that_does_not_fit_is_tried_one_by_one(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseRCNN, "forward", fail_at(1, out_of_memory))
    assert main([*command, "--batch-size", "5"]) == 0
    assert read_results(tmp_path / "out")[0]["images"] == 5


def test_a_bug_that_every_image_meets_is_raised(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseRCNN, "forward", lambda *_: out_of_memory())
    with pytest.raises(RuntimeError, match=r"(?s)all 5 images failed.*in out_of_memory"):
        main(command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_done(
    number: int,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(SparseRCNN, "forward", fail_at(4, lambda: signal.raise_signal(number)))
    assert main(command) == 128 + number
    metrics, detections = read_results(tmp_path / "out")
    assert metrics["images"] == 3 and metrics["stopped_by"] == number
    assert {detection["image_id"] for detection in detections} == {1, 2, 3}
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "3 of 5 images" in printed.err


def test_a_signal_before_the_first_result_leaves_earlier_ones(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("yesterday's")
    interrupt = fail_at(1, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(SparseRCNN, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert (tmp_path / "out" / "metrics.json").read_text() == "yesterday's"


def test_what_is_written_is_utf8_in_any_locale(make_coco: CocoFactory, tmp_path: Path) -> None:
    names = {1: "猫", 2: "собака", 3: "Kätzchen $x$"}
    json_file, folder = make_coco(categories=names)
    weights = tmp_path / "named.pt"
    contents = {"model": build_model(TINY).state_dict(), "config": TINY.to_dict()}
    contents |= {"class_names": list(names.values()), "category_ids": list(names)}
    save_checkpoint(weights, contents)
    command = [sys.executable, str(ROOT / "evaluate.py"), "--weights", str(weights)]
    command += ["--val-json", str(json_file), "--val-images", str(folder), "--device", "cpu"]
    command += ["--workers", "0", "--per-class", "--output", str(tmp_path / "猫")]
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(command, env=os.environ | locale, capture_output=True)
    assert done.returncode == 0, done.stderr
    metrics, _ = read_results(tmp_path / "猫")
    assert set(metrics["per_class"]) == set(names.values())

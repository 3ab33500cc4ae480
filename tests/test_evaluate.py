"""Evaluation against pycocotools called directly, and on the data sets that break evaluators."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, CocoFactory, tiny_checkpoint
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from data import CocoDataset, eval_transforms
from evaluate import coco_metrics, evaluate, format_table, main, same_padding_batches
from model import build_model
from shapes import ShapesDataset
from support.checkpoint import save_checkpoint
from support.errors import UserError

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# --- from detections to AP ---


def indexed(images: list[dict], annotations: list[dict], category_ids: list[int]) -> COCO:
    truth = COCO()
    categories = [{"id": i, "name": f"class {i}"} for i in category_ids]
    truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def random_truth() -> tuple[COCO, list[dict]]:
    """Ground truth with crowds, empty images and all sizes, and detections near and far from it."""
    rng = np.random.default_rng(0)
    images = [{"id": 10 * i + 1, "width": 400, "height": 300} for i in range(12)]
    annotations: list[dict[str, Any]] = []
    detections = []
    for image in images:
        far = {"image_id": image["id"], "category_id": 5, "bbox": [0, 0, 30, 30]}
        detections.append({**far, "score": float(rng.random())})
    for image in images[2:]:  # two images without objects
        for _ in range(rng.integers(1, 7)):
            side = rng.choice([15, 60, 150])
            box = [*rng.uniform(0, 140, 2), *(side * rng.uniform(0.8, 1.2, 2))]
            shared = {"image_id": image["id"], "category_id": int(rng.choice([5, -2, 40]))}
            number, crowd = len(annotations) + 1, int(rng.random() < 0.15)
            rest = {"id": number, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            annotations.append({**shared, **rest})
            for _ in range(rng.integers(0, 3)):
                near = [float(v) for v in np.array(box) + rng.normal(0, side / 12, 4)]
                detections.append({**shared, "bbox": near, "score": float(rng.random())})
    return indexed(images, annotations, [5, -2, 40]), detections


def by_pycocotools(truth: COCO, detections: list[dict]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    return run


def test_equals_pycocotools_called_directly() -> None:
    truth, detections = random_truth()
    run, metrics = by_pycocotools(truth, detections), coco_metrics(truth, detections)
    assert [metrics[name] for name in NAMES] == pytest.approx(run.stats[:6].tolist(), abs=1e-12)
    assert metrics["AR"] == pytest.approx(run.stats[8], abs=1e-12)
    assert 0.1 < metrics["AP"] < 0.9  # otherwise this shows little
    for k, category in enumerate(run.params.catIds):
        precision = run.eval["precision"][:, :, k, 0, -1]
        expected = precision[precision > -1].mean()
        assert metrics["per_class"][f"class {category}"] == pytest.approx(expected)


def test_max_dets_counts_the_best_detections_per_image_and_class() -> None:
    truth, detections = random_truth()
    groups: dict[tuple[int, int], list[dict]] = {}
    for detection in sorted(detections, key=lambda d: -d["score"]):
        groups.setdefault((detection["image_id"], detection["category_id"]), []).append(detection)
    best = [detection for group in groups.values() for detection in group[:2]]
    limited = coco_metrics(truth, detections, max_dets=2)
    assert limited == coco_metrics(truth, best)
    assert limited["AR"] < coco_metrics(truth, detections)["AR"]


def test_more_than_100_detections_count_if_that_is_wanted() -> None:
    """pycocotools' own summary would give −1 here."""
    images = [{"id": 1, "width": 3000, "height": 20}]
    cells = [{"image_id": 1, "category_id": 5, "bbox": [20 * i, 0, 16, 16]} for i in range(150)]
    annotations = [{**cell, "id": i + 1, "area": 256, "iscrowd": 0} for i, cell in enumerate(cells)]
    truth = indexed(images, annotations, [5])
    detections = [{**cell, "score": 1 - i / 1000} for i, cell in enumerate(cells)]
    assert coco_metrics(truth, detections, max_dets=300)["AP"] == pytest.approx(1.0)
    assert coco_metrics(truth, detections)["AR"] == pytest.approx(100 / 150)


def test_no_detection_at_all_is_zero_and_no_object_at_all_is_undefined() -> None:
    truth, detections = random_truth()
    nothing_found = coco_metrics(truth, [])
    assert nothing_found["AP"] == nothing_found["AR"] == 0.0
    empty = indexed(truth.dataset["images"], [], [5, -2, 40])
    for found in (detections, []):
        assert coco_metrics(empty, found)["AP"] == -1.0
    speed = {"fps": 1.0, "device": "cpu", "dtype": "float32", "resolution": "1×1", "batch_size": 1}
    metrics = {**coco_metrics(empty, []), "images": 12, "max_dets": 100, "speed": speed}
    table = format_table(metrics, per_class=True)
    assert "–" in table and "-1" not in table


# --- from a data set to detections ---


class Oracle(nn.Module):
    """Answers with what it is given: the boxes in the pixels of the *resized* images."""

    def __init__(self, answers: list[dict]) -> None:
        super().__init__()
        self.answers, self.modes = iter(answers), set()

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        self.modes.add(self.training)
        return [next(self.answers) for _ in images]


def test_boxes_come_back_in_the_pixels_of_the_file(make_coco: CocoFactory) -> None:
    json_file, folder = make_coco(size=(64, 48), num_images=3)
    dataset = CocoDataset(json_file, folder, eval_transforms(TINY))
    answers = []
    for _, target in (dataset[i] for i in range(3)):  # as large as the transforms made them
        boxes, scores = target["boxes"].as_subclass(torch.Tensor), torch.tensor([0.9, 0.5])
        answers.append({"boxes": boxes, "labels": target["labels"], "scores": scores})
    model = Oracle(answers).train()
    metrics, detections = evaluate(model, dataset, CPU, batch_size=2)
    run = by_pycocotools(COCO(json_file), detections)
    assert metrics["AP"] == pytest.approx(1.0) == run.stats[0]
    assert {detection["category_id"] for detection in detections} <= {7, -3, 1000}
    assert metrics["images"] == 3 and metrics["speed"]["resolution"] == "72×96"
    assert model.modes == {False}


def test_only_images_of_one_size_are_batched() -> None:
    dataset = ShapesDataset("demo", "val", 7)
    sizes = [[96, 96], [50, 96], [96, 96], [96, 96], [50, 96], [96, 50], [96, 96]]
    dataset.sizes_hw = np.array(sizes)
    batches = same_padding_batches(dataset, 3)
    assert sorted(sum(batches, [])) == list(range(7)) and max(map(len, batches)) == 3
    assert all(len({tuple(sizes[i]) for i in batch}) == 1 for batch in batches)


# --- the command line ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose boxes are the whole image."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.manual_seed(0)  # this fixture is older than the test, so that of conftest.py comes later
    model = build_model(TINY)
    for stage in model.head.stages:
        nn.init.zeros_(stage.box_deltas.weight)
        nn.init.zeros_(stage.box_deltas.bias)
    names = ["cat", "dog", "猫"]
    save_checkpoint(path, tiny_checkpoint(model=model.state_dict(), class_names=names))
    return path


@pytest.fixture
def evaluated(weights: Path, make_coco: CocoFactory, tmp_path: Path):
    """Makes a data set and gives the command line that evaluates on it, into tmp_path / "out"."""

    def make(name: str, categories: dict[int, str], **kwargs: Any) -> list[str]:
        json_file, folder = make_coco(name, categories=categories, **kwargs)
        flags = ["--weights", str(weights), "--val-json", str(json_file), "--device", "cpu"]
        flags += ["--val-images", str(folder), "--output", str(tmp_path / "out")]
        return [*flags, "--workers", "0", "--per-class"]

    return make


def test_the_files_hold_what_is_printed_in_any_locale(evaluated, tmp_path: Path) -> None:
    def edit(coco: dict) -> None:
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != 2]
        coco["annotations"][0]["iscrowd"] = 1
        # With objects as large as the image the AP is not 0.
        whole = {"bbox": [0, 0, 64, 48], "area": 64 * 48, "iscrowd": 0}
        for number, image_id in enumerate((1, 3, 4) * 3):
            ids = {"id": 90 + number, "image_id": image_id, "category_id": (7, 8, 9)[number // 3]}
            coco["annotations"].append({**whole, **ids})

    flags = evaluated("val", {7: "cat", 8: "dog", 9: "猫"}, num_images=5, edit=edit)
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *flags], env=os.environ | locale, capture_output=True
    )
    printed = done.stdout.decode("ascii")
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_bytes())
    detections = json.loads((tmp_path / "out" / "detections.json").read_bytes())
    run = by_pycocotools(COCO(tmp_path / "val.json"), detections)
    assert [metrics[name] for name in NAMES] == pytest.approx(run.stats[:6].tolist(), abs=1e-12)
    assert metrics["AP"] > 0 and f"\n{100 * run.stats[0]:5.1f}  " in printed
    assert set(metrics["per_class"]) == {"cat", "dog", "猫"}
    for words in ("5 images", "100 detections", "float32", "batch 1", "cpu", "\\u732b "):
        assert words in printed


def test_ap_is_over_the_classes_that_are_there(evaluated, tmp_path: Path, capsys) -> None:
    main(evaluated("fewer", {9: "猫", 4: "cat"}))
    printed = capsys.readouterr().out
    assert "lacks 1 of the 3 classes: 'dog'" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_bytes())
    detections = json.loads((tmp_path / "out" / "detections.json").read_bytes())
    assert set(metrics["per_class"]) == {"cat", "猫"}
    assert detections and {detection["category_id"] for detection in detections} <= {9, 4}

    flags = evaluated("more", {1: "cat", 2: "dog", 3: "猫", 4: "bird"})
    with pytest.raises(UserError, match="bird.*--ignore-new-classes"):
        main(flags)
    main([*flags, "--ignore-new-classes"])
    assert "'bird'" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_named_and_earlier_results_stay(
    workers: str, evaluated, tmp_path: Path
) -> None:
    flags = evaluated("val", {1: "cat", 2: "dog"})
    (tmp_path / "val_images" / "3.jpg").write_bytes(b"broken")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("yesterday's")
    with pytest.raises(UserError, match=r"3\.jpg"):
        main([*flags, "--workers", workers])
    assert (tmp_path / "out" / "metrics.json").read_text() == "yesterday's"
    assert os.listdir(tmp_path / "out") == ["metrics.json"]


def test_mistakes_of_the_user(evaluated, tmp_path: Path) -> None:
    flags = evaluated("val", {1: "cat", 2: "dog"})
    (tmp_path / "file").write_text("")
    for wrong, error, words in (
        (["--test-size", "0"], UserError, "test_size=0"),
        (["--batch-size", "0"], UserError, "--batch-size should"),
        (["--output", str(tmp_path / "file" / "out")], OSError, "file"),
    ):
        with pytest.raises(error, match=words):
            main([*flags, *wrong])

"""Evaluation against pycocotools called directly, and on the data sets that break evaluators."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from data import CocoDataset, eval_transforms
from evaluate import coco_metrics, detect, format_table, main, same_padding_batches
from model import build_model
from shapes import ShapesDataset
from support.checkpoint import save_checkpoint
from support.distributed import World
from support.errors import UserError

ROOT = Path(__file__).parents[1]
HERE = World(torch.device("cpu"))


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


def test_boxes_come_back_in_the_pixels_of_the_file(make_coco) -> None:
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
    results, speed = detect(Oracle(answers), dataset, HERE, batch_size=2, progress=False)
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


def test_the_command_line_writes_what_it_prints(weights: Path, make_coco, tmp_path: Path) -> None:
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
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "--weights",
        str(weights),
        "--device",
        "cpu",
    ]
    command += [
        "--val-json",
        str(json_file),
        "--val-images",
        str(folder),
        "--workers",
        "0",
        "--per-class",
    ]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    detections = json.loads((tmp_path / "out/detections.json").read_text())
    assert (
        metrics["AP"] > 0
        and f"{100 * metrics['AP']:.1f}" in done.stdout
        and "5 images" in done.stdout
        and "cow" in done.stdout
    )
    assert "float32" in done.stdout and "72×96" in done.stdout and "cpu" in done.stdout
    # The saved detections give the printed figures.
    truth = CocoDataset(json_file, folder).coco()
    assert coco_metrics(truth, detections)["AP"] == metrics["AP"]
    assert {d["image_id"] for d in detections} <= set(range(1, 6))


def test_mistakes_of_the_user(weights: Path, make_coco, tmp_path: Path) -> None:
    json_file, folder = make_coco(categories={1: "cat", 2: "bird", 3: "cow"})
    data = ["--val-json", str(json_file), "--val-images", str(folder)]
    common = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(UserError, match="bird"):
        main(["--weights", str(weights), *data, *common])
    with pytest.raises(UserError, match="no such checkpoint"):
        main(["--weights", str(tmp_path / "none.pt"), *data, *common])
    with pytest.raises(UserError, match="--max-dets"):
        main(["--weights", str(weights), *data, *common, "--max-dets", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main(["--weights", str(weights), *data, "--output", str(tmp_path / "file" / "out")])

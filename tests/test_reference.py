"""The paper's model, exactly: the authors' code and MMDetection give the same (see reference/)."""

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REFERENCE, reference_weights

from config import Config
from model import SparseRCNN, build_model
from support.convert import convert_checkpoint, rename
from support.loader import usable_workers


@cache
def run(case: str) -> SimpleNamespace:
    """One forward pass of a case, and one backward pass if the case has losses."""
    torch.set_num_threads(min(8, usable_workers(8)))
    expected = json.loads((REFERENCE / f"{case}.json").read_text())
    recorded = dict(np.load(REFERENCE / f"{case}.npz"))

    model = build_model(Config(), pretrained_backbone=False)
    model.load_state_dict(convert_checkpoint(reference_weights(case)))
    images = []
    for height, width in expected["sizes"]:
        rng = np.random.default_rng([expected["seed"], height, width])
        pixels = rng.integers(0, 256, (3, height, width)).astype(np.uint8)
        images.append(torch.from_numpy(pixels))

    model.eval()
    with torch.no_grad():
        pyramid = model.backbone(model.prepare(images)[0])
        outputs, detections = model.stages(images), model(images)
    losses = {}
    if "losses" in expected:
        targets = []
        for i in range(len(images)):
            boxes = torch.from_numpy(recorded[f"gt{i}_boxes"])
            labels = torch.from_numpy(recorded[f"gt{i}_labels"]).long()
            targets.append({"boxes": boxes, "labels": labels})
        losses = model.train()(images, targets)
        sum(losses.values()).backward()
    return SimpleNamespace(
        expected=expected,
        recorded=recorded,
        model=model,
        pyramid=pyramid,
        outputs=outputs,
        detections=detections,
        losses=losses,
    )


def largest_differences(result: SimpleNamespace) -> dict[str, float]:
    """From the authors', over all stages; relative for losses and norms of gradients."""
    recorded, kinds = result.recorded, {"ce": "cls", "bbox": "l1", "giou": "giou"}
    pyramid, losses, gradients = [], [], []
    for level, features in enumerate(result.pyramid, start=2):
        mean, std = features.mean((2, 3)).numpy(), features.std((2, 3)).numpy()
        pyramid.append(np.abs(mean - recorded[f"mean_p{level}"]).max())
        pyramid.append(np.abs(std - recorded[f"std_p{level}"]).max())
    for name, value in result.expected["losses"].items():
        _, kind, *stage = name.split("_")
        found = result.losses[f"loss_{kinds[kind]}_{stage[0] if stage else 5}"]  # last: no number
        losses.append(abs(found.item() / value - 1))
    parameters = dict(result.model.named_parameters())
    for name, norm in result.expected["grad_norms"].items():
        # An FPN level without RoIs has a gradient of exactly 0, not none.
        found = parameters[rename(name)].grad.double().norm().item()
        gradients.append(abs(found - norm) / (norm + 1e-3))
    return {  # np.max, because Python's may lose a NaN
        "logits": np.abs(result.outputs.logits.numpy() - recorded["logits"]).max(),
        "boxes": np.abs(result.outputs.boxes.numpy() - recorded["boxes"]).max(),
        "pyramid": np.max(pyramid),
        "losses": np.max(losses),
        "gradients": np.max(gradients),
    }


AUTHORS = pytest.mark.parametrize("case", ["r50_100", "r50_100_batch"])


@AUTHORS
def test_the_model_equals_the_authors(case: str) -> None:
    result = run(case)
    found = largest_differences(result)
    assert found["logits"] < 1e-4 and found["boxes"] < 0.02  # pixels
    assert found["pyramid"] < 1e-4 and found["losses"] < 1e-4 and found["gradients"] < 1e-3
    assert len(result.losses) == len(result.expected["losses"]) == 18

    parameters = dict(result.model.named_parameters())
    trained = {rename(key) for key in result.expected["grad_norms"]}
    assert {rename(key) for key in result.expected["no_grad"]} == set(parameters) - trained
    assert {name for name, p in parameters.items() if p.requires_grad} == trained


@AUTHORS
def test_detections_equal_the_authors(case: str) -> None:
    result = run(case)
    for i, found in enumerate(result.detections):
        assert (found["labels"].numpy() == result.recorded[f"det{i}_labels"]).all()
        assert np.abs(found["scores"].numpy() - result.recorded[f"det{i}_scores"]).max() < 1e-4
        assert np.abs(found["boxes"].numpy() - result.recorded[f"det{i}_boxes"]).max() < 0.02


def test_detections_equal_mmdetection() -> None:
    result = run("mmdet_r50_100")
    logits, boxes = result.outputs.logits[-1, 0], result.outputs.boxes[-1, 0]
    scores, best = logits.sigmoid().flatten().topk(100)
    # Not through model(images): MMDetection's boxes were stored without clipping.
    assert (result.detections[0]["labels"].numpy() == result.recorded["det0_labels"]).all()
    assert (best % 80).tolist() == result.recorded["det0_labels"].tolist()
    assert np.abs(scores.numpy() - result.recorded["det0_scores"]).max() < 1e-4
    assert np.abs(boxes[best // 80].numpy() - result.recorded["det0_boxes"]).max() < 0.02


def test_images_of_equal_padded_size_are_the_same_alone_and_together() -> None:
    model: SparseRCNN = run("r50_100").model
    sizes = ((90, 120), (96, 128), (70, 100))
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    with torch.no_grad():
        together = model.stages(images)
        for i, image in enumerate(images):
            alone = model.stages([image])
            assert (together.logits[:, i] - alone.logits[:, 0]).abs().max() < 1e-4
            assert (together.boxes[:, i] - alone.boxes[:, 0]).abs().max() < 0.02


if __name__ == "__main__":  # prints the README's figures
    for case in ("r50_100", "r50_100_batch"):
        found = largest_differences(run(case))
        print(case, *(f"{name} {value:.1e}" for name, value in found.items()), sep=", ")

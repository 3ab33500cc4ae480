"""Programs that others wrote: torchvision's loop, torchmetrics, LBFGS, safetensors, onnxruntime."""

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, objects
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from model import build_model, load_model
from shapes import ShapesDataset
from support.onnx_detector import METADATA, as_detections, load_onnxruntime
from tools.export import export_model

CONFIG = replace(TINY, num_proposals=10, num_classes=3)


# --- what torchvision's reference scripts do, in our words; only the model differs ---


def train_one_epoch(model: nn.Module, optimizer, loader, device, scaler) -> list[float]:
    model.train()
    history = []
    for images, targets in loader:
        images = [image.to(device) for image in images]
        targets = [
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()}
            for target in targets
        ]
        with torch.autocast(device, torch.bfloat16):
            loss_dict = model(images, targets)
            losses = sum(loss for loss in loss_dict.values())
        history.append(losses.item())
        assert math.isfinite(history[-1]), loss_dict

        optimizer.zero_grad()
        scaler.scale(losses).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return history


@torch.no_grad()
def evaluate(model: nn.Module, loader, device) -> dict[int, dict[str, Tensor]]:
    model.eval()
    found = {}
    for images, targets in loader:
        outputs = model([image.to(device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            found[target["image_id"]] = {k: v.to("cpu") for k, v in output.items()}
    return found


def tuples(batch: list) -> tuple:
    return tuple(zip(*batch, strict=True))


class Floats(ShapesDataset):
    """Images as torchvision wants them."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = super().__getitem__(index)
        return image.float() / 255, target


def test_a_loop_written_for_torchvision() -> None:
    """But for the labels, which would start at 1 there."""
    dataset = Floats("demo", "train", 8)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=tuples)
    model = build_model(CONFIG)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    history = train_one_epoch(model, optimizer, loader, "cpu", torch.amp.GradScaler("cpu"))
    assert len(history) == 2 and all(loss > 0 for loss in history)
    found = evaluate(model, loader, "cpu")
    truth = {target["image_id"]: target for _, target in (dataset[i] for i in range(8))}
    assert set(found) == set(truth)
    for output in found.values():
        boxes, scores, labels = (output[key] for key in ("boxes", "scores", "labels"))
        assert len(output) == 3 and len(boxes) == len(scores) == len(labels)
        assert boxes.dtype == torch.float32 and ((boxes >= 0) & (boxes <= 96)).all()
        assert (scores.diff() <= 0).all() and labels.dtype == torch.int64
        assert ((labels >= 0) & (labels < 3)).all() and scores.dtype == torch.float32

    if find_spec("torchmetrics"):
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision()
        metric.update([found[i] for i in truth], [truth[i] for i in truth])
        assert 0 <= metric.compute()["map"] <= 1


# --- libraries that look at parameters, or at what a forward pass does ---


def test_parameters_are_as_other_libraries_want_them(tmp_path: Path) -> None:
    """Contiguous, as torchvision's models are; the proposals are no view under no_grad."""
    model = build_model(CONFIG)
    assert len(parameters_to_vector(model.parameters())) == sum(
        p.numel() for p in model.parameters()
    )
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))

    image, target = torch.rand(3, 64, 64), objects(2, 3, 64, 64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = sum(model([image], [target]).values())
        total.backward()
        return total

    assert optimizer.step(loss).isfinite()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()([image])
    # At least the backbone's first convolution, 3×3 of stride 2: two for each multiply-add.
    assert counter.get_total_flops() > 2 * 32 * 32 * 27 * CONFIG.hidden_dim


def test_the_onnx_file_in_float16_finds_the_same_objects(tmp_path: Path) -> None:
    """By onnxruntime's converter, which refuses some operators."""
    onnx = pytest.importorskip("onnx")
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    model, checkpoint = load_model(ROOT / "assets/shapes.pt")
    model.head.stages = model.head.stages[:2]
    values = {**checkpoint["config"].to_dict(), **checkpoint}
    export_model(model, tmp_path / "full.onnx", {name: values[name] for name in METADATA})
    half = float16.convert_float_to_float16(onnx.load(tmp_path / "full.onnx"), keep_io_types=True)
    onnx.save(half, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * (tmp_path / "full.onnx").stat().st_size

    images = [ShapesDataset("demo", "val", 8)[i][0] for i in range(8)]
    files = [
        load_onnxruntime(tmp_path / f"{name}.onnx", torch.device("cpu"))[0]
        for name in ("full", "half")
    ]
    for image in images:
        expected, found = (as_detections(detect(image.numpy())) for detect in files)
        expected = {key: value[expected["scores"] > 0.5] for key, value in expected.items()}
        best = box_iou(expected["boxes"], found["boxes"]).max(1)
        assert len(expected["boxes"]) > 0 and (best.values > 0.98).all()
        assert torch.equal(found["labels"][best.indices], expected["labels"])
        assert (found["scores"][best.indices] - expected["scores"]).abs().max() < 0.02

"""The five detectors of the comparison learn behind one interface; the command keeps its runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, TINY, no_training, objects, take_step
from torch import nn

import train
from experiments import ablate, peers
from experiments.detectors import (
    DETECTORS,
    OF_TRANSFORMERS,
    DetrPeer,
    TorchvisionPeer,
    build_deformable_detr,
)
from shapes import ShapesDataset
from support.errors import UserError

# 32 channels: Deformable DETR normalises in as many groups.
SMALL = replace(TINY, hidden_dim=32, num_classes=6, lr=0.003, warmup_steps=0)


@pytest.fixture(params=DETECTORS)
def training(request: pytest.FixtureRequest) -> train.Training:
    """Of each detector."""
    if request.param in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    dataset = ShapesDataset("crowded", "train", 4)
    return train.start_training(SMALL, CPU, dataset, 1000, DETECTORS[request.param])


# --- detectors ---


def test_a_detector_learns_four_images_of_two_sizes_and_finds_boxes_inside_them(training):
    images = [torch.randint(256, (3, *hw), dtype=torch.uint8) for hw in [(64, 96), (96, 80)] * 2]
    targets = [objects(3, 6, image.shape[2], image.shape[1], i) for i, image in enumerate(images)]
    training.model.train()
    losses = [take_step(training, images, targets, num_objects=12)["loss"] for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    with torch.inference_mode():
        found = training.model.eval()(images)
    for image, one in zip(images, found, strict=True):
        width, height = image.shape[2], image.shape[1]
        limits = torch.tensor([width, height, width, height])
        assert len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) > 0
        assert one["boxes"].min() >= 0 and (one["boxes"] <= limits).all()
        assert one["boxes"].max() > 10  # not shares of the image
        assert one["labels"].min() >= 0 and one["labels"].max() < 6


def test_all_start_with_the_backbone_of_ours(training):
    torch.manual_seed(SMALL.seed)
    ours = DETECTORS["sparse-rcnn"](SMALL, False).backbone.state_dict()
    theirs = training.model.state_dict()
    for key, value in ours.items():
        ends = (f"backbone.{key}", f"backbone.model.{key}")
        found = [name for name in theirs if name.endswith(ends)]
        # Both DETRs do without some of the last convolutions.
        assert found or "layer_blocks" in key, key
        assert all(torch.equal(theirs[name], value) for name in found), key


class Recorder(nn.Module):
    """Keeps what it is called with, and gives the same answer always."""

    def __init__(self, answer: object):
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, *inputs: object, **options: object) -> object:
        self.inputs, self.options = inputs, options
        return self.answer


IMAGE = torch.full((3, 64, 80), 51, dtype=torch.uint8)
TARGET = {"boxes": torch.tensor([[8.0, 16.0, 24.0, 48.0]]), "labels": torch.tensor([4])}


def test_torchvisions_labels_start_at_1_and_its_images_end_at_1():
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    peer = TorchvisionPeer(Recorder([{"boxes": box, "labels": torch.tensor([5]), "scores": None}]))
    [found] = peer.eval()([IMAGE])
    assert found["labels"].tolist() == [4] and torch.equal(found["boxes"], box)
    peer.detector.answer = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert peer.train()([IMAGE], [TARGET])["loss"] == 5
    images, targets = peer.detector.inputs
    assert images[0].unique().tolist() == pytest.approx([0.2])
    assert targets[0]["labels"].tolist() == [5] and torch.equal(
        targets[0]["boxes"], TARGET["boxes"]
    )


def test_detr_speaks_in_shares_of_the_padded_batch():
    pytest.importorskip("transformers")
    # Padded to 64 × 96: cx 16, cy 32, w 16, h 32 pixels.
    share = torch.tensor([[[16 / 96, 32 / 64, 16 / 96, 32 / 64]]])
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 9.0, 0.0]]])
    settings = replace(SMALL, num_proposals=1)
    post_process = build_deformable_detr(settings).post_process
    outputs = SimpleNamespace(logits=logits, pred_boxes=share)
    peer = DetrPeer(Recorder(outputs), post_process, class_weight=2.0)
    [found] = peer.eval()([IMAGE])
    assert torch.allclose(found["boxes"], TARGET["boxes"]) and found["labels"].tolist() == [4]

    names = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error", "loss_ce_0")
    losses = dict(zip(names, torch.tensor([1.0, 10.0, 100.0, 7.0, 1000.0]), strict=True))
    peer.detector.answer = SimpleNamespace(loss_dict=losses)
    assert peer.train()([IMAGE], [TARGET])["loss"] == 2 * 1 + 5 * 10 + 2 * 100 + 2 * 1000
    [label] = peer.detector.options["labels"]
    assert torch.allclose(label["boxes"], share[0]) and label["class_labels"].tolist() == [4]


# --- the command ---


def test_nms_is_within_a_class_of_an_image():
    def detection(image_id: int, category_id: int, x: float, score: float) -> dict:
        bbox = [x, 0.0, 10.0, 10.0]
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}

    # 8 and 7 pixels of 10 are shared: an IoU of 0.67 and of 0.54; with 6 it is 0.43.
    first, same = detection(1, 1, 0.0, 0.9), detection(1, 1, 2.0, 0.8)
    others = [detection(1, 2, 0.0, 0.7), detection(2, 1, 0.0, 0.6), detection(1, 1, 4.0, 0.5)]
    assert peers.suppress([same, *others, first]) == [first, *others]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished command of one detector: its folder and its flags."""
    folder = tmp_path_factory.mktemp("peers")
    flags = ["sparse-rcnn", "--rates", "0.001", "0.01", "--seeds", "3", "4"]
    config = replace(SMALL, epochs=3, eval_every=2, data="shapes-crowded")
    for field, value in config.to_dict().items():
        if value != getattr(peers.PEERS, field) and field not in ("num_classes", "lr"):
            flags += [f"--{field.replace('_', '-')}", str(value)]
    flags += ["--runs", str(folder / "runs"), "--output", str(folder / "out"), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "measure_speeds", lambda args: dict.fromkeys(DETECTORS, SPEED))
        assert peers.main(flags) == 0
    return folder, flags


SPEED = {"step": 20.0, "FPS": 8.0, "gflop": 1.0}


def test_the_best_rate_of_the_trials_is_trained_in_full(command):
    folder, flags = command
    runs = folder / "runs"
    args = peers.read_args(flags)
    epochs = {
        path.parents[1].name: len(path.read_text().splitlines())
        for path in runs.glob("*/sparse-rcnn-seed3/metrics.jsonl")
    }
    [full] = {"lr0.001", "lr0.01"} & set(epochs)
    assert epochs == {"lr0.001-trial": 1, "lr0.01-trial": 1, full: 3}
    assert (runs / full / "sparse-rcnn-seed4/result.json").exists()
    for best, other in (("0.001", "0.01"), ("0.01", "0.001")):
        (runs / f"lr{best}-trial/sparse-rcnn-seed3/tune.json").write_text('{"AP": 0.2}')
        (runs / f"lr{other}-trial/sparse-rcnn-seed3/tune.json").write_text('{"AP": 0.1}')
        chosen = peers.reported_runs("sparse-rcnn", args)
        assert [run.config.lr for run in chosen] == [float(best)] * 2

    # An AP below 1 of 100 is noise; here it would choose the larger loss.
    losses = {
        path: json.loads(path.read_text().splitlines()[-1])["loss"]
        for path in runs.glob("*-trial/sparse-rcnn-seed3/metrics.jsonl")
    }
    for path, precision in zip(sorted(losses, key=losses.get), (0.002, 0.004), strict=True):
        path.with_name("tune.json").write_text(json.dumps({"AP": precision}))
    [chosen, _] = peers.reported_runs("sparse-rcnn", args)
    assert f"lr{chosen.config.lr:g}-trial" == min(losses, key=losses.get).parts[-3]
    for path in runs.glob("*/*/tune.json"):
        path.unlink()


def test_tables_and_figure_are_of_finished_runs_and_name_the_missing(command, monkeypatch):
    folder, flags = command
    monkeypatch.setattr(ablate.train, "run", no_training)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)  # without transformers
    monkeypatch.setattr(peers, "measure_speeds", lambda args: dict.fromkeys(DETECTORS, SPEED))
    for seed, precision in ((3, 0.5), (4, 0.7)):
        [path] = folder.glob(f"runs/*[0-9]/sparse-rcnn-seed{seed}/result.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "AP": precision}))
    assert peers.main(flags) == 0
    text = (folder / "out/peers.md").read_text()
    [ours, _] = [line for line in text.splitlines() if line.startswith("| Sparse R-CNN")]
    cells = [cell.strip() for cell in ours.split("|")]
    # 6 steps of 20 seconds.
    assert cells[2:4] == ["42.8", "60.0"] and cells[9:12] == ["10.0", "8", "2.0"]
    assert "- missing: 2 runs of detr, because transformers is not installed" in text
    assert "- missing: 2 runs of retinanet\n" in text and "runs of sparse-rcnn" not in text
    assert (folder / "out/peers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AssertionError, match="a training was started"):
        peers.main([*flags, "--seeds", "5"])


def test_speed_is_measured_of_those_that_are_there(command, monkeypatch):
    args = peers.read_args(command[1])
    monkeypatch.setattr(peers, "find_spec", lambda name: None)  # without transformers
    speeds = peers.measure_speeds(args, repeats=1)
    assert set(speeds) == {"sparse-rcnn", "faster-rcnn", "retinanet"}
    assert all(speed["step"] > 0 and speed["FPS"] > 0 for speed in speeds.values())
    assert speeds["retinanet"]["gflop"] > speeds["faster-rcnn"]["gflop"]


def test_there_must_be_images_to_evaluate_and_to_choose_a_rate_on():
    flags = ["--train-json", "a.json", "--train-images", "a", "--rates", "0.001"]
    with pytest.raises(UserError, match="needs --val-json"):
        peers.main(flags)
    with pytest.raises(UserError, match="one rate"):
        peers.main([*flags, "0.01", "--val-json", "b.json", "--val-images", "b"])

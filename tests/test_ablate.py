"""The variants differ only in what their tables say; the command keeps, shares and resumes runs."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, no_training, objects, take_step
from torch import Tensor
from torchvision.ops import box_convert, box_iou

import train
from experiments import ablate, variants
from experiments.variants import VARIANTS
from model import SparseRCNN
from shapes import ShapesDataset
from support.errors import UserError

B, N, C, R, K = 2, 5, TINY.hidden_dim, TINY.roi_size, TINY.num_classes
# One of each kind: whom a proposal's feature reaches in each stage. The other variants are plain
# models that start from other boxes, or have more proposals or stages.
NOBODY, ITSELF, ALL = [], [1], [*range(N)]
REACHED = {"sparse": [NOBODY], "cascade": [NOBODY] * 2, "reuse": [NOBODY, ITSELF]}
REACHED |= {"attention": [ALL] * 2, "dynamic": [ALL] * 2, "positions": [ALL] * 2}


def build(name: str) -> SparseRCNN:
    return VARIANTS[name].build(VARIANTS[name].config(TINY), False)


def stage_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """roi_feats (B·N, C, R, R), boxes_px (B, N, 4), pro_feats (B, N, C)."""
    corners = torch.rand(B, N, 2, 2).sort(dim=2).values * 80
    corners[:, :, 1] += 8
    return torch.randn(B * N, C, R, R), corners.flatten(2), torch.randn(B, N, C)


# --- variants ---


@pytest.mark.parametrize("name", REACHED)
def test_a_variant_learns_and_every_trained_parameter_has_a_part_in_it(name):
    config = replace(VARIANTS[name].config(TINY), lr=0.01)
    dataset = ShapesDataset("demo", "train", 4)
    training = train.start_training(config, CPU, dataset, 20, VARIANTS[name].build)
    training.model.train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    targets = [{**objects(3, K, 64, 64, seed), "image_id": seed} for seed in (0, 1)]
    losses = [take_step(training, images, targets, num_objects=6)["loss"] for _ in range(20)]
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    for key, parameter in training.model.named_parameters():
        # A level of the pyramid has no gradient if no box is pooled from it.
        if parameter.requires_grad and not key.startswith("backbone."):
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", REACHED)
def test_whom_a_proposals_feature_reaches_in_each_stage(name):
    roi_feats, boxes_px, pro_feats = stage_inputs()
    changed = pro_feats.clone()
    changed[0, 1] += torch.randn(C)
    for stage, reached in zip(build(name).head.stages, REACHED[name], strict=True):
        before, after = (stage(roi_feats, boxes_px, feats) for feats in (pro_feats, changed))
        for old, new in zip(before, after, strict=True):  # logits, boxes, features
            differs = (old - new).abs().amax(-1) > 1e-6
            assert torch.nonzero(differs[0]).flatten().tolist() == reached
            assert not differs[1].any()  # the other image


def test_static_and_dynamic_stages_are_equally_large():
    models = [VARIANTS[name].build(ablate.ABLATION, False) for name in ("attention", "grid")]
    static, dynamic = (sum(p.numel() for p in m.head.stages[-1].parameters()) for m in models)
    assert static == pytest.approx(dynamic, rel=0.05) and static != dynamic


def test_all_variants_can_start_from_one_backbone():
    config = replace(ablate.ABLATION, num_proposals=5)
    models = []
    for start_from in (None, "assets/shapes.pt"):
        args = ablate.AblateArgs(("5",), start_from=start_from)
        torch.manual_seed(1)
        models.append(ablate.builder(ablate.Run("attention", 1, args))(config, False))
    fresh, started = models
    expected = ablate.load_checkpoint("assets/shapes.pt")["model"]
    for key, value in started.state_dict().items():
        source = expected if key.startswith("backbone.") else fresh.state_dict()
        assert torch.equal(value, source[key].to(value.dtype)), key


def test_proposal_boxes_start_where_the_tables_say():
    names = {name for _, _, name, _ in ablate.ROWS}
    start = {name: build(name).proposal_boxes.data for name in names}
    for table, _, name, _ in ablate.ROWS:  # all rows of Tables 3 to 5 start from the grid
        assert table not in "345" or torch.equal(start[name], start["grid"])
    assert torch.equal(start["grid"], variants.grid_boxes(TINY.num_proposals))
    assert (start["centre"] == torch.tensor([0.5, 0.5, 0.1, 0.1])).all()
    assert (start["dynamic"] == torch.tensor([0.5, 0.5, 1.0, 1.0])).all()
    assert len(start["random"].unique(dim=0)) == TINY.num_proposals


@pytest.mark.parametrize("count", [1, 3, 7, 10, 100])
def test_grid_boxes_tile_the_image(count):
    boxes = variants.grid_boxes(count)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    assert boxes.shape == (count, 4) and corners.min() > -1e-6 and corners.max() < 1 + 1e-6
    assert boxes[:, 2:].prod(-1).sum().item() == pytest.approx(1, abs=1e-5)
    assert (box_iou(corners, corners) - torch.eye(count)).abs().max() < 1e-4


def test_box_encoding_is_the_formula():
    boxes_px = torch.tensor([[[10.0, 20.0, 50.0, 40.0], [0.0, 0.0, 1300.0, 800.0]]])
    expected = []
    for x1, y1, x2, y2 in boxes_px[0].double().numpy():
        for value in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1):
            angles = [value / 10_000 ** (i / 3) for i in range(3)]
            expected.append([np.sin(a) for a in angles] + [np.cos(a) for a in angles])
    expected = torch.tensor(np.array(expected).reshape(1, 2, 24), dtype=torch.float32)
    torch.testing.assert_close(variants.box_encoding(boxes_px, 24), expected, atol=1e-4, rtol=0)


def test_positional_encoding_tells_a_stage_where_its_proposals_are():
    roi_feats, boxes_px, pro_feats = stage_inputs()
    boxes_px.requires_grad_(True)
    for name, sees in (("dynamic", False), ("positions", True)):
        stage = build(name).head.stages[1]
        here, elsewhere = (
            stage(roi_feats, boxes, pro_feats)[0] for boxes in (boxes_px, boxes_px + 10)
        )
        assert torch.equal(here, elsewhere) != sees
        elsewhere.sum().backward()
        assert boxes_px.grad is None  # the logits see the boxes, but do not move them


# --- tables ---


def test_in_the_paper_the_same_model_has_the_same_figures():
    figures: dict[str, set] = {}
    for table, _, name, values in ablate.ROWS:
        assert len(values) == len(ablate.TABLES[table][1].split())
        figures.setdefault(name, set()).add(values[:3])
    # But in our Tables 3 and 5, the last row is its model started from the grid.
    several = [name for name, values in figures.items() if len(values) > 1]
    assert several == ["grid"] and len(figures) == 15


def test_seeds_are_averaged():
    result = {"AP50": 0.5, "AP75": -1.0, "APs": 0.1, "APm": 0.2, "APl": -1.0}
    result["parameters"] = 7
    found = ablate.summary([{**result, "AP": ap} for ap in (0.30, 0.34, 0.35)])
    assert (found["AP"], found["spread"]) == (pytest.approx(33), pytest.approx(2.5))
    assert (found["parameters"], found["seeds"]) == (7, 3)
    assert "AP75" not in found and "APl" not in found


# --- the command ---


@pytest.fixture(scope="module")
def command(tiny_flags, tmp_path_factory) -> tuple[Path, list[str]]:
    """Table 10: the folder, and the flags."""
    folder = tmp_path_factory.mktemp("ablate")
    flags = [*tiny_flags, "--output", str(folder / "out"), "--runs", str(folder / "runs")]
    flags += ["--start-from", "None"]
    assert ablate.main(["10", *flags]) == 0
    return folder, flags


def test_the_command_writes_the_table_beside_the_papers(command):
    folder, _ = command
    text = (folder / "out/table10.md").read_text()
    assert "preset shapes, " in text and "epochs=1" in text and f"torch {torch.__version__}" in text
    for start, variant in (
        ("with | 41.9 | 60.9", "positions"),
        ("without | 42.3 | 61.2", "dynamic"),
    ):
        [line] = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
        count = sum(p.numel() for p in build(variant).parameters() if p.requires_grad)
        assert line.endswith(f"| {count:,} | 1 |")


def test_finished_runs_are_not_trained_again_and_serve_other_tables(command, monkeypatch):
    folder, flags = command
    monkeypatch.setattr(train, "run", no_training)
    assert ablate.main(["10", *flags]) == 0
    result = folder / "runs/dynamic-seed0/result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "AP": 0.4321}))
    text = ablate.write_tables(ablate.read_args(["6", *flags]))
    image, grid = (line for line in text.splitlines() if line.startswith(("| image", "| grid")))
    assert image.startswith("| image | 42.3 | 61.2 | 45.7 | 26.7 | 44.6 | 57.6 | 43.2 |")
    assert grid == "| grid | 41.0 | 59.4 | 44.2 | 23.8 | 43.7 | 55.6 |" + " – |" * 8 + " 0 |"
    with pytest.raises(AssertionError, match="a training was started"):
        ablate.main(["3", *flags])


def test_a_run_with_other_settings_is_refused(command, monkeypatch):
    _, flags = command
    monkeypatch.setattr(train, "run", no_training)
    with pytest.raises(UserError, match=r"positions-seed0 was trained with lr=None, not 0\.01"):
        ablate.main(["10", *flags, "--lr", "0.01"])
    # A setting that does not change the training does not count.
    assert ablate.main(["10", *flags, "--checkpoint-minutes", "1"]) == 0


def test_a_stopped_run_goes_on(command, tmp_path, monkeypatch):
    flags = [*command[1], "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    step, taken = train.train_step, []

    def signalled(*inputs):
        taken.append(step(*inputs))
        if len(taken) == 1:
            signal.raise_signal(signal.SIGTERM)
        return taken[-1]

    monkeypatch.setattr(train, "train_step", signalled)
    assert ablate.main(["10", *flags]) == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["positions-seed0"]
    assert not (tmp_path / "runs/positions-seed0/result.json").exists()
    assert ablate.main(["10", *flags]) == 0
    assert len(taken) == 4  # two for each variant: none is repeated

"""The variants differ only in what their tables say; the command keeps, shares and resumes runs."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, objects, take_step
from torchvision.ops import box_convert, box_iou

import train
from experiments import ablate
from experiments.variants import (
    VARIANTS,
    AttentionStage,
    PositionalStage,
    ReuseStage,
    StaticStage,
    box_encoding,
    centre_boxes,
    equal_width,
    grid_boxes,
    random_boxes,
    shared_name,
    stage_options,
)
from head import DynamicInteraction, Stage
from model import SparseRCNN
from shapes import ShapesDataset
from support.errors import UserError

B, N, C, R, K = 2, 5, TINY.hidden_dim, TINY.roi_size, TINY.num_classes
# One of each kind; the numbers of proposals and stages are settings of the plain model.
KINDS = ("sparse", "cascade", "reuse", "attention", "dynamic")
KINDS += ("centre", "grid", "random", "positions")


def stage_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """roi_feats (B·N, C, R, R), boxes_px (B, N, 4), pro_feats (B, N, C)."""
    corners = torch.rand(B, N, 2, 2).sort(dim=2).values * 80
    corners[:, :, 1] += 8
    return torch.randn(B * N, C, R, R), corners.flatten(2), torch.randn(B, N, C)


# --- variants ---


@pytest.mark.parametrize("name", KINDS)
def test_a_variant_learns_and_every_trained_parameter_has_a_part_in_it(name):
    config = replace(VARIANTS[name].config(TINY), lr=0.01)
    dataset = ShapesDataset("demo", "train", 4)
    training = train.start_training(config, CPU, dataset, 20, VARIANTS[name].build)
    training.model.train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 96)]
    targets = [{**objects(3, K, 64, 64, seed), "image_id": seed} for seed in (0, 1)]
    losses = [take_step(training, images, targets, num_objects=6)["loss"] for _ in range(20)]
    assert np.mean(losses[-3:]) < 0.6 * losses[0]

    is_static = name in ("sparse", "cascade", "reuse")
    assert training.model.proposal_feats.requires_grad != is_static
    for key, parameter in training.model.named_parameters():
        # A level of the pyramid has no gradient if no box is pooled from it.
        if parameter.requires_grad and not key.startswith("backbone."):
            assert parameter.grad.any(), key


def build(name: str) -> SparseRCNN:
    return VARIANTS[name].build(VARIANTS[name].config(TINY), False)


def test_only_the_dynamic_rows_generate_parameters_and_only_they_and_attention_attend():
    counts = {}
    for name in KINDS:
        kinds = [type(module) for module in build(name).modules()]
        counts[name] = (kinds.count(DynamicInteraction), kinds.count(torch.nn.MultiheadAttention))
    stages = TINY.num_stages
    static = {"sparse": (0, 0), "cascade": (0, 0), "reuse": (0, 0), "attention": (0, stages)}
    assert counts == dict.fromkeys(KINDS, (stages, stages)) | static
    assert len(build("sparse").head.stages) == 1


@pytest.mark.parametrize(
    "stage_class, seen", [(StaticStage, []), (ReuseStage, [1]), (AttentionStage, [*range(N)])]
)
def test_whom_a_proposals_feature_reaches(stage_class, seen):
    stage = stage_class(TINY)
    roi_feats, boxes_px, pro_feats = stage_inputs()
    before = stage(roi_feats, boxes_px, pro_feats)
    changed = pro_feats.clone()
    changed[0, 1] += torch.randn(C)
    after = stage(roi_feats, boxes_px, changed)
    for old, new in zip(before, after, strict=True):  # logits, boxes, features
        differs = (old - new).abs().amax(-1) > 1e-6
        assert torch.nonzero(differs[0]).flatten().tolist() == seen
        assert not differs[1].any()  # the other image


@pytest.mark.parametrize(
    "name, reuses", [("cascade", False), ("reuse", True), ("attention", True), ("dynamic", True)]
)
def test_without_feature_reuse_a_stage_does_not_depend_on_the_features_of_the_one_before(
    name, reuses
):
    model = VARIANTS[name].build(TINY, False).eval()
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        before = model.stages(images)
        model.head.stages[0].register_forward_hook(
            lambda _, __, out: (out[0], out[1], out[2] + torch.randn_like(out[2]))
        )
        after = model.stages(images)
    assert torch.equal(before.logits[0], after.logits[0])
    assert torch.equal(before.logits[1], after.logits[1]) != reuses
    assert torch.equal(before.boxes[1], after.boxes[1]) != reuses


def test_static_stages_treat_equal_regions_alike_and_the_dynamic_stage_each_in_its_proposals_way():
    roi_feats, boxes_px, pro_feats = stage_inputs()
    roi_feats = roi_feats[:1].expand_as(roi_feats)
    static, dynamic = StaticStage(TINY), DynamicInteraction(C, TINY.dynamic_dim, R)
    assert static(roi_feats, boxes_px, pro_feats)[0].flatten(0, 1).std(0).max() < 1e-6
    found = dynamic(pro_feats.flatten(0, 1), roi_feats.flatten(2).transpose(1, 2))
    assert found.std(0).max() > 0.1


def test_static_stage_is_two_linear_layers_on_the_flattened_region():
    stage = StaticStage(TINY)
    roi_feats, boxes_px, pro_feats = stage_inputs()
    layers = stage.interaction.layers
    first, second = layers[1], layers[3]
    assert (first.in_features, first.out_features) == (R * R * C, equal_width(TINY))
    hidden = (roi_feats.reshape(B * N, -1) @ first.weight.T + first.bias).clamp(min=0)
    found = torch.nn.functional.layer_norm(hidden @ second.weight.T + second.bias, (C,)).clamp(
        min=0
    )
    torch.testing.assert_close(stage.interaction(roi_feats), found)
    expected = stage.ffn_norm(found + stage.ffn(found)).view(B, N, C)
    torch.testing.assert_close(stage(roi_feats, boxes_px, pro_feats)[2], expected)


@pytest.mark.parametrize("static, dynamic", [("attention", "grid"), ("attention-D4", "grid-D4")])
def test_static_and_dynamic_stages_are_equally_large(static, dynamic):
    counts = []
    for name in (static, dynamic):
        stage = VARIANTS[name].build(VARIANTS[name].config(ablate.ABLATION), False).head.stages[-1]
        counts.append(sum(parameter.numel() for parameter in stage.parameters()))
    assert counts[0] == pytest.approx(counts[1], rel=0.05)


def test_all_variants_can_start_from_one_backbone():
    config = replace(ablate.ABLATION, num_proposals=5)
    plain = VARIANTS["dynamic"].build(config, False)
    torch.manual_seed(1)
    started = ablate.build_from("assets/shapes.pt", VARIANTS["attention"].build)(config, False)
    expected = ablate.load_checkpoint("assets/shapes.pt")["model"]
    for key, value in started.backbone.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{key}"].to(value.dtype))
    torch.manual_seed(1)
    fresh = VARIANTS["attention"].build(config, False)
    for key, value in started.head.state_dict().items():
        assert torch.equal(value, fresh.head.state_dict()[key])
    assert plain.backbone.state_dict().keys() == started.backbone.state_dict().keys()


def test_variants_start_with_the_same_backbone_for_a_seed():
    weights = []
    for name in KINDS:
        torch.manual_seed(3)
        weights.append(build(name).backbone.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


@pytest.mark.parametrize("number", ["3", "4", "5"])
def test_all_rows_of_the_tables_with_static_stages_start_from_the_grid(number):
    for _, name, _ in ablate.TABLES[number].rows:
        boxes = build(name).proposal_boxes.data
        torch.testing.assert_close(boxes, grid_boxes(TINY.num_proposals))


def test_proposal_boxes_start_where_table_6_says():
    start = {
        name: VARIANTS[name].build(TINY, False).proposal_boxes
        for name in ("centre", "dynamic", "grid", "random")
    }
    assert all(
        boxes.requires_grad and boxes.shape == (TINY.num_proposals, 4) for boxes in start.values()
    )
    assert torch.equal(start["centre"], torch.tensor([[0.5, 0.5, 0.1, 0.1]] * TINY.num_proposals))
    assert torch.equal(start["centre"], centre_boxes(TINY.num_proposals))
    assert torch.equal(start["dynamic"], torch.tensor([[0.5, 0.5, 1.0, 1.0]] * TINY.num_proposals))
    torch.testing.assert_close(start["grid"].data, grid_boxes(TINY.num_proposals))
    assert len(start["random"].unique(dim=0)) == TINY.num_proposals


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 12, 100])
def test_grid_boxes_tile_the_image(count):
    boxes = grid_boxes(count)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    assert boxes.shape == (count, 4)
    assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6
    assert boxes[:, 2:].prod(-1).sum().item() == pytest.approx(1, abs=1e-5)
    assert (box_iou(corners, corners) - torch.eye(count)).abs().max() < 1e-4
    if count == 100:
        assert torch.allclose(boxes[:, 2:], torch.tensor(0.1))


def test_random_boxes_are_gaussian_and_have_an_area():
    boxes = random_boxes(20_000)
    assert boxes.min() >= 0 and boxes.max() <= 1 and boxes[:, 2:].min() >= 0.05
    inside = boxes[((boxes > 0.05) & (boxes < 1)).all(-1)]
    assert boxes.mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.01)
    assert (inside < 0.3).float().mean().item() == pytest.approx(
        0.153, abs=0.01
    )  # Φ(−1), for the values that are not clamped


def test_box_encoding_is_the_formula():
    boxes_px = torch.tensor([[[10.0, 20.0, 50.0, 40.0], [0.0, 0.0, 1300.0, 800.0]]])
    expected = []
    for x1, y1, x2, y2 in boxes_px[0].double().numpy():
        for value in ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1):
            angles = [value / 10_000 ** (i / 3) for i in range(3)]
            expected.append([np.sin(a) for a in angles] + [np.cos(a) for a in angles])
    expected = torch.tensor(np.array(expected).reshape(1, 2, 24), dtype=torch.float32)
    torch.testing.assert_close(box_encoding(boxes_px, 24), expected, atol=1e-4, rtol=0)


def test_positional_encoding_tells_a_stage_where_its_proposals_are():
    stage = Stage(**stage_options(TINY), interaction=DynamicInteraction(C, TINY.dynamic_dim, R))
    with_positions = PositionalStage(stage)
    roi_feats, boxes_px, pro_feats = stage_inputs()

    def logits_change(module: torch.nn.Module) -> float:
        """By how much the logits change if the same regions lie elsewhere."""
        before, after = (
            module(roi_feats, boxes, pro_feats)[0] for boxes in (boxes_px, boxes_px + 10)
        )
        return (before - after).abs().max().item()

    assert logits_change(stage) == 0 and logits_change(with_positions) > 1e-3
    boxes_px.requires_grad_(True)
    with_positions(roi_feats, boxes_px, pro_feats)[0].sum().backward()
    assert boxes_px.grad is None  # the logits see the boxes, but do not move them


def test_positional_weights_do_not_load_as_a_plain_models():
    plain = VARIANTS["dynamic"].build(TINY, False)
    with pytest.raises(RuntimeError, match=r"head\.stages\.0\.stage\."):
        plain.load_state_dict(VARIANTS["positions"].build(TINY, False).state_dict())


# --- tables ---


def test_tables_name_variants_and_agree_with_one_another():
    figures: dict[str, set] = {}
    for table in ablate.TABLES.values():
        assert table.columns.split()[:3] == ["AP", "AP50", "AP75"]
        for _, variant, values in table.rows:
            assert len(values) == len(table.columns.split())
            if None in values:
                continue  # not in the paper
            figures.setdefault(shared_name(variant, ablate.ABLATION), set()).add(values[:3])
    # In the paper, the same model has the same figures. But in our Tables 3 and 5, the last row is
    # its model started from the grid.
    several = [name for name, values in figures.items() if len(values) > 1]
    assert several == ["grid"]
    assert len(figures) == 15


def test_equal_models_are_shared_and_others_are_not():
    assert shared_name("stages-6", ablate.ABLATION) == "dynamic"
    assert shared_name("stages-6", TINY) == "stages-6"  # TINY has two stages
    assert shared_name("stages-2", TINY) == "dynamic"
    assert shared_name("cascade", replace(TINY, num_stages=1)) == "sparse"
    assert VARIANTS["proposals-x5"].config(TINY).num_proposals == 5 * TINY.num_proposals


# --- the command ---


@pytest.fixture(scope="module")
def command(tiny_flags, tmp_path_factory) -> tuple[Path, list[str], str]:
    """Table 10 by a real process: the folder, the flags, and what it printed."""
    folder = tmp_path_factory.mktemp("ablate")
    flags = [*tiny_flags, "--output", str(folder / "out"), "--runs", str(folder / "runs")]
    flags += ["--start-from", "None"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ablate", "10", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, flags, done.stdout


def no_training(*_: object) -> int:
    raise AssertionError("a training was started")


def test_the_command_writes_the_table_beside_the_papers(command):
    folder, _, printed = command
    text = (folder / "out/table10.md").read_text()
    assert text in printed
    assert "| with | 41.9 | 60.9 | 45.0 |" in text and "| without | 42.3 | 61.2 | 45.7 |" in text
    rows = json.loads((folder / "out/table10.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["positions", "dynamic"]
    for row in rows:
        lines = (folder / f"runs/{row['variant']}-seed0/metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        # In the second evaluation norms are folded and images go one at a time: the same but for
        # rounding.
        assert row["AP"] == pytest.approx(100 * last["AP"], abs=0.01)
        assert row["results"][0]["steps"] == last["step"] == 2
    assert (folder / "out/table10.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_trained_again_and_serve_other_tables(command, monkeypatch, capsys):
    folder, flags, _ = command
    monkeypatch.setattr(train, "run", no_training)
    assert ablate.main(["10", *flags]) == 0
    args = ablate.read_args(["6", *flags])
    text = ablate.write_tables(args, ["6"])[0]
    centre = "| centre | 41.5 | 59.6 | 45.0 | 25.6 | 43.9 | 56.1 |" + " – |" * 8 + " 0 |"
    assert centre in text
    dynamic = next(line for line in text.splitlines() if line.startswith("| image |"))
    assert dynamic.endswith("| 1 |")
    assert ablate.main(["6", "--only", "dynamic", *flags]) == 0
    rows = json.loads((folder / "out/table6.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["dynamic"]
    with pytest.raises(AssertionError, match="a training was started"):
        ablate.main(["3", *flags])
    with pytest.raises(AssertionError, match="a training was started"):
        ablate.main(["10", *flags, "--lr", "0.01", "--runs", str(folder / "other")])


def test_other_settings_start_anew_and_keep_the_old_run(command, tmp_path, capsys):
    folder, flags, _ = command
    run = tmp_path / "runs/positions-seed0"
    run.parent.mkdir()
    run.mkdir()
    for name in ("config.json", "result.json"):
        (run / name).write_text((folder / f"runs/positions-seed0/{name}").read_text())
    args = ablate.read_args(["10", *flags, "--runs", str(run.parent), "--shapes-train", "4"])
    positions = ablate.Run("positions", 0, args.config.lr)
    assert ablate.read_result(args, positions) is None
    assert ablate.train_variant(args, positions) == 0
    assert ablate.read_result(args, positions)["steps"] == 1
    assert json.loads((run.parent / "positions-seed0.old1/result.json").read_text())["steps"] == 2
    assert "positions-seed0.old1" in capsys.readouterr().out
    # A setting that does not change the training does not count.
    same = replace(args, config=replace(args.config, checkpoint_minutes=1))
    assert ablate.read_result(same, positions) is not None


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(command, tmp_path, monkeypatch, capsys):
    folder, flags, _ = command
    flags = [*flags, "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    step = train.train_step

    def signalled(*inputs):
        values = step(*inputs)
        signal.raise_signal(signal.SIGTERM)
        return values

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", signalled)
        assert ablate.main(["10", *flags]) == 128 + signal.SIGTERM
    assert not (tmp_path / "runs/positions-seed0/result.json").exists()
    assert not (tmp_path / "runs/dynamic-seed0").exists()
    assert ablate.main(["10", *flags]) == 0
    assert "at step 1 of 2" in capsys.readouterr().out
    for variant in ("positions", "dynamic"):
        lines = [
            json.loads((path / f"{variant}-seed0/metrics.jsonl").read_text())
            for path in (tmp_path / "runs", folder / "runs")
        ]
        assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)


def test_runs_of_another_process_are_passed_over(command, tmp_path, monkeypatch, capsys):
    folder, flags, _ = command
    monkeypatch.setattr(train, "run", no_training)
    result = folder / "runs/dynamic-seed0/result.json"
    result.rename(folder / "kept.json")  # the run is not finished
    with ablate.claim(folder / "runs/dynamic-seed0.lock") as is_mine:
        assert is_mine
        assert ablate.main(["10", *flags]) == 0
        assert "another process is working on dynamic-seed0;" in capsys.readouterr().out
        (folder / "kept.json").rename(result)
        assert ablate.main(["10", *flags]) == 0
        assert "another process" not in capsys.readouterr().out
    with ablate.claim(folder / "runs/dynamic-seed0.lock") as is_mine:
        assert is_mine


def test_seeds_are_averaged():
    result = {"AP50": 0.5, "AP75": -1.0, "APs": 0.1, "APm": 0.2, "APl": -1.0}
    result |= {"FPS": 10.0, "time": 2.0}
    result |= {"gflop_of_head": 0.5, "parameters": 7}
    results = [{**result, "AP": ap} for ap in (0.30, 0.34, 0.35)]
    found = ablate.summary(results)
    assert (found["AP"], found["spread"]) == (pytest.approx(33), pytest.approx(2.5))
    assert (found["FPS"], found["parameters"], found["seeds"]) == (10, 7, 3)
    assert "AP75" not in found and "APl" not in found
    assert ablate.summary([]) == {"seeds": 0}


def test_each_variant_gets_the_rate_that_is_best_on_other_images(tmp_path):
    flags = ["10", "--lrs", "1e-3", "2e-3", "--seeds", "4", "5", "--runs", str(tmp_path)]
    args = ablate.read_args(flags)
    trials = ablate.trials_of(args, "positions")
    # The dynamic head of Tables 3 and 5 stands for all variants with such a head.
    assert trials == [("grid", 4, 1e-3), ("grid", 4, 2e-3)]
    # The rate that is worse in the reported AP is the better one where rates are chosen.
    for run, ap, tune_ap in zip(trials, (0.5, 0.4), (0.3, 0.6), strict=True):
        assert ablate.runs_of(args, "positions") == []
        config = args.config_of(run)
        assert config.lr == run.lr
        path = args.folder_of(run) / "result.json"
        path.parent.mkdir()
        ablate.write_json(path, {"AP": ap, "tune_AP": tune_ap, "config": config.to_dict()})
    assert ablate.runs_of(args, "positions") == [("positions", 4, 2e-3), ("positions", 5, 2e-3)]


def test_shapes_for_choosing_are_neither_trained_on_nor_reported():
    images = [ShapesDataset("crowded", split, 1)[0][0] for split in ("train", "val", "tune")]
    assert not any(torch.equal(images[2], other) for other in images[:2])


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no table given"),
        (["3", "--train-json", "a.json", "--train-images", "a"], "nothing to evaluate on"),
        (["3", "--preset", "huge"], "no such preset"),
        (["6", "--seeds", "-1"], "seed=-1 should be at least 0"),
        (["6", "--only", "gird"], "--only gird: choose from sparse"),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", no_training)
    with pytest.raises(UserError, match=message):
        ablate.main(argv)


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="without torchrun"):
        ablate.main(["3"])


def test_a_wrong_table_is_no_table(capsys):
    with pytest.raises(SystemExit) as ended:
        ablate.main(["9"])
    assert ended.value.code == 2

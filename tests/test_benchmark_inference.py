"""`python -m experiments.benchmark inference`: its figures, and that what it compares is comparable."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_benchmark import check_refused, printed_rows
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from backbone import FrozenBatchNorm
from experiments import benchmark_inference, benchmark_peers
from experiments.benchmark import main
from experiments.benchmark_inference import (
    FAST,
    FIRST,
    PLAIN,
    WHOLE,
    count_flops,
    differences,
    our_models,
    parts,
    random_model,
)
from experiments.benchmark_peers import build_peer, build_torchvision, rois_per_image
from experiments.measure import product_rate
from support.cli import run_main

TINY_RUN = [
    "inference",
    "--preset",
    "shapes",
    "--device",
    "cpu",
    "--height",
    "64",
    "--width",
    "96",
    "--repeats",
    "1",
]


def test_inference_prints_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*TINY_RUN, "--peers", "faster-rcnn", "--output", str(tmp_path / "new" / "speed.jsonl")])
    text, line = capsys.readouterr().out, json.loads((tmp_path / "new" / "speed.jsonl").read_text())
    rows = {(row["variant"], row["dtype"], row["part"]): row for row in line["rows"]}
    dtypes, each = ("float32", "bfloat16"), ("prepare", "backbone", "head", "post-processing")
    ours = (FIRST, f"{FIRST}, norms folded", PLAIN, FAST)
    expected = {(name, dtype, WHOLE) for name in (*ours, "faster-rcnn") for dtype in dtypes}
    assert set(rows) == expected | {
        (name, dtype, part) for name in (PLAIN, FAST) for dtype in dtypes for part in each
    }
    for row, cells in zip(line["rows"], printed_rows(text), strict=True):
        assert cells[:4] == [row["variant"], row["part"], row["dtype"], f"{row['median_ms']:.1f}"]
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert cells[9] == "–" and (row["part"] == WHOLE) == (cells[5] != "–") == (cells[8] != "–")
    for name in ours:  # the same work, and the same detections
        assert rows[name, "float32", WHOLE]["gflop"] == rows[PLAIN, "bfloat16", WHOLE]["gflop"]
        found, rounded = rows[name, "float32", WHOLE], rows[name, "bfloat16", WHOLE]
        assert found["score_difference"] < 1e-5 < rounded["score_difference"] < 0.1
        assert found["box_difference_px"] < 0.01 < rounded["box_difference_px"]
    assert rows[FAST, "float32", WHOLE]["score_difference"] > 0  # otherwise it is the plain model
    whole = rows[PLAIN, "float32", WHOLE]
    assert whole["gflop"] == pytest.approx(
        sum(rows[PLAIN, "float32", part]["gflop"] or 0 for part in each)
    )
    rate = line["float32_product_gflop_per_s"]
    assert whole["of_product_rate"] == pytest.approx(
        whole["gflop"] / (whole["median_ms"] / 1000) / rate
    )
    for dtype in dtypes:
        ratio = (
            rows[FAST, dtype, WHOLE]["median_ms"]
            / rows["faster-rcnn", "float32", WHOLE]["median_ms"]
        )
        assert (
            line[f"{dtype}_over_faster_rcnn"] == ratio
            and f"{dtype}_over_faster_rcnn: {ratio:.2f}\n" in text
        )
    for part in (
        torch.__version__,
        "threads 1",
        "shapes",
        "64×96 px",
        "batch 1",
        "warm-up 1",
        "repeats 1",
    ):
        assert part in text.splitlines()[0]


def test_what_is_not_installed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_peers.importlib.util, "find_spec", lambda name: None)
    main(
        [
            *TINY_RUN,
            "--batch-size",
            "2",
            "--amp",
            "bf16",
            "--peers",
            "detr",
            "--output",
            str(tmp_path / "x.jsonl"),
        ]
    )
    text, line = capsys.readouterr().out, json.loads((tmp_path / "x.jsonl").read_text())
    assert (
        text.startswith("left out: detr, as transformers is not installed\n") and line["batch"] == 2
    )
    assert {row["dtype"] for row in line["rows"]} == {
        "bfloat16"
    } and "bfloat16_over_faster_rcnn" not in line
    for row in line["rows"]:
        if row["part"] == WHOLE:
            assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--batch-size", "0"], "--batch-size"),
        (["--amp"], "--amp"),
        (["--seed", "-1"], "--seed"),
        (["--height", "31"], "31×1216 px"),
        (["--device", "gpu"], "--device gpu"),
        (["--peers", "yolo"], "yolo"),
        (["--preset", "r18"], "r18"),
    ],
)
def test_mistakes_exit_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(["inference", *argv], message, capsys)


def test_a_missing_compiler_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(benchmark_inference.torch, "compile", lambda function: fail)
    assert run_main(lambda: main([*TINY_RUN, "--compile"]), "experiments.benchmark") == 2
    assert (
        capsys.readouterr().err
        == "experiments.benchmark: --compile: torch.compile does not work here (no C++ compiler)\n"
    )


def test_operations_equal_the_formulas() -> None:
    convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1).eval()
    with torch.inference_mode():
        assert (
            count_flops(lambda: convolution(torch.rand(2, 3, 8, 12))) == 2 * 2 * 5 * 4 * 6 * 3 * 9
        )
    B, N, K, C, D, R, F = (
        2,
        TINY.num_proposals,
        TINY.num_classes,
        TINY.hidden_dim,
        TINY.dynamic_dim,
        TINY.roi_size,
        32,
    )
    attention = (
        4 * C * C + 2 * N * C
    )  # multiply-adds a proposal: four projections; scores and weighted sums
    interaction = 2 * C * C * D + 2 * R * R * C * D + R * R * C * C
    predictions = (TINY.num_cls_layers + TINY.num_reg_layers) * C * C + C * (K + 4)
    stage = attention + interaction + 2 * C * F + predictions
    model, images = random_model(TINY), list(torch.rand(B, 3, 64, 96))
    with torch.inference_mode():
        calls = parts(model.for_inference(), images)
        assert count_flops(calls["head"]) == 2 * B * N * TINY.num_stages * stage
        assert count_flops(calls["prepare"]) == count_flops(calls["post-processing"]) == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_differences_are_those_of_scores_and_boxes() -> None:
    model, images = random_model(TINY), [torch.rand(3, 64, 96)]
    with torch.inference_mode():
        expected = model.stages(images)
        assert differences(model, images, expected) == {
            "score_difference": 0,
            "box_difference_px": 0,
        }
        scores = expected.logits.sigmoid()
        model.head.stages[-1].cls_logits.bias[1] += 0.5
        found = differences(model, images, expected)
        shifted = torch.sigmoid(expected.logits[-1, ..., 1] + 0.5) - scores[-1, ..., 1]
        assert found == {
            "score_difference": pytest.approx(shifted.max().item(), rel=1e-5),
            "box_difference_px": 0,
        }
        model.proposal_boxes[0, 0] += 8 / 96
        assert differences(model, images, expected)["box_difference_px"] > 4
    # a comparison of scores that are all 0 or 1, or of boxes of one size, would be none
    sides_px = model.proposal_boxes[:, 2:] * torch.tensor([96, 64])
    assert (
        scores.std() > 1e-3
        and 0.001 < scores.min() < scores.max() < 0.999
        and sides_px.max() > 4 * sides_px.min()
    )


@pytest.mark.parametrize("hw", [(800, 1216), (96, 160), (160, 96), (100, 130)])
@pytest.mark.parametrize("build", [fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn])
def test_peers_do_not_resize(build: Callable[..., nn.Module], hw: tuple[int, int]) -> None:
    with torch.device("meta"):
        transform = build_torchvision(build, *hw).transform
    image = torch.rand(3, *hw)
    batch, _ = transform([image])
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (transform.image_mean, transform.image_std)
    )
    assert batch.image_sizes == [hw] and batch.tensors.shape[2:] == tuple(
        -(-side // 32) * 32 for side in hw
    )
    assert torch.allclose(batch.tensors[0, :, : hw[0], : hw[1]], (image - mean) / std, atol=1e-5)


def test_a_cascade_of_equal_stages_that_move_nothing_is_faster_rcnn() -> None:
    cascade, single = build_peer("cascade-rcnn", 64, 96), build_peer("faster-rcnn", 64, 96)
    single.roi_heads.box_predictor.bbox_pred.weight.zero_()
    single.roi_heads.box_predictor.bbox_pred.bias.zero_()
    single.roi_heads.box_predictor.cls_score.weight *= 100  # scores beyond the threshold
    cascade.backbone.load_state_dict(single.backbone.state_dict())
    cascade.rpn.load_state_dict(single.rpn.state_dict())
    for stage in cascade.roi_heads.stages:
        stage.box_head.load_state_dict(single.roi_heads.box_head.state_dict())
        stage.cls_score.load_state_dict(single.roi_heads.box_predictor.cls_score.state_dict())
        stage.bbox_pred.weight.zero_()
        stage.bbox_pred.bias.zero_()
    images = list(torch.rand(2, 3, 64, 96))
    for found, expected in zip(cascade(images), single(images), strict=True):
        assert len(expected["scores"]) > 10
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
    # Each stage works on the boxes that the one before has moved.
    cascade.roi_heads.stages[0].bbox_pred.bias[0] = (
        10.0  # by one width, as the first stage's deltas are tenths
    )
    seen = []
    hook = cascade.roi_heads.roi_heads.box_roi_pool.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[1])
    )
    cascade(images)
    hook.remove()
    first, second, third = (boxes[0] for boxes in seen)
    moved = first[:, [0, 2]] + (first[:, 2] - first[:, 0])[:, None]
    torch.testing.assert_close(second[:, [0, 2]], moved.clamp(0, 96))
    torch.testing.assert_close(second[:, [1, 3]], first[:, [1, 3]])
    torch.testing.assert_close(third, second)


def test_variants_differ_in_what_they_are_named_after() -> None:
    models = our_models(replace(TINY, backbone="resnet18"), torch.device("cpu"), compiled=False)
    assert list(models) == [FIRST, f"{FIRST}, norms folded", PLAIN, FAST]
    for name, model in models.items():
        assert any(isinstance(module, FrozenBatchNorm) for module in model.modules()) != (
            "folded" in name or name == FAST
        )
        weight = model.backbone.body["layer1"][0].conv1.weight
        assert weight.is_contiguous() == name.startswith(FIRST)
        assert weight.is_contiguous(memory_format=torch.channels_last) != name.startswith(FIRST)


def test_rois_are_those_of_the_rpn() -> None:
    model, images = build_peer("faster-rcnn", 64, 96), list(torch.rand(2, 3, 64, 96))
    with torch.inference_mode():
        batch, _ = model.transform(images)
        proposals, _ = model.rpn(batch, model.backbone(batch.tensors))
        assert rois_per_image(model, images) == sum(map(len, proposals)) / 2 > 100
        for _ in range(2):  # the hook is gone: the second pass counts for itself
            assert rois_per_image(model, images[:1]) == len(proposals[0])


@pytest.mark.parametrize(("name", "queries"), [("detr", 100), ("deformable-detr", 300)])
def test_transformers_peers_detect(name: str, queries: int) -> None:
    pytest.importorskip("transformers")
    model, images = build_peer(name, 64, 96), list(torch.rand(2, 3, 64, 96))
    with torch.inference_mode():
        logits, boxes = model(images)
        assert count_flops(lambda: model(images)) > 2e9
    assert (
        logits.shape[:2] == (2, queries)
        and boxes.shape == (2, queries, 4)
        and 0 <= boxes.min() < boxes.max() <= 1
    )


def test_the_product_rate_counts_multiply_adds_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100, 2))  # every measurement takes 2 s
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    assert product_rate(torch.device("cpu"), torch.bfloat16, repeats=1) == 2 * 2048**3 / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_inference_on_a_gpu_counts_memory(tmp_path: Path) -> None:
    main(
        [
            *TINY_RUN,
            "--device",
            "cuda",
            "--peers",
            "retinanet",
            "--output",
            str(tmp_path / "x.jsonl"),
        ]
    )
    line = json.loads((tmp_path / "x.jsonl").read_text())
    assert line["device"] == torch.cuda.get_device_name()
    for row in line["rows"]:
        if (
            row["part"] == WHOLE
        ):  # more than the float32 weights, less than all models together and 1 GB
            assert 4 * row["parameters_m"] < row["peak_mb"] < 1200

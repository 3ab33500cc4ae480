"""experiments/benchmark.py: its figures are of what they say, on any machine."""

import time

import pytest
import torch
from conftest import CPU, TINY, objects

from config import PRESETS
from experiments import benchmark, measure
from experiments.detectors import TrainedPeer, build_peer

SMALL = {"preset": "shapes", "device": "cpu", "height": 64, "width": 96, "repeats": 2}


def test_variants_take_turns_after_a_warm_up(monkeypatch) -> None:
    now, order, seconds = [0.0], [], {"a": [99, 1, 8, 2], "b": [99, 4, 5, 16]}

    def run(name: str) -> None:
        order.append(name)
        now[0] += seconds[name].pop(0)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    # The device is waited for on both sides of every run.
    monkeypatch.setattr(measure, "synchronize", lambda device: order.append("sync"))
    calls = {name: lambda name=name: run(name) for name in "ab"}
    found = measure.take_turns(calls, 3, CPU.device)
    assert order == ["sync", "a", "sync", "sync", "b", "sync"] * 4
    assert found == {"a": [1, 8, 2], "b": [4, 5, 16]}
    assert measure.times_ms(found["a"]) == {"median_ms": 2000, "min_ms": 1000, "max_ms": 8000}


@torch.inference_mode()
def test_operations_equal_the_formulas() -> None:
    B, N, K, C = 2, TINY.num_proposals, TINY.num_classes, TINY.hidden_dim
    D, R, F = TINY.dynamic_dim, TINY.roi_size, TINY.ffn_dim
    # Multiply-adds per proposal: four projections, the scores of all pairs and their weighted sums.
    attention = 4 * C * C + 2 * N * C
    interaction = 2 * C * C * D + 2 * R * R * C * D + R * R * C * C
    layers = (TINY.num_cls_layers + TINY.num_reg_layers) * C * C + C * (K + 4)
    stage = attention + interaction + 2 * C * F + layers
    model, images = benchmark.random_model(TINY).for_inference(), [torch.rand(3, 64, 96)] * B
    batch, _ = model.prepare(images)
    head = measure.count_flops(lambda: model(images)) - measure.count_flops(
        lambda: model.backbone(batch)
    )
    assert head == 2 * B * N * TINY.num_stages * stage


def test_inference_measures_each_model_in_each_precision(monkeypatch) -> None:
    model, dtypes = benchmark.random_model(PRESETS["shapes"]), []
    of_one_image = measure.count_flops(lambda: model([torch.rand(3, 64, 96)])) / 1e9
    layer = model.head.stages[0].ffn[0]
    layer.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    monkeypatch.setattr(benchmark, "random_model", lambda config: model)
    args = benchmark.BenchmarkArgs(
        "inference", **SMALL, batch_size=2, amp=("off", "bf16", "fp16"), peers=()
    )
    rows = benchmark.measure(args, CPU.device)
    # A turn to warm up, two more, and then the operations are counted.
    precisions = [torch.float32, torch.bfloat16, torch.float16]
    assert dtypes == precisions * 4
    assert [(row["model"], row["amp"]) for row in rows] == [("ours", amp) for amp in args.amp]
    assert [row["gflop"] for row in rows] == pytest.approx([of_one_image] * 3)
    assert rows[1]["images_per_second"] == pytest.approx(2000 / rows[1]["median_ms"])


def test_training_measures_steps_of_the_recipe(monkeypatch) -> None:
    steps, step = [], benchmark.train_step

    def seen(training, images, targets, num_objects):
        values = step(training, images, targets, num_objects)
        steps.append((training.config.amp, len(images), num_objects))
        assert all(torch.isfinite(torch.as_tensor(value)) for value in values.values())
        return values

    monkeypatch.setattr(benchmark, "train_step", seen)
    args = benchmark.BenchmarkArgs("training", **SMALL, peers=("retinanet",), batch_size=3)
    rows = benchmark.measure(args, CPU.device)
    assert steps == [("off", 3, 21)] * 6  # a turn to warm up and two more, of two models
    assert [row["model"] for row in rows] == ["ours", "retinanet"]
    assert rows[0]["images_per_second"] == pytest.approx(3000 / rows[0]["median_ms"])


def test_peers_do_not_resize() -> None:
    with torch.device("meta"):
        transform = build_peer("retinanet", height=100, width=130).transform
    batch, _ = transform([torch.rand(3, 100, 130)])
    assert batch.image_sizes == [(100, 130)] and batch.tensors.shape[2:] == (128, 160)


def test_a_peer_trains_what_our_recipe_trains() -> None:
    peer = TrainedPeer(build_peer("retinanet", 64, 96))
    before = {name: buffer.clone() for name, buffer in peer.named_buffers()}
    images, target = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8), objects(3, 80, 96, 64)
    sum(peer(list(images), [target]).values()).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in peer.named_buffers())
    body = [name for name, p in peer.named_parameters() if p.grad is not None and "body" in name]
    assert {name.split(".")[3] for name in body} == {"layer2", "layer3", "layer4"}
    assert not any("bn" in name for name in body)

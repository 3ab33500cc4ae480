"""experiments/benchmark.py: its figures are of what they say, on any machine."""

import json
import pickle
import pickletools
import time
from dataclasses import replace

import pytest
import torch
from conftest import TINY, CocoFactory, new_training, objects

from data import CocoDataset
from experiments import benchmark, measure
from experiments.benchmark import FAST, Data, Growth, Inference, Matcher, TrainingSpeed
from experiments.peers import build_peer
from model import SparseRCNN
from support.cli import run_main
from support.errors import UserError
from support.loader import Batch

CPU = torch.device("cpu")
SMALL = {"preset": "shapes", "device": "cpu", "height": 64, "width": 96, "repeats": 2}


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """The rates that the benchmarks find, instead of this machine's; a test may change them."""
    found = {torch.float32: 100e9, torch.bfloat16: 200e9}
    monkeypatch.setattr(measure, "product_rate", lambda device, dtype: found[dtype])
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves `clock[0]`, in seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


# --- measuring ---


def test_variants_take_turns_after_a_warm_up(clock, monkeypatch) -> None:
    order, seconds = [], {"a": [99, 1, 8, 2], "b": [99, 4, 5, 16]}

    def run(name: str) -> None:
        order.append(name)
        clock[0] += seconds[name].pop(0)

    # The device is waited for on both sides of every run.
    monkeypatch.setattr(measure, "synchronize", lambda device: order.append("sync"))
    found = measure.take_turns({name: lambda name=name: run(name) for name in "ab"}, repeats=3)
    assert order == ["sync", "a", "sync", "sync", "b", "sync"] * 4
    assert found == {"a": [1, 8, 2], "b": [4, 5, 16]}
    assert measure.times_ms(found["a"]) == {"median_ms": 2000, "min_ms": 1000, "max_ms": 8000}


@pytest.mark.parametrize("rate", [0.3e9, 2e11, 9e14])  # slow bfloat16, two cores, a GPU
def test_the_product_is_as_large_as_the_machine_allows(rate, clock, monkeypatch) -> None:
    taken = []

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        taken.append(2 * a.shape[0] * a.shape[1] * b.shape[1] / rate)
        clock[0] += taken[-1]

    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(shape, device="meta"))
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert measure.product_rate(CPU, torch.bfloat16) == pytest.approx(rate)
    assert sum(taken) < 1.2 and (taken[-1] > 0.05 or rate == 9e14)


def test_precisions_are_slow_by_measurement(rates) -> None:
    assert benchmark.product_rates(["off", "bf16"], CPU) == ({"off": 100, "bf16": 200}, [])
    rates[torch.bfloat16] = 54e9
    found, [note] = benchmark.product_rates(["off", "bf16"], CPU)
    assert found == {"off": 100, "bf16": 54}
    assert "--amp bf16 gains nothing here" in note and "54.0 against 100.0 GFLOP/s" in note
    rates[torch.bfloat16] = 0.3e9
    found, [note] = benchmark.product_rates(["bf16", "off"], CPU)
    assert found == {"off": 100} and "--amp bf16 is left out" in note
    with pytest.raises(UserError, match="nothing is left to measure; --amp bf16 is left out"):
        TrainingSpeed(**SMALL, amp=("bf16",)).run()


def test_operations_equal_the_formulas() -> None:
    B, N, K, C = 2, TINY.num_proposals, TINY.num_classes, TINY.hidden_dim
    D, R, F = TINY.dynamic_dim, TINY.roi_size, TINY.ffn_dim
    # Multiply-adds per proposal: four projections, the scores of all pairs and their weighted sums.
    attention = 4 * C * C + 2 * N * C
    interaction = 2 * C * C * D + 2 * R * R * C * D + R * R * C * C
    layers = (TINY.num_cls_layers + TINY.num_reg_layers) * C * C + C * (K + 4)
    stage = attention + interaction + 2 * C * F + layers
    model = benchmark.random_model(TINY).for_inference()
    with torch.inference_mode():
        head = benchmark.parts_of(model, [torch.rand(3, 64, 96)] * B)["head"]
        assert measure.count_flops(head) == 2 * B * N * TINY.num_stages * stage
    assert torch.backends.mha.get_fastpath_enabled()


# --- inference and growth ---


def test_inference_measures_what_its_rows_say(rates, monkeypatch) -> None:
    seen, forward = [], benchmark.DynamicHead.forward

    def head(self, levels, *inputs):
        seen.append(levels[0].dtype)
        return forward(self, levels, *inputs)

    monkeypatch.setattr(benchmark.DynamicHead, "forward", head)
    rows = Inference(**SMALL, batch_size=2, amp=("bf16",), peers=()).run()[0]
    assert seen[-9:] == [torch.bfloat16] * 9  # three turns of three rows

    found = {(row["variant"], row["part"]): row for row in rows}
    assert list(found) == [("ours", "all"), *((FAST, part) for part in ("all", "backbone", "head"))]
    for row in rows:
        assert row["of_rate"] == pytest.approx(2 * row["gflop"] / row["median_ms"] * 1000 / 200)
    whole = found[FAST, "all"]
    parts = found[FAST, "backbone"]["gflop"] + found[FAST, "head"]["gflop"]
    assert whole["gflop"] == found["ours", "all"]["gflop"] == pytest.approx(parts)


def test_peers_do_not_resize() -> None:
    with torch.device("meta"):
        transform = build_peer("retinanet", height=100, width=130).transform
    batch, _ = transform([torch.rand(3, 100, 130)])
    assert batch.image_sizes == [(100, 130)] and batch.tensors.shape[2:] == (128, 160)


def test_a_cascade_of_equal_heads_that_move_nothing_is_faster_rcnn() -> None:
    cascade, single = build_peer("cascade-rcnn", 64, 96), build_peer("faster-rcnn", 64, 96)
    heads, predictor = cascade.roi_heads, single.roi_heads.box_predictor
    predictor.cls_score.weight *= 100  # scores above the threshold
    cascade.backbone.load_state_dict(single.backbone.state_dict())
    cascade.rpn.load_state_dict(single.rpn.state_dict())
    for i in range(3):
        heads.box_heads[i].load_state_dict(single.roi_heads.box_head.state_dict())
        heads.cls_scores[i].load_state_dict(predictor.cls_score.state_dict())
    for layer in (predictor.bbox_pred, *heads.bbox_preds):
        layer.weight.zero_()
        layer.bias.zero_()
    images = list(torch.rand(2, 3, 64, 96))
    for found, expected in zip(cascade(images), single(images), strict=True):
        assert len(expected["scores"]) > 10
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)

    # Each head works on the boxes that the one before has moved: here by their width.
    heads.bbox_preds[0].bias[0] = 10.0
    seen = []
    heads.pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][0]))
    cascade(images)
    x1, y1, x2, y2 = seen[0].unbind(1)
    moved = torch.stack((x2, y1, 2 * x2 - x1, y2), dim=1).clamp(max=96)
    torch.testing.assert_close(seen[1:], [moved, moved])


def test_growth_runs_the_sizes_of_its_rows(monkeypatch) -> None:
    called, forward = [], SparseRCNN.forward

    def seen(model: SparseRCNN, images: list[torch.Tensor]) -> list:
        called.append((len(model.proposal_boxes), len(model.head.stages), *images[0].shape[1:]))
        return forward(model, images)

    monkeypatch.setattr(SparseRCNN, "forward", seen)
    rows = Growth(**SMALL).run()[0]
    sizes = [(row["proposals"], row["stages"], *map(int, row["size"].split("×"))) for row in rows]
    assert called == 3 * sizes and len(set(sizes)) == 10
    assert rows[1]["ratio"] == rows[1]["median_ms"] / rows[0]["median_ms"]


# --- matcher, training, data ---


def test_matcher_counts_pairs() -> None:
    rows = Matcher("shapes", "cpu", batch_size=2, repeats=1, objects=(0, 3, 50)).run()[0]
    S, B, N = 3, 2, 20
    assert [row["pairs"] for row in rows] == [0, S * B * 3, S * B * N]
    assert all(row["each_ms"] == row["median_ms"] / (S * B) for row in rows)


def test_each_part_of_a_step_has_its_own_time(clock, monkeypatch) -> None:
    takes = {"forward": 7.0, "matching": 5.0, "backward": 11.0, "optimiser": 3.0}

    def slow(part: str, function):
        def run(*args, **kwargs):
            clock[0] += takes[part]
            return function(*args, **kwargs)

        return run

    training = new_training(replace(TINY, micro_batch=2))
    model, optimizer = training.model, training.optimizer
    model.head.forward = slow("forward", model.head.forward)
    model.criterion.matcher.forward = slow("matching", model.criterion.matcher.forward)
    monkeypatch.setattr(torch.Tensor, "backward", slow("backward", torch.Tensor.backward))
    optimizer._init_group = slow("optimiser", optimizer._init_group)  # step() calls it once
    targets = [objects(3, TINY.num_classes, 96, 64, seed) for seed in range(4)]
    batch = Batch(list(torch.rand(4, 3, 64, 96)), targets, num_objects=12)
    twice = {part: 2 * seconds for part, seconds in takes.items()}
    for _ in range(2):  # the second time, the hooks of the first are gone
        assert benchmark.step_in_parts(training, batch) == {**twice, "optimiser": 3.0}


def test_training_measures_steps_of_the_recipe(rates, monkeypatch) -> None:
    steps, step = [], benchmark.train_step

    def seen(training, batch):
        steps.append((training.config.amp, len(batch.images), training.config.micro_batch))
        return step(training, batch)

    monkeypatch.setattr(benchmark, "train_step", seen)
    rows = TrainingSpeed(**SMALL, batch_size=3, micro_batch=2).run()[0]
    assert steps == ([("off", 3, 2)] * 2 + [("bf16", 3, 2)] * 2) * 3  # whole, then in parts
    for amp in ("off", "bf16"):
        whole, *parts = [row for row in rows if row["amp"] == amp]
        assert whole["images_per_second"] == pytest.approx(3000 / whole["median_ms"])
        assert sum(row["share"] for row in parts) == pytest.approx(1)


def test_data_counts_images(make_coco: CocoFactory, clock, monkeypatch) -> None:
    load, loaded = CocoDataset.__getitem__, []

    def slow(dataset: CocoDataset, index: int) -> tuple:
        clock[0] += 0.5
        loaded.append(index)
        return load(dataset, index)

    monkeypatch.setattr(CocoDataset, "__getitem__", slow)
    files = dict(
        zip(("train_json", "train_images"), map(str, make_coco(num_images=5)), strict=True)
    )
    for settings in ({"images": 3}, {"images": 3, **files}):
        [row] = Data(**settings, workers=(0,), repeats=1).run()[0]
        assert row["images_per_second"] == 2
    assert loaded == [0, 1, 2] * 4


def test_annotations_are_arrays_that_a_forked_worker_does_not_copy(make_coco: CocoFactory) -> None:
    # Reading a Python object changes its reference count, and so copies its page of memory.
    json_file, folder = make_coco()
    coco = json.loads(json_file.read_text())
    counts = []
    for copies in (1, 50):
        more = [{**a, "id": i} for i, a in enumerate(copies * coco["annotations"])]
        json_file.write_text(json.dumps({**coco, "annotations": more}))
        dataset = CocoDataset(json_file, folder)
        assert dataset.objects_per_image.sum() == len(more)
        counts.append(sum(1 for _ in pickletools.genops(pickle.dumps(dataset))))
    assert counts[0] == counts[1]


# --- the command line ---


def test_it_prints_a_table_and_its_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["data", "--images", "2", "--workers", "0", "1", "--repeats", "1"])
    head, _, *table = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in head and "images 2" in head
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["0", "1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "inference, training"),
        (["data", "--repeats", "0"], "--repeats 0: should be at least 1"),
        (["data", "--train-json", "x.json"], "--train-images is missing"),
        (["inference", "--height", "31"], "--height 31"),
        (["inference", "--amp"], "--amp needs at least one value"),
        (["training", "--micro-batch", "3"], "micro_batch=3"),
        (["matcher", "--objects", "7", "-1"], "--objects -1"),
        (["growth", "--device", "gpu"], "--device gpu"),
    ],
)
def test_mistakes_exit_with_2(argv: list[str], message: str, capsys) -> None:
    try:
        status = run_main(lambda: benchmark.main(argv), "experiments.benchmark")
    except SystemExit as stop:  # tyro has printed the message
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2 and message in printed.err and printed.out == ""

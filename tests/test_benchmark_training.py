"""`python -m experiments.benchmark training`, `matcher` and `growth`: their figures are of what they say."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_benchmark import check_refused, printed_rows

from data import make_dataset
from experiments.benchmark import main
from experiments.benchmark_growth import VARIANTS, with_size
from experiments.benchmark_inference import random_model
from experiments.benchmark_training import PARTS, TimedTrainer, step_flops
from experiments.measure import PeakMemory
from model import SparseRCNN
from support.loader import GroupedBatches, make_loader
from train import Trainer

CPU = torch.device("cpu")


def variant_of(config=TINY) -> TimedTrainer:
    dataset = make_dataset(config, "train")
    batches = GroupedBatches(dataset.sizes_hw, config.batch_size, config.seed)
    return TimedTrainer(config, CPU, make_loader(dataset, batches, 0, reseeded=True))


# --- training ---


def test_training_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "speed.jsonl"
    flags = [
        "--preset",
        "shapes",
        "--device",
        "cpu",
        "--size",
        "48",
        "--workers",
        "0",
        "--repeats",
        "2",
    ]
    main(
        [
            "training",
            *flags,
            "--batch-size",
            "1",
            "3",
            "--micro-batch",
            "2",
            "--output",
            str(output),
        ]
    )
    text, line = capsys.readouterr().out, json.loads(output.read_text())
    rows = {(row["batch"], row["dtype"], row["part"]): row for row in line["rows"]}
    assert set(rows) == {
        (b, d, p) for b in (1, 3) for d in ("float32", "bfloat16") for p in ("all", *PARTS)
    }
    for row, cells in zip(line["rows"], printed_rows(text), strict=True):
        assert cells[:5] == [
            str(row["batch"]),
            "plain",
            row["part"],
            row["dtype"],
            f"{row['median_ms']:.1f}",
        ]
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert (row["part"] == "all") == (cells[7] != "–") == (cells[6] == "–")
    for batch in (1, 3):
        whole = rows[batch, "float32", "all"]
        assert whole["images_per_second"] == pytest.approx(1000 * batch / whole["median_ms"])
        rate = line["float32_product_gflop_per_s"]
        assert whole["of_product_rate"] == pytest.approx(
            whole["gflop"] * whole["images_per_second"] / rate
        )
        shares = [rows[batch, "float32", part]["share"] for part in PARTS]
        assert (
            all(0 < share < 1 for share in shares) and 0.5 < sum(shares) < 1.5
        )  # medians, so not quite 1
    for part in (
        torch.__version__,
        "threads 1",
        "preset shapes",
        "48×64 px",
        "micro-batch 2",
        "repeats 2",
    ):
        assert part in text.splitlines()[0]


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_each_part_of_a_step_has_its_own_time(
    monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    now, steps = [0.0], 2
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    takes = {"data": 13.0, "forward": 7.0, "matching": 5.0, "backward": 11.0, "optimiser": 3.0}

    def slow(part: str, function):  # the clock stands still but for these
        def run(*args, **kwargs):
            now[0] += takes[part]
            return function(*args, **kwargs)

        return run

    def batches(loaded):
        for batch in loaded:
            now[0] += takes["data"]
            yield batch

    variant = variant_of(replace(TINY, micro_batch=micro_batch))
    model, optimizer = variant.trainer.model, variant.trainer.optimizer
    own_iter = torch.utils.data.DataLoader.__iter__
    monkeypatch.setattr(
        torch.utils.data.DataLoader, "__iter__", lambda loader: batches(own_iter(loader))
    )
    model.head.forward = slow("forward", model.head.forward)
    model.criterion.matcher.forward = slow("matching", model.criterion.matcher.forward)
    monkeypatch.setattr(torch.Tensor, "backward", slow("backward", torch.Tensor.backward))
    optimizer._init_group = slow(
        "optimiser", optimizer._init_group
    )  # step() calls it once a group, and there is one
    for _ in range(steps):
        variant.in_parts()
    parts = 2 if micro_batch else 1  # of 4 images
    times = {"forward": parts, "matching": parts, "backward": parts, "data": 1, "optimiser": 1}
    assert variant.parts == [{part: takes[part] * times[part] for part in PARTS}] * steps


def test_whole_steps_are_steps_of_the_trainer_and_leave_the_clock_alone() -> None:
    timed, plain = variant_of(), variant_of()
    assert timed.in_parts() == plain.whole() == TINY.batch_size
    assert plain.parts == [] and not any(plain.clock.seconds.values()) and timed.trainer.step == 1
    for a, b in zip(
        timed.trainer.model.parameters(), plain.trainer.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_step_that_was_skipped_is_no_measurement() -> None:
    variant = variant_of()
    variant.trainer.model.head.stages[0].cls_logits.bias.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        variant.whole()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lets a process reset its peak"
)
def test_peak_memory_is_that_of_its_block() -> None:
    with PeakMemory(CPU) as large:
        numbers = torch.ones(50_000_000)  # 200 MB
    del numbers
    with PeakMemory(CPU) as small:
        torch.ones(10)
    assert large.megabytes - 220 < small.megabytes < large.megabytes - 180


def test_both_precisions_train_on_the_same_images_in_the_precision_they_are_named_after(
    tmp_path: Path,
) -> None:
    seen: list[tuple] = []
    step = Trainer.train_step

    def train_step(trainer: Trainer, images: list, targets: list, *rest: float) -> dict[str, float]:
        dtypes: list[torch.dtype] = []
        hook = trainer.model.backbone.register_forward_hook(
            lambda _, __, levels: dtypes.append(levels[0].dtype)
        )
        values = step(trainer, images, targets, *rest)
        hook.remove()
        seen.append((trainer.config.amp, tuple(dtypes), [target["image_id"] for target in targets]))
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        flags = [
            "--preset",
            "shapes",
            "--device",
            "cpu",
            "--size",
            "48",
            "--workers",
            "1",
            "--repeats",
            "2",
        ]
        main(["training", *flags, "--batch-size", "2", "--output", str(tmp_path / "x.jsonl")])
    plain, half = ([entry[1:] for entry in seen if entry[0] == amp] for amp in ("off", "bf16"))
    assert (
        len(plain) == len(half) == 8
    )  # two first ones; then, whole and in parts, a warm-up and two repeats
    assert {dtypes for dtypes, _ in plain} == {(torch.float32,)} and {d for d, _ in half} == {
        (torch.bfloat16,)
    }
    assert [ids for _, ids in plain] == [ids for _, ids in half]


def test_a_step_is_three_forward_passes_of_a_product() -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))

        def forward(
            self, images: list[torch.Tensor], targets: list[dict]
        ) -> dict[str, torch.Tensor]:
            assert len(images) == len(targets) == 1
            return {"loss": self.layers(images[0]).sum()}

    # Backward, a product for the gradient of the weights and one for that of the input; the first layer's has none.
    count = 2 * (3 * 7 * 3 + 2 * 5 * 7)
    assert step_flops(Product(), [(torch.rand(1, 5), {})]) == count


# --- matcher ---


def test_matcher_counts_pairs_and_prints_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "speed.jsonl"
    flags = [
        "--preset",
        "shapes",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--repeats",
        "2",
        "--output",
        str(output),
    ]
    main(["matcher", *flags, "--objects", "0", "3", "50"])
    text, line = capsys.readouterr().out, json.loads(output.read_text())
    S, B, N = 3, 2, 20  # of the preset, and the flags
    assert [(row["objects"], row["pairs"]) for row in line["rows"]] == [
        (0, 0),
        (3, S * B * 3),
        (50, S * B * N),
    ]
    for row, cells in zip(line["rows"], printed_rows(text), strict=True):
        assert cells[0] == str(row["objects"]) and cells[3] == f"{row['median_ms']:.2f}"
        assert row["each_ms"] == pytest.approx(row["median_ms"] / (S * B))
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert "proposals 20" in text and "stages 3" in text and "classes 3" in text


# --- growth ---


def test_a_smaller_model_is_the_beginning_of_a_larger_one() -> None:
    model, images = random_model(replace(TINY, num_stages=3)), [torch.rand(3, 64, 96)]
    with torch.inference_mode():
        few = with_size(model, proposals=5, stages=2)
        found = few.stages(images)
        assert found.logits.shape == (2, 1, 5, TINY.num_classes)
        same_boxes = few.initial_boxes_px(torch.tensor([[96.0, 64, 96, 64]]))
        assert torch.equal(
            same_boxes, model.initial_boxes_px(torch.tensor([[96.0, 64, 96, 64]]))[:, :5]
        )
        # with all proposals the first stages are the larger model's
        whole, part = (
            model.stages(images),
            with_size(model, TINY.num_proposals, stages=2).stages(images),
        )
        assert torch.equal(part.logits, whole.logits[:2]) and torch.equal(
            part.boxes, whole.boxes[:2]
        )


def test_growth_measures_what_its_rows_say_and_prints_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, called = tmp_path / "speed.jsonl", []
    forward = SparseRCNN.forward

    def seen(model: SparseRCNN, images: list[torch.Tensor]) -> list:
        called.append((len(model.proposal_boxes), len(model.head.stages), *images[0].shape[1:]))
        return forward(model, images)

    monkeypatch.setattr(SparseRCNN, "forward", seen)
    flags = [
        "--preset",
        "shapes",
        "--device",
        "cpu",
        "--height",
        "64",
        "--width",
        "80",
        "--repeats",
        "1",
    ]
    main(["growth", *flags, "--output", str(output)])
    text, line = capsys.readouterr().out, json.loads(output.read_text())
    rows = line["rows"]
    sizes = [
        (row["proposals"], row["stages"], *map(int, row["resolution"].split("×"))) for row in rows
    ]
    assert called == 2 * sizes  # the warm-up, and the repeat
    assert [(row["proposals"], row["paper_fps"]) for row in rows[:3]] == [
        (100, 23),
        (300, 22),
        (500, 20),
    ]
    assert [(row["stages"], row["paper_fps"]) for row in rows[3:7]] == [
        (1, 35),
        (2, 33),
        (3, 29),
        (12, 17),
    ]
    assert [row["resolution"] for row in rows[7:]] == ["32×40", "48×60", "96×120"] and len(
        rows
    ) == len(VARIANTS)
    for row, cells in zip(rows, printed_rows(text), strict=True):
        assert row["over_base"] == row["median_ms"] / rows[0]["median_ms"]
        assert row["paper_fps"] is None or row["paper_over_base"] == 23 / row["paper_fps"]
        assert cells[:4] == [
            str(row["proposals"]),
            str(row["stages"]),
            row["resolution"],
            f"{row['median_ms']:.1f}",
        ]
        assert (cells[7] == "–") == (row["paper_fps"] is None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["training", "--batch-size", "0"], "--batch-size"),
        (["training", "--batch-size"], "--batch-size"),
        (["training", "--amp"], "--amp"),
        (["training", "--workers", "-1"], "--workers"),
        (["training", "--size", "31"], "31 px"),
        (["training", "--micro-batch", "0"], "--micro-batch"),
        (["matcher", "--objects", "-1"], "--objects"),
        (["matcher", "--objects"], "--objects"),
        (["matcher", "--device", "gpu"], "--device gpu"),
        (["growth", "--height", "60"], "60×1216 px"),
        (["growth", "--repeats", "0"], "--repeats"),
        (["growth", "--seed", str(2**64)], "--seed"),
    ],
)
def test_mistakes_exit_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(argv, message, capsys)

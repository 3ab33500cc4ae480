"""`experiments.filters`, on models whose filters are known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import nn

from data import eval_transforms
from experiments import filters
from experiments.variants import VARIANTS
from model import SparseRCNN, build_model
from shapes import ShapesDataset
from support.checkpoint import save_checkpoint
from support.distributed import World
from support.errors import UserError

CPU = World(torch.device("cpu"))


def images(length: int) -> ShapesDataset:
    return ShapesDataset("demo", "val", length, eval_transforms(TINY))


def generators(model: SparseRCNN) -> list[nn.Linear]:
    return [stage.interaction.linear1 for stage in model.head.stages]


def outputs(model: SparseRCNN) -> torch.Tensor:
    with torch.no_grad():
        return model([images(1)[0][0]])[0]["boxes"]


def test_variance_lies_where_it_was_put() -> None:
    """Without weights all filters are the biases; the first stage has seen no image yet."""
    model = build_model(TINY).eval()
    _, variances = filters.measure_filters(model, images(3), CPU)
    assert variances[0]["images"] == pytest.approx(0, abs=1e-5)
    assert variances[0]["proposals"] > 0.1
    assert variances[1]["images"] > 1e-4
    for row in variances:
        assert row["total"] == pytest.approx(row["proposals"] + row["images"])

    for linear in generators(model):
        nn.init.zeros_(linear.weight)
        nn.init.ones_(linear.bias)
    rows, variances = filters.measure_filters(model, images(3), CPU)
    assert all(row["total"] == pytest.approx(0, abs=1e-6) for row in variances)
    assert len({row["all"] for row in rows}) == 1  # whatever replaces them is the same


def test_the_filters_of_the_named_stages_are_replaced_and_come_back() -> None:
    model = build_model(TINY).eval()
    before = outputs(model)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def change(stage: int, params: torch.Tensor) -> torch.Tensor:
        seen.append((stage, tuple(params.shape)))
        return torch.zeros(1, 1, params.shape[-1])

    with filters.replaced(model, change, [1]):
        changed = outputs(model)
    assert seen == [(1, (1, TINY.num_proposals, 2 * TINY.hidden_dim * TINY.dynamic_dim))]
    # The same filters, written into the layer.
    linear = generators(model)[1]
    kept = linear.weight.detach().clone(), linear.bias.detach().clone()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    torch.testing.assert_close(outputs(model), changed)
    linear.load_state_dict(dict(zip(("weight", "bias"), kept, strict=True)))
    torch.testing.assert_close(outputs(model), before)
    assert not torch.allclose(before, changed)


def checkpoint_of(model: SparseRCNN, path: Path) -> Path:
    data = images(1)
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "config": TINY.to_dict(),
            "class_names": list(data.class_names),
            "category_ids": list(data.category_ids),
        },
    )
    return path


def test_the_command_prints_two_tables(tmp_path: Path, capsys) -> None:
    filters.main([str(checkpoint_of(build_model(TINY), tmp_path / "model.pt"))])
    printed = capsys.readouterr().out
    assert f"on {TINY.shapes_val} images" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == (1 + 4) + (1 + TINY.num_stages)


def test_a_static_head_has_no_filters_to_replace(tmp_path: Path) -> None:
    static = VARIANTS["attention"].build(replace(TINY), False)
    path = checkpoint_of(static, tmp_path / "static.pt")
    with pytest.raises(UserError, match=r"static\.pt"):
        filters.main([str(path)])

"""The checkpoint that the notebooks open on is small, and as good as the note beside it says."""

from pathlib import Path

import torch

from data import validation_set
from evaluate import evaluate
from support.checkpoint import load_model
from support.distributed import World

ASSETS = Path(__file__).parents[1] / "assets"


def test_the_shapes_checkpoint_reaches_its_stated_figures() -> None:
    path = ASSETS / "shapes.pt"
    assert path.stat().st_size <= 6e6
    stored = torch.load(path, weights_only=True)
    assert {value.dtype for value in stored["model"].values() if value.is_floating_point()} == {
        torch.float16
    }
    model, checkpoint = load_model(path)
    metrics, _ = evaluate(
        model, validation_set(checkpoint), World(torch.device("cpu")), batch_size=16, progress=False
    )
    *_, figures = (ASSETS / "README.md").read_text().split("\n|---|---|---|\n| ")
    stated = [float(figure) for figure in figures.split("|")[:3]]
    found = [100 * metrics[name] for name in ("AP", "AP50", "AP75")]
    assert metrics["images"] == 400
    assert all(abs(a - b) < 0.3 for a, b in zip(stated, found, strict=True)), (
        stated,
        found,
    )  # NumPy, torch differ

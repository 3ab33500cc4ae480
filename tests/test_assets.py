"""The checkpoints in assets/ are small, and as good as the note beside them says."""

import re
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT

from data import validation_set
from evaluate import evaluate
from model import load_model

ASSETS = ROOT / "assets"
NOTE = (ASSETS / "README.md").read_text(encoding="utf-8")


BLOOD = {"val_json": str(ASSETS / "blood/val.json"), "val_images": str(ASSETS / "blood")}


@pytest.mark.parametrize(("name", "num_images"), [("shapes.pt", 400), ("blood.pt", 6)])
def test_a_checkpoint_reaches_its_stated_figures(name: str, num_images: int) -> None:
    path = ASSETS / name
    assert path.stat().st_size <= 6e6
    stored = torch.load(path, weights_only=True)
    dtypes = {v.dtype for v in stored["model"].values() if v.is_floating_point()}
    assert dtypes == {torch.float16}
    files = [stored["config"][key] for key in stored["config"] if key.endswith(("json", "images"))]
    assert not any(file and Path(file).is_absolute() for file in files), "of somebody's machine"

    model, checkpoint = load_model(path)
    dataset = validation_set(checkpoint, **(BLOOD if name == "blood.pt" else {}))
    metrics, _ = evaluate(model, dataset, CPU, batch_size=16)
    stated = re.search(rf"`{name}` \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)", NOTE).groups()
    found = [100 * metrics[key] for key in ("AP", "AP50", "AP75")]
    assert metrics["images"] == num_images
    # Not exactly: versions of NumPy and torch differ. On six images a single box counts for more.
    tolerance = 0.3 if num_images > 100 else 1.0
    differences = [abs(float(a) - b) for a, b in zip(stated, found, strict=True)]
    assert max(differences) < tolerance, (stated, found)

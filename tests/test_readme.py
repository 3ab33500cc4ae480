"""What the README shows: its Python runs as it is, and its files and commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import objects
from PIL import Image
from torchvision.models import get_model

import backbone

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if any("import timm" in block for block in blocks):
        pytest.importorskip("timm")
    monkeypatch.chdir(ROOT)
    # No ImageNet weights without a network: random ones of the same names and shapes.
    monkeypatch.setattr(backbone, "imagenet_state_dict", lambda name: get_model(name).state_dict())
    names = {
        "picture": Image.new("RGB", (96, 96), (90, 120, 60)),
        "images": [torch.rand(3, 64, 64), torch.rand(3, 64, 48)],
        "targets": [objects(2, 80, 64, 64), objects(1, 80, 48, 64)],
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 4
    assert set(names["found"]) >= {"boxes", "scores", "names"} and set(names["detections"][0]) >= {
        "boxes",
        "scores",
    }
    assert names["logits"].shape == (6, 2, 100, 80) and len(names["losses"]) == 18


def test_files_that_are_named_are_there() -> None:
    named = set(
        re.findall(r"`((?:tests|tools|notebooks|assets)?/?[\w/]+\.(?:py|md|ipynb))`", README)
    )
    assert len(named) > 10
    for path in named | set(re.findall(r"\]\((assets/[^)]+)\)", README)):
        assert (ROOT / path).exists() or list(ROOT.glob(f"*/{path}")), path


def test_flags_that_are_shown_exist() -> None:
    shown: dict[str, set[str]] = {}
    for command in re.findall(
        r"(?:python|torchrun)[^`\n]*?((?:\w+\.py|-m tools\.\w+)(?:[^`\n]|\\\n)*)", README
    ):
        program = re.match(r"\w+\.py|-m tools\.\w+", command)[0]
        shown.setdefault(program, set()).update(
            re.findall(r"(?<= )--[a-z-]+", command.split("#")[0])
        )
    assert {"train.py", "evaluate.py", "predict.py", "visualize.py"} <= set(shown)
    for program, flags in shown.items():
        if flags:
            done = subprocess.run(
                [sys.executable, *program.split(), "--help"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            missing = [flag for flag in flags if flag not in done.stdout]
            assert not missing, (program, missing)

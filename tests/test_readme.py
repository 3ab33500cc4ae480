"""What the README shows: the Python runs as it is, files and flags exist, commands work."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, objects, python
from PIL import Image
from torchvision.models import get_model

import backbone
from model import load_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    README,
    *((ROOT / name).read_text(encoding="utf-8") for name in ("DATA.md", "DEVIATIONS.md")),
]


def test_every_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    # No ImageNet weights without a network: random ones of the same names and shapes.
    monkeypatch.setattr(backbone, "imagenet_state_dict", lambda name: get_model(name).state_dict())
    names = {
        "picture": Image.new("RGB", (96, 96), (90, 120, 60)),
        "images": [torch.rand(3, 64, 64), torch.rand(3, 64, 48)],
        "targets": [objects(2, 80, 64, 64), objects(1, 80, 48, 64)],
        "names": [f"class {i}" for i in range(80)],
        "ids": list(range(80)),
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 3
    assert set(names["found"]) >= {"boxes", "scores", "names"}
    assert set(names["detections"][0]) >= {"boxes", "scores"}
    assert len(names["losses"]) == 18
    assert load_model(tmp_path / "own.pt")[1]["class_names"] == names["names"]


def test_the_function_beside_the_pseudocode_is_ours() -> None:
    """Every line of code that the README shows as ours is in head.py, in this order."""
    *_, ours = re.findall(r"(def dynamic_instance_interaction.*?)```", README, re.DOTALL)
    head = (ROOT / "head.py").read_text(encoding="utf-8")
    function = head[head.index("    N, C, D = ") :]
    lines = [line.strip() for line in ours.splitlines()[1:]]
    shown = [line.split("  #")[0] for line in lines if line and not line.startswith("#")]
    real = [line.split("  #")[0].strip() for line in function.splitlines()]
    places = [real.index(line) for line in shown]
    assert places == sorted(places) and len(shown) == 9


@pytest.mark.parametrize("page", PAGES, ids=["README", "DATA", "DEVIATIONS"])
def test_files_that_are_named_are_there(page: str) -> None:
    named = set(re.findall(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|md|ipynb|txt|pt))`", page))
    linked = set(re.findall(r"\]\((?!http)([^)#]+)\)", page))
    made = {"best.pt", "last.pt", "app.py", "config.py"}
    for path in (named | linked) - made:
        assert (ROOT / path).exists() or list(ROOT.glob(f"*/{path}")), path


def test_flags_that_are_shown_exist(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, set[str]] = {}
    pattern = r"(?:python|torchrun)[^`\n]*?((?:\w+\.py|-m tools\.\w+)(?:[^`\n]|\\\n)*)"
    for command in re.findall(pattern, README):
        program = re.match(r"\w+\.py|-m tools\.\w+", command)[0]
        flags = re.findall(r"(?<= )--[a-z-]+", command.split("#")[0])
        shown.setdefault(program, set()).update(flags)
    assert {"train.py", "evaluate.py", "predict.py", "explore.py"} <= set(shown)
    for program, flags in shown.items():
        if flags:
            module = importlib.import_module(program.removesuffix(".py").removeprefix("-m "))
            with pytest.raises(SystemExit):
                module.main(["--help"])
            text = capsys.readouterr().out
            missing = [flag for flag in flags if flag not in text]
            assert not missing, (program, missing)


def test_the_commands_for_real_images_work_as_they_stand(tmp_path: Path) -> None:
    shown = README.replace("\\\n", "")  # lines that go on
    commands = re.findall(r"^\.venv/bin/python (.*assets/blood\.pt.*)$", shown, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        output = tmp_path / "page.html" if "explore.py" in command else tmp_path
        done = python(*shlex.split(command), "--output", str(output), cwd=ROOT)
        assert done.returncode == 0, done.stderr
    detections = json.loads((tmp_path / "detections.json").read_text(encoding="utf-8"))
    assert len(detections) > 6
    assert len(list(tmp_path.glob("*.jpg"))) == len(list(tmp_path.glob("stages/*.jpg"))) == 6
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["AP"] > 0.5


def test_another_project_can_use_ours(tmp_path: Path) -> None:
    """By PYTHONPATH, as the README says; a module of the same name of theirs is in the way."""
    (tmp_path / "app.py").write_text("from predict import Predictor\nprint(Predictor.__name__)")
    done = python("app.py", cwd=tmp_path)
    assert done.stdout == "Predictor\n", done.stderr
    (tmp_path / "config.py").write_text("X = 1")
    done = python("app.py", cwd=tmp_path)
    assert str(tmp_path / "config.py") in done.stderr  # Python's message names the file

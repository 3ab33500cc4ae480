"""`python -m experiments.gpu` on the CPU, with the small model: what does not need a GPU."""

import json
from pathlib import Path

import pytest

from experiments import gpu

SMALL = [
    "--device",
    "cpu",
    "--preset",
    "shapes",
    "--height",
    "96",
    "--width",
    "96",
    "--repeats",
    "1",
]


def run(output: Path, *flags: str) -> int:
    return gpu.main([*SMALL, "--output", str(output), *flags])


def test_parts_are_kept_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "gpu.json"
    assert run(output, "--parts", "equality") == 0
    first = json.loads(output.read_text())
    loss, gradient = (float(row["result"]) for row in first["parts"]["equality"])
    assert loss == gradient == 0  # the CPU against itself

    # A second call does what is left, and keeps what is there.
    ran = []
    monkeypatch.setattr(gpu, "PARTS", {
        name: lambda args, name=name: ran.append(name) or [{"variant": name, "result": "done"}]
        for name in ("equality", "training-2")
    })  # fmt: skip
    capsys.readouterr()
    assert run(output) == 0
    assert ran == ["training-2"]
    table = capsys.readouterr().out
    assert "| training-2 | training-2 |" in table and "largest relative difference" in table
    both = json.loads(output.read_text())
    assert both["parts"]["equality"] == first["parts"]["equality"]

    # Another revision starts anew; without time nothing starts.
    monkeypatch.setattr(gpu, "git_revision", lambda: "other")
    assert run(output, "--minutes", "0") == 1
    assert ran == ["training-2"]
    assert run(output) == 0
    assert ran == ["training-2", "equality", "training-2"]


def test_the_rows_of_a_training_step(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert run(output, "--parts", "training-2") == 0
    rows = json.loads(output.read_text())["parts"]["training-2"]
    assert [row["variant"] for row in rows[:3]] == ["--amp off", "--amp bf16", "--amp fp16"]
    for row in rows[:3]:
        assert row["images_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["of_rate"] > 0 and "of the step" in row["result"]
        assert "memory_gb" not in row and "syncs" not in row  # a GPU's


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: gpu.GpuArgs) -> list:
        raise gpu.torch.OutOfMemoryError("no room")

    parts = {"large": fails, "small": lambda args: [{"variant": "small", "result": "done"}]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert run(tmp_path / "gpu.json") == 1
    printed = capsys.readouterr()
    assert "large: no room" in printed.err and "left: large" in printed.out
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["small"]


def test_an_unknown_part_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(gpu.UserError, match="training-2, training-16"):
        run(tmp_path / "gpu.json", "--parts", "trainng-2")

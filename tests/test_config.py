"""The recipe's numbers, what the command line accepts, and how a command ends."""

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from conftest import ROOT

from config import PRESETS, Config, preset_from
from support.cli import parse_args, run_main
from support.errors import UserError
from train import TrainArgs, learning_rate, peak_rate

# --- the recipe ---


def test_presets_are_the_papers() -> None:
    assert set(PRESETS) == {"r50-100", "r50-300", "r101-100", "r101-300", "shapes", "small"}
    assert PRESETS["r50-100"] == Config()
    for name, config in PRESETS.items():
        assert config.preset == name
        if config.backbone != "small":
            depth, proposals = name[1:].split("-")
            assert config.backbone == f"resnet{depth}" and config.num_proposals == int(proposals)
            assert config.crop == (proposals == "300")
    c = Config()
    sizes = (c.hidden_dim, c.dynamic_dim, c.num_stages, c.num_heads, c.ffn_dim, c.roi_size)
    assert sizes == (256, 64, 6, 8, 2048, 7)
    weights = (c.class_weight, c.l1_weight, c.giou_weight, c.focal_alpha, c.focal_gamma)
    assert weights == (2, 5, 2, 0.25, 2)
    optimizer = (c.epochs, c.batch_size, peak_rate(c), c.weight_decay, c.clip_norm)
    assert optimizer == (36, 16, 2.5e-5, 1e-4, 1.0)
    assert c.min_sizes == tuple(range(480, 801, 32)) and (c.max_size, c.eval_size) == (1333, 800)


@pytest.mark.parametrize(
    ("config", "total_steps", "factors"),
    [
        # The paper's run: 118,287 images in batches of 16.
        (Config(), 36 * 7392, {0: 0.01, 500: 0.505, 1000: 1, 27 * 7392 - 1: 1, 33 * 7392: 0.01}),
        # Milestones scale with the epochs, and the warm-up is at most a tenth of the run.
        (Config(epochs=12), 1200, {60: 0.505, 899: 1, 900: 0.1, 1099: 0.1, 1100: 0.01}),
        (Config(), 5, {0: 1}),  # no warm-up fits
        (PRESETS["shapes"], 2000, {1000: 0.5, 1999: 0}),  # half a cosine
        (Config(batch_size=4), 5, {0: 1 / 4}),  # the rate is linear in the batch size
        (Config(batch_size=4, lr=1e-3), 5, {0: 1e-3 / 2.5e-5}),  # unless it is given
    ],
)
def test_the_schedule(config: Config, total_steps: int, factors: dict[int, float]) -> None:
    for step, factor in factors.items():
        rate = learning_rate(step, total_steps, config) / config.lr_at_16
        assert rate == pytest.approx(factor, abs=1e-6), step


# --- what a config refuses ---


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "colour": [3],  # an unknown key
        "backbone": ["vgg"],
        "num_stages": ["six", 2.5, True, 0],
        "num_cls_layers": [-1],
        "dropout": [2.0, NAN],
        "seed": [-1],
        "checkpoint_minutes": [-1.0, NAN],
        "micro_batch": [0],
        "min_sizes": [[]],
        "lr": [-1.0, NAN, INF],
        "l1_weight": [-1.0, NAN, INF],
        "focal_gamma": [-1.0, 0.5, NAN],
        "prior_prob": [-0.1, 1.1, NAN],
        "warmup_factor": [-0.1, 1.1, NAN],
        "milestones": [[27, 33], [0.5, NAN]],
    }.items(),
)
def test_unknown_keys_wrong_types_and_senseless_values_are_named(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"^config: .*{name}"):
            Config.from_dict({name: value})


# --- command lines ---


def test_flags_override_the_presets_values() -> None:
    argv = ["--preset", "shapes", "--train-json", "a.json", "--no-flip", "--min-sizes", "64", "80"]
    default = TrainArgs(config=preset_from(argv))
    config = parse_args(argv, TrainArgs, "train.py", "", default).config
    changes = {"train_json": "a.json", "flip": False, "min_sizes": (64, 80)}
    assert config == replace(PRESETS["shapes"], **changes)
    with pytest.raises(SystemExit):
        preset_from(["--preset", "r18-100"])


def test_help_shows_every_setting_with_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"], TrainArgs, "train.py", "")
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    for field in fields(Config):
        if field.name == "num_classes":  # read from the annotations
            continue
        assert f"--{field.name.replace('_', '-')}" in printed, field.name
    assert "N learned proposals (paper" in printed and "Pixels: the shortest side" in printed


# --- how a command ends ---


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:

    def raising(error: BaseException) -> int:
        def main() -> None:
            raise error

        return run_main(main, "x.py")

    assert run_main(lambda: None, "x") == 0 and run_main(lambda: 1, "x") == 1
    capsys.readouterr()
    for error in (UserError("a.jpg: is broken"), FileNotFoundError(2, "No such file", "a.jpg")):
        assert raising(error) == 2
        assert capsys.readouterr().err == f"x.py: {error}\n"
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "x.py: stopped by Ctrl-C"
    for bug in (KeyError("ours to mend"), RuntimeError("of torch"), ValueError("of torch")):
        with pytest.raises(type(bug)):  # its trace is what helps
            raising(bug)


def start(body: str, **env: str) -> subprocess.Popen:
    """A command whose main function has this body."""
    lines = [f"    {line}" for line in body.splitlines()]
    script = ["import sys, time, warnings", "from support.cli import run_main", "def main():"]
    script += [*lines, "sys.exit(run_main(main, 'x.py'))"]
    command = [sys.executable, "-c", "\n".join(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, **pipes)


def test_a_pipe_that_is_closed_is_no_error_of_ours() -> None:
    process = start("for _ in range(100_000): print('a line')")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_no_character_that_is_printed_ends_a_run() -> None:
    body = "print('猫 × … –'); warnings.warn('猫'); print('naïve', file=sys.stderr)"
    process = start(body, PYTHONIOENCODING="ascii")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert b"took" in printed and b"x.py: warning: \\u732b\n" in errors

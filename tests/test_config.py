"""The recipe's numbers, and what the command line accepts."""

import os
import subprocess
import sys
import warnings
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT

from config import PRESETS, Config
from support.cli import parse_args, preset_from, run_main
from support.devices import pick_device
from support.errors import UserError
from train import TrainArgs, learning_rate


def test_presets_are_the_papers() -> None:
    assert set(PRESETS) == {"r50-100", "r50-300", "r101-100", "r101-300", "shapes"}
    assert PRESETS["r50-100"] == Config()
    for name, config in PRESETS.items():
        assert config.preset == name
        if name != "shapes":
            depth, proposals = name[1:].split("-")
            assert config.backbone == f"resnet{depth}" and config.num_proposals == int(proposals)
            assert config.crop == (proposals == "300")
    c = Config()
    assert (c.hidden_dim, c.dynamic_dim, c.num_stages, c.num_heads, c.ffn_dim, c.roi_size) == (
        256,
        64,
        6,
        8,
        2048,
        7,
    )
    assert (c.class_weight, c.l1_weight, c.giou_weight, c.focal_alpha, c.focal_gamma) == (
        2,
        5,
        2,
        0.25,
        2,
    )
    assert (c.epochs, c.batch_size, c.learning_rate, c.weight_decay, c.clip_norm) == (
        36,
        16,
        2.5e-5,
        1e-4,
        1.0,
    )
    assert c.min_sizes == tuple(range(480, 801, 32)) and (c.max_size, c.test_size) == (1333, 800)


def factor(step: int, total_steps: int, config: Config) -> float:
    """The share of the peak rate."""
    return learning_rate(step, total_steps, config) / config.learning_rate


def test_the_step_schedule_of_the_paper() -> None:
    config, total = Config(), 36 * 7392  # 118,287 images in batches of 16
    factors = {
        step: factor(step, total, config) for step in (0, 500, 1000, 27 * 7392 - 1, 27 * 7392)
    }
    assert (
        factors[0] == pytest.approx(0.01)
        and factors[500] == pytest.approx(0.505)
        and factors[1000] == pytest.approx(1)
    )
    assert factors[27 * 7392 - 1] == pytest.approx(1) and factors[27 * 7392] == pytest.approx(0.1)
    assert factor(33 * 7392 - 1, total, config) == pytest.approx(0.1)
    assert factor(33 * 7392, total, config) == pytest.approx(0.01)


def test_milestones_scale_with_the_epochs_and_warm_up_is_at_most_a_tenth() -> None:
    config = replace(Config(), epochs=12)
    assert factor(9 * 100 - 1, 1200, config) == pytest.approx(1)
    assert factor(9 * 100, 1200, config) == pytest.approx(0.1)
    assert factor(60, 1200, config) == pytest.approx(0.505)  # 120 steps, not 1,000
    assert factor(0, 5, config) == pytest.approx(1)  # no warm-up fits


def test_the_cosine_schedule_ends_at_zero() -> None:
    config = PRESETS["shapes"]
    assert factor(1000, 2000, config) == pytest.approx(0.5, abs=1e-3)
    assert factor(1999, 2000, config) == pytest.approx(0, abs=1e-5)


def test_the_rate_is_linear_in_the_batch_size_unless_given() -> None:
    assert replace(Config(), batch_size=4).learning_rate == pytest.approx(2.5e-5 / 4)
    assert replace(Config(), batch_size=4, lr=1e-3).learning_rate == 1e-3


def test_dict_round_trip_also_through_json_lists() -> None:
    values = PRESETS["r50-300"].to_dict()
    values["min_sizes"] = list(values["min_sizes"])
    assert Config.from_dict(values) == PRESETS["r50-300"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"colour": 3}, ["colour", "unknown"]),
        ({"num_stages": "six"}, ["num_stages", "six"]),
        ({"num_stages": 2.5}, ["num_stages"]),
        ({"num_stages": True}, ["num_stages"]),
        ({"backbone": "vgg"}, ["backbone", "vgg"]),
        ({"num_proposals": 0}, ["num_proposals"]),
        ({"hidden_dim": 100}, ["hidden_dim", "num_heads"]),
        ({"micro_batch": 17}, ["micro_batch", "16"]),
        ({"min_sizes": []}, ["min_sizes"]),
        ({"lr": -1.0}, ["lr"]),
        ({"lr": float("nan")}, ["lr"]),
        ({"prior_prob": 1.0}, ["prior_prob"]),
        ({"workers": -1}, ["workers"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**70}, ["seed"]),
        ({"weight_decay": -1.0}, ["weight_decay"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"num_reg_layers": -1}, ["num_reg_layers"]),
        ({"lr": float("inf")}, ["lr"]),
        ({"milestones": [27, 33]}, ["milestones=(27, 33)", "shares of the run, such as 0.75"]),
        ({"milestones": [0.5, float("nan")]}, ["milestones"]),
        *(
            ({name: value}, [f"{name}={value}", "at least 0"])
            for name in ("class_weight", "l1_weight", "giou_weight", "focal_gamma")
            for value in (-1.0, float("nan"))
        ),
        *(
            ({name: value}, [f"{name}={value}", "0 … 1"])
            for name in ("focal_alpha", "warmup_factor")
            for value in (-0.1, 1.1, float("nan"))
        ),
    ],
)
def test_unknown_keys_wrong_types_and_senseless_values_are_errors(
    values: dict, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        Config.from_dict(values)
    assert all(word in str(error.value) for word in words)


def test_flags_override_the_presets_values() -> None:
    argv = [
        "--preset",
        "shapes",
        "--epochs",
        "3",
        "--train-json",
        "a.json",
        "--no-flip",
        "--min-sizes",
        "64",
        "80",
    ]
    config = parse_args(argv, TrainArgs, "train.py", "", config=preset_from(argv)).config
    expected = replace(
        PRESETS["shapes"], epochs=3, train_json="a.json", flip=False, min_sizes=(64, 80)
    )
    assert config == expected


def test_help_shows_the_comments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"], TrainArgs, "train.py", "", config=Config())
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    assert (
        "N learned proposals" in text
        and "--num-proposals" in text
        and "Pixels: the shortest side" in text
    )


@pytest.mark.parametrize("argv", [["--colour", "3"], ["--epochs", "many"], ["--backbone", "vgg"]])
def test_a_wrong_flag_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(argv, TrainArgs, "train.py", "", config=Config())
    captured = capsys.readouterr()
    assert stop.value.code == 2 and argv[0].strip("-") in captured.out + captured.err


def test_a_value_out_of_range_is_named() -> None:
    with pytest.raises(UserError, match="epochs=0 should be at least 1"):
        parse_args(["--epochs", "0"], TrainArgs, "train.py", "", config=Config())


def test_help_groups_the_flags_as_config_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"], TrainArgs, "train.py", "", config=Config())
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    titles = ("run options", "data options", "training options", "model options", "loss options")
    places = [printed.index(title) for title in titles]
    assert places == sorted(places)
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in printed, field.name
    for title, flag in enumerate(("--output ", "--flip-vertical", "--epochs ", "--ffn-dim ")):
        assert places[title] < printed.index(flag) < places[title + 1], flag


def test_a_wrong_preset_is_named_with_the_right_ones() -> None:
    with pytest.raises(UserError, match="r18-100.*r50-100.*shapes"):
        preset_from(["--preset", "r18-100"])


def test_a_device_that_is_not_there_is_an_error() -> None:
    assert pick_device("cpu") == torch.device("cpu") and pick_device("auto").type in (
        "cpu",
        "cuda",
        "mps",
    )
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=name):
            pick_device(name)


def test_run_main_gives_the_contracts_exit_codes(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # run_main changes it

    def refuse() -> None:
        raise UserError("that file is broken")

    def bug() -> None:
        raise KeyError("ours to mend")

    assert run_main(lambda: None, "x") == 0 and run_main(lambda: 1, "x") == 1
    assert (
        run_main(refuse, "x.py") == 2 and capsys.readouterr().err == "x.py: that file is broken\n"
    )
    capsys.readouterr()
    assert run_main(bug, "x.py") == 70  # 1 means that inputs were skipped
    assert "KeyError: 'ours to mend'" in capsys.readouterr().err

    def stopped() -> None:
        raise KeyboardInterrupt

    assert run_main(stopped, "x.py") == 130
    assert capsys.readouterr().err.strip() == "x.py: stopped by Ctrl-C"


def test_a_pipe_that_is_closed_is_no_error_of_ours() -> None:
    script = (
        "import sys; from support.cli import run_main\n"
        "def main():\n"
        "    for _ in range(100_000): print('a line')\n"
        "sys.exit(run_main(main, 'x.py'))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251", "cp932"])
def test_no_character_that_is_printed_ends_a_run(encoding: str) -> None:
    script = (
        "import sys, warnings; from support.cli import run_main\n"
        "def main():\n"
        "    print('猫 × … –'); warnings.warn('猫'); print('naïve', file=sys.stderr)\n"
        "sys.exit(run_main(main, 'x.py'))"
    )
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"took" in done.stdout and b"x.py: warning" in done.stderr

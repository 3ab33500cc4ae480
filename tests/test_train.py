"""train.py as people use it: command line, output, resuming, faults, precision, fine-tuning."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, new_training, reference_weights, take_step, torchrun
from matplotlib.figure import Figure

import train
from config import PRESETS, Config
from data import CocoDataset, make_dataset
from evaluate import evaluate
from model import SparseRCNN, build_model
from shapes import ShapesDataset
from support import report
from support.checkpoint import load_checkpoint, load_model, load_what_fits, save_checkpoint
from support.errors import NotFinite, UserError
from support.faults import skip
from train import learning_rate, main, train_step

TRAIN = str(ROOT / "train.py")


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def data_flags(train_set: tuple[Path, Path], val_set: tuple[Path, Path] | None = None) -> list[str]:
    flags = ["--train-json", str(train_set[0]), "--train-images", str(train_set[1])]
    return flags + (
        ["--val-json", str(val_set[0]), "--val-images", str(val_set[1])] if val_set else []
    )


# --- the command line ---


def test_a_run_on_ones_own_data_writes_what_the_contract_says(
    make_coco, tiny_flags: list[str], tmp_path: Path
) -> None:
    """With odd category ids, in another order in the validation file."""
    own = data_flags(
        make_coco("train", 8), make_coco("val", 3, categories={2: "cow", 9: "cat", 4: "dog"})
    )
    output = tmp_path / "run"
    command = [
        sys.executable,
        TRAIN,
        *tiny_flags,
        *own,
        "--epochs",
        "2",
        "--output",
        str(output),
        "--check-data",
    ]
    done = subprocess.run(
        [*command, "--workers", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "8 images, 16 objects of 3 classes; validation: 3 images" in done.stdout
    assert "learning rate 0.00025 = 0.001 × 4/16" in done.stdout and "epoch 2/2" in done.stdout
    assert set(os.listdir(output)) >= {
        "last.pt",
        "best.pt",
        "metrics.jsonl",
        "config.json",
        "curves.png",
    }
    assert any(name.startswith("events.out") for name in os.listdir(output))
    checkpoint = load_checkpoint(output / "last.pt")
    keys = {
        "model",
        "config",
        "class_names",
        "category_ids",
        "optimizer",
        "schedule",
        "epoch",
        "step",
        "rng",
        "best",
    }
    assert set(checkpoint) >= keys
    assert checkpoint["class_names"] == ["dog", "cat", "cow"] and checkpoint["category_ids"] == [
        -3,
        7,
        1000,
    ]
    assert checkpoint["epoch"] == 2 and checkpoint["step"] == 4
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    wanted = {
        "loss",
        "loss_cls",
        "loss_l1",
        "loss_giou",
        "loss_cls_0",
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
    }
    assert set(lines[0]) >= wanted | {"lr", "images_per_second", "data_wait", "bad_steps"}
    assert Config.from_dict(json.loads((output / "config.json").read_text())).num_classes == 3
    # What evaluate.py makes of the file is what training said of it.
    model, rest = load_model(output / "last.pt")
    val_set = train.make_dataset(rest["config"], "val", class_names=rest["class_names"])
    assert val_set.category_ids == (4, 9, 2)
    assert evaluate(model, val_set, CPU, progress=False)[0]["AP"] == pytest.approx(
        lines[-1]["AP"], abs=1e-6
    )


def test_without_coco_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        main([])
    for words in ("instances_train2017.json", "cocodataset.org", "make demo", "--train-json"):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "r18"], "r18.*r50-100"),
        (["--train-json", "a.json"], "--train-images is missing"),
        (["--resume", "none.pt"], "none.pt: no such checkpoint"),
        (["--weights", "none.pt"], "none.pt: no such checkpoint"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--batch-size", "3", "--micro-batch", "4"], "micro_batch"),
    ],
)
def test_mistakes_in_flags(
    flags: list[str], words: str, tiny_flags: list[str], tmp_path: Path, capsys
) -> None:
    argv = [*tiny_flags, *flags, "--output", str(tmp_path / "out")]
    try:
        with pytest.raises(UserError, match=words):
            main(argv)
    except SystemExit as stop:  # tyro has printed it
        printed = capsys.readouterr()
        assert stop.code == 2 and words in printed.out + printed.err


def test_an_output_folder_that_cannot_be_written_or_is_taken(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        main([*tiny_flags, "--output", str(tmp_path / "file" / "run")])
    save_checkpoint(tmp_path / "last.pt", {"model": {}})
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="--resume auto"):
        main([*tiny_flags, "--output", str(tmp_path)])
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"lr": 0.1}'),
        ("config.json", '{"preset": "fast", "threads": 3}'),
        ("config.json", "[1, 2]"),
        ("metrics.jsonl", '{"step": 1}'),
        ("curves.png", "a picture"),
        ("best.pt", "weights"),
    ],
)
def test_files_of_another_program_are_not_replaced(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"not from train.py \({name}\).*another --output"):
        report.prepare_output(tmp_path, None)


def test_a_run_that_was_killed_before_its_first_checkpoint_may_start_afresh(
    tmp_path: Path,
) -> None:
    with report.Report(tmp_path, new_training(TINY)):
        pass
    assert {"config.json", "metrics.jsonl"} <= set(os.listdir(tmp_path))
    report.prepare_output(tmp_path, None).release()


def test_an_output_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "Bilder_\udce9"  # as Python reads the byte E9
    with pytest.raises(UserError, match="--output .*udce9.*not UTF-8"):
        report.prepare_output(folder, None)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_a_warning(number: int, tmp_path: Path, monkeypatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match=f"cannot be locked .{os.strerror(number)}"):
        report.prepare_output(tmp_path, None).release()


def test_progress_without_standard_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after 2>&-
    with report.Report(tmp_path, new_training(TINY)) as run:
        run.start_epoch()


def test_curves_that_cannot_be_written_do_not_end_a_run(tmp_path: Path, monkeypatch) -> None:
    def full(figure: Figure, path: Path, **_: object) -> None:
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "curves.png").write_text("yesterday's")
    monkeypatch.setattr(Figure, "savefig", full)
    with (
        report.Report(tmp_path, new_training(TINY)) as run,
        pytest.warns(UserWarning, match="curves could not be drawn.*No space.*curves.png"),
    ):
        run.end_epoch({})
    assert (tmp_path / "curves.png").read_text() == "yesterday's"
    assert not list(tmp_path.glob("*.tmp"))


def test_mistakes_in_data(make_coco, tiny_flags: list[str], tmp_path: Path) -> None:
    good, output = make_coco("train"), ["--output", str(tmp_path / "out")]
    other = make_coco("other", categories={1: "cat", 2: "horse", 3: "cow"})
    with pytest.raises(UserError, match="horse"):
        main([*tiny_flags, *data_flags(good, other), *output])
    empty = make_coco("empty", edit=lambda coco: coco["annotations"].clear())
    with pytest.raises(UserError, match="no objects"):
        main([*tiny_flags, *data_flags(empty), *output])
    broken = make_coco("broken")
    (broken[1] / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 4 images cannot be used.*2\.jpg"):
        main([*tiny_flags, *data_flags(broken), *output, "--check-data"])
    assert not (tmp_path / "out/last.pt").exists()


def test_more_objects_than_proposals_is_a_warning_with_numbers(
    make_coco, tiny_flags: list[str], tmp_path: Path
) -> None:
    def crowd(coco: dict) -> None:
        box = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
        coco["annotations"] += [{**box, "id": 100 + i} for i in range(10)]

    flags = [*tiny_flags, *data_flags(make_coco(edit=crowd)), "--output", str(tmp_path / "out")]
    with pytest.warns(
        UserWarning, match=r"1 of 4 training images .*\(up to 12\) than .*proposals \(7\)"
    ):
        assert main(flags) == 0


# --- resuming and faults ---


@pytest.fixture(scope="module")
def module_flags() -> list[str]:
    """Two epochs of three steps; dropout, so that the random state matters too."""
    flags = [
        "--preset",
        "shapes",
        "--device",
        "cpu",
        "--num-proposals",
        "7",
        "--num-stages",
        "2",
        "--hidden-dim",
        "16",
    ]
    flags += [
        "--dynamic-dim",
        "4",
        "--num-heads",
        "2",
        "--ffn-dim",
        "32",
        "--roi-size",
        "3",
        "--dropout",
        "0.1",
    ]
    return [
        *flags,
        "--epochs",
        "2",
        "--shapes-train",
        "12",
        "--shapes-val",
        "4",
        "--batch-size",
        "4",
    ]


@pytest.fixture(scope="module")
def uninterrupted(module_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert main([*module_flags, "--output", str(output)]) == 0
    return output


def test_compiled_training_is_the_same_training(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    backend, compiled = (
        "aot_eager",
        SparseRCNN.compile,
    )  # the graphs as they are: no compiler, but all before it
    monkeypatch.setattr(SparseRCNN, "compile", lambda model: compiled(model, backend=backend))
    dataset = make_dataset(tiny_config, "train")
    images, targets = (list(column) for column in zip(*(dataset[i] for i in range(4)), strict=True))
    steps = []
    for is_compiled in (False, True):
        config = replace(tiny_config, num_stages=1, compile=is_compiled)
        training = new_training(config, steps_per_epoch=3)
        assert (training.model.backbone._compiled_call_impl is not None) == is_compiled
        steps.append([take_step(training, images, targets, 9.0) for _ in range(3)])
    for expected, found in zip(*steps, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stop_after", [2, 3, 4])
def test_resuming_equals_never_having_stopped(
    stop_after: int,
    module_flags: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off in mid-epoch, before the evaluation, and early in the second epoch; then resumed."""
    steps = 0

    def crash(*args):
        nonlocal steps
        if steps == stop_after:
            raise KeyboardInterrupt
        steps += 1
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", crash)
        with pytest.raises(KeyboardInterrupt):
            main([*module_flags, "--output", str(tmp_path), "--checkpoint-minutes", "0"])
    assert load_checkpoint(tmp_path / "last.pt")["step"] == stop_after
    torch.rand(100)  # another process would have another random state
    assert (
        main(["--resume", str(tmp_path / "last.pt"), "--output", str(tmp_path), "--device", "cpu"])
        == 0
    )
    assert_same_weights(tmp_path / "last.pt", uninterrupted / "last.pt")
    lines = [
        [json.loads(line) for line in (o / "metrics.jsonl").read_text().splitlines()]
        for o in (tmp_path, uninterrupted)
    ]
    assert [line["epoch"] for line in lines[0]] == [1, 2]
    for a, b in zip(*lines, strict=True):
        assert a["AP"] == b["AP"] and a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    a, b = (load_checkpoint(o / "last.pt") for o in (tmp_path, uninterrupted))
    assert a["best"] == b["best"] and str(a["optimizer"]) == str(b["optimizer"])


def test_resume_auto_starts_afresh_or_goes_on(
    module_flags: list[str], uninterrupted: Path, tmp_path: Path, capsys
) -> None:
    flags = [*module_flags, "--output", str(tmp_path), "--resume", "auto"]
    assert main(flags) == 0 and "resumed" not in capsys.readouterr().out
    assert main(flags) == 0 and "resumed from" in capsys.readouterr().out
    assert_same_weights(tmp_path / "last.pt", uninterrupted / "last.pt")


def test_resuming_does_not_overwrite_another_run(
    module_flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": {}})
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="another run"):
        main(
            [
                "--resume",
                str(uninterrupted / "last.pt"),
                "--output",
                str(tmp_path),
                "--device",
                "cpu",
            ]
        )
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_second_run_does_not_write_into_the_folder_of_a_first(
    module_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LOCK_TIMEOUT_S", 0.1)
    lock = report.prepare_output(tmp_path, None)
    with pytest.raises(UserError, match="another run is writing to this folder"):
        main([*module_flags, "--output", str(tmp_path)])
    lock.release()  # as the system does for a process that is killed
    assert main([*module_flags, "--output", str(tmp_path)]) == 0


def test_flags_of_a_resumed_run_are_obeyed(uninterrupted: Path, tmp_path: Path) -> None:
    flags = [
        "--resume",
        str(uninterrupted / "last.pt"),
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main([*flags, "--epochs", "3", "--weight-decay", "0.5", "--amp", "fp16"]) == 0
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert (
        checkpoint["epoch"] == 3
        and checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    )
    assert checkpoint["scaler"]["scale"] > 0


def test_what_cannot_be_resumed(
    module_flags: list[str], uninterrupted: Path, make_coco, tmp_path: Path
) -> None:
    last = str(uninterrupted / "last.pt")
    flags = ["--resume", last, "--output", str(tmp_path), "--device", "cpu"]
    with pytest.raises(UserError, match=r"proposal_boxes \[7, 4\] in the file, \[9, 4\]"):
        main([*flags, "--num-proposals", "9"])
    two_classes = make_coco(categories={1: "a", 2: "b"}, num_images=12)
    with pytest.raises(UserError, match=r"classes \['a', 'b'\] differ"):
        main([*flags, *data_flags(two_classes)])
    with pytest.raises(UserError, match="step 6 .*12 images.*here are 4 images"):
        main([*flags, "--shapes-train", "4"])
    with pytest.raises(UserError, match="--batch-size 4; here are 12 images, and --batch-size 2"):
        main([*flags, "--batch-size", "2"])
    with pytest.raises(UserError, match="a run of --preset shapes; leave out --preset"):
        main([*flags, "--preset", "r50-100"])
    plain = {
        k: v
        for k, v in load_checkpoint(last).items()
        if k in ("model", "config", "class_names", "category_ids")
    }
    save_checkpoint(tmp_path / "plain.pt", plain)
    with pytest.raises(UserError, match="lacks optimizer.*--weights"):
        main(["--resume", str(tmp_path / "plain.pt"), "--output", str(tmp_path), "--device", "cpu"])


def start(flags: list[str], output: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        TRAIN,
        *flags,
        "--output",
        str(output),
        "--resume",
        "auto",
        "--checkpoint-minutes",
        "0",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )


def wait_for_step(output: Path, process: subprocess.Popen, step: int) -> None:
    """Waits for a checkpoint of at least that step; every one on the way must load."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (output / "last.pt").exists() and load_checkpoint(output / "last.pt")["step"] >= step:
            return
        time.sleep(0.02)


def kill_again_and_again(times: int, flags: list[str], output: Path) -> None:
    """SIGKILL at random moments, also in a write, then to the end: a checkpoint always loads."""
    rng, step, kills = random.Random(times), 0, 0
    for _ in range(times):
        process = start(flags, output)
        wait_for_step(output, process, step + 1)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        step = load_checkpoint(output / "last.pt")["step"]
    process = start(flags, output)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert kills == times  # each in the middle of the run
    assert f"resumed from {output}/last.pt" in printed and not (output / "last.pt.tmp").exists()


def test_killed_twice(module_flags: list[str], tmp_path: Path) -> None:
    flags = [*module_flags, "--shapes-train", "240", "--epochs", "1"]
    kill_again_and_again(2, flags, tmp_path / "killed")
    assert main([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert_same_weights(tmp_path / "killed/last.pt", tmp_path / "whole/last.pt")


@pytest.mark.long
def test_killed_twenty_times(module_flags: list[str], tmp_path: Path) -> None:
    flags = [*module_flags, "--shapes-train", "2000", "--epochs", "1"]
    kill_again_and_again(20, flags, tmp_path / "killed")
    assert main([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert_same_weights(tmp_path / "killed/last.pt", tmp_path / "whole/last.pt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(
    number: int, module_flags: list[str], tmp_path: Path
) -> None:
    """To the whole process group, as a terminal, torchrun and a batch system send it."""
    process = start([*module_flags, "--shapes-train", "2000", "--workers", "1"], tmp_path)
    wait_for_step(tmp_path, process, 2)
    os.killpg(process.pid, number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, printed
    step = load_checkpoint(tmp_path / "last.pt")["step"]
    assert (
        f"stopped by signal {int(number)} at step {step}" in printed and "Traceback" not in printed
    )


def test_a_signal_in_an_evaluation_ends_it(
    module_flags: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def interrupted(*args, **kwargs) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "evaluate", interrupted)
    try:
        with pytest.raises(SystemExit) as stop:
            main([*module_flags, "--output", str(tmp_path)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (
        stop.value.code == 143
        and "stopped by signal 15 in an evaluation" in capsys.readouterr().out
    )
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_two_processes_stop_resume_and_end_where_one_run_would(
    module_flags: list[str], tmp_path: Path
) -> None:
    flags = [TRAIN, *module_flags, "--checkpoint-minutes", "0", "--output"]
    stopping = tmp_path / "stopping.py"  # rank 1 gets a signal after its second step
    stopping.write_text(
        "import os, signal, sys, train\n"
        "original = train.train_step\n"
        "def step(training, batch):\n"
        "    values = original(training, batch)\n"
        "    if training.step == 1 and training.world.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return values\n"
        "train.train_step = step\n"
        "sys.exit(train.main())\n"
    )
    stopped = torchrun(str(stopping), *flags[1:], str(tmp_path / "a"))
    assert stopped.returncode != 0 and "stopped by signal 15 at step 2" in stopped.stdout
    # On every rank. But as soon as one has exited, torchrun sends SIGTERM, which may meet the other
    # one after Python has put its signal handlers away.
    codes = re.findall(r"exitcode  : (-?\d+)", stopped.stderr)
    assert sorted(codes) in (["143", "143"], ["-15", "143"]), stopped.stderr[-3000:]
    resumed = torchrun(*flags, str(tmp_path / "a"), "--resume", "auto")
    whole = torchrun(*flags, str(tmp_path / "b"))
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-3000:]
    assert_same_weights(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    assert whole.stdout.count("epoch 2/2") == 1  # one process speaks


def test_a_dead_process_ends_the_others(module_flags: list[str], tmp_path: Path) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys, train\n"
        "original = train.train_step\n"
        "def step(training, batch):\n"
        "    if training.step == 2 and training.world.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(training, batch)\n"
        "train.train_step = step\n"
        "sys.exit(train.main())\n"
    )
    done = torchrun(
        str(dying), *module_flags, "--output", str(tmp_path / "run"), "--checkpoint-minutes", "0"
    )
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 2


def test_what_one_process_finds_wrong_ends_both_with_its_message(
    module_flags, make_coco, tmp_path: Path
) -> None:
    json_file, folder = make_coco(num_images=4)
    (folder / "3.jpg").write_bytes(b"no picture")
    own = [*module_flags, *data_flags((json_file, folder)), "--workers", "1"]
    for flags, words in (
        ([*own, "--output", str(tmp_path / "a")], "3.jpg: cannot be read as an image"),
        ([*own, "--output", str(json_file / "below_a_file")], "Not a directory"),
    ):
        done = torchrun(TRAIN, *flags)
        messages = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        # torchrun ends a process that has not spoken yet as soon as the other one has exited.
        assert messages and all(words in message for message in messages), done.stderr
        assert done.stderr.count("exitcode  : 2") >= 1 and "gloo" not in done.stderr
        assert 'train.py", line' not in done.stderr  # no trace of ours


def test_a_full_disk_names_the_file_and_keeps_the_old_one(
    module_flags: list[str], tmp_path: Path, monkeypatch
) -> None:
    writes, original = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr("support.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match=r"last\.pt.*No space left on device.*intact"):
        main([*module_flags, "--output", str(tmp_path), "--checkpoint-minutes", "0"])
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


# --- numbers ---


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(
    module_flags, tmp_path: Path, monkeypatch
) -> None:
    def poison(training, batch):
        if training.step in (1, 4, 5):
            batch.images[0] = batch.images[0] * float("nan")  # reaches the running statistics too
        return train_step(training, batch)

    monkeypatch.setattr(train, "train_step", poison)
    flags = [*module_flags, "--checkpoint-minutes", "0", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"2 steps in a row.*\[\d+, .*/last\.pt has.*--lr.*--amp"):
        main([*flags, "--max-bad-steps", "2"])
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["bad_steps"] == 1 and np.isfinite(line["loss"])
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 5 and checkpoint["bad_in_a_row"] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())


def test_a_run_whose_steps_were_all_skipped_is_no_success(tmp_path: Path) -> None:
    """And its message names last.pt only if there is one."""
    training, last_pt = new_training(TINY, steps_per_epoch=2), tmp_path / "last.pt"
    problem = NotFinite("nothing is finite")
    assert skip(training, [7], problem, last_pt) == {"bad_steps": 1.0}
    with pytest.raises(UserError, match=r"^2 steps in a row .*\[7\]") as error:
        skip(training, [7], problem, last_pt)
    assert "last.pt" not in str(error.value)
    last_pt.touch()
    with pytest.raises(UserError, match=r"last\.pt has the weights from before them"):
        skip(training, [7], problem, last_pt)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_keeps_losses_and_boxes_in_float32(
    amp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = new_training(replace(TINY, amp=amp), steps_per_epoch=20)
    seen, original = set(), training.model.criterion.forward

    def spy(logits, boxes_px, targets, whwh_px, num_objects):
        losses = original(logits, boxes_px, targets, whwh_px, num_objects)
        seen.add((logits.dtype, boxes_px.dtype, next(iter(losses.values())).dtype))
        return losses

    monkeypatch.setattr(training.model.criterion, "forward", spy)
    dataset = ShapesDataset("demo", "train", 4)
    images, targets = zip(*(dataset[i] for i in range(4)), strict=True)
    steps = [take_step(training, list(images), list(targets), 12) for _ in range(20)]
    losses = [values["loss"] for values in steps if "loss" in values]  # fp16 first finds its scale
    assert len(losses) >= 10 and losses[-1] < 0.85 * losses[0]
    assert seen == {
        ({"bf16": torch.bfloat16, "fp16": torch.float16}[amp], torch.float32, torch.float32)
    }
    state = training.state()["scaler"]
    assert ("scale" in state) == (amp == "fp16")


def test_a_micro_batch_changes_the_memory_and_not_the_recipe() -> None:
    frozen = replace(TINY, backbone="resnet18", batch_size=4)
    dataset = ShapesDataset("demo", "train", 4)
    images, targets = zip(*(dataset[i] for i in range(4)), strict=True)
    count, losses = sum(len(target["labels"]) for target in targets), []
    for micro_batch in (None, 3):
        training = new_training(replace(frozen, micro_batch=micro_batch))
        losses.append(take_step(training, list(images), list(targets), count))
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=1e-4), name


def test_fine_tuning_keeps_what_fits_and_lists_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pt"
    source = build_model(TINY)
    contents = {"class_names": ["a", "b", "c"], "category_ids": [1, 2, 3]}
    save_checkpoint(path, {"model": source.state_dict(), "config": TINY.to_dict(), **contents})
    model = build_model(replace(TINY, num_classes=5))
    lines = "\n".join(load_what_fits(model, path, ["a", "b", "c", "d", "e"]))
    old, new = source.state_dict(), model.state_dict()
    changed = (
        {name for name in new if not torch.equal(new[name], old[name])}
        if new.keys() == old.keys()
        else None
    )
    assert changed == {
        f"head.stages.{s}.cls_logits.{p}"
        for s in range(TINY.num_stages)
        for p in ("weight", "bias")
    }
    assert (
        all(name in lines for name in changed)
        and f"{len(new) - len(changed)} of the model's {len(new)}" in lines
    )
    renamed = build_model(TINY)
    before = renamed.head.stages[0].cls_logits.weight.clone()
    assert "other classes" in "\n".join(load_what_fits(renamed, path, ["a", "c", "b"]))
    assert torch.equal(renamed.head.stages[0].cls_logits.weight, before)
    assert torch.equal(renamed.proposal_feats, source.proposal_feats)
    with pytest.raises(UserError, match="none of its"):
        load_what_fits(torch.nn.Linear(2, 2), path, [])


def test_fine_tuning_from_the_authors_weights(tmp_path: Path) -> None:
    authors = reference_weights("r50_100")
    torch.save({"model": authors}, tmp_path / "authors.pth")
    model = build_model(replace(PRESETS["r50-100"], num_classes=3), pretrained_backbone=False)
    lines = load_what_fits(model, tmp_path / "authors.pth", ["a", "b", "c"])
    assert torch.equal(model.proposal_feats, authors["init_proposal_features.weight"])
    assert "cls_logits" in lines[1] and len(lines) == 2 and lines[1].count(",") == 2 * 6 - 1


def test_more_stages_or_classes_than_the_data_has_is_no_crash(make_coco) -> None:
    json_file, folder = make_coco(categories={3: "only"})
    dataset = CocoDataset(json_file, folder)
    training = new_training(replace(TINY, num_classes=1))
    images, targets = zip(*(dataset[i] for i in range(4)), strict=True)
    assert np.isfinite(take_step(training, list(images), list(targets), 8)["loss"])


def test_three_steps_are_the_recipe_by_hand() -> None:
    """Clipping and AdamW as in their papers, in float64, from gradients taken on a copy."""
    config = replace(TINY, lr=3e-3, warmup_steps=2, clip_norm=1.0, weight_decay=0.1)
    training = new_training(config, steps_per_epoch=30)
    model, lr_of = training.model, partial(learning_rate, total_steps=30, config=config)
    dataset = ShapesDataset("demo", "train", 4)
    images, targets = zip(*(dataset[i] for i in range(4)), strict=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    first = {name: torch.zeros((), dtype=torch.float64) for name in names}
    second = dict(first)
    by_hand = {name: p.detach().double() for name, p in model.named_parameters()}

    for step in range(3):
        copy = deepcopy(model)
        sum(copy(images, targets).values()).backward()
        gradients = {name: p.grad.double() for name, p in copy.named_parameters() if name in names}
        norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
        assert norm > config.clip_norm  # so that it is clipped
        values = take_step(training, images, targets, sum(len(t["labels"]) for t in targets))
        assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

        lr, t = lr_of(step), step + 1
        now = dict(model.named_parameters())
        for name in names:
            gradient = gradients[name] * config.clip_norm / norm
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
            by_hand[name] = by_hand[name] * (1 - lr * config.weight_decay)
            by_hand[name] = by_hand[name] - lr * m / (v.sqrt() + 1e-8)
            # Where a gradient is about 0, AdamW divides one rounding error by another.
            is_sure = v.sqrt() > 1e-6
            difference = (now[name].detach() - by_hand[name]).abs()[is_sure]
            rounding = 1e-7 * by_hand[name].abs().max()  # of a float32 weight
            assert difference.numel() == 0 or difference.max() < 1e-3 * lr + rounding, name
            by_hand[name] = now[name].detach().double()

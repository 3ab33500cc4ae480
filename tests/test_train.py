"""train.py as people use it: command line, output, resuming, faults, precision, fine-tuning."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, data_flags, new_training, take_step, torchrun

import train
from config import Config
from data import make_dataset
from evaluate import evaluate
from model import load_model
from shapes import ShapesDataset
from support.checkpoint import load_checkpoint, save_checkpoint
from support.errors import UserError
from train import learning_rate, main, train_step

TRAIN = str(ROOT / "train.py")


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def lines_of(output: Path) -> list[dict]:
    """Of metrics.jsonl, one per epoch."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def shapes_batch() -> tuple[list[torch.Tensor], list[dict]]:
    dataset = ShapesDataset("demo", "train", 4)
    images, targets = zip(*(dataset[i] for i in range(4)), strict=True)
    return list(images), list(targets)


# --- the command line ---


def test_a_run_on_ones_own_data_writes_what_the_contract_says(
    make_coco, tiny_flags: list[str], tmp_path: Path
) -> None:
    """With odd category ids, in another order in the validation file."""
    val_set = make_coco("val", 3, categories={2: "cow", 9: "cat", 4: "dog"})
    output = tmp_path / "run"
    flags = [*tiny_flags, *data_flags(make_coco("train", 8), val_set), "--epochs", "2"]
    flags += ["--output", str(output), "--check-data", "--workers", "1"]
    command = [sys.executable, TRAIN, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 images, 16 objects of 3 classes; validation: 3 images" in done.stdout
    assert "4 in 2 epochs, learning rate 0.00025" in done.stdout and "epoch 2/2" in done.stdout
    assert "preset shapes, " in done.stdout and "num_proposals=7" in done.stdout
    files = {"last.pt", "best.pt", "metrics.jsonl", "config.json", "curves.png"}
    assert set(os.listdir(output)) >= files
    assert any(name.startswith("events.out") for name in os.listdir(output))

    checkpoint = load_checkpoint(output / "last.pt")
    keys = "model config class_names category_ids optimizer schedule epoch step rng best"
    assert set(checkpoint) >= set(keys.split())
    assert checkpoint["class_names"] == ["dog", "cat", "cow"]
    assert checkpoint["category_ids"] == [-3, 7, 1000]
    assert checkpoint["epoch"] == 2 and checkpoint["step"] == 4
    lines = lines_of(output)
    assert [line["epoch"] for line in lines] == [1, 2]
    names = "loss loss_cls loss_l1 loss_giou loss_cls_0 AP AP50 AP75 APs APm APl lr bad_steps"
    assert set(lines[0]) >= {*names.split(), "images_per_second", "data_wait"}
    # What evaluate.py makes of the file is what training said of it.
    model, rest = load_model(output / "last.pt")
    written = json.loads((output / "config.json").read_text())
    assert Config.from_dict(written) == rest["config"] and written["num_classes"] == 3
    val_set = make_dataset(rest["config"], "val", class_names=rest["class_names"])
    assert val_set.category_ids == (4, 9, 2)
    ap = evaluate(model, val_set, CPU)[0]["AP"]
    assert ap == pytest.approx(lines[-1]["AP"], abs=1e-6)


def test_data_without_objects_are_refused(make_coco, tiny_flags: list[str], tmp_path: Path) -> None:
    def crowds(coco: dict) -> None:
        coco["annotations"] = [a | {"iscrowd": 1} for a in coco["annotations"]]

    flags = [*tiny_flags, *data_flags(make_coco(edit=crowds)), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"train\.json: no objects .*\(8 annotations are crowds"):
        main(flags)
    assert not (tmp_path / "out/last.pt").exists()


def test_check_data_finds_a_broken_validation_image_before_training(
    make_coco, tiny_flags: list[str], tmp_path: Path
) -> None:
    val_set = make_coco("val")
    (val_set[1] / "3.jpg").write_bytes(b"")
    flags = [*tiny_flags, *data_flags(make_coco(), val_set), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"1 of 4 images .*3\.jpg: "):
        main([*flags, "--check-data"])
    assert not (tmp_path / "out/last.pt").exists()


def test_a_validation_set_with_other_classes(
    make_coco, tiny_flags: list[str], tmp_path: Path, capsys
) -> None:
    val_set = make_coco("val", categories={1: "cat", 2: "dog", 3: "elk"})
    flags = [*tiny_flags, *data_flags(make_coco(), val_set), "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"new \['elk'\].*--ignore-new-classes"):
        main(flags)
    assert main([*flags, "--ignore-new-classes"]) == 0
    printed = capsys.readouterr().out
    assert "val.json: ignored ['elk'], new to the model, and 3 annotations" in printed
    assert "val.json: lacks 1 of the 3 classes: 'cow'; AP is over the others" in printed
    assert lines_of(tmp_path)[0]["AP"] >= 0


def test_a_run_in_a_thread_without_standard_error(
    tiny_flags: list[str], tmp_path: Path, monkeypatch
) -> None:
    """Of a web app, say: only the main thread may ask for signals."""
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it after 2>&-
    codes: list[int] = []
    flags = [*tiny_flags, "--output", str(tmp_path)]
    thread = threading.Thread(target=lambda: codes.append(main(flags)))
    thread.start()
    thread.join()
    assert codes == [0]


# --- resuming and faults ---


@pytest.fixture(scope="module")
def module_flags(tiny_flags: list[str]) -> list[str]:
    """Two epochs of three steps; dropout, so that the random state matters too."""
    return [*tiny_flags, "--epochs", "2", "--shapes-train", "12", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def uninterrupted(module_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert main([*module_flags, "--output", str(output)]) == 0
    return output


def test_a_model_is_compiled_if_that_is_wanted() -> None:
    """Compiled parts compute the same; see test_drop_in.py."""
    model = new_training(replace(TINY, compile=True)).model
    assert model.backbone._compiled_call_impl is not None


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
    flags = ["--output", str(tmp_path), "--device", "cpu"]
    assert main(["--resume", str(tmp_path / "last.pt"), *flags]) == 0
    assert_same_weights(tmp_path / "last.pt", uninterrupted / "last.pt")
    lines = [lines_of(output) for output in (tmp_path, uninterrupted)]
    assert [line["epoch"] for line in lines[0]] == [1, 2]
    for a, b in zip(*lines, strict=True):
        assert a["AP"] == b["AP"] and a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    a, b = (load_checkpoint(o / "last.pt") for o in (tmp_path, uninterrupted))
    assert a["best"] == b["best"] and str(a["optimizer"]) == str(b["optimizer"])


def test_another_run_is_not_overwritten(
    module_flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": {}})
    before = (tmp_path / "last.pt").read_bytes()
    output = ["--output", str(tmp_path), "--device", "cpu"]
    for flags in (module_flags, ["--resume", str(uninterrupted / "last.pt")]):
        with pytest.raises(UserError, match="holds another run.*--resume auto"):
            main([*flags, *output])
    assert (tmp_path / "last.pt").read_bytes() == before


def test_two_runs_at_a_time_do_not_share_a_folder(module_flags: list[str], tmp_path: Path) -> None:
    first = start([*module_flags, "--shapes-train", "2000"], tmp_path)
    wait_for_step(tmp_path, first, 1)
    second = start(module_flags, tmp_path)
    assert "another run is writing to this folder" in second.communicate(timeout=60)[0]
    assert second.returncode == 2
    first.kill()
    first.communicate()
    third = start([*module_flags, "--shapes-train", "2000"], tmp_path)  # at once
    wait_for_step(tmp_path, third, load_checkpoint(tmp_path / "last.pt")["step"] + 1)
    assert third.poll() is None
    third.kill()
    third.communicate()


def test_what_cannot_be_resumed(
    module_flags: list[str], uninterrupted: Path, make_coco, tmp_path: Path
) -> None:
    last = str(uninterrupted / "last.pt")
    flags = ["--resume", last, "--output", str(tmp_path), "--device", "cpu"]
    with pytest.raises(UserError, match="--num-proposals 9: .* has --num-proposals 7"):
        main([*flags, "--num-proposals", "9"])
    two_classes = make_coco(categories={1: "a", 2: "b"}, num_images=12)
    with pytest.raises(UserError, match=r"classes \['a', 'b'\]"):
        main([*flags, *data_flags(two_classes)])
    with pytest.raises(UserError, match="12 images .*here are 4 images"):
        main([*flags, "--shapes-train", "4"])
    with pytest.raises(UserError, match="--batch-size 4; here are 12 images, and --batch-size 2"):
        main([*flags, "--batch-size", "2"])
    with pytest.raises(UserError, match="--preset r50-100: .* has --preset shapes, .* leave"):
        main([*flags, "--preset", "r50-100"])
    keys = ("model", "config", "class_names", "category_ids")
    plain = {key: load_checkpoint(last)[key] for key in keys}
    save_checkpoint(tmp_path / "plain.pt", plain)
    with pytest.raises(UserError, match="no training state.*--weights"):
        main(["--resume", str(tmp_path / "plain.pt"), "--output", str(tmp_path), "--device", "cpu"])


def start(flags: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, TRAIN, *flags, "--output", str(output), "--resume", "auto"]
    return subprocess.Popen(
        [*command, "--checkpoint-minutes", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
    assert f"resumed from {output}/last.pt" in printed and not list(output.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("times", "images"), [(2, 240), pytest.param(20, 2000, marks=pytest.mark.long)]
)
def test_killed(times: int, images: int, module_flags: list[str], tmp_path: Path) -> None:
    flags = [*module_flags, "--shapes-train", str(images), "--epochs", "1"]
    kill_again_and_again(times, flags, tmp_path / "killed")
    assert main([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert_same_weights(tmp_path / "killed/last.pt", tmp_path / "whole/last.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
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
    module_flags: list[str], tmp_path: Path, monkeypatch
) -> None:
    def interrupted(*args, **kwargs) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*module_flags, "--output", str(tmp_path)])
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3  # from right before it


# Rank 1 gets signal {number} before its step number {step}.
SIGNALLED = """
import os, signal, sys, train
from support.cli import run_main
original = train.train_step
def step(training, *batch):
    if training.step == {step} and training.world.rank == 1:
        os.kill(os.getpid(), signal.{number})
    return original(training, *batch)
train.train_step = step
sys.exit(run_main(train.main, "train.py"))
"""


def test_two_processes_stop_resume_and_end_where_one_run_would(
    module_flags: list[str], tmp_path: Path
) -> None:
    flags = [*module_flags, "--checkpoint-minutes", "0", "--output"]
    (tmp_path / "stop.py").write_text(SIGNALLED.format(step=1, number="SIGTERM"))
    stopped = torchrun(str(tmp_path / "stop.py"), *flags, str(tmp_path / "a"))
    assert stopped.returncode != 0 and "stopped by signal 15 at step 2" in stopped.stdout
    resumed = torchrun(TRAIN, *flags, str(tmp_path / "a"), "--resume", "auto")
    whole = torchrun(TRAIN, *flags, str(tmp_path / "b"))
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-3000:]
    assert_same_weights(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    assert whole.stdout.count("epoch 2/2") == 1  # one process speaks
    losses = [lines_of(tmp_path / name)[0]["loss"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)  # also of the steps before the stop


def test_a_dead_process_ends_the_others(module_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "die.py").write_text(SIGNALLED.format(step=2, number="SIGKILL"))
    flags = [*module_flags, "--output", str(tmp_path / "run"), "--checkpoint-minutes", "0"]
    done = torchrun(str(tmp_path / "die.py"), *flags)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 2
    assert 'train.py", line' not in done.stderr  # no trace of the one that is left


def test_what_one_process_or_all_find_wrong_is_said_once(
    module_flags, make_coco, tmp_path: Path
) -> None:
    json_file, folder = make_coco(num_images=4)
    (folder / "3.jpg").write_bytes(b"no picture")
    own = [*module_flags, *data_flags((json_file, folder)), "--workers", "1"]
    for flags, words in (
        ([*own, "--output", str(tmp_path / "a")], "3.jpg: cannot be read as an image"),
        ([*own, "--output", str(json_file / "below_a_file")], "Not a directory"),
        ([*own, "--output", str(tmp_path / "b"), "--val-json", "a.json"], "val-images is missing"),
    ):
        done = torchrun(TRAIN, *flags)
        messages = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert len(messages) == 1 and words in messages[0], done.stderr
        assert done.returncode == 1 and "exitcode  : 2" in done.stderr
        assert 'train.py", line' not in done.stderr  # no trace of ours


# --- numbers ---


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(
    module_flags, tmp_path: Path, monkeypatch
) -> None:
    def poison(training, images, targets, num_objects):
        if training.step in (1, 4, 5):
            images = [image / torch.tensor(float("nan")) for image in images]
        return train_step(training, images, targets, num_objects)

    monkeypatch.setattr(train, "train_step", poison)
    flags = [*module_flags, "--checkpoint-minutes", "0", "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"2 steps in a row.*\[\d+, .*--lr.*--amp off"):
        main([*flags, "--max-bad-steps", "2"])
    (line,) = lines_of(tmp_path)
    assert line["bad_steps"] == 1 and np.isfinite(line["loss"])
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 5 and checkpoint["bad_in_a_row"] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns(amp: str) -> None:
    training = new_training(replace(TINY, amp=amp), steps_per_epoch=20)
    images, targets = shapes_batch()
    steps = [take_step(training, images, targets, 12) for _ in range(20)]
    # fp16 first finds its scale, by skipping steps.
    losses = [values["loss"] for values in steps if np.isfinite(values["grad_norm"])]
    assert len(losses) >= 10 and losses[-1] < 0.85 * losses[0]
    assert training.scaler.is_enabled() == (amp == "fp16")


def test_a_micro_batch_changes_the_memory_and_not_the_recipe() -> None:
    images, targets = shapes_batch()
    count, losses = sum(len(target["labels"]) for target in targets), []
    for micro_batch in (None, 3):
        frozen = replace(TINY, backbone="resnet18", batch_size=4, micro_batch=micro_batch)
        losses.append(take_step(new_training(frozen), images, targets, count))
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=1e-4), name


BLOOD = ROOT / "assets/blood"
ON_BLOOD = [*data_flags((BLOOD / "val.json", BLOOD), (BLOOD / "val.json", BLOOD)), "--epochs", "1"]
ON_BLOOD += ["--weights", str(ROOT / "assets/blood.pt"), "--device", "cpu", "--workers", "0"]
ON_BLOOD += ["--lr", "1e-9", "--max-bad-steps", "1", "--output"]


@pytest.mark.parametrize("preset", [[], ["--preset", "small"]])
def test_fine_tuning_takes_the_network_from_the_file(
    preset: list[str], tmp_path: Path, capsys
) -> None:
    """Its stages, heads, canonical box and so on, named or not: at rate 0 the AP is the file's."""
    assert main([*preset, *ON_BLOOD, str(tmp_path)]) == 0
    ap = json.loads((tmp_path / "metrics.jsonl").read_text())["AP"]
    assert ap == pytest.approx(0.5407, abs=0.01)  # with another canonical_box_px: 0.424
    assert "takes over the whole network" in capsys.readouterr().out


def test_another_network_than_the_files_is_refused(tmp_path: Path) -> None:
    for flag, words in (
        (["--num-heads", "8"], "--num-heads 8: .*blood.pt has --num-heads 4"),
        (["--num-stages", "3"], "--num-stages 3: .*blood.pt has --num-stages 6"),
        (["--canonical-box-px", "224"], "--canonical-box-px 224: .* has --canonical-box-px 112"),
    ):
        with pytest.raises(UserError, match=words):
            main([*ON_BLOOD, str(tmp_path), *flag])


def test_the_evaluation_follows_the_training_size(
    module_flags: list[str], tmp_path: Path, capsys
) -> None:
    """--min-sizes alone: not evaluated at the preset's 800, or at what some file says."""
    flags = [*module_flags, "--test-size", "None", "--min-sizes", "64", "80"]
    assert main([*flags, "--output", str(tmp_path / "a")]) == 0
    assert load_checkpoint(tmp_path / "a/last.pt")["config"]["test_size"] == 80
    assert "80×80" in capsys.readouterr().out
    flags = [*module_flags, "--test-size", "200", "--max-size", "200", "--output"]
    assert main([*flags, str(tmp_path / "b")]) == 0
    assert "evaluates at 200 pixels, but trains at 96" in capsys.readouterr().out


def test_flags_without_effect_are_refused(tiny_flags: list[str], tmp_path: Path, capsys) -> None:
    for flags, words in (
        ("--lr 1e-3 --lr-at-16 1e-3", "--lr-at-16 has no effect beside --lr"),
        ("--milestones 0.5 --schedule cosine", "--milestones has no effect beside"),
        ("--crop-sizes 40 60 --no-crop", "--crop-sizes has no effect beside"),
        ("--crop-resize=50", "--crop-resize has no effect beside"),
        ("--val-json=", "--val-json= has no value"),  # of --val-json=$UNSET
        ("--resume a.pt --weights b.pt", "--weights has no effect beside --resume FILE"),
        ("--local-rank=1", "--local-rank .*torchrun"),
    ):
        with pytest.raises(UserError, match=words):
            main([*tiny_flags, *flags.split(), "--output", str(tmp_path)])
    with pytest.raises(SystemExit):  # read from the annotations
        main([*tiny_flags, "--num-classes", "91"])
    assert "num-classes" in capsys.readouterr().err


def test_what_may_surprise_of_a_small_and_crowded_data_set_is_said(
    make_coco, tiny_flags: list[str], tmp_path: Path, capsys
) -> None:
    def crowd(coco: dict) -> None:
        box = {"image_id": 1, "category_id": 7}
        coco["annotations"] += [
            {**box, "bbox": [5, 5, 20 + i, 20], "id": 100 + i} for i in range(10)
        ]

    data = data_flags(make_coco(num_images=3, edit=crowd))
    assert main([*tiny_flags, *data, "--batch-size", "16", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"1 of 3 training images .*\(up to 12\) than .*proposals \(7\)", printed)
    assert "batch         3 images" in printed and "1 steps are few to learn" in printed
    assert load_checkpoint(tmp_path / "last.pt")["schedule"]["learning_rate"] == 1e-3 * 3 / 16


def test_resuming_with_other_epochs_or_validation_data_is_said(
    module_flags: list[str], uninterrupted: Path, make_coco, tmp_path: Path, capsys
) -> None:
    last = tmp_path / "last.pt"
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    flags = ["--resume", str(last), "--output", str(tmp_path), "--device", "cpu"]
    before = last.read_bytes()
    assert main(flags) == 0 and last.read_bytes() == before
    printed = capsys.readouterr().out
    assert "nothing to do: all 2 epochs are done" in printed and "written" not in printed
    with pytest.raises(UserError, match="--epochs 1: .*last.pt has done more"):
        main([*flags, "--epochs", "1"])
    with pytest.raises(UserError, match="--freeze-backbone False: .*--weights"):
        main([*flags, "--no-freeze-backbone"])
    flags += ["--epochs", "3", "--lr", "1e-5", "--weight-decay", "0.5", "--amp", "fp16"]
    assert main([*flags, "--test-size", "64"]) == 0
    printed = capsys.readouterr().out
    changes = r"with test_size 96 → 64, epochs 2 → 3, lr None → 1e-05, amp off → fp16, weight_decay"
    assert re.search(changes, printed)
    assert "the best AP starts afresh, on other validation data" in printed
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 3
    checkpoint = load_checkpoint(last)
    assert checkpoint["epoch"] == 3 and checkpoint["scaler"]["scale"] > 0
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_srun_without_torchrun_is_refused(monkeypatch, tiny_flags, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="srun .*torchrun"):
        main([*tiny_flags, "--output", str(tmp_path)])


def test_three_steps_are_the_recipe_by_hand() -> None:
    """Clipping and AdamW as in their papers, in float64, from gradients taken on a copy."""
    config = replace(TINY, lr=3e-3, warmup_steps=2, clip_norm=1.0, weight_decay=0.1)
    training = new_training(config, steps_per_epoch=30)
    model, lr_of = training.model, partial(learning_rate, total_steps=30, config=config)
    images, targets = shapes_batch()
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

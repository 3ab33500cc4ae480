"""Checkpoints: what is written can be read, and what is not ours is refused in one line."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from model import build_model, load_model
from support.checkpoint import load_checkpoint, load_what_fits, read_checkpoint, save_checkpoint
from support.errors import UserError
from support.files import replacing


def saved(path: Path, **changes: Any) -> Path:
    contents = {
        "model": build_model(TINY).state_dict(),
        "config": TINY.to_dict(),
        "class_names": ["a", "b", "c"],
        "category_ids": [3, 1, 2],
    }
    save_checkpoint(path, {**contents, **changes})
    return path


def test_round_trip(tmp_path: Path) -> None:
    model = build_model(TINY)
    loaded, rest = load_model(saved(tmp_path / "last.pt", model=model.state_dict()))
    assert rest == {"config": TINY, "class_names": ["a", "b", "c"], "category_ids": [3, 1, 2]}
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt")
    before = path.read_bytes()
    with replacing(path) as temporary:
        temporary.write_bytes(before)
    temporary.symlink_to("/dev/full")  # it fails as a full disk does: when something is written
    with pytest.raises(OSError, match=r"last\.pt: not written \(No space left on device\).*intact"):
        saved(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt").read_bytes()
    files = {
        "empty.pt": (b"", "cannot be read as a checkpoint"),
        "cut.pt": (whole[: len(whole) // 2], "cannot be read as a checkpoint"),
        "short.pt": (whole[:-50], "cannot be read as a checkpoint"),
        "text.pt": (b"hello, this is no checkpoint", "cannot be read as a checkpoint"),
    }
    for name, (contents, _) in files.items():
        (tmp_path / name).write_bytes(contents)
    values = {
        "list.pt": ([1, 2], "holds a list"),
        "foreign.pt": ({"a": torch.zeros(3)}, "1 names are neither the authors' .*: a"),
        "nothing.pt": ({}, "no Sparse R-CNN"),
        "part.pt": ({"model": {}, "config": {}}, "lacks class_names, category_ids"),
    }
    for name, (value, _) in values.items():
        torch.save(value, tmp_path / name)
    missing = {"missing.pt": (None, "no such checkpoint.* sparse-rcnn-r50-100")}
    for name, (_, words) in {**files, **values, **missing}.items():
        with pytest.raises(UserError, match=rf"{name}: .*{words}") as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value), name


def test_a_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save({"model": Malicious()}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious(), 2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(UserError, match=f"{name}.*mkdir.*tensors and plain values") as error:
            read_checkpoint(tmp_path / name)
        assert "weights_only" not in str(error.value)  # torch's own message advises to turn it off
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state_dict = build_model(TINY).state_dict()
    state_dict["head.stages.1.cls_logits.bias"][1] = value
    path, model = saved(tmp_path / "last.pt", model=state_dict), build_model(TINY)
    for load in (load_model, lambda path: load_what_fits(model, path, list("abc"))):
        with pytest.raises(UserError, match=r"last\.pt: 1 .*not finite.* head\.stages\.1\.cls_log"):
            load(path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_parts_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    colour = {**TINY.to_dict(), "colour": "red"}
    five = replace(TINY, num_classes=5).to_dict()
    for changes, error, words in (
        ({"class_names": list("ab")}, UserError, r"last\.pt: has 2 class_names for 3 classes"),
        ({"category_ids": [1, 2, 3, 4]}, UserError, r"last\.pt: has 4 category_ids for 3 classes"),
        ({"config": colour}, UserError, r"last\.pt: config: unknown keys.*colour.*newer version"),
        ({"config": five}, RuntimeError, r"cls_logits\.weight.*\[3, 16\].*\[5, 16\]"),
    ):
        with pytest.raises(error, match=words):
            load_model(saved(tmp_path / "last.pt", **changes))


def test_fine_tuning_takes_over_what_fits_and_says_what_does_not(tmp_path: Path) -> None:
    theirs, ours = build_model(TINY), build_model(replace(TINY, num_proposals=4))
    fresh = {key: value.clone() for key, value in ours.state_dict().items()}
    path = saved(tmp_path / "last.pt", model=theirs.state_dict())
    lines = load_what_fits(ours, path, ["a", "b", "x"])  # as many classes, but not the same
    afresh = [key for key in fresh if key.startswith("proposal") or ".cls_logits." in key]
    for key, value in ours.state_dict().items():
        assert torch.equal(value, fresh[key] if key in afresh else theirs.state_dict()[key]), key
    assert f"took over {len(fresh) - len(afresh)} of the model's {len(fresh)} tensors" in lines[0]
    assert lines[1].endswith(": " + ", ".join(afresh)) and len(lines) == 2
    with pytest.raises(UserError, match=r"last\.pt: none of its \d+ tensors fits"):
        load_what_fits(torch.nn.Linear(2, 3), path, list("abc"))

"""Checkpoints: what is written can be read, and what is not ours is refused with reasons."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from model import build_model
from support import checkpoint
from support.checkpoint import (
    load_checkpoint,
    load_model,
    load_strictly,
    load_what_fits,
    read_checkpoint,
    save_checkpoint,
)
from support.errors import UserError


def saved(path: Path, **changes) -> Path:
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
    path = saved(tmp_path / "last.pt", model=model.state_dict())
    loaded, rest = load_model(path)
    assert (
        rest["config"] == TINY
        and rest["class_names"] == ["a", "b", "c"]
        and rest["category_ids"] == [3, 1, 2]
    )
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_failed_write_leaves_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "last.pt")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.pt.*No space left.*intact"):
        saved(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_unreadable_and_foreign_files_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt")
    cases = {
        "missing.pt": (None, "no such checkpoint"),
        "empty.pt": (b"", "cannot be read"),
        "text.pt": (b"hello, this is no checkpoint", "not a checkpoint|cannot be read"),
        "cut.pt": (good.read_bytes()[:5000], "cannot be read"),
        "table.pt": (b"annotation,file\n1,2\n", "it was not written by torch.save"),  # IndexError
    }
    for name, (contents, words) in cases.items():
        if contents is not None:
            (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=f"{name}.*({words})"):
            load_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list.pt.*list"):
        load_checkpoint(tmp_path / "list.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="arrays.npz.*another kind of archive"):
        load_checkpoint(tmp_path / "arrays.npz")
    torch.save({1: torch.zeros(3), "a": torch.zeros(3)}, tmp_path / "numbered.pt")
    with pytest.raises(UserError, match=r"numbered\.pt: convert: 2 names are neither.*: 1, a"):
        load_checkpoint(tmp_path / "numbered.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign\.pt: convert: this is no Sparse R-CNN"):
        load_checkpoint(tmp_path / "foreign.pt")


def test_a_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for name, write in {
        "zip.pt": torch.save,
        "raw.pt": lambda o, p: Path(p).write_bytes(pickle.dumps(o, 2)),
    }.items():
        write({"model": Malicious()}, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.*tensors and plain values.*mkdir") as error:
            read_checkpoint(tmp_path / name)
        assert "weights_only" not in str(error.value)  # torch's own message advises to turn it off
    assert not marker.exists()


def test_what_does_not_fit_is_listed_by_key_and_shape(tmp_path: Path) -> None:
    state_dict = build_model(TINY).state_dict()
    model = build_model(replace(TINY, num_classes=5))
    with pytest.raises(UserError) as error:
        load_strictly(model, state_dict, "a.pt")
    assert "a.pt" in str(
        error.value
    ) and "head.stages.0.cls_logits.weight [3, 16] in the file, [5, 16]" in str(error.value)
    del state_dict["proposal_boxes"]
    state_dict["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match="missing: proposal_boxes; left over: extra"):
        load_strictly(build_model(TINY), state_dict, "a.pt")


def test_a_config_of_another_version_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pt", config={**TINY.to_dict(), "colour": "red"})
    with pytest.raises(UserError, match=r"old\.pt: config: .*colour.*; if a newer version wrote"):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config", None, "wrong type of value is in config;"),
        ("model", None, "wrong type of value is in model;"),
        ("model", [1], "wrong type of value is in model;"),
        ("model", {"proposal_boxes": None}, "wrong type of value is in model;"),
        ("category_ids", None, "wrong type of value is in category_ids;"),
        ("class_names", [1, 2, 3], "wrong type of value is in class_names;"),
        ("class_names", list("ab"), "has 2 class_names for a model of 3 classes"),
        ("class_names", list("abcde"), "has 5 class_names for a model of 3 classes"),
        ("category_ids", [1, 2], "has 2 category_ids for a model of 3 classes"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    path = saved(tmp_path / "last.pt", **{key: value})
    with pytest.raises(UserError, match=rf"last\.pt: .*{words}"):
        load_checkpoint(path)
    if "type" in words:
        with pytest.raises(UserError, match=words):
            load_what_fits(build_model(TINY), path, list("abc"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state_dict = build_model(TINY).state_dict()
    state_dict["head.stages.1.cls_logits.bias"][1] = value
    path = saved(tmp_path / "last.pt", model=state_dict)
    model = build_model(TINY)
    words = r"last\.pt: holds values .* not finite: head\.stages\.1\.cls_logits\.bias; take an"
    with pytest.raises(UserError, match=words):
        load_model(path)
    with pytest.raises(UserError, match=words):
        load_what_fits(model, path, list("abc"))
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    load_what_fits(model, path, list("xyz"))  # here the class layers start afresh

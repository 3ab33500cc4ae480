"""Checkpoints: what is written can be read, and what is not ours is refused in one line."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, reference_weights, tiny_checkpoint

from config import PRESETS
from model import build_model, load_model
from support.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, take_over
from support.convert import COCO_CLASSES
from support.errors import UserError
from support.files import replacing


def saved(path: Path, **changes: Any) -> Path:
    save_checkpoint(path, tiny_checkpoint(**changes))
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
    files = {
        "empty.pt": (b"", "cannot be read as a checkpoint"),
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
    for name, (_, words) in {**files, **values}.items():
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
    path = saved(tmp_path / "last.pt", model=state_dict)
    with pytest.raises(UserError, match=r"last\.pt: 1 .*not finite.* head\.stages\.1\.cls_log"):
        load_checkpoint(path)


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


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_saved_by_a_loop_of_ones_own(prefix: str, tmp_path: Path) -> None:
    """As people do it: model.state_dict(), perhaps of DistributedDataParallel or torch.compile."""
    model = build_model(TINY)
    state_dict = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"model": state_dict, "epoch": 3} if prefix else state_dict, tmp_path / "own.pt")
    with pytest.raises(UserError, match=r"own\.pt: holds only weights.*--preset"):
        load_model(tmp_path / "own.pt")
    with pytest.raises(UserError, match="not of --preset shapes: its hidden_dim is 16, not 64"):
        load_model(tmp_path / "own.pt", preset=PRESETS["shapes"])
    preset = replace(TINY, num_proposals=99, num_stages=9, num_classes=9)  # shapes tell these
    loaded, rest = load_model(tmp_path / "own.pt", preset=preset)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert rest["config"] == replace(TINY, test_size=96) and len(rest["class_names"]) == 3


def test_classes_are_taken_over_by_name(tmp_path: Path) -> None:
    """Three classes a, b, c into b, x, a: two rows move, one starts afresh."""
    theirs, ours = build_model(TINY), build_model(TINY)
    fresh = {key: value.clone() for key, value in ours.state_dict().items()}
    checkpoint = load_checkpoint(saved(tmp_path / "last.pt", model=theirs.state_dict()))
    lines = take_over(ours, checkpoint, ["b", "x", "a"])
    for key, value in ours.state_dict().items():
        expected = theirs.state_dict()[key]
        if ".cls_logits." in key:
            expected = torch.stack([expected[1], fresh[key][1], expected[0]])
        assert torch.equal(value, expected), key
    assert "afresh: x" in lines[1] and "not used: c" in lines[2]
    with pytest.raises(RuntimeError, match="proposal_boxes"):
        take_over(build_model(replace(TINY, num_proposals=4)), checkpoint, list("abc"))


def test_cocos_classes_in_another_order_are_taken_over_by_name(tmp_path: Path) -> None:
    """Of a file of MMDetection: 80 outputs alone would fit 80 classes in any order."""
    authors = reference_weights("mmdet_r50_100")
    bias = torch.arange(80.0)
    authors["roi_head.bbox_head.0.fc_cls.bias"] = bias
    torch.save({"state_dict": authors}, tmp_path / "mmdet.pth")
    names = sorted(COCO_CLASSES.values())
    names[0] = "part 22"  # in place of "airplane"
    model = build_model(PRESETS["r50-100"], pretrained_backbone=False)
    take_over(model, load_checkpoint(tmp_path / "mmdet.pth"), names)
    found = model.head.stages[0].cls_logits.bias.detach()
    order = list(COCO_CLASSES.values())
    assert found[names.index("zebra")] == bias[order.index("zebra")] == 22
    assert found[0] == pytest.approx(-4.595, abs=1e-3)  # as every new class


def test_frozen_and_trained_norms_fit_one_another(tmp_path: Path) -> None:
    """First the head alone, then the whole network, and back; only one of them counts batches."""
    small = replace(TINY, backbone="resnet18", freeze_backbone=True)
    frozen, trained = build_model(small), build_model(replace(small, freeze_backbone=False))
    for source, target in ((frozen, trained), (trained, frozen)):
        checkpoint = {"model": source.state_dict(), "class_names": list("abc")}
        take_over(target, checkpoint, list("abc"))
        for key in set(source.state_dict()) & set(target.state_dict()):
            assert torch.equal(source.state_dict()[key], target.state_dict()[key]), key

"""tools/convert.py: the shapes of the tensors tell the config, and what does not fit is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, reference_weights

import support.convert
import tools.convert
from config import PRESETS, Config
from model import build_model
from support.checkpoint import load_checkpoint, load_model, save_checkpoint
from support.convert import COCO_CLASSES, config_from, convert_checkpoint
from support.errors import UserError
from tools.convert import main


@pytest.fixture(scope="module")
def authors() -> dict[str, torch.Tensor]:
    return reference_weights("r50_100")


@pytest.fixture(scope="module")
def mmdet() -> dict[str, torch.Tensor]:
    return reference_weights("mmdet_r50_100")


def test_the_command_offers_the_function_that_checkpoints_are_read_with() -> None:
    assert tools.convert.convert_checkpoint is support.convert.convert_checkpoint


def test_both_vocabularies_give_the_same_names_and_the_papers_config(authors, mmdet) -> None:
    ours = convert_checkpoint(authors)
    assert set(ours) == set(convert_checkpoint({"meta": {}, "state_dict": mmdet}))
    assert config_from(ours) == Config()
    assert set(
        convert_checkpoint({"model": {f"module.{k}": v for k, v in authors.items()}})
    ) == set(ours)


def test_depth_proposals_classes_and_stages_are_read_off_the_shapes(authors) -> None:
    deep = {}
    for key, value in authors.items():
        if key.startswith(("head.head_series.4", "head.head_series.5")):
            continue
        if "init_proposal" in key:
            value = value.repeat(3, 1)
        if "class_logits" in key:
            value = value[:20]
        deep[key] = value
    for block in range(6, 23):  # R101's third layer has 23 blocks
        deep |= {
            k.replace("res4.5.", f"res4.{block}."): v for k, v in authors.items() if "res4.5." in k
        }
    config = config_from(convert_checkpoint(deep))
    assert (config.preset, config.backbone, config.num_proposals) == ("r101-300", "resnet101", 300)
    assert (config.num_stages, config.num_classes) == (4, 20)


def test_missing_and_unknown_tensors_are_listed(authors) -> None:
    without = {k: v for k, v in authors.items() if k != "head.head_series.3.norm2.bias"}
    with pytest.raises(
        UserError, match=r"1 tensors are missing.*head\.stages\.3\.interaction_norm\.bias"
    ):
        convert_checkpoint(without)
    with pytest.raises(UserError, match="1 names are neither.*rpn.conv.weight"):
        convert_checkpoint({**authors, "rpn.conv.weight": torch.zeros(1)})
    with pytest.raises(
        UserError, match=r"another shape.*proposal_boxes \[100, 5\], not \[100, 4\]"
    ):
        convert_checkpoint({**authors, "init_proposal_boxes.weight": torch.zeros(100, 5)})
    with pytest.raises(UserError, match="no Sparse R-CNN"):
        convert_checkpoint({})


def test_coco_has_80_classes() -> None:
    assert len(set(COCO_CLASSES.values())) == 80 and list(COCO_CLASSES) == sorted(COCO_CLASSES)
    assert (
        COCO_CLASSES[1] == "person" and COCO_CLASSES[90] == "toothbrush" and 12 not in COCO_CLASSES
    )


def test_the_command_line_writes_a_checkpoint(authors, tmp_path: Path) -> None:
    torch.save({"model": authors, "iteration": 269_999}, tmp_path / "in.pth")
    command = [sys.executable, "-m", "tools.convert"]
    command += [str(tmp_path / "in.pth"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resnet50, 100 proposals, 6 stages, 80 classes (COCO)" in done.stdout
    model, rest = load_model(tmp_path / "out.pt")
    assert rest["config"] == PRESETS["r50-100"]
    assert rest["class_names"] == list(COCO_CLASSES.values()) and rest["category_ids"] == list(
        COCO_CLASSES
    )
    assert torch.equal(model.proposal_feats, authors["init_proposal_features.weight"])


def test_an_unreadable_file_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "in.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"in\.pth"):
        main([str(tmp_path / "in.pth"), str(tmp_path / "out.pt")])
    assert not (tmp_path / "out.pt").exists()


def test_weights_of_the_authors_and_of_mmdetection_are_loaded_as_they_are(
    authors, mmdet, tmp_path: Path
) -> None:
    for name, contents in {
        "authors": {"model": authors, "iteration": 1},
        "mmdet": {"state_dict": mmdet},
    }.items():
        torch.save(contents, tmp_path / f"{name}.pth")
        model, rest = load_model(tmp_path / f"{name}.pth")
        assert rest["config"] == PRESETS["r50-100"] and rest["class_names"] == list(
            COCO_CLASSES.values()
        )
        source = contents.get("model", contents.get("state_dict"))
        assert torch.equal(
            model.proposal_boxes, next(v for k, v in source.items() if "init_proposal_b" in k)
        )
    torch.save({**authors, "rpn.conv.weight": torch.zeros(1)}, tmp_path / "left_over.pth")
    with pytest.raises(
        UserError, match=r"left_over\.pth: .*1 names are neither.*rpn\.conv\.weight"
    ):
        load_model(tmp_path / "left_over.pth")


def test_a_mistake_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    """Not even with --half is a file replaced by one without its training state."""
    path = tmp_path / "last.pt"
    contents = {"model": build_model(TINY).state_dict(), "config": TINY.to_dict()}
    contents |= {"class_names": list("abc"), "category_ids": [1, 2, 3]}
    save_checkpoint(path, {**contents, "optimizer": {}, "step": 3})
    (tmp_path / "link.pt").symlink_to(path)
    before = path.read_bytes()
    for output, error, words in (
        (path, UserError, r"last\.pt: would replace its own source"),
        (tmp_path / "link.pt", UserError, r"link\.pt: would replace its own source"),
        (tmp_path, UserError, "this is a folder; give the file"),
        (tmp_path / "no" / "out.pt", OSError, r"no/out\.pt"),
    ):
        with pytest.raises(error, match=words):
            main([str(path), str(output), "--half"])
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["last.pt", "link.pt"]


def test_half_precision_halves_a_file_and_leaves_out_the_training_state(tmp_path: Path) -> None:
    model = build_model(TINY)
    contents = {"model": model.state_dict(), "config": TINY.to_dict()}
    contents |= {"class_names": list("abc"), "category_ids": [1, 2, 3]}
    save_checkpoint(
        tmp_path / "last.pt", {**contents, "optimizer": {"state": torch.zeros(10**6)}, "epoch": 3}
    )
    main([str(tmp_path / "last.pt"), str(tmp_path / "small.pt"), "--half"])
    small = load_checkpoint(tmp_path / "small.pt")
    assert set(small) == set(contents) and small["class_names"] == list("abc")
    for key, value in load_model(tmp_path / "small.pt")[0].state_dict().items():
        assert value.dtype == contents["model"][key].dtype
        assert torch.allclose(value, contents["model"][key], rtol=1e-3, atol=1e-7), key
    contents["model"]["proposal_feats"][0, 0] = 1e6
    save_checkpoint(tmp_path / "last.pt", contents)
    with pytest.raises(UserError, match="not finite in float16: proposal_feats"):
        main([str(tmp_path / "last.pt"), str(tmp_path / "large.pt"), "--half"])
    assert not (tmp_path / "large.pt").exists()

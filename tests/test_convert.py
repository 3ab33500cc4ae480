"""tools/convert.py: the shapes of the tensors tell the config, and what does not fit is named."""

import os
from pathlib import Path

import pytest
import torch
from conftest import python, reference_weights, tiny_checkpoint

import support.convert
import tools.convert
from config import Config
from model import load_model
from support.checkpoint import load_checkpoint, save_checkpoint
from support.convert import COCO_CLASSES, as_checkpoint, convert_checkpoint
from support.errors import UserError
from tools.convert import main


@pytest.fixture(scope="module")
def authors() -> dict[str, torch.Tensor]:
    return reference_weights("r50_100")


def test_the_command_offers_the_function_that_checkpoints_are_read_with() -> None:
    assert tools.convert.convert_checkpoint is support.convert.convert_checkpoint


def test_both_vocabularies_give_the_same_names_and_the_papers_config(authors) -> None:
    ours, mmdet = convert_checkpoint(authors), reference_weights("mmdet_r50_100")
    assert set(ours) == set(convert_checkpoint({"meta": {}, "state_dict": mmdet}))
    parallel = {f"module.{key}": value for key, value in authors.items()}
    assert set(ours) == set(convert_checkpoint({"model": parallel}))
    assert Config.from_dict(as_checkpoint(authors)["config"]) == Config()


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
    config = Config.from_dict(as_checkpoint(deep)["config"])
    assert (config.preset, config.backbone, config.num_proposals) == ("r101-300", "resnet101", 300)
    assert (config.num_stages, config.num_classes, config.crop) == (4, 20, True)


def test_foreign_and_doubled_names_are_errors(authors) -> None:
    with pytest.raises(UserError, match=r"1 names are neither.*rpn\.conv\.weight"):
        convert_checkpoint({**authors, "rpn.conv.weight": torch.zeros(1)})
    name = "init_proposal_features.weight"
    with pytest.raises(UserError, match="the same tensor under two names"):
        convert_checkpoint({**authors, f"module.{name}": authors[name]})


def test_coco_has_80_classes() -> None:
    assert len(set(COCO_CLASSES.values())) == 80 and list(COCO_CLASSES) == sorted(COCO_CLASSES)
    assert COCO_CLASSES[1] == "person" and COCO_CLASSES[90] == "toothbrush"
    assert 12 not in COCO_CLASSES


def test_the_command_line_writes_a_checkpoint(authors, tmp_path: Path) -> None:
    torch.save({"model": authors, "iteration": 269_999}, tmp_path / "in.pth")
    done = python("-m", "tools.convert", "in.pth", "out.pt", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "resnet50, 100 proposals, 6 stages, 80 classes (person, …)" in done.stdout
    model, rest = load_model(tmp_path / "out.pt")
    assert rest["config"] == Config(test_size=800) and rest["category_ids"] == list(COCO_CLASSES)
    assert torch.equal(model.proposal_feats, authors["init_proposal_features.weight"])


def test_a_mistake_leaves_the_source_as_it_was_and_writes_nothing(authors, tmp_path: Path) -> None:
    path, link, missing = (tmp_path / name for name in ("last.pt", "link.pt", "missing.pth"))
    save_checkpoint(path, tiny_checkpoint(optimizer={}, step=3))
    link.symlink_to(path)
    del (lacking := dict(authors))["head.head_series.3.norm2.bias"]
    torch.save(lacking, missing)
    before = path.read_bytes()
    for source, output, error, words in (
        (path, path, UserError, r"last\.pt: would replace its own source"),
        (path, link, UserError, r"link\.pt: would replace its own source"),
        (path, tmp_path / "no" / "out.pt", OSError, r"no/out\.pt"),
        (missing, tmp_path / "out.pt", RuntimeError, r"head\.stages\.3\.interaction_norm\.bias"),
    ):
        with pytest.raises(error, match=words):
            main([str(source), str(output), "--half"])
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "link.pt", "missing.pth"]


def test_half_precision_halves_a_file_and_leaves_out_the_training_state(tmp_path: Path) -> None:
    source, small, large = (str(tmp_path / name) for name in ("last.pt", "small.pt", "large.pt"))
    contents = tiny_checkpoint()
    save_checkpoint(source, {**contents, "optimizer": {"state": torch.zeros(10**6)}, "epoch": 3})
    main([source, small, "--half"])
    assert set(load_checkpoint(small)) == set(contents)
    for key, value in load_model(small)[0].state_dict().items():
        assert value.dtype == contents["model"][key].dtype
        assert torch.allclose(value, contents["model"][key], rtol=1e-3, atol=1e-7), key
    contents["model"]["proposal_feats"][0, 0] = 1e6
    save_checkpoint(source, contents)
    with pytest.raises(UserError, match=r"last\.pt: proposal_feats is too large for float16"):
        main([source, large, "--half"])
    assert not os.path.exists(large)

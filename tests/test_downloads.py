"""Weights of the backbone and of whole models: downloaded, from the cache, or an error."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, serving, tiny_checkpoint
from torch.hub import load_state_dict_from_url
from torchvision.models import resnet18

import backbone
from backbone import ResNetFPN
from model import load_model
from support.checkpoint import PUBLISHED, load_checkpoint, save_checkpoint
from support.errors import UserError

NAME = "sparse-rcnn-r50-100"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which its files are served. torch.hub has an empty cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as address:
        yield folder, address


def resnet_from(url: str, monkeypatch: pytest.MonkeyPatch) -> ResNetFPN:
    """With torchvision's table of weights, but for another address."""
    weights = SimpleNamespace(
        url=url, get_state_dict=lambda **options: load_state_dict_from_url(url, **options)
    )
    monkeypatch.setattr(backbone, "get_model_weights", lambda name: {"IMAGENET1K_V1": weights})
    return ResNetFPN("resnet18")


def test_imagenet_weights_are_downloaded_once_and_a_wrong_checksum_is_refused(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    state_dict = resnet18(weights=None).state_dict()
    torch.save(state_dict, folder / "resnet18-00000000.pth")
    content = (folder / "resnet18-00000000.pth").read_bytes()
    file = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / file).write_bytes(content)
    for _ in range(2):
        network = resnet_from(f"{address}/{file}", monkeypatch)
        assert torch.equal(network.body["conv1"].weight, state_dict["conv1.weight"])
        (folder / file).unlink(missing_ok=True)  # from now on it comes from the cache

    with pytest.raises(FileNotFoundError, match="invalid hash"):
        resnet_from(f"{address}/resnet18-00000000.pth", monkeypatch)
    words = rf"404.*resnet18-11111111\.pth into {tmp_path / 'hub'}.*pretrained=False"
    with pytest.raises(FileNotFoundError, match=words):
        resnet_from(f"{address}/resnet18-11111111.pth", monkeypatch)


def test_a_model_is_downloaded_once_and_failures_say_which_file_to_mend(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    save_checkpoint(folder / "whole.pth", tiny_checkpoint())
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:-1000])
    monkeypatch.setitem(PUBLISHED, NAME, f"{address}/whole.pth")
    model, found = load_model(NAME)
    assert found["config"] == TINY and found["class_names"] == ["a", "b", "c"]
    (folder / "whole.pth").unlink()
    assert torch.equal(model.proposal_feats, load_model(NAME)[0].proposal_feats)

    for file, words, is_kept in (
        ("missing.pth", r"{NAME}: {url} could not be downloaded .* put that file at {path}", False),
        ("cut.pth", r"{path}: cannot be read as a checkpoint: .* is it cut off", True),
    ):
        url, path = f"{address}/{file}", tmp_path / "hub" / "checkpoints" / file
        monkeypatch.setitem(PUBLISHED, NAME, url)
        with pytest.raises(UserError, match=words.format(NAME=NAME, url=url, path=path)) as error:
            load_checkpoint(NAME)
        assert "\n" not in str(error.value) and path.exists() == is_kept
    with pytest.raises(UserError, match=f"sparse-rcnn-r50-200: no such checkpoint.*{NAME}"):
        load_checkpoint("sparse-rcnn-r50-200")

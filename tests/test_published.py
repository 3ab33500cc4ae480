"""Weights by name, from a local server: downloads that work, and those that do not."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY

from model import build_model, load_model
from support.checkpoint import PUBLISHED, load_checkpoint, save_checkpoint
from support.errors import UserError

NAME = "sparse-rcnn-r50-100"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with weights; what is in it is served. torch.hub's cache is `tmp_path / "hub"`."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "served"
    folder.mkdir()
    rest = {"config": TINY.to_dict(), "class_names": ["a", "b", "c"], "category_ids": [1, 2, 3]}
    model = build_model(TINY).state_dict()
    save_checkpoint(folder / "whole.pth", {"model": model, **rest})
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:-1000])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(PUBLISHED, NAME, f"http://127.0.0.1:{server.server_port}/whole.pth")
        yield folder
        server.shutdown()


def test_the_table_has_the_papers_four_models() -> None:
    release = "https://github.com/PeizeSun/SparseR-CNN/releases/download/v0.1"
    for backbone in ("r50", "r101"):
        for number in (100, 300):
            url = f"{release}/{backbone}_{number}pro_3x_model.pth"
            assert PUBLISHED[f"sparse-rcnn-{backbone}-{number}"] == url
    assert len(PUBLISHED) == 4


def test_a_name_is_downloaded_once(served: Path) -> None:
    model, rest = load_model(NAME)
    (served / "whole.pth").unlink()  # from now on the file comes from the cache
    again, _ = load_model(NAME)
    assert torch.equal(model.proposal_feats, again.proposal_feats)
    assert rest["config"] == TINY and rest["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("missing.pth", r"{NAME}: {url} could not be downloaded .* put that file at {path}"),
        ("cut.pth", r"{path}: cannot be read as a checkpoint: .* is it cut off"),
    ],
)
def test_a_download_that_fails_says_which_file_to_mend(
    file: str, words: str, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = PUBLISHED[NAME].replace("whole.pth", file), tmp_path / "hub" / "checkpoints" / file
    monkeypatch.setitem(PUBLISHED, NAME, url)
    with pytest.raises(UserError, match=words.format(NAME=NAME, url=url, path=path)) as error:
        load_checkpoint(NAME)
    assert "\n" not in str(error.value) and path.exists() == (file == "cut.pth")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=f"sparse-rcnn-r50-200: no such checkpoint.*{NAME}"):
        load_checkpoint("sparse-rcnn-r50-200")

"""Weights by name, from a local server: downloads that work, break off or are corrupted."""

import http.server
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY

from model import build_model
from support import checkpoint
from support.checkpoint import PUBLISHED, Published, load_checkpoint, load_model, save_checkpoint
from support.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; of those in `cut` only a half, though it promises all."""

    files: dict[str, bytes] = {}
    cut: set[str] = set()
    requests: list[str] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path in self.cut else content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server; torch.hub's cache is `tmp_path / "hub"`, empty."""
    monkeypatch.setattr(Handler, "files", {})
    monkeypatch.setattr(Handler, "cut", set())
    monkeypatch.setattr(Handler, "requests", [])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def tiny(tmp_path: Path) -> bytes:
    path = tmp_path / "tiny.pt"
    rest = {"config": TINY.to_dict(), "class_names": ["a", "b", "c"], "category_ids": [1, 2, 3]}
    save_checkpoint(path, {"model": build_model(replace(TINY)).state_dict(), **rest})
    return path.read_bytes()


def publish(monkeypatch: pytest.MonkeyPatch, url: str, sha256: str | None = None) -> None:
    monkeypatch.setitem(PUBLISHED, "sparse-rcnn-r50-100", Published(url, sha256))


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "hub").rglob("*") if path.is_file())


def test_the_table_has_the_papers_four_models() -> None:
    assert list(PUBLISHED) == [
        f"sparse-rcnn-{backbone}-{n}" for backbone in ("r50", "r101") for n in (100, 300)
    ]
    for name, (url, sha256, _) in PUBLISHED.items():
        backbone, number = re.fullmatch(r"sparse-rcnn-(r\d+)-(\d+)", name).groups()
        release = "https://github.com/PeizeSun/SparseR-CNN/releases/download/v0.1/"
        assert (
            url == f"{release}{backbone}_{number}pro_3x_model.pth" and sha256 is None
        )  # none is known


def test_a_name_is_downloaded_once(server: str, tiny: bytes, tmp_path: Path, monkeypatch) -> None:
    Handler.files["/r50.pth"] = tiny
    publish(monkeypatch, f"{server}/r50.pth")
    for _ in range(2):
        model, rest = load_model("sparse-rcnn-r50-100")
    assert Handler.requests == ["/r50.pth"] and cached(tmp_path) == ["r50.pth"]
    assert (
        rest["class_names"] == ["a", "b", "c"] and len(model.proposal_boxes) == TINY.num_proposals
    )


@pytest.mark.parametrize("how", ["cut", "corrupted", "missing", "no pickle", "checksum"])
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(
    how: str, server: str, tiny: bytes, tmp_path: Path, monkeypatch
) -> None:
    Handler.files["/r50.pth"] = tiny
    publish(monkeypatch, f"{server}/r50.pth", "0" * 64 if how == "checksum" else None)
    if how == "cut":
        Handler.cut = {"/r50.pth"}
    elif how == "corrupted":  # a flipped bit in the middle, where the weights are
        Handler.files["/r50.pth"] = (
            tiny[: len(tiny) // 2] + bytes([tiny[len(tiny) // 2] ^ 1]) + tiny[len(tiny) // 2 + 1 :]
        )
    elif how == "missing":
        del Handler.files["/r50.pth"]
    elif how == "no pickle":
        Handler.files["/r50.pth"] = b"<html>Please log in</html>"
    where = re.escape(str(tmp_path / "hub" / "checkpoints" / "r50.pth"))
    with pytest.raises(
        UserError, match=rf"sparse-rcnn-r50-100: http://\S+/r50\.pth .*put that file at {where}"
    ):
        load_checkpoint("sparse-rcnn-r50-100")
    assert cached(tmp_path) == []
    Handler.files["/r50.pth"], Handler.cut = tiny, set()
    if how != "checksum":  # and the next try works
        load_checkpoint("sparse-rcnn-r50-100")
        assert cached(tmp_path) == ["r50.pth"]


def test_an_unreachable_host(server: str, tmp_path: Path, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        publish(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}/r50.pth")
    with pytest.raises(
        UserError, match=r"could not be downloaded.*put that file at .*hub/checkpoints/r50\.pth"
    ):
        load_checkpoint("sparse-rcnn-r50-100")


def test_a_file_in_the_cache_is_used_and_a_damaged_one_is_named(
    server: str, tiny: bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / "r101_300pro_3x_model.pth"
    file.write_bytes(tiny)
    assert checkpoint.load_checkpoint("sparse-rcnn-r101-300")["class_names"] == ["a", "b", "c"]
    file.write_bytes(tiny[:-50])
    with pytest.raises(
        UserError, match=rf"{re.escape(str(file))}: cannot be read.*replace the file"
    ):
        load_checkpoint("sparse-rcnn-r101-300")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        UserError, match="sparse-rcnn-r50-200: no such checkpoint.*sparse-rcnn-r50-100"
    ):
        load_checkpoint("sparse-rcnn-r50-200")

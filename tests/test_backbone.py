"""Shapes, frozen norms, and ImageNet weights: from a cache, from a server, or a helpful error."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.hub import load_state_dict_from_url
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

import backbone
from backbone import STRIDES, FrozenBatchNorm, ResNetFPN, SmallFPN


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder of checkpoints, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which its files are served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def serve(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """torchvision's table of weights, with another address."""
    weights = SimpleNamespace(
        url=url, get_state_dict=lambda **options: load_state_dict_from_url(url, **options)
    )
    monkeypatch.setattr(backbone, "get_model_weights", lambda name: {"IMAGENET1K_V1": weights})


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_levels_have_the_documented_shapes(size: tuple[int, int]) -> None:
    height, width = size
    for network in (ResNetFPN("resnet18", 24, pretrained=False), SmallFPN(24)):
        levels = network(torch.rand(2, 3, height, width))
        expected = [(2, 24, height // stride, width // stride) for stride in STRIDES]
        assert [tuple(level.shape) for level in levels] == expected


def test_frozen_norms_are_torchvisions_and_keep_half_precision() -> None:
    ours, theirs = FrozenBatchNorm(5), FrozenBatchNorm2d(5)
    for norm in (ours, theirs):
        torch.manual_seed(1)
        for name, value in norm.named_buffers():
            is_scale = name in ("weight", "running_var")
            value.copy_(torch.rand(5) + 0.5 if is_scale else torch.randn(5))
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        found, expected = ours(x.to(dtype)), theirs(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
        gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=2 * tolerance, atol=10 * tolerance)


def test_under_autocast_nothing_between_two_convolutions_is_float32() -> None:
    network, seen = ResNetFPN("resnet18", 8, pretrained=False), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module is not network.body["conv1"]:
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.rand(1, 3, 64, 64))
    assert len(seen) == 27 and set(seen) == {torch.bfloat16}


def test_a_file_in_the_cache_is_used_without_a_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    state_dict = resnet18(weights=None).state_dict()
    torch.save(state_dict, cache / "resnet18-f37072fd.pth")
    assert torch.equal(ResNetFPN("resnet18").body["conv1"].weight, state_dict["conv1.weight"])


def test_weights_are_downloaded_and_a_wrong_checksum_is_refused(
    cache: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    state_dict = resnet18(weights=None).state_dict()
    torch.save(state_dict, folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    (folder / "weights.pth").rename(folder / f"resnet18-{digest}.pth")
    serve(monkeypatch, f"{address}/resnet18-{digest}.pth")
    assert torch.equal(ResNetFPN("resnet18").body["conv1"].weight, state_dict["conv1.weight"])
    assert (cache / f"resnet18-{digest}.pth").exists()

    (folder / "resnet18-00000000.pth").write_bytes((folder / f"resnet18-{digest}.pth").read_bytes())
    serve(monkeypatch, f"{address}/resnet18-00000000.pth")
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        ResNetFPN("resnet18")
    serve(monkeypatch, f"{address}/resnet18-11111111.pth")
    with pytest.raises(FileNotFoundError, match="404"):
        ResNetFPN("resnet18")


def test_what_cannot_be_loaded_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, "http://127.0.0.1:9/resnet18-f37072fd.pth")  # nobody listens there
    with pytest.raises(FileNotFoundError) as error:
        ResNetFPN("resnet18")
    for words in ("resnet18-f37072fd.pth", str(cache), "pretrained=False"):
        assert words in str(error.value)

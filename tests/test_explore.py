"""The page to play with: what it says is what the model does, in Python and in a real browser."""

import base64
import copy
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from torch import Tensor, nn
from torchvision import tv_tensors

import explore
from config import PRESETS
from data import eval_transforms
from model import SparseRCNN, build_model, load_model
from support.cli import run_main
from support.pictures import to_image

PHOTO = ROOT / "assets/blood/BloodImage_00017.jpg"
JSON = ROOT / "assets/blood/val.json"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def blood(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The page of a photograph, made by the command, and what is needed to make it otherwise."""
    html = tmp_path_factory.mktemp("explore") / "page.html"
    weights = str(ROOT / "assets/blood.pt")
    explore.main([str(PHOTO), "--weights", weights, "--annotations", str(JSON), "--output", str(html)])
    model, checkpoint = load_model(weights)
    image = eval_transforms(checkpoint["config"])(tv_tensors.Image(to_image(PHOTO)))
    return SimpleNamespace(html=html, **inputs(model, image.as_subclass(Tensor)), image=image)


@torch.inference_mode()
def inputs(model: SparseRCNN, image: Tensor) -> dict[str, Any]:
    batch, whwh_px = model.prepare([image])
    return {"model": model, "pyramid": model.backbone(batch), "whwh_px": whwh_px}


def run(blood: SimpleNamespace, change: Any = lambda model: None) -> explore.Run:
    return explore.run_head(blood.model, blood.pyramid, blood.whwh_px, change)


def decode(text: str) -> dict[str, Any]:
    """The data of a page, with its arrays as NumPy's."""
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)])
    block = zlib.decompress(base64.b64decode(data["arrays"]))

    def read(value: Any) -> Any:
        if not (isinstance(value, list) and value and value[0] in ("<i2", "<u1", "<u2")):
            return value
        dtype, start, shape, unit = value
        return np.frombuffer(block, dtype, int(np.prod(shape)), start).reshape(shape) * unit

    unpack = lambda run: {key: read(value) for key, value in run.items()}  # noqa: E731
    data["runs"] = [unpack(run) for run in data["runs"]]
    data["removals"] = {int(n): unpack(run) for n, run in data["removals"].items()}
    return data


# --- what the model does ---


@torch.inference_mode()
def test_looking_changes_nothing(blood: SimpleNamespace) -> None:
    expected = blood.model.stages([blood.image])
    seen = run(blood)
    assert torch.equal(seen.boxes[1:], expected.boxes[:, 0])
    assert torch.equal(seen.scores, expected.logits[:, 0].sigmoid())

    # Attention and responses of stage 1, by hand.
    stage, feats = blood.model.head.stages[0], blood.model.proposal_feats  # (N, C)
    layer = stage.self_attn
    q, k, _ = (feats @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=-1)
    heads = lambda x: x.view(len(x), layer.num_heads, -1).transpose(0, 1)  # noqa: E731
    weights = (heads(q) @ heads(k).mT / layer.head_dim**0.5).softmax(-1).mean(0)
    torch.testing.assert_close(seen.attention[0], weights, atol=1e-5, rtol=0)

    feats = stage.attn_norm(feats + layer(*3 * [feats[None]])[0][0])
    regions = blood.model.head.pooler(blood.pyramid, seen.boxes[:1])  # (N, C, R, R)
    C, D = stage.interaction.hidden_dim, stage.interaction.dynamic_dim
    kernels = stage.interaction.linear1(feats)[:, : C * D].view(-1, C, D)
    responses = torch.einsum("ncrs,ncd->nrsd", regions, kernels)
    responses = stage.interaction.norm1(responses).relu().flatten(1, 2).mT  # (N, D, R·R)
    torch.testing.assert_close(seen.responses[0], responses, atol=1e-4, rtol=1e-4)


class MeanKernels(nn.Module):
    """linear1 of the mean feature, which is the mean of what linear1 gives."""

    def __init__(self, linear1: nn.Module):
        super().__init__()
        self.linear1 = linear1

    def forward(self, feats: Tensor) -> Tensor:
        return self.linear1(feats.mean(0)).expand(len(feats), -1)


@torch.inference_mode()
@pytest.mark.parametrize("name", explore.WHAT_IFS)
def test_what_ifs(blood: SimpleNamespace, name: str) -> None:
    """Against stages that are run one by one, on a model whose weights are changed instead."""
    model = copy.deepcopy(blood.model)
    boxes_px, feats = model.initial_boxes_px(blood.whwh_px), model.proposal_feats[None]
    if name == "every box starts as the whole image":
        boxes_px = (blood.whwh_px * torch.tensor([0, 0, 1, 1]))[:, None].expand_as(boxes_px)
    elif name == "one feature for all":
        feats = feats.mean(1, keepdim=True).expand_as(feats)
    first = feats
    for i, stage in enumerate(model.head.stages):
        if name == "no self-attention":
            nn.init.zeros_(stage.self_attn.out_proj.weight)
            nn.init.zeros_(stage.self_attn.out_proj.bias)
        elif name == "one pair of kernels for all":
            stage.interaction.linear1 = MeanKernels(stage.interaction.linear1)
        elif name == "features reset at each stage":
            feats = first
        logits, boxes_px, feats = stage(model.head.pooler(blood.pyramid, boxes_px), boxes_px, feats)
        seen = run(blood, explore.WHAT_IFS[name])
        torch.testing.assert_close(seen.boxes[i + 1], boxes_px[0], atol=0.02, rtol=1e-4)
        torch.testing.assert_close(seen.scores[i], logits[0].sigmoid(), atol=1e-4, rtol=0)
    assert not torch.allclose(seen.scores, run(blood).scores, atol=0.1)


@torch.inference_mode()
def test_a_removed_proposal_might_as_well_not_exist(blood: SimpleNamespace) -> None:
    seen = run(blood, partial(explore.without, proposal=14))
    model, others = copy.deepcopy(blood.model), torch.arange(50) != 14
    boxes_px = model.initial_boxes_px(blood.whwh_px)[:, others]
    logits, boxes_px = model.head(blood.pyramid, boxes_px, model.proposal_feats[None, others])
    torch.testing.assert_close(seen.boxes[1:, others], boxes_px[:, 0], atol=0.02, rtol=1e-4)
    torch.testing.assert_close(seen.scores[:, others], logits[:, 0].sigmoid(), atol=1e-4, rtol=0)


# --- what is in the page ---


@torch.inference_mode()
def test_the_page_has_what_the_model_does(blood: SimpleNamespace) -> None:
    data, trained = decode(blood.html.read_text()), run(blood)
    packed = data["runs"][0]
    assert np.abs(packed["boxes"] - trained.boxes.numpy()).max() <= 1 / 16 + 1e-4
    assert np.abs(packed["scores"] - trained.scores.amax(-1).numpy()).max() < 0.003
    assert (packed["labels"] == trained.scores.argmax(-1).numpy()).all()
    attention = trained.attention[:, packed["detailed"]].numpy()
    assert np.abs(packed["attention"] - attention).max() < 0.003
    responses = (trained.responses / trained.responses.max())[:, packed["detailed"]].numpy()
    assert np.abs(packed["responses"] - responses).max() < 0.02
    for name, what_if in zip(data["runs"][1:], explore.WHAT_IFS.values(), strict=True):
        scores = run(blood, what_if).scores.amax(-1)
        assert np.abs(name["scores"] - scores.numpy()).max() < 0.003
        assert set(torch.nonzero(scores[-1] >= 0.3).flatten().tolist()) <= set(name["detailed"])

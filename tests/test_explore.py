"""The pages to play with: they show what the code does, in Python and in a real browser."""

import copy
import json
import re
import shutil
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
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision import tv_tensors

import explore
from data import eval_transforms
from matcher import HungarianMatcher
from model import build_model, load_model
from support.cli import run_main
from support.pictures import to_image

PHOTO, WEIGHTS = ROOT / "assets/blood/BloodImage_00017.jpg", ROOT / "assets/blood.pt"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
close = partial(torch.testing.assert_close, rtol=0)


@pytest.fixture(scope="module")
@torch.inference_mode()
def blood(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A page that the command made, and the runs that it should tell of."""
    html = tmp_path_factory.mktemp("explore") / "page.html"
    flags = ["--weights", WEIGHTS, "--annotations", PHOTO.parent / "val.json", "--output", html]
    explore.main([str(PHOTO), *map(str, flags)])
    model, checkpoint = load_model(WEIGHTS)
    image = eval_transforms(checkpoint["config"])(tv_tensors.Image(to_image(PHOTO)))
    batch, whwh_px = model.prepare([image.as_subclass(Tensor)])
    pyramid = model.backbone(batch)
    run = partial(explore.run_head, model, pyramid, whwh_px)
    runs = [run(), *(run(what_if) for what_if in explore.WHAT_IFS.values())]
    return SimpleNamespace(**locals())


@torch.inference_mode()
def test_looking_changes_nothing(blood: SimpleNamespace) -> None:
    seen, expected = blood.runs[0], blood.model.stages([blood.image.as_subclass(Tensor)])
    assert torch.equal(seen.boxes[1:], expected.boxes[:, 0])
    assert torch.equal(seen.scores, expected.logits[:, 0].sigmoid())

    # Attention and responses of stage 1, by hand.
    stage, feats = blood.model.head.stages[0], blood.model.proposal_feats  # (N, C)
    layer = stage.self_attn
    qkv = feats @ layer.in_proj_weight.T + layer.in_proj_bias
    q, k, _ = qkv.view(len(feats), 3, layer.num_heads, -1).permute(1, 2, 0, 3)
    close(seen.attention[0], (q @ k.mT / layer.head_dim**0.5).softmax(-1).mean(0), atol=1e-5)
    feats = stage.attn_norm(feats + layer(*3 * [feats[None]])[0][0])
    regions = blood.model.head.pooler(blood.pyramid, seen.boxes[:1])  # (N, C, R, R)
    kernels = stage.interaction.linear1(feats).chunk(2, dim=1)[0].view(*regions.shape[:2], -1)
    responses = stage.interaction.norm1(torch.einsum("ncrs,ncd->nrsd", regions, kernels))
    close(seen.responses[0], responses.relu().flatten(1, 2).mT, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", [*explore.WHAT_IFS, "without 14"])
def test_what_ifs(blood: SimpleNamespace, name: str) -> None:
    """Against stages that are called one by one, of a model whose layers are replaced instead."""
    seen = blood.run(explore.WHAT_IFS.get(name, partial(explore.without, proposal=14)))
    model, left = copy.deepcopy(blood.model), torch.ones(50, dtype=torch.bool)
    boxes_px, feats = model.initial_boxes_px(blood.whwh_px), model.proposal_feats[None]
    if name == "every box starts as the whole image":
        boxes_px = (blood.whwh_px * torch.tensor([0, 0, 1, 1]))[:, None].expand_as(boxes_px)
    elif name == "one feature for all":
        feats = feats.mean(1, keepdim=True).expand_as(feats)
    elif name == "without 14":
        left[14] = False  # here it does not even exist
        boxes_px, feats = boxes_px[:, left], feats[:, left]
    first = feats
    for i, stage in enumerate(model.head.stages):
        if name == "no self-attention":
            stage.self_attn.out_proj.weight.zero_(), stage.self_attn.out_proj.bias.zero_()
        elif name == "one pair of kernels for all":  # what linear1 makes of the mean feature
            linear1 = stage.interaction.linear1.forward
            stage.interaction.linear1.forward = lambda x, f=linear1: f(x.mean(0)).expand(len(x), -1)
        feats = first if name == "features reset at each stage" else feats
        logits, boxes_px, feats = stage(model.head.pooler(blood.pyramid, boxes_px), boxes_px, feats)
        close(seen.boxes[i + 1, left], boxes_px[0], atol=0.05)
        close(seen.scores[i, left], logits[0].sigmoid(), atol=1e-3)
    assert (seen.scores - blood.runs[0].scores).abs().max() > 0.1


def test_sizes() -> None:
    """The example is of this page; of many proposals, classes and outputs only some are shown."""
    example = (ROOT / "assets/explore.html").read_text()
    before, after = explore.TEMPLATE.read_text().split('"DATA"')
    assert example.startswith(before) and example.endswith(after) and len(example) < 600_000

    sizes = {"num_proposals": 100, "num_classes": 80, "dynamic_dim": 64, "roi_size": 7}
    model = build_model(replace(TINY, num_stages=6, **sizes)).eval()
    text = explore.page(model, torch.rand(3, 96, 128), [str(k) for k in range(80)])
    data = json.loads(text[len(before) : -len(after)])
    assert len(text) < 2e6 and len(data["removals"]) == 16
    assert data["runs"][0]["responses"][2] == [6, 100, 8, 49]


def test_refusals(tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(PHOTO.parent, tmp_path, dirs_exist_ok=True)
    shutil.copy(PHOTO, tmp_path / "other.jpg")
    for flags, reason in (
        ("--weights model.onnx", "ONNX"),
        (f"--weights {WEIGHTS} --output {explore.TEMPLATE}", "template"),
        (f"--weights {WEIGHTS} --annotations {tmp_path}/val.json", "does not list"),
    ):
        command = [str(tmp_path / "other.jpg"), *flags.split()]
        assert run_main(partial(explore.main, command), "explore.py") == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


# --- in a browser ---


@pytest.fixture(scope="module")
def visit() -> Iterator[Any]:
    """Opens a file without a network; errors in the browser's console fail the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    complaints: list[str] = []
    with playwright.sync_playwright() as manager:
        chromium = manager.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = chromium.new_context(offline=True)
        context.on("console", lambda message: complaints.append(message.text))
        context.on("weberror", lambda error: complaints.append(str(error.error)))

        def open_page(path: Path, width: int = 1200) -> Any:
            page = context.new_page()
            page.set_viewport_size({"width": width, "height": 860})
            page.goto(path.as_uri())
            return page

        yield open_page
    assert complaints == []


def drawn(page: Any, n: int) -> Tensor:
    """Where a proposal's box is on the screen once it rests, in pixels of the model's image."""
    page.wait_for_function("document.getAnimations().length === 0")
    photo, box = (page.locator(what).bounding_box() for what in ("#photo", f".box >> nth={n}"))
    x1, y1 = box["x"] - photo["x"], box["y"] - photo["y"]
    corners = torch.tensor([x1, y1, x1 + box["width"], y1 + box["height"]])
    return corners * page.evaluate("explore.data.size[0]") / photo["width"]


def test_the_page_shows_what_the_model_does(visit: Any, blood: SimpleNamespace) -> None:
    page, trained = visit(blood.html), blood.runs[0]
    n = page.evaluate("explore.state.pinned")
    assert f"Proposal {n} has found an object" in page.inner_text("#guide")
    page.keyboard.press("ArrowLeft")
    close(drawn(page, n), trained.boxes[5, n], atol=0.2)
    page.fill("#stage", "0")
    close(drawn(page, n), trained.boxes[0, n], atol=0.2)
    page.click("#play")
    page.wait_for_function("explore.state.stage === 6 && explore.state.timer === null")

    for button, seen in zip(page.locator("#runs button").all(), blood.runs, strict=True):
        button.click()
        close(drawn(page, n), seen.boxes[6, n], atol=0.2)
        shown = float(page.inner_text("#scores").split()[1])
        assert shown == pytest.approx(seen.scores[5, n].max().item(), abs=0.006)
        for threshold in (0.25, 0.4):
            page.fill("#threshold", str(threshold))
            count = int((seen.scores[5].amax(-1) >= threshold).sum())
            assert f"\n{count} boxes" in button.inner_text()

    page.click("#remove")
    heir = page.evaluate("explore.state.pinned")
    seen = blood.run(partial(explore.without, proposal=n))
    assert trained.scores[5, heir].max() < 0.4 < seen.scores[5, heir].max()
    assert f"{heir} takes its object" in page.inner_text("#guide")
    close(drawn(page, heir), seen.boxes[6, heir], atol=0.2)
    page.click("#remove")
    assert page.input_value("#pick") == str(n)

    n, other = trained.scores[5].amax(-1).argsort(descending=True)[:2].tolist()
    page.select_option("#pick", str(n))
    page.locator(".box").nth(other).hover(force=True)
    assert page.input_value("#pick") == str(other)
    page.mouse.move(5, 5)
    assert page.input_value("#pick") == str(n)
    page.locator(".box").nth(other).click(force=True)
    page.mouse.move(5, 5)
    assert page.input_value("#pick") == str(other)

    page.select_option("#pick", str(n))
    page.click("#path button:nth-child(4)")  # stage 3
    weight, most = trained.attention[2, n].max(0)
    first = page.inner_text("#bars button:first-child")
    assert first.startswith(f"{most}: ") and f"{100 * weight:.0f} %" in first
    assert page.locator(".box").nth(int(most)).get_attribute("class") == "box lit"
    page.click("#maps button:nth-child(8)")
    shown = page.evaluate("[...overlay.getContext('2d').getImageData(0, 0, 5, 5).data]")
    expected = trained.responses[2, n, 7] / trained.responses.max()  # (R·R,)
    close(torch.tensor(shown[3::4]) / 255, expected, atol=0.03)


def test_other_checkpoints_phones_and_frames(visit: Any, blood: Any, tmp_path: Path) -> None:
    for S, N, K, R, D in [(2, 7, 3, 3, 4), (1, 1, 1, 2, 20), (2, 70, 9, 1, 4)]:
        sizes = {"num_stages": S, "num_proposals": N, "num_classes": K, "roi_size": R}
        model = build_model(replace(TINY, dynamic_dim=D, **sizes)).eval()
        names = [f"</script><!--{k}" for k in range(K)]
        (tmp_path / "page.html").write_text(explore.page(model, torch.rand(3, 48, 64), names))
        page = visit(tmp_path / "page.html")
        assert "ends with no object" in page.inner_text("#guide")
        for button in page.locator("#maps button:last-child, #runs button, #remove").all()[::-1]:
            button.click()

    page = visit(blood.html, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    frame = f'<iframe width=1000 height=700 srcdoc="{escape(blood.html.read_text())}"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    inside = visit(tmp_path / "frame.html").frames[1]
    assert inside.evaluate("document.documentElement.scrollWidth") <= 1000
    assert inside.locator("#play").bounding_box()["y"] < 700


# --- the toy of notebook 4 ---


@pytest.fixture(scope="module")
def toy(visit: Any) -> Any:
    return visit(ROOT / "notebooks/matching.html")


def test_the_toy_assigns_as_scipy_does(toy: Any) -> None:
    for cost in np.random.default_rng(0).normal(size=(50, 3, 4)).round(3):
        best = cost[linear_sum_assignment(cost)].sum()
        assert toy.evaluate("c => total(c, hungarian(c))", cost.tolist()) == pytest.approx(best)
        assert toy.evaluate("c => total(c, greedy(c))", cost.tolist()) >= best - 1e-9


def test_the_toy_shows_the_cost_of_the_matcher_for_the_boxes_that_were_dragged(toy: Any) -> None:
    assert "Greedy takes" in toy.inner_text("#verdict")
    box = toy.locator('[aria-label="proposal 0"]').bounding_box()
    x, y = box["x"] + box["width"] - 8, box["y"] + 30
    toy.mouse.move(x, y)
    toy.mouse.down()
    toy.mouse.move(x + 70, y + 20, steps=4)
    toy.mouse.up()
    toy.locator('[aria-label="proposal 1"]').press("ArrowRight")
    toy.locator("#score1").fill("0.3")
    assert "Both find" in toy.inner_text("#verdict")

    state = toy.evaluate("state")
    assert state["proposals"][0][0] > 40 and state["proposals"][1][0] == 13
    target = {"boxes": torch.tensor(state["objects"]).float(), "labels": torch.tensor([0, 0])}
    logits = torch.tensor(state["scores"]).logit()[None, None, :, None]
    boxes_px = torch.tensor(state["proposals"])[None, None]
    cost = HungarianMatcher().cost(logits, boxes_px, [target], torch.tensor([[96.0, 72, 96, 72]]))
    cells = toy.locator("#matrix td").all_inner_texts()
    shown = [re.search(r"−?\d+\.\d\d", cell)[0].replace("−", "-") for cell in cells]
    np.testing.assert_allclose(np.array(shown, float), cost.flatten(), atol=0.006)

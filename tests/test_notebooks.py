"""The committed notebooks ran in order, without errors; `make check-notebooks` executes them.

The toy of notebook 4 is tried in a real browser, if there is one.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from matcher import HungarianMatcher

FOLDER = Path(__file__).parents[1] / "notebooks"
# A path from the root of somebody's machine; in URLs and in `../assets` something precedes the /.
MACHINE_PATH = re.compile(
    r"(?<![\w.~\-/])/(work|tmp|home|root|Users|usr|opt|var|mnt|content)\b|\b[A-Z]:\\\\"
)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_a_notebook_is_committed_with_sound_outputs(number: str) -> None:
    [path] = FOLDER.glob(f"{number}_*.ipynb")
    assert path.stat().st_size <= 1.5e6
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))

    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    assert not [text for text in texts if MACHINE_PATH.search(text)]

    # A picture comes early: it is on the first screen, with what is above it.
    shows = ["image/png" in str(cell.get("outputs")) for cell in notebook.cells]
    above = notebook.cells[: shows.index(True) + 1]
    assert sum(len(cell.source.splitlines()) for cell in above) <= 36


# --- the toy ---


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    """`matching.html`, opened from disk; the test fails on any error of the page."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("there is no Chromium")
    errors = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.context.set_offline(True)
        page.on("pageerror", lambda error: errors.append(error))
        page.on("console", lambda message: errors.append(message.text))
        page.goto((FOLDER / "matching.html").as_uri())
        yield page
        browser.close()
    assert errors == []


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

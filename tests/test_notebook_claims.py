"""What the notebooks say agrees with what their committed outputs print.

Whoever executes the notebooks anew, on another machine or with other versions, sees here which
sentences have to change. Rows of numbers are read from the printed text.
"""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


@cache
def printed(number: str) -> str:
    """All that a notebook's cells print."""
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    code = (cell for cell in nbformat.read(path, as_version=4).cells if "outputs" in cell)
    outputs = [output for cell in code for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def numbers(number: str, start: str) -> list[float]:
    """The numbers after `start`, a regular expression, on the one line that it begins."""
    lines = re.findall(rf"^ *{start}(.*)$", printed(number), re.MULTILINE)
    assert len(lines) == 1, (start, lines)
    return [float(text) for text in re.findall(r"(?<![\w.-])-?\d+\.?\d*", lines[0])]


def test_1_nms_is_needed_by_the_dense_detector_only() -> None:
    for data in ("blood", "shapes"):
        dense, sparse = (
            numbers("01", rf"{data}, \d+ images +{kind} +") for kind in ("dense", "Sparse R-CNN")
        )
        assert dense[-1] < max(dense) - 10 and sparse[-1] >= max(sparse[:-1])


def test_2_boxes_settle_and_small_moves_matter_more_than_late_scores() -> None:
    ious, aps = numbers("02", "mean IoU.*6:"), numbers("02", "AP, stage 1 … 6:")
    assert ious[0] < 0.2 and ious[2] > 0.9 and ious[-1] - ious[2] < 0.05
    assert aps[0] < 40 < 85 < aps[1] < aps[-1]
    last = "AP, last (boxes with the scores|scores with the boxes) of stage 2: (.*)"
    late_boxes, late_scores = (float(ap) for _, ap in re.findall(last, printed("02")))
    assert late_boxes > late_scores
    reused, reset = numbers("02", "AP, features reused:"), numbers("02", "AP, features reset: ")
    assert reset[0] == reused[0] and reset[-1] < 10 < 90 < reused[-1]


def test_2_rivals_give_up_when_they_see_the_winner() -> None:
    rivals, bystanders = numbers("02", "rival → winner"), numbers("02", "bystander → winner")
    assert all(a > b for a, b in zip(rivals[1:], bystanders[1:], strict=True))
    names = ("as trained", "winner hidden from its rivals", "another hidden from them", "everybody")
    trained, hidden, control, everybody = (numbers("02", name) for name in names)
    assert hidden[2] > 0.5 > 0.05 > max(trained[2], control[2])
    assert everybody[3] > hidden[3] > trained[3]


def test_3_neither_kernels_nor_features_are_enough() -> None:
    as_trained = numbers("03", "as trained, learned boxes")[0]
    own, feature, kernels, neither = (
        numbers("03", f"{kernels} kernels, {feature} feature")[0]
        for kernels in ("own", "same")
        for feature in ("own", "same")
    )
    assert as_trained > own > 85
    assert max(kernels, feature) < 60 and neither < 5 < min(kernels, feature)


def test_3_kernels_say_who_found_something_and_then_what() -> None:
    same, other = (numbers("03", f"other proposal, {kind} class") for kind in ("same", "other"))
    assert same[1] == pytest.approx(other[1], abs=0.05) and same[1] > 0.5
    assert same[-1] > other[-1] + 0.1


def test_4_one_to_many_makes_duplicates_that_nms_has_to_remove() -> None:
    for start in ("trained", "random head"):
        one, many = (numbers("04", f"one to {kind}, {start}") for kind in ("one", "many"))
        assert many[2] > 5 * one[2] and many[3] / many[2] < one[3] / one[2]  # at 0.3 and at 0.05
        assert many[1] - many[0] > one[1] - one[0]


def test_5_a_start_from_weights_helps_and_boxes_are_loose() -> None:
    weights, scratch = numbers("05", "from weights"), numbers("05", "from scratch ")
    assert weights[0] > scratch[0] and weights[2] > scratch[2]
    assert weights[1] > 1.4 * weights[0] and scratch[1] > 1.4 * scratch[0]

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
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def numbers(number: str, start: str) -> list[float]:
    """The numbers after `start`, a regular expression, on the one line that it begins."""
    lines = re.findall(rf"^ *{start}(.*)$", printed(number), re.MULTILINE)
    assert len(lines) == 1, (start, lines)
    return [float(text) for text in re.findall(r"(?<![\w.-])-?\d+\.?\d*", lines[0])]


def test_2_boxes_settle_and_ap_rises() -> None:
    ious, aps = numbers("02", "mean IoU.*6:"), numbers("02", "AP, stage 1 … 6:")[:6]
    assert ious[0] < 0.2 and ious[2] > 0.9 and ious[-1] - ious[2] < 0.05
    assert aps[0] < 40 < 85 < aps[1] < aps[-1] and aps[-1] > 95


def test_2_small_moves_matter_more_than_late_scores() -> None:
    (late_boxes,) = numbers("02", "AP, last boxes with the scores of stage 2:")
    (late_scores,) = numbers("02", "AP, last scores with the boxes of stage 2:")
    assert late_boxes > late_scores


def test_2_without_feature_reuse_ap_falls() -> None:
    reused, reset = numbers("02", "AP, features reused:"), numbers("02", "AP, features reset: ")
    assert reset[0] == reused[0] and reset[-1] < 10 < 90 < reused[-1]


def test_3_neither_kernels_nor_features_are_enough() -> None:
    found = {
        name: numbers("03", f"{name}  ")[1]
        for name in (
            "As trained, learned boxes",
            "Own kernels, own feature",
            "Same kernels, own feature",
            "Own kernels, same feature",
            "Same kernels, same feature",
        )
    }
    as_trained, own, kernels, feature, neither = found.values()
    assert as_trained > own > 85
    assert max(kernels, feature) < 60 and neither < 5 < min(kernels, feature)


def test_3_kernels_say_who_found_something_and_then_what() -> None:
    same, other = (numbers("03", f"other proposal, {kind} class") for kind in ("same", "other"))
    assert abs(same[0]) < 0.05 and abs(other[0]) < 0.05
    assert same[1] == pytest.approx(other[1], abs=0.05) and same[1] > 0.5
    assert same[-1] > other[-1] + 0.1
    assert numbers("03", "same proposal, same class")[-1] == pytest.approx(same[-1], abs=0.05)


def test_5_a_start_from_weights_helps_and_ap50_is_never_below_ap() -> None:
    shapes, scratch = numbers("05", r"from shapes\.pt"), numbers("05", "from scratch ")
    for ap, ap50 in (shapes[:2], shapes[2:], scratch[:2], scratch[2:]):
        assert ap50 >= ap
    assert shapes[0] > scratch[0] and shapes[2] > scratch[2]


def test_2_rivals_give_up_when_they_see_the_winner() -> None:
    rivals, bystanders = numbers("02", "rival → winner"), numbers("02", "bystander → winner")
    assert all(a > b for a, b in zip(rivals[1:], bystanders[1:], strict=True))
    duplicates = {
        name: numbers("02", rf"{name} +AP [\d.]+, duplicates [\d.]+ at ≥ 0.05,")[0]
        for name in ("as trained", "winner hidden from its rivals", "another hidden from them")
    }
    trained, hidden, control = duplicates.values()
    assert hidden > 0.5 > 0.05 > max(trained, control)


def test_2_proposals_learn_places() -> None:
    spread, shuffled, over_images, over_proposals = numbers("02", "Step 300: spread")[:4]
    assert spread < 0.6 * shuffled and over_images < 0.1 * over_proposals


def test_4_one_to_many_makes_duplicates_that_nms_has_to_remove() -> None:
    for start in ("trained", "random head"):
        one = numbers("04", f"one to one, {start}")[1:4]  # AP, with NMS, boxes too many per image
        many = numbers("04", f"one to many, {start}")[1:4]
        assert many[2] > 5 * one[2]
        assert many[1] - many[0] > one[1] - one[0]
    ap, with_nms, duplicates = numbers("04", "one to one, trained")[1:4]
    assert ap > 90 and with_nms <= ap and duplicates < 0.1


def test_4_settled_proposals_stay_with_their_objects() -> None:
    for data in ("Shapes", "blood cells"):
        shares = re.findall(
            rf"trained on {data} .*?((?:[\d.]+ % *)+)$", printed("04"), re.MULTILINE
        )
        changes = [float(text) for text in re.findall(r"[\d.]+", shares[0])]
        assert changes[0] > 5 and changes[-2:] == [0, 0]


def test_1_nms_is_needed_by_the_dense_detector_only() -> None:
    for data in ("blood", "shapes"):
        dense, sparse = (
            numbers("01", rf"{data}, \d+ images +{kind} +") for kind in ("dense", "Sparse R-CNN")
        )
        assert len(dense) == len(sparse) == 5  # four thresholds of NMS, then without
        assert dense[-1] < max(dense) - 10
        assert sparse[-1] >= max(sparse[:-1])


def test_1_only_the_work_of_sparse_r_cnn_stays_the_same() -> None:
    first, last = numbers("01", "Sparse R-CNN: +(?=[0-9.]+ …)")
    assert first == last
    smallest, largest = numbers("01", "RetinaNet: +(?=[0-9.]+ …)")
    assert largest > 5 * smallest

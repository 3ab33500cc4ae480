"""COCO's JSON: mistakes are named, classes and files are matched, doubtful boxes give a warning."""

import json
import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from support import coco_json
from support.errors import UserError

# Ids in no order. The third box goes beyond its image; the fourth is a crowd.
VALID = """{
"images": [
    {"id": 30, "file_name": "a.png", "width": 64, "height": 48},
    {"id": -4, "file_name": "b.png", "width": 64, "height": 48},
    {"id": 10, "file_name": "c.png", "width": 60, "height": 48}],
"categories": [{"id": 1000, "name": "owl"}, {"id": -3, "name": "cat"}, {"id": 7, "name": "bee"}],
"annotations": [
    {"id": 11, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10]},
    {"id": 12, "image_id": 30, "category_id": 1000, "bbox": [1.5, 2.25, 10, 20]},
    {"id": 13, "image_id": 10, "category_id": -3, "bbox": [-10, 40, 30, 50]},
    {"id": 14, "image_id": 10, "category_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 1}]
}"""
Reader = Callable[..., coco_json.CocoFile]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    def write_and_read(text: str = VALID, encoding: str = "utf-8") -> coco_json.CocoFile:
        (tmp_path / "labels.json").write_text(text, encoding=encoding)
        return coco_json.read_coco(str(tmp_path / "labels.json"))

    return write_and_read


# --- records ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_python_reads_is_read(read: Reader, encoding: str) -> None:
    expected = read()
    assert [category.name for category in expected.categories] == ["owl", "cat", "bee"]
    assert expected.annotations[1].bbox == (1.5, 2.25, 10, 20)
    unusual = VALID.replace('"width": 60', '"width": 60.0, "license": null')
    unusual = unusual.replace('"id": 11,', '"id": 11, "iscrowd": 0.0, "segmentation": [[NaN]],')
    assert read(unusual, encoding) == expected


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"images"', '"pictures"', "required field `images`"),
        ('"file_name": "b.png", ', "", "`file_name` - at `$.images[1]`"),
        ('"width": 60', '"width": 0', ">= 1 - at `$.images[2].width`"),
        ('"id": 30', '"id": "a"', "got `str` - at `$.images[0].id`"),
        ('"id": 30', '"id": 10', "2 images have the id 10"),
        ('"id": 1000', '"id": 7', "2 categories have the id 7"),
        ('"cat"', "9", "Expected `str`, got `int` - at `$.categories[1].name`"),
        (', "bbox": [5, 6, 20, 10]', "", "`bbox` - at `$.annotations[0]`"),
        ("5, 6, 20, 10", "5, 6, 20", "length 4, got 3 - at `$.annotations[0].bbox`"),
        ("5, 6, 20, 10", "5, 6, 20, NaN", "bbox is not finite - at `$.annotations[0]`"),
        ('"iscrowd": 1', '"iscrowd": 2', "`int` <= 1 - at `$.annotations[3].iscrowd`"),
        ('"image_id": 10', '"image_id": 11', "`$.annotations[0]`, the first of 3: Annotation(im"),
        ('"category_id": -3', '"category_id": 0', "`$.annotations[2]`, the first of 1: Annot"),
        (VALID, '[{"image_id": 1, "score": 0.5}]', "Expected `object`, got `array`"),
        (VALID, "", "empty"),
        (VALID, "[" * 100_000, "recursion"),
    ],
)
def test_mistakes_are_refused_in_one_line(read: Reader, old: str, new: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        coco_json.pack_objects("labels.json", read(VALID.replace(old, new)))
    message = str(caught.value)
    assert "labels.json: " in message and words in message and "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"{path}: cannot be read \({reason}"):
            coco_json.read_coco(str(path))


# --- classes and files ---


def classes(coco: coco_json.CocoFile, *expected: str, **options: bool) -> tuple:
    names, ids, notes = coco_json.find_classes("a.json", coco, expected or None, **options)
    return names, ids, " ".join(notes)


def test_own_classes_are_ordered_by_id(read: Reader) -> None:
    assert classes(read()) == (("cat", "bee", "owl"), (-3, 7, 1000), "")
    # COCO's "person" is its own supercategory. It is a class, with or without annotations.
    more = VALID.replace('[{"id": 1', '[{"id": 0, "name": "elk", "supercategory": "elk"}, {"id": 1')
    note = "a.json: no annotations of ['elk'], which cannot be learned"
    assert classes(read(more)) == (("cat", "elk", "bee", "owl"), (-3, 0, 7, 1000), note)


@pytest.mark.parametrize("project", ["birds", "owl"])
def test_roboflows_category_of_the_project_is_no_class(read: Reader, project: str) -> None:
    group = f'[{{"id": 0, "name": "{project}"}}, {{"supercategory": "{project}", "id": 1'
    coco = read(VALID.replace('[{"id": 1', group))
    expected = ("cat", "bee", "owl"), (-3, 7, 1000)
    note = f"a.json: ignored category 0, '{project}': it is unused"
    assert classes(coco) == classes(coco, "cat", "bee", "owl") == (*expected, note)
    # A model may have learned it as a class. With annotations it is one.
    if project == "birds":
        assert classes(coco, "birds", "cat", "bee", "owl")[1] == (0, -3, 7, 1000)
    coco.annotations[0].category_id = 0
    if project == "birds":
        assert classes(coco)[0] == ("cat", "birds", "bee", "owl")
    else:
        with pytest.raises(UserError, match="categories 0 and 1000 are both named 'owl'"):
            classes(coco)


def test_classes_are_matched_by_name(read: Reader) -> None:
    coco = read(VALID.replace('"cat"', unicodedata.normalize("NFD", '"kät"')))
    assert classes(coco, "owl", "kät", "bee") == (("owl", "kät", "bee"), (1000, -3, 7), "")
    with pytest.raises(UserError, match=r"missing \['elk'\], new \['bee'\].*--ignore-new-classes"):
        classes(coco, "elk", "owl", "kät", allow_missing=True)
    with pytest.raises(UserError, match=r"missing \['elk'\], new \['bee'\]\); rename"):
        classes(coco, "elk", "owl", "kät", ignore_new=True)
    for ignore_new in (False, True):  # none in common, so nothing would be left
        with pytest.raises(UserError, match=r"missing \['elk'\], new .*\); rename [^-]*$"):
            classes(coco, "elk", allow_missing=True, ignore_new=ignore_new)
    names, ids, notes = classes(coco, "elk", "owl", "kät", allow_missing=True, ignore_new=True)
    assert names == ("elk", "owl", "kät") and ids == (None, 1000, -3)
    assert "ignored ['bee'], new to the model, and 2 annotations" in notes
    assert "lacks 1 of the 3 classes: 'elk'; AP" in notes


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_files_are_found_with_backslashes_and_in_any_unicode_form(
    tmp_path: Path, stored: str
) -> None:
    path = tmp_path / unicodedata.normalize(stored, "Müller/ñandú.jpg")
    path.parent.mkdir()
    path.touch()
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "Müller\\ñandú.jpg")
        (found,) = coco_json.find_files(str(tmp_path), [name], "a.json")
        assert (tmp_path / found).samefile(path)
    missing = rf"{tmp_path}: 2 of the 3 image files listed in a\.json are missing.* 'n\\x00o'"
    with pytest.raises(UserError, match=missing):
        coco_json.find_files(str(tmp_path), ["n\0o", found, "../no"], "a.json")
    with pytest.warns(UserWarning, match=r"a\.json: lists .*jpg 2 times"):
        coco_json.find_files(str(tmp_path), [found, f"./{found}"], "a.json")


# --- boxes ---

FORMS = {
    "xywh": (lambda x, y, w, h: (x, y, w, h), None),
    "a little outside": (lambda x, y, w, h: (-4, y, w, h), None),
    "some far outside": (lambda x, y, w, h: (x - 99, y, w, h), "UserWarning: a.json: "),
    "xyxy": (lambda x, y, w, h: (x, y, x + w, y + h), "UserError: a.json: .* leave their images"),
    "resized": (lambda *box: [2 * value for value in box], "UserError: .* leave their images"),
    "shares": (lambda x, y, w, h: (x / 640, y / 480, w / 640, h / 480), "UserError: .* 0 and 1; "),
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_another_form_are_refused_and_doubtful_ones_give_one_warning(form: str) -> None:
    convert, words = FORMS[form]
    rng = np.random.default_rng(0)
    wh = rng.uniform(20, 200, (500, 2))
    xywh = np.hstack([rng.uniform(0, (640, 480) - wh), wh])
    boxes = np.array([convert(*box) for box in xywh])
    said = []
    with warnings.catch_warnings(record=True) as caught:
        try:
            coco_json.check_box_form("a.json", boxes, np.full((500, 2), (640, 480)))
        except UserError as error:
            said.append(f"UserError: {error}")
    said += [f"UserWarning: {warning.message}" for warning in caught]
    assert len(said) == (words is not None) and all(re.match(words, line) for line in said), said


def test_copies_are_counted() -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2, (60, 6))  # rows, labels, boxes
    expected = len(table) - len(set(map(tuple, table.tolist())))
    with pytest.warns(UserWarning, match=f"a.json: {expected} annotations have the image, class"):
        coco_json.warn_of_copies("a.json", table[:, 0], table[:, 1], table[:, 2:].astype("f4"))


# --- evaluation ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": [11, 12, 13]}, None),
        ({"id": [1, 1, 2]}, "annotation ids are missing, repeated, or below 1"),
        ({"id": [0, 1, 2]}, "numbered anew"),
        ({"id": [None, "x", -1]}, "numbered anew"),
        ({"area": [0, 0, 0]}, '3 annotations have an unusable "area"'),
        ({"area": [-1, "400", [400]]}, '3 annotations have an unusable "area"'),
        ({"area": [float("nan"), 1e11, True]}, '3 annotations have an unusable "area"'),
        ({"area": [400, None, 40.5]}, None),
        ({"ignore": [1, 0, True, 1]}, '2 annotations with "ignore": 1 are learned'),
    ],
)
def test_perfect_detections_have_an_ap_of_one(read: Reader, changes: dict, words: str) -> None:
    """Whatever the ids and areas are: pycocotools gives wrong results for most of these."""
    raw = json.loads(VALID)
    for key, values in changes.items():
        for annotation, value in zip(raw["annotations"], values, strict=False):
            annotation[key] = value
    coco = read(json.dumps(raw))
    (crowds, *notes) = coco_json.notes_on_annotations("a.json", coco)
    assert "a.json: 1 annotations are crowds" in crowds
    assert len(notes) == (words is not None) and all(words in note for note in notes)

    truth = coco_json.ground_truth(coco, (1000, 7, None))  # without the cat
    assert len(truth.dataset["annotations"]) == 3 and len(truth.getImgIds()) == 3
    found = [a | {"score": 1.0} for a in truth.dataset["annotations"] if not a["iscrowd"]]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    assert evaluation.stats[0] == pytest.approx(1)  # AP, and of small objects
    assert evaluation.stats[3] == pytest.approx(1) and evaluation.stats[5] == -1

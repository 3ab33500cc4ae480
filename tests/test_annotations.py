"""COCO's JSON: mistakes are named, classes and files are matched, doubtful boxes give a warning."""

import json
import os
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import CocoDataset
from support.annotations import ground_truth, load_tables, match_classes, own_classes
from support.errors import UserError
from support.image_files import find_files

Raw = dict[str, Any]


def valid() -> Raw:
    """Three images, the second without objects; odd category ids; a crowd; a box over the edge."""
    size = {"width": 64, "height": 48}
    return {
        "images": [
            {"id": 30, "file_name": "a.png", **size},
            {"id": -4, "file_name": "b.png", **size},
            {"id": 10, "file_name": "sub/c.png", **size},
        ],
        "categories": [
            {"id": 1000, "name": "owl"},
            {"id": -3, "name": "cat"},
            {"id": 7, "name": "bee"},
        ],
        "annotations": [
            {"id": 11, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10]},
            {"id": 12, "image_id": 30, "category_id": 1000, "bbox": [1.5, 2.25, 10, 20]},
            {"id": 13, "image_id": 10, "category_id": -3, "bbox": [-10, 40, 30, 50]},
            {"id": 14, "image_id": 10, "category_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
    }


def write(folder: Path, raw: Any) -> str:
    file = folder / "labels.json"
    file.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return str(file)


def tables(folder: Path, raw: Raw) -> tuple[str, Raw]:
    file = write(folder, raw)
    return file, load_tables(file)


# --- records ---


def test_what_is_valid_is_read_as_it_is(tmp_path: Path) -> None:
    raw = valid()
    raw["annotations"][0] |= {"iscrowd": True, "extra": [1]}
    raw["annotations"][1]["iscrowd"] = None
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file = tmp_path / "labels.json"
        file.write_text(json.dumps(raw), encoding=encoding)
        assert load_tables(str(file)) == raw


def change(path: str, value: Any) -> Callable[[Raw], None]:
    """Sets raw[a][b][c] for the path "a.b.c"; the value ... deletes it."""

    def apply(raw: Raw) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        node: Any = raw
        for key in parents:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return apply


LISTS = ("images", "categories", "annotations")
KEYS = [
    *[f"images.1.{key}" for key in ("id", "file_name", "width", "height")],
    *[f"categories.2.{key}" for key in ("id", "name")],
    *[f"annotations.1.{key}" for key in ("id", "image_id", "category_id", "bbox")],
]
UNLISTED_IMAGE = 'annotations[2] (id 13)|"image_id" 31 is not listed in "images"'
UNLISTED_CATEGORY = 'annotations[2] (id 13)|"category_id" 0 is not listed in "categories"'
BOX = "annotations[2] (id 13)|4 finite numbers|"

MISTAKES = [
    *[(key, ..., f'[{key.split(".")[1]}]|"{key.split(".")[2]}" is missing') for key in KEYS],
    *[(name, ..., f'no list "{name}"') for name in LISTS],
    *[(name, {}, f'no list "{name}"') for name in LISTS],
    *[(name, [], f'empty|no "{name}"') for name in LISTS[:2]],
    *[(f"{name}.0", 5, f"{name}[0]|5 should be an object") for name in LISTS],
    ("images.1.id", "12", "images[1] (id '12')|\"id\" is '12'|integer"),
    ("images.1.id", 2**63, f"images[1]|{2**63}|integer"),
    ("images.1.id", True, "images[1]|True|integer"),
    ("images.1.width", 64.0, 'images[1] (id -4)|"width" is 64.0'),
    ("images.1.height", 0, 'images[1] (id -4)|"height" is 0'),
    ("images.1.height", None, 'images[1] (id -4)|"height" is None'),
    ("images.1.file_name", 3, 'images[1] (id -4)|"file_name" is 3'),
    ("images.1.file_name", "", "images[1] (id -4)|\"file_name\" is ''"),
    ("images.2.id", 30, 'images[2] (id 30)|same "id"'),
    ("categories.1.id", None, 'categories[1]|"id" is None'),
    ("categories.1.id", 7, 'categories[2] (id 7)|same "id"'),
    ("categories.1.name", 7, 'categories[1] (id -3)|"name" is 7'),
    ("categories.1.name", "\ud800", "categories[1] (id -3)|\"name\" is '\\ud800'"),
    ("annotations.3.id", 11, 'annotations[3] (id 11)|same "id"'),
    ("annotations.3.id", [11], 'annotations[3]|"id" is [11]'),
    ("annotations.2.image_id", 31, UNLISTED_IMAGE),
    ("annotations.2.image_id", "10", "annotations[2] (id 13)|\"image_id\" is '10'"),
    ("annotations.2.category_id", 0, UNLISTED_CATEGORY),
    ("annotations.2.category_id", 7.0, 'annotations[2] (id 13)|"category_id" is 7.0'),
    ("annotations.2.bbox", [1, 2, 3], BOX + "[1, 2, 3]"),
    ("annotations.2.bbox", "1 2 3 4", BOX + "1 2 3 4"),
    ("annotations.2.bbox", [1, 2, "3", 4], BOX + "'3'"),
    ("annotations.2.bbox", [1, 2, float("nan"), 4], BOX + "nan"),
    ("annotations.2.bbox", [float("inf"), 2, 3, 4], BOX + "inf"),
    ("annotations.2.bbox", [1, 2, 3, 10**400], BOX),
    ("annotations.2.bbox", None, BOX + "None"),
    ("annotations.2.iscrowd", "no", "annotations[2] (id 13)|\"iscrowd\" is 'no'"),
    ("annotations.2.iscrowd", 2, 'annotations[2] (id 13)|"iscrowd" is 2'),
]


@pytest.mark.parametrize(
    ("path", "value", "words"), MISTAKES, ids=[f"{m[0]}={str(m[1])[:12]}" for m in MISTAKES]
)
def test_mistakes_in_the_json_are_named(tmp_path: Path, path: str, value: Any, words: str) -> None:
    raw = valid()
    change(path, value)(raw)
    file = write(tmp_path, raw)
    with pytest.raises(UserError) as caught:
        load_tables(file)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(file) and "others" not in message
    for part in words.split("|"):
        assert part in message


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    raw = valid()
    for annotation in raw["annotations"][1:]:
        annotation["image_id"] = 31
    with pytest.raises(UserError, match=r"annotations\[1\] \(id 12\): .*, like 2 others$"):
        load_tables(write(tmp_path, raw))


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"images": [1,]}', "[" * 100_000])
def test_not_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"labels\.json: is not JSON"):
        load_tables(write(tmp_path, text))


def test_detections_are_not_annotations(tmp_path: Path) -> None:
    detections = [{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    with pytest.raises(UserError, match=r"labels\.json: holds no list"):
        load_tables(write(tmp_path, detections))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read \(No such file"):
        load_tables(str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        load_tables(str(tmp_path))


# --- classes ---


def test_own_classes_are_ordered_by_id(tmp_path: Path) -> None:
    classes = own_classes(*tables(tmp_path, valid()))
    assert classes.names == ("cat", "bee", "owl") and classes.category_ids == (-3, 7, 1000)
    assert classes.notes == []


def test_a_name_that_two_categories_with_annotations_share_is_refused(tmp_path: Path) -> None:
    raw = valid()
    raw["categories"][1]["name"] = "bee"
    with pytest.raises(UserError, match=r'categories\[2\] \(id 7\): .*same "name", bee'):
        own_classes(*tables(tmp_path, raw))


def test_names_that_differ_only_in_case_or_spaces_give_a_note(tmp_path: Path) -> None:
    raw = valid()
    raw["categories"] += [{"id": 2000, "name": "Owl"}, {"id": 3000, "name": "owl "}]
    raw["annotations"][0]["category_id"] = 2000
    raw["annotations"][1]["category_id"] = 3000
    classes = own_classes(*tables(tmp_path, raw))
    assert classes.names == ("cat", "bee", "owl", "Owl", "owl ")
    note = "labels.json: the classes 'owl', 'Owl', 'owl ' differ only in case or spaces; rename"
    assert note in classes.notes[0]


@pytest.mark.parametrize("unused", [0, 2000])
def test_a_category_without_annotations_yields_to_one_of_the_same_name(
    tmp_path: Path, unused: int
) -> None:
    """Roboflow's category 0, in a project that is named like its class."""
    raw = valid()
    raw["categories"].append({"id": unused, "name": "bee"})
    classes = own_classes(*tables(tmp_path, raw))
    assert classes.names == ("cat", "bee", "owl") and classes.category_ids == (-3, 7, 1000)
    assert len(classes.notes) == 1
    assert f"labels.json: ignored category {unused}, 'bee': it has no ann" in classes.notes[0]
    matched = match_classes(*tables(tmp_path, raw), expected=("owl", "bee", "cat"))
    assert matched.category_ids == (1000, 7, -3) and len(matched.notes) == 1


def test_if_neither_of_two_categories_has_annotations_the_first_is_the_class(
    tmp_path: Path,
) -> None:
    raw = {**valid(), "annotations": []}
    raw["categories"].append({"id": -9, "name": "bee"})
    assert own_classes(*tables(tmp_path, raw)).category_ids == (-9, -3, 1000)


def test_a_category_that_only_groups_others_is_not_a_class(tmp_path: Path) -> None:
    """Roboflow's category 0 with the name of the project."""
    raw = valid()
    for category in raw["categories"]:
        category["supercategory"] = "animals"
    raw["categories"].append({"id": 0, "name": "animals", "supercategory": "none"})
    classes = own_classes(*tables(tmp_path, raw))
    assert classes.names == ("cat", "bee", "owl")
    assert "ignored category 0, 'animals'" in classes.notes[0] and "super" in classes.notes[0]
    # A model that was trained before it was ignored keeps it.
    known = match_classes(*tables(tmp_path, raw), expected=("cat", "animals", "bee", "owl"))
    assert known.category_ids == (-3, 0, 7, 1000) and known.notes == []
    # With annotations it is a class.
    raw["annotations"][0]["category_id"] = 0
    assert own_classes(*tables(tmp_path, raw)).names == ("cat", "animals", "bee", "owl")


def test_classes_without_annotations_are_kept_and_named(tmp_path: Path) -> None:
    raw = valid()
    # As in COCO, where "person" is the supercategory of itself.
    raw["categories"] += [{"id": k, "name": f"new{k}", "supercategory": "new8"} for k in (8, 9)]
    classes = own_classes(*tables(tmp_path, raw))
    assert classes.names == ("cat", "bee", "new8", "new9", "owl")
    assert classes.notes[0].endswith("2 of 5 classes have no annotations: 'new8', 'new9'")


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    file, content = tables(tmp_path, valid())
    classes = match_classes(file, content, expected=["owl", "cat", "bee"])
    assert classes.names == ("owl", "cat", "bee") and classes.category_ids == (1000, -3, 7)
    assert classes.notes == []


def test_names_in_another_unicode_form_are_the_same_class(tmp_path: Path) -> None:
    raw = valid()
    raw["categories"][1]["name"] = unicodedata.normalize("NFD", "Kätzchen")
    expected = ("owl", unicodedata.normalize("NFC", "Kätzchen"), "bee")
    classes = match_classes(*tables(tmp_path, raw), expected=expected)
    assert classes.names == expected and classes.category_ids == (1000, -3, 7)


@pytest.mark.parametrize("spelling", ["Owl", "owl ", "OWL"])
def test_other_case_or_spaces_are_another_class_and_named(tmp_path: Path, spelling: str) -> None:
    raw = valid()
    raw["categories"][0]["name"] = spelling
    with pytest.raises(UserError, match="spelling of 'owl' differs only in case or spaces; rename"):
        match_classes(*tables(tmp_path, raw), expected=("owl", "cat", "bee"), allow_missing=True)


def test_missing_classes_are_accepted_only_if_allowed(tmp_path: Path) -> None:
    file, content = tables(tmp_path, valid())
    names = ["elk", "owl", "cat", "bee", "yak"]
    with pytest.raises(UserError, match=r"missing \['elk', 'yak'\], new \[\]"):
        match_classes(file, content, names)
    classes = match_classes(file, content, names, allow_missing=True)
    assert classes.names == tuple(names) and classes.category_ids == (None, 1000, -3, 7, None)
    assert "lacks 2 of the 5 classes: 'elk', 'yak'; AP is over the others" in classes.notes[0]
    with pytest.raises(UserError, match="missing .*'elk'.*new .*'owl'"):  # not one in common
        match_classes(file, content, ["elk"], allow_missing=True, ignore_new=True)


def test_new_classes_are_ignored_only_by_the_flag(tmp_path: Path) -> None:
    file, content = tables(tmp_path, valid())
    for allow_missing in (False, True):
        with pytest.raises(UserError, match=r"missing \[\], new \['bee', 'cat'\]") as caught:
            match_classes(file, content, ["owl"], allow_missing)
        assert ("--ignore-new-classes" in str(caught.value)) == allow_missing
    classes = match_classes(file, content, ["owl"], ignore_new=True)
    assert classes.names == ("owl",) and classes.category_ids == (1000,)
    assert "ignored 'cat', 'bee', which the model does" in classes.notes[0]
    assert classes.notes[0].endswith("and 3 annotations")


def test_new_classes_without_annotations_need_no_flag(tmp_path: Path) -> None:
    raw = valid()
    raw["categories"].append({"id": 0, "name": "project"})
    classes = match_classes(*tables(tmp_path, raw), expected=("cat", "bee", "owl"))
    assert classes.category_ids == (-3, 7, 1000)
    assert "ignored 'project', which" in classes.notes[0] and "0 annotations" in classes.notes[0]


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    return tmp_path / "images"


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def test_files_are_found_as_they_are(folder: Path) -> None:
    names = ["a.png", "B.PNG", "sub/c.png", "sub\\d.png", "ü.png", "A.png"]
    make(folder, *names)
    assert find_files(str(folder), names, "labels.json") == (names, [])
    absolute = [str(folder / "a.png")]
    assert find_files(str(folder), absolute, "labels.json") == (absolute, [])


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_files_are_found_in_another_unicode_form(folder: Path, listed: str, stored: str) -> None:
    name = unicodedata.normalize(stored, "Müller/ñandú.jpg")
    (folder / name).parent.mkdir()
    make(folder, name, "other.jpg")
    names = [unicodedata.normalize(listed, name), "other.jpg"]
    found, notes = find_files(str(folder), names, "labels.json")
    assert found == [name, "other.jpg"]
    assert len(notes) == 1 and "1 of 2 file names are spelled differently" in notes[0]
    # Otherwise the note would show the same letters twice.
    assert "M\\xfcller" in notes[0] and "Mu\\u0308ller" in notes[0]


@pytest.mark.parametrize("listed", ["sub\\c.jpg", ".\\sub\\c.jpg", "SUB/C.JPG", "sub/../sub/C.jpg"])
def test_files_are_found_with_backslashes_and_in_other_case(folder: Path, listed: str) -> None:
    make(folder, "sub/c.jpg")
    found, notes = find_files(str(folder), [listed], "labels.json")
    assert os.path.samefile(folder / found[0], folder / "sub/c.jpg") and len(notes) == 1


def test_of_two_similar_files_none_is_guessed(folder: Path) -> None:
    make(folder, "a.jpg", "A.jpg")
    with pytest.raises(UserError, match="first is a.JPG"):
        find_files(str(folder), ["a.JPG"], "labels.json")
    composed, decomposed = (unicodedata.normalize(form, "ü.jpg") for form in ("NFC", "NFD"))
    make(folder, decomposed, decomposed.upper())
    assert find_files(str(folder), [composed], "labels.json")[0] == [decomposed]


@pytest.mark.parametrize(
    ("listed", "stored", "advice"),
    [
        ("images/1.jpg", "1.jpg", "there is .*images/1.jpg: correct the folder, or the names"),
        ("C:\\data\\1.jpg", "1.jpg", "there is .*images/1.jpg"),
        ("/data/upload/1.jpg", "1.jpg", "there is .*images/1.jpg"),
        ("my%20cat.jpg", "my cat.jpg", "there is .*my cat.jpg"),
        ("sub/[1].jpg", "sub/[1].png", r"there is .*\[1\].png"),
        ("1.jpg", "2.jpg", "check the folder"),
        ("1\0.jpg", "2.jpg", "check the folder"),
        ("1\n.jpg", "2.jpg", "check the folder"),
        ("\ud800.jpg", "2.jpg", "check the folder"),
        ("https://example.com/1.jpg", "2.jpg", "check the folder"),
    ],
)
def test_missing_files_are_counted_and_what_is_there_is_named(
    folder: Path, listed: str, stored: str, advice: str
) -> None:
    make(folder, stored, "here.jpg")
    with pytest.raises(UserError, match=advice) as caught:
        find_files(str(folder), [listed, "here.jpg"], "labels.json")
    listed = listed if listed.isprintable() else repr(listed)
    for words in (str(folder), "1 of the 2 image files listed in labels.json", listed):
        assert words in str(caught.value)


def test_a_folder_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(UserError, match="nofolder: there is no such folder"):
        find_files(str(folder / "nofolder"), ["a.png"], "labels.json")


@pytest.mark.parametrize("spelling", ["a.jpg", "A.jpg", "./a.jpg", "../images/a.jpg", "/"])
def test_files_that_are_listed_twice_give_a_warning(folder: Path, spelling: str) -> None:
    make(folder, "a.jpg", "b.jpg")
    names = ["a.jpg", "b.jpg", str(folder / "a.jpg") if spelling == "/" else spelling]
    with pytest.warns(UserWarning, match=r"labels\.json: lists 1 image files more .* a\.jpg"):
        find_files(str(folder), names, "labels.json")


# --- boxes ---


def to_xyxy(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y + h]


def to_centre(x: float, y: float, w: float, h: float) -> list[float]:
    return [x + w / 2, y + h / 2, w, h]


def twice(*box: float) -> list[float]:
    return [2 * value for value in box]


def shares(x: float, y: float, w: float, h: float) -> list[float]:
    return [x / 640, y / 480, w / 640, h / 480]


def percent(*box: float) -> list[float]:
    return [100 * value for value in shares(*box)]


FORMS = {
    "xyxy": (to_xyxy, "would fit as x1, y1, x2, y2;"),
    "centre": (to_centre, "would fit as centre x, centre y, width, height;"),
    "resized": (twice, "images were not resized after"),
    "shares": (shares, "between 0 and 1, as shares of the image"),
    "percent": (percent, "no box value is above 100, as in percent"),
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_another_form_give_one_warning_that_names_it(make_coco, form: str) -> None:
    convert, words = FORMS[form]
    rng = np.random.default_rng(0)

    def edit(coco: Raw) -> None:
        for annotation in coco["annotations"]:
            w, h = rng.uniform(20, 200, 2)
            box = (rng.uniform(0, 640 - w), rng.uniform(0, 480 - h), w, h)
            annotation["bbox"] = [round(value, 4) for value in convert(*box)]

    json_file, folder = make_coco(num_images=12, edit=edit, size=(640, 480))
    with pytest.warns(UserWarning) as caught:
        CocoDataset(json_file, folder)
    messages = [str(w.message) for w in caught if "wholly outside" not in str(w.message)]
    assert len(messages) == 1 and words in messages[0] and str(json_file) in messages[0]


def test_a_single_box_can_be_of_another_form(make_coco) -> None:
    def edit(coco: Raw) -> None:
        coco["annotations"] = [{**coco["annotations"][0], "bbox": [300, 200, 420, 330]}]

    with pytest.warns(UserWarning, match="1 of 1 boxes leave .* x1, y1, x2, y2"):
        CocoDataset(*make_coco(edit=edit, size=(640, 480)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overshoot_px", [0, 8])
def test_ordinary_boxes_give_no_warning(make_coco, seed: int, overshoot_px: float) -> None:
    """Also if people drew one box in twenty a little beyond the edge."""
    rng = np.random.default_rng(seed)

    def edit(coco: Raw) -> None:
        for number, annotation in enumerate(coco["annotations"]):
            w, h = rng.uniform(12, 400, 2)
            x, y = rng.uniform(0, 640 - w), rng.uniform(0, 480 - h)
            if number % 20 == 0:
                x = 640 - w + overshoot_px
            annotation["bbox"] = [x, y, w, h]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoDataset(*make_coco(num_images=50, edit=edit, size=(640, 480)))


def test_copies_of_annotations_are_counted_and_named(make_coco) -> None:
    """Of two equal boxes in one image, of other classes or in other images only one is a copy."""

    def edit(coco: Raw) -> None:
        box = {"image_id": 2, "category_id": 7, "bbox": [1.5, 2, 30, 20]}
        other = {**box, "bbox": [1.5, 2, 30, 21]}
        variants = ({}, {}, {"category_id": -3}, {"image_id": 1}, {"iscrowd": 1}, {})
        rows = [{**box, **variant} for variant in variants] + [other]
        coco["annotations"] = [{"id": 40 + i, **row} for i, row in enumerate(rows)]

    words = r"train\.json: 2 annotations have the image, class and box of .*first ids: 41, 45\)"
    with pytest.warns(UserWarning, match=words) as caught:
        CocoDataset(*make_coco(edit=edit))
    assert len(caught) == 1


# --- crowds and areas ---


def test_crowds_are_counted(make_coco) -> None:
    def edit(coco: Raw) -> None:
        for annotation in coco["annotations"][2:]:
            annotation["iscrowd"] = 1

    dataset = CocoDataset(*make_coco(edit=edit))
    assert dataset.num_crowds == 6 and dataset.objects_per_image.sum() == 2
    assert len(dataset.notes) == 1
    assert "6 of 8 annotations are crowds (iscrowd: 1)" in dataset.notes[0]
    assert "set it to 0" in dataset.notes[0]


@pytest.mark.parametrize("area", [[400], "400", -1, float("nan"), float("inf"), True, {}])
def test_an_area_that_is_not_a_number_is_that_of_the_box(make_coco, area: Any) -> None:
    def edit(coco: Raw) -> None:
        for annotation in coco["annotations"][1:]:
            annotation["area"] = area
        coco["annotations"][1]["area"] = None

    dataset = CocoDataset(*make_coco(edit=edit))
    assert len(dataset.notes) == 1
    assert '6 annotations have an unusable "area", the first one' in dataset.notes[0]
    for annotation in dataset.coco().dataset["annotations"]:
        assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]


def test_ground_truth_keeps_the_classes_alone_and_fills_in_what_is_absent() -> None:
    raw = valid()
    raw["annotations"][1]["area"] = 99.5
    truth = ground_truth(raw, (7, None, 1000))
    assert [category["name"] for category in truth["categories"]] == ["owl", "bee"]
    assert [annotation["id"] for annotation in truth["annotations"]] == [11, 12, 14]
    assert [annotation["area"] for annotation in truth["annotations"]] == [200, 99.5, 2400]
    assert [annotation["iscrowd"] for annotation in truth["annotations"]] == [0, 0, 1]
    assert truth["info"] == {} and len(truth["images"]) == 3

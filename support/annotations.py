"""Annotation files in COCO's format: reading them, and saying what is wrong with them.

`load_tables` refuses a file whose records cannot be used. What can be used, but not as it stands
(a class that another file lacks, a file name in another Unicode form), is resolved with a note;
what can be used and is probably a mistake (boxes that look like another format's) gives a warning.
"""

import contextlib
import gc
import json
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.errors import UserError

Record = dict[str, Any]
Tables = dict[str, list[Record]]


# --- the file ---


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Turns off Python's cyclic garbage collector, which takes half of the time to read a file.

    It finds nothing among a million parsed records, but looks at each of them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@without_gc()
def read_json(file: str) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32.

    Raises:
        UserError: the file cannot be read, or it is not JSON.
    """
    try:
        return json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error}); export the annotations again") from None


def is_id(value: Any) -> bool:
    # To Python, JSON's true is an int as well.
    return type(value) is int and -(2**63) <= value < 2**63


def is_pixel_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def is_text(value: Any) -> bool:
    return type(value) is str and value != ""


def is_name(value: Any) -> bool:
    # JSON can hold halves of characters, "\ud800", which cannot be written into a file.
    return is_text(value) and value.encode(errors="ignore").decode() == value


def is_crowd_flag(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value in (0, 1))


def is_box(value: Any) -> bool:
    # Python's JSON reader accepts NaN and Infinity, which the comparison excludes.
    return (
        type(value) is list
        and len(value) == 4
        and all(type(number) in (int, float) and abs(number) < 1e12 for number in value)
    )


class Field(NamedTuple):
    is_valid: Callable[[Any], bool]
    expected: str  # how the message goes on after "should be"


ID = Field(is_id, "an integer")
TEXT = Field(is_text, "a text")
NAME = Field(is_name, "a text")
PIXELS = Field(is_pixel_count, "a whole number of pixels")
CROWD = Field(is_crowd_flag, "0, 1 or absent")
BOX = Field(is_box, "4 finite numbers x, y, width, height")

# In this order: annotations refer to the ids of images and categories.
FORMAT: dict[str, dict[str, Field]] = {
    "images": {"id": ID, "file_name": TEXT, "width": PIXELS, "height": PIXELS},
    "categories": {"id": ID, "name": NAME},
    "annotations": {"id": ID, "image_id": ID, "category_id": ID, "bbox": BOX, "iscrowd": CROWD},
}
REFERS_TO = {"image_id": "images", "category_id": "categories"}


def load_tables(file: str) -> Tables:
    """The lists "images", "categories" and "annotations" of a file, every record as in `FORMAT`.

    Raises:
        UserError: the file is not like that; the message names the first wrong record.
    """
    raw = read_json(file)
    ids: dict[str, set[int]] = defaultdict(set)
    for name in FORMAT:
        if not isinstance(raw, dict) or not isinstance(raw.get(name), list):
            raise UserError(
                f'{file}: holds no list "{name}"; export the annotations in COCO\'s (instances) '
                "format"
            )
        if not raw[name] and name != "annotations":
            raise UserError(
                f'{file}: the data set is empty, it lists no "{name}"; check that the export '
                "succeeded"
            )

        problems = []
        for row, record in enumerate(raw[name]):
            if problem := _problem(name, record, ids):
                problems.append(f"{_where(name, row, record)}: {problem}")
        if problems:
            others = f", like {len(problems) - 1} others" if len(problems) > 1 else ""
            raise UserError(f"{file}: {problems[0]}; correct or remove the record{others}")
    return raw


def _where(name: str, row: int, record: Any) -> str:
    has_id = isinstance(record, dict) and "id" in record
    return f"{name}[{row}]" + (f" (id {record['id']!r:.40})" if has_id else "")


def _problem(name: str, record: Any, ids: dict[str, set[int]]) -> str | None:
    """What is wrong with a record of the list `name`; adds its id to `ids[name]`."""
    if not isinstance(record, dict):
        return f"{record!r:.60} should be an object"
    for key, field in FORMAT[name].items():
        value = record.get(key)
        if not field.is_valid(value):
            if key not in record:
                return f'"{key}" is missing'
            return f'"{key}" is {value!r:.60} and should be {field.expected}'
        if key in REFERS_TO and value not in ids[REFERS_TO[key]]:
            return f'"{key}" {value} is not listed in "{REFERS_TO[key]}"'
    if record["id"] in ids[name]:
        return f'an earlier record has the same "id", {record["id"]}'
    ids[name].add(record["id"])
    return None


# --- classes ---


class Classes(NamedTuple):
    """The classes of a file; label k stands for the k-th."""

    names: tuple[str, ...]  # K names
    category_ids: tuple[int | None, ...]  # K ids of the file, None for a class that it lacks
    notes: list[str]  # which categories are missing or were ignored


def own_classes(file: str, tables: Tables) -> Classes:
    """The categories of a file as classes, ordered by id.

    Args:
        file: its name, for messages.
        tables: of `load_tables`.

    Raises:
        UserError: two categories with annotations share a name.
    """
    uses = _count_uses(tables)
    categories, notes = _usable_categories(file, tables, uses)
    names = [category["name"] for category in categories]
    spellings = Counter(tuple(_without_case(name)) for name in names)
    alike = [name for name in names if spellings[tuple(_without_case(name))] > 1]
    if alike:
        notes.append(
            f"{file}: the classes {_first(alike)} differ only in case or spaces; rename them if "
            "they are meant to be the same"
        )
    unused = [category["name"] for category in categories if not uses[category["id"]]]
    if 0 < len(unused) < len(names):
        notes.append(
            f"{file}: {len(unused)} of {len(names)} classes have no annotations: {_first(unused)}"
        )
    return Classes(tuple(names), tuple(category["id"] for category in categories), notes)


def match_classes(
    file: str,
    tables: Tables,
    expected: Sequence[str],
    allow_missing: bool = False,
    ignore_new: bool = False,
) -> Classes:
    """Finds the expected classes, those of a model, among the categories of another file, by name.

    Args:
        file: its name, for messages.
        tables: of `load_tables`.
        expected: K names, in the order of the labels.
        allow_missing: accept a file that lacks some of the classes, with a note.
        ignore_new: leave out the annotations of other classes, with a note. Without annotations
            another class is always left out.

    Raises:
        UserError: the classes are not the expected ones, or two with annotations share a name.
    """
    uses = _count_uses(tables)
    categories, notes = _usable_categories(file, tables, uses, expected)
    ids = {_normal(category["name"]): category["id"] for category in categories}
    known = {_normal(name) for name in expected}
    missing = [name for name in expected if _normal(name) not in ids]
    new = [category for category in categories if _normal(category["name"]) not in known]
    num_ignored = sum(uses[category["id"]] for category in new)

    is_refused = num_ignored > 0 and not ignore_new
    advice = ", or leave the new ones out with --ignore-new-classes" if allow_missing else ""
    if is_refused or (missing and not allow_missing) or len(missing) == len(expected):
        spelling = {_normal(name): name for name in expected}
        names = [spelling.get(key, key) for key in ids]
        check_same_classes(file, names, expected, advice if is_refused else "")

    if new:
        names = _first([category["name"] for category in new])
        notes.append(
            f"{file}: ignored {names}, which the model does not have, and {num_ignored} annotations"
        )
    if missing:
        notes.append(
            f"{file}: lacks {len(missing)} of the {len(expected)} classes: {_first(missing)}; AP "
            "is over the others"
        )
    return Classes(tuple(expected), tuple(ids.get(_normal(name)) for name in expected), notes)


def check_same_classes(
    where: str, names: Sequence[str], expected: Sequence[str], advice: str = ""
) -> None:
    """Compares the class names of a data set with those that it should have, in any order.

    Raises:
        UserError: a name is missing or new; the message lists both kinds.
    """
    missing = sorted(set(expected) - set(names))
    new = sorted(set(names) - set(expected))
    if missing or new:
        spellings = [_without_case(name) for name in new]
        alike = [name for name in missing if _without_case(name) in spellings]
        hint = f"; the spelling of {_first(alike)} differs only in case or spaces" if alike else ""
        raise UserError(
            f"{where}: classes {list(names)} differ from the model's or training data's "
            f"{list(expected)} (missing {missing}, new {new}){hint}; rename them or use other data"
            f"{'' if alike else advice}"
        )


def _count_uses(tables: Tables) -> Counter[int]:
    """The number of annotations of each category id."""
    return Counter(annotation["category_id"] for annotation in tables["annotations"])


def _usable_categories(
    file: str, tables: Tables, uses: Counter[int], expected: Sequence[str] = ()
) -> tuple[list[Record], list[str]]:
    """The categories that can be classes, ordered by id, and notes on those that cannot.

    Roboflow's exports begin with a category 0 that no annotation uses. It has the name of the
    project, which may be that of a class as well, and it is the supercategory of all others.
    """
    by_name: dict[str, list[Record]] = defaultdict(list)
    for category in sorted(tables["categories"], key=lambda category: category["id"]):
        by_name[_normal(category["name"])].append(category)

    categories, notes = [], []
    for same_name in by_name.values():
        used = [category for category in same_name if uses[category["id"]]]
        if len(used) > 1:
            where = _where("categories", tables["categories"].index(used[1]), used[1])
            raise UserError(
                f'{file}: {where}: category {used[0]["id"]} has the same "name", '
                f"{used[1]['name']}, and both have annotations; merge or rename them"
            )
        kept = (used or same_name)[0]
        categories.append(kept)
        for category in same_name:
            if category is not kept:
                notes.append(
                    f"{file}: ignored category {category['id']}, {category['name']!r}: it has no "
                    "annotations, and another category has its name"
                )

    # COCO's "person" is its own supercategory, and a class.
    parents = [category.get("supercategory") for category in categories]
    parents = {name for name in parents if isinstance(name, str)}
    known = {_normal(name) for name in expected}  # a model may have learned it as a class
    for category in list(categories):
        name = category["name"]
        is_group = name in parents and category.get("supercategory") != name
        if is_group and not uses[category["id"]] and _normal(name) not in known:
            categories.remove(category)
            notes.append(
                f"{file}: ignored category {category['id']}, {name!r}: it has no annotations and "
                "is the supercategory of others"
            )
    return sorted(categories, key=lambda category: category["id"]), notes


def _normal(name: str) -> str:
    """One form for names that look the same: in Unicode, é is one character or two."""
    return unicodedata.normalize("NFC", name)


def _without_case(name: str) -> list[str]:
    return _normal(name).casefold().split()


def _first(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


# --- boxes ---


def warn_of_box_form(file: str, boxes: np.ndarray, whwh_px: np.ndarray) -> None:
    """Warns if the boxes are probably not x, y, width, height in pixels.

    Args:
        file: their file, for the message.
        boxes: (T, 4) float64, as in the file.
        whwh_px: (T, 4), width, height, width and height of each box's image.
    """
    if len(boxes) == 0:
        return
    top_left, last = boxes[:, :2], boxes[:, 2:]
    ends = np.maximum(top_left + last, 0)
    advice = "COCO's format is x, y, width, height in pixels: convert the boxes"
    if boxes.max() <= 1.01 and whwh_px.min() > 2:
        _warn(f"{file}: all box values are between 0 and 1, as shares of the image; {advice}")
        return
    if len(boxes) >= 10 and ends.max() <= 101 and whwh_px.min() >= 200:
        _warn(f"{file}: no box value is above 100, as in percent of the image; {advice}")
        return

    # People draw boxes a little beyond the edges of an image, but not many, and not far.
    leaving = _leaves_image(top_left, ends, whwh_px, margin_px=2 + 0.01 * whwh_px[:, :2])
    share = leaving.mean()
    if share <= (0.01 if len(boxes) >= 100 else 0.1):
        return

    other_forms = {
        "x1, y1, x2, y2": (top_left, last),
        "centre x, centre y, width, height": (top_left - last / 2, top_left + last / 2),
    }
    fitting = []
    for form, (start, end) in other_forms.items():
        fits = (end > start).all(axis=1) & ~_leaves_image(start, end, whwh_px, margin_px=1)
        if fits.mean() >= 0.99:
            fitting.append(form)

    count = f"{leaving.sum()} of {len(boxes)} boxes"
    if fitting:
        _warn(
            f"{file}: {count} leave their images, but would fit as {' or as '.join(fitting)}; "
            f"{advice}"
        )
    elif share > 0.1 and leaving.sum() >= 4:
        _warn(
            f"{file}: {count} leave their images; check that the boxes are x, y, width, height in "
            "pixels, and that the images were not resized after they were annotated"
        )


def warn_of_copies(file: str, owners: np.ndarray, boxes: np.ndarray, ids: np.ndarray) -> None:
    """Warns of objects that are annotated more than once.

    The matcher would give each copy a proposal of its own, and the model would learn to find
    everything twice: there is no NMS that removes the second one.

    Args:
        file: their file, for the message.
        owners: (T,) int64, equal for boxes of the same image and class.
        boxes: (T, 4) float32, contiguous.
        ids: (T,), of the annotations.
    """
    # Copies come next to each other. To sort one key takes a fraction of the time that sorting by
    # all columns does; objects that merely share the key are told apart below.
    halves = boxes.view(np.int64)  # (T, 2), two float32 in each
    keys = (owners * 1_000_003 + halves[:, 0]) * 1_000_003 + halves[:, 1]  # overflows wrap around
    order = np.argsort(keys, kind="stable")
    halves, owners = halves[order], owners[order]
    is_copy = (halves[1:] == halves[:-1]).all(axis=1) & (owners[1:] == owners[:-1])  # (T - 1,)
    if is_copy.any():
        first = ", ".join(map(str, np.sort(ids[order[1:][is_copy]])[:5]))
        _warn(
            f"{file}: {is_copy.sum()} annotations have the image, class and box of another one "
            f"(first ids: {first}); the model would learn to find such objects twice: remove them"
        )


def _leaves_image(
    start: np.ndarray, end: np.ndarray, whwh_px: np.ndarray, margin_px: np.ndarray | float
) -> np.ndarray:
    """Whether boxes go beyond their image by more than a margin, (T,) bool."""
    return ((start < -margin_px) | (end > whwh_px[:, :2] + margin_px)).any(axis=1)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# --- crowds and areas ---

MAX_AREA_PX = 1e10  # where COCOeval's largest range of areas ends


def is_area(value: Any) -> bool:
    # NaN is not greater than 0 either.
    return type(value) in (int, float) and 0 <= value <= MAX_AREA_PX


def notes_on_annotations(file: str, annotations: Sequence[Record]) -> list[str]:
    """What a user should know about crowds, and about areas that are not numbers."""
    notes = []
    crowds = sum(bool(annotation.get("iscrowd")) for annotation in annotations)
    if crowds:
        # COCO has 1 % of them; some tools set iscrowd for every mask that is not a polygon.
        is_unusual = crowds > 0.1 * len(annotations)
        advice = "; set it to 0 if they are single objects" if is_unusual else ""
        notes.append(
            f"{file}: {crowds} of {len(annotations)} annotations are crowds (iscrowd: 1), which "
            f"are neither learned nor counted as objects{advice}"
        )

    areas = [annotation.get("area") for annotation in annotations]
    wrong = [area for area in areas if area is not None and not is_area(area)]
    if wrong:
        notes.append(
            f'{file}: {len(wrong)} annotations have an unusable "area", the first one '
            f"{wrong[0]!r:.40}; evaluation takes the area of the box instead"
        )
    return notes


def ground_truth(raw: Record, category_ids: Collection[int | None]) -> Record:
    """A parsed file, completed so that pycocotools can evaluate on it.

    Args:
        raw: of `read_json`, once `load_tables` has accepted the file; changed in place.
        category_ids: the categories to keep.

    Returns:
        The file with "info", and every annotation with "iscrowd" and an "area" that is a number.
        Without masks the area is that of the box.
    """
    kept = set(category_ids)
    categories = [category for category in raw["categories"] if category["id"] in kept]
    annotations = [record for record in raw["annotations"] if record["category_id"] in kept]
    # COCOeval takes a match with annotation 0 for no match at all.
    must_renumber = any(annotation["id"] == 0 for annotation in annotations)
    for number, annotation in enumerate(annotations, start=1):
        if must_renumber:
            annotation["id"] = number
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        if not is_area(annotation.get("area")):
            _, _, width, height = annotation["bbox"]
            annotation["area"] = width * height
    return {"info": {}, **raw, "categories": categories, "annotations": annotations}

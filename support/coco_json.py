"""COCO's JSON: reading it, finding its classes and objects, and the ground truth for pycocotools.

What cannot be right is refused, with the place of the first wrong record. What can be used, but not
quite as it stands, is said in a note. What is probably a mistake gives a warning.

Shapes: T objects of all images, K classes.
"""

import contextlib
import io
import json
import mmap
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from pycocotools.coco import COCO

from support.errors import UserError

MAX_AREA_PX = 1e10  # where COCOeval's largest range of areas ends


# --- the file ---

Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Pixels = Annotated[int, Meta(ge=1, lt=2**31)]
Name = Annotated[str, Meta(min_length=1)]


# Fields that are not listed here are skipped while the file is parsed; the polygons of COCO's
# training set alone are 400 MB. `gc=False`: Python's cyclic garbage collector would look at every
# record again and again.
class Image(Struct, gc=False):
    id: Id
    file_name: Name
    width: Pixels | None = None  # by default the picture's own
    height: Pixels | None = None


class Category(Struct, gc=False):
    id: Id
    name: Name
    supercategory: Any = None


class Annotation(Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]  # x, y, width, height in pixels
    iscrowd: bool | Annotated[int, Meta(ge=0, le=1)] | None = 0
    area: Any = None  # not always a number; see `_area_px`
    id: Any = None  # only a label; see `ground_truth`
    ignore: Any = None  # not part of COCO's format; only a note tells of it


class CocoFile(Struct):
    images: Annotated[list[Image], Meta(min_length=1)]
    categories: Annotated[list[Category], Meta(min_length=1)]
    annotations: list[Annotation] = []  # test sets have none


def read_coco(file: str) -> CocoFile:
    """Reads a file in COCO's (instances) format.

    msgspec is fast, but takes only strict JSON in UTF-8. What it refuses is read again as Python
    reads it: with a byte order mark, in UTF-16, with NaN in fields that do not matter, with 64.0
    for 64.

    Raises:
        UserError: the file cannot be read, or a record is not in COCO's format.
    """
    try:
        # A mapped file is in memory only once, however many processes read it.
        with (
            open(file, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            try:
                return msgspec.json.decode(text, type=CocoFile)
            except msgspec.DecodeError:
                return msgspec.convert(json.loads(text[:]), CocoFile, strict=False)
    except OSError as error:
        advice = "check the path, or name other data with --train-json or --val-json"
        raise UserError(f"{file}: cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError) as error:
        advice = "correct the record, or export the annotations again"
        raise UserError(f"{file}: not in COCO's (instances) format: {error}; {advice}") from None


def find_files(folder: str, names: Sequence[str], listed_in: str) -> list[str]:
    """The listed image files, as the folder spells their names.

    That may be with slashes for Windows' backslashes, or in another Unicode form: macOS splits
    letters such as ü into two characters.

    Raises:
        UserError: one of the files does not exist.
    """
    found = [name if _is_file(folder, name) else _find_spelling(folder, name) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(names)} image files listed in {listed_in} are "
            f"missing, the first is {missing[0]!r}; check the folder"
        )

    (name, count), *_ = Counter(map(os.path.normpath, found)).most_common(1)
    if count > 1:  # each record would be trained on with a part of the objects
        _warn(f"{listed_in}: lists {name} {count} times; keep one record, or one annotator's")
    return found


def _is_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _find_spelling(folder: str, name: str) -> str | None:
    name = name.replace("\\", "/")
    spellings = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    return next((spelling for spelling in spellings if _is_file(folder, spelling)), None)


# --- classes ---


def find_classes(
    file: str,
    coco: CocoFile,
    expected: Sequence[str] | None = None,
    allow_missing: bool = False,
    ignore_new: bool = False,
) -> tuple[tuple[str, ...], tuple[int | None, ...], list[str]]:
    """The classes of a file: its own, ordered by category id, or a model's, matched by name.

    Args:
        file: its name, for messages.
        coco: its content.
        expected: the model's K names, in the order of the labels.
        allow_missing: accept a file that lacks some of them, with a note.
        ignore_new: leave out the annotations of other classes, with a note. A class without
            annotations is always left out.

    Returns:
        K names, K category ids (None for a class that the file lacks), and notes on categories that
        are missing or ignored.

    Raises:
        UserError: the classes are not the expected ones, or two with annotations share a name.
    """
    uses = Counter(annotation.category_id for annotation in coco.annotations)
    known = {_normal(name) for name in expected or ()}
    usable: dict[str, Category] = {}
    notes = []
    for category in sorted(coco.categories, key=lambda c: (uses[c.id] == 0, c.id)):
        name, is_used = _normal(category.name), uses[category.id] > 0
        if name in usable and is_used:
            raise UserError(
                f"{file}: categories {usable[name].id} and {category.id} are both named "
                f"{category.name!r} and have annotations; merge or rename them"
            )
        # Roboflow's category 0: no annotations, the project's name, and the supercategory of all
        # others. COCO's "person" is the supercategory of itself, and a class.
        others = (other for other in coco.categories if other is not category)
        is_group = name not in known and any(o.supercategory == category.name for o in others)
        if not is_used and (name in usable or is_group):
            notes.append(f"{file}: ignored category {category.id}, {category.name!r}: it is unused")
        else:
            usable[name] = category
    categories = sorted(usable.values(), key=lambda category: category.id)
    names = [category.name for category in categories]
    if expected is None:
        if unlearned := [category.name for category in categories if not uses[category.id]]:
            notes.append(f"{file}: no annotations of {unlearned}, which cannot be learned")
        return tuple(names), tuple(category.id for category in categories), notes

    missing = [name for name in expected if _normal(name) not in usable]
    new = [name for name in names if _normal(name) not in known]
    num_new = sum(uses[usable[_normal(name)].id] for name in new)
    is_refused = (num_new and not ignore_new) or (missing and not allow_missing)
    if is_refused or len(missing) == len(expected):
        advice = ""
        # It is a flag of validation and evaluation, and something has to be left.
        if allow_missing and not ignore_new and len(missing) < len(expected):
            advice = ", or leave the new ones out with --ignore-new-classes"
        raise UserError(
            f"{file}: classes {names} differ from the model's or training data's {list(expected)} "
            f"(missing {missing}, new {new}); rename them or use other data{advice}"
        )
    if new:
        notes.append(f"{file}: ignored {new}, new to the model, and {num_new} annotations")
    if missing:
        lacks = f"{len(missing)} of the {len(expected)} classes: {', '.join(map(repr, missing))}"
        notes.append(f"{file}: lacks {lacks}; AP is over the others")
    ids = {name: category.id for name, category in usable.items()}
    return tuple(expected), tuple(ids.get(_normal(name)) for name in expected), notes


def _normal(name: str) -> str:
    """One form for names that look the same: in Unicode, é is one character or two."""
    return unicodedata.normalize("NFC", name)


# --- objects ---


def pack_objects(
    file: str, coco: CocoFile
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Checks ids and boxes, and packs the annotations into arrays.

    Returns:
        Which image of the file each object is in (T,) int64, its category id (T,) int64, its box
        x, y, width, height in pixels (T, 4) float64, and whether it is a crowd (T,) bool.

    Raises:
        UserError: an id has two meanings or none, or a box is not finite.
    """
    image_ids = [image.id for image in coco.images]
    known_ids = [category.id for category in coco.categories]
    for name, ids in (("images", image_ids), ("categories", known_ids)):
        (repeated, count), *_ = Counter(ids).most_common(1)
        if count > 1:
            raise UserError(f"{file}: {count} {name} have the id {repeated}; each needs its own")

    rows = index_of((a.image_id for a in coco.annotations), image_ids)
    category_ids = np.fromiter((a.category_id for a in coco.annotations), np.int64)
    xywh_px = np.fromiter((a.bbox for a in coco.annotations), np.dtype((np.float64, 4)))
    is_crowd = np.fromiter((bool(a.iscrowd) for a in coco.annotations), bool)
    problems = {
        "its image_id is not that of an image": rows < 0,
        "its category_id is not that of a category": index_of(category_ids.tolist(), known_ids) < 0,
        "its bbox is not finite": ~(abs(xywh_px) < 1e12).all(axis=1),  # NaN is not smaller
    }
    for problem, is_wrong in problems.items():
        if is_wrong.any():
            first = int(is_wrong.argmax())
            raise UserError(
                f"{file}: {problem} - at `$.annotations[{first}]`, the first of {is_wrong.sum()}: "
                f"{str(coco.annotations[first]):.200}; correct or remove these records"
            )
    return rows, category_ids, xywh_px, is_crowd


def index_of(values: Iterable[int], ids: Sequence[int | None]) -> np.ndarray:
    """Where each of T values stands among the ids, (T,) int64; −1 if it does not."""
    place = {id_: index for index, id_ in enumerate(ids)}
    return np.fromiter((place.get(value, -1) for value in values), np.int64)


def check_box_form(file: str, xywh: np.ndarray, wh_px: np.ndarray) -> None:
    """Warns of boxes (T, 4) that do not fit their images, of widths and heights (T, 2).

    Raises:
        UserError: most of them do not, as if they were x1, y1, x2, y2, or all are shares of 1.
    """
    # People draw boxes a little beyond the edges of an image, but not many, and not far.
    margin_px = 2 + 0.01 * wh_px
    start, end = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    num_leaving = ((start < -margin_px) | (end > wh_px + margin_px)).any(axis=1).sum()
    are_shares = len(xywh) > 0 and xywh.max() <= 1.01 and wh_px.min() > 2
    problem = f"{num_leaving} of {len(xywh)} boxes leave their images"
    if are_shares:
        problem = "all box values are between 0 and 1"
    problem = f"{file}: {problem}; are they x, y, width, height in pixels of these image files?"
    if are_shares or num_leaving > 0.5 * len(xywh):
        raise UserError(problem)
    if num_leaving > 0.1 * len(xywh):
        _warn(problem)


def warn_of_copies(file: str, rows: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> None:
    """Warns of objects that are annotated more than once: same image, same label, same box (T, 4).

    The matcher would give each copy a proposal of its own, and the model would learn to find
    everything twice: there is no NMS that removes the second one.
    """
    table = np.column_stack((rows, labels, boxes)).astype(np.float64)  # (T, 6)
    different = np.unique(table.view("V48"))  # compares rows as bytes: faster than axis=0
    if num_copies := len(boxes) - len(different):
        problem = f"{num_copies} annotations have the image, class and box of another one"
        _warn(f"{file}: {problem}; the model would learn to find these objects twice: remove them")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# --- evaluation ---


def notes_on_annotations(file: str, coco: CocoFile) -> list[str]:
    """What is not learned or counted as it stands in the file, one line each."""
    num_unsized = sum(None in (image.width, image.height) for image in coco.images)
    num_crowds = sum(bool(a.iscrowd) for a in coco.annotations)
    num_ignored = sum(a.ignore == 1 and not a.iscrowd for a in coco.annotations)
    num_areas = sum(a.area is not None and a.area != _area_px(a) for a in coco.annotations)
    found = {
        "images have no width or height; their files' sizes are taken": num_unsized,
        # 1 % in COCO; some tools set iscrowd for every mask that is not a polygon.
        "annotations are crowds (iscrowd: 1), which are neither learned nor counted as objects; "
        "set it to 0 for single objects": num_crowds,
        'annotations with "ignore": 1 are learned and counted like all others; iscrowd: 1 would '
        "leave them out": num_ignored,
        'annotations have an unusable "area"; that of the box is taken': num_areas,
    }
    notes = [f"{number} {what}" for what, number in found.items() if number]
    if not coco.annotations:
        notes.append("no annotations, so there is nothing to learn or to compare with")
    if not _have_ids(coco.annotations):
        notes.append("annotation ids are missing, repeated, or below 1; they are numbered anew")
    return [f"{file}: {note}" for note in notes]


def ground_truth(coco: CocoFile, category_ids: Collection[int | None]) -> COCO:
    """The objects of some categories, completed in place, so that pycocotools can evaluate.

    Boxes without area are left out. Some tools mark images without objects by one, and pycocotools
    would count it as an object that no detection finds.
    """
    of_these = (a for a in coco.annotations if a.category_id in category_ids)
    annotations = [a for a in of_these if min(a.bbox[2:]) > 0]
    have_ids = _have_ids(annotations)
    for number, annotation in enumerate(annotations, start=1):
        annotation.id = annotation.id if have_ids else number
        annotation.bbox = list(annotation.bbox)  # pycocotools refuses tuples
        annotation.area = _area_px(annotation)
        annotation.iscrowd = int(bool(annotation.iscrowd))
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": msgspec.to_builtins(coco.images),
        "categories": msgspec.to_builtins([c for c in coco.categories if c.id in category_ids]),
        "annotations": msgspec.to_builtins(annotations),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _have_ids(annotations: Sequence[Annotation]) -> bool:
    """Whether their ids can be kept. COCOeval takes a match with annotation 0 for none at all."""
    return len({a.id for a in annotations if type(a.id) is int and a.id > 0}) == len(annotations)


def _area_px(annotation: Annotation) -> float:
    """The area in the file, or that of the box if it is not a number, or is 0."""
    area, (_, _, width, height) = annotation.area, annotation.bbox
    is_usable = type(area) in (int, float) and 0 < area <= MAX_AREA_PX
    return area if is_usable else width * height

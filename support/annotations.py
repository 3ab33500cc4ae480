"""COCO JSON: reading it, and saying what is wrong with it."""

import contextlib
import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.errors import UserError

_ID = (
    lambda v: type(v) is int and -(2**63) <= v < 2**63,
    "an integer",
)  # to Python, JSON's true is an int as well
_PIXELS = (lambda v: type(v) is int and 0 < v < 2**31, "a whole number of pixels")
_TEXT = (lambda v: type(v) is str and v != "", "a text")
_CROWD = (lambda v: v is None or (isinstance(v, int) and v in (0, 1)), "0, 1 or absent")
_BBOX = (  # Python's JSON reader lets NaN and Infinity pass
    lambda v: (
        type(v) is list
        and len(v) == 4
        and all(type(n) in (int, float) and abs(n) < 1e12 for n in v)
    ),
    "4 finite numbers x, y, width, height",
)
_FORMAT: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _PIXELS, "height": _PIXELS},
    "categories": {"id": _ID, "name": _TEXT},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": _BBOX,
        "iscrowd": _CROWD,
    },
}
_LISTED_IN = {"image_id": "images", "category_id": "categories"}


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Collections find nothing among a million parsed records, but take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@without_gc()
def read_json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({error}); export the annotations again") from None


def load_tables(file: str) -> dict[str, list[dict[str, Any]]]:
    """The parsed file, whose every record is as `_FORMAT` says."""
    raw = read_json(file)
    seen: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for name in _FORMAT:
        if not isinstance(raw, dict) or not isinstance(raw.get(name), list):
            raise UserError(
                f'{file}: holds no list "{name}"; export the annotations in COCO\'s (instances) format'
            )
        if not raw[name] and name != "annotations":
            raise UserError(
                f'{file}: the data set is empty, it lists no "{name}"; check that the export succeeded'
            )
        for row, record in enumerate(raw[name]):
            if problem := _problem(name, record, seen):
                known_as = (
                    f" (id {record['id']!r:.40})"
                    if isinstance(record, dict) and "id" in record
                    else ""
                )
                raise UserError(
                    f"{file}: {name}[{row}]{known_as}: {problem}; correct or remove the record"
                )
    return raw


def _problem(name: str, record: Any, seen: dict[tuple[str, str], set[Any]]) -> str | None:
    """What is wrong with a record of the list `name`; adds its unique values to those `seen`."""
    if not isinstance(record, dict):
        return f"{record!r:.60} should be an object"
    for key, (valid, expected) in _FORMAT[name].items():
        value = record.get(key)
        if not valid(value):
            return f'"{key}" ' + (
                "is missing" if key not in record else f"is {value!r:.60} and should be {expected}"
            )
        if key in _LISTED_IN and value not in seen[_LISTED_IN[key], "id"]:
            return f'"{key}" {value} is not listed in "{_LISTED_IN[key]}"'
        if key in ("id", "name"):
            if value in seen[name, key]:
                return f'an earlier record has the same "{key}", {value}'
            seen[name, key].add(value)
    return None


def check_same_classes(where: str, names: Sequence[str], expected: Sequence[str]) -> None:
    missing, new = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or new:
        what = f"classes {list(names)} differ from the model's or training data's {list(expected)}"
        raise UserError(
            f"{where}: {what} (missing {missing}, new {new}); rename them or use other data"
        )

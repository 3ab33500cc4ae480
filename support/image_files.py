"""Finding the image files that a JSON file lists, however they are spelled."""

import contextlib
import glob
import os
import unicodedata
import urllib.parse
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from support.errors import UserError


def find_files(folder: str, names: Sequence[str], listed_in: str) -> tuple[list[str], list[str]]:
    """The image files that are listed, as the folder spells their names.

    A name is also found if the folder has it in another Unicode form (macOS splits letters such as
    ü into two characters), or in other upper and lower case, or if the list has backslashes
    (Windows).

    Args:
        folder: what the names are relative to.
        names: as listed.
        listed_in: the file that lists them, for messages.

    Returns:
        The names in the folder, in the same order, and notes for the user.

    Raises:
        UserError: the folder or one of the files does not exist.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: there is no such folder of images; check the path")

    found, missing, respelled = [], [], []
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            found.append(name)
        elif (similar := _find_similar(folder, name)) is not None:
            found.append(similar)
            respelled.append((name, similar))
        else:
            missing.append(name)
    _list_folder.cache_clear()

    if missing:
        first = missing[0] if missing[0].isprintable() else repr(missing[0])
        raise UserError(
            f"{folder}: {len(missing)} of the {len(names)} image files listed in {listed_in} are "
            f"missing, the first is {first}; {_advice(folder, missing[0])}"
        )
    _warn_of_repeated(folder, found, listed_in)
    if not respelled:
        return found, []
    listed, similar = respelled[0]
    return found, [
        # In ASCII, because the two may look the same.
        f"{listed_in}: {len(respelled)} of {len(names)} file names are spelled differently in "
        f"{folder}, such as {listed!a}, there {similar!a}"
    ]


def _warn_of_repeated(folder: str, names: list[str], listed_in: str) -> None:
    """An image that is listed twice is trained on twice, each time with only some of its boxes."""
    folder = os.path.abspath(folder)
    # 1.jpg, ./1.jpg and ../images/1.jpg are one file.
    paths = Counter(os.path.normpath(os.path.join(folder, name)) for name in names)
    repeated = [path for path, count in paths.items() if count > 1]
    if repeated:
        warnings.warn(
            f"{listed_in}: lists {len(repeated)} image files more than once, such as "
            f"{os.path.relpath(repeated[0], folder)}; give all boxes of a file to one image record",
            stacklevel=3,
        )


def _find_similar(folder: str, name: str) -> str | None:
    """The path, relative to the folder, of the only file that differs from a name in spelling."""
    path = ""
    for part in name.replace("\\", "/").split("/"):
        if part in ("", "."):
            continue
        if part == "..":
            matches = [part]
        else:
            entries = _list_folder(os.path.join(folder, path))
            matches = entries.get(_without_case(part), [])
        if len(matches) > 1:
            matches = [entry for entry in matches if _normal(entry) == _normal(part)]
        if len(matches) != 1:
            return None
        path = os.path.join(path, matches[0])
    return path if os.path.isfile(os.path.join(folder, path)) else None


@cache
def _list_folder(folder: str) -> dict[str, list[str]]:
    """What is in a folder, by its name without differences of Unicode form and case."""
    entries = defaultdict(list)
    with contextlib.suppress(OSError, ValueError):
        for entry in os.listdir(folder):
            entries[_without_case(entry)].append(entry)
    return entries


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _without_case(name: str) -> str:
    return _normal(_normal(name).casefold())


def _advice(folder: str, name: str) -> str:
    """What to do about a missing file, judged by files of similar names."""
    name = name.replace("\\", "/")
    last = name.rsplit("/", 1)[-1]
    stem = os.path.join(folder, os.path.splitext(name)[0])
    with contextlib.suppress(OSError, ValueError):
        similar = [
            os.path.join(folder, last),  # listed as images/1.jpg, and this is the folder images
            os.path.join(folder, urllib.parse.unquote(name)),  # listed as my%20cat.jpg
            *sorted(glob.glob(glob.escape(stem) + ".*")),  # listed as 1.jpg, but it is 1.png
        ]
        for path in similar:
            if os.path.isfile(path):
                return f"there is {Path(path)}: correct the folder, or the names in the list"
    return "check the folder"

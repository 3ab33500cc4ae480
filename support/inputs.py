"""Which image files a command line names, and names for the files that are made from them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from support.errors import UserError
from support.pictures import readable_suffixes


def check_exists(text: str) -> None:
    """Refuses an input that is neither a file (or a pipe) nor a folder.

    Raises:
        UserError: says what it is instead, if that can be seen.
    """
    if not text:
        raise UserError("one of the inputs is an empty text; give images or folders")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise UserError(f"{text}: this is a URL; download the image and give the file")
    path = Path(text)
    if not path.exists():
        raise UserError(f"{text}: no such file or folder")
    if path.is_block_device() or path.is_char_device():  # /dev/zero never ends
        raise UserError(f"{text}: this is a device; give images or folders")


def list_images(inputs: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """The files among the inputs, and the images right inside the folders, each once.

    Args:
        inputs: files and folders.

    Returns:
        The files, and how much in the folders was passed over, by kind; see `list_folder`.

    Raises:
        UserError: an input does not exist, or a folder holds no image.
    """
    files: dict[Path, Path] = {}
    passed_over: Counter[str] = Counter()
    for text in inputs:
        check_exists(text)
        path = Path(text)
        inside = [path]
        if path.is_dir():
            inside, others = list_folder(path)
            passed_over += others
        for file in inside:
            files.setdefault(file.resolve(), file)
    return list(files.values()), passed_over


def list_folder(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a folder, sorted, and how many other entries it has of each kind.

    The kinds are suffixes such as ".txt", or "folder", "hidden", "broken link" and so on. Hidden
    files are counted only if they could be images.

    Raises:
        UserError: there is no image.
    """
    suffixes = readable_suffixes()
    images: list[Path] = []
    others: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            others["hidden"] += suffix in suffixes
        elif path.is_dir():
            others["folder"] += 1
        elif suffix not in suffixes:
            others[suffix or "without a suffix"] += 1
        elif path.is_file():
            images.append(path)
        else:
            others["broken link" if path.is_symlink() else "special file"] += 1
    others = +others  # without zeros
    if not images:
        content = f"only {describe(others)}" if others else "it is empty"
        raise UserError(f"{folder}: no images in this folder ({content}); give another one")
    return images, others


def describe(kinds: Counter[str]) -> str:
    """Numbers and kinds, the most frequent first: "3 .txt, 1 folder"."""
    shown = [f"{number} {kind}" for kind, number in kinds.most_common(8)]
    return ", ".join(shown) + (", …" if len(kinds) > 8 else "")


def output_names(files: Sequence[Path]) -> list[str]:
    """NAME of NAME.jpg for each file; if that is taken NAME_2, NAME_3, …, to overwrite nothing."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        name = file.stem
        number = 1
        while _without_case(name) in taken:
            number += 1
            name = f"{file.stem}_{number}"
        names.append(name)
        taken.add(_without_case(name))
    return names


def _without_case(name: str) -> str:
    """Equal for names that some file systems cannot tell apart: in case, and in Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()

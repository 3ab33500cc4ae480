"""Files are old or whole, errors name the file that was meant, and nothing is left behind."""

import os
from pathlib import Path

import pytest

from support.files import make_folder, replacing


@pytest.mark.parametrize("name", ["a.json", "猫" * 85, os.fsdecode(b"\xff.json")])
def test_a_file_is_replaced_by_a_whole_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == [name]


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    (folder / "probe").write_text("somebody's")
    make_folder(folder)
    assert (folder / "probe").read_text() == "somebody's" and os.listdir(folder) == ["probe"]
    for path in (folder / "probe", folder / "probe" / "c", Path("/proc/nowhere")):
        with pytest.raises(OSError, match=str(path.name)):
            make_folder(path)

"""Files are old or whole, errors name the file that was meant, and nothing is left behind."""

import json
import os
from pathlib import Path

import pytest

from support.files import make_folder, replacing, write_json


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


def test_json_holds_names_in_any_encoding(tmp_path: Path) -> None:
    value = {"猫": [1.5, None], os.fsdecode(b"\xff.jpg"): "Kätzchen"}
    write_json(tmp_path / "a.json", value, indent=2)
    assert json.loads((tmp_path / "a.json").read_bytes()) == value


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json") as temporary:
        temporary.write_text('"old"')
    temporary.symlink_to("/dev/full")  # it fails as a full disk does: when something is written
    with pytest.raises(OSError, match=r"a\.json: not written \(No space left on device\)"):
        write_json(tmp_path / "a.json", "new")
    assert json.loads((tmp_path / "a.json").read_bytes()) == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    make_folder(folder)
    (folder / "probe").write_text("somebody's")
    make_folder(folder)
    assert (folder / "probe").read_text() == "somebody's" and os.listdir(folder) == ["probe"]
    for path in (folder / "probe", folder / "probe" / "c", Path("/proc/nowhere")):
        with pytest.raises(OSError, match=str(path.name)):
            make_folder(path)

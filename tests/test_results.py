"""support/results.py: whatever happens, what was done before is kept."""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from support import results
from support.errors import UserError
from support.results import (
    Failure,
    JsonList,
    attempt,
    load_tolerantly,
    make_folder,
    raise_bug,
    replacing,
    signal_of,
    signals_like_ctrl_c,
    undisturbed,
    write_json,
)

# --- failures ---


def inverse(items: list[int]) -> list[float]:
    if 7 in items:
        raise UserError("seven: not wanted; take another one")
    return [1 / item for item in items]


def test_only_what_fails_is_a_failure() -> None:
    earlier = Failure("lost", "")
    results = attempt(inverse, [2, earlier, 0, 7, 4])
    assert results[0] == 0.5 and results[1] is earlier and results[4] == 0.25
    assert results[2].reason == "ZeroDivisionError: division by zero"
    assert "in inverse" in results[2].trace
    assert results[3] == Failure("seven: not wanted; take another one", "")
    assert results[2].about("image 3").startswith("image 3: ZeroDivisionError")
    assert results[3].about("image 3") == "seven: not wanted; take another one"


def test_a_batch_without_failures_runs_once_and_together() -> None:
    calls = []
    assert attempt(lambda items: calls.append(items) or items, [1, 2, 3]) == [1, 2, 3]
    assert attempt(lambda items: calls.append(items) or items, [Failure("lost", "")]) != []
    assert calls == [[1, 2, 3]]


def test_a_bug_is_raised_with_its_trace_and_a_broken_file_is_not() -> None:
    raise_bug([Failure("broken", "")])
    [failure] = attempt(inverse, [0])
    with pytest.raises(RuntimeError, match=r"(?s)all 2 images failed.*in inverse"):
        raise_bug([Failure("broken", ""), failure])


def test_an_error_of_the_system_is_no_bug_and_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()

    def write(items: list[int]) -> list[None]:
        with replacing(tmp_path / "a.png") as temporary:
            temporary.write_text("")
        return [None for _ in items]

    [failure] = attempt(write, [0])
    assert failure.about("image") == f"{tmp_path / 'a.png'}: Is a directory"
    raise_bug([failure])


class Numbered(Dataset):
    """Images of one pixel; those of odd numbers are broken, each in its own way."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        if index == 1:
            raise UserError("1: broken; replace it")
        if index == 3:
            raise KeyError("three")
        return torch.full((3, 1, 1), index), {"number": index}


@pytest.mark.parametrize("workers", [0, 1])
def test_items_that_cannot_be_loaded_do_not_stop_the_loader(workers: int) -> None:
    batches = list(load_tolerantly(Numbered(), [[0, 1], [3], [2, 4]], workers))
    assert [len(batch) for batch in batches] == [2, 1, 2]
    image, target = batches[0][0]
    assert image.flatten().tolist() == [0, 0, 0] and target == {"number": 0}
    assert batches[0][1] == Failure("1: broken; replace it", "")
    assert batches[1][0].reason == "KeyError: 'three'"
    assert "__getitem__" in batches[1][0].trace
    assert [target["number"] for _, target in batches[2]] == [2, 4]


class Deadly(Dataset):
    """Kills the worker process that loads number 2, as the system does where memory is full."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        if index == 2 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3, 1, 1), index), {"number": index}


def test_a_worker_that_is_killed_does_not_end_the_run() -> None:
    with pytest.warns(UserWarning, match=r"was killed.*--workers 0"):
        batches = list(load_tolerantly(Deadly(), [[0], [1], [2, 3], [4]], workers=1))
    numbers = [[target["number"] for _, target in batch] for batch in batches]
    assert numbers == [[0], [1], [2, 3], [4]]


def test_news_of_a_killed_worker_do_not_count_as_a_failure() -> None:
    calls = []

    def run(items: list[int]) -> list[int]:
        calls.append(items)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        return items

    assert attempt(run, [1, 2]) == [1, 2] and calls == [[1, 2], [1, 2]]
    with pytest.raises(RuntimeError, match="another"):
        undisturbed(lambda: (_ for _ in ()).throw(RuntimeError("another")))


# --- files ---


def test_records_are_there_as_they_come_and_replace_the_file_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("yesterday's")
    with JsonList(path) as records:
        for number in range(3):
            records.append({"number": number, "name": "猫"})
            [temporary] = tmp_path.glob(".*.tmp")
            text = temporary.read_text(encoding="utf-8")
            assert text.count("\n") == number + 1  # one line each, written right away
        assert path.read_text() == "yesterday's"
    expected = [{"number": number, "name": "猫"} for number in range(3)]
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    assert "猫" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["list.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_list_is_whole_when_something_ends_the_run(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "list.json"
    path.write_text("yesterday's")
    with pytest.raises(error), JsonList(path):
        raise error
    assert path.read_text() == "yesterday's"
    with pytest.raises(error), JsonList(path) as records:
        records.append({"number": 0})
        raise error
    assert json.loads(path.read_text()) == [{"number": 0}]
    assert os.listdir(tmp_path) == ["list.json"]


def test_an_empty_list_is_json(tmp_path: Path) -> None:
    with JsonList(tmp_path / "list.json"):
        pass
    assert json.loads((tmp_path / "list.json").read_text()) == []


class FullDisk:
    """A file that takes only so many bytes; the rest of a write is lost, as on a full disk."""

    def __init__(self, file, room: int):
        self.file = file
        self.room = room

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        return self.file.write(data[: max(0, self.room - self.file.tell())])


def test_half_a_record_on_a_full_disk_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    with pytest.raises(OSError, match="No space left.*list.json"), JsonList(path) as records:
        records.file = FullDisk(records.file, room=40)
        records.append({"number": 0})
        records.append({"text": "x" * 100})
    assert json.loads(path.read_text()) == [{"number": 0}]


def test_where_not_even_the_end_fits_the_results_are_left_and_named(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("yesterday's")
    message = r"in .*tmp, without the last bracket"
    with pytest.raises(OSError, match=message), JsonList(path) as records:
        records.append({"number": 0})
        records.file = FullDisk(records.file, room=0)
    [temporary] = tmp_path.glob(".*.tmp")
    assert json.loads(temporary.read_text() + "]") == [{"number": 0}]
    assert path.read_text() == "yesterday's"


def test_what_json_does_not_have_leaves_the_list_as_it_was(tmp_path: Path) -> None:
    with JsonList(tmp_path / "list.json") as records:
        with pytest.raises(ValueError, match="not JSON compliant"):
            records.append({"score": float("nan")})
        records.append({"score": 1.0})
    assert json.loads((tmp_path / "list.json").read_text()) == [{"score": 1.0}]


def test_a_file_name_that_is_not_utf8_comes_back_from_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xc4\xe3.png")
    with JsonList(tmp_path / "list.json") as records:
        records.append({"file": name})
    write_json(tmp_path / "value.json", {"file": name})
    [record] = json.loads((tmp_path / "list.json").read_bytes().decode("utf-8"))
    value = json.loads((tmp_path / "value.json").read_bytes().decode("utf-8"))
    assert os.fsencode(record["file"]) == os.fsencode(value["file"]) == b"\xc4\xe3.png"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="no"), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError("no")
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for write in (write_json, lambda path, _: JsonList(path).__enter__()):
        with pytest.raises(IsADirectoryError, match=r"'[^']*/folder\.json'$"):
            write(tmp_path / "folder.json", {})
    with pytest.raises(OSError, match=r"'.*/a\.txt'$") as caught, replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as Pillow has it: no file is named
    assert caught.value.errno == errno.ENOSPC


def test_a_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match="file"):
            make_folder(path)


def test_a_long_name_has_a_temporary_name_that_fits(tmp_path: Path) -> None:
    path = tmp_path / ("猫" * 80 + ".json")  # 245 bytes of at most 255
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


# --- signals ---


def test_other_signals_stop_like_ctrl_c_inside_and_as_before_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(KeyboardInterrupt) as caught, signals_like_ctrl_c():
            signal.raise_signal(number)
        assert signal_of(caught.value) == number
    assert signal.getsignal(signal.SIGTERM) == before


def at_the_same_time() -> None:
    """Python learns of both before it runs a handler."""
    numbers = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:  # to this thread: another one would take them at once
        signal.pthread_kill(threading.get_ident(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def one_after_the_other() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("stop", [at_the_same_time, one_after_the_other])
def test_of_several_signals_only_the_first_counts(stop: Callable, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    with pytest.raises(KeyboardInterrupt) as caught, signals_like_ctrl_c(), JsonList(path) as list_:
        list_.append({"number": 0})
        stop()
    assert caught.value.__context__ is None
    assert json.loads(path.read_text()) == [{"number": 0}]
    assert os.listdir(tmp_path) == ["list.json"]


def test_a_later_signal_counts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_SAME_REQUEST_S", -1.0)
    with signals_like_ctrl_c():
        for number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_list_is_closed_does_not_lose_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.json"
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(number))
    with signals_like_ctrl_c(), JsonList(path) as records:
        records.append({"number": 0})
    assert json.loads(path.read_text()) == [{"number": 0}]
    assert os.listdir(tmp_path) == ["list.json"]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with signals_like_ctrl_c():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)

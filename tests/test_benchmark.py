"""experiments/benchmark.py, its command `data`, and what loading promises."""

import gc
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CocoFactory

import experiments.measure
from config import Config
from data import CocoDataset, make_dataset
from experiments import benchmark
from experiments.benchmark import main
from experiments.benchmark_data import COLUMNS, PilDataset, make_pictures, measure
from experiments.measure import format_table
from support.cli import run_main
from support.loader import Reseeded

SMAPS = Path("/proc/self/smaps_rollup")


def printed_rows(text: str) -> list[list[str]]:
    """The cells of the table's lines below its head."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ][2:]


def test_what_is_printed_is_what_is_written(
    tmp_path: Path, make_coco: CocoFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    output, (json_file, folder) = tmp_path / "new" / "speed.jsonl", make_coco(num_images=5)
    tiny = ["--repeats", "2", "--batch-size", "2", "--output", str(output)]
    made = ["data", *tiny, "--images", "3", "--workers", "0", "1"]
    own = ["data", *tiny, "--images", "2", "--workers", "0", "--train-json", str(json_file)]
    threads = torch.get_num_threads()
    for number, argv in enumerate((made, [*own, "--train-images", str(folder)])):
        main(argv)
        text = capsys.readouterr().out
        assert len(output.read_text().splitlines()) == number + 1
        line = json.loads(output.read_text().splitlines()[-1])
        expected = [("ours", 0), ("PIL", 0), ("ours, loader", 0), ("ours, loader", 1)][: 4 - number]
        assert [(row["variant"], row["workers"]) for row in line["rows"]] == expected
        speeds = ("images_per_second", "min", "max", "per_worker")
        for row, cells in zip(line["rows"], printed_rows(text), strict=True):
            assert cells[:2] == [row["variant"], str(row["workers"])]
            numbers = re.findall(r"[0-9.]+", " ".join(cells[2:]))
            assert numbers == [f"{row[speed]:.1f}" for speed in speeds]
            assert 0 < row["min"] <= row["images_per_second"] == row["per_worker"] <= row["max"]
        ours, pil = (row["images_per_second"] for row in line["rows"][:2])
        assert line["ours_over_pil"] == ours / pil and f"ours_over_pil: {ours / pil:.2f}\n" in text
        assert line["command"] == "data" and line["repeats"] == 2 and line["images"] == 3 - number
        size = "64×48" if number else "640×480"
        head = text.splitlines()[0]
        for part in (
            line["device"],
            f"cores {line['cores']}",
            torch.__version__,
            f"{size} px",
            "480-800/1333",
        ):
            assert part in head
    assert torch.get_num_threads() == threads


def test_rates_are_medians_of_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    seconds = {"a": [99, 1, 8, 2], "b": [99, 4, 4, 16]}

    def run(name: str, count: int) -> int:
        order.append(name)
        now[0] += seconds[name].pop(0)
        return count

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(experiments.measure, "synchronize", lambda device: order.append("sync"))
    rows = measure({("a", 0): lambda: run("a", 8), ("b", 2): lambda: run("b", 16)}, repeats=3)
    # The device is waited for on both sides of every run.
    assert order == ["sync", "a", "sync", "sync", "b", "sync"] * 4
    assert printed_rows(format_table(rows, COLUMNS)) == [
        ["a", "0", "4.0", "1.0 – 8.0", "4.0"],
        ["b", "2", "4.0", "1.0 – 4.0", "2.0"],
    ]


def test_ours_and_pil_do_the_same_work(tmp_path: Path) -> None:
    json_file, folder = make_pictures(tmp_path, 3, seed=1)
    dataset = make_dataset(Config(train_json=json_file, train_images=folder), "train")
    ours, pil = Reseeded(dataset), Reseeded(PilDataset(dataset))
    flips, shapes = set(), set()
    for seed in range(9):
        image, target = ours[seed % 3, seed]
        picture, other = pil[seed % 3, seed]
        assert image.shape == picture.shape and image.dtype == picture.dtype == torch.uint8
        difference = (image.short() - picture.short()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.1
        assert torch.equal(target["boxes"], other["boxes"]) and len(target["boxes"]) > 0
        assert (
            torch.equal(target["labels"], other["labels"])
            and target["image_id"] == other["image_id"]
        )
        shapes.add(image.shape)
        flips.add(
            bool(
                (
                    target["boxes"][0, 0]
                    - dataset.target(seed % 3)["boxes"][0, 0] * image.shape[2] / 640
                ).abs()
                > 1
            )
        )
    assert flips == {False, True} and len(shapes) > 2  # otherwise the seeds show nothing


def test_pictures_are_repeatable_and_as_large_as_photographs(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        make_pictures(tmp_path / name, 2, seed)
    for file in ("1.jpg", "2.jpg", "labels.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c
    assert all(60_000 < path.stat().st_size < 160_000 for path in tmp_path.glob("?/*.jpg"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command given; commands: data, inference"),
        (["speed"], "no such command as speed; commands: data, inference"),
        (["--images", "3"], "no such command as --images"),
        (["data", "--repeats", "0"], "--repeats"),
        (["data", "--workers", "1", "-1"], "--workers"),
        (["data", "--train-json", "x.json"], "--train-images is missing"),
        (["data", "--train-json", "x.json", "--train-images", "x"], "x.json: cannot be read"),
        (["data", "--imags", "3"], "--imags"),
        (["data", "--images", "three"], "three"),
    ],
)
def test_mistakes_exit_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(argv, message, capsys)


def check_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says what is wrong, on standard error, and exits with 2."""
    try:
        status = run_main(lambda: main(argv), "experiments.benchmark")
    except SystemExit as stop:  # tyro has printed it
        status = stop.code
    printed = capsys.readouterr()
    assert (
        status == 2
        and message in printed.err
        and "Traceback" not in printed.err
        and printed.out == ""
    )


def test_the_module_exits_with_2_and_explains_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "experiments.benchmark")  # as `python -m` finds it
    for words, status in (([], 2), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("experiments.benchmark", run_name="__main__")
        printed = capsys.readouterr()
        assert stop.value.code == status
        if words:
            assert benchmark.__doc__ in printed.out and printed.err == ""
        else:
            assert printed.out == "" and printed.err.count("\n") == 1
            assert printed.err.startswith("experiments.benchmark: no command given")


def test_a_command_loads_only_what_it_needs() -> None:
    code = """
import sys
from experiments.benchmark import main
try:
    main(["data", "--help"])
except SystemExit:
    print(*sorted(name for name in sys.modules if name.startswith("tools.")))
"""
    root = Path(benchmark.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert (
        run.stdout.splitlines()[-1]
        == "experiments.benchmark experiments.benchmark_data experiments.measure"
    )


# --- memory of loading processes ---


def growth_in_a_fork(read: Callable[[], None]) -> int:
    """Bytes by which a forked child's private memory grows while it calls `read`."""

    def private() -> int:
        found = re.findall(r"^Private_(?:Dirty|Clean): +(\d+) kB", SMAPS.read_text(), re.MULTILINE)
        assert len(found) == 2
        return 1024 * sum(map(int, found))

    private()  # what the first call imports and compiles is the parent's
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:  # whatever happens, the child never returns into pytest
            before = private()
            read()
            os.write(writer, str(private() - before).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        grown = file.read()
    os.waitpid(child, 0)
    return int(grown)  # fails where the child wrote nothing


@pytest.mark.skipif(not SMAPS.exists(), reason="the kernel does not tell private memory")
def test_a_worker_does_not_copy_the_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    num_images, num_boxes = 20_000, 150_000
    owners, boxes = (
        rng.integers(num_images, size=num_boxes).tolist(),
        rng.uniform(1, 200, (num_boxes, 4)).tolist(),
    )
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480}
        for i in range(num_images)
    ]
    annotations = [
        {"id": i, "image_id": owner, "category_id": 1, "bbox": box}
        for i, (owner, box) in enumerate(zip(owners, boxes, strict=True))
    ]
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    dataset = CocoDataset(tmp_path / "labels.json", tmp_path)
    assert len(dataset) == num_images and dataset.objects_per_image.sum() == num_boxes
    rows = rng.permutation(num_images)[:2000].tolist()
    of_image: dict[int, list[dict]] = {}
    for annotation in annotations:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    del images, annotations, coco, owners, boxes

    def read_targets() -> None:
        for row in rows:
            dataset.target(row)

    def read_dicts() -> None:
        for row in rows:
            [list(annotation["bbox"]) for annotation in of_image.get(row, [])]

    # A collection would touch every object of this process. The dicts show that the measurement can tell.
    gc.disable()
    try:
        assert growth_in_a_fork(read_targets) <= 10_000_000 < growth_in_a_fork(read_dicts)
    finally:
        gc.enable()

"""Speed, measured on this machine: `python -m tools.benchmark COMMAND`, the first word being what to measure.

data    images/s of decoding and augmenting at the recipe's 480-800/1333, beside the same transforms on PIL images, and
        of a whole loader at several numbers of workers. The pictures are made here, or those of --train-json.

Out: a Markdown table on the terminal, and one line of JSON added to --output.

The variants of a command take turns, on the same images with the same random draws: what else the machine does in the
meantime slows them alike. Figures are medians of the repeats. Files come from the page cache rather than the disk.
"""

import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageDraw, features
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from config import Config, UserError, parse_args, run_main
from data import CocoDataset, Target, make_dataset, usable_workers
from distributed import Reseeded, make_loader

Row = dict[str, Any]  # one line of a table: variant, workers, images_per_second, min, max, per_worker


def measure(variants: dict[tuple[str, int], Callable[[], int]], repeats: int) -> list[Row]:
    """Images/s of every variant, by its name and number of workers; it returns how many images it went through."""
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in variants}
    for _ in range(1 + repeats):
        for key, run in variants.items():
            start = time.perf_counter()
            rates[key].append(run() / (time.perf_counter() - start))
    rows = []
    for (name, workers), (_, *found) in rates.items():  # the first one is the warm-up
        median, spread = float(np.median(found)), {"min": min(found), "max": max(found)}
        speed = {"images_per_second": median, **spread, "per_worker": median / max(1, workers)}
        rows.append({"variant": name, "workers": workers, **speed})
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Markdown, one decimal."""
    head = ["| variant | workers | images/s, median | min – max | images/s per worker |", "|---|---:|---:|---:|---:|"]
    line = "| {variant} | {workers} | {images_per_second:.1f} | {min:.1f} – {max:.1f} | {per_worker:.1f} |"
    return "\n".join([*head, *(line.format(**row) for row in rows)])


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores that this process may use, versions."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone has it
    name = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {
        "device": name[1] if name else platform.processor() or platform.machine(),
        "cores": usable_workers(os.cpu_count() or 1),
        "Python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, torchvision, PIL)},
        "libjpeg-turbo": features.version("libjpeg_turbo"),
    }


def report(output: Path, command: str, used: dict[str, Any], rows: list[Row], **figures: float) -> None:
    """Prints what was measured, and adds it as a line to the file of all measurements."""
    conditions = {**machine(), **used}
    print(", ".join(f"{name} {value}" for name, value in conditions.items()) + f"\n\n{format_table(rows)}\n")
    line = {"command": command, "time": time.strftime("%FT%TZ", time.gmtime()), **conditions, "rows": rows, **figures}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(*(f"{name}: {value:.2f}" for name, value in figures.items()), f"written: a line of {output}", sep="\n")


# --- data ---


def make_pictures(folder: Path, count: int, seed: int, width: int = 640, height: int = 480) -> tuple[str, str]:
    """Writes JPEGs as dear to decode as photographs of about 100 kB: smooth noise, objects with sharp edges, grain.

    Returns a JSON file in COCO's format, with a box for every object, and the folder of the pictures.
    """
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        pixels = np.full((height, width, 3), 128.0)
        for cells in (4, 16, 64, 192):  # across the picture; the finer, the fainter, as in nature
            noise = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
            pixels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) - 128.0) * 2 / cells**0.5
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(1, 13))):
            (x, y), (w, h) = rng.uniform(0, 0.8, 2) * (width, height), rng.uniform(0.03, 0.2, 2) * (width, height)
            outline = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            outline((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
            box = {"image_id": image_id, "category_id": 1, "bbox": [x, y, w, h]}
            annotations.append({"id": len(annotations) + 1, **box})
        grain = rng.normal(0, rng.uniform(3, 6), (height, width, 1))
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{image_id}.jpg", quality=90)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": width, "height": height})
    coco, file = {"images": images, "annotations": annotations}, folder / "labels.json"
    file.write_text(json.dumps({**coco, "categories": [{"id": 1, "name": "object"}]}))
    return str(file), str(folder)


class PilDataset(Dataset):
    """A `CocoDataset`'s pictures, boxes and transforms, the pictures being PIL images until the very end."""

    def __init__(self, dataset: CocoDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        with Image.open(os.path.join(self.dataset.image_dir, self.dataset.file_names[index])) as file:
            picture = file.convert("RGB")
        picture, target = self.dataset.transforms(picture, self.dataset.target(index))
        return F.pil_to_tensor(picture), target  # (3, H, W) uint8


@dataclass(frozen=True)
class DataArgs:
    train_json: str | None = None  # annotations (COCO format) of pictures to load; by default pictures are made
    train_images: str | None = None  # folder that the file names in --train-json start from
    images: int = 64  # pictures in a repeat, per worker; of --train-json at most so many, evenly spread over the file
    repeats: int = 9  # measurements of every variant
    workers: tuple[int, ...] = (0, 1, 2)  # numbers of workers of the loader, at most the processors there are
    batch_size: int = 16  # images in a batch of the loader
    seed: int = 0  # of the pictures and of the augmentation
    output: Path = Path("runs/benchmark.jsonl")  # file that a line is added to


def measure_data(dataset: CocoDataset, indices: Sequence[int], args: DataArgs) -> list[Row]:
    """Decoding and augmenting in this process, ours and on PIL images, then whole loaders."""
    keys = [(index, args.seed + i) for i, index in enumerate(indices)]  # (index, augmentation seed)

    def alone(items: Dataset) -> Callable[[], int]:
        return lambda: sum(len(items[key][0]) == 3 for key in keys)  # 3 channels: every item is an image

    def loader(workers: int) -> Callable[[], int]:
        many = keys * max(1, workers)  # every worker gets as much as one alone
        batches = [many[i : i + args.batch_size] for i in range(0, len(many), args.batch_size)]
        loaded = make_loader(dataset, batches, workers, reseeded=True)
        return lambda: sum(len(images) for images, _ in loaded)

    variants = {("ours", 0): alone(Reseeded(dataset)), ("PIL", 0): alone(Reseeded(PilDataset(dataset)))}
    variants |= {("ours, loader", n): loader(n) for n in sorted({usable_workers(n) for n in args.workers})}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's worker
    rows = measure(variants, args.repeats)
    torch.set_num_threads(threads)
    return rows


def benchmark_data(argv: Sequence[str]) -> None:
    """The command `data`."""
    args = parse_args(argv, DataArgs, "python -m tools.benchmark data", "Images/s of decoding and augmenting.")
    if min(args.images, args.repeats, args.batch_size) < 1 or min((args.seed, *args.workers)) < 0:
        raise UserError("data: --images, --repeats and --batch-size are at least 1, --workers and --seed at least 0")
    with tempfile.TemporaryDirectory() as folder:
        given = args.train_json, args.train_images
        files = make_pictures(Path(folder), args.images, args.seed) if given == (None, None) else given
        config = Config(train_json=files[0], train_images=files[1])
        dataset = make_dataset(config, "train")
        indices = np.linspace(0, len(dataset) - 1, min(args.images, len(dataset))).round().astype(int).tolist()
        kilobytes = [os.path.getsize(os.path.join(files[1], dataset.file_names[i])) / 1000 for i in indices]
        rows = measure_data(dataset, indices, args)
    height, width = np.median(dataset.sizes_hw[indices], axis=0).astype(int)
    sizes = f"{min(config.min_sizes)}-{max(config.min_sizes)}/{config.max_size}"
    resolution = f"{width}×{height} px ({np.mean(kilobytes):.0f} kB) to {sizes}"
    used = {"resolution": resolution, "images": len(indices), "repeats": args.repeats}
    ratio = rows[0]["images_per_second"] / rows[1]["images_per_second"]
    report(args.output, "data", used, rows, ours_over_pil=ratio)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"data": benchmark_data}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command in ("-h", "--help"):
        return print(f"{__doc__}\n`python -m tools.benchmark COMMAND --help` lists a command's flags.")
    if command not in COMMANDS:
        wrong = f"no such command as {command}" if command else "no command given"
        raise UserError(f"{wrong}; commands: {', '.join(COMMANDS)} (python -m tools.benchmark --help)")
    COMMANDS[command](rest)


if __name__ == "__main__":
    sys.exit(run_main(main, "tools.benchmark"))

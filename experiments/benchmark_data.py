"""`python -m experiments.benchmark data`: images/s of decoding and augmenting at the recipe's 480-800/1333.

Beside it the same transforms on PIL images, and a whole loader at several numbers of workers. The pictures are made
here, or those of --train-json. Files come from the page cache rather than the disk.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, features
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from config import Config
from data import CocoDataset, Target, make_dataset
from experiments.measure import Row, report, take_turns
from support.cli import parse_args
from support.errors import UserError
from support.loader import Reseeded, make_loader, usable_workers

COLUMNS = {
    "variant": "{variant}",
    "workers": "{workers:d}",
    "images/s, median": "{images_per_second:.1f}",
    "min – max": "{min:.1f} – {max:.1f}",
    "images/s per worker": "{per_worker:.1f}",
}


def measure(variants: dict[tuple[str, int], Callable[[], int]], repeats: int) -> list[Row]:
    """Images/s of every variant, by its name and number of workers; it returns how many images it went through."""
    rows = []
    for (name, workers), turns in take_turns(variants, repeats).items():
        rates = [images / seconds for images, seconds in turns]
        median, spread = statistics.median(rates), {"min": min(rates), "max": max(rates)}
        speed = {"images_per_second": median, **spread, "per_worker": median / max(1, workers)}
        rows.append({"variant": name, "workers": workers, **speed})
    return rows


def make_pictures(
    folder: Path, count: int, seed: int, width: int = 640, height: int = 480
) -> tuple[str, str]:
    """Writes JPEGs as dear to decode as photographs of about 100 kB: smooth noise, objects with sharp edges, grain.

    Returns a JSON file in COCO's format, with a box for every object, and the folder of the pictures.
    """
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        pixels = np.full((height, width, 3), 128.0)
        for cells in (4, 16, 64, 192):  # across the picture; the finer, the fainter, as in nature
            noise = Image.fromarray(
                rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            )
            pixels += (
                (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) - 128.0)
                * 2
                / cells**0.5
            )
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(int(rng.integers(1, 13))):
            (x, y), (w, h) = (
                rng.uniform(0, 0.8, 2) * (width, height),
                rng.uniform(0.03, 0.2, 2) * (width, height),
            )
            outline = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            outline((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
            box = {"image_id": image_id, "category_id": 1, "bbox": [x, y, w, h]}
            annotations.append({"id": len(annotations) + 1, **box})
        grain = rng.normal(0, rng.uniform(3, 6), (height, width, 1))
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{image_id}.jpg", quality=90
        )
        images.append(
            {"id": image_id, "file_name": f"{image_id}.jpg", "width": width, "height": height}
        )
    coco, file = {"images": images, "annotations": annotations}, folder / "labels.json"
    file.write_text(json.dumps({**coco, "categories": [{"id": 1, "name": "object"}]}))
    return str(file), str(folder)


class PilDataset(Dataset):
    """A `CocoDataset`'s pictures, boxes and transforms, the pictures being PIL images until the very end."""

    def __init__(self, dataset: CocoDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        with Image.open(
            os.path.join(self.dataset.image_dir, self.dataset.file_names[index])
        ) as file:
            picture = file.convert("RGB")
        picture, target = self.dataset.transforms(picture, self.dataset.target(index))
        return F.pil_to_tensor(picture), target  # (3, H, W) uint8


@dataclass(frozen=True)
class DataArgs:
    train_json: str | None = (
        None  # annotations (COCO format) of pictures to load; by default pictures are made
    )
    train_images: str | None = None  # folder that the file names in --train-json start from
    images: int = 64  # pictures in a repeat, per worker; of --train-json at most so many, evenly spread over the file
    repeats: int = 9  # measurements of every variant
    workers: tuple[int, ...] = (
        0,
        1,
        2,
    )  # numbers of workers of the loader, at most the processors there are
    batch_size: int = 16  # images in a batch of the loader
    seed: int = 0  # of the pictures and of the augmentation
    output: Path = Path("runs/benchmark.jsonl")  # file that a line is added to


def measure_data(dataset: CocoDataset, indices: Sequence[int], args: DataArgs) -> list[Row]:
    """Decoding and augmenting in this process, ours and on PIL images, then whole loaders."""
    keys = [(index, args.seed + i) for i, index in enumerate(indices)]  # (index, augmentation seed)

    def alone(items: Dataset) -> Callable[[], int]:
        return lambda: sum(
            len(items[key][0]) == 3 for key in keys
        )  # 3 channels: every item is an image

    def loader(workers: int) -> Callable[[], int]:
        many = keys * max(1, workers)  # every worker gets as much as one alone
        batches = [many[i : i + args.batch_size] for i in range(0, len(many), args.batch_size)]
        loaded = make_loader(dataset, batches, workers, reseeded=True)
        return lambda: sum(len(images) for images, _ in loaded)

    variants = {
        ("ours", 0): alone(Reseeded(dataset)),
        ("PIL", 0): alone(Reseeded(PilDataset(dataset))),
    }
    variants |= {
        ("ours, loader", n): loader(n) for n in sorted({usable_workers(n) for n in args.workers})
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's worker
    rows = measure(variants, args.repeats)
    torch.set_num_threads(threads)
    return rows


def main(argv: Sequence[str]) -> None:
    """The command `data`; a user's mistake raises `UserError`."""
    args = parse_args(
        argv,
        DataArgs,
        "python -m experiments.benchmark data",
        "Images/s of decoding and augmenting.",
    )
    if min(args.images, args.repeats, args.batch_size) < 1 or min((args.seed, *args.workers)) < 0:
        raise UserError(
            "data: --images, --repeats and --batch-size are at least 1, --workers and --seed at least 0"
        )
    with tempfile.TemporaryDirectory() as folder:
        given = args.train_json, args.train_images
        files = (
            make_pictures(Path(folder), args.images, args.seed) if given == (None, None) else given
        )
        config = Config(train_json=files[0], train_images=files[1])
        dataset = make_dataset(config, "train")
        indices = (
            np.linspace(0, len(dataset) - 1, min(args.images, len(dataset)))
            .round()
            .astype(int)
            .tolist()
        )
        kilobytes = [
            os.path.getsize(os.path.join(files[1], dataset.file_names[i])) / 1000 for i in indices
        ]
        rows = measure_data(dataset, indices, args)
    height, width = np.median(dataset.sizes_hw[indices], axis=0).astype(int)
    sizes = f"{min(config.min_sizes)}-{max(config.min_sizes)}/{config.max_size}"
    resolution = f"{width}×{height} px ({np.mean(kilobytes):.0f} kB) to {sizes}"
    libraries = {"PIL": PIL.__version__, "libjpeg-turbo": features.version("libjpeg_turbo")}
    used = {**libraries, "resolution": resolution, "images": len(indices), "repeats": args.repeats}
    ratio = rows[0]["images_per_second"] / rows[1]["images_per_second"]
    report(args.output, "data", used, rows, COLUMNS, ours_over_pil=ratio)

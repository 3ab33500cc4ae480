"""Fixtures that several files share: the expensive ones are made once a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config import PRESETS, Config

# Small enough for a step in milliseconds; B, N, K, C, S are all different wherever a test chooses them.
TINY = replace(
    PRESETS["shapes"],
    num_proposals=7,
    num_stages=2,
    hidden_dim=16,
    dynamic_dim=4,
    num_heads=2,
    ffn_dim=32,
    roi_size=3,
    epochs=1,
    shapes_train=8,
    shapes_val=4,
    batch_size=4,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Tiny models are faster with one thread, and equal to the last bit to the subprocesses that also have one.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def tiny_config() -> Config:
    return TINY


@pytest.fixture(scope="session")
def tiny_flags() -> list[str]:
    """The command line of `TINY`."""
    default, flags = PRESETS["shapes"], ["--preset", "shapes", "--device", "cpu"]
    for name, value in TINY.to_dict().items():
        if value != getattr(default, name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def objects(
    count: int, num_classes: int, width: float, height: float, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A target with `count` random objects in an image of width × height pixels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * torch.tensor(
        [width - 8, height - 8]
    )
    corners[:, 1] += 8  # at least 8 pixels a side
    return {
        "boxes": corners.flatten(1).float(),
        "labels": torch.randint(num_classes, (count,), generator=generator),
    }


CocoFactory = Callable[..., tuple[Path, Path]]


@pytest.fixture
def make_coco(tmp_path: Path) -> CocoFactory:
    """Writes a small COCO data set of coloured rectangles; returns the JSON and the image folder.

    `edit` gets the dict before it is written, to break it.
    """

    def make(
        name: str = "train",
        num_images: int = 4,
        edit: Callable[[dict[str, Any]], None] = lambda coco: None,
        categories: dict[int, str] | None = None,
        size: tuple[int, int] = (64, 48),
    ) -> tuple[Path, Path]:
        categories = {7: "cat", -3: "dog", 1000: "cow"} if categories is None else categories
        folder = tmp_path / f"{name}_images"
        folder.mkdir()
        rng = np.random.default_rng(len(name))
        width, height = size
        coco: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": n} for i, n in categories.items()],
        }
        for image_id in range(1, num_images + 1):
            pixels = np.full((height, width, 3), 90, dtype=np.uint8)
            for k in range(2):
                x, y = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
                w, h = int(rng.integers(8, width // 2)), int(rng.integers(8, height // 2))
                pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3)
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": list(categories)[(image_id + k) % len(categories)],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(pixels).save(folder / f"{image_id}.jpg", quality=95)
            coco["images"].append(
                {"id": image_id, "file_name": f"{image_id}.jpg", "width": width, "height": height}
            )
        edit(coco)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(coco))
        return path, folder

    return make

"""What several test files share; the expensive fixtures are made once per run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from config import PRESETS, Config
from model import build_model
from shapes import ShapesDataset
from support.distributed import World
from train import Training, share_gradients, start_training, train_step

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests/reference"
CPU = World(torch.device("cpu"))

# Small enough for a step in milliseconds. B, N, K, C and S differ wherever a test chooses them.
TINY = replace(
    PRESETS["shapes"],
    test_size=96,
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


# The files with the longest tests, many of them several processes each. They go first, so that the
# workers of pytest-xdist end together.
LONGEST = ("test_train.py", "test_export.py", "test_readme.py", "test_reference.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Tiny models are faster with one thread, and then they are equal, to the last bit, to those of
    # the subprocesses, which have one thread too.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _usual_signals() -> Iterator[None]:
    """Every test starts with the handlers of a terminal, and leaves none of its own behind.

    A shell that starts the tests in the background ignores SIGINT, and processes inherit that.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):
        usual[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_flags() -> list[str]:
    """The command line of `TINY`."""
    default, flags = PRESETS["shapes"], ["--preset", "shapes", "--device", "cpu"]
    for name, value in TINY.to_dict().items():
        if value != getattr(default, name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def data_flags(train_set: tuple[Path, Path], val_set: tuple[Path, Path] | None = None) -> list[str]:
    """The flags of data sets that `make_coco` has written."""
    flags = ["--train-json", str(train_set[0]), "--train-images", str(train_set[1])]
    if val_set is not None:
        flags += ["--val-json", str(val_set[0]), "--val-images", str(val_set[1])]
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


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random pixels (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def predictions(S: int, B: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits (S, B, N, K), boxes_px (S, B, N, 4), and whwh_px (B, 4) of different sizes."""
    whwh_px = torch.tensor([[100.0 + 30 * b, 80.0 - 10 * b] * 2 for b in range(B)])
    boxes_px = torch.empty(S, B, N, 4)
    for s in range(S):
        for b in range(B):
            width, height = whwh_px[b, :2].tolist()
            boxes_px[s, b] = objects(N, K, width, height, seed=s * B + b)["boxes"]
    return torch.randn(S, B, N, K) * 2, boxes_px, whwh_px


class AlmostRight(nn.Module):
    """Recognises each image of Shapes by its pixels and answers with its boxes, slightly moved."""

    def __init__(self) -> None:
        super().__init__()
        dataset = ShapesDataset("demo", "val", 11)
        self.known = {dataset[i][0].sum().item(): dataset[i][1] for i in range(11)}

    def forward(self, images: list[torch.Tensor]) -> list[dict]:
        found = []
        for image in images:
            target = self.known[image.sum().item()]
            boxes = target["boxes"].as_subclass(torch.Tensor).clone()
            boxes[:, 2] += torch.arange(len(boxes)) + target["image_id"] % 3
            found.append({"boxes": boxes, "labels": target["labels"], "scores": boxes[:, 0] / 96})
        return found


def new_training(config: Config, world: World = CPU, steps_per_epoch: int = 10) -> Training:
    """A model of `config` and its optimizer, ready for `take_step`."""
    training = start_training(config, world, ShapesDataset("demo", "train", 4), steps_per_epoch)
    share_gradients(training)
    training.model.train()
    return training


def take_step(
    training: Training, images: list[torch.Tensor], targets: list[dict], num_objects: float
) -> dict[str, float]:
    """A step as the loop of train.py takes it: its losses, their sum `loss`, and `grad_norm`."""
    values = train_step(training, images, targets, num_objects)
    training.step += 1
    return {"loss": sum(v for k, v in values.items() if k.startswith("loss")), **values}


def python(*args: str, **kwargs: Any) -> subprocess.CompletedProcess:
    """Another interpreter with one thread, which finds our modules and those of the tests."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **kwargs)


def no_training(*_: object) -> int:
    """In the place of `train.run`."""
    raise AssertionError("a training was started")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are served."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def torchrun(*args: str) -> subprocess.CompletedProcess:
    """A real torchrun with two processes."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args)


def tiny_checkpoint(**changes: Any) -> dict[str, Any]:
    """A checkpoint of a new model of `TINY`."""
    contents = {"model": build_model(TINY).state_dict(), "config": TINY.to_dict()}
    return {**contents, "class_names": ["a", "b", "c"], "category_ids": [3, 1, 2], **changes}


def draw_reference_tensor(key: str, shape: list[int], seed: int) -> torch.Tensor:
    """A tensor of the reference cases, by the first line that fits in reference/README.md."""
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        values = rng.uniform(0.8, 1.2, shape)
    elif key.endswith("running_mean"):
        values = rng.normal(0, 0.1, shape)
    elif key.endswith(("init_proposal_boxes.weight", "init_proposal_bboxes.weight")):
        centres = rng.uniform(0.3, 0.7, (shape[0], 2))
        values = np.concatenate([centres, rng.uniform(0.2, 0.9, (shape[0], 2))], axis=1)
    elif key.endswith("init_proposal_features.weight"):
        values = rng.normal(0, 1, shape)
    elif key.endswith(("bboxes_delta.weight", "fc_reg.weight")):
        values = rng.normal(0, 0.02, shape)
    elif key.endswith(("class_logits.bias", "fc_cls.bias")):
        values = rng.normal(-4.6, 0.05, shape)
    elif len(shape) == 1 and key.endswith("weight"):
        values = rng.uniform(0.8, 1.2, shape)
    elif len(shape) == 1:
        values = rng.normal(0, 0.05, shape)
    else:
        values = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
    return torch.from_numpy(values.astype(np.float32))


def reference_weights(case: str) -> dict[str, torch.Tensor]:
    """The weights of a case in tests/reference, in the names of the implementation it is from."""
    implementation = "mmdet" if case.startswith("mmdet") else "official"
    keys = json.loads((REFERENCE / f"{implementation}_r50_100.keys.json").read_text())
    seed = json.loads((REFERENCE / f"{case}.json").read_text())["seed"]
    return {key: draw_reference_tensor(key, shape, seed) for key, shape in keys.items()}


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

"""Evaluation: COCO's AP, by faster-coco-eval or else pycocotools, and images per second.

In:  a checkpoint, and a data set in COCO's format (by default the validation data of its training).
Out: the table on the terminal, `OUTPUT/metrics.json` (AP as a fraction of 1) and
     `OUTPUT/detections.json` (COCO's results format).

The ground truth is the annotation file, with crowds and with images that have no objects. A
number that is not defined, such as APs where there is no small object, is −1, as in pycocotools.

With `torchrun` the processes share the images. Images are batched only if they are padded to the
same size. Padding is not masked (see model.py), so any other batch would change the detections.

Shapes: n detections in an image, K classes. T, R, A: the thresholds of IoU, the levels of recall
and the ranges of object areas over which COCO averages.
"""

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from config import PRESETS, PresetName
from data import Target, notes_on_data, validation_set
from model import load_model
from support.cli import parse_args, run_main
from support.devices import AMP_DTYPES, choose_threads, describe
from support.distributed import World, join_world
from support.errors import UserError
from support.files import make_folder, write_json
from support.loader import make_loader

try:  # pycocotools' numbers (tests/test_coco_metrics.py) in a sixth of its time
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:
    from pycocotools.cocoeval import COCOeval

# Not counted in the speed: the first calls allocate memory and choose algorithms.
WARMUP_BATCHES = 3


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    world: World,
    batch_size: int = 1,
    workers: int = 0,
    amp: str = "off",
    max_dets: int = 100,
    image_bytes: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs the model over a data set and measures it; all processes have to call this.

    Args:
        model: with the interface of torchvision's detectors, on `world.device`. It is put into
            eval mode.
        dataset: a `CocoDataset` or `ShapesDataset` with evaluation transforms.
        world: the processes. Each takes its share of the batches, so each image is seen once.
        batch_size: at most so many images at a time, all of one size.
        workers: processes that load images.
        amp: "off", "bf16" or "fp16".
        max_dets: see `coco_metrics`.
        image_bytes: the most that an image takes; see `make_loader`.

    Returns:
        The metrics: those of `coco_metrics`, `images` (how many), `max_dets` and `speed` (`fps`,
        `device`, `dtype`, `resolution`, `batch_size`, `processes`). And the detections in COCO's
        results format. All processes get all of it.

    Raises:
        UserError: an image cannot be loaded. An AP of the others would not be the data set's.
    """
    batches = same_padding_batches(dataset, batch_size)[world.rank :: world.size]
    loader = make_loader(dataset, batches, workers, batch_bytes=batch_size * image_bytes)
    model.eval()

    records: list[dict[str, Any]] = []
    rates: list[float] = []  # images per second, one per batch
    sizes_hw: list[tuple[int, int]] = []  # of the images as the model saw them
    # None: only on a terminal. Standard error itself is None if it is closed.
    is_hidden = None if world.is_main and sys.stderr else True
    for images, targets in tqdm(loader, "evaluate", unit="batch", disable=is_hidden, leave=False):
        start = time.perf_counter()
        with torch.autocast(world.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            found = model([image.to(world.device, non_blocking=True) for image in images])
        found = [{name: value.cpu() for name, value in one.items()} for one in found]  # and waits
        rates.append(len(images) / (time.perf_counter() - start))
        for image, target, detections in zip(images, targets, found, strict=True):
            resized_hw = tuple(image.shape[-2:])
            records += coco_results(detections, target, resized_hw, dataset.category_ids)
            sizes_hw.append(resized_hw)

    parts = world.gather((records, rates[WARMUP_BATCHES:] or rates, sizes_hw))
    records, rates, sizes_hw = ([x for part in parts for x in part[i]] for i in range(3))
    metrics = coco_metrics(dataset.coco(), records, max_dets) if world.is_main else None
    metrics = world.gather(metrics)[0]

    height, width = sorted(sizes_hw)[len(sizes_hw) // 2]
    metrics["speed"] = {
        # The median over the batches: a short hiccup of a shared machine does not change it.
        "fps": statistics.median(rates) * world.size,
        "device": describe(world.device),
        "dtype": str(AMP_DTYPES[amp]).removeprefix("torch."),
        "resolution": f"{height}×{width}",
        "batch_size": batch_size,
        "processes": world.size,
    }
    return metrics | {"images": len(sizes_hw), "max_dets": max_dets}, records


# --- from a data set to detections ---


def same_padding_batches(dataset: Dataset, batch_size: int) -> list[list[int]]:
    """The indices of a data set in batches of images that are padded to the same size.

    The evaluation transforms compute the new size from the old one alone, so images of equal size
    go together.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(dataset.sizes_hw.tolist()):
        groups.setdefault((height, width), []).append(index)

    batches = []
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            batches.append(group[first : first + batch_size])
    return batches


def coco_results(
    found: dict[str, Tensor],
    target: Target,
    resized_hw: tuple[int, int],
    category_ids: Sequence[int | None],
) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format.

    Args:
        found: in pixels of the resized image, on the CPU.
        target: says which image it is, and the size of its file.
        resized_hw: what the transforms made of it.
        category_ids: K ids, None for a class that the data set does not have: detections of it are
            left out.

    Returns:
        One dict per detection: image_id, category_id, bbox (xywh in pixels of the file), score.
    """
    height, width = target["size_hw"]
    scale = [width / resized_hw[1], height / resized_hw[0]] * 2
    boxes = found["boxes"] * torch.tensor(scale, dtype=torch.float32)  # (n, 4)
    boxes[:, 2:] -= boxes[:, :2]  # xyxy -> xywh

    records = []
    rows = (found["labels"].tolist(), boxes.tolist(), found["scores"].tolist())
    for label, box, score in zip(*rows, strict=True):
        if (category_id := category_ids[label]) is not None:
            records.append(
                {
                    "image_id": target["image_id"],
                    "category_id": category_id,
                    "bbox": box,
                    "score": score,
                }
            )
    return records


# --- from detections to AP ---


def coco_metrics(
    ground_truth: COCO,
    detections: list[dict[str, Any]],
    max_dets: int = 100,
) -> dict[str, Any]:
    """COCO's metrics of detections in COCO's results format.

    Args:
        ground_truth: the annotations.
        detections: dicts of image_id, category_id, bbox (xywh px), score; may be empty.
        max_dets: how many detections per image and class count, the best ones, as pycocotools has
            it.

    Returns:
        AP, AP50, AP75, APs, APm, APl and AR (at max_dets) as fractions, −1 where not defined;
        `per_class`: name -> AP.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if detections:
            found = ground_truth.loadRes([dict(detection) for detection in detections])
        else:  # what `loadRes` would give, if it did not fail
            found = COCO()
            found.dataset = {**ground_truth.dataset, "annotations": []}
            found.createIndex()
        run = COCOeval(ground_truth, found, "bbox")
        run.params.maxDets = [max_dets]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., -1]  # (T, R, K, A)
    recall = run.eval["recall"][..., -1]  # (T, K, A)

    areas = list(run.params.areaRngLbl)
    of_all_areas = precision[..., areas.index("all")]  # (T, R, K)
    metrics = {
        "AP": _mean(of_all_areas),
        "AP50": _mean(of_all_areas[np.isclose(run.params.iouThrs, 0.5)]),
        "AP75": _mean(of_all_areas[np.isclose(run.params.iouThrs, 0.75)]),
    }
    for area in ("small", "medium", "large"):
        metrics[f"AP{area[0]}"] = _mean(precision[..., areas.index(area)])
    metrics["AR"] = _mean(recall[..., areas.index("all")])
    metrics["per_class"] = {
        ground_truth.cats[category_id]["name"]: _mean(of_all_areas[:, :, k])
        for k, category_id in enumerate(run.params.catIds)
    }
    return metrics


def _mean(values: np.ndarray) -> float:
    """Over those that are defined; −1 if none is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def percent(value: float) -> str:
    """A fraction of 1 in percent; a dash if it is not defined (−1)."""
    return "    –" if value < 0 else f"{100 * value:5.1f}"


def format_table(metrics: dict[str, Any], per_class: bool = False) -> str:
    """The columns of the paper's Table 1 in percent, and AR; a dash where one is not defined."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
    speed = metrics["speed"]
    lines = [
        "  ".join(f"{name:>5}" for name in names),
        "  ".join(percent(metrics[name]) for name in names),
        f"{metrics['images']} images, {metrics['max_dets']} detections per image and class; "
        f"{speed['fps']:.1f} images/s ({speed['device']}, {speed['dtype']}, {speed['resolution']}, "
        f"batch {speed['batch_size']})",
    ]
    if per_class:
        width = max(len(name) for name in metrics["per_class"])
        lines.append("")
        lines += [f"{name:<{width}}  {percent(ap)}" for name, ap in metrics["per_class"].items()]
    return "\n".join(lines)


# --- command line ---


@dataclass(frozen=True)
class EvaluateArgs:
    weights: Path  # checkpoint to evaluate
    preset: PresetName | None = None  # of weights that were saved as a bare state dict
    val_json: str | None = None  # annotations (COCO format); by default those of the training run
    val_images: str | None = None  # folder that the file names in --val-json are relative to
    output: Path = Path("runs/evaluate")  # folder for metrics.json and detections.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    batch_size: int = 1  # images at a time, of equal size
    workers: int = 4  # processes that load images; 0 loads them in the main process
    max_dets: int | None = None  # detections per image and class that count; by default as trained
    test_size: int | None = None  # pixels: shortest side of the images; by default the checkpoint's
    max_size: int | None = None  # pixels: limit of the longest side; by default the checkpoint's
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    per_class: bool = False  # print the AP of every class
    # Leave out the objects of classes that the model does not have; otherwise they are an error.
    ignore_new_classes: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    description = "Measures COCO AP and images per second of a checkpoint."
    args = parse_args(argv, EvaluateArgs, "evaluate.py", description)
    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size should be at least 1, and --workers at least 0")
    with join_world(args.device) as world:
        if world.is_main:
            make_folder(args.output)
        model, checkpoint = load_model(args.weights, world.device, PRESETS.get(args.preset))
        names = ("val_json", "val_images", "test_size", "max_size", "max_dets")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        dataset = validation_set(checkpoint, args.ignore_new_classes, **given)
        config = replace(checkpoint["config"], **given)
        choose_threads(world.device, config.backbone, args.amp)
        metrics, detections = evaluate(
            model.for_inference(),
            dataset,
            world,
            batch_size=args.batch_size,
            workers=args.workers,
            amp=args.amp,
            max_dets=config.max_dets,
            image_bytes=3 * config.eval_size * config.max_size,
        )
        if not world.is_main:
            return
        for note in (*dataset.notes, *notes_on_data(dataset, config)):
            print(f"note: {note}")
        print(format_table(metrics, args.per_class))
        write_json(args.output / "detections.json", detections)
        write_json(args.output / "metrics.json", metrics, indent=2)
        print(f"written: {args.output / 'metrics.json'}, {args.output / 'detections.json'}")


if __name__ == "__main__":
    sys.exit(run_main(main, "evaluate.py"))

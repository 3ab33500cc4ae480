"""Evaluation: detections -> COCO's AP table (pycocotools) and frames per second.

In:  a checkpoint, and a data set in COCO's format (by default the validation data the model was trained with).
Out: the table on the terminal, `OUTPUT/metrics.json` (AP as a fraction of 1), `OUTPUT/detections.json` (COCO results).

The ground truth is the annotation file itself, crowds and images without objects included. A figure that is not
defined, such as APs where there is no small object, is −1, as in pycocotools.

Shapes: n detections of one image.
"""

import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data import validation_set
from support.checkpoint import load_model
from support.cli import AMP_DTYPES, parse_args, run_main
from support.distributed import World, join_world
from support.errors import UserError
from support.loader import make_loader

WARMUP_BATCHES = 3  # not counted in the FPS: the first calls allocate memory and choose algorithms


def same_padding_batches(dataset: Dataset, batch_size: int) -> list[list[int]]:
    """Indices of the data set in batches of images that are padded to the same size, so that batching changes nothing.

    The size after the evaluation transforms is a function of the size before, so equal sizes are put together.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(dataset.sizes_hw.tolist()):
        groups.setdefault((height, width), []).append(index)
    return [
        group[i : i + batch_size]
        for group in groups.values()
        for i in range(0, len(group), batch_size)
    ]


def _timed(model: nn.Module, batches: Iterator, device: torch.device, amp: str) -> Iterator[tuple]:
    """Yields (targets, detections, images' (h, w), seconds) batch by batch, the device being waited for."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    for images, targets in batches:
        images = [image.to(device, non_blocking=True) for image in images]
        synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            detections = model(images)
        synchronize()
        yield (
            targets,
            detections,
            [tuple(image.shape[-2:]) for image in images],
            time.perf_counter() - start,
        )


@torch.inference_mode()
def detect(
    model: nn.Module,
    dataset: Dataset,
    here: World,
    batch_size: int = 1,
    workers: int = 0,
    amp: str = "off",
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the model over a data set.

    Args:
        model: in torchvision's language; it is put into eval mode and left in the mode it was in.
        dataset: a `CocoDataset` or `ShapesDataset` with evaluation transforms.
        here: the processes that share the images; the model is on `here.device`.
        batch_size: at most so many images at a time, all of one size.
        workers: processes that load images.
        amp: "off", "bf16" or "fp16".
        progress: show a progress bar.

    Returns:
        Detections in COCO's results format (boxes xywh in pixels of the image file), and the speed: `fps`, `device`,
        `dtype`, `resolution` (median, h×w px), `batch_size`, `processes`. Every process takes every
        `here.size`-th batch, so each image is seen exactly once; all processes get all detections.
    """
    was_training = model.training
    model.eval()
    batches = same_padding_batches(dataset, batch_size)[here.rank :: here.size]
    loader = make_loader(dataset, batches, workers)
    results, rates, sizes = [], [], []
    total = sum(map(len, batches))
    # None: no bar where standard error is no terminal
    bar = tqdm(
        total=total,
        desc="evaluate",
        unit="image",
        disable=None if progress and here.is_main else True,
        leave=False,
    )
    for targets, detections, shapes, seconds in _timed(model, iter(loader), here.device, amp):
        bar.update(len(targets))
        rates.append(len(targets) / seconds)
        sizes += shapes
        for target, found, (height, width) in zip(targets, detections, shapes, strict=True):
            original_h, original_w = target["size_hw"]
            scale = torch.tensor(
                [original_w / width, original_h / height] * 2, device=found["boxes"].device
            )
            boxes = found["boxes"] * scale
            boxes[:, 2:] -= boxes[:, :2]  # COCO's boxes are x, y, w, h
            results += [
                {
                    "image_id": target["image_id"],
                    "category_id": dataset.category_ids[label],
                    "bbox": box,
                    "score": score,
                }
                for label, box, score in zip(
                    found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), strict=True
                )
            ]
    bar.close()
    model.train(was_training)
    results, rates, sizes = (
        sum(parts, [])
        for parts in zip(
            *here.gather((results, rates[WARMUP_BATCHES:] or rates, sizes)), strict=True
        )
    )
    middle, device = sorted(sizes)[len(sizes) // 2], here.device
    speed = {
        # The median of the batches' rates: one hiccup of a shared machine does not move it.
        "fps": statistics.median(rates) * here.size,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "dtype": str(AMP_DTYPES[amp]).removeprefix("torch."),
        "resolution": f"{middle[0]}×{middle[1]}",
        "batch_size": batch_size,
        "processes": here.size,
    }
    return results, speed


def coco_metrics(
    ground_truth: COCO, detections: list[dict[str, Any]], max_dets: int = 100
) -> dict[str, Any]:
    """COCO's figures for detections in COCO's results format.

    Args:
        ground_truth: the annotations.
        detections: dicts of image_id, category_id, bbox (xywh px), score; may be empty.
        max_dets: detections an image and class that count, the best ones, as pycocotools has it.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR (at max_dets), as fractions, −1 where not defined; `per_class`: name -> AP.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if detections:
            found = ground_truth.loadRes([dict(detection) for detection in detections])
        else:  # loadRes fails on an empty list
            found = COCO()
            found.dataset = {
                **{key: ground_truth.dataset[key] for key in ("images", "categories")},
                "annotations": [],
            }
            found.createIndex()
        run = COCOeval(ground_truth, found, "bbox")
        run.params.maxDets = [max_dets]
        run.evaluate()
        run.accumulate()
    # precision: (IoU thresholds, recall levels, classes, areas, 1); recall: (IoU thresholds, classes, areas, 1)
    precision, recall = run.eval["precision"][..., -1], run.eval["recall"][..., -1]
    areas, ious = list(run.params.areaRngLbl), run.params.iouThrs

    def mean(values: np.ndarray) -> float:
        defined = values[values > -1]
        return float(defined.mean()) if defined.size else -1.0

    everything = precision[..., areas.index("all")]
    return {
        "AP": mean(everything),
        "AP50": mean(everything[np.isclose(ious, 0.5)]),
        "AP75": mean(everything[np.isclose(ious, 0.75)]),
        **{
            f"AP{area[0]}": mean(precision[..., areas.index(area)])
            for area in ("small", "medium", "large")
        },
        "AR": mean(recall[..., areas.index("all")]),
        "per_class": {
            ground_truth.cats[category]["name"]: mean(everything[:, :, k])
            for k, category in enumerate(run.params.catIds)
        },
    }


def evaluate(
    model: nn.Module, dataset: Dataset, here: World, max_dets: int = 100, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`detect`, then `coco_metrics`: all figures in one dict, and the detections. `options` are those of `detect`.

    All processes have to call this, and all get the same.
    """
    detections, speed = detect(model, dataset, here, **options)
    figures = coco_metrics(dataset.coco(), detections, max_dets) if here.is_main else None
    return {
        **here.gather(figures)[0],
        "speed": speed,
        "images": len(dataset),
        "max_dets": max_dets,
    }, detections


def format_table(metrics: dict[str, Any], per_class: bool = False) -> str:
    """The columns of the paper's Table 1 in percent, and AR; a dash where a figure is not defined."""

    def percent(value: float) -> str:
        return "    –" if value < 0 else f"{100 * value:5.1f}"

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
    speed = metrics["speed"]
    lines = [
        "  ".join(f"{name:>5}" for name in names),
        "  ".join(percent(metrics[name]) for name in names),
        f"{metrics['images']} images, {metrics['max_dets']} detections a class and image; {speed['fps']:.1f} images/s "
        f"({speed['device']}, {speed['dtype']}, {speed['resolution']}, batch {speed['batch_size']})",
    ]
    if per_class:
        width = max(len(name) for name in metrics["per_class"])
        lines += [
            "",
            *(f"{name:<{width}}  {percent(ap)}" for name, ap in metrics["per_class"].items()),
        ]
    return "\n".join(lines)


@dataclass(frozen=True)
class EvaluateArgs:
    weights: Path  # checkpoint to evaluate
    val_json: str | None = None  # annotations (COCO format); by default those of the training run
    val_images: str | None = None  # folder that the file names in --val-json start from
    output: Path = Path("runs/evaluate")  # folder for metrics.json and detections.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    batch_size: int = 1  # images at a time, of equal size
    workers: int = 4  # processes that load images; 0 loads them in the main process
    max_dets: int = 100  # detections an image and class that count (COCO: 100)
    test_size: int | None = (
        None  # pixels: the shortest side of the images; by default that of the checkpoint
    )
    max_size: int | None = (
        None  # pixels: but its longest side never more; by default that of the checkpoint
    )
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    per_class: bool = False  # print the AP of every class


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    args = parse_args(
        argv, EvaluateArgs, "evaluate.py", "COCO AP and frames per second of a checkpoint."
    )
    if min(args.batch_size, args.max_dets) < 1 or args.workers < 0:
        raise UserError(
            "evaluate: --batch-size and --max-dets should be at least 1, --workers at least 0"
        )
    with join_world(args.device) as here:
        args.output.mkdir(parents=True, exist_ok=True)
        model, checkpoint = load_model(args.weights, here.device)
        overrides = {
            name: getattr(args, name)
            for name in ("val_json", "val_images", "test_size", "max_size")
        }
        dataset = validation_set(checkpoint, **overrides)
        metrics, detections = evaluate(
            model.for_inference(),
            dataset,
            here,
            args.max_dets,
            batch_size=args.batch_size,
            workers=args.workers,
            amp=args.amp,
        )
        if here.is_main:
            (args.output / "metrics.json").write_text(
                json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"
            )
            (args.output / "detections.json").write_text(json.dumps(detections) + "\n")
            print(format_table(metrics, args.per_class))
            print(
                "run with the batch norms folded into the convolutions and channels last (`SparseRCNN.for_inference`)"
            )
            print(f"written: {args.output / 'metrics.json'}, {args.output / 'detections.json'}")


if __name__ == "__main__":
    sys.exit(run_main(main, "evaluate.py"))

"""Evaluation: COCO's AP, by pycocotools, and images per second.

In:  a checkpoint, and a data set in COCO's format (by default the validation data of its training).
Out: the table on the terminal, `OUTPUT/metrics.json` (AP as a fraction of 1) and
     `OUTPUT/detections.json` (COCO's results format).

The ground truth is the annotation file itself, with crowds and with images that have no objects. A
number that is not defined, such as APs where there is no small object, is −1, as in pycocotools.

With `torchrun` the processes share the images. Images are batched only if they are padded to the
same size. Padding is not masked (see model.py), so any other batch would change the detections.

Shapes: n detections of an image, K classes. T, R, A: the thresholds of IoU, the levels of recall
and the ranges of object areas over which COCO averages.
"""

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data import Target, validation_set
from support.checkpoint import load_model
from support.cli import parse_args, run_main
from support.devices import AMP_DTYPES, choose_threads, warn_of_slow_bf16
from support.distributed import World, join_world
from support.errors import UserError
from support.loader import make_loader
from support.results import (
    Failure,
    Item,
    attempt,
    describe_signal,
    load_tolerantly,
    make_folder,
    raise_bug,
    signal_of,
    signals_like_ctrl_c,
    write_json,
)

Detections = dict[str, Tensor]  # boxes (n, 4) xyxy px, scores (n,), labels (n,)

# Not counted in the speed: the first calls allocate memory and choose algorithms.
WARMUP_BATCHES = 3


# --- from a data set to detections ---


@dataclass
class Findings:
    """What a pass over a data set has found so far, in one process or, once joined, in all."""

    batch_size: int
    amp: str
    detections: list[dict[str, Any]] = field(default_factory=list)  # COCO's results format
    image_ids: list[int] = field(default_factory=list)  # of the images that were evaluated
    sizes_hw: list[tuple[int, int]] = field(default_factory=list)  # theirs, as the model saw them
    rates: list[float] = field(default_factory=list)  # images per second, one per batch
    failures: list[Failure] = field(default_factory=list)  # images that were skipped, and why
    num_other_classes: int = 0  # detections of classes that the data set does not have
    stopped_by: int | None = None  # the signal that ended the pass early

    def joined(self, world: World) -> "Findings":
        """The findings of all processes; all of them have to call this."""
        joined = Findings(self.batch_size, self.amp)
        for part in world.gather(self):
            joined.detections += part.detections
            joined.image_ids += part.image_ids
            joined.sizes_hw += part.sizes_hw
            joined.rates += part.rates[WARMUP_BATCHES:] or part.rates
            joined.failures += part.failures
            joined.num_other_classes += part.num_other_classes
            joined.stopped_by = joined.stopped_by or part.stopped_by
        return joined

    def speed(self, world: World) -> dict[str, Any]:
        """How fast the model ran, without loading, and on what."""
        device = world.device
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        else:
            name = f"{device.type}, {torch.get_num_threads()} threads"
        height, width = sorted(self.sizes_hw)[len(self.sizes_hw) // 2]
        return {
            # The median over the batches: a short hiccup of a shared machine does not change it.
            "fps": statistics.median(self.rates) * world.size,
            "device": name,
            "dtype": str(AMP_DTYPES[self.amp]).removeprefix("torch."),
            "resolution": f"{height}×{width}",
            "batch_size": self.batch_size,
            "processes": world.size,
        }


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


@torch.inference_mode()
def run_model(
    model: nn.Module,
    dataset: Dataset,
    world: World,
    batch_size: int = 1,
    workers: int = 0,
    amp: str = "off",
    progress: bool = True,
    tolerant: bool = False,
    batch_bytes: int = 0,
) -> Findings:
    """Runs the model over a data set.

    Each process takes its share of the batches, so each image is seen once.

    Args:
        model: in torchvision's language, on `world.device`. It is put into eval mode and, at the
            end, back into the mode that it was in.
        dataset: a `CocoDataset` or `ShapesDataset` with evaluation transforms.
        world: the processes that share the images.
        batch_size: at most so many images at a time, all of one size.
        workers: processes that load images.
        amp: "off", "bf16" or "fp16".
        progress: show a progress bar if standard error is a terminal.
        tolerant: skip an image that fails instead of raising its error, and let Ctrl-C end the
            pass instead of the program; the findings say so.
        batch_bytes: the most that the images of a batch take; see `make_loader`.

    Returns:
        The findings of all processes.

    Raises:
        UserError: an image cannot be loaded.
    """
    batches = same_padding_batches(dataset, batch_size)[world.rank :: world.size]
    findings = Findings(batch_size, amp)
    forward = partial(_timed_forward, model, world.device, amp, findings.rates)
    was_training = model.training
    model.eval()

    # None: only on a terminal. Standard error itself is None if it is closed.
    is_hidden = None if progress and world.is_main and sys.stderr else True
    total = sum(map(len, batches))
    bar = tqdm(total=total, desc="evaluate", unit="image", disable=is_hidden, leave=False)
    try:
        with bar:
            loader = _load(dataset, batches, workers, tolerant, batch_bytes)
            for indices, items in zip(batches, loader, strict=True):
                results = attempt(forward, items) if tolerant else forward(items)
                for index, item, result in zip(indices, items, results, strict=True):
                    _collect(findings, dataset, index, item, result)
                bar.update(len(items))
    except KeyboardInterrupt as stop:
        if not tolerant or world.size > 1:  # the others would wait for this process
            raise
        findings.stopped_by = int(signal_of(stop))
    finally:
        model.train(was_training)
    return findings.joined(world)


def _load(
    dataset: Dataset, batches: list[list[int]], workers: int, tolerant: bool, batch_bytes: int
) -> Iterator[list[Item | Failure]]:
    """The items of each batch; with `tolerant` some may be failures."""
    if tolerant:
        yield from load_tolerantly(dataset, batches, workers, batch_bytes)
    else:
        for images, targets in make_loader(dataset, batches, workers, batch_bytes=batch_bytes):
            yield list(zip(images, targets, strict=True))


def _timed_forward(
    model: nn.Module, device: torch.device, amp: str, rates: list[float], items: Sequence[Item]
) -> list[Detections]:
    """The model's detections on a batch; adds its images per second to `rates`."""
    images = [image.to(device, non_blocking=True) for image, _ in items]
    _wait_for(device)
    start = time.perf_counter()
    with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
        detections = model(images)
    _wait_for(device)
    rates.append(len(items) / (time.perf_counter() - start))
    return detections


def _wait_for(device: torch.device) -> None:
    """GPUs run behind the program."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _collect(
    findings: Findings, dataset: Dataset, index: int, item: Item | Failure, result: Any
) -> None:
    """Adds what the model found in one image, or why it was skipped."""
    if isinstance(result, Failure):
        reason = result.about(f"image id {dataset.image_ids[index]}")
        findings.failures.append(replace(result, reason=reason))
        return
    image, target = item
    resized_hw = tuple(image.shape[-2:])
    records = coco_results(result, target, resized_hw, dataset.category_ids)
    findings.detections += records
    findings.num_other_classes += len(result["labels"]) - len(records)
    findings.image_ids.append(target["image_id"])
    findings.sizes_hw.append(resized_hw)


def coco_results(
    found: Detections,
    target: Target,
    resized_hw: tuple[int, int],
    category_ids: Sequence[int | None],
) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format.

    Args:
        found: in pixels of the resized image.
        target: says which image it is, and the size of its file.
        resized_hw: what the transforms made of it.
        category_ids: K ids, None for a class that the data set does not have: detections of it are
            left out.

    Returns:
        One dict per detection: image_id, category_id, bbox (xywh in pixels of the file), score.
    """
    height, width = target["size_hw"]
    scale = [width / resized_hw[1], height / resized_hw[0]] * 2
    boxes = found["boxes"] * torch.tensor(scale, device=found["boxes"].device)  # (n, 4)
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


def detect(
    model: nn.Module,
    dataset: Dataset,
    world: World,
    batch_size: int = 1,
    workers: int = 0,
    amp: str = "off",
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the model over a data set; the arguments are those of `run_model`.

    Returns:
        The detections in COCO's results format, with boxes in pixels of the image files, and the
        speed: `fps`, `device`, `dtype`, `resolution` (median, h×w px), `batch_size`, `processes`.
        All processes get all of it.
    """
    findings = run_model(model, dataset, world, batch_size, workers, amp, progress)
    return findings.detections, findings.speed(world)


# --- from detections to AP ---


def coco_metrics(
    ground_truth: COCO,
    detections: list[dict[str, Any]],
    max_dets: int = 100,
    image_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """COCO's metrics of detections in COCO's results format.

    Args:
        ground_truth: the annotations.
        detections: dicts of image_id, category_id, bbox (xywh px), score; may be empty.
        max_dets: how many detections per image and class count, the best ones, as pycocotools has
            it.
        image_ids: the images that count; by default all of the ground truth.

    Returns:
        AP, AP50, AP75, APs, APm, APl and AR (at max_dets) as fractions, −1 where not defined;
        `per_class`: name -> AP.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if detections:
            found = ground_truth.loadRes([dict(detection) for detection in detections])
        else:
            found = _no_results(ground_truth)
        run = COCOeval(ground_truth, found, "bbox")
        run.params.maxDets = [max_dets]
        if image_ids is not None:
            run.params.imgIds = sorted(image_ids)
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


def _no_results(ground_truth: COCO) -> COCO:
    """What `loadRes` would give for an empty list, on which it fails."""
    found = COCO()
    found.dataset = {
        "images": ground_truth.dataset["images"],
        "categories": ground_truth.dataset["categories"],
        "annotations": [],
    }
    found.createIndex()
    return found


def _mean(values: np.ndarray) -> float:
    """Over those that are defined; −1 if none is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def measure(
    findings: Findings, dataset: Dataset, world: World, max_dets: int = 100
) -> dict[str, Any]:
    """The metrics of what `run_model` found; all processes have to call this, and all get the same.

    Args:
        findings: of all processes, with at least one image.
        dataset: the one that they are about.
        world: as for `run_model`.
        max_dets: see `coco_metrics`.

    Returns:
        The metrics of `coco_metrics`, `speed`, `images` (how many there were) and `max_dets`. If
        there is something to say, also `skipped` (why, for each image that was skipped),
        `other_classes` (how many detections were left out because the data set does not have their
        class) and `stopped_by` (the signal that ended the pass early).
    """
    metrics = None
    with world.together():
        if world.is_main:
            truth = dataset.coco()
            metrics = coco_metrics(truth, findings.detections, max_dets, findings.image_ids)
    metrics = world.gather(metrics)[0]
    metrics["speed"] = findings.speed(world)
    metrics["images"] = len(findings.image_ids)
    metrics["max_dets"] = max_dets
    if findings.failures:
        metrics["skipped"] = [failure.reason for failure in findings.failures]
    if findings.num_other_classes:
        metrics["other_classes"] = findings.num_other_classes
    if findings.stopped_by is not None:
        metrics["stopped_by"] = findings.stopped_by
    return metrics


def evaluate(
    model: nn.Module, dataset: Dataset, world: World, max_dets: int = 100, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`run_model`, then `measure`: the metrics, and the detections in COCO's results format.

    Args:
        model, dataset, world: see `run_model`.
        max_dets: see `coco_metrics`.
        options: the other arguments of `run_model`.
    """
    findings = run_model(model, dataset, world, **options)
    return measure(findings, dataset, world, max_dets), findings.detections


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
    val_json: str | None = None  # annotations (COCO format); by default those of the training run
    val_images: str | None = None  # folder that the file names in --val-json are relative to
    output: Path = Path("runs/evaluate")  # folder for metrics.json and detections.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    batch_size: int = 1  # images at a time, of equal size
    workers: int = 4  # processes that load images; 0 loads them in the main process
    max_dets: int = 100  # detections per image and class that count (COCO: 100)
    test_size: int | None = None  # pixels: shortest side of the images; by default the checkpoint's
    max_size: int | None = None  # pixels: limit of the longest side; by default the checkpoint's
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    per_class: bool = False  # print the AP of every class
    # Leave out the objects of classes that the model does not have; otherwise they are an error.
    ignore_new_classes: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        1 if images were skipped, 128 + its number after a signal, else 0.

    Raises:
        UserError: a mistake that the user can fix.
    """
    description = "Measures COCO AP and images per second of a checkpoint."
    args = parse_args(argv, EvaluateArgs, "evaluate.py", description)
    _check(args)
    with join_world(args.device) as world:
        with world.together():
            make_folder(args.output)
            model, checkpoint = load_model(args.weights, world.device)
            dataset = validation_set(
                checkpoint,
                args.ignore_new_classes,
                val_json=args.val_json,
                val_images=args.val_images,
                test_size=args.test_size,
                max_size=args.max_size,
            )
        if world.is_main:
            for note in dataset.notes:
                print(f"note: {note}")
        config = checkpoint["config"]
        choose_threads(world.device, config, args.test_size or config.test_size)
        if world.is_main:
            warn_of_slow_bf16(world.device, args.amp)
        image_bytes = 3 * (args.test_size or config.test_size) * (args.max_size or config.max_size)

        # Among several processes it is torchrun that handles signals.
        with signals_like_ctrl_c() if world.size == 1 else contextlib.nullcontext():
            findings = run_model(
                model.for_inference(),
                dataset,
                world,
                batch_size=args.batch_size,
                workers=args.workers,
                amp=args.amp,
                tolerant=True,
                batch_bytes=args.batch_size * image_bytes,  # at most
            )
        require_images(findings)
        if world.is_main:
            write_json(args.output / "detections.json", findings.detections)
        metrics = measure(findings, dataset, world, args.max_dets)
        if world.is_main:
            write_json(args.output / "metrics.json", metrics, indent=2)
            _print_report(args, metrics, len(dataset))

    if findings.stopped_by is not None:
        return 128 + findings.stopped_by
    return 1 if findings.failures else 0


def require_images(findings: Findings) -> None:
    """Refuses a pass without any result.

    Raises:
        KeyboardInterrupt: Ctrl-C came first.
        UserError: no image can be used.
        RuntimeError: the program is to blame.
    """
    if findings.image_ids:
        return
    if findings.stopped_by is not None:
        raise KeyboardInterrupt(findings.stopped_by)
    raise_bug(findings.failures)
    raise UserError(
        f"none of the {len(findings.failures)} images can be used: {findings.failures[0].reason}"
    )


def _check(args: EvaluateArgs) -> None:
    sizes = (args.test_size, args.max_size)
    counts = (args.batch_size, args.max_dets, *(size for size in sizes if size is not None))
    if min(counts) < 1 or args.workers < 0:
        raise UserError(
            "--batch-size, --max-dets, --test-size and --max-size should be at least 1, --workers "
            "at least 0"
        )
    if args.weights.suffix.lower() == ".onnx":
        raise UserError(
            f"{args.weights}: an ONNX file cannot be evaluated here; give the checkpoint that it "
            "was exported from"
        )


def _print_report(args: EvaluateArgs, metrics: dict[str, Any], num_images: int) -> None:
    """Says on standard error what is missing from the results, and prints the rest."""
    for reason in metrics.get("skipped", []):
        print(f"evaluate.py: skipped {reason}", file=sys.stderr)
    part = f"{metrics['images']} of {num_images} images"
    if "stopped_by" in metrics:
        print(
            f"evaluate.py: stopped by {describe_signal(metrics['stopped_by'])} after {part}, with "
            f"an AP of {percent(metrics['AP']).strip()} on these; written: {args.output}",
            file=sys.stderr,
        )
        return

    print(format_table(metrics, args.per_class))
    if metrics["images"] < num_images:
        print(f"note: on {part}; those that were skipped are named above and in metrics.json")
    if "other_classes" in metrics:
        print(
            f"note: left out {metrics['other_classes']} detections of classes that the annotations "
            "do not have"
        )
    print(
        "The model ran with its batch norms folded into the convolutions and channels last "
        "(`SparseRCNN.for_inference`)."
    )
    print(f"written: {args.output / 'metrics.json'}, {args.output / 'detections.json'}")


if __name__ == "__main__":
    sys.exit(run_main(main, "evaluate.py"))

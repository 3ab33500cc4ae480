"""Speed, measured on this machine: `python -m experiments.benchmark COMMAND`.

Each command prints a Markdown table; `experiments/README.md` explains the columns. All weights are
random, which is right for speed: the model does the same work with any weights.
"""

import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

from config import PRESETS, Config, PresetName
from data import make_dataset
from experiments import measure
from experiments.measure import Call, Row, count_flops, take_turns, times_ms
from experiments.peers import PeerName, build_peer, tame_residuals
from head import DynamicHead
from matcher import HungarianMatcher
from model import SparseRCNN, build_model
from support.checkpoint import Training
from support.cli import run_main
from support.devices import AMP_DTYPES, pick_device
from support.distributed import World
from support.errors import UserError
from support.loader import Batch, make_loader, usable_workers
from train import start_training, train_step

Amp = Literal["off", "bf16", "fp16"]
Table = tuple[list[Row], dict[str, str], list[str]]  # rows, a format per column, notes below

FAST = "ours, for_inference()"  # what predict.py and evaluate.py run
TRAINING_PARTS = ("forward", "matching", "backward", "optimiser")
TIMES = {"ms, median": "{median_ms:.1f}", "min – max": "{min_ms:.1f} – {max_ms:.1f}"}
SPEED = {**TIMES, "images/s": "{images_per_second:.2f}"}


@dataclass(frozen=True)
class Settings:
    preset: PresetName = "r50-100"  # which of our models
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    batch_size: int = 1  # images at a time
    height: int = 800  # pixels of the images
    width: int = 1216  # pixels of the images
    repeats: int = 5  # measurements of each variant


# --- precisions ---


def under_autocast(call: Call, device: torch.device, amp: Amp) -> Call:
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")(call)


def product_rates(amps: Sequence[Amp], device: torch.device) -> tuple[dict[Amp, float], list[str]]:
    """The GFLOP/s that matrix products reach in each precision, and notes on those that are slow.

    A precision with less than a quarter of float32's rate is left out: on a CPU without fast
    arithmetic for it, a single pass can take ten minutes.
    """
    float32_rate = measure.product_rate(device, torch.float32) / 1e9
    rates: dict[Amp, float] = {}
    notes: list[str] = []
    for amp in dict.fromkeys(amps):
        rate = float32_rate if amp == "off" else measure.product_rate(device, AMP_DTYPES[amp]) / 1e9
        if rate >= float32_rate / 4:
            rates[amp] = rate
        if rate < float32_rate:
            verdict = "gains nothing here" if amp in rates else "is left out"
            speeds = f"{rate:.1f} against {float32_rate:.1f} GFLOP/s"
            notes.append(f"--amp {amp} {verdict}: float32's matrix products are faster ({speeds})")
    if not rates:
        raise UserError(f"nothing is left to measure; {notes[0]}")
    return rates, notes


# --- inference ---


def tamed_model(config: Config) -> SparseRCNN:
    """A model with random weights whose features stay finite."""
    model = build_model(config, pretrained_backbone=False)
    tame_residuals(model.backbone)
    return model


def random_model(config: Config) -> SparseRCNN:
    """A model in eval mode whose boxes are as varied as a trained one's, on all pyramid levels."""
    model = tamed_model(config).eval().requires_grad_(False)
    centres, sides = model.proposal_boxes.split(2, dim=1)  # in 0–1
    centres.uniform_(0.2, 0.8)
    sides.uniform_(-3, 0).exp_()  # from a twentieth of the image to all of it
    for stage in model.head.stages:
        nn.init.normal_(stage.box_deltas.weight, std=0.02)  # moves boxes by a few percent
    return model


def parts_of(model: SparseRCNN, images: Sequence[Tensor]) -> dict[str, Call]:
    """Backbone and head alone, the head on what the backbone gives."""
    batch, whwh_px = model.prepare(images)
    boxes_px = model.initial_boxes_px(whwh_px)
    pro_feats = model.proposal_feats.expand(len(batch), -1, -1)  # (B, N, C)
    pyramid = model.backbone(batch)
    return {
        "backbone": lambda: model.backbone(batch),
        "head": lambda: model.head(pyramid, boxes_px, pro_feats),
    }


@dataclass(frozen=True)
class Inference(Settings):
    """Speed of detection in float32 and bfloat16, beside other detectors."""

    amp: tuple[Amp, ...] = ("off", "bf16")  # precisions to compare; off is float32
    compile: bool = False  # also with torch.compile, which takes minutes to compile
    peers: tuple[PeerName, ...] = get_args(PeerName)  # other detectors; none for ours alone

    @torch.inference_mode()
    def run(self) -> Table:
        device = pick_device(self.device)
        rates, notes = product_rates(self.amp, device)
        ours = random_model(PRESETS[self.preset]).to(device)
        models: dict[str, nn.Module] = {"ours": ours, FAST: ours.for_inference()}
        for peer in self.peers:
            models[peer] = build_peer(peer, self.height, self.width).to(device)
        images = list(torch.rand(self.batch_size, 3, self.height, self.width).to(device))

        def calls(name: str) -> dict[str, Call]:
            parts = parts_of(models[name], images) if name == FAST else {}
            return {"all": partial(models[name], images), **parts}

        flops = {
            (name, part): count_flops(call) for name in models for part, call in calls(name).items()
        }
        if self.compile:
            name = f"{FAST}, compiled"
            models[name] = ours.for_inference()
            models[name].compile()
            flops[name, "all"] = flops[FAST, "all"]

        runs: dict[tuple[str, Amp, str], Call] = {}
        for name in models:
            for amp in rates:
                # Under autocast, because the head gets the backbone's output in this precision.
                parts = under_autocast(partial(calls, name), device, amp)()
                for part, call in parts.items():
                    runs[name, amp, part] = under_autocast(call, device, amp)
        rows = []
        for (name, amp, part), seconds in take_turns(runs, self.repeats, device).items():
            row = {"variant": name, "amp": amp, "part": part, **times_ms(seconds)}
            gflop = flops[name, part] / 1e9
            row |= {"gflop": gflop / self.batch_size, "rate": rates[amp]}
            row["of_rate"] = 1000 * gflop / row["median_ms"] / rates[amp]
            if part == "all":
                row["images_per_second"] = 1000 * self.batch_size / row["median_ms"]
            rows.append(row)

        columns = {"variant": "{variant}", "--amp": "{amp}", "part": "{part}", **SPEED}
        columns["GFLOP per image"] = "{gflop:.1f}"
        columns["of product rate"] = "{of_rate:.0%} of {rate:.0f} GFLOP/s"
        return rows, columns, notes


# --- growth ---


def with_size(model: SparseRCNN, proposals: int, stages: int) -> SparseRCNN:
    """The first proposals and stages of a larger model, which shares its weights."""
    head = DynamicHead(model.head.stages[:stages], model.head.pooler)
    boxes, feats = model.proposal_boxes[:proposals], model.proposal_feats[:proposals]
    return SparseRCNN(model.backbone, head, model.criterion, boxes, feats).to(boxes.device).eval()


@dataclass(frozen=True)
class Growth(Settings):
    """Speed of detection as proposals, stages and images grow, one at a time (Tables 7 and 8)."""

    @torch.inference_mode()
    def run(self) -> Table:
        device = pick_device(self.device)
        sizes = [(proposals, 6, 1.0) for proposals in (100, 300, 500)]
        sizes += [(100, stages, 1.0) for stages in (1, 2, 3, 12)]
        sizes += [(100, 6, scale) for scale in (0.5, 0.75, 1.5)]
        largest = replace(PRESETS[self.preset], num_proposals=500, num_stages=12)
        model = random_model(largest).to(device).for_inference()

        runs: dict[tuple[int, int, str], Call] = {}
        for proposals, stages, scale in sizes:
            sized = with_size(model, proposals, stages)
            height, width = int(self.height * scale), int(self.width * scale)
            images = list(torch.rand(self.batch_size, 3, height, width).to(device))
            runs[proposals, stages, f"{height}×{width}"] = partial(sized, images)
        rows: list[Row] = []
        for (proposals, stages, size), seconds in take_turns(runs, self.repeats, device).items():
            row = {"proposals": proposals, "stages": stages, "size": size, **times_ms(seconds)}
            row["ratio"] = row["median_ms"] / (rows or [row])[0]["median_ms"]
            rows.append(row)

        columns = {"proposals": "{proposals:d}", "stages": "{stages:d}", "image, px": "{size}"}
        return rows, {**columns, **TIMES, "time / first row": "{ratio:.2f}"}, []


# --- matcher ---


def random_targets(
    num_images: int, num_objects: int, num_classes: int, height: int, width: int
) -> list[dict[str, Tensor]]:
    """Objects of random classes anywhere in the image, each side 1 % to 50 % of the image's."""
    targets = []
    for _ in range(num_images):
        centres = torch.rand(num_objects, 2)
        sides = torch.empty(num_objects, 2).uniform_(-4.6, -0.7).exp()
        boxes_01 = box_convert(torch.cat((centres, sides), dim=1), "cxcywh", "xyxy")
        boxes_px = boxes_01 * torch.tensor([width, height, width, height])
        targets.append({"boxes": boxes_px, "labels": torch.randint(num_classes, (num_objects,))})
    return targets


@dataclass(frozen=True)
class Matcher(Settings):
    """Speed of the matching of a training step, on random boxes: harder than trained ones."""

    batch_size: int = 16  # images per step
    # Objects per image; COCO has 7 on average.
    objects: tuple[int, ...] = (1, 7, 50, 100, 300, 1000)

    @torch.inference_mode()
    def run(self) -> Table:
        config, device = PRESETS[self.preset], pick_device(self.device)
        S, B, N, K = config.num_stages, self.batch_size, config.num_proposals, config.num_classes
        size = (self.height, self.width)
        logits = torch.randn(S, B, N, K).to(device) - 4
        predicted = [target["boxes"] for target in random_targets(S * B, N, K, *size)]
        boxes_px = torch.stack(predicted).view(S, B, N, 4).to(device)
        whwh_px = torch.tensor(size[::-1] * 2).float().expand(B, 4).to(device)

        assign = HungarianMatcher()
        runs: dict[int, Call] = {}
        for number in self.objects:
            targets = [
                {name: value.to(device) for name, value in target.items()}
                for target in random_targets(B, number, K, *size)
            ]
            runs[number] = partial(assign, logits, boxes_px, targets, whwh_px)
        rows = []
        for number, seconds in take_turns(runs, self.repeats, device).items():
            row = {"objects": number, "pairs": len(runs[number]().stage), **times_ms(seconds)}
            rows.append({**row, "each_ms": row["median_ms"] / (S * B)})

        columns = {"objects per image": "{objects:d}", "matched pairs": "{pairs:d}", **TIMES}
        return rows, {**columns, "ms per image and stage": "{each_ms:.3f}"}, []


# --- training ---


def step_in_parts(training: Training, batch: Batch) -> dict[str, float]:
    """A training step; returns the seconds of each part.

    Hooks read the clock between the parts. On an accelerator they have to wait there for the part
    to finish, which a whole step does not.
    """
    seconds = dict.fromkeys(TRAINING_PARTS, 0.0)
    last = time.perf_counter()

    def end_of(part: str, *_: object) -> None:
        nonlocal last
        measure.synchronize(training.world.device)
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    model, matcher = training.model, training.model.criterion.matcher
    hooks = [
        # A backward pass ends with the forward pass of the next micro-batch, or after clipping.
        model.register_forward_pre_hook(partial(end_of, "backward")),
        matcher.register_forward_pre_hook(partial(end_of, "forward")),
        matcher.register_forward_hook(partial(end_of, "matching")),
        model.register_forward_hook(partial(end_of, "forward")),
        training.optimizer.register_step_pre_hook(partial(end_of, "backward")),
        training.optimizer.register_step_post_hook(partial(end_of, "optimiser")),
    ]
    train_step(training, batch)
    for hook in hooks:
        hook.remove()
    return seconds


@dataclass(frozen=True)
class TrainingSpeed(Settings):
    """Speed of training steps, and of their parts, without loading images (see `data`)."""

    batch_size: int = 2  # images per step
    micro_batch: int | None = None  # images at a time, if a batch does not fit into memory
    amp: tuple[Amp, ...] = ("off", "bf16")  # precisions to compare; off is float32
    compile: bool = False  # with torch.compile, which takes minutes to compile

    def run(self) -> Table:
        config = replace(
            PRESETS[self.preset], batch_size=self.batch_size, micro_batch=self.micro_batch
        )
        device = pick_device(self.device)
        rates, notes = product_rates(self.amp, device)
        shape = (self.batch_size, 3, self.height, self.width)
        images = list(torch.randint(256, shape, dtype=torch.uint8))
        targets = random_targets(self.batch_size, 7, config.num_classes, *shape[2:])
        batch = Batch(images, targets, num_objects=7 * self.batch_size)

        data = make_dataset(PRESETS["shapes"], "train")  # names the classes in checkpoints, no more

        runs: dict[tuple[Amp, str], Call] = {}
        parts: dict[Amp, list[dict[str, float]]] = {amp: [] for amp in rates}
        for amp in rates:
            variant = replace(config, amp=amp, compile=self.compile)
            training = start_training(variant, World(device), data, 1000, tamed_model)
            training.model.train()
            runs[amp, "all"] = partial(train_step, training, batch)
            runs[amp, "parts"] = lambda t=training, p=parts[amp]: p.append(step_in_parts(t, batch))
        seconds = take_turns(runs, self.repeats, device)

        rows = []
        for amp in rates:
            row = {"amp": amp, "part": "all", **times_ms(seconds[amp, "all"])}
            row["images_per_second"] = 1000 * self.batch_size / row["median_ms"]
            rows.append(row)
            timed = parts[amp][1:]  # the first turn is a warm-up
            total = sum(sum(step.values()) for step in timed)
            for part in TRAINING_PARTS:
                found = [step[part] for step in timed]
                row = {"amp": amp, "part": part, **times_ms(found)}
                rows.append({**row, "share": sum(found) / total})

        columns = {"--amp": "{amp}", "part": "{part}", **SPEED, "of the step": "{share:.1%}"}
        return rows, columns, notes


# --- data ---


def make_data(folder: Path, count: int) -> tuple[str, str]:
    """A COCO file that lists one JPEG `count` times, and its folder. It decodes like a photo."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    smooth = noise.resize((640, 480), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth) + rng.normal(0, 3, (480, 640, 1))  # grain
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "image.jpg", quality=90)

    image = {"file_name": "image.jpg", "width": 640, "height": 480}
    box = {"bbox": [100, 100, 200, 100], "category_id": 1}
    coco = {
        "images": [{"id": i, **image} for i in range(count)],
        "annotations": [{"id": i, "image_id": i, **box} for i in range(count)],
        "categories": [{"id": 1, "name": "object"}],
    }
    (folder / "labels.json").write_text(json.dumps(coco))
    return str(folder / "labels.json"), str(folder)


@dataclass(frozen=True)
class Data:
    """Images/s that are decoded and augmented as in the recipe, for several numbers of workers."""

    train_json: str | None = None  # annotations (COCO format); by default images are generated
    train_images: str | None = None  # folder of the images that --train-json lists
    images: int = 64  # images per repeat and worker
    workers: tuple[int, ...] = (0, 1, 2)  # numbers of workers, at most the processors there are
    repeats: int = 5  # measurements of each number of workers

    def run(self) -> Table:
        with tempfile.TemporaryDirectory() as folder:
            files = self.train_json, self.train_images
            if files == (None, None):
                files = make_data(Path(folder), self.images)
            dataset = make_dataset(Config(train_json=files[0], train_images=files[1]), "train")
            keys = [(index, 0) for index in range(min(self.images, len(dataset)))]

            runs: dict[int, Call] = {}
            for workers in map(usable_workers, self.workers):
                share = keys * max(1, workers)  # each worker gets as much as one alone
                batches = [share[start : start + 16] for start in range(0, len(share), 16)]
                loader = make_loader(dataset, batches, workers, reseeded=True)
                runs[workers] = partial(deque, loader, maxlen=0)  # loads all, keeps nothing
            torch.set_num_threads(1)  # as in a worker
            seconds = take_turns(runs, self.repeats)

        rows = []
        for workers, found in seconds.items():
            row = {"workers": workers, **times_ms(found)}
            count = len(keys) * max(1, workers)
            rows.append({**row, "images_per_second": 1000 * count / row["median_ms"]})
        return rows, {"workers": "{workers:d}", **SPEED}, []


# --- the command line ---

COMMANDS = {
    "inference": Inference,
    "training": TrainingSpeed,
    "growth": Growth,
    "matcher": Matcher,
    "data": Data,
}


def check_numbers(settings: dict[str, Any]) -> None:
    """Raises a `UserError` if a number is too small, or if a list is empty."""
    least = {"workers": 0, "objects": 0, "height": 64, "width": 64}
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        if not values and name != "peers":
            raise UserError(f"{flag} needs at least one value")
        for number in values:
            if type(number) is int and number < least.get(name, 1):
                raise UserError(f"{flag} {number}: should be at least {least.get(name, 1)}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=argv,
        prog="python -m experiments.benchmark",
        description=__doc__.split("\n\n")[0],
    )
    check_numbers(asdict(command))
    torch.manual_seed(0)
    try:
        rows, columns, notes = command.run()
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is too small; try --batch-size 1 or a --micro-batch"
        ) from None
    device = pick_device(getattr(command, "device", "cpu"))
    conditions = asdict(command) | measure.machine(device) | {"threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    print("", measure.format_table(rows, columns), "", *notes, sep="\n")


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.benchmark"))

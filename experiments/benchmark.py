"""Speed, measured on this machine: `python -m experiments.benchmark inference`, or `training`.

Each command prints a Markdown table; `experiments/README.md` explains the columns. All weights are
random, which is right for speed: the model does the same work with any weights.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import tyro
from torch import Tensor, nn
from torchvision.ops import box_convert

from config import PRESETS, Config, PresetName
from data import make_dataset
from experiments.detectors import PeerName, TrainedPeer, build_peer, tame_residuals
from experiments.measure import Call, Row, count_flops, format_table, machine, take_turns, times_ms
from model import SparseRCNN, build_model
from support.cli import run_main
from support.devices import AMP_DTYPES, choose_threads, pick_device
from support.distributed import World
from train import start_training, train_step

Amp = Literal["off", "bf16", "fp16"]
Key = tuple[str, Amp, str]  # the model, the precision, the part of it that is timed

COLUMNS = {
    "model": "{model}",
    "--amp": "{amp}",
    "part": "{part}",
    "ms, median": "{median_ms:.1f}",
    "min – max": "{min_ms:.1f} – {max_ms:.1f}",
    "images/s": "{images_per_second:.2f}",
    "GFLOP per image": "{gflop:.1f}",
}


@dataclass(frozen=True)
class Settings:
    preset: PresetName = "r50-100"  # which of our models
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    amp: tuple[Amp, ...] = ("off",)  # precisions to compare: off (float32), bf16, fp16
    compile: bool = False  # also our model with torch.compile, which takes minutes to compile
    height: int = 800  # pixels of the images
    width: int = 1216  # pixels of the images
    repeats: int = 5  # measurements of each variant
    peers: tuple[PeerName, ...] = get_args(PeerName)  # other detectors; none for ours alone


@dataclass(frozen=True)
class Inference(Settings):
    """Speed of detection, beside other detectors."""

    batch_size: int = 1  # images at a time

    @torch.inference_mode()
    def run(self, device: torch.device) -> list[Row]:
        images = list(torch.rand(self.batch_size, 3, self.height, self.width).to(device))
        ours = random_model(PRESETS[self.preset]).to(device)
        # What predict.py and evaluate.py run.
        models: dict[str, nn.Module] = {"ours": ours.for_inference()}
        for peer in self.peers:
            models[peer] = build_peer(peer, self.height, self.width).to(device)
        if self.compile:
            models["ours, compiled"] = ours.for_inference()
            models["ours, compiled"].compile()

        calls: dict[Key, Call] = {}
        for name, model in models.items():
            for amp in self.amp:
                calls[name, amp, "all"] = under_autocast(partial(model, images), device, amp)
        for amp in self.amp:
            # Under autocast, because the head gets the backbone's output in this precision.
            parts = under_autocast(parts_of, device, amp)(models["ours"], images)
            for part, call in parts.items():
                calls["ours", amp, part] = under_autocast(call, device, amp)

        rows = rows_of(take_turns(calls, self.repeats, device), self.batch_size)
        for row, (key, call) in zip(rows, calls.items(), strict=True):
            if "ours, compiled" not in key:
                row["gflop"] = count_flops(call) / 1e9 / self.batch_size
        return rows


@dataclass(frozen=True)
class TrainingSpeed(Settings):
    """Speed of training steps, beside other detectors; loading images is not counted."""

    batch_size: int = 2  # images per step
    micro_batch: int | None = None  # images at a time, if a batch does not fit into memory

    def run(self, device: torch.device) -> list[Row]:
        batch = {"batch_size": self.batch_size, "micro_batch": self.micro_batch}
        config = replace(PRESETS[self.preset], **batch)
        shape = (self.batch_size, 3, self.height, self.width)
        images = list(torch.randint(256, shape, dtype=torch.uint8))
        objects = 7  # per image, as on average in COCO
        targets = random_targets(self.batch_size, objects, config.num_classes, *shape[2:])
        data = make_dataset(PRESETS["shapes"], "train")  # names the classes in checkpoints, no more

        builders: dict[str, Callable[..., nn.Module]] = {"ours": tamed_model}
        if self.compile:
            builders["ours, compiled"] = tamed_model
        for peer in self.peers:
            builders[peer] = lambda *_, peer=peer, **__: TrainedPeer(
                build_peer(peer, self.height, self.width)
            )

        # The same recipe for all: optimizer, clipping, precision. With float16 the first steps are
        # skipped, until its scale is found. They take as long, but for the optimizer.
        calls: dict[Key, Call] = {}
        for name, build in builders.items():
            for amp in self.amp:
                variant = replace(config, amp=amp, compile="compiled" in name)
                training = start_training(variant, World(device), data, 1000, build)
                step = partial(train_step, training, images, targets, objects * self.batch_size)
                calls[name, amp, "all"] = step
        return rows_of(take_turns(calls, self.repeats, device), self.batch_size)


# --- models ---


def tamed_model(config: Config, pretrained_backbone: bool = False) -> SparseRCNN:
    """A model with random weights, whatever the arguments say, whose features stay finite."""
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
    """Backbone and head alone, the head on what the backbone gives for these images (3, H, W)."""
    batch, whwh_px = model.prepare(images)
    boxes_px = model.initial_boxes_px(whwh_px)
    pro_feats = model.proposal_feats.expand(len(batch), -1, -1)  # (B, N, C)
    pyramid = model.backbone(batch)
    return {
        "backbone": partial(model.backbone, batch),
        "head": partial(model.head, pyramid, boxes_px, pro_feats),
    }


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


# --- calls and rows ---


def under_autocast(call: Callable, device: torch.device, amp: Amp) -> Callable:
    """`call` in this precision."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")(call)


def rows_of(seconds: dict[Key, list[float]], batch_size: int) -> list[Row]:
    """The rows of the table, one for each key; images/s only of whole models."""
    rows = []
    for (name, amp, part), found in seconds.items():
        row = {"model": name, "amp": amp, "part": part, **times_ms(found)}
        if part == "all":
            row["images_per_second"] = 1000 * batch_size / row["median_ms"]
        rows.append(row)
    return rows


# --- the command line ---


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"inference": Inference, "training": TrainingSpeed},
        args=argv,
        prog="python -m experiments.benchmark",
        description=__doc__.split("\n\n")[0],
    )
    torch.manual_seed(0)
    device = pick_device(command.device)
    for amp in command.amp:
        choose_threads(device, PRESETS[command.preset].backbone, amp)
    rows = command.run(device)
    conditions = asdict(command) | machine(device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    print("", format_table(rows, COLUMNS), sep="\n")


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.benchmark"))

"""Speed, measured on this machine: `python -m experiments.benchmark inference`, or `training`.

It prints a Markdown table; `experiments/README.md` explains the columns. All weights are random,
which is right for speed: the model does the same work with any weights.
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
from support.cli import parse_args, run_main
from support.devices import AMP_DTYPES, choose_threads, pick_device
from support.distributed import World
from train import start_training, train_step

Amp = Literal["off", "bf16", "fp16"]
Key = tuple[str, Amp]  # the model and the precision

COLUMNS = {
    "model": "{model}",
    "--amp": "{amp}",
    "ms, median": "{median_ms:.1f}",
    "min – max": "{min_ms:.1f} – {max_ms:.1f}",
    "images/s": "{images_per_second:.2f}",
    "GFLOP per image": "{gflop:.1f}",
}
OBJECTS = 7  # per image, as on average in COCO


@dataclass(frozen=True)
class BenchmarkArgs:
    # Detection, or training steps, in which loading images is not counted.
    what: tyro.conf.Positional[Literal["inference", "training"]]
    preset: PresetName = "r50-100"  # which of our models
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    amp: tuple[Amp, ...] = ("off",)  # precisions to compare: off (float32), bf16, fp16
    batch_size: int = 1  # images at a time, or per training step
    height: int = 800  # pixels of the images
    width: int = 1216  # pixels of the images
    repeats: int = 5  # measurements of each model
    peers: tuple[PeerName, ...] = get_args(PeerName)  # other detectors; none for ours alone


def inference_calls(args: BenchmarkArgs, device: torch.device) -> dict[Key, Call]:
    """For each model and precision a function that detects objects once."""
    images = list(torch.rand(args.batch_size, 3, args.height, args.width).to(device))
    # What predict.py and evaluate.py run.
    models: dict[str, nn.Module] = {"ours": random_model(PRESETS[args.preset]).for_inference()}
    for peer in args.peers:
        models[peer] = build_peer(peer, args.height, args.width)

    calls: dict[Key, Call] = {}
    for name, model in models.items():
        detect = torch.inference_mode()(partial(model.to(device), images))
        for amp in args.amp:
            autocast = torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")
            calls[name, amp] = autocast(detect)
    return calls


def training_calls(args: BenchmarkArgs, device: torch.device) -> dict[Key, Call]:
    """For each model and precision a function that takes one step of the recipe."""
    config = replace(PRESETS[args.preset], batch_size=args.batch_size)
    shape = (args.batch_size, 3, args.height, args.width)
    images = list(torch.randint(256, shape, dtype=torch.uint8))
    targets = random_targets(args.batch_size, config.num_classes, args.height, args.width)
    data = make_dataset(PRESETS["shapes"], "train")  # names the classes in checkpoints, no more

    builders: dict[str, Callable[..., nn.Module]] = {"ours": tamed_model}
    for peer in args.peers:
        builders[peer] = lambda *_, peer=peer, **__: TrainedPeer(
            build_peer(peer, args.height, args.width)
        )

    # The same recipe for all: optimizer, clipping, precision. With float16 the first steps are
    # skipped, until its scale is found. They take as long, but for the optimizer.
    calls: dict[Key, Call] = {}
    for name, build in builders.items():
        for amp in args.amp:
            training = start_training(replace(config, amp=amp), World(device), data, 1000, build)
            calls[name, amp] = partial(
                train_step, training, images, targets, OBJECTS * args.batch_size
            )
    return calls


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


def random_targets(
    num_images: int, num_classes: int, height: int, width: int
) -> list[dict[str, Tensor]]:
    """Objects of random classes anywhere in the image, each side 1 % to 50 % of the image's."""
    targets = []
    for _ in range(num_images):
        centres = torch.rand(OBJECTS, 2)
        sides = torch.empty(OBJECTS, 2).uniform_(-4.6, -0.7).exp()
        boxes_01 = box_convert(torch.cat((centres, sides), dim=1), "cxcywh", "xyxy")
        boxes_px = boxes_01 * torch.tensor([width, height, width, height])
        targets.append({"boxes": boxes_px, "labels": torch.randint(num_classes, (OBJECTS,))})
    return targets


# --- the command line ---


def measure(args: BenchmarkArgs, device: torch.device) -> list[Row]:
    """The rows of the table, one for each model and precision."""
    is_training = args.what == "training"
    calls = training_calls(args, device) if is_training else inference_calls(args, device)
    rows = []
    for (name, amp), seconds in take_turns(calls, args.repeats, device).items():
        row = {"model": name, "amp": amp, **times_ms(seconds)}
        row["images_per_second"] = 1000 * args.batch_size / row["median_ms"]
        if not is_training:
            row["gflop"] = count_flops(calls[name, amp]) / 1e9 / args.batch_size
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake raises `UserError`."""
    description = __doc__.split("\n\n")[0]
    args = parse_args(argv, BenchmarkArgs, "python -m experiments.benchmark", description)
    torch.manual_seed(0)
    device = pick_device(args.device)
    for amp in args.amp:
        choose_threads(device, PRESETS[args.preset].backbone, amp)
    rows = measure(args, device)
    conditions = asdict(args) | machine(device)
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    print("", format_table(rows, COLUMNS), sep="\n")


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.benchmark"))

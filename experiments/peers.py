"""The paper's Table 1 and Figure 2 in miniature: `python -m experiments.peers [NAME …]`.

It trains Sparse R-CNN, Faster R-CNN, RetinaNet, DETR and Deformable DETR from random weights. All
have the same backbone (with one seed also the same start), images, order, augmentation, batch,
AdamW, cosine, clipping and evaluation; `experiments/detectors.py` says what else is set. Each gets
the learning rate of --rates that is best on other images, in runs a third as long. Finished runs
are kept, and a run that was stopped continues where it was: repeat the command.

In:  names of detectors, by default all, and every setting of `train.py` as a flag.
Out: --output DIR: peers.md (the tables) and peers.png (AP against images and against seconds).
     --runs DIR: a folder per run, as `experiments.ablate` makes it, with nms.json.

Seconds are steps times the median step, for which the detectors take turns on one core: what else
the machine does during a training does not count. DETR and Deformable DETR need `pip install
transformers`; without it they are left out, and the tables say so.
"""

import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import nn
from torchvision.ops import batched_nms, box_convert

from config import Config, preset_from
from data import eval_transforms, make_dataset
from evaluate import coco_metrics, evaluate
from experiments.ablate import ABLATION, AblateArgs, Run, read_result, summary, train_variant
from experiments.detectors import DETECTORS, OF_TRANSFORMERS, TorchvisionPeer
from experiments.measure import Row, count_flops, format_table, machine, take_turns
from experiments.variants import VARIANTS, Variant
from shapes import ShapesDataset
from support.checkpoint import load_checkpoint
from support.cli import parse_args, run_main
from support.devices import choose_threads
from support.distributed import World
from support.errors import UserError
from support.files import make_folder, write_json
from support.report import git_revision
from train import start_training, train_step

# From random weights, so in smaller batches than `ABLATION`: more steps per image.
PEERS = replace(ABLATION, epochs=12, shapes_train=2000, batch_size=8)
QUICK = replace(PEERS, data="shapes-demo", epochs=6, shapes_train=1000, shapes_val=200)
CPU = torch.device("cpu")

# To `ablate`, which trains them and keeps their runs, the detectors are variants.
VARIANTS |= {name: Variant(build) for name, build in DETECTORS.items()}

# Name in the table, the paper's AP on COCO (Table 1), colour (Okabe and Ito).
LOOKS = {
    "sparse-rcnn": ("Sparse R-CNN", 42.8, "#D55E00"),
    "faster-rcnn": ("Faster R-CNN", 40.2, "#0072B2"),
    "retinanet": ("RetinaNet", 38.7, "#56B4E9"),
    "detr": ("DETR", 42.0, "#000000"),
    "deformable-detr": ("Deformable DETR", 43.8, "#009E73"),
}
COLUMNS = {
    "": "{label}",
    "AP (paper)": "{paper:.1f}",
    **{name: f"{{{name}:.1f}}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "AP ±": "{spread:.1f}",
    "images/s": "{FPS:.0f}",
    "training, min": "{minutes:.1f}",
    "parameters": "{parameters:,.0f}",
    "GFLOP": "{gflop:.2f}",
    "rate": "{rate:g}",
    "seeds": "{seeds:d}",
}
NMS_COLUMNS = {
    "": "{label}",
    "AP with final NMS": "{AP_with:.1f}",
    "AP without": "{AP_without:.1f}",
    "duplicates per 100 objects without": "{duplicates:.1f}",
}


@dataclass(frozen=True)
class PeersArgs:
    # Detectors to train, by default all.
    names: tyro.conf.Positional[tuple[Literal[*DETECTORS], ...]] = ()
    seeds: tuple[int, ...] = (0, 1)  # train each detector once per seed
    # Learning rates to choose from; with one there is nothing to choose.
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    output: Path = Path("runs/peers-tables")  # folder for the tables and the figure
    runs: Path = Path("runs/peers")  # folder for the training runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    quick: bool = False  # one seed, one rate, and shorter runs
    config: Config = PEERS  # the settings of config.py, the same for all detectors


# --- runs ---


def make_run(name: str, rate: float, seed: int, args: PeersArgs, is_trial: bool = False) -> Run:
    """A training of a detector; a trial is a third as long."""
    config = replace(args.config, lr=rate, seed=seed)
    if is_trial:
        epochs = max(1, config.epochs // 3)
        config = replace(config, epochs=epochs, eval_every=epochs)
    folder = args.runs / f"lr{rate:g}{'-trial' * is_trial}"
    settings = {"runs": folder, "device": args.device, "start_from": None, "config": config}
    return Run(name, seed, AblateArgs((), **settings))


def trials(name: str, args: PeersArgs) -> list[Run]:
    """The short runs that choose a detector's learning rate; none if there is only one rate."""
    rates = args.rates if len(args.rates) > 1 else ()
    return [make_run(name, rate, args.seeds[0], args, is_trial=True) for rate in rates]


def reported_runs(name: str, args: PeersArgs) -> list[Run]:
    """The runs of a detector in the tables, one per seed; none until its rate is chosen.

    The AP of the trials decides, on images that no table shows. (Their losses do not: as Faster
    R-CNN learns, more of its proposals have boxes to learn, and its loss rises.) Only where no
    trial has an AP of 1 of 100, which is noise, the lowest loss of training decides.
    """
    if name not in available():
        return []
    precisions, losses = {}, {}
    for run in trials(name, args):
        if read_result(run) is None:
            return []
        precisions[run.config.lr] = figures_of(run, trial_figures, "tune.json")["AP"]
        losses[run.config.lr] = epochs_of(run)[-1]["loss"]
    rate = max(precisions, key=precisions.get, default=args.rates[0])
    if precisions and precisions[rate] < 0.01:
        rate = min(losses, key=losses.get)
    return [make_run(name, rate, seed, args) for seed in args.seeds]


def next_run(args: PeersArgs) -> Run | None:
    """What to train next: all detectors with the first seed come first."""
    for index in range(len(args.seeds)):
        for name in args.names or DETECTORS:
            if name not in available():
                continue
            for run in [*trials(name, args), *reported_runs(name, args)[index : index + 1]]:
                if read_result(run) is None:
                    return run
    return None


def epochs_of(run: Run) -> list[dict[str, Any]]:
    """What train.py wrote after each epoch; with --eval-every, only some have an AP."""
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def available() -> list[str]:
    """The detectors whose library is installed."""
    has_transformers = find_spec("transformers") is not None
    return [name for name in DETECTORS if has_transformers or name not in OF_TRANSFORMERS]


# --- what a run found ---


def figures_of(run: Run, measure: Callable[[nn.Module, Config], Row], file_name: str) -> Row:
    """What `measure` says of a trained detector, kept in the folder of its run."""
    path = run.folder / file_name
    if not path.exists():
        checkpoint = load_checkpoint(run.folder / "last.pt")
        config = Config.from_dict(checkpoint["config"])
        model = DETECTORS[run.variant](config, False)
        model.load_state_dict(checkpoint["model"])
        write_json(path, measure(model, config))
    return json.loads(path.read_text(encoding="utf-8"))


def trial_figures(model: nn.Module, config: Config) -> Row:
    """AP on images of Shapes that are neither trained on nor reported."""
    level = config.data.removeprefix("shapes-")
    dataset = ShapesDataset(level, "tune", config.shapes_val, eval_transforms(config))
    return {"AP": evaluate(model, dataset, World(CPU), config.batch_size)[0]["AP"]}


def nms_figures(model: nn.Module, config: Config) -> Row:
    """AP with NMS and without, and duplicates.

    DETR, Deformable DETR and ours have no NMS; for them "with" is what it would change. The NMS of
    Faster R-CNN's proposals stays: only the final one is left out.
    """
    dataset = make_dataset(config, "val", make_dataset(config, "train").class_names)
    _, detections = evaluate(model, dataset, World(CPU), config.batch_size)
    row = {"AP_with": coco_metrics(dataset.coco(), suppress(detections))["AP"]}
    if isinstance(model, TorchvisionPeer):
        getattr(model.detector, "roi_heads", model.detector).nms_thresh = 1.0  # no IoU is larger
        _, detections = evaluate(model, dataset, World(CPU), config.batch_size)
    row["AP_without"] = coco_metrics(dataset.coco(), detections)["AP"]

    # Scores mean different things in different detectors. So as many detections count as there are
    # objects, the best ones of all images.
    num_objects = len(dataset.coco().anns)
    best = sorted(detections, key=lambda found: -found["score"])[:num_objects]
    row["duplicates"] = (len(best) - len(suppress(best))) / num_objects
    return {key: 100 * value for key, value in row.items()}


def suppress(detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """NMS within each class of each image, on detections in COCO's results format."""
    keys = [(found["image_id"], found["category_id"]) for found in detections]
    numbers = {key: number for number, key in enumerate(set(keys))}
    groups = torch.tensor([numbers[key] for key in keys])
    scores = torch.tensor([found["score"] for found in detections])
    xywh_px = torch.tensor([found["bbox"] for found in detections]).reshape(-1, 4)
    boxes_px = box_convert(xywh_px, "xywh", "xyxy")
    keep = batched_nms(boxes_px, scores, groups, iou_threshold=0.5)  # torchvision's default
    return [detections[i] for i in keep.tolist()]


# --- speed ---


def measure_speeds(args: PeersArgs, repeats: int = 15) -> dict[str, Row]:
    """Seconds of a step, images/s one at a time, and operations per image, on one core.

    The weights are trained ones if there are any: NMS has less to do the surer a detector is.
    """
    dataset = make_dataset(args.config, "train")
    held_out = make_dataset(args.config, "val", dataset.class_names)
    config = replace(args.config, num_classes=len(dataset.class_names))
    choose_threads(CPU, config.backbone)
    batch = [dataset[i] for i in range(min(len(dataset), config.batch_size))]
    images, targets = [image for image, _ in batch], [target for _, target in batch]
    num_objects = sum(len(target["labels"]) for target in targets)
    held_out_image = held_out[0][0]

    calls, gflop = {}, {}
    for name in available():
        training = start_training(config, World(CPU), dataset, 1000, DETECTORS[name])
        for run in finished_runs(name, args)[:1]:
            training.model.load_state_dict(load_checkpoint(run.folder / "last.pt")["model"])
        model = copy.deepcopy(training.model).eval()
        # With gradients: without them FlopCounterMode fails on Deformable DETR.
        gflop[name] = count_flops(partial(model, [held_out_image])) / 1e9
        calls[name, "step"] = partial(train_step, training, images, targets, num_objects)
        calls[name, "image"] = partial(torch.inference_mode()(model.forward), [held_out_image])
    seconds = take_turns(calls, repeats, CPU)
    medians = {key: statistics.median(found) for key, found in seconds.items()}
    return {
        name: {"step": medians[name, "step"], "FPS": 1 / medians[name, "image"], "gflop": value}
        for name, value in gflop.items()
    }


# --- tables and figure ---


def finished_runs(name: str, args: PeersArgs) -> list[Run]:
    """The finished runs of a detector, one per seed."""
    return [run for run in reported_runs(name, args) if read_result(run) is not None]


def table_row(name: str, args: PeersArgs, speed: Row) -> Row:
    """A row of both tables: means over the seeds; what there is no figure for is left out."""
    label, paper, _ = LOOKS[name]
    runs = finished_runs(name, args)
    results = [read_result(run) for run in runs]
    row = {"label": label, "paper": paper, **summary(results), **speed}
    if runs:
        found = [figures_of(run, nms_figures, "nms.json") for run in runs]
        row |= {key: statistics.fmean(figures[key] for figures in found) for key in found[0]}
        row["rate"] = runs[0].config.lr
        row["minutes"] = results[0]["steps"] * speed["step"] / 60
    return row


def draw_curves(args: PeersArgs, speeds: dict[str, Row], path: Path) -> None:
    """AP against images seen and against seconds; the band goes from the worst to the best seed."""
    figure = Figure(figsize=(8.38, 3.9), layout="constrained")
    by_images, by_seconds = figure.subplots(1, 2, sharey=True)
    for name in speeds:
        label, _, colour = LOOKS[name]
        curves = [
            [(epoch["step"], 100 * epoch["AP"]) for epoch in epochs_of(run) if "AP" in epoch]
            for run in finished_runs(name, args)
        ]
        if not curves:
            continue
        steps, precisions = torch.tensor(curves).unbind(-1)  # (seeds, epochs) each
        for axes, unit in ((by_images, args.config.batch_size), (by_seconds, speeds[name]["step"])):
            x, low, high = unit * steps[0], precisions.amin(0), precisions.amax(0)
            axes.plot(x, precisions.mean(0), "o-", color=colour, markersize=3, label=label)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    by_images.set(xlabel="images seen", ylabel="AP", ylim=(0, None), xlim=(0, None))
    by_seconds.set(xlabel="seconds on one core", xlim=(0, None))
    for axes in (by_images, by_seconds):
        axes.grid(alpha=0.3)
    handles, labels = by_images.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=200)


def write_results(args: PeersArgs, speeds: dict[str, Row]) -> str:
    """Writes the tables and the figure with the results there are; returns the tables."""
    make_folder(args.output)
    draw_curves(args, speeds, args.output / "peers.png")
    rows = [table_row(name, args, speeds.get(name, {})) for name in DETECTORS]
    conditions = {"rates": args.rates, **machine(CPU), "revision": git_revision()}
    settings = [f"{name} {value}" for name, value in conditions.items()]
    settings += [f"preset {args.config.preset}", *args.config.changes()]
    notes = [", ".join(settings)]
    for name, row in zip(DETECTORS, rows, strict=True):
        if row["seeds"] < len(args.seeds):
            why = "" if name in available() else ", because transformers is not installed"
            notes.append(f"- missing: {len(args.seeds) - row['seeds']} runs of {name}{why}")
    tables = [format_table(rows, COLUMNS), format_table(rows, NMS_COLUMNS), "\n".join(notes)]
    text = "\n\n".join(tables) + "\n"
    (args.output / "peers.md").write_text(text, encoding="utf-8")
    return text


# --- command line ---


def read_args(argv: Sequence[str]) -> PeersArgs:
    """The command line.

    Raises:
        UserError: there is nothing to evaluate on, or to choose the learning rate on.
    """
    default = PeersArgs()
    if "--quick" in argv:
        default = PeersArgs(seeds=(0,), rates=(1e-3,), config=QUICK)
    if any(word.split("=")[0] == "--preset" for word in argv):
        default = replace(default, config=preset_from(argv))
    description = __doc__.split("\n\n")[0]
    args = parse_args(argv, PeersArgs, "python -m experiments.peers", description, default)
    if args.config.train_json and (not args.config.val_json or len(args.rates) > 1):
        raise UserError("--train-json needs --val-json, --val-images, and one rate in --rates")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises `UserError`.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped a training.
    """
    args = read_args(sys.argv[1:] if argv is None else list(argv))
    while run := next_run(args):
        print(f"\n=== {run.variant}, rate {run.config.lr:g}, {run.folder.name} ===", flush=True)
        if status := train_variant(run):
            return status
    print("\n" + write_results(args, measure_speeds(args)))
    print(f"written: peers.md and peers.png in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.peers"))

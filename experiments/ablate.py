"""The paper's ablations in miniature: `python -m experiments.ablate TABLE …`, or `all`.

It trains the variants of the paper's Tables 3 to 8 and 10 (`experiments/variants.py`) with the same
data, schedule and seeds, and writes the paper's figures beside ours. A variant that several tables
share is trained once. Finished runs are kept, and a run that was stopped continues where it was:
repeat the command. If it is started twice at the same time, the two share the runs. On two cores,
with OMP_NUM_THREADS=1 each, that is faster than one after the other.

In:  every setting of `train.py` (data, schedule, …) as a flag. The defaults are in `ABLATION`.
Out: --output DIR: tableN.md, tableN.json, tableN.png and tableN-curves.png, written again whenever
     a run is finished.
     --runs DIR: a folder per run, such as grid-lr0.001-shapes-seed0 (the variant, the rate if there
     are --lrs, the checkpoint of --start-from, the seed), with train.py's files and result.json.

With --lrs, the static head with attention and the dynamic head are trained with each of these
learning rates. The one that is best on images that are not the reported ones is taken for all
variants with that head. --quick is a reduced form that can be watched.

The paper's figures are for COCO after 36 epochs on eight GPUs, ours for a small model on small
images after minutes. Compare the order of the rows, not the figures. Table 10's rows of DETR are
left out.
"""

import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import numpy as np
import torch
import tyro
from torch.utils.data import Dataset

import train
from config import PRESETS, Config
from data import eval_transforms, validation_set
from evaluate import evaluate
from experiments.measure import count_flops, format_table, machine
from experiments.variants import VARIANTS, Build, shared_name
from model import SparseRCNN
from shapes import ShapesDataset
from support.checkpoint import load_checkpoint, load_strictly
from support.cli import parse_args, preset_from, run_main
from support.devices import pick_device
from support.distributed import World
from support.errors import UserError
from support.report import git_revision
from visualize import new_figure, plot_bars, plot_named_lines, save_figure

# The shapes preset with six stages as in the paper, on the crowded level: on the demo level all
# rows would be near the ceiling. An evaluation after each epoch gives the curves.
ABLATION = replace(PRESETS["shapes"], num_stages=6, data="shapes-crowded", epochs=8)
# To be watched: fewer stages, proposals and images.
QUICK = replace(ABLATION, num_stages=3, num_proposals=12, shapes_train=1120, shapes_val=200)

# Settings that do not change what is trained; num_classes comes from the data.
IRRELEVANT = ("preset", "num_classes", "workers", "eval_every", "checkpoint_minutes", "compile")

# Columns with other names or units in the paper than here.
PAPER_HEADINGS = {"FPS": "FPS", "time": "training, h"}
OUR_HEADINGS = {"FPS": "images/s", "time": "training, min"}


class Table(NamedTuple):
    """A table of the paper.

    Each row has the paper's label, the name of our variant, and the paper's figures in the order of
    `columns`.
    """

    title: str
    columns: str
    rows: tuple[tuple[str, str, tuple[float | None, ...]], ...]


TABLES = {
    "3": Table(
        "each component of Sparse R-CNN",
        "AP AP50 AP75 APs APm APl",
        (
            ("sparse", "sparse", (18.5, 35.0, 17.7, 8.3, 21.7, 26.4)),
            ("sparse, iterative", "reuse", (32.2, 47.5, 34.4, 18.2, 35.2, 41.7)),
            ("sparse, iterative, dynamic", "grid", (42.3, 61.2, 45.7, 26.7, 44.6, 57.6)),
        ),
    ),
    "4": Table(
        "feature reuse in the iterative architecture",
        "AP AP50 AP75",
        (
            ("neither", "sparse", (18.5, 35.0, 17.7)),
            ("cascade", "cascade", (20.5, 29.3, 20.7)),
            ("cascade, feature reuse", "reuse", (32.2, 47.5, 34.4)),
        ),
    ),
    "5": Table(
        "self-attention and instance interaction in the dynamic head",
        "AP AP50 AP75",
        (
            ("neither", "reuse", (32.2, 47.5, 34.4)),
            ("self-attention", "attention", (37.2, 54.8, 40.1)),
            ("self-attention, instance interaction", "grid", (42.3, 61.2, 45.7)),
        ),
    ),
    "H": Table(
        "static or dynamic, from a grid of boxes and from the whole image (not in the paper)",
        "AP AP50 AP75",
        (
            ("static, from a grid", "attention", (None, None, None)),
            ("dynamic, from a grid", "grid", (None, None, None)),
            ("static, from the image", "attention-image", (None, None, None)),
            ("dynamic, from the image", "dynamic", (None, None, None)),
        ),
    ),
    "D": Table(
        "wider generated convolutions, and static heads of the same size (not in the paper)",
        "AP AP50 AP75",
        (
            ("static, as large as D = {D}", "attention", (None, None, None)),
            ("dynamic, D = {D}", "grid", (None, None, None)),
            ("static, as large as D = {D}", "attention-D2", (None, None, None)),
            ("dynamic, D = {D}", "grid-D2", (None, None, None)),
            ("static, as large as D = {D}", "attention-D4", (None, None, None)),
            ("dynamic, D = {D}", "grid-D4", (None, None, None)),
        ),
    ),
    "6": Table(
        "initialisation of the proposal boxes",
        "AP AP50 AP75 APs APm APl",
        (
            ("centre", "centre", (41.5, 59.6, 45.0, 25.6, 43.9, 56.1)),
            ("image", "dynamic", (42.3, 61.2, 45.7, 26.7, 44.6, 57.6)),
            ("grid", "grid", (41.0, 59.4, 44.2, 23.8, 43.7, 55.6)),
            ("random", "random", (42.1, 60.3, 45.3, 24.5, 44.6, 57.9)),
        ),
    ),
    "7": Table(
        "number of proposals (the paper's / ours)",
        "AP AP50 AP75 FPS time",
        (
            ("100 / {N}", "dynamic", (42.3, 61.2, 45.7, 23, 19)),
            ("300 / {N}", "proposals-x3", (43.9, 62.3, 47.4, 22, 24)),
            ("500 / {N}", "proposals-x5", (44.6, 63.2, 48.5, 20, 60)),
        ),
    ),
    "8": Table(
        "number of stages S",
        "AP AP50 AP75 FPS time",
        (
            ("1", "stages-1", (21.7, 36.7, 22.3, 35, 12)),
            ("2", "stages-2", (36.2, 52.8, 38.8, 33, 13)),
            ("3", "stages-3", (39.9, 56.8, 43.2, 29, 15)),
            ("6", "stages-6", (42.3, 61.2, 45.7, 23, 19)),
            ("12", "stages-12", (41.6, 60.2, 45.0, 17, 30)),
        ),
    ),
    "10": Table(
        "positional encoding added to the proposal features",
        "AP AP50 AP75",
        (
            ("with", "positions", (41.9, 60.9, 45.0)),
            ("without", "dynamic", (42.3, 61.2, 45.7)),
        ),
    ),
}


@dataclass(frozen=True)
class AblateArgs:
    # Tables of the paper.
    tables: tyro.conf.Positional[
        tuple[Literal["3", "4", "5", "H", "D", "6", "7", "8", "10", "all"], ...]
    ]
    # Its fields are the flags.
    config: tyro.conf.Suppress[Config] = field(default_factory=lambda: ABLATION)
    only: tuple[str, ...] = ()  # variants to train and show, such as grid; by default all rows
    seeds: tuple[int, ...] = ()  # train each variant once per seed; by default with --seed only
    output: Path = Path("runs/tables")  # folder for the tables
    runs: Path = Path("runs/ablations")  # folder for the training runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    # Checkpoint whose backbone all variants start from; None for random weights.
    start_from: str | None = "assets/shapes.pt"
    # Learning rates to choose from for each kind of head; by default all have the config's.
    lrs: tuple[float, ...] = ()
    # Annotations (COCO format) and images to choose the rate on. Shapes has its own.
    tune_json: str | None = None
    tune_images: str | None = None
    quick: bool = False  # smaller and shorter, to be watched

    def config_of(self, run: "Run") -> Config:
        """What a variant is trained with."""
        return replace(VARIANTS[run.variant].config(self.config), seed=run.seed, lr=run.lr)

    def folder_of(self, run: "Run") -> Path:
        """Where a variant is trained. What the config does not say is in the name."""
        rate = f"-lr{run.lr:g}" if self.lrs else ""
        start = "" if self.start_from is None else f"-{Path(self.start_from).stem}"
        return self.runs / f"{run.variant}{rate}{start}-seed{run.seed}"


class Run(NamedTuple):
    """One training."""

    variant: str
    seed: int
    lr: float | None  # None is the config's own default


# --- runs ---


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has the file to itself; its claim ends with it, however that ends."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def trains_the_same(values: dict[str, Any], config: Config) -> bool:
    """Whether a run with these settings, as read from JSON, trains what `config` does."""
    wanted = json.loads(json.dumps(config.to_dict()))
    return all(values.get(name) == wanted[name] for name in wanted if name not in IRRELEVANT)


def read_result(args: AblateArgs, run: Run) -> dict[str, Any] | None:
    """The figures of a finished run; None if there is none with these settings."""
    path = args.folder_of(run) / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if trains_the_same(result["config"], args.config_of(run)) else None


def runs_of(args: AblateArgs, variant: str) -> list[Run]:
    """The runs that a variant's row is made of, one per seed; none while its rate is not chosen."""
    if not args.lrs:
        return [Run(variant, seed, args.config.lr) for seed in args.seeds]
    rate = chosen_rate(args, variant)
    return [] if rate is None else [Run(variant, seed, rate) for seed in args.seeds]


def trials_of(args: AblateArgs, variant: str) -> list[Run]:
    """The runs that a variant's learning rate is chosen from: the first seed with every rate."""
    return [Run(VARIANTS[variant].tuned_as, args.seeds[0], lr) for lr in args.lrs]


def chosen_rate(args: AblateArgs, variant: str) -> float | None:
    """The rate with the best AP on the images for choosing; None while a trial is missing."""
    found = [read_result(args, run) for run in trials_of(args, variant)]
    results = [result for result in found if result is not None]
    if len(results) < len(args.lrs):
        return None
    return max(results, key=lambda result: result["tune_AP"])["config"]["lr"]


def set_aside_other_settings(folder: Path, config: Config) -> None:
    """Renames the folder if its run has other settings: it may have taken hours, so it is kept."""
    settings = folder / "config.json"
    if not settings.exists():
        return
    if trains_the_same(json.loads(settings.read_text(encoding="utf-8")), config):
        return

    number = 1
    while folder.with_name(f"{folder.name}.old{number}").exists():
        number += 1
    kept = folder.rename(folder.with_name(f"{folder.name}.old{number}"))
    print(f"{folder} was trained with other settings; it is now {kept}")


def build_from(backbone: str | None, build: Build) -> Build:
    """`build`, with the backbone's weights of a checkpoint and the head as it was."""

    def build_and_load(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
        model = build(config, pretrained_backbone)
        weights = load_checkpoint(backbone)["model"]
        prefix = "backbone."
        found = {
            name.removeprefix(prefix): value.float() if value.is_floating_point() else value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        load_strictly(model.backbone, found, backbone)
        return model

    return build if backbone is None else build_and_load


def train_variant(args: AblateArgs, run: Run) -> int:
    """Trains a variant, from its last checkpoint if there is one, and writes its result.

    Returns:
        The exit code of the training: 0, or 128 + the number of the signal that stopped it.
    """
    folder, config = args.folder_of(run), args.config_of(run)
    set_aside_other_settings(folder, config)

    last = folder / "last.pt"
    checkpoint = load_checkpoint(last) if last.exists() else None
    resume = str(last) if checkpoint is not None else None
    train_args = train.TrainArgs(config=config, output=folder, device=args.device, resume=resume)
    build = build_from(args.start_from, VARIANTS[run.variant].build)
    if status := train.run(train_args, checkpoint, build):
        return status

    result = {"variant": run.variant, "seed": run.seed, "start_from": args.start_from}
    result |= measure(args, folder, run.variant)
    write_json(folder / "result.json", result)
    return 0


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a temporary file and renames it: whoever reads `path` finds a whole file."""
    temporary = path.with_name(f"{path.name}.tmp")
    text = json.dumps(values, indent=2, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def tuning_set(args: AblateArgs, checkpoint: dict[str, Any]) -> Dataset | None:
    """Images to choose a learning rate on, which no table reports."""
    config = checkpoint["config"]
    if not args.lrs:
        return None
    if args.tune_json is None:
        level = config.data.removeprefix("shapes-")
        return ShapesDataset(level, "tune", config.shapes_val, eval_transforms(config))
    return validation_set(checkpoint, val_json=args.tune_json, val_images=args.tune_images)


def measure(args: AblateArgs, folder: Path, variant: str) -> dict[str, Any]:
    """The figures of a trained variant.

    Its AP (a fraction of 1) now and after each epoch, its speed with one image at a time, its size,
    and what they depend on.
    """
    checkpoint, device = load_checkpoint(folder / "last.pt"), pick_device(args.device)
    config = Config.from_dict(checkpoint["config"])
    model = VARIANTS[variant].build(config, False)
    load_strictly(model, checkpoint["model"], folder / "last.pt")

    checkpoint["config"] = config
    dataset = validation_set(checkpoint)
    fast = model.to(device).for_inference()
    options = {"world": World(device), "workers": config.workers, "amp": config.amp}
    metrics, _ = evaluate(fast, dataset, **options)
    tuning = tuning_set(args, checkpoint)
    tuned = {} if tuning is None else {"tune_AP": evaluate(fast, tuning, **options)[0]["AP"]}

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    epochs = [json.loads(line) for line in text.splitlines()]
    images_per_epoch = epochs[-1]["step"] / len(epochs) * config.batch_size
    seconds = sum(images_per_epoch / epoch["images_per_second"] for epoch in epochs)
    return {
        **{name: value for name, value in metrics.items() if name.startswith("A")},
        **tuned,
        "curve": [(epoch["step"], epoch["AP"]) for epoch in epochs if "AP" in epoch],
        "gflop_of_head": head_gflop(fast, config),
        "FPS": metrics["speed"]["fps"],
        "time": seconds / 60,  # minutes of training steps
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": checkpoint["step"],
        "images": metrics["images"],
        "revision": git_revision(),
        "machine": {**machine(device), "threads": torch.get_num_threads()},
        "config": config.to_dict(),
    }


def head_gflop(model: SparseRCNN, config: Config) -> float:
    """Billions of operations of the head for one image of the validation size."""
    size = config.test_size
    image = torch.zeros(3, size, size, device=model.mean.device)
    batch, whwh_px = model.prepare([image])
    with torch.no_grad():
        pyramid = model.backbone(batch)
        boxes_px = model.initial_boxes_px(whwh_px)
        pro_feats = model.proposal_feats[None]
        return count_flops(lambda: model.head(pyramid, boxes_px, pro_feats)) / 1e9


# --- tables ---


def summary(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the seeds, AP in percent; half of AP's range as `spread`.

    `last_quarter` is how much AP rose in the last quarter of the steps.

    What is not defined is left out.
    """
    means: dict[str, float] = {}
    names = "AP AP50 AP75 APs APm APl FPS time parameters gflop_of_head"
    for name in names.split():
        values = [result[name] for result in results if result[name] >= 0]  # −1: no such objects
        if values:
            means[name] = statistics.fmean(values) * (100 if name.startswith("AP") else 1)
    if len(results) > 1:
        precisions = [100 * result["AP"] for result in results]
        means["spread"] = (max(precisions) - min(precisions)) / 2
    gains = [gain for result in results if (gain := gain_of_last_quarter(result)) is not None]
    if gains:
        means["last_quarter"] = 100 * statistics.fmean(gains)
    return {**means, "seeds": len(results)}


def gain_of_last_quarter(result: dict[str, Any]) -> float | None:
    """How much AP rose in the last quarter of the steps; None if it was not evaluated there."""
    curve = dict(result.get("curve", ()))
    start = 0.75 * result.get("steps", 0)
    return curve[result["steps"]] - curve[start] if start in curve else None


def table_rows(args: AblateArgs, table: Table) -> list[dict[str, Any]]:
    """The rows of a table: the paper's figures as `paper_AP` …, ours as `AP` … if there are any."""
    rows = []
    for label, name, figures in table.rows:
        variant = shared_name(name, args.config)
        if args.only and variant not in args.only:
            continue
        config = VARIANTS[variant].config(args.config)
        found = [read_result(args, run) for run in runs_of(args, variant)]
        results = [result for result in found if result is not None]
        columns = [f"paper_{column}" for column in table.columns.split()]
        rows.append(
            {
                "label": label.format(N=config.num_proposals, D=config.dynamic_dim),
                "variant": variant,
                **dict(zip(columns, figures, strict=True)),
                **summary(results),
                "lr": results[0]["config"]["lr"] if results and args.lrs else None,
                "results": results,
            }
        )
    return rows


def markdown(number: str, table: Table, rows: Sequence[dict[str, Any]]) -> str:
    """The paper's table and ours side by side, and what ours was made with."""
    names = table.columns.split()
    columns = {"": "{label}"}
    is_in_paper = any(row["paper_AP"] is not None for row in rows)
    for name in names if is_in_paper else ():
        digits = ".0f" if name in PAPER_HEADINGS else ".1f"
        columns[f"{PAPER_HEADINGS.get(name, name)} (paper)"] = f"{{paper_{name}:{digits}}}"
    for name in names:
        columns[OUR_HEADINGS.get(name, name)] = f"{{{name}:.1f}}"
    if any("spread" in row for row in rows):
        columns["AP ±"] = "{spread:.1f}"
    if any(row["lr"] is not None for row in rows):
        columns["learning rate"] = "{lr:g}"
    if any("last_quarter" in row for row in rows):
        columns["gain in the last quarter"] = "{last_quarter:.1f}"
    columns["parameters"] = "{parameters:,.0f}"
    columns["GFLOP of the head"] = "{gflop_of_head:.3f}"
    columns["seeds"] = "{seeds:d}"
    text = f"**Table {number}: {table.title}**\n\n{format_table(rows, columns)}\n"

    results = [result for row in rows for result in row["results"]]
    if not results:
        return text
    if "FPS" in names:
        text += (
            "\nOther programs ran at the same time, so our times are rough; "
            "`python -m experiments.benchmark growth` measures speed in turns.\n"
        )
    return f"{text}\n{provenance(results)}\n"


def provenance(results: Sequence[dict[str, Any]]) -> str:
    """The data, the length of a run, the seeds, the machines and the revisions."""
    first, config = results[0], results[0]["config"]
    data = config["train_json"] or f"{config['data']} ({config['shapes_train']} images)"
    seeds = ", ".join(sorted({str(result["seed"]) for result in results}))
    machines = []
    for result in results:
        machine_text = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
        machines.append(f"{machine_text}; revision {result['revision']}")
    return (
        f"Data: {data}, evaluated on {first['images']} images. Each run: {first['steps']} steps "
        f"with {config['batch_size']} images. Seeds: {seeds}. "
        f"{' | '.join(dict.fromkeys(machines))}."
    )


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """AP against steps: the mean of the seeds as a line, their range as a band."""
    figure, axes = new_figure(1, 1, (6.4, 4.0))
    curves = {}
    for row in rows:
        if row["results"]:
            values = np.array([[100 * ap for _, ap in r["curve"]] for r in row["results"]])
            steps = [step for step, _ in row["results"][0]["curve"]]
            curves[row["label"]] = values.mean(0)
            axes[0, 0].fill_between(steps, values.min(0), values.max(0), color="#BBBBBB", alpha=0.5)
    if curves:
        plot_named_lines(axes[0, 0], steps, curves, margin=0.55)
    axes[0, 0].set(xlabel="steps", ylabel="AP", ylim=(0, None))
    save_figure(figure, path)


def draw_bars(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The AP of the paper, if the table is in it, and ours, one bar per row."""
    in_paper = [row for row in rows if row["paper_AP"] is not None]
    figure, axes = new_figure(1, 2 if in_paper else 1, (4.2, 0.8 + 0.38 * len(rows)))
    if in_paper:
        labels = [row["label"] for row in in_paper]
        plot_bars(axes[0, 0], labels, [row["paper_AP"] for row in in_paper], "{:.1f}")
        axes[0, 0].set_title("paper: AP on COCO", fontsize=9)

    done = [row for row in rows if "AP" in row]
    ours = axes[0, -1]
    plot_bars(ours, [row["label"] for row in done], [row["AP"] for row in done], "{:.1f}")
    ours.set_xlim(left=0)
    ours.set_title("ours: AP", fontsize=9)
    figure.savefig(path, dpi=110)


def write_tables(args: AblateArgs, numbers: Sequence[str]) -> list[str]:
    """Writes these tables with the results there are, as Markdown, JSON and a figure.

    Returns:
        The Markdown of each table.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    texts = []
    for number in numbers:
        table = TABLES[number]
        rows = table_rows(args, table)
        texts.append(markdown(number, table, rows))
        path = args.output / f"table{number}"
        path.with_suffix(".md").write_text(texts[-1], encoding="utf-8")
        values = {"table": number, "title": table.title, "rows": rows}
        write_json(path.with_suffix(".json"), values)
        draw_bars(rows, path.with_suffix(".png"))
        draw_curves(rows, path.with_name(f"{path.name}-curves.png"))
    return texts


# --- command line ---


def read_args(argv: Sequence[str]) -> AblateArgs:
    """The command line.

    Raises:
        UserError: no table is given, there is nothing to evaluate on, or torchrun has started this.
    """
    has_preset = any(word.split("=")[0] == "--preset" for word in argv)
    default = QUICK if "--quick" in argv else ABLATION
    args = parse_args(
        argv,
        AblateArgs,
        "python -m experiments.ablate",
        __doc__.split("\n\n")[0],
        tables=(),
        config=preset_from(argv) if has_preset else default,
    )
    tables = tuple(TABLES) if "all" in args.tables else tuple(dict.fromkeys(args.tables))
    if not tables:
        raise UserError(f"ablate: no table given; the tables are {', '.join(TABLES)}, or all")

    if unknown := sorted(set(args.only) - set(VARIANTS)):
        raise UserError(f"ablate: --only {' '.join(unknown)}: choose from {', '.join(VARIANTS)}")

    config = args.config
    if config.train_json and not config.val_json:
        raise UserError(
            "ablate: nothing to evaluate on; give --val-json and --val-images with --train-json"
        )
    if "10" in tables and config.hidden_dim % 8:
        raise UserError(
            f"ablate: --hidden-dim {config.hidden_dim}: Table 10's encoding needs a multiple of 8"
        )
    if "RANK" in os.environ:
        raise UserError("ablate: runs in one process; start it without torchrun")

    seeds = tuple(dict.fromkeys(args.seeds)) or (config.seed,)
    for seed in seeds:
        replace(config, seed=seed)  # raises if the seed is out of range
    return replace(args, tables=tables, seeds=seeds)


def train_missing(args: AblateArgs, wanted: Sequence[Run], elsewhere: list[str]) -> int:
    """Trains the runs that are not finished and that no other process is working on.

    Args:
        args: the command line.
        wanted: the runs.
        elsewhere: the names of those that another process has are added to it.

    Returns:
        The exit code of the first training that was stopped, else 0.
    """
    missing = [run for run in wanted if read_result(args, run) is None]
    for count, run in enumerate(missing, 1):
        folder = args.folder_of(run)
        with claim(folder.with_name(f"{folder.name}.lock")) as is_mine:
            if not is_mine:
                elsewhere.append(folder.name)
                continue
            if read_result(args, run) is not None:
                continue  # another process has finished it in the meantime
            print(f"\n=== {count} of {len(missing)}: {folder.name} ===", flush=True)
            if status := train_variant(args, run):
                return status
            write_tables(args, args.tables)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises `UserError`.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped a training.
    """
    args = read_args(sys.argv[1:] if argv is None else list(argv))
    rows = [row for number in args.tables for row in TABLES[number].rows]
    models = dict.fromkeys(shared_name(name, args.config) for _, name, _ in rows)
    variants = [name for name in models if not args.only or name in args.only]
    args.runs.mkdir(parents=True, exist_ok=True)
    elsewhere: list[str] = []
    # First the rates are chosen. Then it is known which runs the rows are made of.
    for kind in (trials_of, runs_of):
        wanted = list(dict.fromkeys(run for variant in variants for run in kind(args, variant)))
        wanted.sort(key=lambda run: args.seeds.index(run.seed))
        if status := train_missing(args, wanted, elsewhere):
            return status

    print("\n" + "\n".join(write_tables(args, args.tables)))
    if elsewhere:
        runs = ", ".join(elsewhere)
        print(f"another process is working on {runs}; repeat the command when it has finished")
    names = ", ".join(f"table{number}" for number in args.tables)
    print(f"written: {names} as .md, .json, .png and -curves.png in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.ablate"))

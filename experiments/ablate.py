"""The paper's ablations in miniature: `python -m experiments.ablate TABLE …`, or `all`.

It trains the variants of the paper's Tables 3 to 8 and 10 (`experiments/variants.py`) with the same
data, schedule and seeds, and writes the paper's figures beside ours. Finished runs are kept, also
for other tables, and a run that was stopped continues where it was: repeat the command.

In:  every setting of `train.py` (data, schedule, …) as a flag. The defaults are in `ABLATION`.
Out: --output DIR: tableN.md, written again whenever a run is finished.
     --runs DIR: a folder per run, such as grid-shapes-seed0 (the variant, the checkpoint of
     --start-from, the seed), with train.py's files, asked.json (the settings) and result.json.

The paper's figures are for COCO after 36 epochs on eight GPUs, ours for a small model on small
images after minutes. Compare the order of the rows, not the figures. Table 10's rows of DETR are
left out, and so are the times in Tables 7 and 8: `experiments.benchmark` measures speed.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

import train
from config import PRESETS, Config, preset_from
from experiments.measure import Row, format_table, machine
from experiments.variants import VARIANTS, Build
from model import SparseRCNN
from support.checkpoint import load_checkpoint
from support.cli import parse_args, run_main
from support.devices import pick_device
from support.errors import UserError
from support.files import make_folder, write_json
from support.report import git_revision

# The shapes preset with six stages as in the paper, on the crowded level: on the demo level all
# rows would be near the ceiling.
ABLATION = replace(PRESETS["shapes"], num_stages=6, data="shapes-crowded", epochs=8)

# Settings that do not change what is trained.
IRRELEVANT = ("preset", "workers", "eval_every", "checkpoint_minutes", "compile")

# The paper's tables: what each compares, and the columns of its figures.
TABLES = {
    "3": ("each component of Sparse R-CNN", "AP AP50 AP75 APs APm APl"),
    "4": ("feature reuse in the iterative architecture", "AP AP50 AP75"),
    "5": ("self-attention and instance interaction in the dynamic head", "AP AP50 AP75"),
    "6": ("initialisation of the proposal boxes", "AP AP50 AP75 APs APm APl"),
    "7": ("number of proposals (the paper's / ours)", "AP AP50 AP75"),
    "8": ("number of stages S (the paper's / ours)", "AP AP50 AP75"),
    "10": ("positional encoding added to the proposal features", "AP AP50 AP75"),
}
# Their rows: table, the paper's label, our variant, the paper's figures.
ROWS = (
    ("3", "sparse", "sparse", (18.5, 35.0, 17.7, 8.3, 21.7, 26.4)),
    ("3", "sparse, iterative", "reuse", (32.2, 47.5, 34.4, 18.2, 35.2, 41.7)),
    ("3", "sparse, iterative, dynamic", "grid", (42.3, 61.2, 45.7, 26.7, 44.6, 57.6)),
    ("4", "neither", "sparse", (18.5, 35.0, 17.7)),
    ("4", "cascade", "cascade", (20.5, 29.3, 20.7)),
    ("4", "cascade, feature reuse", "reuse", (32.2, 47.5, 34.4)),
    ("5", "neither", "reuse", (32.2, 47.5, 34.4)),
    ("5", "self-attention", "attention", (37.2, 54.8, 40.1)),
    ("5", "self-attention, instance interaction", "grid", (42.3, 61.2, 45.7)),
    ("6", "centre", "centre", (41.5, 59.6, 45.0, 25.6, 43.9, 56.1)),
    ("6", "image", "dynamic", (42.3, 61.2, 45.7, 26.7, 44.6, 57.6)),
    ("6", "grid", "grid", (41.0, 59.4, 44.2, 23.8, 43.7, 55.6)),
    ("6", "random", "random", (42.1, 60.3, 45.3, 24.5, 44.6, 57.9)),
    ("7", "100 / {N}", "dynamic", (42.3, 61.2, 45.7)),
    ("7", "300 / {N}", "proposals-x3", (43.9, 62.3, 47.4)),
    ("7", "500 / {N}", "proposals-x5", (44.6, 63.2, 48.5)),
    ("8", "1 / {S}", "stages-1", (21.7, 36.7, 22.3)),
    ("8", "2 / {S}", "stages-2", (36.2, 52.8, 38.8)),
    ("8", "3 / {S}", "stages-3", (39.9, 56.8, 43.2)),
    ("8", "6 / {S}", "dynamic", (42.3, 61.2, 45.7)),
    ("8", "12 / {S}", "stages-12", (41.6, 60.2, 45.0)),
    ("10", "with", "positions", (41.9, 60.9, 45.0)),
    ("10", "without", "dynamic", (42.3, 61.2, 45.7)),
)


@dataclass(frozen=True)
class AblateArgs:
    # Tables of the paper.
    tables: tyro.conf.Positional[tuple[Literal["3", "4", "5", "6", "7", "8", "10", "all"], ...]]
    seeds: tuple[int, ...] = ()  # train each variant once per seed; by default with --seed only
    output: Path = Path("runs/tables")  # folder for the tables
    runs: Path = Path("runs/ablations")  # folder for the training runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    # Checkpoint whose backbone all variants start from; None for random weights.
    start_from: str | None = "assets/shapes.pt"
    config: Config = ABLATION  # the settings of config.py, the same for all variants


@dataclass(frozen=True)
class Run:
    """One training of a variant."""

    variant: str  # a key of `VARIANTS`
    seed: int
    args: AblateArgs

    @property
    def config(self) -> Config:
        """What the variant is trained with."""
        return replace(VARIANTS[self.variant].config(self.args.config), seed=self.seed)

    @property
    def folder(self) -> Path:
        """Where it is trained; what the config does not say is in the name."""
        start = "" if self.args.start_from is None else f"-{Path(self.args.start_from).stem}"
        return self.args.runs / f"{self.variant}{start}-seed{self.seed}"


def runs_of(args: AblateArgs) -> list[Run]:
    """The runs that the tables are made of, all variants with the first seed first."""
    variants = dict.fromkeys(name for number, _, name, _ in ROWS if number in args.tables)
    return [Run(variant, seed, args) for seed in args.seeds for variant in variants]


# --- training ---


def read_result(run: Run) -> dict[str, Any] | None:
    """The figures of a finished run; None if it is not finished.

    Raises:
        UserError: its folder holds a run with other settings.
    """
    if (run.folder / "last.pt").exists():
        found = json.loads((run.folder / "asked.json").read_text(encoding="utf-8"))
        for name, value in json.loads(json.dumps(run.config.to_dict())).items():
            if name not in IRRELEVANT and found.get(name) != value:
                raise UserError(
                    f"{run.folder} was trained with {name}={found.get(name)}, not {value}; give "
                    "another --runs"
                )
    path = run.folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def builder(run: Run) -> Build:
    """Builds the variant, with the backbone's weights of --start-from and the head as it was."""

    def build(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
        model = VARIANTS[run.variant].build(config, pretrained_backbone)
        if run.args.start_from is not None:
            weights = load_checkpoint(run.args.start_from)["model"]
            keys = model.backbone.state_dict()
            model.backbone.load_state_dict({key: weights[f"backbone.{key}"] for key in keys})
        return model

    return build


def train_variant(run: Run) -> int:
    """Trains a variant, from its last checkpoint if there is one, and writes its result.

    Returns:
        The exit code of the training: 0, or 128 + the number of the signal that stopped it.
    """
    make_folder(run.folder)
    # config.json, of train.py, has settings that the data has decided, too.
    write_json(run.folder / "asked.json", run.config.to_dict(), indent=2)
    last = run.folder / "last.pt"
    checkpoint = load_checkpoint(last) if last.exists() else None
    resume = None if checkpoint is None else str(last)
    args = train.TrainArgs(run.folder, resume=resume, device=run.args.device, config=run.config)
    if status := train.run(args, checkpoint, builder(run)):
        return status
    write_json(run.folder / "result.json", measure(run), indent=2)
    return 0


def measure(run: Run) -> dict[str, Any]:
    """The figures of a trained variant; AP is a fraction of 1."""
    checkpoint = load_checkpoint(run.folder / "last.pt")
    model = VARIANTS[run.variant].build(Config.from_dict(checkpoint["config"]), False)
    epochs = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        **{name: value for name, value in json.loads(epochs[-1]).items() if name.startswith("A")},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": checkpoint["step"],
        "machine": machine(pick_device(run.args.device)) | {"revision": git_revision()},
    }


# --- tables ---


def summary(results: Sequence[dict[str, Any]]) -> Row:
    """Means over the seeds, AP in percent; half of AP's range as `spread`.

    What is not defined is left out.
    """
    means: Row = {"seeds": len(results)}
    for name in ["AP", "AP50", "AP75", "APs", "APm", "APl", "parameters"]:
        values = [result[name] for result in results if result[name] >= 0]  # −1: no such objects
        if values:
            means[name] = statistics.fmean(values) * (100 if name.startswith("AP") else 1)
    if len(results) > 1:
        precisions = [100 * result["AP"] for result in results]
        means["spread"] = (max(precisions) - min(precisions)) / 2
    return means


def table_rows(args: AblateArgs, number: str) -> list[Row]:
    """The rows of a table: the paper's figures as `paper_AP` …, ours as `AP` … if there are any."""
    columns = [f"paper_{name}" for name in TABLES[number][1].split()]
    rows = []
    for _, label, variant, figures in [row for row in ROWS if row[0] == number]:
        found = [read_result(Run(variant, seed, args)) for seed in args.seeds]
        results = [result for result in found if result is not None]
        config = VARIANTS[variant].config(args.config)
        row: Row = dict(zip(columns, figures, strict=True))
        row["label"] = label.format(N=config.num_proposals, S=config.num_stages)
        rows.append({**row, **summary(results), "results": results})
    return rows


def write_table(args: AblateArgs, number: str) -> str:
    """Writes the paper's table and ours side by side, with the results there are, as Markdown.

    Returns:
        The text.
    """
    title, names = TABLES[number][0], TABLES[number][1].split()
    columns = {"": "{label}"}
    columns |= {f"{name} (paper)": f"{{paper_{name}:.1f}}" for name in names}
    columns |= {name: f"{{{name}:.1f}}" for name in names}
    columns |= {"AP ±": "{spread:.1f}", "parameters": "{parameters:,.0f}", "seeds": "{seeds:d}"}
    rows = table_rows(args, number)

    notes = [f"preset {args.config.preset}", *args.config.changes()]
    machines = [result["machine"] for row in rows for result in row["results"]]
    notes += dict.fromkeys(", ".join(f"{k} {v}" for k, v in each.items()) for each in machines)
    text = f"**Table {number}: {title}**\n\n{format_table(rows, columns)}\n\n{', '.join(notes)}\n"
    (args.output / f"table{number}.md").write_text(text, encoding="utf-8")
    return text


def write_tables(args: AblateArgs) -> str:
    """Writes all tables that were asked for; returns their texts."""
    return "\n".join(write_table(args, number) for number in args.tables)


# --- command line ---


def read_args(argv: Sequence[str]) -> AblateArgs:
    """The command line.

    Raises:
        UserError: no table is given, there is nothing to evaluate on, or torchrun has started this.
    """
    has_preset = any(word.split("=")[0] == "--preset" for word in argv)
    args = parse_args(
        argv,
        AblateArgs,
        "python -m experiments.ablate",
        __doc__.split("\n\n")[0],
        default=AblateArgs((), config=preset_from(argv) if has_preset else ABLATION),
    )
    tables = tuple(TABLES) if "all" in args.tables else tuple(dict.fromkeys(args.tables))
    if not tables:
        raise UserError(f"no table given; the tables are {', '.join(TABLES)}, or all")
    if args.config.train_json and not args.config.val_json:
        raise UserError("nothing to evaluate on; give --val-json and --val-images as well")
    if "RANK" in os.environ:
        raise UserError("runs in one process; start it without torchrun")
    return replace(args, tables=tables, seeds=args.seeds or (args.config.seed,))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises `UserError`.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped a training.
    """
    args = read_args(sys.argv[1:] if argv is None else list(argv))
    make_folder(args.output)
    missing = [run for run in runs_of(args) if read_result(run) is None]
    for count, run in enumerate(missing, 1):
        print(f"\n=== {count} of {len(missing)}: {run.folder.name} ===", flush=True)
        if status := train_variant(run):
            return status
        write_tables(args)
    print("\n" + write_tables(args))
    print(f"written: tables {', '.join(args.tables)} as .md in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.ablate"))

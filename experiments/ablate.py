"""The ablations of the paper's slides, one command each: `python -m experiments.ablate TABLE …` (3 4 5 6 7 8 10 or all).

It trains the variants of the tables (`experiments/variants.py`) with the same data, schedule and seeds, and sets the paper's
figures beside ours. A variant that several tables have is trained once. What is finished is kept, and a run that was
stopped goes on where it was: repeat the command. Started twice at the same time, with OMP_NUM_THREADS=1 each, the two
share the runs, which on two cores is faster than one after the other.

In:  every setting of `train.py` (data, schedule, …) as a flag. Without `--preset` they are `ABLATION`'s.
Out: --output DIR: tableN.md, tableN.json, tableN.png, written again with every result that arrives.
     --runs DIR: VARIANT-seedN with what `train.py` writes (checkpoints to go on with, not to use), and result.json.

The paper's figures are of COCO after 36 epochs on eight GPUs, ours of a small model on small pictures after minutes:
compare the order of the rows and not the figures. Table 10's rows of DETR are left out.
"""

import contextlib
import fcntl
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

import train
from config import PRESETS, Config
from data import validation_set
from evaluate import evaluate
from experiments.measure import format_table, machine
from experiments.variants import VARIANTS, shared_name
from support.checkpoint import load_checkpoint, load_strictly
from support.cli import parse_args, pick_device, preset_from, run_main
from support.distributed import World
from support.errors import UserError
from support.report import git_revision
from visualize import new_figure, plot_bars

# The shapes preset with the paper's six stages, and half of its proposals: then five times as many can be afforded. The
# demo level: within 1,500 steps on the crowded one Sparse R-CNN has only begun to learn (AP 1.5 from the grid), and
# comparing its variants would compare nothing.
ABLATION = replace(PRESETS["shapes"], num_stages=6, num_proposals=10, eval_every=6)
# Settings that do not change what is trained; num_classes comes from the data.
IRRELEVANT = ("preset", "num_classes", "workers", "eval_every", "checkpoint_minutes", "compile")
HEADINGS = {
    "FPS": ("FPS", "images/s"),
    "time": ("training, h", "training, min"),
}  # the paper's and ours, where not one


class Table(NamedTuple):
    """A table of the paper: its rows are (what it calls them, our variant, its figures in the order of `columns`)."""

    title: str
    columns: str
    rows: tuple[tuple[str, str, tuple[float, ...]], ...]


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
    tables: tyro.conf.Positional[
        tuple[Literal["3", "4", "5", "6", "7", "8", "10", "all"], ...]
    ]  # tables of the paper
    config: Config = field(default_factory=lambda: ABLATION)
    seeds: tuple[
        int, ...
    ] = ()  # the variants are trained once with each; by default with --seed alone
    output: Path = Path("ablations")  # folder for the tables
    runs: Path = Path("runs/ablations")  # folder for the training runs
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …

    def config_of(self, variant: str, seed: int) -> Config:
        """What a variant is trained with."""
        return replace(VARIANTS[variant].config(self.config), seed=seed)

    def folder_of(self, variant: str, seed: int) -> Path:
        """Where a variant is trained."""
        return self.runs / f"{variant}-seed{seed}"


# --- runs ---


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has the file to itself; the claim ends with the process, however that ends."""
    with open(path, "w") as file:
        is_mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_mine = False
        yield is_mine


def is_as_wanted(values: dict[str, Any], config: Config) -> bool:
    """Whether a run's config, as read from JSON, trains what `config` does."""
    wanted = json.loads(json.dumps(config.to_dict()))
    return all(values.get(name) == wanted[name] for name in wanted if name not in IRRELEVANT)


def read_result(args: AblateArgs, variant: str, seed: int) -> dict[str, Any] | None:
    """A finished run's figures, or None where there are none of these settings."""
    path = args.folder_of(variant, seed) / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return result if is_as_wanted(result["config"], args.config_of(variant, seed)) else None


def train_variant(args: AblateArgs, variant: str, seed: int) -> int:
    """Trains a variant, from its last checkpoint where it was begun, and writes its result. Returns the exit status."""
    folder, config = args.folder_of(variant, seed), args.config_of(variant, seed)
    if (folder / "config.json").exists() and not is_as_wanted(
        json.loads((folder / "config.json").read_text()), config
    ):
        # Hours may lie in it: it makes place, and nothing is deleted.
        number = next(
            n for n in range(1, 1000) if not folder.with_name(f"{folder.name}.old{n}").exists()
        )
        kept = folder.rename(folder.with_name(f"{folder.name}.old{number}"))
        print(f"{folder} was trained with other settings; it is {kept} now")
    last = folder / "last.pt"
    checkpoint = load_checkpoint(last) if last.exists() else None
    resume = str(last) if checkpoint is not None else None
    run = train.TrainArgs(config=config, output=folder, device=args.device, resume=resume)
    if status := train.run(run, checkpoint, VARIANTS[variant].build):
        return status
    result = measure(folder, variant, args.device)
    temporary = folder / "result.json.tmp"
    temporary.write_text(
        json.dumps({"variant": variant, "seed": seed, **result}, indent=2, ensure_ascii=False)
        + "\n"
    )
    temporary.replace(folder / "result.json")
    return 0


def measure(folder: Path, variant: str, device_name: str) -> dict[str, Any]:
    """The figures of a trained variant: COCO's (fractions of 1), its speed one image at a time, and its size."""
    checkpoint, device = load_checkpoint(folder / "last.pt"), pick_device(device_name)
    config = Config.from_dict(checkpoint["config"])
    model = VARIANTS[variant].build(config, False)
    load_strictly(model, checkpoint["model"], folder / "last.pt")
    dataset = validation_set({**checkpoint, "config": config})
    here = World(device)
    metrics, _ = evaluate(
        model.to(device).for_inference(), dataset, here, workers=config.workers, amp=config.amp
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = lines[-1]["step"] / len(lines)  # of an epoch
    seconds = sum(steps * config.batch_size / line["images_per_second"] for line in lines)
    return {
        **{name: value for name, value in metrics.items() if name.startswith("A")},
        "FPS": metrics["speed"]["fps"],
        "time": seconds / 60,  # minutes of training steps
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": checkpoint["step"],
        "images": metrics["images"],
        "revision": git_revision(),
        "machine": {**machine(device), "threads": torch.get_num_threads()},
        "config": config.to_dict(),
    }


# --- tables ---


def summary(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds, the APs in percent, and half of the AP's range; what is not defined is left out."""
    means = {}
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "FPS", "time", "parameters"):
        values = [result[name] for result in results if result[name] >= 0]  # −1: no such objects
        if values:
            means[name] = statistics.fmean(values) * (100 if name.startswith("AP") else 1)
    if len(results) > 1:
        means["spread"] = 50 * (
            max(result["AP"] for result in results) - min(result["AP"] for result in results)
        )
    return means | {"seeds": len(results)}


def table_rows(args: AblateArgs, table: Table) -> list[dict[str, Any]]:
    """The rows of a table: the paper's figures as `paper_AP` …, ours as `AP` …, as far as there are any."""
    rows = []
    for label, name, figures in table.rows:
        variant = shared_name(name, args.config)
        results = [result for seed in args.seeds if (result := read_result(args, variant, seed))]
        label = label.format(N=VARIANTS[variant].config(args.config).num_proposals)
        paper = {
            f"paper_{column}": figure
            for column, figure in zip(table.columns.split(), figures, strict=True)
        }
        rows.append(
            {"label": label, "variant": variant, **paper, **summary(results), "results": results}
        )
    return rows


def markdown(number: str, table: Table, rows: Sequence[dict[str, Any]]) -> str:
    """The paper's table and ours, side by side, and what ours was made with."""
    names = table.columns.split()
    columns = {"": "{label}"}
    for name in names:
        columns[f"{HEADINGS.get(name, (name,))[0]} (paper)"] = (
            f"{{paper_{name}:{'.0f' if name in HEADINGS else '.1f'}}}"
        )
    columns |= {HEADINGS.get(name, (name,))[-1]: f"{{{name}:.1f}}" for name in names}
    if any("spread" in row for row in rows):
        columns["AP ±"] = "{spread:.1f}"
    columns |= {"parameters": "{parameters:,.0f}", "seeds": "{seeds:d}"}
    text = f"**Table {number}: {table.title}**\n\n{format_table(rows, columns)}\n"
    if not (results := [result for row in rows for result in row["results"]]):
        return text
    first, config = results[0], results[0]["config"]
    data = config["train_json"] or f"{config['data']} ({config['shapes_train']} pictures)"
    made = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in result["machine"].items())
        + f"; revision {result['revision']}"
        for result in results
    )
    if "FPS" in names:
        text += "\nOur times are of runs beside other work; `python -m experiments.benchmark growth` measures in turns.\n"
    return text + (
        f"\nData: {data}, evaluated on {first['images']} images. Every run: {first['steps']} steps of "
        f"{config['batch_size']} images. Seeds: {', '.join(sorted({str(result['seed']) for result in results}))}. "
        f"{' | '.join(made)}.\n"
    )


def write_tables(args: AblateArgs, numbers: Sequence[str]) -> list[str]:
    """Writes Markdown, JSON and figure of these tables with what there is; returns the Markdown."""
    args.output.mkdir(parents=True, exist_ok=True)
    texts = []
    for number in numbers:
        table = TABLES[number]
        rows = table_rows(args, table)
        texts.append(markdown(number, table, rows))
        (args.output / f"table{number}.md").write_text(texts[-1])
        lines = {"table": number, "title": table.title, "rows": rows}
        (args.output / f"table{number}.json").write_text(
            json.dumps(lines, indent=2, ensure_ascii=False) + "\n"
        )
        figure, axes = new_figure(1, 2, (4.2, 0.8 + 0.38 * len(rows)))
        done = [row for row in rows if "AP" in row]
        plot_bars(
            axes[0, 0], [row["label"] for row in rows], [row["paper_AP"] for row in rows], "{:.1f}"
        )
        axes[0, 0].set_title("paper: AP on COCO", fontsize=9)
        plot_bars(axes[0, 1], [row["label"] for row in done], [row["AP"] for row in done], "{:.1f}")
        axes[0, 1].set_xlim(left=0)
        axes[0, 1].set_title("ours: AP", fontsize=9)
        figure.savefig(args.output / f"table{number}.png", dpi=110)
    return texts


# --- command line ---


def read_args(argv: Sequence[str]) -> AblateArgs:
    """The command line.

    Raises:
        UserError: there is no table, nothing to evaluate on, or several processes of torchrun.
    """
    has_preset = any(word.split("=")[0] == "--preset" for word in argv)
    config = preset_from(argv) if has_preset else ABLATION
    args = parse_args(
        argv,
        AblateArgs,
        "python -m experiments.ablate",
        __doc__.split("\n\n")[0],
        tables=(),
        config=config,
    )
    tables = tuple(TABLES) if "all" in args.tables else tuple(dict.fromkeys(args.tables))
    if not tables:
        raise UserError(
            f"ablate: no table given; tables: {', '.join(TABLES)}, or all (python -m experiments.ablate --help)"
        )
    args = replace(
        args, tables=tables, seeds=tuple(dict.fromkeys(args.seeds)) or (args.config.seed,)
    )
    if args.config.train_json and not args.config.val_json:
        raise UserError(
            "ablate: nothing to evaluate on; give --val-json and --val-images with --train-json"
        )
    if "10" in tables and args.config.hidden_dim % 8:
        raise UserError(
            f"ablate: --hidden-dim {args.config.hidden_dim}: Table 10's encoding needs a multiple of 8"
        )
    if "RANK" in os.environ:
        raise UserError("ablate: runs in one process, start it without torchrun")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises `UserError`. Returns the exit status, as `train.main` does."""
    args = read_args(sys.argv[1:] if argv is None else list(argv))
    rows = [row for number in args.tables for row in TABLES[number].rows]
    variants = list(dict.fromkeys(shared_name(name, args.config) for _, name, _ in rows))
    todo = [
        (variant, seed)
        for seed in args.seeds
        for variant in variants
        if not read_result(args, variant, seed)
    ]
    elsewhere = []
    args.runs.mkdir(parents=True, exist_ok=True)
    for count, (variant, seed) in enumerate(todo, 1):
        with claim(args.folder_of(variant, seed).with_suffix(".lock")) as is_mine:
            if not is_mine:
                elsewhere.append(f"{variant} seed {seed}")
                continue
            if not read_result(
                args, variant, seed
            ):  # another process may have finished it meanwhile
                print(f"\n=== {count} of {len(todo)}: {variant}, seed {seed} ===", flush=True)
                if status := train_variant(args, variant, seed):
                    return status
                write_tables(args, args.tables)
    print("\n" + "\n".join(write_tables(args, args.tables)))
    if elsewhere:
        print(
            f"another process is at work on {', '.join(elsewhere)}; repeat the command when it is done"
        )
    print(
        f"written: {', '.join(f'table{number}' for number in args.tables)} as .md, .json, .png in {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.ablate"))

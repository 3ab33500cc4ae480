"""All that has to be seen on a GPU, in one command of a few minutes: `python -m experiments.gpu`.

It is made of parts. Each part's rows are written as soon as they are there. Repeat the command to
go on where it stopped, for example on a GPU that is lent for minutes. Another machine or another
revision of this repository starts anew.

In:  a GPU (or, to try it, `--device cpu --preset shapes --height 96 --width 96`).
Out: --output, a JSON file with the machine, the versions and the rows; one table of all parts.

All weights are random except in `shapes`, which trains.
"""

import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from config import PRESETS, Config, PresetName
from data import make_dataset
from experiments.benchmark import (
    Inference,
    random_targets,
    step_in_parts,
    tamed_model,
)
from experiments.measure import (
    Call,
    Row,
    count_flops,
    format_table,
    machine,
    product_rate,
    take_turns,
    times_ms,
)
from support.checkpoint import Training
from support.cli import parse_args, run_main
from support.devices import AMP_DTYPES, pick_device
from support.distributed import World
from support.errors import NotFinite, UserError
from support.loader import Batch
from support.report import git_revision
from support.results import replacing
from train import start_training, train_step

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "part": "{part}",
    "variant": "{variant}",
    "ms, median": "{median_ms:.1f}",
    "images/s": "{images_per_second:.1f}",
    "of product rate": "{of_rate:.0%}",
    "peak memory, GB": "{memory_gb:.1f}",
    "host waits": "{syncs:d}",
    "result": "{result}",
}


@dataclass(frozen=True)
class GpuArgs:
    parts: tuple[str, ...] = ()  # which parts to run; by default all
    preset: PresetName = "r50-100"  # which of our models
    device: str = "cuda"  # cuda, cuda:1, …
    height: int = 800  # pixels of the images
    width: int = 1216  # pixels of the images
    repeats: int = 5  # measurements of each variant
    minutes: float = 6.5  # no part starts later than this; the longest takes about two minutes
    output: Path = Path("experiments/results/gpu.json")  # file for the results


# --- the parts: each returns the rows of the table ---


def gpu_tests(args: GpuArgs) -> list[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout)
    return [{"variant": "tests/test_gpu.py", "result": ", ".join(summary) or done.stdout[-200:]}]


def equality(args: GpuArgs) -> list[Row]:
    """Losses and gradients on the GPU against the CPU, both in float32."""
    config = PRESETS[args.preset]
    torch.manual_seed(0)
    model = tamed_model(config).train()
    images, targets = _random_data(config, 2, 256, 320)
    results = []
    for device in (torch.device("cpu"), pick_device(args.device)):
        model.zero_grad()
        losses = model.to(device)(images, targets)
        sum(losses.values()).backward()
        gradients = [p.grad.double().cpu() for p in model.parameters() if p.grad is not None]
        results.append(([loss.item() for loss in losses.values()], gradients))
    (losses, gradients), (gpu_losses, gpu_gradients) = results

    off = max(abs(b - a) / abs(a) for a, b in zip(losses, gpu_losses, strict=True))
    difference = sum((b - a).norm() ** 2 for a, b in zip(gradients, gpu_gradients, strict=True))
    whole = sum(gradient.norm() ** 2 for gradient in gradients)
    return [
        {"variant": "largest relative difference of a loss", "result": f"{off:.1e}"},
        {
            "variant": "difference of the gradient, of its norm",
            "result": f"{(difference / whole) ** 0.5:.1e}",
        },
    ]


def inference(args: GpuArgs, batch_size: int) -> list[Row]:
    """Detection in float32 and bfloat16, beside torchvision's Faster R-CNN."""
    settings = Inference(
        args.preset, args.device, batch_size, args.height, args.width, args.repeats
    )
    rows, _, _ = replace(settings, peers=("faster-rcnn",)).run()
    return [
        {**row, "variant": f"{row['variant']}, --amp {row['amp']}"}
        for row in rows
        if row["part"] == "all"
    ]


def training(args: GpuArgs, batch_size: int, is_compiled: bool = False) -> list[Row]:
    """A training step in every precision."""
    device = pick_device(args.device)
    data = make_dataset(PRESETS["shapes"], "train")  # names the classes in checkpoints, no more
    rows: list[Row] = []
    for amp in ("off", "bf16", "fp16"):
        config = replace(
            PRESETS[args.preset], batch_size=batch_size, amp=amp, compile=is_compiled, lr=1e-6
        )
        state = start_training(config, World(device), data, 1000, tamed_model)
        state.model.train()
        images, targets = _random_data(config, batch_size, args.height, args.width)
        batch = Batch(images, targets, num_objects=7 * batch_size)
        row = {"variant": f"--amp {amp}" + ", compiled" * is_compiled}
        rows.append(row | _measure_step(state, batch, args.repeats))
        del state
    if not is_compiled:
        ratio = rows[0]["median_ms"] / rows[1]["median_ms"]
        rows.append({"variant": "bf16 against float32", "result": f"{ratio:.2f} times as fast"})
    return rows


def _measure_step(state: Training, batch: Batch, repeats: int) -> Row:
    """Time, memory, host waits and the share of the matching of a training step."""
    device, amp = state.world.device, state.config.amp
    step = partial(train_step, state, batch)
    _warm_up(step)
    if amp == "fp16":  # room for larger gradients, so that no measured step overflows
        state.scaler.update(state.scaler.get_scale() / 16)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    (seconds,) = take_turns({"step": step}, repeats, device).values()
    row: Row = times_ms(seconds)
    row["images_per_second"] = 1000 * len(batch.images) / row["median_ms"]
    if device.type == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        row["syncs"] = count_syncs(step)
    if not state.config.compile:
        rate = product_rate(device, AMP_DTYPES[amp])
        row["of_rate"] = count_flops(step) / statistics.median(seconds) / rate
        parts = step_in_parts(state, batch)
        row["result"] = f"matching {parts['matching'] / sum(parts.values()):.1%} of the step"
    return row


def _warm_up(step: Call) -> None:
    """Three steps: they compile, and choose algorithms; float16's first ones find its scale."""
    finished = 0
    for _ in range(30):
        try:
            step()
        except NotFinite:
            continue
        finished += 1
        if finished == 3:
            return
    raise NotFinite("no step of 30 was finite")


def count_syncs(call: Call) -> int:
    """How often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def shapes(args: GpuArgs) -> list[Row]:
    """The small network, trained from random weights."""
    folder = args.output.with_suffix("") / "shapes"
    command = [sys.executable, "train.py", "--preset", "shapes", "--device", args.device]
    command += ["--workers", "4", "--eval-every", "6", "--output", str(folder.resolve())]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    result = f"AP {100 * last['AP']:.1f}, AP50 {100 * last['AP50']:.1f}"
    row = {"variant": "train.py --preset shapes", "result": result}
    return [row | {"images_per_second": last["images_per_second"]}]


def _random_data(
    config: Config, count: int, height: int, width: int
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = list(torch.randint(256, (count, 3, height, width), dtype=torch.uint8))
    return images, random_targets(count, 7, config.num_classes, height, width)


# The most important first.
PARTS: dict[str, Callable[[GpuArgs], list[Row]]] = {
    "tests": gpu_tests,
    "equality": equality,
    "inference-1": partial(inference, batch_size=1),
    "inference-8": partial(inference, batch_size=8),
    "training-2": partial(training, batch_size=2),
    "training-16": partial(training, batch_size=16),
    "shapes": shapes,
    "training-2-compiled": partial(training, batch_size=2, is_compiled=True),
    "training-16-compiled": partial(training, batch_size=16, is_compiled=True),
}


# --- the command line ---


def read_results(args: GpuArgs) -> dict[str, Any]:
    """What is there of this machine, revision and model; else an empty set of results."""
    sizes = {name: getattr(args, name) for name in ("preset", "height", "width")}
    device = pick_device(args.device)
    conditions = {**machine(device), "revision": git_revision(), **sizes}
    if args.output.exists():
        found = json.loads(args.output.read_text(encoding="utf-8"))
        if found["conditions"] == conditions:
            return found
    return {"conditions": conditions, "parts": {}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit code: 0, or 1 if a part is left or failed.

    Raises:
        UserError: there is no such device or no such part.
    """
    start = time.monotonic()
    description = __doc__.split("\n\n")[0]
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv, GpuArgs, "python -m experiments.gpu", description)
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"--parts {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    results = read_results(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)

    left = []
    for name in args.parts or PARTS:
        if name in results["parts"]:
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left.append(name)
            continue
        print(f"=== {name} ===", flush=True)
        try:
            rows = PARTS[name](args)
        except (torch.OutOfMemoryError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            left.append(name)
            continue
        results["parts"][name] = [{"part": name, **row} for row in rows]
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    print(", ".join(f"{name} {value}" for name, value in results["conditions"].items()), "\n")
    rows = [row for name in PARTS for row in results["parts"].get(name, [])]
    print(format_table(rows, COLUMNS))
    print(f"\nwritten: {args.output}")
    if left:
        print(f"left: {', '.join(left)}; repeat the command to run them")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.gpu"))

"""What a run reports: a summary, a progress bar, a line per epoch, TensorBoard, curves."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torchvision
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from support.devices import describe
from support.distributed import World
from support.errors import UserError
from support.files import replacing, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOSSES = ("loss", "loss_cls", "loss_l1", "loss_giou")


def git_revision() -> str:
    """The commit that runs, "-dirty" if files were changed since; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def with_sums(losses: dict[str, float]) -> dict[str, float]:
    """Adds `loss_cls`, `loss_l1`, `loss_giou`, each summed over stages, and `loss`, their sum."""
    kinds = {}
    for kind in LOSSES[1:]:
        stages = [value for name, value in losses.items() if name.startswith(f"{kind}_")]
        kinds[kind] = sum(stages)
    return {"loss": sum(kinds.values()), **kinds, **losses}


class Report:
    """Adds up the values of every step, and in the main process prints and writes them.

    `training` in the methods is the `Training` of train.py; its `sums` are kept here.

    Args:
        output: the folder, which no other run may write to until this one ends.
        world: the processes.
        goes_on_from: the checkpoint that the run resumes from, if any.

    Raises:
        UserError: another run is writing into the folder, or an earlier one is in it.
        OSError: the folder cannot be written.
    """

    def __init__(self, output: Path, world: World, goes_on_from: str | None = None):
        self.output, self.world = output, world
        self.lines = output / "metrics.jsonl"
        self.bar = tqdm(disable=True)
        self.board: SummaryWriter | None = None
        self.started = self.loaded = time.perf_counter()
        if not world.is_main:
            return
        output.mkdir(parents=True, exist_ok=True)
        self.lock = open(output / ".lock", "w")  # noqa: SIM115
        try:
            # It is free again when this process has ended, however it ends, and its workers, which
            # may live on for some seconds, do not hold it.
            if fcntl is not None:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # a disk without locks raises another OSError
            raise UserError(
                f"{output}: another run is writing to this folder; give another --output"
            ) from None
        except OSError as error:
            print(f"warning: {output} cannot be locked ({error.strerror}); use it for one run only")
        is_same = goes_on_from and Path(goes_on_from).resolve().parent == output.resolve()
        if (output / "last.pt").exists() and not is_same:
            raise UserError(
                f"{output} holds another run (last.pt): continue it with --resume auto, or give "
                "another --output"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()
        if self.world.is_main:
            self.lock.close()

    def say(self, text: str) -> None:
        """Prints, in the main process."""
        if self.world.is_main:
            print(text, flush=True)

    def summary(
        self, training: Any, train_set: Dataset, val_set: Dataset | None, notes: Sequence[str]
    ) -> None:
        """Says what is about to run: versions, devices, data, settings. Starts the files."""
        if not self.world.is_main:
            return
        config, world = training.config, self.world
        counts = train_set.objects_per_image
        parameters = list(training.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
        frozen = sum(p.numel() for p in parameters) / 1e6 - trained
        per_process = config.batch_size // world.size
        validation = f"{len(val_set)} images" if val_set is not None else "none"
        print(
            f"versions      python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, revision {git_revision()}\n"
            f"devices       {world.size} × {describe(world.device)}\n"
            f"batch         {config.batch_size} images: {world.size} processes × {per_process}, "
            f"{min(config.micro_batch or per_process, per_process)} at a time\n"
            f"data          {len(train_set)} images, {counts.sum()} objects of "
            f"{len(train_set.class_names)} classes; validation: {validation}\n"
            f"steps         {training.total_steps} in {config.epochs} epochs, learning rate "
            f"{training.optimizer.defaults['lr']:.3g}\n"
            f"parameters    {trained:.2f} M trained, {frozen:.2f} M frozen\n"
            f"settings      {', '.join([f'preset {config.preset}', *config.changes()])}"
        )
        if crowded := int((counts > config.num_proposals).sum()):
            print(
                f"note: {crowded} of {len(counts)} training images have more objects (up to "
                f"{counts.max()}) than there are proposals ({config.num_proposals}), of which each "
                "takes one; consider a larger --num-proposals"
            )
        print(*(f"note: {note}" for note in notes), sep="\n", flush=True)

        write_json(self.output / "config.json", config.to_dict(), indent=2)
        # A run that was cut off may have reported epochs that are not in its checkpoint.
        old = self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else []
        whole = [json.loads(line) for line in old if line.endswith("}")]
        kept = [line for line in whole if line["epoch"] <= training.epoch]
        with replacing(self.lines) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(str(self.output), purge_step=training.step)

    def start_epoch(self, training: Any) -> None:
        """Starts the progress bar, and the sums unless the epoch was begun before."""
        first = training.step - training.epoch * training.steps_per_epoch
        if first == 0:
            training.sums.clear()
        self.bar = tqdm(
            total=training.steps_per_epoch,
            initial=first,
            desc=f"epoch {training.epoch + 1}/{training.config.epochs}",
            unit="step",
            # None: only on a terminal. Standard error itself is None if it is closed.
            disable=None if self.world.is_main and sys.stderr else True,
        )
        self.started = time.perf_counter()

    def batch_is_loaded(self) -> None:
        """Ends the time that the step has waited for its images."""
        self.loaded = time.perf_counter()

    def step(self, training: Any, values: dict[str, float]) -> None:
        """Adds a step's values to the epoch's and shows them.

        Args:
            training: after the step.
            values: of `train_step`; those of a skipped step are only counted.
        """
        num_images = training.config.batch_size
        now = time.perf_counter()
        is_taken = training.bad_in_a_row == 0
        values = with_sums(values) if is_taken else {"bad_steps": 1}
        values |= {"steps": 1, "images": num_images}
        values |= {"seconds": now - self.started, "data_seconds": self.loaded - self.started}
        for name, value in values.items():
            training.sums[name] = training.sums.get(name, 0.0) + value

        if self.world.is_main and is_taken:
            # This process's images stand for all.
            shown = {name: self.world.size * values[name] for name in LOSSES}
            rate = training.optimizer.param_groups[0]["lr"]
            short = {name.removeprefix("loss_"): f"{value:.3g}" for name, value in shown.items()}
            self.bar.set_postfix(
                short | {"lr": f"{rate:.2g}", "img/s": f"{num_images / values['seconds']:.1f}"},
                refresh=False,
            )
            if training.step % 20 == 0:
                for name, value in (shown | {"grad_norm": values["grad_norm"]}).items():
                    self.board.add_scalar(f"step/{name}", value, training.step)
        self.bar.update()
        self.started = now

    def end_epoch(self, training: Any, metrics: dict[str, Any]) -> None:
        """The epoch's line in metrics.jsonl and on the terminal, its events, and the curves.

        All processes have to call this.

        Args:
            training: its `epoch` is the one that has ended.
            metrics: of the evaluation; empty if there was none.

        Raises:
            OSError: a file cannot be written.
        """
        self.bar.close()
        sums = training.summed()
        if not self.world.is_main:
            return
        steps, bad_steps = (int(sums.pop(name, 0)) for name in ("steps", "bad_steps"))
        images, seconds, data_seconds = (
            sums.pop(name, 0.0) for name in ("images", "seconds", "data_seconds")
        )
        seconds = max(seconds, 1e-9)  # of an epoch without steps
        line = {
            "epoch": training.epoch,
            "step": training.step,
            **{name: value / max(1, steps - bad_steps) for name, value in sums.items()},
            "lr": training.optimizer.param_groups[0]["lr"],
            "images_per_second": images / seconds,
            "data_wait": data_seconds / seconds,  # share of the time spent waiting for images
            "bad_steps": bad_steps,
            **{name: value for name, value in metrics.items() if name.startswith("A")},
            "time": time.time(),
        }
        if self.world.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated(self.world.device) / 1e9

        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.board.add_scalar(f"epoch/{name}", value, training.epoch)
        self.board.flush()
        plot_curves(self.lines, self.output / "curves.png")

        parts = [f"{name.removeprefix('loss_')} {line.get(name, 0):.3f}" for name in LOSSES]
        skipped = f", {bad_steps} steps skipped" if bad_steps else ""
        self.say(
            f"epoch {training.epoch}/{training.config.epochs}: {', '.join(parts)}, lr "
            f"{line['lr']:.2g}, {line['images_per_second']:.1f} images/s, "
            f"{line['data_wait']:.0%} of the time waiting for data{skipped}"
        )


# --- curves ---

# The title of a panel, and the keys of metrics.jsonl that it shows.
CURVES = {
    "training loss, summed over stages": LOSSES[1:],
    "validation, as a fraction of 1": ("AP", "AP50", "AP75"),
    "learning rate at the end of the epoch": ("lr",),
}


def plot_curves(metrics_jsonl: Path, output: Path) -> None:
    """Draws the losses, the AP and the learning rate of a training run over its epochs.

    Args:
        metrics_jsonl: written by `train.py`, one line per epoch.
        output: the picture to write, as PNG.
    """
    epochs = [json.loads(line) for line in metrics_jsonl.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, 3), CURVES.items(), strict=True):
        for key in keys:
            known = [line for line in epochs if line.get(key, -1) >= 0]  # −1: not defined
            x, y = [line["epoch"] for line in known], [line[key] for line in known]
            axes.plot(x, y, marker="o", markersize=3, label=key)
        axes.set(title=title, xlabel="epoch", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")

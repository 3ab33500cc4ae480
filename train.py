"""Training: the paper's recipe (paper, Training details).

    torchrun --nproc_per_node=8 train.py    the paper's R50: 100 proposals, 36 epochs of COCO
    python train.py --preset shapes         minutes on two CPU cores, nothing to download
    python train.py --train-json A.json --train-images DIR --val-json B.json --val-images DIR

In:  a `Config`; every field is a flag (see --help).
Out: in --output: last.pt, best.pt (if there are validation objects), metrics.jsonl (one line per
     epoch), config.json, TensorBoard events, curves.png.

Read it from top to bottom: the learning rate, one step, the loop, the checkpoint, the set-up.

An epoch is one pass over the data without its last incomplete batch; 36 epochs of COCO are 266,112
steps, where the authors' code takes 270,000 steps of endless shuffling. DEVIATIONS.md lists this
and all other differences.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from config import NETWORK, Config, preset_from
from data import check_data, make_dataset, notes_on_data, require_objects
from evaluate import evaluate, format_table
from model import SparseRCNN, build_model, config_of
from support.checkpoint import load_checkpoint, save_checkpoint, take_over
from support.cli import parse_args, run_main
from support.devices import choose_threads
from support.distributed import World, join_world
from support.errors import UserError
from support.loader import make_train_loader
from support.report import Report
from support.signals import StopSignal

# Settings that are no part of a recipe: those of the machine, and of the data.
NO_RECIPE = (
    *("amp", "compile", "workers", "micro_batch", "checkpoint_minutes"),
    *("train_json", "train_images", "val_json", "val_images", "data"),
)
# Settings that an AP depends on.
VALIDATION = ("val_json", "val_images", "data", "shapes_val", "test_size", "max_size", "max_dets")
FEW_STEPS = 300  # hardly enough to learn anything from random weights


@dataclass
class Training:
    """A run: its model, and everything else that a step reads or changes."""

    model: SparseRCNN
    parallel_model: nn.Module  # the model inside DistributedDataParallel, if there are processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # for float16; it does nothing otherwise
    config: Config
    world: World
    steps_per_epoch: int
    num_images: int  # in the training set
    class_names: Sequence[str]
    category_ids: Sequence[int]

    epoch: int = 0  # epochs finished, evaluation included
    step: int = 0  # batches consumed, those of skipped steps included
    bad_in_a_row: int = 0  # steps skipped since the last update
    best: float = -1.0  # best AP so far, as a fraction of 1
    # Sums over the steps of this epoch, of this process's losses and so on, made by `Report.step`.
    sums: dict[str, float] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Steps in the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def summed(self) -> dict[str, float]:
        """`sums` over all processes; all of them have to call this.

        Losses are of each process's own images, so they add up. Counts are the same in all
        processes, and times are this one's.
        """
        names = [name for name in self.sums if name.startswith("loss")]
        losses = self.world.sum(*(self.sums[name] for name in names))
        return {**self.sums, **dict(zip(names, losses, strict=True))}


# --- the recipe ---


def peak_rate(config: Config) -> float:
    """The highest rate: `lr` if given, else linear in the batch size (Goyal et al., 2017)."""
    return config.lr_at_16 * config.batch_size / 16 if config.lr is None else config.lr


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The learning rate at a step: linear warm-up, then ÷10 at each milestone, or half a cosine.

    Args:
        step: index of the step, 0 … total_steps − 1.
        total_steps: number of steps in the whole run.
        config: peak rate, `warmup_steps`, `warmup_factor`, `schedule`, `milestones`.
    """
    warmup_steps = min(config.warmup_steps, total_steps // 10)
    warmup = 1.0
    if step < warmup_steps:
        warmup = config.warmup_factor + (1 - config.warmup_factor) * step / warmup_steps

    if config.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    else:
        decay = 0.1 ** sum(step >= milestone * total_steps for milestone in config.milestones)

    return peak_rate(config) * warmup * decay


def train_step(
    training: Training,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Any]],
    num_objects: float,
) -> dict[str, float]:
    """One step of the recipe.

    Args:
        training: the model and the optimizer, changed in place. The step counter is the caller's.
        images: this process's, each (3, H, W) uint8.
        targets: one per image, with `boxes` and `labels`.
        num_objects: in the whole batch, over all processes.

    Returns:
        Every loss of this process's images, and `grad_norm`, the norm of the whole batch's gradient
        before clipping. If it is not finite the step was skipped, in all processes alike: weights,
        optimizer and batch norms are as before. One bad batch should not cost a run. (The authors'
        code ends the run.)
    """
    config, model, optimizer = training.config, training.model, training.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(training.step, training.total_steps, config)
    optimizer.zero_grad(set_to_none=True)
    # Trained batch norms update their running statistics in the forward pass.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    norm_buffers = [buffer for norm in norms for buffer in norm.buffers()]
    norm_backup = [buffer.clone() for buffer in norm_buffers]

    # Micro-batches: a batch that does not fit into memory is processed in parts, and their
    # gradients add up. Each part is divided by the number of objects in the whole batch (all parts,
    # all processes; see loss.py), so the gradient does not depend on how the batch is split, except
    # that padding goes to the largest image of a part, and trained batch norms see only a part.
    totals: dict[str, Tensor] = {}
    size = config.micro_batch or len(images)
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        # Processes average their gradients after the last part. (No effect without them.)
        training.parallel_model.require_backward_grad_sync = first + size >= len(images)
        dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
        with torch.autocast(training.world.device.type, dtype, enabled=config.amp != "off"):
            losses = training.parallel_model(images[part], targets[part], num_objects=num_objects)
        # The losses are weighted already. DistributedDataParallel averages the gradients over the
        # processes, but the divisor is the objects of the whole batch: we need the sum.
        loss = sum(losses.values()) * training.world.size
        training.scaler.scale(loss).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach()

    training.scaler.unscale_(optimizer)
    totals["grad_norm"] = clip_grad_norm_(model.parameters(), config.clip_norm)
    # One transfer to the host for all values.
    values = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))

    # A NaN in one process is in the average of all gradients, so all processes decide alike.
    if math.isfinite(values["grad_norm"]):
        training.scaler.step(optimizer)
    else:
        for buffer, value in zip(norm_buffers, norm_backup, strict=True):
            buffer.copy_(value)
    training.scaler.update()  # after float16 has overflowed, this lowers the scale
    return values


def train(
    training: Training,
    loader: DataLoader,
    val_set: Dataset | None,
    output: Path,
    report: Report,
) -> int:
    """The loop: steps, a checkpoint every few minutes, and an evaluation after each epoch.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: too many steps in a row, or all of a shorter run, were skipped.
    """
    config, world = training.config, training.world
    if training.epoch == config.epochs:
        report.say(f"nothing to do: all {config.epochs} epochs are done; --epochs can be raised")
        return 0
    share = config.batch_size // world.size  # images of a batch that this process takes
    last_save = time.monotonic()
    while training.epoch < config.epochs:
        training.model.train()
        report.start_epoch(training)
        loader.batch_sampler.seek(
            training.epoch, training.step - training.epoch * training.steps_per_epoch
        )
        with StopSignal() as stop:  # from here on a signal waits for the step to end
            for images, targets in loader:
                report.batch_is_loaded()
                is_save_due = time.monotonic() - last_save > 60 * config.checkpoint_minutes
                # What the processes have to agree on, in one exchange.
                num_objects, num_stops, is_save_due = world.sum(
                    sum(len(target["labels"]) for target in targets),
                    stop.number is not None,
                    world.is_main and is_save_due,
                )
                if num_stops:
                    break

                values = train_step(training, images, targets, num_objects)
                training.step += 1  # after a skipped step too: the schedule counts batches
                is_taken = math.isfinite(values["grad_norm"])
                training.bad_in_a_row = 0 if is_taken else training.bad_in_a_row + 1
                if training.bad_in_a_row >= min(config.max_bad_steps, training.total_steps):
                    own_ids = [target["image_id"] for target in targets]
                    image_ids = sum(world.gather(own_ids), [])
                    raise UserError(
                        f"{training.bad_in_a_row} steps in a row were not finite, the last one "
                        f"with image ids {image_ids}; try a lower --lr (it was "
                        f"{peak_rate(config):.2g}) or --amp off, and look at these images' boxes"
                    )
                report.step(training, values)
                if is_save_due:
                    save(training, output / "last.pt")
                    last_save = time.monotonic()

            # Trained batch norms: all processes evaluate with the main one's statistics.
            world.copy_buffers(training.model)
            save(training, output / "last.pt")  # before the evaluation, which may take long
            last_save = time.monotonic()
            (num_stops,) = world.sum(stop.number is not None)
        if num_stops or stop.number is not None:
            number = stop.number or int(signal.SIGTERM)  # if another process has got the signal
            where = f"step {training.step}; saved {output / 'last.pt'}"
            report.say(f"stopped by signal {number} at {where}")
            return 128 + number

        metrics: dict[str, Any] = {}
        epoch = training.epoch + 1
        if val_set is not None and (epoch % config.eval_every == 0 or epoch == config.epochs):
            metrics, _ = evaluate(
                training.model,
                val_set,
                world,
                batch_size=min(config.micro_batch or share, share),
                workers=config.workers,
                amp=config.amp,
                max_dets=config.max_dets,
                image_bytes=3 * config.eval_size * config.max_size,
            )
        training.epoch = epoch
        report.end_epoch(training, metrics)
        if metrics:
            report.say(format_table(metrics))
        if metrics.get("AP", -1.0) > training.best:
            training.best = metrics["AP"]
            save(training, output / "best.pt")
        save(training, output / "last.pt")
    report.say(f"written: last.pt, metrics.jsonl, curves.png and more in {output}")
    return 0


# --- the checkpoint ---


def save(training: Training, path: Path) -> None:
    """Writes a checkpoint in the main process; all processes have to call this."""
    world, config = training.world, training.config
    rng = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(world.device)
    checkpoint = {
        "model": training.model.state_dict(),
        "config": config.to_dict(),
        "class_names": list(training.class_names),
        "category_ids": list(training.category_ids),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "schedule": {
            "total_steps": training.total_steps,
            "learning_rate": peak_rate(config),
            "num_images": training.num_images,
        },
        "epoch": training.epoch,
        "step": training.step,
        "bad_in_a_row": training.bad_in_a_row,
        "best": training.best,
        "sums": training.summed(),
        "rng": world.gather(rng),
    }
    if world.is_main:
        save_checkpoint(path, checkpoint)
    world.sum(0)  # Nobody ends before the file is whole: torchrun would end the others too.


def restore(training: Training, checkpoint: Mapping[str, Any], path: str, output: Path) -> str:
    """Goes back to what `save` wrote; returns a line that says so.

    Raises:
        UserError: the checkpoint was not written by `save`, is of another batch size or data set,
            with which the steps so far would mean something else, or has done more than all epochs.
    """
    config = training.config
    if "optimizer" not in checkpoint:
        raise UserError(f"{path}: holds no training state; start from its weights with --weights")
    old, new = checkpoint["config"], config.to_dict()
    batch_size = old["batch_size"]
    num_images = checkpoint["schedule"].get("num_images", training.num_images)
    if (batch_size, num_images) != (config.batch_size, training.num_images):
        raise UserError(
            f"{path}: a run on {num_images} images with --batch-size {batch_size}; here are "
            f"{training.num_images} images, and --batch-size {config.batch_size}. Resume with the "
            "same, or start another run with --weights"
        )
    if checkpoint["step"] > training.total_steps:
        raise UserError(f"--epochs {config.epochs}: {path} has done more than these already")

    training.model.load_state_dict(checkpoint["model"])
    training.optimizer.load_state_dict(checkpoint["optimizer"])
    for group in training.optimizer.param_groups:
        group["weight_decay"] = config.weight_decay
    if checkpoint["scaler"]:  # empty without float16
        training.scaler.load_state_dict(checkpoint["scaler"])
    for name in ("epoch", "step", "best", "bad_in_a_row"):
        setattr(training, name, checkpoint[name])
    # The sums are those of all processes, so only one of them may go on with the losses.
    training.sums = dict(checkpoint["sums"])
    if not training.world.is_main:
        training.sums |= {name: 0.0 for name in training.sums if name.startswith("loss")}
    if len(checkpoint["rng"]) == training.world.size:
        rng = checkpoint["rng"][training.world.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and training.world.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], training.world.device)

    line = f"resumed from {path} at step {training.step} of {training.total_steps}"
    if changed := [name for name in new if old.get(name, new[name]) != new[name]]:
        before = training.optimizer.param_groups[0]["lr"]
        after = learning_rate(training.step, training.total_steps, config)
        changes = ", ".join(f"{name} {old[name]} → {new[name]}" for name in changed)
        line += f", with {changes}; the learning rate goes from {before:.2g} to {after:.2g}"
    is_other = not set(changed).isdisjoint(VALIDATION)
    if training.best >= 0 and (is_other or not (output / "best.pt").exists()):
        training.best = -1.0
        line += "; the best AP starts afresh" + (", on other validation data" if is_other else "")
    return line


# --- set-up: data, model, optimizer, resume ---


@dataclass(frozen=True)
class TrainArgs:
    # Folder that everything is written into; with --resume FILE by default that of the file.
    output: Path = Path("runs/train")
    # Checkpoint to fine-tune: ours, the authors', MMDetection's, or a name such as
    # sparse-rcnn-r50-100. Network and recipe are its own, unless --preset names another recipe.
    # Classes are matched by name.
    weights: str | None = None
    # Checkpoint to resume from. Its settings apply unless a flag overrides them; "auto" is last.pt
    # in --output, if it exists.
    resume: str | None = None
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    check_data: bool = False  # decode every image before training
    # Leave out validation objects of classes that the training data does not have.
    ignore_new_classes: bool = False
    config: Config = field(default_factory=Config)  # the settings of config.py


def read_args(argv: Sequence[str]) -> tuple[TrainArgs, dict[str, Any] | None]:
    """The command line, and the checkpoint of --resume or --weights.

    The settings of a run that is resumed are the defaults of its flags. So are those of a
    checkpoint that is fine-tuned, but its data is not, and --preset may replace its recipe.

    Raises:
        UserError: a flag has no effect, or asks for another network than the checkpoint's.
    """
    given = {word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--")}
    parse = partial(parse_args, argv, TrainArgs, "train.py", __doc__.split("\n\n")[0])
    preset = preset_from(argv)
    args = parse(TrainArgs(config=preset))
    if args.weights and args.resume not in (None, "auto"):
        raise UserError("--weights has no effect beside --resume FILE; leave one of them out")
    last = args.output / "last.pt"
    if args.resume == "auto" and not last.exists():
        print(f"note: {last} is not there, so nothing is resumed", flush=True)
        args = replace(args, resume=None)
    elif args.resume == "auto":
        args = replace(args, resume=str(last))

    checkpoint = None
    if path := args.resume or args.weights:
        checkpoint = load_checkpoint(path)
        config = config_of(checkpoint, path, preset if "--preset" in given else None)
        default = config if args.resume else recipe_from(config, preset, given)
        has_folder = "--output" in given or not args.resume
        output = args.output if has_folder else Path(args.resume).parent
        args = replace(parse(TrainArgs(config=default)), resume=args.resume, output=output)
        for name in (*NETWORK, "preset", "freeze_backbone") if args.resume else NETWORK:
            asked, has = getattr(args.config, name), getattr(config, name)
            # Others' files and bare state dicts only tell what can be read off their shapes.
            if asked != has and name in checkpoint["config"]:
                flag = f"--{name.replace('_', '-')}"
                way_out = "start another run from its --weights" if args.resume else "train afresh"
                raise UserError(
                    f"{flag} {asked}: {path} has {flag} {has}, which cannot change; leave the flag "
                    f"out, or {way_out}"
                )

    for flag, beside, has_no_effect in (
        ("--lr-at-16", "--lr", args.config.lr is not None),
        ("--milestones", "--schedule cosine", args.config.schedule == "cosine"),
        ("--crop-sizes", "--no-crop", not args.config.crop),
        ("--crop-resize", "--no-crop", not args.config.crop),
    ):
        if has_no_effect and flag in given:
            raise UserError(f"{flag} has no effect beside {beside}; leave one of them out")
    return args, checkpoint


def recipe_from(config: Config, preset: Config, given: Collection[str]) -> Config:
    """The defaults of a run that fine-tunes a model of `config`, which keep its network.

    Args:
        config: the settings that the model was trained with. Its recipe is taken, but not its data.
        preset: has everything else, and the recipe too if --preset is among the flags.
        given: the flags of the command line.
    """
    names = (*NO_RECIPE, "test_size") if "--min-sizes" in given else NO_RECIPE
    rate_at_16 = peak_rate(config) * 16 / config.batch_size  # for any --batch-size
    recipe = replace(config, lr=None, lr_at_16=rate_at_16)
    recipe = replace(recipe, **{name: getattr(preset, name) for name in names})
    recipe = preset if "--preset" in given else recipe
    return replace(recipe, **{name: getattr(config, name) for name in NETWORK})


def start_training(
    config: Config,
    world: World,
    train_set: Dataset,
    steps_per_epoch: int,
    build: Callable[[Config], SparseRCNN] = build_model,
) -> Training:
    """A new model, and AdamW over all of its parameters that are trained (paper)."""
    torch.manual_seed(config.seed)
    # Convolutions are faster with the channels last in memory, most of all in bfloat16.
    model = build(config).to(world.device, memory_format=torch.channels_last)
    if not world.is_main:
        torch.manual_seed(config.seed + world.rank)  # dropout differs between the processes
    if config.compile:
        model.compile()
    optimizer = AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=peak_rate(config),
        weight_decay=config.weight_decay,
        fused=True,
    )
    return Training(
        model,
        model,
        optimizer,
        torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16"),
        config,
        world,
        steps_per_epoch,
        num_images=len(train_set),
        class_names=train_set.class_names,
        category_ids=train_set.category_ids,
    )


def share_gradients(training: Training) -> None:
    """Puts the model into DistributedDataParallel, which also gives all processes the same weights.

    Args:
        training: with the weights that it starts from; nothing happens if there is one process.
    """
    if training.world.size > 1:
        # Gradients are averaged where they are, without a second copy.
        parallel = DistributedDataParallel(training.model, gradient_as_bucket_view=True)
        # No buffers in every step: `train` copies them before an evaluation. (The argument of this
        # name gives a warning from torch 2.14 on, and its new name is not in 2.11.)
        parallel.broadcast_buffers = False
        training.parallel_model = parallel


def run(
    args: TrainArgs,
    checkpoint: dict[str, Any] | None = None,
    build: Callable[..., SparseRCNN] = build_model,
) -> int:
    """`main` after the command line is read: data, model, optimizer, resume, then `train`.

    Args:
        args: the command line.
        checkpoint: of --resume or --weights; it is emptied once it is loaded.
        build: called as build(config, pretrained_backbone=...) to make the model.
    """
    with (
        join_world(args.device) as world,
        Report(args.output, world, goes_on_from=args.resume) as report,
    ):
        config = replace(args.config, test_size=args.config.eval_size)
        choose_threads(world.device, config.backbone, config.amp)
        known_names = checkpoint["class_names"] if args.resume else None
        train_set = make_dataset(config, "train", class_names=known_names)
        require_objects(train_set)
        val_set = make_dataset(
            config, "val", train_set.class_names, ignore_new_classes=args.ignore_new_classes
        )
        datasets = [dataset for dataset in (train_set, val_set) if dataset is not None]
        if args.check_data:
            for dataset in datasets:
                check_data(dataset, world.rank, world.size)
        # A data set smaller than one batch is one smaller batch, and the rate follows.
        batch_size = min(config.batch_size, len(train_set) // world.size * world.size)
        config = replace(config, num_classes=len(train_set.class_names), batch_size=batch_size)
        image_bytes = 3 * max(config.min_sizes) * config.max_size  # at most
        loader = make_train_loader(
            train_set, batch_size, config.seed, world, config.workers, image_bytes
        )

        # A model that is about to be overwritten needs no ImageNet weights.
        build = partial(build, pretrained_backbone=checkpoint is None)
        training = start_training(config, world, train_set, len(loader), build)
        notes = [note for d in datasets for note in (*d.notes, *notes_on_data(d, config))]
        low, high = min(config.min_sizes), max(config.min_sizes)
        if not low / 2 <= config.eval_size <= 2 * high:
            notes.append(f"evaluates at {config.eval_size} pixels, but trains at {low} to {high}")
        if checkpoint is not None and args.resume:
            notes.append(restore(training, checkpoint, args.resume, args.output))
        elif checkpoint is not None:
            lines = take_over(training.model, checkpoint, training.class_names)
            notes += [f"{args.weights}: {line}" for line in lines]
        if checkpoint is not None:
            checkpoint.clear()  # the caller holds it too: over 1 GB for the whole run
        elif training.total_steps < FEW_STEPS:
            notes.append(
                f"{training.total_steps} steps are few to learn from scratch (Shapes takes 1,500, "
                "COCO 270,000); give more --epochs, or start from --weights"
            )
        if len(set(world.gather((training.epoch, training.step)))) > 1:
            raise UserError(
                "the processes have found different checkpoints; put --output on a disk that all "
                "machines share"
            )
        share_gradients(training)
        report.summary(training, train_set, val_set, notes)
        return train(training, loader, val_set, args.output, report)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args, checkpoint = read_args(sys.argv[1:] if argv is None else list(argv))
    return run(args, checkpoint)


if __name__ == "__main__":
    sys.exit(run_main(main, "train.py"))

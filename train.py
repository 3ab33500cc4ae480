"""Training: the paper's recipe (paper, Training details).

    torchrun --nproc_per_node=8 train.py    the paper's R50: 100 proposals, 36 epochs of COCO
    python train.py --preset shapes         minutes on two CPU cores, nothing to download
    python train.py --train-json A.json --train-images DIR --val-json B.json --val-images DIR

In:  a `Config`; every field is a flag (see --help).
Out: in --output: last.pt, best.pt (if there is validation data), metrics.jsonl (one line per
     epoch), config.json, TensorBoard events, curves.png.

An epoch is one pass over the data without its last incomplete batch; 36 epochs of COCO are 266,112
steps, where the authors' code takes 270,000 steps of endless shuffling. DEVIATIONS.md lists this
and all other differences.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import Dataset

from config import Config
from data import check_data, make_dataset, require_objects
from evaluate import evaluate, format_table
from model import SparseRCNN, build_model
from support.checkpoint import Training, load_checkpoint, load_what_fits
from support.cli import parse_args, preset_from, run_main
from support.devices import AMP_DTYPES, check_compiler, choose_threads, warn_of_slow_bf16
from support.distributed import World, join_world
from support.errors import NotFinite, UserError
from support.faults import (
    Clock,
    StopSignal,
    check_batch_norms,
    saved_if_loading_fails,
    skip,
    statistics_restored,
)
from support.loader import Batch, GroupedBatches, Loader, fetch, make_loader
from support.report import Report, prepare_output, print_summary, warn_of_crowded_images


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

    return config.learning_rate * warmup * decay


def train_step(training: Training, batch: Batch) -> dict[str, float]:
    """One step of the recipe.

    Args:
        training: the model and the optimizer, changed in place. The step counter is the caller's.
        batch: this process's images, and the number of objects in the whole batch.

    Returns:
        Every loss of the whole batch, and `grad_norm`, the gradient's norm before clipping.

    Raises:
        NotFinite: in all processes, if a prediction, a loss or the gradient is not finite; no
            weight has changed.
    """
    config, world = training.config, training.world
    optimizer, scaler = training.optimizer, training.scaler

    rate = learning_rate(training.step, training.total_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)

    # Micro-batches: a batch that does not fit into memory is processed in parts, and their
    # gradients add up. Each part is divided by the number of objects in the whole batch (all parts,
    # all processes; see loss.py), so the gradient does not depend on how the batch is split.
    totals: dict[str, torch.Tensor] = {}
    for part in batch.parts(config.micro_batch):
        with torch.autocast(world.device.type, AMP_DTYPES[config.amp], enabled=config.amp != "off"):
            # After the last part the processes average their gradients.
            losses = training.parallel_model(
                part.images, part.targets, num_objects=batch.num_objects, is_last=part.is_last
            )
        # The losses are weighted already. DistributedDataParallel averages the gradients over the
        # processes, but the divisor is the objects of the whole batch: we need the sum.
        loss = sum(losses.values()) * world.size
        scaler.scale(loss).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach()

    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_(training.model.parameters(), config.clip_norm).item()

    # The losses of the whole batch. They, and the gradient that DistributedDataParallel has
    # averaged, are the same in all processes: either all of them step or none.
    batch_losses = world.sum(*torch.stack(list(totals.values())).tolist())
    is_finite = math.isfinite(grad_norm + sum(batch_losses))
    if is_finite:
        scaler.step(optimizer)
    scaler.update()  # also after a skipped step: this lowers the scale of float16
    if not is_finite:
        raise NotFinite("the loss or its gradient is not finite")
    return {**dict(zip(totals, batch_losses, strict=True)), "grad_norm": grad_norm}


def train(
    training: Training,
    loader: Loader,
    val_set: Dataset | None,
    output: Path,
    report: Report,
    stop: StopSignal,
) -> int:
    """The loop: steps, a checkpoint every few minutes, and an evaluation after each epoch.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    config, world, model = training.config, training.world, training.model
    clock = Clock(config.checkpoint_minutes)
    while training.epoch < config.epochs:
        model.train()
        report.start_epoch()
        # They end early if any process gets a signal, and say when a checkpoint is due.
        batches = fetch(loader, world, training.epoch, training.steps_into_epoch, stop, clock)
        with saved_if_loading_fails(training, output / "last.pt"):
            for batch in batches:
                try:
                    with statistics_restored(model):
                        values = train_step(training, batch)
                    training.bad_in_a_row = 0
                except NotFinite as error:
                    values = skip(training, batch.image_ids, error, output / "last.pt")
                training.step += 1  # after a skipped step too: the schedule counts batches
                report.step(batch, values)
                if batch.is_save_due:
                    training.save(output / "last.pt")

        # Trained batch norms: all processes evaluate with the main one's statistics.
        world.copy_buffers(model)
        training.save(output / "last.pt")  # before the evaluation, which may take long
        if (number := stop.agreed(world)) is not None:
            report.say_stopped(number)
            return 128 + number

        metrics: dict[str, Any] = {}
        epoch = training.epoch + 1
        is_eval_due = epoch % config.eval_every == 0 or epoch == config.epochs
        if val_set is not None and is_eval_due:
            with stop.obeyed(f"in an evaluation; {output / 'last.pt'} is from right before it"):
                metrics = evaluate_training(training, val_set)

        training.epoch = epoch
        report.end_epoch(metrics)
        if metrics:
            report.say(format_table(metrics))
        if metrics.get("AP", -1.0) > training.best:
            training.best = metrics["AP"]
            training.save(output / "best.pt")
        training.save(output / "last.pt")
    report.say_written()
    return 0


def evaluate_training(training: Training, val_set: Dataset) -> dict[str, Any]:
    """The model's AP on the validation set, with as many images at a time as in training."""
    config, world = training.config, training.world
    batch_size = config.micro_batch or config.batch_size // world.size
    metrics, _ = evaluate(
        training.model,
        val_set,
        world,
        batch_size=batch_size,
        workers=config.workers,
        amp=config.amp,
        batch_bytes=3 * config.test_size * config.max_size * batch_size,
    )
    return metrics


# --- set-up: data, model, optimizer, resume ---


@dataclass(frozen=True)
class TrainArgs:
    config: tyro.conf.Suppress[Config] = field(default_factory=Config)  # its fields are the flags
    output: Path = Path("runs/train")  # folder that everything is written into
    # Checkpoint to start from, for fine-tuning: ours, the authors', MMDetection's, or a name like
    # sparse-rcnn-r50-100. Tensors of the same name and shape are loaded.
    weights: str | None = None
    # Checkpoint to resume from. Its settings apply unless a flag overrides them; "auto" is last.pt
    # in --output, if it exists.
    resume: str | None = None
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    check_data: bool = False  # decode every image before training
    # Leave out validation objects of classes that the training data does not have.
    ignore_new_classes: bool = False


def read_args(argv: Sequence[str]) -> tuple[TrainArgs, dict[str, Any] | None]:
    """The command line, and the checkpoint to resume from.

    The settings of a run that is resumed are the defaults of its flags.
    """
    description = __doc__.split("\n\n")[0]
    args = parse_args(argv, TrainArgs, "train.py", description, config=preset_from(argv))
    resume = args.resume
    if resume == "auto":
        last = args.output / "last.pt"
        resume = str(last) if last.exists() else None
    if resume is None:
        return replace(args, resume=None), None

    checkpoint = load_checkpoint(resume)
    config = Config.from_dict(checkpoint["config"])
    has_preset = any(word.split("=")[0] == "--preset" for word in argv)
    if has_preset and args.config.preset != config.preset:
        raise UserError(
            f"--preset {args.config.preset}: {resume} is a run of --preset {config.preset}; leave "
            "out --preset"
        )
    args = parse_args(argv, TrainArgs, "train.py", description, config=config)
    return replace(args, resume=resume), checkpoint


def make_datasets(
    args: TrainArgs, known_names: Sequence[str] | None
) -> tuple[Dataset, Dataset | None]:
    """The training set and the validation set.

    Args:
        args: the command line.
        known_names: class names of the checkpoint to resume from; they must be the data's.

    Raises:
        UserError: the data cannot be trained on.
    """
    train_set = make_dataset(args.config, "train", class_names=known_names)
    val_set = make_dataset(
        args.config,
        "val",
        class_names=train_set.class_names,
        ignore_new_classes=args.ignore_new_classes,
    )
    require_objects(train_set)
    return train_set, val_set


def start_training(
    config: Config,
    world: World,
    train_set: Dataset,
    steps_per_epoch: int,
    build: Callable[[Config], SparseRCNN] = build_model,
) -> Training:
    """A new model, and AdamW over all of its parameters that are trained (paper)."""
    torch.manual_seed(config.seed)
    try:
        model = build(config).to(world.device)
    except FileNotFoundError as error:
        flags = "--no-pretrained-backbone --no-freeze-backbone"
        raise UserError(f"{error}. On the command line these are {flags}") from None
    if not world.is_main:
        torch.manual_seed(config.seed + world.rank)  # dropout differs between the processes
    if config.compile:
        check_compiler(world.device)
        model.compile()
    optimizer = AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return Training(
        model,
        optimizer,
        config,
        world,
        steps_per_epoch,
        num_images=len(train_set),
        class_names=train_set.class_names,
        category_ids=train_set.category_ids,
    )


def load_weights(
    training: Training, args: TrainArgs, checkpoint: dict[str, Any] | None
) -> list[str]:
    """Resumes, or starts from other weights (--weights is for the first start only); returns notes.

    Raises:
        UserError: the checkpoint does not fit, or the processes have found different ones.
    """
    if checkpoint is not None:
        training.restore(checkpoint, args.resume)
        checkpoint.clear()  # the caller holds it too: over 1 GB for the whole run
    places = training.world.gather((training.epoch, training.step))
    if len(set(places)) > 1:
        raise UserError(
            "the processes have found different checkpoints; put --output on a disk that all "
            "machines share"
        )
    if args.resume is not None:
        steps = f"step {training.step} of {training.total_steps}"
        return [f"resumed from {args.resume} at {steps}"]
    if args.weights is None:
        return []
    notes = []
    with training.world.together():
        notes = load_what_fits(training.model, args.weights, training.class_names)
    return notes


def run(
    args: TrainArgs,
    checkpoint: dict[str, Any] | None,
    build: Callable[..., SparseRCNN] = build_model,
) -> int:
    """`main` after the command line is read: data, model, optimizer, resume, then `train`.

    Args:
        args: the command line.
        checkpoint: to resume from, or None; emptied once it is loaded.
        build: called as build(config, pretrained_backbone) to make the model.
    """
    with join_world(args.device) as world:
        choose_threads(world.device, args.config, max(args.config.min_sizes))
        known_names = checkpoint["class_names"] if checkpoint is not None else None
        train_set, val_set = make_datasets(args, known_names)
        config = replace(args.config, num_classes=len(train_set.class_names))
        lock, notes = None, []
        with world.together():
            if world.is_main:
                warn_of_crowded_images(train_set, config.num_proposals)
                warn_of_slow_bf16(world.device, config.amp)
                lock = prepare_output(args.output, args.resume)
            for dataset in (train_set, val_set):
                if dataset is not None:
                    notes += dataset.notes
                    notes += check_data(dataset, world.rank, world.size, decode=args.check_data)

        sizes_hw = train_set.sizes_hw
        batches = GroupedBatches(sizes_hw, config.batch_size, config.seed, world.rank, world.size)
        loader = make_loader(
            train_set,
            batches,
            config.workers,
            reseeded=True,
            batch_bytes=3 * max(config.min_sizes) * config.max_size * batches.share,
        )

        # A model that is about to be overwritten needs no ImageNet weights.
        build = partial(build, pretrained_backbone=checkpoint is None)
        training = start_training(config, world, train_set, len(batches), build)
        check_batch_norms(training, batches.share)
        notes += load_weights(training, args, checkpoint)

        if world.is_main:
            print_summary(training, train_set, val_set, notes)
        with StopSignal() as stop, Report(args.output, training, lock) as report:
            return train(training, loader, val_set, args.output, report, stop)


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

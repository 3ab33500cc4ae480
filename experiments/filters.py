"""What the generated filters of a trained model depend on: `python -m experiments.filters WEIGHTS`.

"Dynamic" means that a proposal generates the filters that its region is searched with, so that they
can differ between the proposals and between images. How much does a trained model make of it? Its
filters are replaced, in all stages or in one, and AP is measured again:

    its own                 the filters as they are generated
    mean over the images    proposal n always gets the same filters, whatever the image
    mean over all           all proposals get the same filters: a static head
    another proposal's      proposal n gets the filters of proposal n − 1, in the same image

and the variance of the filters is divided: how much of it lies between the proposals, and how much
between the images.

In:  a checkpoint of ours and the images it is evaluated on, or --val-json and --val-images.
Out: two tables on the terminal.

Shapes: N proposals, S stages, I images, P = 2·C·D parameters that a proposal generates.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor, cat, nn
from torch.utils.data import Dataset

from data import validation_set
from evaluate import evaluate
from experiments.measure import Row, format_table
from head import DynamicInteraction
from model import SparseRCNN
from support.checkpoint import load_model
from support.cli import parse_args, run_main
from support.devices import choose_threads, pick_device
from support.distributed import World
from support.errors import UserError

# What takes the place of the parameters of a stage: from its number and (·, N, P) to (·, N, P).
Replace = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class FiltersArgs:
    weights: tyro.conf.Positional[Path]  # checkpoint of a model with dynamic interactions
    val_json: str | None = None  # annotations (COCO format); by default those of the training run
    val_images: str | None = None  # folder that the file names in --val-json are relative to
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …


@contextlib.contextmanager
def replaced(model: SparseRCNN, change: Replace, stages: Sequence[int]) -> Iterator[None]:
    """The model with other filters in these stages."""
    num_proposals = len(model.proposal_boxes)

    def hook_of(stage: int) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple, params: Tensor) -> Tensor:
            per_image = params.view(-1, num_proposals, params.shape[-1])
            return change(stage, per_image).expand_as(per_image).reshape(params.shape)

        return hook

    hooks = [
        model.head.stages[stage].interaction.linear1.register_forward_hook(hook_of(stage))
        for stage in stages
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_filters(
    model: SparseRCNN, dataset: Dataset, world: World
) -> tuple[list[Row], list[Row]]:
    """The rows of the two tables: AP with other filters, and the variance of each stage's."""

    def precision(change: Replace, stages: Sequence[int]) -> float:
        with replaced(model, change, stages):
            return 100 * evaluate(model, dataset, world, workers=0)[0]["AP"]

    stages = range(len(model.head.stages))
    seen: list[list[Tensor]] = [[] for _ in stages]

    def remember(stage: int, params: Tensor) -> Tensor:
        seen[stage].append(params.detach().cpu())
        return params

    own = precision(remember, stages)
    params = [cat(parts) for parts in seen]  # per stage (I, N, P)
    per_proposal = [p.mean(0, keepdim=True).to(world.device) for p in params]  # (1, N, P)
    for_all = [p.mean((0, 1), keepdim=True).to(world.device) for p in params]  # (1, 1, P)
    ways: dict[str, Replace] = {
        "mean over the images": lambda stage, _: per_proposal[stage],
        "mean over all": lambda stage, _: for_all[stage],
        "another proposal's": lambda _, params: params.roll(1, dims=1),
    }
    rows: list[Row] = [{"filters": "its own", "all": own, "first": own, "last": own}]
    for name, change in ways.items():
        where = {"all": stages, "first": stages[:1], "last": stages[-1:]}
        rows.append(
            {"filters": name, **{key: precision(change, some) for key, some in where.items()}}
        )

    variances: list[Row] = []
    for stage, p in enumerate(params):
        power = p.square().mean((0, 1)).sum()
        total = p.var((0, 1), correction=0).sum()
        between_proposals = p.mean(0).var(0, correction=0).sum()
        variances.append(
            {
                "stage": stage + 1,
                "total": (total / power).item(),
                "proposals": (between_proposals / power).item(),
                "images": ((total - between_proposals) / power).item(),
            }
        )
    return rows, variances


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: the checkpoint cannot be loaded, or its stages have no dynamic interaction.
    """
    description = __doc__.split("\n\n")[0]
    args = parse_args(argv, FiltersArgs, "python -m experiments.filters", description)
    device = pick_device(args.device)
    model, checkpoint = load_model(args.weights, device)
    if not all(isinstance(s.interaction, DynamicInteraction) for s in model.head.stages):
        raise UserError(f"{args.weights}: its stages have no dynamic interaction")
    config = checkpoint["config"]
    choose_threads(device, config, config.test_size)
    dataset = validation_set(checkpoint, val_json=args.val_json, val_images=args.val_images)
    rows, variances = measure_filters(model, dataset, World(device))

    print(f"AP of {args.weights} on {len(dataset)} images, with other filters in …")
    columns = {"filters": "{filters}"}
    for name in ("all", "first", "last"):
        columns["all stages" if name == "all" else f"the {name} stage"] = f"{{{name}:.1f}}"
    print(f"\n{format_table(rows, columns)}\n")
    print("Variance of the filters, as a share of their mean square:\n")
    columns = {
        "stage": "{stage:d}",
        "variance": "{total:.1%}",
        "between the proposals": "{proposals:.1%}",
        "between images": "{images:.1%}",
    }
    print(format_table(variances, columns))


if __name__ == "__main__":
    sys.exit(run_main(main, "experiments.filters"))

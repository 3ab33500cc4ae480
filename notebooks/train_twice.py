"""The training of notebook 4: the same detector, matched in two ways.

Shapes: B images, M objects in an image.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from config import PRESETS
from data import make_dataset
from model import SparseRCNN, build_model, load_model
from notebooks.common import Trained, at_least, boxes_per_object, with_nms
from train import learning_rate

STEPS = {"trained": 40, "random head": 200}  # from each of the two starts
RATES = {"trained": 5e-4, "random head": 1e-3}  # learning rates
BATCH = 8  # images per step


@cache
def train_items() -> list[tuple[Tensor, dict]]:
    """The images and targets of the longest training; half of the images are flipped."""
    torch.manual_seed(0)
    train_set = make_dataset(PRESETS["shapes"], "train")
    return [train_set[i] for i in range(BATCH * max(STEPS.values()))]


@torch.enable_grad()
def train(start: str, matcher: nn.Module) -> SparseRCNN:
    """Trains with a matcher; nothing else differs between two calls with one start.

    The backbone is that of `assets/shapes.pt` and stays fixed.

    Args:
        start: "trained", that checkpoint, or "random head", a smaller model with a new head.
    """
    config = replace(PRESETS["shapes"], batch_size=BATCH, lr=RATES[start])
    torch.manual_seed(0)  # of a new head
    model = load_model("assets/shapes.pt")[0]
    if start == "random head":
        backbone, model = model.backbone, build_model(config)
        model.backbone = backbone
    model.train().backbone.eval().requires_grad_(False)
    model.criterion.matcher = matcher

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
    for step in range(STEPS[start]):
        items = train_items()[BATCH * step : BATCH * (step + 1)]
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS[start], config)
        optimizer.zero_grad()
        sum(model(*zip(*items, strict=True)).values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def measure(
    model: SparseRCNN, world: Trained, thresholds: Sequence[float] = (0.3,)
) -> tuple[float, float, list[Tensor]]:
    """AP without and with NMS, and for each threshold how many boxes lie on each object, (M,)."""
    found = model(world.images)
    pairs = list(zip(found, world.targets, strict=True))
    counts = [
        torch.cat([boxes_per_object(at_least(each, threshold), target) for each, target in pairs])
        for threshold in thresholds
    ]
    return world.ap(found), world.ap([with_nms(each) for each in found]), counts

"""The models that `experiments.ablate` compares, each named after what it is (slides: Tables 3–8 and 10).

A variant is `build_model`'s model with another module in one place: other stages in the head, or other proposal boxes
to start from. The backbone is built first, so that with one seed all variants start with the same one.

Shapes: B images, N proposals, C channels, S stages, K classes; the RoI is R×R bins. Boxes as cx, cy, w, h lie in 0–1 of
the image, as xyxy in its pixels.

Where the slides leave something open, this is what was chosen:
    the static head     Faster R-CNN's two linear layers on the flattened region, 4·C wide (1024 for the paper's C), and
                        after them the feed-forward network and the predictions of every other variant. It has neither
                        proposal features nor self-attention: proposals differ in their boxes alone.
    feature reuse       the last stage's object feature beside this one's, and a linear layer back to C. The first stage
                        has no stage before it and reuses nothing.
    self-attention      among the features that are reused, right before they are. In the first stage these are the
                        proposal features, which come in with this row.
    first boxes         Tables 6 to 8 and 10 start from the whole image, as the paper's models do. Tables 3 to 5 start
                        all their rows from the grid: proposals that have only their boxes, and all the same one, would
                        find the same and predict the same, and nothing but the luck of the matching parts them (one
                        static stage came to AP 0.0 so). Their last row is the grid's of Table 6.
    grid                cells tile the image, in about as many rows as columns; where N does not divide, the first rows
                        have a cell more. The grids of several scales that G-CNN starts from do not give a number of
                        boxes that can be chosen.
    random              normal(0.5, 0.2) for centre and size, clamped to 0–1 and 0.05–1: a box needs an area.
    positional encoding sines and cosines of the box, as in "Attention is all you need", added before every stage, as
                        DETR adds its object queries before every layer. It has nothing to learn, and no gradient goes
                        through it to the boxes: these are learned as in all other variants.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import Config
from head import Stage, apply_deltas
from model import SparseRCNN, build_model

Build = Callable[[Config, bool], SparseRCNN]  # the signature of `build_model`


class StaticHead(nn.Module):
    """Faster R-CNN's head: the same two layers for the region of every proposal; (B·N, C, R, R) -> (B·N, C)."""

    def __init__(self, hidden_dim: int, roi_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(roi_size**2 * hidden_dim, 4 * hidden_dim),
            nn.ReLU(),
            nn.Linear(4 * hidden_dim, hidden_dim),
            # As after the dynamic interaction: what the feed-forward network gets has one scale in all variants.
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
        )

    def forward(self, roi_feats: Tensor) -> Tensor:
        return self.layers(roi_feats)


class StaticStage(Stage):
    """A stage of a cascade without feature reuse: its region and its box are all that a proposal has (Tables 3, 4).

    Args:
        config: C, K, R and the widths.
    """

    def __init__(self, config: Config):
        super().__init__(
            **stage_options(config), interaction=StaticHead(config.hidden_dim, config.roi_size)
        )
        self.self_attn = self.attn_norm = self.interaction_norm = None

    def object_feats(self, pro_feats: Tensor, found: Tensor) -> Tensor:
        """pro_feats (B, N, C) of the last stage, found (B, N, C) in the regions -> (B, N, C)."""
        return found

    def forward(
        self, roi_feats: Tensor, boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Stage.forward`, whose last lines these are."""
        found = self.interaction(roi_feats).view_as(pro_feats)  # (B, N, C)
        obj_feats = self.object_feats(pro_feats, found)
        obj_feats = self.ffn_norm(obj_feats + self.dropout(self.ffn(obj_feats)))
        logits = self.cls_logits(self.cls_layers(obj_feats))  # (B, N, K)
        deltas = self.box_deltas(self.reg_layers(obj_feats))  # (B, N, 4)
        return logits, apply_deltas(deltas, boxes_px), obj_feats


class ReuseStage(StaticStage):
    """With feature reuse: the object feature of the last stage is concatenated to this one's (Table 4)."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.fuse = nn.Linear(2 * config.hidden_dim, config.hidden_dim)
        nn.init.xavier_uniform_(self.fuse.weight)

    def object_feats(self, pro_feats: Tensor, found: Tensor) -> Tensor:
        return self.fuse(torch.cat((pro_feats, found), dim=-1))


class AttentionStage(ReuseStage):
    """With self-attention among the features that are reused, still without instance interaction (Table 5)."""

    def __init__(self, config: Config):
        super().__init__(config)
        whole = Stage(**stage_options(config))
        self.self_attn, self.attn_norm = whole.self_attn, whole.attn_norm

    def object_feats(self, pro_feats: Tensor, found: Tensor) -> Tensor:
        attended = self.self_attn(pro_feats, pro_feats, pro_feats, need_weights=False)[0]
        return super().object_feats(self.attn_norm(pro_feats + self.dropout(attended)), found)


class PositionalStage(nn.Module):
    """A stage that is also told where its proposals are (Table 10).

    Args:
        stage: of `build_model`. It lies in a module of its own, so that its weights do not load as a plain model's.
    """

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def forward(
        self, roi_feats: Tensor, boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Stage.forward`."""
        return self.stage(
            roi_feats, boxes_px, pro_feats + box_encoding(boxes_px.detach(), pro_feats.shape[-1])
        )


def box_encoding(boxes_px: Tensor, hidden_dim: int) -> Tensor:
    """Sines and cosines of centre and size, in wavelengths from 2π pixels to 2π · 10,000^(1 − 8/C).

    Args:
        boxes_px: (…, 4) float32 xyxy pixels.
        hidden_dim: C, a multiple of 8: sines and cosines of four numbers.

    Returns:
        (…, C) float32, within −1 and 1.
    """
    corners = boxes_px.unflatten(-1, (2, 2))  # (…, 2, 2): upper left and lower right x, y
    cxcywh_px = torch.cat(
        (corners.mean(-2), corners[..., 1, :] - corners[..., 0, :]), dim=-1
    )  # (…, 4)
    count = hidden_dim // 8
    rates = 10_000 ** -(torch.arange(count, device=boxes_px.device) / count)  # radians a pixel
    angles = cxcywh_px[..., None] * rates  # (…, 4, C/8)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (…, C)


def stage_options(config: Config) -> dict[str, float]:
    """What every kind of stage is given of the config."""
    names = (
        "hidden_dim",
        "num_classes",
        "num_heads",
        "ffn_dim",
        "dropout",
        "num_cls_layers",
        "num_reg_layers",
    )
    return {name: getattr(config, name) for name in (*names, "prior_prob")}


# --- proposal boxes to start from: (N, 4), cx, cy, w, h in 0–1 ---


def centre_boxes(num_proposals: int) -> Tensor:
    """All at the centre, a tenth of the image wide and high."""
    return torch.tensor([0.5, 0.5, 0.1, 0.1]).repeat(num_proposals, 1)


def grid_boxes(num_proposals: int) -> Tensor:
    """Side by side over the whole image; where N is no product of a grid, some rows have a cell more."""
    rows = math.isqrt(num_proposals)
    boxes = []
    for row in range(rows):
        columns = num_proposals // rows + (row < num_proposals % rows)
        boxes += [
            ((i + 0.5) / columns, (row + 0.5) / rows, 1 / columns, 1 / rows) for i in range(columns)
        ]
    return torch.tensor(boxes)


def random_boxes(num_proposals: int) -> Tensor:
    """Centre and size from a normal distribution, by torch's global generator."""
    boxes = 0.5 + 0.2 * torch.randn(num_proposals, 4)
    return boxes.clamp(min=torch.tensor([0, 0, 0.05, 0.05]), max=torch.ones(4))


# --- builders ---


def with_stages(make_stage: Callable[[Config, int], nn.Module]) -> Build:
    """Builds the model with other stages, from a grid; `make_stage` gets the config and the number, 0 … S − 1."""

    def build(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
        model = with_boxes(grid_boxes)(config, pretrained_backbone)
        model.head.stages = nn.ModuleList(
            make_stage(config, number) for number in range(config.num_stages)
        )
        # Static stages have no use for them, and an optimiser should not decay what nothing trains.
        model.proposal_feats.requires_grad_(isinstance(model.head.stages[0], AttentionStage))
        return model

    return build


def with_boxes(make_boxes: Callable[[int], Tensor]) -> Build:
    """Builds the model with other proposal boxes to start from."""

    def build(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
        model = build_model(config, pretrained_backbone)
        model.proposal_boxes.data.copy_(make_boxes(config.num_proposals))
        return model

    return build


def with_positions(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
    """Builds the model with a positional encoding of the boxes in every stage."""
    model = build_model(config, pretrained_backbone)
    model.head.stages = nn.ModuleList(PositionalStage(stage) for stage in model.head.stages)
    return model


class Variant(NamedTuple):
    """How a model is built, and what it changes in the common config."""

    build: Build = build_model
    num_stages: int | None = None  # S in place of the config's
    times_proposals: int = 1  # N is so many times the config's

    def config(self, config: Config) -> Config:
        """The config of this variant, from that of all."""
        return replace(
            config,
            num_stages=self.num_stages or config.num_stages,
            num_proposals=self.times_proposals * config.num_proposals,
        )


_STATIC = with_stages(lambda config, number: StaticStage(config))
VARIANTS: dict[str, Variant] = {
    "sparse": Variant(_STATIC, num_stages=1),
    "cascade": Variant(_STATIC),
    "reuse": Variant(
        with_stages(lambda config, number: ReuseStage(config) if number else StaticStage(config))
    ),
    "attention": Variant(with_stages(lambda config, number: AttentionStage(config))),
    "dynamic": Variant(),  # Sparse R-CNN as it is; it starts from the whole image and has no positional encoding
    "centre": Variant(with_boxes(centre_boxes)),
    "grid": Variant(with_boxes(grid_boxes)),
    "random": Variant(with_boxes(random_boxes)),
    **{f"proposals-x{times}": Variant(times_proposals=times) for times in (3, 5)},
    **{f"stages-{number}": Variant(num_stages=number) for number in (1, 2, 3, 6, 12)},
    "positions": Variant(with_positions),
}


def shared_name(name: str, config: Config) -> str:
    """The first variant that is the same model at this config: with six stages, "stages-6" is "dynamic"."""
    wanted = VARIANTS[name]
    return next(
        other
        for other, variant in VARIANTS.items()
        if variant.build is wanted.build and variant.config(config) == wanted.config(config)
    )

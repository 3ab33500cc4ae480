"""The models that `experiments.ablate` compares, named after what they are (Tables 3 to 8 and 10).

A variant is the model of `build_model` with another module in one place: other stages in the head,
or other proposal boxes to start from. The backbone is built first, so with one seed all variants
start with the same backbone.

Shapes: B images, N proposals, C channels, S stages, K classes; the RoI has R×R bins. Boxes as
cx, cy, w, h lie in 0–1 of the image; boxes as xyxy are in its pixels.

Where the paper leaves something open, we chose:
    the static head     Faster R-CNN's two linear layers on the flattened region, then the
                        feed-forward network and the predictions of every other variant. It has
                        neither proposal features nor self-attention: proposals differ only in their
                        boxes. Its width is chosen so that it has as many parameters as the
                        dynamic interaction that it is compared with (`equal_width`).
    feature reuse       the last stage's object feature is concatenated to this one's, and a linear
                        layer leads back to C. The first stage has no stage before it and reuses
                        nothing.
    self-attention      among the features that are reused, right before they are. In the first
                        stage these are the proposal features, which come in with this row.
    first boxes         Tables 6 to 8 and 10 start from the whole image, like the paper's models.
                        All rows of Tables 3 to 5 start from the grid: proposals that have nothing
                        but one and the same box would all find and predict the same. (A single
                        static stage reached AP 0.0 this way.) Their last row is Table 6's grid.
    grid                cells tile the image, in about as many rows as columns. If N does not divide
                        evenly, the first rows have one more cell. G-CNN starts from grids at
                        several scales, but then the number of boxes cannot be chosen.
    random              normal(0.5, 0.2) for centre and size, clamped to 0–1 and 0.05–1: a box needs
                        an area.
    positional encoding sines and cosines of the box, as in "Attention is all you need", added
                        before every stage, as DETR adds its object queries before every layer. It
                        has nothing to learn, and no gradient reaches the boxes through it: they are
                        learned as in all other variants.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from config import Config
from head import DynamicInteraction, Stage, apply_deltas
from model import SparseRCNN, build_model

Build = Callable[[Config, bool], SparseRCNN]  # the signature of `build_model`


def equal_width(config: Config) -> int:
    """How wide a static head is that has as many parameters as the dynamic interaction."""
    C, R = config.hidden_dim, config.roi_size
    dynamic = DynamicInteraction(C, config.dynamic_dim, R)
    wanted = sum(parameter.numel() for parameter in dynamic.parameters())
    # width · (R·R·C) weights and `width` biases, C · width weights and C biases, and a LayerNorm.
    return max(1, round((wanted - 3 * C) / (R**2 * C + 1 + C)))


class StaticHead(nn.Module):
    """Faster R-CNN's head: the same two layers for every proposal; (B·N, C, R, R) -> (B·N, C)."""

    def __init__(self, hidden_dim: int, roi_size: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(roi_size**2 * hidden_dim, width),
            nn.ReLU(),
            nn.Linear(width, hidden_dim),
            # As after the dynamic interaction, so that the feed-forward network gets features of
            # the same scale in all variants.
            nn.LayerNorm(hidden_dim),
            nn.ReLU(),
        )

    def forward(self, roi_feats: Tensor) -> Tensor:
        return self.layers(roi_feats)


class StaticStage(Stage):
    """A stage of a cascade without feature reuse (Tables 3 and 4).

    A proposal has only its box and the region inside it.

    Args:
        config: gives C, K, R and the widths.
    """

    def __init__(self, config: Config):
        static = StaticHead(config.hidden_dim, config.roi_size, equal_width(config))
        super().__init__(**stage_options(config), interaction=static)
        self.self_attn = self.attn_norm = self.interaction_norm = None

    def object_feats(self, pro_feats: Tensor, region_feats: Tensor) -> Tensor:
        """pro_feats (B, N, C) of the last stage and region_feats (B, N, C) of this -> (B, N, C)."""
        return region_feats

    def forward(
        self, roi_feats: Tensor, boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Stage.forward`; the last lines are the same."""
        region_feats = self.interaction(roi_feats).view_as(pro_feats)  # (B, N, C)
        obj_feats = self.object_feats(pro_feats, region_feats)
        obj_feats = self.ffn_norm(obj_feats + self.dropout(self.ffn(obj_feats)))
        logits = self.cls_logits(self.cls_layers(obj_feats))  # (B, N, K)
        deltas = self.box_deltas(self.reg_layers(obj_feats))  # (B, N, 4)
        return logits, apply_deltas(deltas, boxes_px), obj_feats


class ReuseStage(StaticStage):
    """With feature reuse: the object feature of the last stage is concatenated (Table 4)."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.fuse = nn.Linear(2 * config.hidden_dim, config.hidden_dim)
        nn.init.xavier_uniform_(self.fuse.weight)

    def object_feats(self, pro_feats: Tensor, region_feats: Tensor) -> Tensor:
        return self.fuse(torch.cat((pro_feats, region_feats), dim=-1))


class AttentionStage(ReuseStage):
    """With self-attention among the reused features, but no instance interaction (Table 5)."""

    def __init__(self, config: Config):
        super().__init__(config)
        whole = Stage(**stage_options(config))
        self.self_attn, self.attn_norm = whole.self_attn, whole.attn_norm

    def object_feats(self, pro_feats: Tensor, region_feats: Tensor) -> Tensor:
        attended = self.self_attn(pro_feats, pro_feats, pro_feats, need_weights=False)[0]
        attended = self.attn_norm(pro_feats + self.dropout(attended))
        return super().object_feats(attended, region_feats)


class PositionalStage(nn.Module):
    """A stage that is also told where its proposals are (Table 10).

    Args:
        stage: of `build_model`. It is wrapped, so its weights do not load into a plain model.
    """

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def forward(
        self, roi_feats: Tensor, boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Stage.forward`."""
        encoding = box_encoding(boxes_px.detach(), pro_feats.shape[-1])
        return self.stage(roi_feats, boxes_px, pro_feats + encoding)


def box_encoding(boxes_px: Tensor, hidden_dim: int) -> Tensor:
    """Sines and cosines of centre and size, in wavelengths from 2π pixels to 2π · 10,000^(1 − 8/C).

    Args:
        boxes_px: (…, 4) float32 xyxy pixels.
        hidden_dim: C, a multiple of 8, for sines and cosines of four numbers.

    Returns:
        (…, C) float32, within −1 and 1.
    """
    cxcywh_px = box_convert(boxes_px, "xyxy", "cxcywh")  # (…, 4)
    count = hidden_dim // 8
    rates = 10_000 ** -(torch.arange(count, device=boxes_px.device) / count)  # radians per pixel
    angles = cxcywh_px[..., None] * rates  # (…, 4, C/8)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (…, C)


def stage_options(config: Config) -> dict[str, float]:
    """The arguments that every kind of stage takes from the config."""
    names = """
        hidden_dim num_classes num_heads ffn_dim dropout num_cls_layers num_reg_layers prior_prob"""
    return {name: getattr(config, name) for name in names.split()}


# --- proposal boxes to start from: (N, 4), cx, cy, w, h in 0–1 ---


def centre_boxes(num_proposals: int) -> Tensor:
    """All boxes at the centre, a tenth of the image wide and high."""
    return torch.tensor([0.5, 0.5, 0.1, 0.1]).repeat(num_proposals, 1)


def grid_boxes(num_proposals: int) -> Tensor:
    """A grid over the whole image; if N does not divide evenly, some rows have one more cell."""
    rows = math.isqrt(num_proposals)
    boxes = []
    for row in range(rows):
        columns = num_proposals // rows + (row < num_proposals % rows)
        for column in range(columns):
            centre = ((column + 0.5) / columns, (row + 0.5) / rows)
            boxes.append((*centre, 1 / columns, 1 / rows))
    return torch.tensor(boxes)


def random_boxes(num_proposals: int) -> Tensor:
    """Centre and size from a normal distribution, drawn from torch's global generator."""
    boxes = 0.5 + 0.2 * torch.randn(num_proposals, 4)
    return boxes.clamp(min=torch.tensor([0, 0, 0.05, 0.05]), max=torch.ones(4))


# --- builders ---


def with_stages(first: type[StaticStage], later: type[StaticStage]) -> Build:
    """Builds the model with these kinds of stages, starting from a grid."""

    def build(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
        model = with_boxes(grid_boxes)(config, pretrained_backbone)
        kinds = [first] + [later] * (config.num_stages - 1)
        model.head.stages = nn.ModuleList(kind(config) for kind in kinds)
        # Static stages do not use them, and weight decay should not change what nothing trains.
        model.proposal_feats.requires_grad_(first is AttentionStage)
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
    """How a model is built, and what it changes in the config that all variants share."""

    build: Build = build_model
    num_stages: int | None = None  # S; None is the config's
    times_proposals: int = 1  # how many times the config's N

    def config(self, config: Config) -> Config:
        """The config of this variant, from the one that all variants share."""
        return replace(
            config,
            num_stages=self.num_stages or config.num_stages,
            num_proposals=self.times_proposals * config.num_proposals,
        )


_build_static = with_stages(StaticStage, StaticStage)

VARIANTS: dict[str, Variant] = {
    # Tables 3 to 5.
    "sparse": Variant(_build_static, num_stages=1),
    "cascade": Variant(_build_static),
    "reuse": Variant(with_stages(StaticStage, ReuseStage)),  # the first stage has nothing to reuse
    "attention": Variant(with_stages(AttentionStage, AttentionStage)),
    # Sparse R-CNN as it is: it starts from the whole image and has no positional encoding.
    "dynamic": Variant(),
    # Table 6.
    "centre": Variant(with_boxes(centre_boxes)),
    "grid": Variant(with_boxes(grid_boxes)),
    "random": Variant(with_boxes(random_boxes)),
    # Table 7.
    "proposals-x3": Variant(times_proposals=3),
    "proposals-x5": Variant(times_proposals=5),
    # Table 8.
    "stages-1": Variant(num_stages=1),
    "stages-2": Variant(num_stages=2),
    "stages-3": Variant(num_stages=3),
    "stages-12": Variant(num_stages=12),
    # Table 10.
    "positions": Variant(with_positions),
}

"""The paper's contribution: proposals refined by S stages of a dynamic head (slides: "Details of Sparse R-CNN").

In:  the feature pyramid [p2 … p5], proposal boxes (B, N, 4) and proposal features (B, N, C).
Out: class logits (S, B, N, K) and boxes (S, B, N, 4) after every stage.

Each stage pools every proposal's region, lets the proposals look at one another (self-attention), lets each proposal
look at its own region through two convolutions that it generates itself (dynamic instance interaction), and from the
result predicts a class and a better box. These boxes and features are the proposals of the next stage.

Shapes: B images, N proposals, C channels, D = C/4 dynamic channels, S stages, K classes; the RoI is R×R bins (the
slide's "S*S"). Boxes are float32 xyxy in pixels of the padded batch (`boxes_px`). Batch first throughout.

The file imports nothing of this project: copied alone it runs.

>>> import torch
>>> pyramid = [torch.rand(2, 256, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32)]
>>> boxes_px = torch.tensor([0.0, 0.0, 192.0, 128.0]).expand(2, 10, 4)  # every proposal starts as the whole image
>>> head = DynamicHead([Stage(num_classes=5) for _ in range(6)])
>>> logits, boxes_px = head(pyramid, boxes_px, torch.randn(2, 10, 256))
>>> tuple(logits.shape), tuple(boxes_px.shape)
((6, 2, 10, 5), (6, 2, 10, 4))

Deviations (ours | paper | authors' code | why)
    LayerNorm and ReLU after `linear2` | not in the pseudocode | the same as ours | the published weights need them
    one hidden layer before the logits, three before the deltas | "a linear projection", "3-layer perception" | as ours
        | the published weights have them
    weights are initialised by name | — | by shape: every tensor whose last size is K gets the class bias | with 4, 64
        or 256 classes that also overwrites box layers, norms or nearly everything
    the dynamic interaction trains in float32 where autocast is float16 | — | float32 | see `DynamicInteraction.forward`
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision.ops import roi_align

# Logarithm of the most by which a stage may widen a box; exp() of a wild delta would overflow (authors' code).
MAX_LOG_SCALE = math.log(100_000 / 16)
DELTA_WEIGHTS = (
    2.0,
    2.0,
    1.0,
    1.0,
)  # deltas (dx, dy, dw, dh) are divided by these (authors' configuration)


def dynamic_instance_interaction(
    pro_feats: Tensor, roi_feats: Tensor, layers: "DynamicInteraction"
) -> Tensor:
    """The slide "Dynamic Instance Interaction", line for line: each proposal filters its own region.

    Args:
        pro_feats: (N, C), one feature a proposal; the N of a whole batch, B·N, in one go.
        roi_feats: (N, R·R, C), the pooled region of each proposal.
        layers: the learned layers that the pseudocode calls linear1, norm and linear2.

    Returns:
        obj_feats (N, C), what each proposal found in its region.
    """
    N, C, D = len(pro_feats), layers.hidden_dim, layers.dynamic_dim

    # Parameters of two 1x1 convolutions. They are *outputs* of a layer, not weights: every proposal has its own.
    dynamic_params = layers.linear1(pro_feats)  # (N, 2·C·D)
    # parameters of first conv
    param1 = dynamic_params[:, : C * D].view(N, C, D)
    # parameters of second conv
    param2 = dynamic_params[:, C * D :].view(N, D, C)

    # Instance interaction. A 1x1 convolution is a matrix product over channels at each of the R·R bins, so `bmm` runs
    # all N different convolutions at once: proposal n meets region n and no other.
    roi_feats = relu(layers.norm1(torch.bmm(roi_feats, param1)))  # (N, R·R, D)
    roi_feats = relu(layers.norm2(torch.bmm(roi_feats, param2)))  # (N, R·R, C)

    # Flattened, not averaged: where in the region something was found is what the box regression lives on.
    roi_feats = roi_feats.flatten(1)  # (N, R·R·C)
    obj_feats = relu(layers.norm3(layers.linear2(roi_feats)))  # (N, C)
    return obj_feats


class DynamicInteraction(nn.Module):
    """The layers of `dynamic_instance_interaction`, named as in the slide.

    Args:
        hidden_dim: C.
        dynamic_dim: D, channels between the two generated convolutions; C/4 in the paper.
        roi_size: R, bins along a side of the pooled region.
    """

    def __init__(self, hidden_dim: int = 256, dynamic_dim: int = 64, roi_size: int = 7):
        super().__init__()
        self.hidden_dim, self.dynamic_dim = hidden_dim, dynamic_dim
        self.linear1 = nn.Linear(hidden_dim, 2 * hidden_dim * dynamic_dim)
        self.norm1 = nn.LayerNorm(dynamic_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.linear2 = nn.Linear(roi_size**2 * hidden_dim, hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def forward(self, pro_feats: Tensor, roi_feats: Tensor) -> Tensor:
        """pro_feats (N, C), roi_feats (N, R·R, C) -> obj_feats (N, C)."""
        device, dtype = roi_feats.device.type, torch.get_autocast_dtype(roi_feats.device.type)
        is_on = torch.is_autocast_enabled(device)
        # Bins outside of the image are all zeros. There norm1 divides by sqrt(eps), and norm2 by little more while its
        # input is tiny: on the way back each multiplies the gradient by up to 316, beyond float16's 65504 together, and
        # that infinity times the bin's zeros is NaN. In float32 and bfloat16 it is a large number times zero, so only
        # training in float16 leaves its dtype here.
        if is_on and dtype == torch.float16 and torch.is_grad_enabled():
            is_on, pro_feats, roi_feats = False, pro_feats.float(), roi_feats.float()
        with torch.autocast(device, dtype, enabled=is_on):
            return dynamic_instance_interaction(pro_feats, roi_feats, layers=self)


def apply_deltas(deltas: Tensor, boxes_px: Tensor) -> Tensor:
    """Moves and scales boxes by what the regression predicts (the parametrisation of Faster R-CNN).

    Args:
        deltas: (…, 4), dx, dy in box sizes and dw, dh in logarithms, times `DELTA_WEIGHTS`; any float dtype.
        boxes_px: (…, 4) float32 xyxy pixels.

    Returns:
        (…, 4) float32 xyxy pixels, not clipped to the image.
    """
    # float32 also under autocast: bfloat16 knows only every 4th pixel beyond 512.
    dx, dy, dw, dh = (
        deltas.float() / deltas.new_tensor(DELTA_WEIGHTS, dtype=torch.float32)
    ).unbind(-1)
    x1, y1, x2, y2 = boxes_px.unbind(-1)
    w, h = x2 - x1, y2 - y1
    cx, cy = x1 + 0.5 * w + dx * w, y1 + 0.5 * h + dy * h
    w, h = w * dw.clamp(max=MAX_LOG_SCALE).exp(), h * dh.clamp(max=MAX_LOG_SCALE).exp()
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def to_channels_first(features: Tensor) -> Tensor:
    """(B, C, H, W) of any float dtype and memory format -> the same as contiguous float32, as RoIAlign wants it."""
    if features.is_contiguous():
        return features.float()
    # The same as features.contiguous(), which on a CPU takes two to three times as long: PyTorch copies a transposed
    # matrix in blocks, and a transposed batch of maps number by number.
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    for i, image in enumerate(features):
        out[i].flatten(1).copy_(image.flatten(1))  # (C, H·W)
    return out.float()


class RoIPooler(nn.Module):
    """RoIAlign on the pyramid level that fits each box: large boxes from coarse levels (FPN paper, equation 1).

    Args:
        roi_size: R, bins along a side.
        strides: pixels a cell of each level, finest first.
        canonical_box_px: sqrt(area) from which on boxes belong to stride 16; from half of it to stride 8, and so on.
        sampling_ratio: samples a bin and direction.
    """

    def __init__(
        self,
        roi_size: int = 7,
        strides: Sequence[int] = (4, 8, 16, 32),
        canonical_box_px: float = 224,
        sampling_ratio: int = 2,
    ):
        super().__init__()
        self.roi_size, self.strides, self.sampling_ratio = roi_size, tuple(strides), sampling_ratio
        self.canonical_box_px = canonical_box_px

    def levels(self, boxes_px: Tensor) -> Tensor:
        """boxes_px (…, 4) -> index into the pyramid, 0 for p2 … 3 for p5, (…) int64."""
        sizes = boxes_px[..., 2:] - boxes_px[..., :2]
        # p4 has stride 2**4, hence the 4; 1e-8 keeps the logarithm of an empty box finite (authors' code).
        level = torch.floor(4 + torch.log2(sizes.prod(-1).sqrt() / self.canonical_box_px + 1e-8))
        finest, coarsest = int(math.log2(self.strides[0])), int(math.log2(self.strides[-1]))
        return level.clamp(finest, coarsest).long() - finest

    def forward(self, pyramid: Sequence[Tensor], boxes_px: Tensor) -> Tensor:
        """pyramid of (B, C, H/stride, W/stride), boxes_px (B, N, 4) -> (B·N, C, R, R)."""
        B, N, _ = boxes_px.shape
        image_index = torch.arange(
            B, device=boxes_px.device, dtype=boxes_px.dtype
        ).repeat_interleave(N)
        rois = torch.cat((image_index[:, None], boxes_px.flatten(0, 1)), dim=1)  # (B·N, 5)
        levels = self.levels(rois[:, 1:])
        pooled = pyramid[0].new_zeros(B * N, pyramid[0].shape[1], self.roi_size, self.roi_size)
        # One call a level for the whole batch. A level without boxes is pooled too, of nothing: so it stays in the
        # graph and gets a gradient of 0 rather than none, which DistributedDataParallel insists on.
        for level, (features, stride) in enumerate(zip(pyramid, self.strides, strict=True)):
            here = torch.nonzero(levels == level).squeeze(1)
            regions = roi_align(
                features, rois[here], self.roi_size, 1 / stride, self.sampling_ratio, aligned=True
            )  # (number here, C, R, R)
            pooled.index_copy_(0, here, regions)
        return pooled


def _hidden_layers(width: int, count: int) -> nn.Sequential:
    """`count` times linear without bias, LayerNorm, ReLU: the trunk of both predictions."""
    layers = (
        layer
        for _ in range(count)
        for layer in (nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU())
    )
    return nn.Sequential(*layers)


class Stage(nn.Module):
    """One stage of the head: self-attention, dynamic instance interaction, feed-forward, then class and box.

    Post-norm throughout: each part's output is added to its input, then normalised.

    Args:
        hidden_dim: C.
        num_classes: K; labels run from 0 to K − 1 and there is no background class.
        num_heads, ffn_dim, dropout: of the self-attention and the feed-forward network.
        num_cls_layers, num_reg_layers: hidden layers before the logits and before the deltas.
        interaction: maps pro_feats (B·N, C), roi_feats (B·N, R·R, C) to (B·N, C); `DynamicInteraction` by default.
        prior_prob: the score that every class starts from, so that the many negatives do not drown the first steps.
    """

    def __init__(
        self,
        hidden_dim: int = 256,
        num_classes: int = 80,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.0,
        num_cls_layers: int = 1,
        num_reg_layers: int = 3,
        interaction: nn.Module | None = None,
        prior_prob: float = 0.01,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(
            hidden_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.attn_norm = nn.LayerNorm(hidden_dim)
        self.interaction = interaction or DynamicInteraction(hidden_dim, hidden_dim // 4)
        self.interaction_norm = nn.LayerNorm(hidden_dim)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_dim, ffn_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(ffn_dim, hidden_dim),
        )
        self.ffn_norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

        self.cls_layers = _hidden_layers(hidden_dim, num_cls_layers)
        self.cls_logits = nn.Linear(hidden_dim, num_classes)
        self.reg_layers = _hidden_layers(hidden_dim, num_reg_layers)
        self.box_deltas = nn.Linear(hidden_dim, 4)

        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(
        self, roi_feats: Tensor, boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refines every proposal once.

        Args:
            roi_feats: (B·N, C, R, R), the pooled region of each proposal.
            boxes_px: (B, N, 4) float32 xyxy pixels.
            pro_feats: (B, N, C).

        Returns:
            logits (B, N, K), boxes_px (B, N, 4) float32, obj_feats (B, N, C).
        """
        # Self-attention: proposals on the same object see each other here, which is how duplicates get suppressed.
        attended = self.self_attn(pro_feats, pro_feats, pro_feats, need_weights=False)[0]
        pro_feats = self.attn_norm(pro_feats + self.dropout(attended))  # (B, N, C)

        # Dynamic instance interaction: proposal n with region n.
        regions = roi_feats.flatten(2).transpose(1, 2)  # (B·N, R·R, C)
        found = self.interaction(pro_feats.flatten(0, 1), regions).view_as(pro_feats)  # (B, N, C)
        obj_feats = self.interaction_norm(pro_feats + self.dropout(found))

        obj_feats = self.ffn_norm(obj_feats + self.dropout(self.ffn(obj_feats)))

        logits = self.cls_logits(self.cls_layers(obj_feats))  # (B, N, K)
        deltas = self.box_deltas(self.reg_layers(obj_feats))  # (B, N, 4)
        return logits, apply_deltas(deltas, boxes_px), obj_feats


class DynamicHead(nn.Module):
    """The iteration (slides: "the iteration structure"): a stage's boxes and features are the next one's proposals.

    Args:
        stages: S modules with the signature of `Stage.forward`; their weights are not shared.
        pooler: maps the pyramid and boxes_px (B, N, 4) to (B·N, C, R, R); `RoIPooler()` by default.
    """

    def __init__(self, stages: Iterable[nn.Module], pooler: nn.Module | None = None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.pooler = pooler or RoIPooler()

    def forward(
        self, pyramid: Sequence[Tensor], boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs all stages.

        Args:
            pyramid: [p2 … p5], each (B, C, H/stride, W/stride).
            boxes_px: (B, N, 4) float32 xyxy pixels, the proposal boxes.
            pro_feats: (B, N, C), the proposal features.

        Returns:
            logits (S, B, N, K) and boxes_px (S, B, N, 4), stage by stage.
        """
        # For RoIAlign, once here rather than once in every stage.
        pyramid = [to_channels_first(level) for level in pyramid]
        all_logits, all_boxes = [], []
        for stage in self.stages:
            roi_feats = self.pooler(pyramid, boxes_px).to(pro_feats.dtype)  # (B·N, C, R, R)
            logits, boxes_px, pro_feats = stage(roi_feats, boxes_px, pro_feats)
            all_logits.append(logits)
            all_boxes.append(boxes_px)
            # Each stage learns to improve the boxes it is given, not to make the previous stage give better ones. The
            # learned proposal boxes are not detached: through the first stage they get their gradient. Nor are the
            # features, which carry what was found from stage to stage.
            boxes_px = boxes_px.detach()
        return torch.stack(all_logits), torch.stack(all_boxes)

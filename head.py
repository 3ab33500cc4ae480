"""The head, which is the paper's contribution: it turns N learned proposals into N detections.

A proposal is a box and a feature. The box says where to look. The feature, C learned numbers, says
what to look for: it is compared with the other proposals' features (self-attention), generates the
filters that its region is searched with (dynamic instance interaction), and carries what was found
to the next stage. Each of S stages predicts a class and a better box for every proposal, and its
boxes and features are the proposals of the next one. Paper: "Dynamic instance interactive head".

In:  the feature pyramid [p2, p3, p4, p5], proposal boxes (B, N, 4), proposal features (B, N, C).
Out: class logits (S, B, N, K) and boxes (S, B, N, 4) of every stage: the loss looks at all of them.

Shapes: B images, N proposals per image, C channels, D = C/4 dynamic channels, S stages, K classes,
R×R bins per region (S*S in the paper's pseudocode). Boxes are float32 x1, y1, x2, y2 in pixels.

The file imports nothing of this project: copied alone it runs.

>>> import torch
>>> pyramid = [torch.rand(2, 256, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32)]
>>> boxes_px = torch.tensor([0.0, 0.0, 192.0, 128.0]).expand(2, 10, 4)  # the whole image
>>> head = DynamicHead([Stage(num_classes=5) for _ in range(6)])
>>> logits, boxes_px = head(pyramid, boxes_px, torch.randn(2, 10, 256))
>>> tuple(logits.shape), tuple(boxes_px.shape)
((6, 2, 10, 5), (6, 2, 10, 4))
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, bmm, nn
from torch.nn.functional import relu
from torchvision.ops import roi_align

# --- the paper ---


def dynamic_instance_interaction(
    pro_feats: Tensor, roi_feats: Tensor, layers: "DynamicInteraction"
) -> Tensor:
    """Every proposal filters its own region, with filters that it generates (paper, Figure 4).

    The paper's pseudocode, statement by statement; only the last one is not in it. As there, N
    counts the proposals of all images, which are B·N everywhere else in this file.

    Args:
        pro_feats: (N, C), one feature per proposal.
        roi_feats: (N, R·R, C), the pooled region of each proposal.
        layers: the learned layers, which the pseudocode calls linear1, norm and linear2.

    Returns:
        obj_feats: (N, C), what each proposal found in its region.
    """
    N, C, D = len(pro_feats), layers.hidden_dim, layers.dynamic_dim

    # The parameters of two 1×1 convolutions. They are not weights but the output of a layer, so
    # they differ from proposal to proposal and from image to image: this is what "dynamic" means.
    dynamic_params = layers.linear1(pro_feats)  # (N, 2·C·D)
    # Parameters of the first convolution, from C to D channels.
    param1 = dynamic_params[:, : C * D].view(N, C, D)
    # Parameters of the second convolution, from D back to C channels.
    param2 = dynamic_params[:, C * D :].view(N, D, C)

    # The interaction. A 1×1 convolution multiplies the channels of each bin by one matrix, the same
    # in all bins. `bmm` does this for all proposals at once: region n meets matrix n and no other.
    # The norm compares the outputs of a bin, and ReLU silences those that respond less than the
    # others. So proposals "filter out ineffective bins" (paper).
    roi_feats = relu(layers.norm1(bmm(roi_feats, param1)))  # (N, R·R, D)
    roi_feats = relu(layers.norm2(bmm(roi_feats, param2)))  # (N, R·R, C)

    # Flattened, not averaged over the bins: to move a box, the next layers have to know where in
    # the region something was found.
    roi_feats = roi_feats.flatten(1)  # (N, R·R·C)
    obj_feats = layers.linear2(roi_feats)  # (N, C)

    # Not in the pseudocode, but in the authors' code, and the published weights need it.
    obj_feats = relu(layers.norm3(obj_feats))
    return obj_feats


class DynamicInteraction(nn.Module):
    """The layers of `dynamic_instance_interaction`, with the names of the pseudocode.

    Args:
        hidden_dim: C.
        dynamic_dim: D, channels between the two generated convolutions; C/4 in the paper.
        roi_size: R, bins along each side of a region.
    """

    def __init__(self, hidden_dim: int = 256, dynamic_dim: int = 64, roi_size: int = 7):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.dynamic_dim = dynamic_dim
        self.linear1 = nn.Linear(hidden_dim, 2 * hidden_dim * dynamic_dim)
        self.norm1 = nn.LayerNorm(dynamic_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.linear2 = nn.Linear(roi_size**2 * hidden_dim, hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def forward(self, pro_feats: Tensor, roi_feats: Tensor) -> Tensor:
        """pro_feats (N, C), roi_feats (N, R·R, C) -> obj_feats (N, C)."""
        return dynamic_instance_interaction(pro_feats, roi_feats, self)


class Stage(nn.Module):
    """One stage: proposals look at each other, then at their regions, then predict.

    Its three sublayers are those of a Transformer decoder, with the dynamic instance interaction in
    place of cross-attention, in post-norm order: x = LayerNorm(x + Dropout(sublayer(x))). The paper
    mentions self-attention and interaction; the rest is the authors' code.

    Args:
        hidden_dim: C.
        num_classes: K; labels run from 0 to K − 1 and there is no background class.
        num_heads: of the self-attention.
        ffn_dim: inner width of the feed-forward network.
        dropout: share of activations dropped in the sublayers.
        num_cls_layers: hidden layers before the class logits. The paper has "a linear projection"
            alone; the authors' code has one hidden layer.
        num_reg_layers: hidden layers before the box deltas (paper: "3-layer perception").
        interaction: maps pro_feats (B·N, C) and roi_feats (B·N, R·R, C) to obj_feats (B·N, C);
            `DynamicInteraction` by default.
        prior_prob: the score of every class at the start of training.
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

        if interaction is None:
            interaction = DynamicInteraction(hidden_dim, dynamic_dim=hidden_dim // 4)
        self.interaction = interaction
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
            if parameter.dim() > 1:  # matrices; norms and biases keep PyTorch's values
                nn.init.xavier_uniform_(parameter)  # (paper, Training details)
        # Every class starts with the score π = prior_prob: sigmoid(−log((1 − π) / π)) = π. At a
        # score of 0.5 the many negatives would drown the first steps ("Focal Loss", section 3.3).
        # The layer is chosen by name. The authors' code chooses every tensor whose last dimension
        # is K, which with 4, 64 or 256 classes overwrites other layers too.
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(
        self, roi_feats: Tensor, boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refines every proposal once.

        Args:
            roi_feats: (B·N, C, R, R), the pooled region of each proposal.
            boxes_px: (B, N, 4) float32 xyxy pixels, the boxes of these regions.
            pro_feats: (B, N, C).

        Returns:
            logits (B, N, K) before the sigmoid, refined boxes (B, N, 4) float32 xyxy pixels, and
            obj_feats (B, N, C), the proposal features of the next stage.
        """
        # 1. Self-attention, softmax(Q·Kᵀ / √d)·V with Q, K and V all from the proposal features.
        # Only here do proposals learn of each other, which helps them to agree: each object is
        # matched with one proposal, so of all that see it, all but one should stay silent.
        attended, _ = self.self_attn(pro_feats, pro_feats, pro_feats, need_weights=False)
        pro_feats = self.attn_norm(pro_feats + self.dropout(attended))  # (B, N, C)

        # 2. Dynamic instance interaction, proposal n with region n, in all images at once.
        roi_feats = roi_feats.flatten(2).transpose(1, 2)  # (B·N, R·R, C)
        found = self.interaction(pro_feats.flatten(0, 1), roi_feats)  # (B·N, C)
        found = found.view_as(pro_feats)  # (B, N, C)
        obj_feats = self.interaction_norm(pro_feats + self.dropout(found))

        # 3. Feed-forward network, on every proposal alone.
        obj_feats = self.ffn_norm(obj_feats + self.dropout(self.ffn(obj_feats)))

        # 4. Predictions: K independent classes, and how to move and scale the box.
        logits = self.cls_logits(self.cls_layers(obj_feats))  # (B, N, K)
        deltas = self.box_deltas(self.reg_layers(obj_feats))  # (B, N, 4)
        return logits, apply_deltas(deltas, boxes_px), obj_feats


def _hidden_layers(width: int, count: int) -> nn.Sequential:
    """`count` times: linear, LayerNorm, ReLU. No bias, because the norm has one."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers)


class DynamicHead(nn.Module):
    """The iteration: boxes and features of one stage are the proposals of the next.

    Args:
        stages: S modules with the signature of `Stage.forward`. They share no weights.
        pooler: maps the pyramid and boxes_px (B, N, 4) to (B·N, C, R, R); `RoIPooler` by default.
    """

    def __init__(self, stages: Iterable[nn.Module], pooler: nn.Module | None = None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.pooler = RoIPooler() if pooler is None else pooler

    def forward(
        self, pyramid: Sequence[Tensor], boxes_px: Tensor, pro_feats: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs all stages.

        Args:
            pyramid: [p2, p3, p4, p5], each (B, C, H/stride, W/stride).
            boxes_px: (B, N, 4) float32 xyxy pixels, the proposal boxes.
            pro_feats: (B, N, C), the proposal features.

        Returns:
            logits (S, B, N, K) and boxes_px (S, B, N, 4) float32, stage by stage.
        """
        # RoIAlign needs float32 maps, and on a GPU contiguous ones: converted once, not per stage.
        pyramid = [level.float() for level in pyramid]
        pyramid = [level if level.is_cpu else level.contiguous() for level in pyramid]

        all_logits, all_boxes_px = [], []
        for stage in self.stages:
            roi_feats = self.pooler(pyramid, boxes_px).to(pro_feats.dtype)  # (B·N, C, R, R)
            logits, boxes_px, pro_feats = stage(roi_feats, boxes_px, pro_feats)
            all_logits.append(logits)
            all_boxes_px.append(boxes_px)
            # "The gradients are blocked at proposal boxes in each stage …, except initial proposal
            # boxes" (paper, Training details): a stage learns to improve the boxes that it gets,
            # not to make earlier stages hand over better ones. The learned boxes get their gradient
            # through the first stage. Features are not detached: to reuse and improve them is what
            # makes the iteration work (Table 4: 20.5 AP without, 32.2 AP with reuse).
            boxes_px = boxes_px.detach()
        return torch.stack(all_logits), torch.stack(all_boxes_px)


# --- from earlier papers: pooling from a pyramid (FPN), moving boxes (R-CNN) ---


class RoIPooler(nn.Module):
    """RoIAlign from the pyramid level that fits the size of each box.

    Args:
        roi_size: R, bins along each side of a region.
        strides: image pixels per cell of each level, finest first.
        canonical_box_px: boxes whose √area is at least this are pooled at stride 16, from half of
            it at stride 8, and so on. 224 is the size of ImageNet's crops.
        sampling_ratio: samples per bin along each side, averaged.
        roi_align: torchvision's, or another function with its arguments.
    """

    def __init__(
        self,
        roi_size: int = 7,
        strides: Sequence[int] = (4, 8, 16, 32),
        canonical_box_px: float = 224,
        sampling_ratio: int = 2,
        roi_align: Callable[..., Tensor] = roi_align,
    ):
        super().__init__()
        self.roi_size = roi_size
        self.strides = tuple(strides)
        self.canonical_box_px = canonical_box_px
        self.sampling_ratio = sampling_ratio
        self.roi_align = roi_align

    def levels(self, boxes_px: Tensor) -> Tensor:
        """boxes_px (…, 4) xyxy -> index into the pyramid (…) int64: 0 for p2, 3 for p5."""
        # A learned box may have a negative width or height, and then no area.
        w, h = (boxes_px[..., 2:] - boxes_px[..., :2]).clamp(min=0).unbind(-1)
        scale = (w * h).sqrt() / self.canonical_box_px

        # FPN, equation 1:  k = ⌊k₀ + log₂(√(w·h) / 224)⌋  with k₀ = 4, because pₖ has stride 2ᵏ and
        # the ImageNet classifier saw 224 pixels at stride 16. 1e-8 is for boxes without area.
        k = torch.floor(4 + torch.log2(scale + 1e-8))
        finest = int(math.log2(self.strides[0]))
        coarsest = int(math.log2(self.strides[-1]))
        return k.clamp(finest, coarsest).long() - finest

    def forward(self, pyramid: Sequence[Tensor], boxes_px: Tensor) -> Tensor:
        """pyramid of (B, C, H/stride, W/stride), boxes_px (B, N, 4) -> (B·N, C, R, R)."""
        B, N, _ = boxes_px.shape
        # RoIAlign takes rows of (index of the image, x1, y1, x2, y2).
        image = torch.arange(B, device=boxes_px.device, dtype=boxes_px.dtype)
        image = image.repeat_interleave(N)[:, None]  # (B·N, 1)
        boxes_px = boxes_px.flatten(0, 1)  # (B·N, 4)
        if not torch.compiler.is_exporting():  # other runtimes may lack it
            # RoIAlign would read outside of the map for boxes that are not finite.
            boxes_px = boxes_px.nan_to_num()
        rois = torch.cat((image, boxes_px), dim=1)  # (B·N, 5)

        levels = self.levels(rois[:, 1:])  # (B·N,)
        # The boxes of each level. Their numbers are the one thing that the host has to wait for.
        counts = torch.stack([(levels == i).sum() for i in range(len(self.strides))]).tolist()
        order = levels.argsort()
        rois_of_levels = rois[order].split(counts)

        pooled = []
        # One call per level for all images. A level that no box belongs to is pooled as well, with
        # no boxes: so its gradient is zero instead of missing, which DistributedDataParallel wants.
        for features, stride, rois in zip(pyramid, self.strides, rois_of_levels, strict=True):
            # aligned=True: a cell's value belongs to its centre, not to its top left corner.
            roi_feats = self.roi_align(
                features, rois, self.roi_size, 1 / stride, self.sampling_ratio, aligned=True
            )  # (n, C, R, R)
            pooled.append(roi_feats)
        return torch.cat(pooled)[order.argsort()]  # back in the order of the boxes


# Predicted deltas are divided by these: an output of 1 moves a box by half its width or height, or
# makes it e times as wide or high (authors' configuration).
DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
# The largest t_w and t_h: a wild one would overflow in exp() (authors' code).
MAX_LOG_SCALE = math.log(100_000 / 16)


def apply_deltas(deltas: Tensor, boxes_px: Tensor) -> Tensor:
    """Moves and scales boxes by what the regression predicts.

    Args:
        deltas: (…, 4), t_x, t_y, t_w, t_h times `DELTA_WEIGHTS`; any float dtype.
        boxes_px: (…, 4) float32 xyxy pixels.

    Returns:
        (…, 4) float32 xyxy pixels, not clipped to the image.
    """
    # float32, also under autocast: beyond 512 pixels bfloat16 knows only every 4th.
    d_x, d_y, d_w, d_h = deltas.float().unbind(-1)
    w_x, w_y, w_w, w_h = DELTA_WEIGHTS
    t_x, t_y, t_w, t_h = d_x / w_x, d_y / w_y, d_w / w_w, d_h / w_h

    # R-CNN's parametrisation (Faster R-CNN, equation 2), in which a denotes the box that is given:
    #   t_x = (x − x_a) / w_a    t_w = log(w / w_a)
    #   t_y = (y − y_a) / h_a    t_h = log(h / h_a)
    # It makes a delta mean the same for small and large boxes. Solved for the new box:
    x1, y1, x2, y2 = boxes_px.unbind(-1)
    w_a, h_a = x2 - x1, y2 - y1
    x_a, y_a = x1 + 0.5 * w_a, y1 + 0.5 * h_a
    x = x_a + t_x * w_a
    y = y_a + t_y * h_a
    w = w_a * t_w.clamp(max=MAX_LOG_SCALE).exp()
    h = h_a * t_h.clamp(max=MAX_LOG_SCALE).exp()

    return torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h), dim=-1)

"""SparseRCNN: learned proposals + backbone + head (+ loss when given targets) (slides: "Overview of Sparse R-CNN").

In:  a list of RGB images (3, H, W), each its own size, uint8 0–255 or float 0–1.
Out: detections in eval mode, losses in train mode: the language of `torchvision.models.detection`.

Two differences from torchvision's detectors can bite. **Labels run from 0 to K − 1: there is no background class**,
where torchvision's objects start at 1. And images are never resized here: the transforms of `data.py` do that.

Shapes: B images, N proposals, C channels, S stages, K classes, M objects of one image.

Padding is not masked, as in the authors' code: images are padded with zeros on the right and bottom to one size, of
multiples of 32, and frozen batch norms make something of zeros. So an image's detections depend a little on how far it
was padded. Images of equal padded size give the same detections alone and together; `evaluate.py` batches only such.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import box_convert

from backbone import STRIDES, ResNetFPN, SmallFPN, fold_batch_norms
from config import Config
from head import DynamicHead, DynamicInteraction, RoIPooler, Stage
from loss import SetCriterion
from matcher import HungarianMatcher

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, of values 0–255
IMAGENET_STD = (58.395, 57.12, 57.375)


class StageOutputs(NamedTuple):
    """What every stage predicts, before any selection."""

    logits: Tensor  # (S, B, N, K), before the sigmoid
    boxes: Tensor  # (S, B, N, 4) xyxy pixels, not clipped to the image


class SparseRCNN(nn.Module):
    """The detector.

    Args:
        backbone: maps (B, 3, H, W) to a list of feature maps, finest first.
        head: maps those, boxes_px (B, N, 4) and pro_feats (B, N, C) to logits (S, B, N, K) and boxes (S, B, N, 4).
        criterion: maps (logits, boxes_px, targets, whwh_px, num_objects) to a dict of losses.
        init_boxes: (N, 4), where the proposal boxes start, as cx, cy, w, h in 0–1 of the image.
        init_feats: (N, C), where the proposal features start.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        criterion: nn.Module,
        init_boxes: Tensor,
        init_feats: Tensor,
    ):
        super().__init__()
        self.backbone, self.head, self.criterion = backbone, head, criterion
        # The proposals: learned, and the same for every image. They say where objects tend to be and what they tend to
        # look like, in place of the anchors and the RPN.
        self.proposal_boxes = nn.Parameter(init_boxes.clone())  # (N, 4) cx, cy, w, h, in 0–1
        self.proposal_feats = nn.Parameter(init_feats.clone())  # (N, C)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def prepare(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Normalises images and pads them with zeros on the right and bottom to one size, of multiples of 32 pixels.

        Args:
            images: B tensors (3, H, W) RGB, uint8 0–255 or float 0–1, on any device.

        Returns:
            The batch (B, 3, H', W') on the model's device and whwh_px (B, 4), each image's own w, h, w, h.

        Raises:
            ValueError: no images, a shape that is not (3, H, W), or an integer dtype other than uint8.
        """
        if not len(images):
            raise ValueError("SparseRCNN: an empty list of images")
        for i, image in enumerate(images):
            if image.dim() != 3 or len(image) != 3 or 0 in image.shape:
                raise ValueError(
                    f"SparseRCNN: image {i} has shape {tuple(image.shape)}; RGB images (3, H, W) are needed"
                )
            if image.dtype != torch.uint8 and not image.is_floating_point():
                raise ValueError(
                    f"SparseRCNN: image {i} is {image.dtype}; uint8 0–255 or float 0–1 is needed"
                )
        # Rounded up so, and not as -(-size // stride), because ONNX divides integers towards zero.
        stride = STRIDES[-1]
        height, width = (
            (max(image.shape[side] for image in images) + stride - 1) // stride * stride
            for side in (1, 2)
        )
        padded = []
        for image in images:
            # uint8 travels to the device and becomes float there: a quarter of the traffic.
            scale = 1 if image.dtype == torch.uint8 else 255
            pixels = image.to(self.mean.device, non_blocking=True).to(self.mean.dtype) * scale
            # Padded, not written into a canvas of zeros, which an exported model does pixel by pixel.
            padding = (
                0,
                width - image.shape[2],
                0,
                height - image.shape[1],
            )  # left, right, top, bottom
            padded.append(pad((pixels - self.mean) / self.std, padding))
        batch = torch.stack(padded)
        whwh_px = torch.tensor(
            [(i.shape[2], i.shape[1]) * 2 for i in images], dtype=torch.float32, device=batch.device
        )
        return batch, whwh_px

    def initial_boxes_px(self, whwh_px: Tensor) -> Tensor:
        """The learned proposal boxes on images of size whwh_px (B, 4): (B, N, 4) float32 xyxy pixels."""
        return box_convert(self.proposal_boxes.float(), "cxcywh", "xyxy") * whwh_px[:, None]

    def _predict(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """images -> logits (S, B, N, K), boxes_px (S, B, N, 4), whwh_px (B, 4)."""
        batch, whwh_px = self.prepare(images)
        pro_feats = self.proposal_feats.expand(len(batch), -1, -1)  # (B, N, C)
        logits, boxes_px = self.head(
            self.backbone(batch), self.initial_boxes_px(whwh_px), pro_feats
        )
        return logits, boxes_px, whwh_px

    def stages(self, images: Sequence[Tensor]) -> StageOutputs:
        """Every stage's predictions, in the pixels of the images given; gradients flow unless turned off outside."""
        return StageOutputs(*self._predict(images)[:2])

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        num_objects: float | Tensor | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """In train mode, images and targets to losses; in eval mode, images to detections.

        Args:
            images: B tensors (3, H, W) RGB, each its own size, uint8 0–255 or float 0–1; any device.
            targets: B dicts with `boxes` (M, 4) float xyxy pixels and `labels` (M,) int64 **from 0 to K − 1**; needed
                in train mode, ignored in eval mode. Other keys may be there.
            num_objects: what to divide the losses by, where the batch is only a part of the effective one.

        Returns:
            Train mode: dict of 3·S losses, whose sum is what to minimise. Eval mode: for each image a dict of `boxes`
            (n, 4) float32 xyxy pixels of that image, clipped to it, `scores` (n,) falling, `labels` (n,) int64; n ≤ N.

        Raises:
            ValueError: no targets in train mode, or targets or images of the wrong form.
            FloatingPointError: from the matcher, where a prediction is not finite.
        """
        if not self.training:
            logits, boxes_px, whwh_px = self._predict(images)
            return self.detections(logits[-1], boxes_px[-1], whwh_px)
        if targets is None:
            raise ValueError(
                "SparseRCNN: in train mode targets are needed; call .eval() to get detections"
            )
        if len(targets) != len(images):
            raise ValueError(f"SparseRCNN: {len(images)} images but {len(targets)} targets")
        logits, boxes_px, whwh_px = self._predict(images)
        num_classes, device = logits.shape[-1], logits.device
        targets = [
            check_target(target, num_classes, index, device) for index, target in enumerate(targets)
        ]
        return self.criterion(logits, boxes_px, targets, whwh_px, num_objects)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles in place what keeps its shape, with `nn.Module.compile`'s arguments: the backbone and every stage.

        `torch.compile(model)` gives the same results, but it compiles again for most image sizes: how many boxes go to
        a pyramid level is known only when it runs. Here that remains as it is, between the compiled parts; the stages
        do not depend on the image size, and the backbone is compiled once for all sizes (on a CPU, once more for
        images below about 256 px, for which its convolutions are others). Copies, also `for_inference()`'s, are not
        compiled.
        """
        self.backbone.compile(*args, **{"dynamic": True, **kwargs})
        for stage in self.head.stages:
            stage.compile(*args, **kwargs)

    def for_inference(self) -> "SparseRCNN":
        """A copy that gives the same detections faster and cannot be trained.

        Batch norms are folded into the convolutions, and all convolutions run with the channels last in memory.
        """
        fast = copy.deepcopy(self).eval().requires_grad_(False)
        if isinstance(fast.backbone, ResNetFPN | SmallFPN):
            fold_batch_norms(fast.backbone)
        fast.backbone.to(memory_format=torch.channels_last)
        return fast

    @staticmethod
    def detections(logits: Tensor, boxes_px: Tensor, whwh_px: Tensor) -> list[dict[str, Tensor]]:
        """One stage's predictions to detections: the N best of the N·K scores, no NMS.

        Args:
            logits: (B, N, K). boxes_px: (B, N, 4) xyxy pixels. whwh_px: (B, 4).

        Returns:
            As `forward` in eval mode.
        """
        num_proposals, num_classes = logits.shape[1:]
        # A proposal may appear more than once, with different classes: the scores are independent sigmoids.
        scores, best = logits.float().sigmoid().flatten(1).topk(num_proposals, dim=1)  # (B, N) each
        proposal, labels = best // num_classes, best % num_classes
        boxes_px = boxes_px.gather(1, proposal[..., None].expand(-1, -1, 4))  # (B, N, 4)
        # Not `clip_boxes_to_image`: it takes the size as plain numbers, which wait for the device and do not export.
        boxes_px = boxes_px.clamp(min=0).minimum(whwh_px[:, None])
        has_area = (boxes_px[..., 2:] > boxes_px[..., :2]).all(-1)  # (B, N)
        results = []
        for image_boxes, image_scores, image_labels, keep in zip(
            boxes_px, scores, labels, has_area, strict=True
        ):
            kept = torch.nonzero(keep).squeeze(1)  # once for all three
            results.append(
                {
                    "boxes": image_boxes[kept],
                    "scores": image_scores[kept],
                    "labels": image_labels[kept],
                }
            )
        return results


def check_target(
    target: dict[str, Tensor], num_classes: int, index: int, device: torch.device
) -> dict[str, Tensor]:
    """One image's target on the device, as plain tensors; a wrong label would otherwise end in a CUDA assertion.

    Raises:
        ValueError: shapes or dtype are off, or a label is outside 0 … K − 1.
    """
    boxes, labels = target["boxes"], target["labels"]
    if boxes.shape != (len(labels), 4) or labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"SparseRCNN: target {index} has boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)} of "
            f"{labels.dtype}; boxes (M, 4) and labels (M,) of torch.int64 are needed"
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"SparseRCNN: target {index} has labels {sorted(set(labels.tolist()))}, outside 0 … {num_classes - 1}. "
            "Labels start at 0 here, there is no background class (torchvision's start at 1)"
        )
    # as_subclass: data.py's tv_tensors would carry their bookkeeping through every operation of the loss
    return {
        "boxes": boxes.as_subclass(torch.Tensor).to(device, torch.float32, non_blocking=True),
        "labels": labels.to(device, non_blocking=True),
    }


def build_model(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
    """The model that a config describes, its parts built here and passed in.

    Args:
        config: see `config.py`.
        pretrained_backbone: False for random weights whatever the config says, as when a checkpoint is loaded next.

    Raises:
        FileNotFoundError: the ImageNet weights can be neither found nor downloaded.
    """
    if config.backbone == "small":
        backbone: nn.Module = SmallFPN(config.hidden_dim)
    else:
        pretrained = pretrained_backbone and config.pretrained_backbone
        backbone = ResNetFPN(config.backbone, config.hidden_dim, pretrained, config.freeze_backbone)
    stages = [
        Stage(
            config.hidden_dim,
            config.num_classes,
            config.num_heads,
            config.ffn_dim,
            config.dropout,
            config.num_cls_layers,
            config.num_reg_layers,
            interaction=DynamicInteraction(config.hidden_dim, config.dynamic_dim, config.roi_size),
            prior_prob=config.prior_prob,
        )
        for _ in range(config.num_stages)
    ]
    head = DynamicHead(stages, RoIPooler(config.roi_size, STRIDES, config.canonical_box_px))
    weights = (
        config.class_weight,
        config.l1_weight,
        config.giou_weight,
        config.focal_alpha,
        config.focal_gamma,
    )
    # The whole image, as in the paper ("Image" in Table 6).
    init_boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(config.num_proposals, 4)
    init_feats = torch.randn(config.num_proposals, config.hidden_dim)
    return SparseRCNN(
        backbone, head, SetCriterion(HungarianMatcher(*weights), *weights), init_boxes, init_feats
    )

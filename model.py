"""SparseRCNN: learned proposals, backbone, head and loss, put together (paper, Figure 3).

In:  a list of RGB images (3, H, W), each of its own size, uint8 0–255 or float 0–1.
Out: detections in eval mode and losses in train mode, in the form of torchvision's detectors.

Two things differ from those. **Labels run from 0 to K − 1: there is no background class**, while
torchvision's objects start at 1. And images are never resized here; the transforms of `data.py` do
that.

Shapes: B images, N proposals per image, C channels, S stages, K classes; M objects in one image.

Padding is not masked, as in the authors' code. Images are padded with zeros on the right and bottom
to one size, and the frozen batch norms turn these zeros into something else. An image's detections
therefore depend a little on how far it is padded. Images of the same padded size give the same
detections alone and together; `evaluate.py` batches only such images.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.ops import box_convert

from backbone import STRIDES, ResNetFPN, SmallFPN, fold_batch_norms
from config import Config
from head import DynamicHead, DynamicInteraction, RoIPooler, Stage
from loss import SetCriterion
from matcher import HungarianMatcher
from support.checkpoint import load_checkpoint
from support.errors import UserError
from support.roi_align import roi_align

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # R, G, B of values 0–255
IMAGENET_STD = (58.395, 57.12, 57.375)


class StageOutputs(NamedTuple):
    """What every stage predicts, before any selection."""

    logits: Tensor  # (S, B, N, K), before the sigmoid
    boxes: Tensor  # (S, B, N, 4) xyxy pixels, not clipped to the image


class SparseRCNN(nn.Module):
    """The detector.

    Args:
        backbone: maps (B, 3, H, W) to a list of feature maps, finest first.
        head: takes these maps, boxes_px (B, N, 4) and pro_feats (B, N, C), and returns logits
            (S, B, N, K) and boxes_px (S, B, N, 4).
        criterion: maps (logits, boxes_px, targets, whwh_px, num_objects) to a dict of losses.
        init_boxes: (N, 4), where the proposal boxes start: cx, cy, w, h in 0–1 of the image.
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
        self.backbone = backbone
        self.head = head
        self.criterion = criterion

        # The learned proposals, which replace anchors and the region proposal network. They are
        # parameters, the same for every image: the boxes are "the statistics of potential object
        # location in the training set", and the features say what a box alone cannot, "such as
        # object pose and shape" (paper, "Learnable proposal box" and "… feature").
        self.proposal_boxes = nn.Parameter(init_boxes.clone())  # (N, 4) cx, cy, w, h in 0–1
        self.proposal_feats = nn.Parameter(init_feats.clone())  # (N, C)

        # Constants, which follow the model to a device but are not in its checkpoints.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        num_objects: float | Tensor | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Images and targets to losses in train mode, images to detections in eval mode.

        Args:
            images: B tensors (3, H, W) RGB, each of its own size, uint8 0–255 or float 0–1, on any
                device.
            targets: B dicts with `boxes` (M, 4) float xyxy pixels and `labels` (M,) int64 **from 0
                to K − 1**. Needed in train mode, ignored in eval mode. Other keys are ignored.
            num_objects: what to divide the losses by; by default the objects in `targets`. Pass the
                objects of the whole batch if these images are only a part of it.

        Returns:
            In train mode a dict of 3·S losses, whose sum is what to minimise. In eval mode a dict
            per image: `boxes` (n, 4) float32 xyxy pixels of that image and clipped to it, `scores`
            (n,) float32 in falling order, `labels` (n,) int64, with n ≤ N.

        `torch.export` works, with height and width as `Dim.DYNAMIC`. `torch.jit.trace` gives wrong
        boxes at all sizes but the traced one, with nothing but warnings (torch 2.14).

        Raises:
            ValueError: in train mode without targets; images or targets of the wrong form.
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
        num_classes = logits.shape[-1]
        targets = [
            check_target(target, num_classes, index, logits.device)
            for index, target in enumerate(targets)
        ]
        return self.criterion(logits, boxes_px, targets, whwh_px, num_objects)

    def stages(self, images: Sequence[Tensor]) -> StageOutputs:
        """The predictions of every stage, with their gradients unless these are turned off."""
        logits, boxes_px, _ = self._predict(images)
        return StageOutputs(logits, boxes_px)

    def _predict(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """images -> logits (S, B, N, K), boxes_px (S, B, N, 4), whwh_px (B, 4)."""
        batch, whwh_px = self.prepare(images)  # (B, 3, H, W), (B, 4)
        pyramid = self.backbone(batch)
        boxes_px = self.initial_boxes_px(whwh_px)  # (B, N, 4)
        # Cloned, because FlopCounterMode fails on a view of a parameter under no_grad.
        pro_feats = self.proposal_feats.expand(len(batch), -1, -1).clone()  # (B, N, C)
        logits, boxes_px = self.head(pyramid, boxes_px, pro_feats)
        return logits, boxes_px, whwh_px

    def prepare(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Normalises images and pads them with zeros, on the right and bottom, to one size.

        Args:
            images: B tensors (3, H, W) RGB, uint8 0–255 or float 0–1, on any device.

        Returns:
            The batch (B, 3, H', W') on the model's device, H' and W' being multiples of 32, and
            whwh_px (B, 4), the w, h, w, h of each image before padding.

        Raises:
            ValueError: no images, a shape that is not (3, H, W), an integer dtype other than uint8.
        """
        check_images(images)

        # Rounded up like this, not as -(-size // stride): ONNX rounds towards zero when dividing.
        stride = STRIDES[-1]
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        height = (height + stride - 1) // stride * stride
        width = (width + stride - 1) // stride * stride

        padded = []
        for image in images:
            # uint8 is sent to the device before it becomes float: a quarter of the bytes.
            scale = 1 if image.dtype == torch.uint8 else 255
            pixels = image.to(self.mean.device, non_blocking=True).to(self.mean.dtype) * scale
            pixels = (pixels - self.mean) / self.std
            # Padded, not copied into a canvas: an exported model would do that pixel by pixel.
            left, right, top, bottom = 0, width - image.shape[2], 0, height - image.shape[1]
            padded.append(pad(pixels, (left, right, top, bottom)))
        batch = torch.stack(padded)  # (B, 3, H', W')

        sizes = [(image.shape[2], image.shape[1]) * 2 for image in images]
        whwh_px = torch.tensor(sizes, dtype=torch.float32, device=batch.device)  # (B, 4)
        return batch, whwh_px

    def initial_boxes_px(self, whwh_px: Tensor) -> Tensor:
        """The learned boxes on images of size whwh_px (B, 4) -> (B, N, 4) float32 xyxy pixels."""
        boxes_01 = box_convert(self.proposal_boxes.float(), "cxcywh", "xyxy")  # (N, 4)
        return boxes_01 * whwh_px[:, None]

    @staticmethod
    def detections(logits: Tensor, boxes_px: Tensor, whwh_px: Tensor) -> list[dict[str, Tensor]]:
        """One stage's predictions to detections, without the boxes that have no area.

        Args: as `best_of_all`.

        Returns:
            As `forward` in eval mode.
        """
        boxes_px, scores, labels = SparseRCNN.best_of_all(logits, boxes_px, whwh_px)
        has_area = (boxes_px[..., 2:] > boxes_px[..., :2]).all(-1)  # (B, N)

        results = []
        for i in range(len(scores)):
            keep = torch.nonzero(has_area[i]).squeeze(1)  # (n,)
            results.append(
                {"boxes": boxes_px[i][keep], "scores": scores[i][keep], "labels": labels[i][keep]}
            )
        return results

    @staticmethod
    def best_of_all(
        logits: Tensor, boxes_px: Tensor, whwh_px: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The N best of a stage's N·K scores, and no NMS.

        Args:
            logits: (B, N, K).
            boxes_px: (B, N, 4) xyxy pixels.
            whwh_px: (B, 4), the w, h, w, h of each image.

        Returns:
            boxes (B, N, 4) clipped to the image, scores (B, N) in falling order, labels (B, N).
        """
        num_proposals, num_classes = logits.shape[1:]

        # The scores are independent sigmoids, so a proposal may be among the best with several
        # classes.
        scores = logits.float().sigmoid().flatten(1)  # (B, N·K)
        scores, best = scores.topk(num_proposals, dim=1)  # (B, N), (B, N)
        # Not `best // num_classes`, whose rounding towards −∞ not every runtime of ONNX can do.
        proposals = torch.div(best, num_classes, rounding_mode="trunc")
        labels = best % num_classes
        boxes_px = boxes_px.gather(1, proposals[..., None].expand(-1, -1, 4))  # (B, N, 4)

        # Not `clip_boxes_to_image`: it takes numbers, for which it waits for the device, and which
        # would be constants in an exported model.
        boxes_px = boxes_px.clamp(min=0).minimum(whwh_px[:, None])
        return boxes_px, scores, labels

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles backbone and stages in place; takes the arguments of `nn.Module.compile`.

        Stages do not depend on the image size, and the backbone is compiled once for all sizes (on
        a CPU once more for images below about 256 pixels, for which other convolutions are used).
        The pooling between them is left alone. How many boxes go to a level is known only at run
        time, so `torch.compile(model)` would compile again and again. Copies of the model, such as
        `for_inference()`, are not compiled.
        """
        self.backbone.compile(*args, **{"dynamic": True, **kwargs})
        for stage in self.head.stages:
            stage.compile(*args, **kwargs)

    def for_inference(self) -> "SparseRCNN":
        """A copy that gives the same detections faster, and that cannot be trained.

        Its batch norms are folded into the convolutions, which run with channels last in memory.
        """
        fast = copy.deepcopy(self).eval().requires_grad_(False)
        # In other backbones a norm need not belong to the convolution registered before it.
        if isinstance(fast.backbone, ResNetFPN | SmallFPN):
            fold_batch_norms(fast.backbone)
        fast.backbone.to(memory_format=torch.channels_last)
        return fast


class Interaction(DynamicInteraction):
    """`DynamicInteraction`, in float32 where gradients are recorded under float16 autocast.

    A bin outside the image is all zeros, and LayerNorm divides it by √1e-5, so on the way back each
    of the two norms can multiply its gradient by 316. Both together exceed float16's largest
    number, 65504, and this infinity times the zeros of the bin is NaN.
    """

    def forward(self, pro_feats: Tensor, roi_feats: Tensor) -> Tensor:
        """pro_feats (N, C), roi_feats (N, R·R, C) -> obj_feats (N, C)."""
        device = roi_feats.device.type
        is_autocast = torch.is_grad_enabled() and torch.is_autocast_enabled(device)
        if is_autocast and torch.get_autocast_dtype(device) == torch.float16:
            with torch.autocast(device, enabled=False):
                return super().forward(pro_feats.float(), roi_feats.float())
        return super().forward(pro_feats, roi_feats)


def check_images(images: Sequence[Tensor]) -> None:
    """Raises a ValueError if images are missing or are not of the form that `SparseRCNN` takes.

    Values are looked at on the CPU only.
    """
    if not len(images):
        raise ValueError("SparseRCNN: an empty list of images")
    for i, image in enumerate(images):
        given = f"{tuple(image.shape)} of {image.dtype}"
        is_shaped = image.dim() == 3 and len(image) == 3 and 0 not in image.shape
        is_fine = is_shaped and (image.dtype == torch.uint8 or image.is_floating_point())
        # On a GPU the model would have to wait for the values, and a compiler does not know them.
        is_known = image.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_fine and is_known and image.is_floating_point():
            is_fine = not (image.min() < -0.5 or image.max() > 1.5)  # resizing may overshoot
            given += f", from {image.min():.3g} to {image.max():.3g}"
        if not is_fine:
            raise ValueError(
                f"SparseRCNN: image {i} is {given}; RGB images (3, H, W) are needed, uint8 0–255 "
                "or float 0–1, not normalised"
            )


def check_target(
    target: dict[str, Tensor], num_classes: int, index: int, device: torch.device
) -> dict[str, Tensor]:
    """Moves one image's target to the device and checks it: CUDA's own error would not explain it.

    Args:
        target: `boxes` (M, 4) and `labels` (M,) int64.
        num_classes: K.
        index: of the image in its batch, for the message.
        device: of the predictions.

    Returns:
        `boxes` (M, 4) float32 xyxy and `labels` (M,) int64 on the device, as plain tensors.

    Raises:
        ValueError: something is missing, shapes or dtypes are wrong, a box has no area, or a label
            is outside 0 … K − 1.
    """
    if missing := {"boxes", "labels"} - set(target):
        raise ValueError(f"SparseRCNN: target {index} has no {' and no '.join(sorted(missing))}")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.shape != (len(labels), 4) or labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"SparseRCNN: target {index} has boxes {tuple(boxes.shape)} and labels "
            f"{tuple(labels.shape)} of {labels.dtype}; boxes (M, 4) and labels (M,) of torch.int64 "
            "are needed"
        )
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = box_convert(boxes.as_subclass(Tensor), boxes.format.value.lower(), "xyxy")
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)  # (M,)
    if not has_area.all():
        raise ValueError(
            f"SparseRCNN: target {index} has the box {boxes[~has_area][0].tolist()}; "
            "x1, y1, x2, y2 with x1 < x2 and y1 < y2 are needed"
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(
            f"SparseRCNN: target {index} has labels {sorted(set(labels.tolist()))}, outside "
            f"0 … {num_classes - 1}. Labels start at 0 here, there is no background class "
            "(torchvision's start at 1)"
        )
    return {
        "boxes": boxes.to(device, torch.float32, non_blocking=True),
        "labels": labels.to(device, non_blocking=True),
    }


def build_model(config: Config, pretrained_backbone: bool = True) -> SparseRCNN:
    """Builds the model that a config describes, part by part.

    Args:
        config: see `config.py`.
        pretrained_backbone: False for random weights whatever the config says, for example because
            a checkpoint is loaded next.

    Raises:
        FileNotFoundError: the ImageNet weights can be neither found nor downloaded.
    """
    if config.backbone == "small":
        backbone: nn.Module = SmallFPN(config.hidden_dim)
    else:
        backbone = ResNetFPN(
            config.backbone,
            out_channels=config.hidden_dim,
            pretrained=config.pretrained_backbone and pretrained_backbone,
            frozen=config.freeze_backbone,
        )

    stages = []
    for _ in range(config.num_stages):
        interaction = Interaction(config.hidden_dim, config.dynamic_dim, config.roi_size)
        stage = Stage(
            hidden_dim=config.hidden_dim,
            num_classes=config.num_classes,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
            dropout=config.dropout,
            num_cls_layers=config.num_cls_layers,
            num_reg_layers=config.num_reg_layers,
            interaction=interaction,
            prior_prob=config.prior_prob,
        )
        stages.append(stage)
    pooler = RoIPooler(
        roi_size=config.roi_size,
        strides=STRIDES,
        canonical_box_px=config.canonical_box_px,
        roi_align=roi_align,
    )
    head = DynamicHead(stages, pooler)

    # "The training loss is the same as the matching cost" (paper, "Set prediction loss").
    weights = {
        "class_weight": config.class_weight,
        "l1_weight": config.l1_weight,
        "giou_weight": config.giou_weight,
        "alpha": config.focal_alpha,
        "gamma": config.focal_gamma,
    }
    criterion = SetCriterion(HungarianMatcher(**weights), **weights)

    # Every proposal box starts as the whole image ("Image" in Table 6). The features are random, so
    # that proposals with the same box differ from the start.
    init_boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(config.num_proposals, 4)
    init_feats = torch.randn(config.num_proposals, config.hidden_dim)

    return SparseRCNN(backbone, head, criterion, init_boxes, init_feats)


def config_of(checkpoint: dict[str, Any], path: str | Path, preset: Config | None = None) -> Config:
    """The config of a checkpoint (see `load_model`).

    Raises:
        UserError: it is of another version, or the checkpoint is a bare state dict and there is no
            preset.
    """
    values = checkpoint["config"]
    if "preset" not in values:
        if preset is None:
            raise UserError(
                f"{path}: holds only weights; name the --preset that they were trained with (see "
                "README, Save your own)"
            )
        for name in ("backbone", "hidden_dim", "dynamic_dim", "ffn_dim", "roi_size"):
            if values[name] != getattr(preset, name):
                raise UserError(
                    f"{path}: is not of --preset {preset.preset}: its {name} is {values[name]}, "
                    f"not {getattr(preset, name)}"
                )
        values = {**preset.to_dict(), **values}
    try:
        return Config.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}; was it written by a newer version?") from None


def load_model(
    path: str | Path, device: torch.device | str = "cpu", preset: Config | None = None
) -> tuple[SparseRCNN, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the device, and the checkpoint without weights.

    Its "config" is a `Config`.

    Args:
        path: a checkpoint of ours, of the authors' code or of MMDetection, or a bare state dict.
        device: where the model goes.
        preset: for a bare state dict: the settings that shapes do not tell.

    Raises:
        UserError: the file is no checkpoint, or its parts do not go together.
        RuntimeError: from torch, if the weights are not those of the config beside them.
    """
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint, path, preset)
    model = build_model(config, pretrained_backbone=False)
    model.load_state_dict(checkpoint["model"])
    for key in ("class_names", "category_ids"):
        if len(checkpoint[key]) != config.num_classes:
            count = len(checkpoint[key])
            raise UserError(f"{path}: has {count} {key} for {config.num_classes} classes")
    del checkpoint["model"]
    # Resolved, so that nobody has to know how it follows from the training sizes.
    config = replace(config, test_size=config.eval_size)
    return model.to(device).eval(), {**checkpoint, "config": config}

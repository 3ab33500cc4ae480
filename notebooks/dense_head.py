"""A dense detector in miniature, to set beside Sparse R-CNN: RetinaNet's idea in one file.

Every cell of every pyramid level has k anchors, boxes of fixed sizes and shapes. Two small layers,
the same in every cell, say for each anchor which class it is, and how to move and scale it to the
object's box. Notebook 1 trains them on the feature pyramid of a trained Sparse R-CNN, which stays
frozen, so that both detectors look at the same features.
Reference: Lin et al., Focal Loss for Dense Object Detection, 2017. Simplified: one hidden layer
instead of eight, levels p2 to p5 instead of p3 to p7, GIoU loss for the boxes.

Shapes: B images, A anchors per image (HWk in the slides), C channels, K classes, M objects in an
image. Boxes are xyxy pixels; a target has `boxes` (M, 4) and `labels` (M,) from 0, plain tensors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from head import apply_deltas
from notebooks.common import Trained

STRIDES = (4, 8, 16, 32)  # image pixels per cell, level by level
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # of the anchors: three sizes per octave
RATIOS = (0.5, 1.0, 2.0)  # height by width
K_ANCHORS = len(SCALES) * len(RATIOS)  # k, per cell
Boxes = dict[str, Tensor]


def make_anchors(height: int, width: int) -> list[Tensor]:
    """torchvision's anchors for an image, level by level: (h·w·k, 4) each, cell by cell.

    The smallest anchors of a level have the area of a square of 4 strides, as in RetinaNet.

    Args:
        height, width: multiples of 32.
    """
    sizes = tuple(tuple(4 * stride * scale for scale in SCALES) for stride in STRIDES)
    generator = AnchorGenerator(sizes, (RATIOS,) * len(STRIDES))
    levels = [torch.empty(1, 1, height // stride, width // stride) for stride in STRIDES]
    images = ImageList(torch.empty(1, 3, height, width), [(height, width)])
    anchors_px = generator(images, levels)[0]
    return list(anchors_px.split([K_ANCHORS * level.numel() for level in levels]))


def label_anchors(anchors_px: Tensor, objects_px: Tensor) -> Tensor:
    """RetinaNet's labels: every anchor that fits an object well enough is taught to say so.

    From an IoU of 0.5 on, an anchor gets the object that it overlaps most. Below 0.4 it is
    background. In between it does not count in the loss.

    Args:
        anchors_px: (A, 4).
        objects_px: (M, 4).

    Returns:
        (A,) int64: the index of the object, −1 for background, −2 for an anchor that does not
        count. An object also gets the anchor that fits it best, so that none goes without.
    """
    if not len(objects_px):
        return torch.full((len(anchors_px),), -1)
    iou = box_iou(anchors_px, objects_px)  # (A, M)
    best, obj = iou.max(1)
    labels = torch.where(best >= 0.5, obj, torch.where(best < 0.4, -1, -2))
    # torchvision's allow_low_quality_matches; the RetinaNet paper does not have it.
    labels[iou.argmax(0)] = torch.arange(len(objects_px))
    return labels


class DenseHead(nn.Module):
    """Class logits and box deltas for all anchors.

    Args:
        channels: C.
        num_classes: K; there is no background class.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.norm_in = nn.GroupNorm(1, channels)  # the levels differ in scale
        self.hidden = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.cls_logits = nn.Conv2d(channels, K_ANCHORS * num_classes, 1)
        self.box_deltas = nn.Conv2d(channels, K_ANCHORS * 4, 1)
        for layer in (self.cls_logits, self.box_deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        # Every score starts at 0.01, as in head.py.
        nn.init.constant_(self.cls_logits.bias, -math.log(0.99 / 0.01))

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """pyramid of (B, C, h, w) -> logits (B, A, K) and deltas (B, A, 4)."""
        logits, deltas = [], []
        for level in pyramid:
            feats = relu(self.norm(self.hidden(self.norm_in(level))))  # (B, C, h, w)
            logits.append(_by_anchor(self.cls_logits(feats), self.num_classes))
            deltas.append(_by_anchor(self.box_deltas(feats), 4))
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)


def _by_anchor(maps: Tensor, width: int) -> Tensor:
    """(B, k·width, h, w) -> (B, h·w·k, width), in the order of `make_anchors`."""
    return maps.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def dense_loss(
    logits: Tensor, deltas: Tensor, anchors_px: Tensor, labels: Tensor, targets: Sequence[Boxes]
) -> Tensor:
    """Focal loss of all anchors that count and GIoU loss of the positive ones, per positive anchor.

    Args:
        logits, deltas: (B, A, K) and (B, A, 4).
        anchors_px: (A, 4).
        labels: (B, A), from `label_anchors`.
        targets: B dicts.
    """
    image, anchor = torch.nonzero(labels >= 0, as_tuple=True)  # (P,) each: the positive anchors
    first = torch.tensor([0, *(len(target["labels"]) for target in targets)]).cumsum(0)
    obj = labels[image, anchor] + first[image]  # counted through the batch

    wanted = torch.zeros_like(logits)
    wanted[image, anchor, torch.cat([target["labels"] for target in targets])[obj]] = 1.0
    focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2.0)[labels >= -1].sum()

    predicted_px = apply_deltas(deltas[image, anchor], anchors_px[anchor])
    object_px = torch.cat([target["boxes"] for target in targets])[obj]
    giou = generalized_box_iou_loss(predicted_px, object_px, reduction="sum")
    return (focal + giou) / max(1, len(obj))


@torch.enable_grad()
def train_dense(world: Trained, images: slice, steps: int, batch_size: int) -> DenseHead:
    """Trains a new head on the frozen features of some images."""
    pyramid, targets = [level[images] for level in world.pyramid], world.targets[images]
    height, width = (STRIDES[0] * side for side in pyramid[0].shape[-2:])
    anchors_px = torch.cat(make_anchors(height, width))
    labels = torch.stack([label_anchors(anchors_px, target["boxes"]) for target in targets])
    dense = DenseHead(pyramid[0].shape[1], len(world.class_names))
    optimizer = torch.optim.AdamW(dense.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=steps)
    for _ in range(steps):
        batch = torch.randperm(len(targets))[:batch_size]
        logits, deltas = dense([level[batch] for level in pyramid])
        chosen = [targets[i] for i in batch.tolist()]
        loss = dense_loss(logits, deltas, anchors_px, labels[batch], chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return dense


class DenseDetector:
    """Two dense heads: each is trained on one half of the images and tested on the other.

    Args:
        world: the images, their targets and their frozen features.
        steps, batch_size: of the training.
    """

    def __init__(self, world: Trained, steps: int, batch_size: int):
        self.world = world
        halves = (slice(1, None, 2), slice(0, None, 2))
        self.heads = [train_dense(world, half, steps, batch_size) for half in halves]

    @torch.no_grad()
    def detections(self, i: int) -> Boxes:
        """What is found in image i, **before** NMS: the 500 best scores, from 0.05 on.

        Returns:
            `boxes`, `scores` and `labels`, in falling order of the scores.
        """
        boxes_px, scores = self._decode(i)
        num_classes = scores.shape[1]
        scores, index = scores.flatten().topk(500)  # of A·K
        index, scores = index[scores >= 0.05], scores[scores >= 0.05]
        return {
            "boxes": boxes_px[index // num_classes],
            "scores": scores,
            "labels": index % num_classes,
        }

    @torch.no_grad()
    def proposals(self, i: int) -> Tensor:
        """Uses the head as Faster R-CNN uses its region proposal network on image i: (n, 4).

        Of each level the 1,000 best boxes, whatever their class; then NMS at an IoU of 0.7, level
        by level; then the 1,000 best of what is left. These are torchvision's numbers.
        """
        boxes_px, scores = self._decode(i)
        scores = scores.amax(1)  # (A,)
        rows, levels, first = [], [], 0
        for level, maps in enumerate(self.world.pyramid):
            count = K_ANCHORS * maps[i, 0].numel()
            best = scores[first : first + count].topk(min(1000, count)).indices
            rows.append(first + best)
            levels.append(torch.full_like(best, level))
            first += count
        rows = torch.cat(rows)
        kept = batched_nms(boxes_px[rows], scores[rows], torch.cat(levels), 0.7)
        return boxes_px[rows[kept]][:1000]

    def _decode(self, i: int) -> tuple[Tensor, Tensor]:
        """All boxes of image i (A, 4), clipped to it, and their scores (A, K)."""
        pyramid = [level[i : i + 1] for level in self.world.pyramid]
        logits, deltas = self.heads[i % 2](pyramid)
        height, width = (STRIDES[0] * side for side in pyramid[0].shape[-2:])
        boxes_px = apply_deltas(deltas[0], torch.cat(make_anchors(height, width)))
        return boxes_px.clamp(min=0).minimum(self.world.whwh_px[i]), logits[0].sigmoid()

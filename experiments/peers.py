"""Other detectors to compare with, with random weights; nothing is downloaded.

Faster R-CNN and RetinaNet (R50-FPN) are torchvision's; Cascade R-CNN is built from its parts.
With random weights, backbone, RPN and box heads do the same work as with trained ones, but hardly
any score passes the threshold of 0.05, so the final NMS has next to nothing to do. torchvision's
batch norms stay in bfloat16 under autocast; the frozen ones that it builds for trained weights give
float32. So with trained weights each of these detectors would be a little slower.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.resnet import Bottleneck
from torchvision.ops import clip_boxes_to_image

PeerName = Literal["faster-rcnn", "cascade-rcnn", "retinanet"]


def tame_residuals(module: nn.Module) -> None:
    """Scales down what each residual block adds, in place.

    Frozen batch norms that have seen no data do not normalise: with random weights the features
    would grow from block to block until they are no longer finite.
    """
    for block in module.modules():
        if isinstance(block, Bottleneck):
            nn.init.constant_(block.bn3.weight, 0.2)


class CascadeHeads(nn.Module):
    """The box heads of Cascade R-CNN: three of Faster R-CNN's, each on the boxes of the one before.

    Each has two layers, then K + 1 scores and one box per proposal. The scores are averaged.

    Args:
        roi_heads: those of torchvision's Faster R-CNN, for their RoIAlign and post-processing.
    """

    def __init__(self, roi_heads: RoIHeads):
        super().__init__()
        self.pool, self.finish = roi_heads.box_roi_pool, roi_heads.postprocess_detections
        self.num_classes = roi_heads.box_predictor.cls_score.out_features  # K + 1: the background
        self.box_heads = nn.ModuleList(TwoMLPHead(256 * 7**2, 1024) for _ in range(3))
        self.cls_scores = nn.ModuleList(nn.Linear(1024, self.num_classes) for _ in range(3))
        self.bbox_preds = nn.ModuleList(nn.Linear(1024, 4) for _ in range(3))
        # Later stages move boxes less.
        self.coders = [BoxCoder((10 * i, 10 * i, 5 * i, 5 * i)) for i in (1, 2, 3)]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list,
        _: None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As `RoIHeads.forward` in eval mode."""
        scores = []
        for i, coder in enumerate(self.coders):
            feats = self.box_heads[i](self.pool(features, proposals, image_shapes))  # (n, 1024)
            moved = coder.decode(self.bbox_preds[i](feats), proposals)[:, 0]  # (n, 4)
            moved = moved.split([len(boxes) for boxes in proposals])
            proposals = [clip_boxes_to_image(*x) for x in zip(moved, image_shapes, strict=True)]
            scores.append(self.cls_scores[i](feats).softmax(-1))

        # torchvision expects logits, and deltas for every class. The softmax of these logits is the
        # mean of the scores, and deltas of zero leave the boxes where they are.
        logits = torch.stack(scores).mean(0).log()  # (n, K + 1)
        deltas = logits.new_zeros(len(logits), 4 * self.num_classes)
        found = self.finish(logits, deltas, proposals, image_shapes)
        names = ("boxes", "scores", "labels")
        return [dict(zip(names, each, strict=True)) for each in zip(*found, strict=True)], {}


def build_peer(name: PeerName, height: int, width: int) -> nn.Module:
    """A detector in eval mode, without gradients, for images of height × width pixels.

    It takes a list of images (3, H, W) with values in 0–1. torchvision's detectors resize; with
    these sides an image of this size stays as it is.
    """
    build = retinanet_resnet50_fpn if name == "retinanet" else fasterrcnn_resnet50_fpn
    sides = {"min_size": min(height, width), "max_size": max(height, width)}
    model = build(weights=None, weights_backbone=None, **sides)
    tame_residuals(model)
    if name == "cascade-rcnn":
        model.roi_heads = CascadeHeads(model.roi_heads)
    return model.eval().requires_grad_(False)

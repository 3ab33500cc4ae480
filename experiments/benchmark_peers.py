"""Other detectors for `python -m experiments.benchmark inference`, from random weights; nothing is downloaded.

Faster R-CNN and RetinaNet (R50-FPN) are torchvision's, and Cascade R-CNN is made here of torchvision's parts: Faster
R-CNN with three box heads in a row. DETR and Deformable DETR (R50, 100 and 300 queries) are those of `transformers`,
which is optional. All are as their libraries build them and take a list of images (3, H, W), 0–1.

What their speed on random weights is worth: backbone, pyramid, RPN, box head and transformers do the same work on any
weights. The box head of Faster and Cascade R-CNN gets 1000 boxes, the best of the RPN, as on trained weights, if the
image is large enough for as many (`rois_per_image` counts them). But hardly any score reaches the threshold of 0.05, so
that torchvision's last non-maximum suppression has next to nothing to do; torchvision's batch norms stay in bfloat16
under autocast, while the frozen ones that it builds for trained weights make float32 of it; and the models of
`transformers` are run without their image processors, which normalise and post-process. On trained weights each would
be a little slower.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.resnet import Bottleneck
from torchvision.ops import clip_boxes_to_image

PeerName = Literal["faster-rcnn", "cascade-rcnn", "retinanet", "detr", "deformable-detr"]
RESIDUAL_SCALE = 0.2  # of the last batch norm of a residual block


def tame_residuals(module: nn.Module) -> None:
    """Scales down what each residual block adds, in place.

    Frozen batch norms that have seen no data do not normalise: on random weights the features would grow from block to
    block, scores would be 0 or 1, and a comparison of two models' scores would say nothing.
    """
    for block in module.modules():
        if isinstance(block, Bottleneck):
            nn.init.constant_(block.bn3.weight, RESIDUAL_SCALE)


class CascadeStage(nn.Module):
    """A box head of Cascade R-CNN: Faster R-CNN's two layers, then scores, and one box for all classes.

    Args:
        num_classes: K + 1, the background included.
        scale: of the deltas, one for all stages in Faster R-CNN; here later stages move boxes less.
    """

    def __init__(self, num_classes: int, scale: float):
        super().__init__()
        self.box_head = TwoMLPHead(256 * 7**2, 1024)
        self.cls_score, self.bbox_pred = nn.Linear(1024, num_classes), nn.Linear(1024, 4)
        self.box_coder = BoxCoder((10 * scale, 10 * scale, 5 * scale, 5 * scale))

    def forward(self, regions: Tensor, proposals: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """regions (n, C, 7, 7) of B lists of boxes, n in all -> scores (n, K + 1), and the boxes moved."""
        found = self.box_head(regions)
        moved = self.box_coder.decode(self.bbox_pred(found), proposals)[:, 0]  # (n, 4)
        return self.cls_score(found).softmax(-1), list(
            moved.split([len(boxes) for boxes in proposals])
        )


class CascadeHeads(nn.Module):
    """Three box heads in place of Faster R-CNN's one, each on the boxes of the one before; their scores are averaged.

    Args:
        roi_heads: of torchvision's Faster R-CNN; its RoIAlign and its post-processing stay.
    """

    def __init__(self, roi_heads: RoIHeads):
        super().__init__()
        self.num_classes = roi_heads.box_predictor.cls_score.out_features
        self.stages = nn.ModuleList(CascadeStage(self.num_classes, scale) for scale in (1, 2, 3))
        roi_heads.box_head = roi_heads.box_predictor = None
        self.roi_heads = roi_heads

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        _: None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As `RoIHeads.forward` in eval mode."""
        scores = []
        for stage in self.stages:
            found, proposals = stage(
                self.roi_heads.box_roi_pool(features, proposals, image_shapes), proposals
            )
            proposals = [
                clip_boxes_to_image(*pair) for pair in zip(proposals, image_shapes, strict=True)
            ]
            scores.append(found)
        # It wants logits, and deltas for every class: the softmax of these is the mean, and no delta moves a box.
        logits = torch.stack(scores).mean(0).log()  # (n, K + 1)
        found = self.roi_heads.postprocess_detections(
            logits, logits.new_zeros(len(logits), 4 * self.num_classes), proposals, image_shapes
        )
        return [
            dict(zip(("boxes", "scores", "labels"), each, strict=True))
            for each in zip(*found, strict=True)
        ], {}


class OnBatch(nn.Module):
    """A model of `transformers`, called like the others: with a list of images, here of equal size."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """B images (3, H, W) -> logits (B, queries, K + 1), boxes (B, queries, 4) cx, cy, w, h in 0–1."""
        found = self.model(pixel_values=torch.stack(list(images)))
        return found.logits, found.pred_boxes


def build_torchvision(build: Callable[..., nn.Module], height: int, width: int) -> nn.Module:
    """torchvision's detectors resize: to these sides an image of height×width stays as it is."""
    sides = {"min_size": min(height, width), "max_size": max(height, width)}
    model = build(weights=None, weights_backbone=None, **sides)
    tame_residuals(model)
    return model


def build_transformers(name: Literal["detr", "deformable-detr"]) -> nn.Module:
    """Built from a configuration, with the ResNet-50 of `transformers` and the 91 labels of COCO."""
    import transformers as hf

    def backbone(*stages: str) -> dict:
        resnet = hf.ResNetConfig(out_features=list(stages))
        return {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": resnet,
        }

    if name == "detr":
        return OnBatch(
            hf.DetrForObjectDetection(
                hf.DetrConfig(backbone=None, num_labels=91, **backbone("stage4"))
            )
        )
    # A custom kernel would have to be downloaded; PyTorch's own grid_sample does the same.
    levels = {"backbone": None, "num_labels": 91, "disable_custom_kernels": True}
    levels |= backbone("stage2", "stage3", "stage4")
    return OnBatch(hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(**levels)))


def build_peer(name: PeerName, height: int, width: int) -> nn.Module | None:
    """In eval mode, without gradients, for images of height×width; None where its library is not installed."""
    if name in ("faster-rcnn", "cascade-rcnn", "retinanet"):
        build = retinanet_resnet50_fpn if name == "retinanet" else fasterrcnn_resnet50_fpn
        model = build_torchvision(build, height, width)
        if name == "cascade-rcnn":
            model.roi_heads = CascadeHeads(model.roi_heads)
    elif importlib.util.find_spec("transformers"):
        model = build_transformers(name)
    else:
        return None
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def rois_per_image(faster_rcnn: nn.Module, images: Sequence[Tensor]) -> float:
    """How many boxes of the RPN reach the box head."""
    counts: list[int] = []
    hook = faster_rcnn.roi_heads.box_head.register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[0]))
    )
    faster_rcnn(images)
    hook.remove()
    return sum(counts) / len(images)

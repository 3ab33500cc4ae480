"""Other detectors to compare with; nothing is downloaded.

For speed (`experiments.benchmark`): torchvision's Faster R-CNN and RetinaNet (R50-FPN) with random
weights. Backbone, RPN and box heads do the same work as with trained ones, but hardly any score
passes the threshold of 0.05, so the final NMS has next to nothing to do. torchvision's batch norms
stay in bfloat16 under autocast; the frozen ones that it builds for trained weights give float32. So
with trained weights each of these detectors would be a little slower.

For accuracy (`experiments.peers`): five small detectors on one backbone, `SmallFPN`, to be trained.
Heads, losses and post-processing are those of torchvision and of transformers. What we set so that
they fit images of about 100 pixels is said at each builder. With one seed all five start with the
same backbone.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MultiScaleRoIAlign, box_convert, clip_boxes_to_image

from backbone import SmallFPN
from config import Config
from model import IMAGENET_MEAN, IMAGENET_STD, SparseRCNN, build_model

PeerName = Literal["faster-rcnn", "retinanet"]
LEVELS = ("p2", "p3", "p4", "p5")
# Not the usual 0.05: Sparse R-CNN and both DETRs have no threshold, and low scores add to AP.
SCORE_THRESHOLD = 0.01

Images = Sequence[Tensor]
Targets = Sequence[dict[str, Tensor]]


# --- behind our model's interface ---


class TorchvisionPeer(nn.Module):
    """One of torchvision's detectors, trained and used as our model is.

    Args:
        detector: takes images with values in 0–1.
        first_label: of the detector; 1 if its label 0 is the background.
    """

    def __init__(self, detector: nn.Module, first_label: int = 1):
        super().__init__()
        self.detector = detector
        self.first_label = first_label

    def forward(self, images: Images, targets: Targets = (), num_objects: float = 1) -> Any:
        """As our model: images (3, H, W) uint8, labels from 0. `num_objects` has no effect."""
        device = next(self.parameters()).device
        images = [image.to(device) / 255 for image in images]
        if not self.training:
            found = self.detector(images)
            return [{**one, "labels": one["labels"] - self.first_label} for one in found]
        targets = [
            {
                "boxes": target["boxes"].to(device),
                "labels": target["labels"].to(device) + self.first_label,
            }
            for target in targets
        ]
        return {"loss": sum(self.detector(images, targets).values())}


class DetrPeer(nn.Module):
    """DETR or Deformable DETR of transformers, trained and used as our model is.

    Padding is not masked, as in our model: boxes are shares of the padded batch.

    Args:
        detector: of transformers, with a backbone that takes images (B, 3, H, W).
        post_process: of transformers, from outputs to detections.
        class_weight: of the class loss.
    """

    prepare = SparseRCNN.prepare  # normalises and pads

    def __init__(self, detector: nn.Module, post_process: Callable, class_weight: float):
        super().__init__()
        self.detector = detector
        self.post_process = post_process
        self.weights = {"ce": class_weight, "bbox": 5.0, "giou": 2.0}
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images: Images, targets: Targets = (), num_objects: float = 1) -> Any:
        """As our model: images (3, H, W), labels from 0. `num_objects` has no effect."""
        pixels, _ = self.prepare(images)  # (B, 3, H, W)
        height, width = pixels.shape[2:]
        if not self.training:
            sizes_hw = [(height, width)] * len(images)
            found = self.post_process(self.detector(pixels), threshold=0.0, target_sizes=sizes_hw)
            for one, image in zip(found, images, strict=True):
                one["boxes"] = clip_boxes_to_image(one["boxes"], image.shape[1:])
            return found

        whwh_px = torch.tensor([width, height, width, height], device=pixels.device)
        labels = []
        for target in targets:
            boxes_01 = box_convert(target["boxes"].to(pixels.device) / whwh_px, "xyxy", "cxcywh")
            labels.append({"boxes": boxes_01, "class_labels": target["labels"].to(pixels.device)})
        losses = self.detector(pixels, labels=labels).loss_dict  # loss_ce, loss_ce_0, …
        weighted = [self.weights.get(name.split("_")[1], 0) * losses[name] for name in losses]
        return {"loss": sum(weighted)}


# --- with random weights, for speed ---


def tame_residuals(module: nn.Module) -> None:
    """Scales down what each residual block adds, in place.

    Frozen batch norms that have seen no data do not normalise: with random weights the features
    would grow from block to block until they are no longer finite.
    """
    for block in module.modules():
        if isinstance(block, Bottleneck):
            nn.init.constant_(block.bn3.weight, 0.2)


def build_peer(name: PeerName, height: int, width: int) -> nn.Module:
    """A detector in eval mode, without gradients, for images of height × width pixels.

    It takes a list of images (3, H, W) with values in 0–1. torchvision's detectors resize; with
    these sides an image of this size stays as it is.
    """
    build = retinanet_resnet50_fpn if name == "retinanet" else fasterrcnn_resnet50_fpn
    sides = {"min_size": min(height, width), "max_size": max(height, width)}
    model = build(weights=None, weights_backbone=None, **sides)
    tame_residuals(model)
    return model.eval().requires_grad_(False)


class TrainedPeer(TorchvisionPeer):
    """One of torchvision's ResNet detectors, to be trained by `train.train_step` as our model is.

    The stem, the first stage and the batch norms are frozen, as in our recipe.

    Args:
        detector: of `build_peer`.
    """

    def __init__(self, detector: nn.Module):
        super().__init__(detector.train().requires_grad_(True))
        resnet = detector.backbone.body
        for norm in resnet.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval().requires_grad_(False)
        for frozen in (resnet.conv1, resnet.layer1):
            frozen.requires_grad_(False)


# --- small ones, to be trained ---


class NamedFPN(SmallFPN):
    """The backbone with its maps by name, as torchvision's detectors want them."""

    def __init__(self, out_channels: int):
        super().__init__(out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) -> p2 … p5, each (B, C, H/stride, W/stride)."""
        return OrderedDict(zip(LEVELS, super().forward(images), strict=True))


class SomeMapsFPN(SmallFPN):
    """The backbone with a part of its maps; the last convolutions of the others are left out.

    Args:
        out_channels: C.
        which: of p2 … p5.
    """

    def __init__(self, out_channels: int, which: slice):
        super().__init__(out_channels)
        self.which = which
        levels = range(len(LEVELS))
        for level in set(levels) - set(levels[which]):
            self.fpn.layer_blocks[level] = nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> maps (B, C, H/stride, W/stride), finest first."""
        return super().forward(images)[self.which]


def anchors(config: Config, smallest: float, num_scales: int) -> AnchorGenerator:
    """Anchors that double from level to level, with `num_scales` sizes per level and three shapes.

    Args:
        config: gives the size of the images.
        smallest: the side of the smallest anchor, as a share of the image's.
        num_scales: sizes per level.
    """
    px = config.eval_size * smallest
    factors = [2 ** (i / num_scales) for i in range(num_scales)]
    sizes = tuple(tuple(px * 2**level * factor for factor in factors) for level in range(4))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)


def build_faster_rcnn(config: Config, pretrained_backbone: bool = False) -> nn.Module:
    """torchvision's Faster R-CNN.

    Anchors have 12, 24, 48 and 96 pixels in images of 96: objects of Shapes have 10 to 48. Up to 8
    objects need fewer boxes than COCO's: 64 instead of 512 are sampled per image, of 100 proposals
    instead of 2,000 (1,000 in evaluation). Pooling is as ours (R×R bins, the same level for a box),
    and the box head is 128 wide instead of 1,024.
    """
    backbone = NamedFPN(config.hidden_dim)
    R, width = config.roi_size, 128
    detector = FasterRCNN(
        backbone,
        min_size=config.eval_size,
        max_size=config.max_size,
        rpn_anchor_generator=anchors(config, 1 / 8, 1),
        rpn_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=MultiScaleRoIAlign(LEVELS, R, 2, canonical_scale=config.canonical_box_px),
        box_head=TwoMLPHead(config.hidden_dim * R**2, width),
        box_predictor=FastRCNNPredictor(width, config.num_classes + 1),
        box_batch_size_per_image=64,
        box_score_thresh=SCORE_THRESHOLD,
        _skip_resize=True,
    )
    return TorchvisionPeer(detector)


def build_retinanet(config: Config, pretrained_backbone: bool = False) -> nn.Module:
    """torchvision's RetinaNet, with its head of four convolutions.

    It has three anchor sizes per level, as usual: from 10 to 16 pixels on p2 to 80 to 127 on p5, in
    images of 96. Its start is made for 256 channels. With fewer, each convolution would let less
    of the signal through, so the weights start larger. It has no background: labels start at 0.
    """
    detector = RetinaNet(
        NamedFPN(config.hidden_dim),
        config.num_classes,
        min_size=config.eval_size,
        max_size=config.max_size,
        anchor_generator=anchors(config, 10 / 96, 3),
        score_thresh=SCORE_THRESHOLD,
        _skip_resize=True,
    )
    for part in (detector.head.classification_head, detector.head.regression_head):
        for layer in part.conv.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data *= (256 / config.hidden_dim) ** 0.5
    return TorchvisionPeer(detector, first_label=0)


def detr_settings(config: Config, num_maps: int) -> dict[str, Any]:
    """What DETR and Deformable DETR share: 3 + 3 layers, our widths, as many queries as proposals.

    They have no dropout, as ours, and losses after every decoder layer, as their authors'.
    """
    from transformers import ResNetConfig

    # transformers would build the backbone itself. This one only says how many channels the maps
    # have; ours takes its place.
    placeholder = ResNetConfig(
        depths=[1] * num_maps,
        hidden_sizes=[config.hidden_dim] * num_maps,
        layer_type="basic",
        out_features=[f"stage{i}" for i in range(1, 1 + num_maps)],
    )
    settings = {"backbone_config": placeholder, "num_labels": config.num_classes}
    settings |= {"num_queries": config.num_proposals, "d_model": config.hidden_dim}
    for part in ("encoder", "decoder"):
        settings[f"{part}_layers"] = 3
        settings[f"{part}_attention_heads"] = config.num_heads
        settings[f"{part}_ffn_dim"] = config.ffn_dim
    return {**settings, "dropout": 0.0, "auxiliary_loss": True}


def start_like_the_authors(detector: nn.Module, backbone: nn.Module) -> None:
    """Xavier-uniform matrices, queries from normal(0, 1), and our backbone, in place.

    transformers draws all matrices from normal(0, 0.02): it expects to load trained weights. Those
    that it starts at 0 stay 0: they are the sampling offsets of Deformable DETR.
    """
    for parameter in detector.parameters():
        if parameter.dim() > 1 and parameter.any():
            nn.init.xavier_uniform_(parameter)
    nn.init.normal_(detector.model.query_position_embeddings.weight)
    detector.model.backbone.model = backbone


def build_detr(config: Config, pretrained_backbone: bool = False) -> nn.Module:
    """transformers' DETR, on p3.

    Its own map has stride 32, and 25 × 38 cells for an image of COCO. With 96 pixels that would be
    3 × 3 cells. At stride 8 an object spans about as many cells here as there. With losses after
    all layers, transformers' decoder also normalises between them, which its authors' does not
    (findings/detr_auxiliary_loss.sh).
    """
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    backbone = SomeMapsFPN(config.hidden_dim, slice(1, 2))
    detector = DetrForObjectDetection(DetrConfig(**detr_settings(config, num_maps=1)))
    start_like_the_authors(detector, backbone)
    post_process = DetrImageProcessor().post_process_object_detection
    return DetrPeer(detector, post_process, class_weight=1.0)


def build_deformable_detr(config: Config, pretrained_backbone: bool = False) -> nn.Module:
    """transformers' Deformable DETR, without iterative refinement, as in the paper's Table 1.

    It attends to p3, p4 and p5, its authors' to strides 8 to 64. With p2 a step would take three
    times as long.
    """
    from transformers import (
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        DeformableDetrImageProcessor,
    )

    backbone = SomeMapsFPN(config.hidden_dim, slice(1, 4))
    # A class weighs 2 in the authors' matching cost and loss, as in ours; in transformers 1.
    settings = {**detr_settings(config, num_maps=3), "num_feature_levels": 3, "class_cost": 2}
    detector = DeformableDetrForObjectDetection(DeformableDetrConfig(**settings))
    start_like_the_authors(detector, backbone)
    nn.init.normal_(detector.model.level_embed)
    # The authors' start, too, and not transformers': every class has a low score, and boxes are
    # small and lie at their reference points. All layers share these modules.
    prior = config.prior_prob
    nn.init.constant_(detector.class_embed[0].bias, -math.log((1 - prior) / prior))
    last = detector.bbox_embed[0].layers[-1]
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias[2:], -2.0)
    # The N best of N·K scores, as ours.
    post_process = DeformableDetrImageProcessor().post_process_object_detection
    post_process = partial(post_process, top_k=config.num_proposals)
    return DetrPeer(detector, post_process, class_weight=2.0)


DETECTORS: dict[str, Callable[[Config, bool], nn.Module]] = {
    "sparse-rcnn": build_model,
    "faster-rcnn": build_faster_rcnn,
    "retinanet": build_retinanet,
    "detr": build_detr,
    "deformable-detr": build_deformable_detr,
}
OF_TRANSFORMERS = ("detr", "deformable-detr")

"""Other detectors to compare with, with random weights; nothing is downloaded.

Faster R-CNN and RetinaNet (R50-FPN) are torchvision's. With random weights, backbone, RPN and box
heads do the same work as with trained ones, but hardly any score passes the threshold of 0.05, so
the final NMS has next to nothing to do. torchvision's batch norms stay in bfloat16 under autocast;
the frozen ones that it builds for trained weights give float32. So with trained weights each of
these detectors would be a little slower.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.resnet import Bottleneck

PeerName = Literal["faster-rcnn", "retinanet"]


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


class TrainedPeer(nn.Module):
    """One of torchvision's detectors, to be trained by `train.train_step` as our model is.

    The stem, the first stage and the batch norms are frozen, as in our recipe.

    Args:
        detector: of `build_peer`.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector.train().requires_grad_(True)
        resnet = detector.backbone.body
        for norm in resnet.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval().requires_grad_(False)
        for frozen in (resnet.conv1, resnet.layer1):
            frozen.requires_grad_(False)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        num_objects: float | None = None,
    ) -> dict[str, Tensor]:
        """As our model in train mode: images (3, H, W) uint8, labels from 0; a dict of losses."""
        device = self.detector.backbone.body.conv1.weight.device
        images = [image.to(device) / 255 for image in images]
        targets = [
            # torchvision's label 0 is the background.
            {"boxes": target["boxes"].to(device), "labels": target["labels"].to(device) + 1}
            for target in targets
        ]
        return self.detector(images, targets)

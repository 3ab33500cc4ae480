"""Other detectors for `python -m tools.benchmark inference`, from random weights; nothing is downloaded.

Faster R-CNN and RetinaNet (R50-FPN) are torchvision's; DETR and Deformable DETR (R50, 100 and 300 queries) those of
`transformers`, which is optional. All are as their libraries build them and take a list of images (3, H, W), 0–1.

What their speed on random weights is worth: backbone, pyramid, RPN, box head and transformers do the same work on any
weights. Faster R-CNN's box head gets 1000 boxes, the best of the RPN, as on trained weights, if the image is large
enough for as many (`rois_per_image` counts them). But hardly any score reaches the threshold of 0.05, so that
torchvision's last non-maximum suppression has next to nothing to do; and the models of `transformers` are run without
their image processors, which normalise and post-process. On trained weights each would be a little slower than here.

Cascade R-CNN is left out: neither library has it.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.resnet import Bottleneck

PeerName = Literal["faster-rcnn", "retinanet", "detr", "deformable-detr"]
RESIDUAL_SCALE = 0.2  # of the last batch norm of a residual block


def tame_residuals(module: nn.Module) -> None:
    """Scales down what each residual block adds, in place.

    Frozen batch norms that have seen no data do not normalise: on random weights the features would grow from block to
    block, scores would be 0 or 1, and a comparison of two models' scores would say nothing.
    """
    for block in module.modules():
        if isinstance(block, Bottleneck):
            nn.init.constant_(block.bn3.weight, RESIDUAL_SCALE)


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
        return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": resnet}

    if name == "detr":
        return OnBatch(hf.DetrForObjectDetection(hf.DetrConfig(backbone=None, num_labels=91, **backbone("stage4"))))
    # A custom kernel would have to be downloaded; PyTorch's own grid_sample does the same.
    levels = {"backbone": None, "num_labels": 91, "disable_custom_kernels": True}
    levels |= backbone("stage2", "stage3", "stage4")
    return OnBatch(hf.DeformableDetrForObjectDetection(hf.DeformableDetrConfig(**levels)))


def build_peer(name: PeerName, height: int, width: int) -> nn.Module | None:
    """In eval mode, without gradients, for images of height×width; None where its library is not installed."""
    if name in ("faster-rcnn", "retinanet"):
        build = fasterrcnn_resnet50_fpn if name == "faster-rcnn" else retinanet_resnet50_fpn
        model = build_torchvision(build, height, width)
    elif importlib.util.find_spec("transformers"):
        model = build_transformers(name)
    else:
        return None
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def rois_per_image(faster_rcnn: nn.Module, images: Sequence[Tensor]) -> float:
    """How many boxes of the RPN reach the box head."""
    counts: list[int] = []
    hook = faster_rcnn.roi_heads.box_head.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    faster_rcnn(images)
    hook.remove()
    return sum(counts) / len(images)

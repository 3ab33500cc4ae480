"""Backbone: an image becomes the feature pyramid p2 … p5 (paper, "Backbone").

A ResNet shrinks the image in stages; a feature pyramid network (FPN) gives each stage's map C
channels and adds what the coarser ones know, so that small objects can be found on fine maps and
large ones on coarse maps. Both are torchvision's.

In:  images (B, 3, H, W) float32, normalised with ImageNet's mean and standard deviation; H and W
     are multiples of 32.
Out: four maps, finest first: p2 (B, C, H/4, W/4), p3 (… /8), p4 (… /16), p5 (… /32).

The file imports nothing of this project: copied alone it runs. Any other module that returns such a
list of maps can take its place.

>>> import torch
>>> backbone = ResNetFPN("resnet18", out_channels=64, pretrained=False)
>>> [tuple(level.shape) for level in backbone(torch.rand(2, 3, 64, 96))]
[(2, 64, 16, 24), (2, 64, 8, 12), (2, 64, 4, 6), (2, 64, 2, 3)]
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d

STRIDES = (4, 8, 16, 32)  # image pixels per cell of p2, p3, p4, p5


class ResNetFPN(nn.Module):
    """torchvision's ResNet, and torchvision's FPN on its four stages.

    Args:
        name: "resnet18", "resnet50" or "resnet101".
        out_channels: C, of every level.
        pretrained: start from torchvision's ImageNet weights.
        frozen: keep the batch norms, the stem and layer1 as they are, like the authors' code. They
            hold what was learned on ImageNet; without its weights pass False, to train everything.

    Raises:
        FileNotFoundError: the ImageNet weights can be neither found nor downloaded.
    """

    def __init__(
        self,
        name: str = "resnet50",
        out_channels: int = 256,
        pretrained: bool = True,
        frozen: bool = True,
    ):
        super().__init__()
        # A few images per GPU are too few for batch statistics: ImageNet's stay.
        norm_layer = FrozenBatchNorm if frozen else nn.BatchNorm2d
        resnet = get_model(name, weights=None, norm_layer=norm_layer)
        if pretrained:
            resnet.load_state_dict(imagenet_state_dict(name))

        # torchvision's layer1 … layer4 have the strides of p2 … p5.
        stages = {"layer1": "p2", "layer2": "p3", "layer3": "p4", "layer4": "p5"}
        self.body = IntermediateLayerGetter(resnet, stages)
        if frozen:
            # The first layers see edges and textures, which are alike in all data sets.
            self.body["conv1"].requires_grad_(False)
            self.body["layer1"].requires_grad_(False)

        width = resnet.inplanes  # channels of layer4; each stage doubles them
        self.fpn = FeaturePyramidNetwork([width // 8, width // 4, width // 2, width], out_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> [p2, p3, p4, p5], each (B, C, H/stride, W/stride)."""
        levels = self.fpn(self.body(images))
        return list(levels.values())


class SmallFPN(nn.Module):
    """A small network for images of about 100 pixels that is trained from scratch, and an FPN.

    Not in the paper: such images need no ResNet, and there may be no ImageNet weights.

    Args:
        out_channels: C, of every level.
        widths: channels after strides 2, 4, 8, 16 and 32.
    """

    def __init__(self, out_channels: int = 64, widths: tuple[int, ...] = (24, 48, 96, 128, 128)):
        super().__init__()
        block = partial(Conv2dNormActivation, kernel_size=3)  # convolution, batch norm, ReLU
        self.stem = block(3, widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(block(inner, outer, stride=2), block(outer, outer))
            for inner, outer in pairwise(widths)
        )
        self.fpn = FeaturePyramidNetwork(list(widths[1:]), out_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> [p2, p3, p4, p5], each (B, C, H/stride, W/stride)."""
        x = self.stem(images)
        levels = {}
        for level, stage in enumerate(self.stages, start=2):
            x = stage(x)
            levels[f"p{level}"] = x
        return list(self.fpn(levels).values())


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's, except that half precision stays half precision.

    torchvision's multiplies by float32 constants, so that under autocast its output is float32:
    twice the memory and time between two convolutions.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of any float dtype -> the same."""
        # γ (x − μ) / √(σ² + ε) + β, as one multiplication and one addition.
        scale = self.weight * (self.running_var + self.eps).rsqrt()  # (C,)
        shift = self.bias - self.running_mean * scale  # (C,)
        scale = scale.to(x.dtype)[:, None, None]  # (C, 1, 1)
        shift = shift.to(x.dtype)[:, None, None]  # (C, 1, 1)
        return torch.addcmul(shift, x, scale)


def fold_batch_norms(module: nn.Module) -> None:
    """Multiplies batch norms into the convolutions before them, in place: same maps, but faster.

    With constant statistics a batch norm only scales and shifts each channel, and the weights and
    bias of a convolution can do that too.

    Args:
        module: for inference only. Each batch norm in it has to follow the convolution that is
            registered right before it, as in the networks of this file.
    """
    for parent in list(module.modules()):
        for (_, conv), (name, norm) in pairwise(list(parent.named_children())):
            if not isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                continue
            mean, variance = norm.running_mean, norm.running_var
            if isinstance(conv, nn.Conv2d) and mean is not None and variance is not None:
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    mean,
                    variance,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                setattr(parent, name, nn.Identity())


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (V1) of a ResNet, downloaded once into torch.hub's cache.

    Raises:
        FileNotFoundError: they can be neither found nor downloaded; the message says what to do.
    """
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a wrong checksum
        raise FileNotFoundError(
            f"no ImageNet weights for {name} ({error}). Put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or start from random weights: pretrained=False, "
            "frozen=False"
        ) from error

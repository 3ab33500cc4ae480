"""Backbone: an image to the feature pyramid p2 … p5 (slides: "Overview of Sparse R-CNN", 2. FPN + ResNet).

In:  images (B, 3, H, W) float32, normalised with ImageNet's mean and standard deviation, H and W multiples of 32.
Out: a list of four maps, finest first: p2 (B, C, H/4, W/4), p3 (… /8), p4 (… /16), p5 (… /32).

ResNet and FPN are torchvision's. The file imports nothing of this project: copied alone it runs, and any other module
that returns such a list can take its place.

>>> import torch
>>> backbone = ResNetFPN("resnet18", out_channels=64, pretrained=False)
>>> [tuple(p.shape) for p in backbone(torch.rand(2, 3, 64, 96))]
[(2, 64, 16, 24), (2, 64, 8, 12), (2, 64, 4, 6), (2, 64, 2, 3)]

Deviations (ours | paper | authors' code | why)
    `SmallFPN`, trained from scratch | — | — | pictures of 96 pixels need no ResNet, and its weights cannot be assumed
"""

import os
from functools import partial
from itertools import pairwise
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d

STRIDES = (4, 8, 16, 32)  # pixels of the image a cell of p2, p3, p4, p5


def imagenet_state_dict(name: str) -> dict[str, Tensor]:
    """torchvision's V1 ImageNet weights of a ResNet, downloaded once into torch.hub's cache.

    Raises:
        FileNotFoundError: they can neither be found nor downloaded; the message says which file to put where.
    """
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    # RuntimeError: a wrong checksum, or a broken file; the last two: a file that is something else
    except (URLError, OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise FileNotFoundError(
            f"no ImageNet weights for {name}: {error}. Put {weights.url} at {path} (delete what is there if it is "
            "broken), or start from random weights with --no-pretrained-backbone --no-freeze-backbone"
        ) from error


def fold_batch_norms(module: nn.Module) -> None:
    """Multiplies every batch norm into the convolution registered right before it, in place: the same maps, sooner.

    For inference only, in networks whose norms follow their convolutions, as those of this file do: with its constant
    statistics a batch norm scales and shifts each channel, and so can the convolution's own weights and bias.
    """
    for parent in list(module.modules()):
        for (_, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                setattr(parent, name, nn.Identity())


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's, but what comes in in half precision goes out in it, too.

    torchvision's multiplies by float32 constants: under autocast everything between two convolutions is float32 then,
    twice the memory and time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of any float dtype -> the same."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


class ResNetFPN(nn.Module):
    """torchvision's ResNet-18/50/101 with frozen batch norms, and torchvision's FPN on top of its four stages.

    Args:
        name: "resnet18", "resnet50" or "resnet101".
        out_channels: C, of every level.
        pretrained: start from torchvision's ImageNet weights.
        frozen: the batch norms are constants, and the stem and layer1 get no gradient, as in the authors'
            code. Without ImageNet weights frozen norms learn badly: pass False, and everything is trained.

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
        resnet = get_model(
            name, weights=None, norm_layer=FrozenBatchNorm if frozen else nn.BatchNorm2d
        )
        if pretrained:
            resnet.load_state_dict(imagenet_state_dict(name))
        widths = [resnet.inplanes // 8, resnet.inplanes // 4, resnet.inplanes // 2, resnet.inplanes]
        self.body = IntermediateLayerGetter(
            resnet, {f"layer{i}": f"p{i + 1}" for i in (1, 2, 3, 4)}
        )
        if frozen:
            for part in ("conv1", "layer1"):
                self.body[part].requires_grad_(False)
        self.fpn = FeaturePyramidNetwork(widths, out_channels)
        self.to(
            memory_format=torch.channels_last
        )  # convolutions are faster so, most of all in bfloat16

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> [p2, p3, p4, p5], each (B, C, H/stride, W/stride)."""
        return list(self.fpn(self.body(images)).values())


class SmallFPN(nn.Module):
    """A plain convolutional network with trained batch norms and an FPN, for small pictures and no ImageNet weights.

    Args:
        out_channels: C, of every level.
        widths: channels after strides 2, 4, 8, 16 and 32.
    """

    def __init__(self, out_channels: int = 64, widths: tuple[int, ...] = (24, 48, 96, 128, 128)):
        super().__init__()
        block = partial(Conv2dNormActivation, kernel_size=3)
        self.stem = block(3, widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(block(inner, outer, stride=2), block(outer, outer))
            for inner, outer in zip(widths[:-1], widths[1:], strict=True)
        )
        self.fpn = FeaturePyramidNetwork(list(widths[1:]), out_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) -> [p2, p3, p4, p5], each (B, C, H/stride, W/stride)."""
        x, levels = self.stem(images), {}
        for level, stage in enumerate(self.stages, start=2):
            x = stage(x)
            levels[f"p{level}"] = x
        return list(self.fpn(levels).values())

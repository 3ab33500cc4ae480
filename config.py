"""Everything that can be changed: one frozen dataclass, and the paper's recipes as presets of it.

The comment beside a field is its `--help` text: the unit first, the source last. "paper" is Sun et
al. (CVPR 2021); "code" is the authors' repository, for what the paper leaves open. Change a config
with `dataclasses.replace(config, num_stages=3)`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import msgspec
import tyro

from support.errors import UserError

# What the tensors of a checkpoint depend on, and how they are used.
NETWORK = (
    *("backbone", "num_proposals", "num_stages", "hidden_dim", "dynamic_dim", "num_heads"),
    *("ffn_dim", "num_cls_layers", "num_reg_layers", "roi_size", "canonical_box_px"),
)

# Lowest and highest values, only of settings that would otherwise pass silently, or fail far from
# here.
RANGES = {
    """
    min_sizes crop_resize crop_sizes shapes_train shapes_val max_size test_size epochs batch_size
    micro_batch eval_every max_dets max_bad_steps num_classes num_proposals num_stages hidden_dim
    dynamic_dim num_heads ffn_dim roi_size canonical_box_px""": (1, math.inf),
    """
    class_weight l1_weight giou_weight weight_decay workers seed num_cls_layers num_reg_layers
    checkpoint_minutes warmup_steps""": (0, math.inf),
    "lr lr_at_16 clip_norm": (1e-12, math.inf),
    "color_jitter focal_alpha warmup_factor dropout prior_prob milestones": (0, 1),
    "focal_gamma": (0, 100),
}

PresetName = Literal["r50-100", "r50-300", "r101-100", "r101-300", "shapes", "small"]


@dataclass(frozen=True)
class Config:
    """The settings of one run. The defaults are the paper's R50 with 100 proposals, on COCO.

    Raises:
        UserError: a value is out of range; the message names it.
    """

    # Where the defaults of all other flags come from: one of the paper's four models, the small one
    # for Shapes, or the small one for photographs of your own, from scratch.
    preset: PresetName = "r50-100"

    # --- data: which images, and how they are augmented ---

    # Annotations to train on, in COCO's format. Your own files replace the data of the preset.
    train_json: str | None = None
    train_images: str | None = None  # folder of the images that --train-json lists
    # Annotations to evaluate on. Without them your own data is not evaluated.
    val_json: str | None = None
    val_images: str | None = None  # folder of the images that --val-json lists
    data: Literal["coco", "shapes-demo", "shapes-crowded"] = "coco"  # the data without --train-json
    workers: int = 4  # loader processes per training process; 0 loads images in that process itself
    # Pixels: the shortest side of a training image becomes one of these, chosen at random
    # (paper, Training details).
    min_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    # Pixels: upper limit of the longest side, in training and evaluation (paper).
    max_size: int = 1333
    # Pixels: the shortest side in evaluation; by default the largest of --min-sizes (paper: 800).
    test_size: int | None = None
    flip: bool = True  # flip half of the training images left to right (paper)
    flip_vertical: bool = False  # flip half of the training images upside down; not in the paper
    # Multiply brightness, contrast and saturation by a number in 1 ± this; not in the paper.
    color_jitter: float = 0.0
    crop: bool = False  # random crops of half of the training images (paper, Table 1, starred rows)
    crop_resize: tuple[int, ...] = (400, 500, 600)  # pixels: the shortest side before a crop (code)
    crop_sizes: tuple[int, int] = (384, 600)  # pixels: sides of a crop, from and to (code)
    shapes_train: int = 4000  # images per epoch of Shapes
    shapes_val: int = 400  # images in the validation set of Shapes

    # --- training: the schedule, the optimizer, and the running of it ---

    epochs: int = 36  # passes over the data (paper, Training details)
    batch_size: int = 16  # images per step, over all processes (paper, Training details)
    lr: float | None = None  # learning rate; by default --lr-at-16 times batch size / 16
    # Mixed precision. Matching, losses and boxes stay in float32.
    amp: Literal["off", "bf16", "fp16"] = "off"
    # Images per process and forward pass; gradients accumulate to --batch-size. By default the
    # process's whole share.
    micro_batch: int | None = None
    seed: int = 0  # of the weights, the order of the data and the augmentation
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    max_dets: int = 100  # detections per image and class that count in an evaluation (COCO: 100)
    lr_at_16: float = 2.5e-5  # learning rate for 16 images per step (paper, Training details)
    weight_decay: float = 1e-4  # AdamW's, on every parameter (paper, Training details)
    # Divide the rate by 10 at the milestones (paper), or let it fall to 0 along half a cosine.
    schedule: Literal["step", "cosine"] = "step"
    # Shares of the run after which the rate is divided by 10 (paper: epochs 27 and 33 of 36).
    milestones: tuple[float, ...] = (27 / 36, 33 / 36)
    warmup_steps: int = 1000  # steps of linear warm-up, at most a tenth of the run (code)
    warmup_factor: float = 0.01  # fraction of the rate at which the warm-up starts (code)
    clip_norm: float = 1.0  # largest norm of the whole model's gradient (code)
    # torch.compile for backbone and stages: takes minutes once, then steps are faster on a GPU.
    compile: bool = False
    checkpoint_minutes: float = 10.0  # minutes between two writes of last.pt within an epoch
    max_bad_steps: int = 20  # stop after this many steps in a row whose gradient is not finite

    # --- model: the network ---

    # small: for Shapes, and for photographs from scratch.
    backbone: Literal["resnet18", "resnet50", "resnet101", "small"] = "resnet50"
    num_proposals: int = 100  # N learned proposals (paper, Training details)
    num_stages: int = 6  # S stages of the head (paper, Training details)
    pretrained_backbone: bool = True  # start the ResNet from ImageNet weights (paper)
    # Keep the ResNet's batch norms, stem and layer1 at their ImageNet values (code). Turn it off to
    # train from scratch.
    freeze_backbone: bool = True
    num_classes: tyro.conf.Suppress[int] = 80  # K; no flag: train.py reads it from the annotations
    hidden_dim: int = 256  # C, channels of FPN levels and proposal features (paper, Backbone)
    dynamic_dim: int = 64  # D, channels between the generated convolutions: C/4 (paper, pseudocode)
    num_heads: int = 8  # heads of the self-attention among proposals (code)
    ffn_dim: int = 2048  # inner width of the feed-forward network of a stage (code)
    dropout: float = 0.0  # share of activations dropped in attention and feed-forward (code)
    num_cls_layers: int = 1  # hidden layers before the class logits (code)
    num_reg_layers: int = 3  # hidden layers before the box deltas (code)
    roi_size: int = 7  # R: RoIAlign gives R x R bins (code)
    # Pixels: boxes whose sqrt(area) is at least this are pooled from p4, from half of it on from
    # p3, and so on (code).
    canonical_box_px: int = 224

    # --- matching cost and loss, which share their weights ---

    class_weight: float = 2.0  # lambda_cls of the focal term (paper, Training details)
    l1_weight: float = 5.0  # lambda_L1 (paper, Training details)
    giou_weight: float = 2.0  # lambda_giou (paper, Training details)
    focal_alpha: float = 0.25  # weight of the positives in the focal loss (code)
    focal_gamma: float = 2.0  # how strongly the focal loss plays down easy cases (code)
    prior_prob: float = 0.01  # initial score of every class: bias = -log((1 - p) / p) (code)

    def __post_init__(self) -> None:
        for names, (low, high) in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                values = value if isinstance(value, tuple) else (value,)
                if not all(v is None or (low <= v <= high and v < math.inf) for v in values):
                    raise UserError(f"config: {name}={value} should lie in {low} … {high}")
        if not (self.min_sizes and self.crop_resize):
            raise UserError("config: min_sizes and crop_resize should not be empty")
        # Between 0 and 1 the gradient of (1 − p)^γ is infinite at p = 1.
        if 0 < self.focal_gamma < 1:
            raise UserError(f"config: focal_gamma={self.focal_gamma} should be 0, or at least 1")

    @property
    def eval_size(self) -> int:
        """Pixels: the shortest side of an image in evaluation."""
        return max(self.min_sizes) if self.test_size is None else self.test_size

    def changes(self) -> list[str]:
        """The settings that differ from those of the preset, as "name=value"."""
        preset = asdict(PRESETS[self.preset])
        return [f"{name}={value}" for name, value in asdict(self).items() if value != preset[name]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for checkpoints and config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`. JSON's lists become tuples, missing settings their defaults.

        Raises:
            UserError: an unknown key, or a value of the wrong type.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"config: unknown keys {unknown}; known are {known}")
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise UserError(f"config: {error}") from None


_R50 = Config()
# In the paper's Table 1 the star stands for 300 proposals and random crops.
_STAR: dict[str, Any] = {"num_proposals": 300, "crop": True}
# Small enough to learn from random weights on a few CPU cores.
_SMALL: dict[str, Any] = {
    "backbone": "small",
    "pretrained_backbone": False,
    "hidden_dim": 64,
    "dynamic_dim": 16,
    "num_heads": 4,
    "ffn_dim": 256,
    "roi_size": 5,
    "schedule": "cosine",
    "warmup_steps": 100,
}

PRESETS: dict[str, Config] = {
    "r50-100": _R50,
    "r50-300": replace(_R50, preset="r50-300", **_STAR),
    "r101-100": replace(_R50, preset="r101-100", backbone="resnet101"),
    "r101-300": replace(_R50, preset="r101-300", backbone="resnet101", **_STAR),
    # Minutes on two CPU cores. At 96 pixels all boxes are small: they are pooled from p2, and
    # p3 … p5 reach them only through the FPN.
    "shapes": Config(
        preset="shapes",
        data="shapes-demo",
        min_sizes=(96,),
        max_size=96,
        workers=0,
        num_classes=3,
        num_proposals=20,
        num_stages=3,
        epochs=6,
        lr_at_16=1e-3,
        **_SMALL,
    ),
    # A few hundred photographs of your own: about an hour on two CPU cores.
    "small": Config(
        preset="small",
        min_sizes=(256, 288, 320, 352),
        max_size=480,
        test_size=320,
        color_jitter=0.2,
        num_proposals=50,
        canonical_box_px=112,
        epochs=110,
        batch_size=4,
        lr_at_16=2.8e-3,
        eval_every=10,
        **_SMALL,
    ),
}


def preset_from(argv: Sequence[str]) -> Config:
    """The preset that `--preset` names on a command line; by default the paper's R50.

    argparse ends the process, with exit code 2, if there is no preset of that name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--preset", default="r50-100", choices=PRESETS)
    return PRESETS[parser.parse_known_args(argv)[0].preset]

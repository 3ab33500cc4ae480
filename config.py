"""Everything that can be changed: one frozen dataclass, and the paper's recipes as presets of it.

The comment beside a field is its `--help` text: unit first, source last ("slides" are the authors' slides, "code" is
their repository where the slides are silent). Change a config with `dataclasses.replace(config, num_stages=3)`.

Deviations (ours | paper | authors' code | why)
    milestones at epochs 27 and 33 | 27 and 33 | 28.4 and 33.8 of 36.5 | the paper's words; all scale with --epochs
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_type_hints

from typeguard import TypeCheckError, check_type

from support.errors import UserError

PresetName = Literal["r50-100", "r50-300", "r101-100", "r101-300", "shapes"]


@dataclass(frozen=True)
class Config:
    """One run's settings; the defaults are the paper's R50, 100 proposals, on COCO."""

    # Where all other defaults come from: one of the paper's four models, or the small one for the Shapes pictures.
    preset: PresetName = "r50-100"

    # --- data: files in COCO's format; given flags replace the preset's own data ---
    data: Literal["coco", "shapes-demo", "shapes-crowded"] = (
        "coco"  # what to use where no --train-json is given
    )
    train_json: str | None = None  # annotations to train on (COCO format)
    train_images: str | None = None  # folder that the file names in --train-json start from
    val_json: str | None = (
        None  # annotations to evaluate on; without it a run on one's own data is not evaluated
    )
    val_images: str | None = None  # folder that the file names in --val-json start from
    shapes_train: int = 4000  # pictures in an epoch of Shapes
    shapes_val: int = 400  # held-out Shapes pictures
    # Pixels: the shortest side of a training image becomes one of these, at random (code).
    min_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_size: int = (
        1333  # pixels: but its longest side never more than this, in training and evaluation (code)
    )
    test_size: int = 800  # pixels: the shortest side in evaluation (code)
    crop: bool = (
        False  # random-crop augmentation on half of the images (paper: the starred rows of Table 1)
    )
    workers: int = 4  # processes that load images; 0 loads them in the main process

    # --- model ---
    backbone: Literal["resnet18", "resnet50", "resnet101", "small"] = (
        "resnet50"  # "small" is for Shapes
    )
    pretrained_backbone: bool = (
        True  # start ResNet from torchvision's ImageNet weights (slides: training details)
    )
    # The ResNet's batch norms, stem and layer1 keep their ImageNet values (code); turn off to train from scratch.
    freeze_backbone: bool = True
    num_classes: int = 80  # K; train.py takes it from the annotations
    num_proposals: int = 100  # N learned proposals (slides: training details)
    num_stages: int = 6  # S stages of the head (slides: training details)
    hidden_dim: int = 256  # C, channels of FPN levels and proposal features (code)
    dynamic_dim: int = (
        64  # channels between the two generated convolutions, C/4 (slides: dynamic interaction)
    )
    num_heads: int = 8  # heads of the self-attention among proposals (code)
    ffn_dim: int = 2048  # inner width of each stage's feed-forward network (code)
    dropout: float = 0.0  # share of activations dropped in attention and feed-forward (code)
    num_cls_layers: int = 1  # hidden layers before the class logits (code)
    num_reg_layers: int = 3  # hidden layers before the box deltas (code)
    roi_size: int = 7  # RoIAlign's output is roi_size x roi_size bins (code)
    canonical_box_px: int = (
        224  # sqrt(area) from which on boxes are pooled from p4; from half of it p3 … (code)
    )

    # --- matching and loss ---
    class_weight: float = 2.0  # lambda_cls, of the focal cost and loss (slides: prediction loss)
    l1_weight: float = 5.0  # lambda_L1 (slides: prediction loss)
    giou_weight: float = 2.0  # lambda_giou (slides: prediction loss)
    focal_alpha: float = 0.25  # weight of the positives in the focal loss (code)
    focal_gamma: float = 2.0  # how fast the focal loss forgets easy cases (code)
    prior_prob: float = (
        0.01  # score that the class biases start from: bias = -log((1 - p) / p) (code)
    )

    # --- training ---
    epochs: int = 36  # passes over the data (slides: training details)
    batch_size: int = 16  # images a step, over all processes (slides: training details)
    micro_batch: int | None = (
        None  # images at a time; gradients accumulate to --batch-size. By default all of them
    )
    lr: float | None = None  # learning rate; by default --lr-at-16 times batch size / 16
    lr_at_16: float = 2.5e-5  # learning rate for 16 images a step (code)
    weight_decay: float = 1e-4  # AdamW's, on every parameter (code)
    schedule: Literal["step", "cosine"] = (
        "step"  # divide by 10 at the milestones (code), or a half cosine to 0
    )
    milestones: tuple[float, ...] = (
        27 / 36,
        33 / 36,
    )  # shares of the run after which the rate is divided by 10
    warmup_steps: int = 1000  # steps of linear warm-up, at most a tenth of the run (code)
    warmup_factor: float = 0.01  # share of the rate that the warm-up starts from (code)
    clip_norm: float = 1.0  # largest norm of the whole model's gradient (code)
    amp: Literal["off", "bf16", "fp16"] = (
        "off"  # mixed precision; matching, losses and boxes stay in float32
    )
    compile: bool = (
        False  # torch.compile for backbone and stages: minutes once, then faster steps on a GPU
    )
    max_bad_steps: int = (
        20  # the run ends after so many steps in a row whose loss or gradient is not finite
    )
    checkpoint_minutes: float = (
        10.0  # minutes between two writes of last.pt; it is written after every epoch as well
    )
    flip: bool = True  # horizontal flips of half of the training images (code)
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    seed: int = 0  # of weights, data order and augmentation

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                check_type(value, hints[field.name])
            except TypeCheckError as error:
                raise UserError(f"config: {field.name}={value!r}: {error}") from None
            if isinstance(value, bool) and hints[field.name] is not bool:
                raise UserError(
                    f"config: {field.name}={value!r} should be a number, not a yes or no"
                )
        at_least_one = (
            *(
                "num_classes",
                "num_proposals",
                "num_stages",
                "hidden_dim",
                "dynamic_dim",
                "num_heads",
                "ffn_dim",
            ),
            *(
                "roi_size",
                "canonical_box_px",
                "epochs",
                "batch_size",
                "shapes_train",
                "shapes_val",
                "eval_every",
            ),
            *("max_size", "test_size", "max_bad_steps"),
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise UserError(f"config: {name}={getattr(self, name)} should be at least 1")
        for name in ("lr_at_16", "clip_norm", "lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"config: {name}={getattr(self, name)} should be a number greater than 0"
                )
        if not self.min_sizes or min(self.min_sizes) < 1:
            raise UserError(
                f"config: min_sizes={self.min_sizes} should hold at least one size of at least 1 pixel"
            )
        if not 0 < self.prior_prob < 1:
            raise UserError(f"config: prior_prob={self.prior_prob} should lie between 0 and 1")
        if self.hidden_dim % self.num_heads:
            raise UserError(
                f"config: hidden_dim={self.hidden_dim} is not a multiple of num_heads={self.num_heads}"
            )
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise UserError(
                f"config: micro_batch={self.micro_batch} should lie in 1 … batch_size={self.batch_size}"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.weight_decay < math.inf):
            raise UserError(
                "config: dropout should lie in 0 … 1 and weight_decay should not be negative"
            )
        if self.seed not in range(2**63) or min(self.num_cls_layers, self.num_reg_layers) < 0:
            raise UserError(
                "config: seed, num_cls_layers and num_reg_layers should not be negative, seed below 2^63"
            )
        if min(self.workers, self.warmup_steps, self.checkpoint_minutes) < 0:
            raise UserError(
                "config: workers, warmup_steps and checkpoint_minutes should not be negative"
            )

    @property
    def learning_rate(self) -> float:
        """The peak rate: `lr` where given, else linear in the batch size (Goyal et al., 2017)."""
        return self.lr_at_16 * self.batch_size / 16 if self.lr is None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for checkpoints and config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`, JSON's lists taken for tuples.

        Raises:
            UserError: a key that is no setting, or a value of the wrong type.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(
                f"config: unknown keys {unknown}; known are {[field.name for field in fields(cls)]}"
            )
        return cls(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
        )


_R50 = Config()
# "100 to 300 proposals, and random crop" is what the star stands for in Table 1.
_STAR: dict[str, Any] = {"num_proposals": 300, "crop": True}

PRESETS: dict[str, Config] = {
    "r50-100": _R50,
    "r50-300": replace(_R50, preset="r50-300", **_STAR),
    "r101-100": replace(_R50, preset="r101-100", backbone="resnet101"),
    "r101-300": replace(_R50, preset="r101-300", backbone="resnet101", **_STAR),
    # Small enough to learn the Shapes pictures from random weights in minutes on two CPU cores. At 96 pixels all boxes
    # are small: they are pooled from p2, and p3 … p5 reach them through the FPN alone.
    "shapes": Config(
        preset="shapes",
        data="shapes-demo",
        min_sizes=(96,),
        max_size=96,
        test_size=96,
        workers=0,
        backbone="small",
        pretrained_backbone=False,
        num_classes=3,
        num_proposals=20,
        num_stages=3,
        hidden_dim=64,
        dynamic_dim=16,
        num_heads=4,
        ffn_dim=256,
        roi_size=5,
        epochs=6,
        lr_at_16=1e-3,
        schedule="cosine",
        warmup_steps=100,
    ),
}

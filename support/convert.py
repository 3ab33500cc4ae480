"""Published weights to ours: `python -m tools.convert IN OUT` reads a checkpoint of the authors' code (detectron2
names), of MMDetection or of ours, and writes one of ours that holds no more than using it needs, `--half` in float16.

All describe the same network, so a conversion is a renaming; depth, N, K and S are read off names and shapes. The two
tables below are also the dictionary between three vocabularies.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from config import Config
from model import build_model
from support.errors import UserError

_STAGE = r"head\.head_series\.(\d+)\."
_AUTHORS = [
    (r"init_proposal_boxes\.weight", r"proposal_boxes"),
    (r"init_proposal_features\.weight", r"proposal_feats"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    (r"backbone\.bottom_up\.stem\.conv1\.(.+)", r"backbone.body.conv1.\1"),
    (
        r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.(.+)",
        r"backbone.body.layer{level}.\2.downsample.1.\3",
    ),
    (
        r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.(.+)",
        r"backbone.body.layer{level}.\2.downsample.0.\3",
    ),
    (
        r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)",
        r"backbone.body.layer{level}.\2.bn\3.\4",
    ),
    (
        r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.(.+)",
        r"backbone.body.layer{level}.\2.conv\3.\4",
    ),
    (r"backbone\.fpn_lateral(\d)\.(.+)", r"backbone.fpn.inner_blocks.{pyramid}.0.\2"),
    (r"backbone\.fpn_output(\d)\.(.+)", r"backbone.fpn.layer_blocks.{pyramid}.0.\2"),
    (_STAGE + r"self_attn\.(.+)", r"head.stages.\1.self_attn.\2"),
    (_STAGE + r"inst_interact\.dynamic_layer\.(.+)", r"head.stages.\1.interaction.linear1.\2"),
    (_STAGE + r"inst_interact\.out_layer\.(.+)", r"head.stages.\1.interaction.linear2.\2"),
    (_STAGE + r"inst_interact\.norm(\d)\.(.+)", r"head.stages.\1.interaction.norm\2.\3"),
    (_STAGE + r"linear1\.(.+)", r"head.stages.\1.ffn.0.\2"),
    (_STAGE + r"linear2\.(.+)", r"head.stages.\1.ffn.3.\2"),
    (_STAGE + r"norm1\.(.+)", r"head.stages.\1.attn_norm.\2"),
    (_STAGE + r"norm2\.(.+)", r"head.stages.\1.interaction_norm.\2"),
    (_STAGE + r"norm3\.(.+)", r"head.stages.\1.ffn_norm.\2"),
    (_STAGE + r"cls_module\.(.+)", r"head.stages.\1.cls_layers.\2"),
    (_STAGE + r"reg_module\.(.+)", r"head.stages.\1.reg_layers.\2"),
    (_STAGE + r"class_logits\.(.+)", r"head.stages.\1.cls_logits.\2"),
    (_STAGE + r"bboxes_delta\.(.+)", r"head.stages.\1.box_deltas.\2"),
]
_BOX_HEAD = r"roi_head\.bbox_head\.(\d+)\."
_CONV = _BOX_HEAD + r"instance_interactive_conv\."
_MMDET = [
    (r"rpn_head\.init_proposal_bboxes\.weight", r"proposal_boxes"),
    (r"rpn_head\.init_proposal_features\.weight", r"proposal_feats"),
    (r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (_BOX_HEAD + r"attention\.attn\.(.+)", r"head.stages.\1.self_attn.\2"),
    (_BOX_HEAD + r"attention_norm\.(.+)", r"head.stages.\1.attn_norm.\2"),
    (_CONV + r"dynamic_layer\.(.+)", r"head.stages.\1.interaction.linear1.\2"),
    (_CONV + r"norm_in\.(.+)", r"head.stages.\1.interaction.norm1.\2"),
    (_CONV + r"norm_out\.(.+)", r"head.stages.\1.interaction.norm2.\2"),
    (_CONV + r"fc_layer\.(.+)", r"head.stages.\1.interaction.linear2.\2"),
    (_CONV + r"fc_norm\.(.+)", r"head.stages.\1.interaction.norm3.\2"),
    (_BOX_HEAD + r"instance_interactive_conv_norm\.(.+)", r"head.stages.\1.interaction_norm.\2"),
    (_BOX_HEAD + r"ffn\.layers\.0\.0\.(.+)", r"head.stages.\1.ffn.0.\2"),
    (_BOX_HEAD + r"ffn\.layers\.1\.(.+)", r"head.stages.\1.ffn.3.\2"),
    (_BOX_HEAD + r"ffn_norm\.(.+)", r"head.stages.\1.ffn_norm.\2"),
    (_BOX_HEAD + r"cls_fcs\.(.+)", r"head.stages.\1.cls_layers.\2"),
    (_BOX_HEAD + r"reg_fcs\.(.+)", r"head.stages.\1.reg_layers.\2"),
    (_BOX_HEAD + r"fc_cls\.(.+)", r"head.stages.\1.cls_logits.\2"),
    (_BOX_HEAD + r"fc_reg\.(.+)", r"head.stages.\1.box_deltas.\2"),
]
_RULES = [(re.compile(pattern), ours) for pattern, ours in _AUTHORS + _MMDET]

# COCO's 80 classes by their category ids, which leave out ten of 1 … 90.
COCO_CLASSES = {
    **{
        1: "person",
        2: "bicycle",
        3: "car",
        4: "motorcycle",
        5: "airplane",
        6: "bus",
        7: "train",
        8: "truck",
    },
    **{
        9: "boat",
        10: "traffic light",
        11: "fire hydrant",
        13: "stop sign",
        14: "parking meter",
        15: "bench",
    },
    **{
        16: "bird",
        17: "cat",
        18: "dog",
        19: "horse",
        20: "sheep",
        21: "cow",
        22: "elephant",
        23: "bear",
    },
    **{
        24: "zebra",
        25: "giraffe",
        27: "backpack",
        28: "umbrella",
        31: "handbag",
        32: "tie",
        33: "suitcase",
    },
    **{
        34: "frisbee",
        35: "skis",
        36: "snowboard",
        37: "sports ball",
        38: "kite",
        39: "baseball bat",
    },
    **{40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle"},
    **{
        46: "wine glass",
        47: "cup",
        48: "fork",
        49: "knife",
        50: "spoon",
        51: "bowl",
        52: "banana",
        53: "apple",
    },
    **{
        54: "sandwich",
        55: "orange",
        56: "broccoli",
        57: "carrot",
        58: "hot dog",
        59: "pizza",
        60: "donut",
    },
    **{
        61: "cake",
        62: "chair",
        63: "couch",
        64: "potted plant",
        65: "bed",
        67: "dining table",
        70: "toilet",
    },
    **{
        72: "tv",
        73: "laptop",
        74: "mouse",
        75: "remote",
        76: "keyboard",
        77: "cell phone",
        78: "microwave",
    },
    **{
        79: "oven",
        80: "toaster",
        81: "sink",
        82: "refrigerator",
        84: "book",
        85: "clock",
        86: "vase",
    },
    **{87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush"},
}


def rename(key: str) -> str | None:
    """The authors' or MMDetection's name of a tensor -> ours, or None where neither table knows it."""
    for pattern, ours in _RULES:
        if match := pattern.fullmatch(key):
            # detectron2 counts what torchvision calls layer1 as res2, and p2's convolutions as number 2.
            number = int(match[1]) if match.re.groups and match[1].isdigit() else 0
            return match.expand(ours.format(level=number - 1, pyramid=number - 2))
    return None


def convert_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames a state dict of the authors' code or of MMDetection.

    Args:
        state_dict: name -> tensor, or a whole checkpoint that holds one under "model" or "state_dict".

    Returns:
        A state dict that `SparseRCNN.load_state_dict` takes strictly; the tensors are not copied.

    Raises:
        UserError: a name that neither vocabulary has, two names for the same tensor, or one that is missing.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    # Frozen norms do not count batches; DistributedDataParallel puts "module." before every name.
    keys = {
        key: key.removeprefix("module.")
        for key in state_dict
        if not key.endswith("num_batches_tracked")
    }
    renamed = {key: rename(plain) for key, plain in keys.items()}
    if unknown := [key for key, ours in renamed.items() if ours is None]:
        raise UserError(
            f"convert: {len(unknown)} names are neither the authors' nor MMDetection's Sparse R-CNN: "
            f"{', '.join(unknown[:10])}"
        )
    converted = {ours: state_dict[key] for key, ours in renamed.items() if ours is not None}
    if len(converted) < len(renamed):
        raise UserError("convert: the checkpoint holds the same tensor under two names")
    with torch.device("meta"):
        wanted = build_model(config_from(converted), pretrained_backbone=False).state_dict()
    if missing := sorted(set(wanted) - set(converted)):
        raise UserError(
            f"convert: {len(missing)} tensors are missing, in our names: {', '.join(missing[:10])}"
        )
    wrong = [
        f"{k} {list(converted[k].shape)}, not {list(v.shape)}"
        for k, v in wanted.items()
        if converted[k].shape != v.shape
    ]
    if wrong:
        raise UserError(
            f"convert: {len(wrong)} tensors have another shape: {', '.join(wrong[:10])}"
        )
    return converted


def config_from(state_dict: Mapping[str, Tensor]) -> Config:
    """The config of a model with these tensors (our names), read off the names and shapes.

    Raises:
        UserError: the tensors that tell are not there.
    """
    depths = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (2, 2, 2, 2): "resnet18"}
    blocks = tuple(
        len(
            {
                key.split(".")[3]
                for key in state_dict
                if key.startswith(f"backbone.body.layer{layer}.")
            }
        )
        for layer in (1, 2, 3, 4)
    )
    stages = {key.split(".")[2] for key in state_dict if key.startswith("head.stages.")}
    try:
        num_proposals, hidden_dim = state_dict["proposal_feats"].shape
        generated = len(state_dict["head.stages.0.interaction.linear1.weight"])
        flattened = state_dict["head.stages.0.interaction.linear2.weight"].shape[1]
        backbone, ffn_dim = depths[blocks], len(state_dict["head.stages.0.ffn.0.weight"])
        num_classes = len(state_dict["head.stages.0.cls_logits.weight"])
    except KeyError as error:
        raise UserError(
            f"convert: this is no Sparse R-CNN on a ResNet-18, 50 or 101: {error} was looked for"
        ) from None
    is_linear = [
        key
        for key in state_dict
        if re.fullmatch(r"head\.stages\.0\.(cls|reg)_layers\.\d*[0369]\.weight", key)
    ]
    config = Config(
        backbone=backbone,
        num_classes=num_classes,
        num_proposals=num_proposals,
        num_stages=len(stages),
        hidden_dim=hidden_dim,
        dynamic_dim=generated // (2 * hidden_dim),
        ffn_dim=ffn_dim,
        roi_size=round((flattened / hidden_dim) ** 0.5),
        num_cls_layers=sum(
            ".cls_layers." in key and state_dict[key].dim() == 2 for key in is_linear
        ),
        num_reg_layers=sum(
            ".reg_layers." in key and state_dict[key].dim() == 2 for key in is_linear
        ),
    )
    is_r101 = config.backbone == "resnet101"
    preset = f"{'r101' if is_r101 else 'r50'}-{300 if num_proposals == 300 else 100}"
    return replace(config, preset=preset, crop=num_proposals == 300)


def as_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of ours (see `checkpoint.py`) from what `convert_checkpoint` takes; 80 classes are COCO's.

    Raises:
        UserError: as `convert_checkpoint`.
    """
    model = convert_checkpoint(state_dict)
    config = config_from(model)
    is_coco = len(COCO_CLASSES) == config.num_classes
    return {
        "model": model,
        "config": config.to_dict(),
        "class_names": list(COCO_CLASSES.values())
        if is_coco
        else [f"class {i}" for i in range(config.num_classes)],
        "category_ids": list(COCO_CLASSES) if is_coco else list(range(config.num_classes)),
    }

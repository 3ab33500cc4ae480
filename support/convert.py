"""Names of tensors: the authors' (detectron2's) and MMDetection's -> ours.

All three describe the same network, so converting a checkpoint means renaming its tensors. Depth,
N, K and S are read off names and shapes. The two tables are also a dictionary between the three
vocabularies. `python -m tools.convert` is the command.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from support.errors import UserError

_BLOCK = r"backbone\.bottom_up\.res(\d)\.(\d+)\."
_OUR_BLOCK = r"backbone.body.layer{level}.\2."
_STAGE = r"head\.head_series\.(\d+)\."
_AUTHORS = [
    (r"init_proposal_boxes\.weight", r"proposal_boxes"),
    (r"init_proposal_features\.weight", r"proposal_feats"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    (r"backbone\.bottom_up\.stem\.conv1\.(.+)", r"backbone.body.conv1.\1"),
    (_BLOCK + r"shortcut\.norm\.(.+)", _OUR_BLOCK + r"downsample.1.\3"),
    (_BLOCK + r"shortcut\.(.+)", _OUR_BLOCK + r"downsample.0.\3"),
    (_BLOCK + r"conv(\d)\.norm\.(.+)", _OUR_BLOCK + r"bn\3.\4"),
    (_BLOCK + r"conv(\d)\.(.+)", _OUR_BLOCK + r"conv\3.\4"),
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

# COCO's 80 classes in the order of their category ids, which leave out ten of 1 … 90.
_OF_TORCHVISION = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_CLASSES: dict[int, str] = {
    number: name
    for number, name in enumerate(_OF_TORCHVISION)
    if name not in ("__background__", "N/A")
}


def rename(key: str) -> str | None:
    """The authors' or MMDetection's name of a tensor -> ours, or None if neither table has it."""
    for pattern, ours in _RULES:
        if match := pattern.fullmatch(key):
            # detectron2's res2 is torchvision's layer1, and its p2 has convolutions number 2.
            number = int(match[1]) if match.re.groups and match[1].isdigit() else 0
            return match.expand(ours.format(level=number - 1, pyramid=number - 2))
    return None


def _plain(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict out of its checkpoint, without what DDP and torch.compile put before names."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    prefixes = re.compile(r"^(module\.|_orig_mod\.)+")
    plain = {prefixes.sub("", str(key)): value for key, value in state_dict.items()}
    if len(plain) < len(state_dict):
        raise UserError("convert: the checkpoint holds the same tensor under two names")
    return plain


def _is_ours(state_dict: Mapping[str, Any]) -> bool:
    return "proposal_boxes" in state_dict


def convert_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Renames a state dict of the authors' code, of MMDetection, or of a training loop with ours.

    Args:
        state_dict: name -> tensor, or a whole checkpoint that holds one as "model" or "state_dict".

    Returns:
        The same tensors under our names; `SparseRCNN.load_state_dict` tells if one is missing.

    Raises:
        UserError: a name that no implementation has, or two names for one tensor.
    """
    state_dict = _plain(state_dict)
    if _is_ours(state_dict):
        return state_dict

    # Frozen norms do not count batches.
    counted = [key for key in state_dict if not key.endswith("num_batches_tracked")]
    renamed = {key: rename(key) for key in counted}
    if unknown := [key for key, ours in renamed.items() if ours is None]:
        raise UserError(
            f"convert: {len(unknown)} names are neither the authors' nor MMDetection's Sparse "
            f"R-CNN: {', '.join(map(str, unknown[:10]))}"
        )
    converted = {ours: state_dict[key] for key, ours in renamed.items() if ours is not None}
    if len(converted) < len(renamed):
        raise UserError("convert: the checkpoint holds the same tensor under two names")

    return converted


def settings_from(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `Config` of a model with these tensors (our names), read off their names and shapes.

    Raises:
        UserError: they are not of a Sparse R-CNN.
    """

    def count(pattern: str) -> int:
        """How many different values the group of the pattern has among the names."""
        return len({match[1] for key in state_dict if (match := re.match(pattern, key))})

    def count_linear(name: str) -> int:
        pattern = rf"head\.stages\.0\.{name}\.\d+\.weight"
        matrices = [key for key in state_dict if re.fullmatch(pattern, key)]
        return sum(state_dict[key].dim() == 2 for key in matrices)

    depths = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (2, 2, 2, 2): "resnet18"}
    depths[0, 0, 0, 0] = "small"
    blocks = tuple(count(rf"backbone\.body\.layer{layer}\.(\d+)") for layer in (1, 2, 3, 4))
    try:
        backbone = depths[blocks]
        num_proposals, hidden_dim = state_dict["proposal_feats"].shape
        generated = len(state_dict["head.stages.0.interaction.linear1.weight"])
        flattened = state_dict["head.stages.0.interaction.linear2.weight"].shape[1]
        ffn_dim = len(state_dict["head.stages.0.ffn.0.weight"])
        num_classes = len(state_dict["head.stages.0.cls_logits.weight"])
    except KeyError as error:
        raise UserError(
            f"convert: this is no Sparse R-CNN with a backbone of ours: {error} was not found"
        ) from None

    return {
        "backbone": backbone,
        "num_classes": num_classes,
        "num_proposals": num_proposals,
        "num_stages": count(r"head\.stages\.(\d+)"),
        "hidden_dim": hidden_dim,
        "dynamic_dim": generated // (2 * hidden_dim),
        "ffn_dim": ffn_dim,
        "roi_size": round((flattened / hidden_dim) ** 0.5),
        "num_cls_layers": count_linear("cls_layers"),
        "num_reg_layers": count_linear("reg_layers"),
    }


def as_checkpoint(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of ours (see support/checkpoint.py) from what `convert_checkpoint` takes.

    A model of 80 classes gets COCO's names and category ids, any other one gets numbers. Weights of
    the authors or of MMDetection are of one of the paper's presets. A state dict in our names may
    be of any: its config has no "preset", and only the settings that shapes tell.

    Raises:
        UserError: as `convert_checkpoint`.
    """
    model = convert_checkpoint(state_dict)
    settings = settings_from(model)
    num_classes = settings["num_classes"]
    if not _is_ours(_plain(state_dict)):
        depth = "r101" if settings["backbone"] == "resnet101" else "r50"
        has_300 = settings["num_proposals"] == 300
        settings |= {"preset": f"{depth}-{300 if has_300 else 100}", "crop": has_300}
    names = {label: f"class {label}" for label in range(num_classes)}
    if num_classes == len(COCO_CLASSES):
        names = COCO_CLASSES
    return {
        "model": model,
        "config": settings,
        "class_names": list(names.values()),
        "category_ids": list(names),
    }

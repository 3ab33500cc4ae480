#!/usr/bin/env bash
# transformers: a new Deformable DETR starts with a score of 0.5 for every class of every query, and
#           with box refinement all decoder layers share one class head.
#
# Expected: the start of the authors' code. A bias of -log(99) gives every class a score of 0.01, so
#           that the focal loss begins small; RT-DETR starts as low in the same library. With
#           `with_box_refine=True` each layer has heads of its own.
# Seen:     the bias is 0, and the class loss of the first step is over 100 times as large. The box
#           heads are separate, but the class heads are one tensor: after `load_state_dict` of
#           separate ones all layers have the last one's, and nothing is said. (`from_pretrained`
#           unties them.)
# Versions: transformers 5.24.0, torch 2.14.1 (CPU), Python 3.11. In 4.57.1 the bias is 0 as well,
#           but the class heads are separate.
# Hurt:     who trains it from random weights, or compares with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "transformers==5.24.0" "scipy==1.17.1"
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import torch
import transformers
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers import RTDetrConfig, RTDetrForObjectDetection

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
backbone = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic",
    out_features=["stage1", "stage2"],
)
config = DeformableDetrConfig(
    backbone_config=backbone, d_model=32, num_queries=50, num_labels=80, num_feature_levels=2,
    encoder_layers=1, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
    with_box_refine=True,
)
model = DeformableDetrForObjectDetection(config)
image = torch.rand(1, 3, 64, 64)
labels = [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "class_labels": torch.tensor([3])}]


def class_loss():
    torch.manual_seed(0)
    return model(image, labels=labels).loss_dict["loss_ce"].item()


start = model.class_embed[-1].bias.mean().item()
loss = class_loss()
are_shared = model.class_embed[0].weight is model.class_embed[1].weight
are_boxes_shared = model.bbox_embed[0].layers[-1].weight is model.bbox_embed[1].layers[-1].weight

separate = {name: value.clone() for name, value in model.state_dict().items()}
for layer in range(3):
    separate[f"class_embed.{layer}.bias"].fill_(layer + 1)
model.load_state_dict(separate)
loaded = [head.bias.mean().item() for head in model.class_embed]
with torch.no_grad():
    for head in model.class_embed:
        head.bias.fill_(-math.log(99))
print(f"bias of the class head: {start:g} (authors: {-math.log(99):.3f})")
print(f"class loss of the first step: {loss:.1f}, with the authors' bias {class_loss():.3f}")
print("layers share the class head:", are_shared, "- the box head:", are_boxes_shared)
print("biases 1, 2, 3 of three layers, loaded by load_state_dict:", loaded)

rt_detr = RTDetrForObjectDetection(RTDetrConfig(num_labels=80))
rt_start = rt_detr.model.decoder.class_embed[-1].bias.mean().item()
print(f"RT-DETR of the same library starts with {rt_start:.3f}")
is_as_described = (
    start == 0 and loss > 100 * class_loss() and are_shared and not are_boxes_shared
    and loaded == [3, 3, 3] and rt_start < -4
)
sys.exit(not is_as_described)
PYTHON

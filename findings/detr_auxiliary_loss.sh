#!/usr/bin/env bash
# transformers: DETR's `auxiliary_loss=True` changes what the network computes, without any loss too.
#
# Expected: the setting adds losses of the earlier decoder layers in training, as its help says. The
#           same weights give the same detections with it and without.
# Seen:     with it, the decoder's last LayerNorm is applied between all layers. (The authors' code
#           normalises a copy for the losses, and hands on what was not normalised.) So the same
#           weights give other logits and boxes, and nothing is said.
# Versions: transformers 5.24.0, torch 2.14.1 (CPU), Python 3.11.
# Hurt:     who fine-tunes published weights, which were trained without, and turns the losses on as
#           DETR's paper has them; and who loads a model trained with them into a default config.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import torch
import transformers
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)


def build(auxiliary_loss):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    config = DetrConfig(
        backbone_config=backbone, d_model=32, num_queries=4, num_labels=3, decoder_layers=3,
        encoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        auxiliary_loss=auxiliary_loss,
    )
    return DetrForObjectDetection(config).eval()


image = torch.rand(1, 3, 64, 64)
without, same, with_losses = build(False), build(False), build(True)
with torch.no_grad():
    for parameter in without.parameters():  # as after some training: norms are no longer 1 and 0
        parameter.add_(0.3 * torch.randn_like(parameter))
    same.load_state_dict(without.state_dict())
    with_losses.load_state_dict(without.state_dict())
    first, again, other = (model(image).logits for model in (without, same, with_losses))
print("logits of the first query, auxiliary_loss=False:", first[0, 0].tolist())
print("the same weights,          auxiliary_loss=True: ", other[0, 0].tolist())
changed = torch.allclose(first, again) and not torch.allclose(first, other, atol=0.1)
sys.exit(not changed)
PYTHON

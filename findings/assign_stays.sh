#!/usr/bin/env bash
# torch: `load_state_dict(..., assign=True)` marks the state dict, and the mark is saved with it.
#
# Expected: assign=True is an argument of one call. It does not change the state dict, nor how anybody
#           loads it afterwards.
# Seen:     it is written into `state_dict._metadata`, which torch.save keeps. Whoever loads that file
#           later, with a plain load_state_dict, gets the file's tensors assigned instead of copied: a
#           float32 model becomes float16 without a word, and shares its tensors with the state dict.
# Versions: torch 2.14.1 (CPU), Python 3.11.
# Hurt:     tools that check a checkpoint on the meta device with assign=True, halve it and save it:
#           the model that loads their file has another dtype. A plain copy, dict(state_dict), has no
#           metadata and is safe.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" numpy
"$folder/venv/bin/python" - "$folder/halved.pt" <<'PYTHON'
import sys
import torch
from torch import nn

print("torch", torch.__version__)
state_dict = nn.Linear(2, 2).state_dict()
with torch.device("meta"):
    nn.Linear(2, 2).load_state_dict(state_dict, assign=True)  # to see whether it fits
for key in state_dict:
    state_dict[key] = state_dict[key].half()
torch.save(state_dict, sys.argv[1])

model = nn.Linear(2, 2)
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))  # no assign here
other = nn.Linear(2, 2)
other.load_state_dict(dict(torch.load(sys.argv[1], weights_only=True)))
print("saved after assign=True, loaded without it:", model.weight.dtype)
print("the same file, as a plain dict:            ", other.weight.dtype)
sys.exit(not (model.weight.dtype == torch.float16 and other.weight.dtype == torch.float32))
PYTHON

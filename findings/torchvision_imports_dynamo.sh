#!/usr/bin/env bash
# torchvision: `import torchvision` loads TorchDynamo, sympy and FSDP, and takes twice as long as torch.
#
# Expected: an import without torch.compile does not load its compiler. `import torch` leaves it out,
#           and `lazy_compile` in torchvision/ops/roi_align.py is there for nothing else: "This avoids
#           eagerly importing dynamo".
# Seen:     seven lines into the same file, `from torch._dynamo.utils import is_compile_supported` runs
#           torch/_dynamo/__init__.py, which imports all of it: about a thousand more modules, and a
#           second or more of CPU time before the first image is read.
# Versions: torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Hurt:     commands that look at a few images, serverless functions, loader workers that are spawned
#           (each imports it again), and who thought that detection models cost the second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
cd "$folder"
venv/bin/python -c "import torch, torchvision" # once, so that the bytecode is there
venv/bin/python - <<'PYTHON'
import sys
import time

LOOKED_FOR = ("torch._dynamo", "torch.distributed.fsdp", "sympy")


def loaded(package):
    start, before = time.process_time(), len(sys.modules)
    __import__(package)
    found = [name for name in LOOKED_FOR if name in sys.modules]
    seconds, modules = time.process_time() - start, len(sys.modules) - before
    print(f"import {package}: {modules} modules, {seconds:.1f} s of CPU; of these {found}")
    return found


after_torch, after_torchvision = loaded("torch"), loaded("torchvision")
print("torch", sys.modules["torch"].__version__, "torchvision", sys.modules["torchvision"].__version__)
sys.exit(bool(after_torch) or after_torchvision != list(LOOKED_FOR))
PYTHON

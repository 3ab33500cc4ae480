#!/usr/bin/env bash
# onnxruntime: the step before quantisation fails on files with ReduceProd or ReduceMax of opset 18.
#
# Expected: `quant_pre_process`, which the manual advises before static quantisation, takes a file
#           that onnx's checker and strict shape inference accept and that onnxruntime itself runs.
# Seen:     since opset 18 the axes of a reduction are an input. Its own shape inference looks for
#           the old attribute (ReduceProd) or drops the input (ReduceMax), and the shape is lost. The
#           next Div, Mul or MatMul raises "object of type 'NoneType' has no len()", without a node's
#           name. ReduceSum and ReduceMean work. `skip_symbolic_shape=True` gets around it.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11.
# Hurt:     who quantises an exported detector: torch.onnx writes `prod(dim)` and `amax(dim)` like
#           this, such as for the areas of boxes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.4.6" "sympy==1.14.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.shape_inference import quant_pre_process

print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
x = np.array([[2, 3], [4, 5], [6, 7]], np.float32)
results = {}
for reduction in ("ReduceProd", "ReduceMax", "ReduceSum", "ReduceMean"):
    nodes = [
        helper.make_node(reduction, ["x", "axes"], ["reduced"], keepdims=0),
        helper.make_node("Div", ["reduced", "two"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([-1]), "axes"),
        numpy_helper.from_array(np.float32(2), "two"),
    ]
    graph = helper.make_graph(
        nodes,
        "areas",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
        constants,
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    [y] = session.run(None, {"x": x})
    onnx.save(model, "model.onnx")
    try:
        quant_pre_process("model.onnx", "prepared.onnx")
        results[reduction] = "works"
    except TypeError as error:
        results[reduction] = f"TypeError: {error}"
    quant_pre_process("model.onnx", "prepared.onnx", skip_symbolic_shape=True)
    print(f"{reduction}: runs and gives {y.tolist()}; quant_pre_process: {results[reduction]}")
fails = "TypeError: object of type 'NoneType' has no len()"
expected = {"ReduceProd": fails, "ReduceMax": fails, "ReduceSum": "works", "ReduceMean": "works"}
sys.exit(results != expected)
PYTHON

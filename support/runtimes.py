"""Runtimes that take the files of `python -m tools.export`, each behind one function.

In:  the path of a file.
Out: a function from an image (3, H, W) uint8 RGB to its boxes (n, 4), scores (n,) and labels (n,),
     as NumPy arrays.

Each imports its package only when it is called, and uses one thread if it can be told to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from support.onnx_detector import INPUT, OUTPUTS

Detect = Callable[[np.ndarray], Sequence[np.ndarray]]


def onnxruntime(path: Path) -> Detect:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(list(OUTPUTS), {INPUT: image})


def openvino(path: Path, **hints: str) -> Detect:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, **hints}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda image: list(compiled([image]).values())


def opencv(path: Path) -> Detect:
    import cv2

    cv2.setNumThreads(1)
    net = cv2.dnn.readNetFromONNX(str(path))

    def detect(image: np.ndarray) -> Sequence[np.ndarray]:
        net.setInput(image, INPUT)
        return net.forward(list(OUTPUTS))

    return detect


def iree(path: Path) -> Detect:
    import iree.runtime

    module = iree.runtime.load_vm_flatbuffer_file(str(path), driver="local-sync")
    return lambda image: [output.to_host() for output in module.main_graph(image)]


def litert(path: Path) -> Detect:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()

    def detect(image: np.ndarray) -> Sequence[np.ndarray]:
        interpreter.set_tensor(given["index"], image)
        interpreter.invoke()
        return [interpreter.get_tensor(each["index"]) for each in interpreter.get_output_details()]

    return detect


def executorch(path: Path) -> Detect:
    import executorch.runtime

    method = executorch.runtime.Runtime.get().load_program(path).load_method("forward")
    return lambda image: [output.numpy() for output in method.execute([torch.from_numpy(image)])]


# As it comes, OpenVINO computes in bfloat16 where the processor has it.
float32_openvino = partial(openvino, INFERENCE_PRECISION_HINT="f32")
# Which files each takes, its package as in requirements-devices.txt, and its function.
RUNTIMES = {
    "onnxruntime": (".onnx", "onnxruntime", onnxruntime),
    "OpenVINO, float32": (".onnx", "openvino", float32_openvino),
    "OpenVINO as it comes": (".onnx", "openvino", openvino),
    "OpenCV": (".onnx", "opencv-python-headless", opencv),
    "LiteRT": (".tflite", "ai-edge-litert", litert),
    "ExecuTorch": (".pte", "executorch", executorch),
    "IREE": (".vmfb", "iree-base-runtime", iree),
}

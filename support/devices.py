"""Devices, threads and precisions: what runs where, and what is worth it there."""

import os
import time
import warnings

import torch

from config import Config
from support.errors import UserError, first_line

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Multiply-adds per pixel of an image, in thousands: backbone and FPN.
KILO_MACS_PER_PIXEL = {"small": 9, "resnet18": 87, "resnet50": 138, "resnet101": 212}
# Below this many billions per image, threads wait for one another longer than they help.
GIGA_MACS_FOR_THREADS = 5.0


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA if there is any, else Apple's MPS, else the CPU.

    Raises:
        UserError: torch does not know the device, or the machine does not have it.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}; try auto or cpu") from None
    return device


def choose_threads(device: torch.device, config: Config, size_px: int) -> None:
    """Runs small models on one thread per process; everything else keeps all cores.

    The threads of a parallel loop wait for one another by spinning. With the loops of a small model
    that gains little on a quiet machine, and beside two busy programs a training step took 27 times
    as long, because a sibling that waits for a core stops all of them. Several cores are better
    used by several processes (torchrun). The measurements are in experiments/README.md.

    OMP_NUM_THREADS, which torchrun sets too, is respected. Commands call this; a library call does
    not, because the setting is the whole process's.

    Args:
        device: nothing is done unless it is the CPU.
        config: of the model.
        size_px: the shortest side of the images.
    """
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    pixels = size_px * min(config.max_size, 4 * size_px / 3)
    giga_macs = pixels * KILO_MACS_PER_PIXEL[config.backbone] / 1e6
    if giga_macs < GIGA_MACS_FOR_THREADS:
        torch.set_num_threads(1)


def check_compiler(device: torch.device) -> None:
    """Tries torch.compile on one addition, before minutes are spent on a model.

    Raises:
        UserError: it does not work here, for example because there is no C++ compiler.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # the compilers' errors have no base class of their own
        raise UserError(
            f"--compile: torch.compile does not work here ({first_line(error)}); install a C++ "
            "compiler such as g++, or leave out --compile"
        ) from None


def seconds_per_product(size: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """The best time of a matrix product (size, size) × (size, size) on the CPU."""
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)


def bf16_speedup() -> float:
    """How many times faster the CPU multiplies matrices in bfloat16 than in float32.

    Measured, because the processor's flags do not tell: some have the instructions and are still
    slower with them. Without them PyTorch may run a reference kernel that is hundreds of times
    slower, so a small product is tried first.
    """
    ratio = 1.0
    for size in (128, 1024):
        ratio = seconds_per_product(size, torch.float32) / seconds_per_product(size, torch.bfloat16)
        if ratio < 0.2:
            break
    return ratio


def warn_of_slow_bf16(device: torch.device, amp: str) -> None:
    """Warns of `--amp bf16` on a CPU that gains nothing by it, and says what to expect."""
    if device.type != "cpu" or amp != "bf16":
        return
    ratio = bf16_speedup()
    if ratio < 1.1:
        expected = f"{1 / ratio:.1f} times slower" if ratio < 0.9 else "no faster"
        warnings.warn(
            f"--amp bf16: this processor multiplies matrices {expected} in bfloat16 than in "
            "float32; --amp off is the better choice here",
            stacklevel=2,
        )

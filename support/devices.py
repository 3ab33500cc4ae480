"""Devices, threads and precisions: what runs where, and what is worth it there."""

import os
import warnings

import torch

from support.errors import UserError, first_line

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def describe(device: torch.device) -> str:
    """What tables call a device: a GPU's own name, or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def choose_threads(device: torch.device, backbone: str, amp: str = "off") -> None:
    """Runs the small backbone on one CPU thread, and warns if the CPU only emulates bfloat16.

    The loops of the small backbone are so short that threads mostly wait for one another: beside
    two busy programs, a training step took 27 times as long with two threads. Several cores are
    better used by several processes (torchrun). OMP_NUM_THREADS, which torchrun sets too, is
    respected.

    Args:
        device: nothing is done unless it is the CPU.
        backbone: as in `Config`.
        amp: as in `Config`.
    """
    if device.type != "cpu":
        return
    if backbone == "small" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = [is_there for name, is_there in features.items() if "bf16" in name]
    if amp == "bf16" and has_bf16 and not any(has_bf16):
        warnings.warn(
            "--amp bf16: this processor has no bfloat16 arithmetic and emulates it; --amp off is "
            "usually faster here",
            stacklevel=2,
        )

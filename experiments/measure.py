"""What the benchmarks share: taking turns, counting operations, tables.

The variants of a benchmark take turns, so that whatever else the machine is doing slows all of them
alike. Figures are medians over the repeats.
"""

import os
import platform
import re
import statistics
import string
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support.loader import usable_workers

Row = dict[str, Any]  # one line of a table; a figure that does not exist is None or left out
Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator to finish; without it, one would time the launch of the work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def take_turns(
    variants: Mapping[Any, Call], repeats: int, device: torch.device
) -> dict[Any, list[float]]:
    """Runs every variant once per turn; returns its seconds in each turn after the first."""
    seconds: dict[Any, list[float]] = {key: [] for key in variants}
    for _ in range(1 + repeats):
        for key, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[key].append(time.perf_counter() - start)
    return {key: found[1:] for key, found in seconds.items()}


def times_ms(seconds: Sequence[float]) -> Row:
    """Median, minimum and maximum in milliseconds."""
    values = [1000 * value for value in seconds]
    return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}


def count_flops(run: Call) -> int:
    """Floating-point operations of convolutions and matrix products; a multiply-add is two.

    Norms, RoIAlign and element-wise work are not counted. The counter does not know the fused
    attention kernels, so attention uses plain products meanwhile.
    """
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)
    return counter.get_total_flops()


def format_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps each heading to a format, in which a row's names stand."""

    def cell(template: str, row: Row) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        return "–" if any(row.get(name) is None for name in names) else template.format(**row)

    # Numbers are the columns with a format; they are aligned to the right.
    rules = ["---:" if ":" in template else "---" for template in columns.values()]
    lines = [[cell(template, row) for template in columns.values()] for row in rows]
    head = f"| {' | '.join(columns)} |\n|{'|'.join(rules)}|"
    return "\n".join([head, *(f"| {' | '.join(line)} |" for line in lines)])


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: the device, the cores this process may use, and the versions."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux only
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name if device.type == "cpu" else f"{name} ({device.type})",
        "cores": usable_workers(os.cpu_count() or 1),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }

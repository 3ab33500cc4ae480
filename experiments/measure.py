"""What the commands of `experiments.benchmark` share: measuring in turns, the Markdown table, and the line of JSON.

The variants of a command take turns, on the same input: what else the machine does in the meantime slows them alike.
Figures are medians of the repeats.
"""

import gc
import json
import os
import platform
import re
import string
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torchvision

from support.loader import usable_workers

Row = dict[str, Any]  # one line of a table; a figure that does not exist is None or left out
Key = TypeVar("Key", bound=Hashable)
CPU = torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was told to: without it one would time the telling."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def take_turns(
    variants: Mapping[Key, Callable[[], int]],
    repeats: int,
    warmup: int = 1,
    device: torch.device = CPU,
) -> dict[Key, list[tuple[int, float]]]:
    """Runs every variant once in each turn; gives what it returned and its seconds, the warm-up turns left out."""
    turns: dict[Key, list[tuple[int, float]]] = {key: [] for key in variants}
    for _ in range(warmup + repeats):
        for key, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            result = run()
            synchronize(device)
            turns[key].append((result, time.perf_counter() - start))
    return {key: found[warmup:] for key, found in turns.items()}


class PeakMemory:
    """`with PeakMemory(device) as memory: …`; then `memory.megabytes` is the most memory that was in use in it.

    CUDA's without what was in use before; on a CPU under Linux all of the process's; None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device, self.megabytes, self._before = device, None, 0
        self.is_cuda = device.type == "cuda"
        self.is_counted = self.is_cuda or (
            device.type == "cpu" and Path("/proc/self/clear_refs").exists()
        )

    def __enter__(self) -> "PeakMemory":
        gc.collect()  # earlier models, which their hooks keep in circles
        synchronize(self.device)
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.is_counted:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man proc)
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        if self.is_cuda:
            self.megabytes = (torch.cuda.max_memory_allocated(self.device) - self._before) / 1e6
        elif self.is_counted:
            peak = re.search(
                r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
            )
            self.megabytes = int(peak[1]) * 1024 / 1e6


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations a second of a large square matrix product, the best of some: what the machine can do.

    A multiply-add counts as two operations, as in `FlopCounterMode`.
    """
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    turns = take_turns({"product": lambda: len(a @ b)}, repeats, device=device)
    return 2 * size**3 / min(seconds for _, seconds in turns["product"])


def format_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Markdown. `columns` maps a heading to a format of the row's names; a dash stands where a value is missing."""

    def cell(template: str, row: Row) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        return "–" if any(row.get(name) is None for name in names) else template.format(**row)

    rules = [
        "---:" if ":" in template else "---" for template in columns.values()
    ]  # numbers have a format
    lines = [[cell(template, row) for template in columns.values()] for row in rows]
    return "\n".join(
        [
            f"| {' | '.join(columns)} |",
            f"|{'|'.join(rules)}|",
            *(f"| {' | '.join(x)} |" for x in lines),
        ]
    )


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What a figure depends on: device, cores that this process may use, versions."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux alone has it
    name = re.search(
        r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE
    )
    processor = name[1] if name else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else processor + (f", {device.type}" if device.type != "cpu" else ""),
        "cores": usable_workers(os.cpu_count() or 1),
        "Python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, torchvision)},
    }


def report(
    output: Path,
    command: str,
    used: dict[str, Any],
    rows: list[Row],
    columns: Mapping[str, str],
    device: torch.device = CPU,
    **figures: float,
) -> None:
    """Prints what was measured, and adds it as a line to the file of all measurements.

    Args:
        output: the file; its folder is made where it is missing.
        command: the word after `experiments.benchmark`.
        used: what else the figures depend on, such as the resolution.
        rows, columns: see `format_table`.
        device: what was measured.
        figures: single numbers, printed below the table.
    """
    conditions = {**machine(device), **used}
    print(
        ", ".join(f"{name} {value}" for name, value in conditions.items())
        + f"\n\n{format_table(rows, columns)}\n"
    )
    line = {
        "command": command,
        "time": time.strftime("%FT%TZ", time.gmtime()),
        **conditions,
        "rows": rows,
        **figures,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(
        *(f"{name}: {value:.2f}" for name, value in figures.items()),
        f"written: a line of {output}",
        sep="\n",
    )

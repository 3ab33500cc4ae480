"""Threads and precisions are chosen by what is worth it, and the user's own choice is respected."""

import warnings
from dataclasses import replace

import pytest
import torch

from config import PRESETS
from support import devices
from support.devices import choose_threads, pick_device, warn_of_slow_bf16
from support.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that were set."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


@pytest.mark.parametrize(
    ("preset", "size_px", "expected"),
    [
        ("shapes", 96, [1]),  # make demo
        ("shapes", 320, [1]),  # assets/blood.pt
        ("r50-100", 64, [1]),  # a large model on a tiny image
        ("r50-100", 800, []),  # the paper's size keeps all cores
        ("r101-300", 480, []),
    ],
)
def test_small_models_run_on_one_thread(
    preset: str, size_px: int, expected: list[int], threads: list[int]
) -> None:
    choose_threads(CPU, replace(PRESETS[preset], max_size=1333), size_px)
    assert threads == expected


def test_the_users_threads_and_other_devices_are_left_alone(
    threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_threads(torch.device("cuda"), PRESETS["shapes"], 96)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # torchrun sets it too
    choose_threads(CPU, PRESETS["shapes"], 96)
    assert threads == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(3e-3, "3.0 times slower"), (1e-3, "no faster"), (0.5e-3, None)]
)
def test_bf16_that_gains_nothing_is_a_warning(
    seconds: float, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By measurement: some processors have the instructions and are slower with them."""
    times = {torch.float32: 1e-3, torch.bfloat16: seconds}
    monkeypatch.setattr(devices, "seconds_per_product", lambda size, dtype: times[dtype])
    if words is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_slow_bf16(CPU, "bf16")
    else:
        with pytest.warns(UserWarning, match=f"--amp bf16: .*{words}.*--amp off"):
            warn_of_slow_bf16(CPU, "bf16")


def test_a_reference_kernel_is_noticed_by_a_small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large product would take minutes on a processor without bfloat16."""
    sizes = []

    def measure(size: int, dtype: torch.dtype) -> float:
        sizes.append(size)
        return 1.0 if dtype == torch.bfloat16 else 1e-3

    monkeypatch.setattr(devices, "seconds_per_product", measure)
    with pytest.warns(UserWarning, match="1000.0 times slower"):
        warn_of_slow_bf16(CPU, "bf16")
    assert max(sizes) <= 128


def test_a_product_is_timed_for_real() -> None:
    assert 0 < devices.seconds_per_product(64, torch.float32) < 1


def test_precisions_and_devices_without_bf16_are_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "seconds_per_product", lambda *_: pytest.fail("measured"))
    for amp in ("off", "fp16"):
        warn_of_slow_bf16(CPU, amp)
    warn_of_slow_bf16(torch.device("cuda"), "bf16")


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="--device warp: .*try auto or cpu"):
        pick_device("warp")


def test_without_a_compiler_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("No working C++ compiler\nand 120 more lines")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(UserError, match=r"--compile: .*No working C\+\+ compiler\).*leave out"):
        devices.check_compiler(CPU)

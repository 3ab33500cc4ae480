"""Threads and precisions are chosen by what is worth it, and the user's own choice is respected."""

import warnings

import pytest
import torch

from support.devices import choose_threads, pick_device
from support.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "backbone", "users", "expected"),
    [
        (CPU, "small", None, [1]),  # make demo
        (CPU, "resnet50", None, []),  # the paper's models keep all cores
        (CPU, "small", "2", []),  # torchrun sets OMP_NUM_THREADS too
        (GPU, "small", None, []),
    ],
)
def test_the_small_backbone_runs_on_one_thread(
    device: torch.device, backbone: str, users: str | None, expected: list, monkeypatch
) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if users is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    choose_threads(device, backbone)
    assert numbers == expected


@pytest.mark.parametrize(
    ("device", "amp", "features", "is_warned"),
    [
        (CPU, "bf16", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        (CPU, "bf16", {"avx2": True, "avx512_bf16": True, "amx_bf16": False}, False),
        (CPU, "bf16", {}, False),  # not known
        (CPU, "fp16", {"avx512_bf16": False}, False),
        (GPU, "bf16", {"avx512_bf16": False}, False),
    ],
)
def test_bf16_that_is_emulated_is_a_warning(
    device: torch.device, amp: str, features: dict, is_warned: bool, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        choose_threads(device, "resnet50", amp)
    assert [str(w.message)[:10] for w in said] == (["--amp bf16"] if is_warned else [])


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu") == CPU and pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("warp", "cuda:99"):
        with pytest.raises(UserError, match=rf"^--device {name}: .*try auto or cpu"):
            pick_device(name)

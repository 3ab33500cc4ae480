"""Threads and precisions are chosen by what is worth it, and the user's own choice is respected."""

import pytest
import torch

from support.devices import choose_threads, pick_device
from support.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_small_backbone_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose_threads(CPU, "resnet50")  # the paper's models keep all cores
    choose_threads(GPU, "small")
    assert chosen == []
    choose_threads(CPU, "small")
    assert chosen == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # torchrun sets it too
    choose_threads(CPU, "small")
    assert chosen == [1]


@pytest.mark.parametrize(
    ("amp", "features", "words"),
    [
        ("bf16", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, ["--amp bf16"]),
        ("bf16", {"avx2": True, "avx512_bf16": True, "amx_bf16": False}, []),
        ("bf16", {}, []),  # not known
        ("fp16", {"avx512_bf16": False}, []),
    ],
)
def test_bf16_that_is_emulated_is_a_warning(amp, features, words, monkeypatch, recwarn) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    choose_threads(CPU, "resnet50", amp)
    assert [str(warning.message)[:10] for warning in recwarn] == words


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu") == CPU and pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("warp", "cuda:99"):
        with pytest.raises(UserError, match=rf"^--device {name}: .*try auto or cpu"):
            pick_device(name)

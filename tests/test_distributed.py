"""The same recipe with any number of processes, seen with a real torchrun."""

import signal

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, AlmostRight, python, torchrun
from two_processes import gradients

from evaluate import evaluate
from shapes import ShapesDataset
from support.distributed import join_world
from support.errors import UserError
from support.loader import GroupedBatches, Reseeded, make_loader
from support.signals import SAME_REQUEST_S, StopSignal

SIZES = np.array([[40, 60]] * 13 + [[60, 40]] * 10)  # 13 wide, 10 tall


def epoch_of(
    seed: int, epoch: int, rank: int = 0, size: int = 1, first: int = 0
) -> list[list[tuple[int, int]]]:
    batches = GroupedBatches(SIZES, 4, seed, rank, size)
    batches.seek(epoch, first)
    return list(batches)


def test_batches_are_of_one_orientation_and_cover_the_data_once() -> None:
    batches = [[index for index, _ in batch] for batch in epoch_of(0, 0)]
    assert len(batches) == len(SIZES) // 4 == 5 and all(len(batch) == 4 for batch in batches)
    flat = sum(batches, [])
    assert len(set(flat)) == len(flat) == 20
    mixed = [batch for batch in batches if len({index < 13 for index in batch}) == 2]
    assert len(mixed) <= 1  # what is over in both groups


def test_order_and_augmentation_seeds_depend_on_seed_and_epoch_alone() -> None:
    assert epoch_of(3, 1) == epoch_of(3, 1)
    assert epoch_of(3, 1) != epoch_of(3, 2) and epoch_of(3, 1) != epoch_of(4, 1)
    seeds = [seed for epoch in range(3) for batch in epoch_of(3, epoch) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)
    assert epoch_of(3, 1, first=2) == epoch_of(3, 1)[2:]


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_batches_of_one(size: int) -> None:
    shares = [epoch_of(3, 1, rank, size) for rank in range(size)]
    for step, whole in enumerate(epoch_of(3, 1)):
        assert sorted(sum((share[step] for share in shares), [])) == sorted(whole)
        assert {len(share[step]) for share in shares} == {4 // size}


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="--batch-size 4 .* 3 processes"):
        GroupedBatches(SIZES, 4, 0, 0, 3)
    with pytest.raises(UserError, match="23 images do not fill one batch of 32"):
        GroupedBatches(SIZES, 32, 0, 0, 2)
    (only,) = GroupedBatches(SIZES, 32, 0)
    assert sorted(index for index, _ in only) == list(range(23))


class Drawing(torch.utils.data.Dataset):
    """Images whose pixel is random, as the transforms draw."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        return torch.rand(1), {"image_id": index}


def test_augmentation_is_the_same_in_any_worker_and_leaves_no_trace() -> None:
    keys = [[(0, 11), (1, 12)], [(2, 13), (1, 14)]]

    def draws(workers: int) -> list[float]:
        loader = make_loader(Drawing(), keys, workers, reseeded=True)
        return [image.item() for images, _ in loader for image in images]

    state = torch.get_rng_state()
    here = draws(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert here == draws(2) and len(set(here)) == 4
    assert Reseeded(Drawing())[1, 12][0].item() == here[1]


def test_a_signal_is_noted_and_another_one_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    clock = [100.0]
    monkeypatch.setattr("support.signals.time.monotonic", lambda: clock[0])
    for number in numbers:
        with StopSignal() as stop:
            assert stop.number is None
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # at once: torchrun passes the same request on
            assert stop.number == number
            clock[0] += SAME_REQUEST_S + 0.1
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(number)
            assert ended.value.code == 128 + number
        assert {number: signal.getsignal(number) for number in numbers} == before


def test_a_closed_terminal_stays_ignored_with_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number is None


def test_variables_that_a_launcher_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for rank, problem in (("0", "WORLD_SIZE"), ("abc", "abc")):
        monkeypatch.setenv("RANK", rank)
        words = f"RANK is set.*{problem}.*start with torchrun, unset RANK"
        with pytest.raises(UserError, match=words), join_world("cpu"):
            pass


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two processes found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(str(ROOT / "tests/two_processes.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_sum_and_gather(two: list[dict]) -> None:
    for result in two:
        assert result["sum"] == [3, 1] and result["gather"] == [("rank", 0), ("rank", 1)]
    assert CPU.sum(2, 0.5) == [2, 0.5] and CPU.gather("x") == ["x"]


def test_the_gradient_is_the_same_however_the_batch_is_divided(two: list[dict]) -> None:
    """1 × 4 images, 1 × 2 × 2 accumulated, 2 × 2, 2 × 1 × 2 accumulated; one has no objects."""
    reference = gradients(CPU, None)
    others = {"1 × 2 × 2": gradients(CPU, 2)}
    for rank, result in enumerate(two):
        others |= {
            f"2 × 2, rank {rank}": result["whole"],
            f"2 × 1 × 2, rank {rank}": result["parts"],
        }
    for title, other in others.items():
        assert other.keys() == reference.keys()
        norms = {
            name: ((other[name] - gradient).double().norm().item(), gradient.double().norm().item())
            for name, gradient in reference.items()
        }
        off, whole = (sum(pair[i] ** 2 for pair in norms.values()) ** 0.5 for i in (0, 1))
        assert off < 1e-5 * whole, title
        # Each parameter by itself too, up to what adding in another order does in float32.
        assert all(off < 1e-4 * norm + 1e-7 for off, norm in norms.values()), title


@pytest.mark.parametrize("key", ["poisoned", "poisoned_parts"])
def test_a_nan_in_one_process_skips_the_step_in_all(key: str, two: list[dict]) -> None:
    for result in two:
        assert not np.isfinite(result[key]["skipped"])
        assert result[key]["changed"] == [] and np.isfinite(result[key]["loss"])


def test_running_statistics_are_the_main_process_s_before_an_evaluation(two: list[dict]) -> None:
    (own, equal), (other, also) = (result["buffers"] for result in two)
    assert own == equal == also and other != own


def test_evaluation_sees_every_image_once_and_equals_one_process(two: list[dict]) -> None:
    metrics, detections = evaluate(
        AlmostRight(), ShapesDataset("demo", "val", 11), CPU, batch_size=2
    )
    metrics.pop("speed")
    assert metrics["AP"] > 0
    for result in two:
        assert result["metrics"] == metrics
        by_image = [sorted(map(str, found)) for found in (result["detections"], detections)]
        assert by_image[0] == by_image[1]


def test_a_process_ends_although_a_worker_is_still_there() -> None:
    script = (
        "import builtins, sys\n"
        "from support.loader import make_loader; from test_distributed import Drawing\n"
        "builtins.kept = iter(make_loader(Drawing(), [[i] for i in range(20)], workers=1))\n"
        "next(builtins.kept); sys.exit(3)"
    )
    assert python("-c", script).returncode == 3

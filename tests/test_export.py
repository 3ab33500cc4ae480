"""tools/export.py: the file gives what PyTorch gives at any size, and the check can fail."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from conftest import ROOT, TINY

from model import SparseRCNN, build_model
from support.checkpoint import load_model, save_checkpoint
from support.errors import UserError
from support.onnx_detector import OnnxDetector
from tools import export
from tools.export import compare, main

# So that small images have boxes for all levels of the pyramid.
CONFIG = replace(TINY, canonical_box_px=24)
NAMES, IDS = ["Kätzchen", 'a "dog"', "cow"], [7, -3, 1000]


def random_checkpoint(path: Path, seed: int) -> Path:
    """A model whose proposals, scores and batch norms differ as those of a trained one do."""
    torch.manual_seed(seed)
    model = build_model(CONFIG)
    with torch.no_grad():
        # The first two stay the whole image, whose size can lie exactly between two levels.
        model.proposal_boxes[2:] = 0.1 + 0.8 * torch.rand(CONFIG.num_proposals - 2, 4)
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "cls_logits.weight")):
                tensor.normal_()
            elif name.endswith("box_deltas.weight"):
                tensor.mul_(0.3)  # the boxes stay in the image
    rest = {"config": CONFIG.to_dict(), "class_names": NAMES, "category_ids": IDS}
    save_checkpoint(path, {"model": model.state_dict(), **rest})
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("export") / "last.pt", seed=7)


@pytest.fixture(scope="module")
def done(source: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.export", str(source)]
    command.append(str(source.with_name("model.onnx")))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def exported(source: Path, done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    return source.with_name("model.onnx")


@pytest.fixture(scope="module")
def detector(exported: Path) -> OnnxDetector:
    return OnnxDetector(exported)


@pytest.fixture(scope="module")
def model(source: Path) -> SparseRCNN:
    return load_model(source)[0]


def picture(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_the_command_line_says_what_it_did_and_nothing_else(
    done: subprocess.CompletedProcess, exported: Path
) -> None:
    assert done.stderr == ""
    first, *rest, took = done.stdout.splitlines()
    assert took.startswith("tools.export: took ")
    assert first == f"{exported}: {exported.stat().st_size / 1e6:.1f} MB, opset 18, 3 classes"
    assert len(rest) == 6 and [line.split(":")[0].strip() for line in rest[3:]] == [
        "96×128",
        "128×96",
        "59×63",
    ]
    # one file, the weights in it, and no temporary one
    assert {path.name for path in exported.parent.iterdir()} == {"last.pt", "model.onnx"}


# multiples of 32 and not, wide and tall, as small as it gets
SIZES = [(64, 96), (70, 101), (101, 70), (33, 65), (200, 40), (1, 1), (1, 50), (32, 1)]
BOUNDARIES = [
    (12, 12),
    (24, 24),
    (48, 48),
]  # here the proposals that are the whole image lie between two levels


@pytest.mark.parametrize("size", SIZES + BOUNDARIES)
def test_detections_equal_pytorchs_at_any_size(
    detector: OnnxDetector, model: SparseRCNN, size: tuple[int, int]
) -> None:
    with torch.no_grad():
        expected = model([picture(*size)])[0]
    found = detector([picture(*size)])[0]
    assert len(expected["boxes"]) > 0 and found.keys() == expected.keys()
    assert all(found[key].dtype == expected[key].dtype for key in expected)
    assert found["labels"].tolist() == expected["labels"].tolist()
    assert torch.allclose(found["scores"], expected["scores"], rtol=0, atol=1e-4)
    assert torch.allclose(found["boxes"], expected["boxes"], rtol=0, atol=0.05)


def test_the_pictures_above_use_all_levels_and_classes(model: SparseRCNN) -> None:
    with torch.no_grad():
        stages = [model.stages([picture(*size)]).boxes for size in SIZES]
        found = [model([picture(*size)])[0] for size in SIZES + BOUNDARIES]
    assert set(model.head.pooler.levels(torch.cat(stages)).flatten().tolist()) == {0, 1, 2, 3}
    assert {label for each in found for label in each["labels"].tolist()} == {0, 1, 2}
    assert (
        max(float(each["scores"].diff().max()) for each in found) < -5e-4
    )  # no two scores are nearly equal


def test_several_images_are_detected_each_alone(detector: OnnxDetector) -> None:
    pictures = [picture(64, 96), picture(70, 33)]
    for together, alone in zip(
        detector(pictures), (detector([each])[0] for each in pictures), strict=True
    ):
        assert all(torch.equal(together[key], alone[key]) for key in alone)
    assert detector([]) == []


@pytest.mark.parametrize(
    "wrong", [torch.rand(3, 8, 8), torch.zeros(1, 8, 8).byte(), torch.zeros(3, 0, 8).byte()]
)
def test_other_images_are_refused(detector: OnnxDetector, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"image 1 .*\(3, H, W\) of torch\.uint8"):
        detector([picture(8, 8), wrong])


def test_the_file_describes_itself(exported: Path, detector: OnnxDetector) -> None:
    file = onnx.load(exported)
    onnx.checker.check_model(file, full_check=True)
    assert next(domain.version for domain in file.opset_import if domain.domain == "") >= 17
    shapes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    n = shapes["scores"][0]
    assert isinstance(n, str)
    assert shapes == {
        "image": [3, "height", "width"],
        "boxes": [n, 4],
        "scores": [n],
        "labels": [n],
    }
    metadata = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert metadata == {"class_names": NAMES, "category_ids": IDS, "test_size": 96, "max_size": 96}
    assert {name: getattr(detector, name) for name in metadata} == metadata
    assert str(ROOT).encode() not in exported.read_bytes()  # the exporter's stack traces


def test_damaged_and_missing_files_are_the_users_to_mend(exported: Path, tmp_path: Path) -> None:
    whole, damaged = exported.read_bytes(), tmp_path / "damaged.onnx"
    for content in (
        b"",
        b"nothing",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        b"\0" * 1000 + whole[1000:],
    ):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged\.onnx: .*tools\.export") as caught:
            OnnxDetector(damaged)
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            OnnxDetector(path)


def test_other_onnx_files_are_the_users_to_mend(exported: Path, tmp_path: Path) -> None:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [x], [y])
    other = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    without = onnx.load(exported)
    without.metadata_props.pop()
    garbled = onnx.load(exported)
    garbled.metadata_props[0].value = "["
    disguised = onnx.ModelProto()
    disguised.CopyFrom(other)
    disguised.metadata_props.extend(onnx.load(exported).metadata_props)
    for file in (other, without, garbled, disguised):
        onnx.save(file, tmp_path / "other.onnx")
        with pytest.raises(UserError, match=r"other\.onnx: an ONNX file, but not one"):
            OnnxDetector(tmp_path / "other.onnx")


def test_without_cuda_in_onnxruntime_it_runs_on_the_cpu_and_says_so(
    exported: Path, detector: OnnxDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="no CUDA here"):
        fallen_back = OnnxDetector(exported, "cuda")
    found, expected = fallen_back([picture(8, 8)])[0], detector([picture(8, 8)])[0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_missing_package_is_named(
    exported: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=f"need the package {package} .*pip install"):
                main([str(source), str(tmp_path / "out.onnx")])
            if package == "onnxruntime":
                with pytest.raises(UserError, match="pip install"):
                    OnnxDetector(exported)
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = random_checkpoint(tmp_path / "other.pt", seed=5)
    (tmp_path / "model.onnx").write_bytes(b"what was there before")
    # An exporter that gets everything wrong: it writes another model.
    monkeypatch.setattr(export, "export_onnx", lambda model, path, *_: shutil.copy(exported, path))
    with pytest.raises(
        UserError,
        match=r"not written, .* disagree on an image of 40×50 pixels: \d of \d detections",
    ):
        main([str(other), str(tmp_path / "model.onnx"), "--sizes", "40", "50"])
    assert (tmp_path / "model.onnx").read_bytes() == b"what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt", "model.onnx"}


@pytest.fixture
def outputs() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right detections, and the predictions of 4 proposals and 2 classes that they come from.

    The third proposal has two nearly equal scores, the fourth and fifth best of all, so that either
    of them may be the last one kept. The fourth proposal lies outside of the image.
    """
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.5, 0.50001], [0.1, 0.8]])
    boxes_px = torch.tensor([[1.0, 1, 9, 9], [-5, 3, 15, 8], [2, 2, 4, 6], [60, 0, 70, 5]])
    right = [[1.0, 1, 9, 9], [0, 3, 15, 8], [2, 2, 4, 6]]
    found = {
        "boxes": torch.tensor(right),
        "scores": torch.tensor([0.9, 0.7, 0.5]),
        "labels": torch.tensor([0, 1, 0]),
    }
    return found, scores.logit(), boxes_px, torch.tensor([50, 40, 50, 40])


def test_the_comparison_allows_ties_and_rounding(outputs) -> None:
    found, *rest = outputs
    assert compare(found, *rest)[:4] == (3, 0.0, pytest.approx(0, abs=1e-6), None)
    found["labels"][2], found["scores"][2] = 1, 0.50001  # the other one of the tie
    assert compare(found, *rest).problem is None
    found["boxes"][1, 2] += 0.04
    found["scores"][0] -= 9e-5
    result = compare(found, *rest)
    assert result.problem is None
    assert result.boxes_px == pytest.approx(0.04, abs=1e-5) and result.scores == pytest.approx(
        9e-5, abs=1e-6
    )
    # A box whose area is all rounding may be there or not.
    rest[1][3] = torch.tensor([49.99, 0, 70, 5])
    assert compare(found, *rest).problem is None


@pytest.mark.parametrize(
    ("key", "index", "value", "problem"),
    [
        ("boxes", (1, 2), 15.06, "1 of 3 detections are not"),
        ("scores", 0, 0.9002, "1 of 3 detections are not"),
        ("labels", 0, 1, "1 of 3 detections are not"),
        ("boxes", (1, 2), float("nan"), "1 of 3 detections are not"),
    ],
)
def test_the_comparison_finds_what_is_wrong(
    outputs, key: str, index: int, value: float, problem: str
) -> None:
    found, *rest = outputs
    found[key][index] = value
    assert problem in compare(found, *rest).problem


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([0, 2], "1 of PyTorch's detections are missing"),
        ([], "2 of PyTorch's detections are missing"),
        ([0, 0, 1], "1 of 3 detections are not"),
        ([1, 0, 2], "the scores do not fall"),
    ],
)
def test_the_comparison_finds_what_is_missing_doubled_or_unsorted(
    outputs, rows: list[int], problem: str
) -> None:
    found, *rest = outputs
    assert problem in compare({key: value[rows] for key, value in found.items()}, *rest).problem


def refuse(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_wrong_arguments_are_refused_before_anything_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source.read_bytes()
    for arguments, message in (
        ([source, source], r"should end in \.onnx"),
        ([source, tmp_path / "none" / "model.onnx"], "no such folder"),
        ([source, tmp_path / "model.onnx", "--sizes", "0", "5"], "at least 1 pixel"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(argument) for argument in arguments])
    with monkeypatch.context() as patch:
        patch.setattr(export, "load_model", lambda *_: pytest.fail("work was begun"))
        patch.setattr(Path, "touch", refuse)  # root may write anywhere
        with pytest.raises(PermissionError, match=tmp_path.name):
            main([str(source), str(tmp_path / "model.onnx")])
    with pytest.raises(SystemExit) as stopped:
        main([str(source), str(tmp_path / "model.onnx"), "--opset", "17"])
    assert stopped.value.code == 2
    assert source.read_bytes() == before and not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        main([str(tmp_path / "none.pt"), str(tmp_path / "model.onnx")])

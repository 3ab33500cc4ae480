"""tools/export.py: the file gives what PyTorch gives at any size, and the check can fail."""

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from conftest import ROOT, TINY, picture, python, serving
from onnx.reference import ReferenceEvaluator
from PIL import Image

import predict
from head import RoIPooler
from model import build_model, load_model
from predict import Predictor
from support import onnx_detector
from support.checkpoint import save_checkpoint
from support.errors import UserError
from support.onnx_detector import INPUT, Detect, OnnxDetector
from tools import export
from tools.export import RUNTIMES, MatrixPooler, _OneSize, agree, check, main

# So that small images have boxes for all levels of the pyramid.
CONFIG = replace(TINY, canonical_box_px=24)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAMES, IDS = ["Kätzchen", 'a "dog"', "cow"], [7, -3, 1000]


def random_checkpoint(path: Path, seed: int) -> Path:
    """A model whose proposals, scores and batch norms differ as those of a trained one do."""
    torch.manual_seed(seed)
    model = build_model(CONFIG)
    with torch.no_grad():
        # The first two stay the whole image, whose size can lie exactly between two levels.
        model.proposal_boxes[2:] = 0.1 + 0.8 * torch.rand(CONFIG.num_proposals - 2, 4)
        model.proposal_boxes[2:4, :2] += 5  # outside the image: without area once it is clipped
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
def exported(source: Path) -> Path:
    path = source.with_name("model.onnx")
    done = python("-m", "tools.export", str(source), str(path))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    sizes = [line.split(" pixels")[0].strip() for line in done.stdout.splitlines()[1:-1]]
    assert sizes == ["96×128", "128×96", "59×63"]
    # One file, the weights in it, and no temporary one.
    assert {each.name for each in path.parent.iterdir()} == {"last.pt", "model.onnx"}
    return path


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs the file; both have to do the same."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(onnx_detector, "find_spec", lambda name: name == request.param or None)
    return request.param


STATIC = (70, 101)


@pytest.fixture(scope="module")
def static(source: Path) -> Path:
    path = source.with_name("static.onnx")
    main([str(source), str(path), "--static", *map(str, STATIC)])
    return path


# Multiples of 32 and not, wide and tall, as small as it gets. On the last three the proposals that
# are the whole image lie between two levels.
SIZES = [(64, 96), (70, 101), (101, 70), (33, 65), (200, 40), (1, 1), (1, 50), (32, 1)]
SIZES += [(12, 12), (24, 24), (48, 48)]


def in_reference(path: Path) -> Detect:
    evaluator = ReferenceEvaluator(str(path))
    return lambda image: evaluator.run(None, {INPUT: image})


IN_ONNX = {name: load for name, (suffix, _, load) in RUNTIMES.items() if suffix == ".onnx"}
IN_ONNX["onnx's reference"] = in_reference


@pytest.mark.parametrize("name", IN_ONNX)
def test_runtimes_give_pytorchs_detections_at_any_size(
    exported: Path, static: Path, source: Path, name: str
) -> None:
    model = load_model(source)[0]
    try:
        detect, of_one_size = (IN_ONNX[name](path) for path in (exported, static))
    except ImportError as error:
        pytest.skip(str(error))
    for size in SIZES:
        assert check(detect, model, size) > 0
    assert check(of_one_size, model, STATIC) > 0


@pytest.mark.parametrize("suffix", [".tflite", ".pte"])
def test_other_formats(source: Path, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip(export.FORMATS[suffix][0][0])
    main([str(source), str(tmp_path / f"model{suffix}"), "--static", *map(str, STATIC)])
    assert (tmp_path / f"model{suffix}").exists()  # checked by the command itself


@torch.no_grad()
def test_a_static_file_keeps_what_has_no_area_with_a_score_of_0(static: Path, source: Path) -> None:
    model = load_model(source)[0]
    [expected], detector = model([picture(*STATIC)]), OnnxDetector(static)
    scores = export.onnxruntime(static)(picture(*STATIC).numpy())[1]
    assert 0 < len(expected["scores"]) == (scores > 0).sum() < CONFIG.num_proposals == len(scores)
    [found] = detector([picture(*STATIC)])  # drops them
    assert torch.allclose(found["boxes"], expected["boxes"], rtol=0, atol=0.05)
    with pytest.raises(UserError, match="48×48 pixels"):
        detector([picture(48, 48)])

    operators = {node.op_type for node in onnx.load(static).graph.node}
    assert not operators & {"RoiAlign", "NonZero", "If", "Loop", "ScatterND", "GatherND", "Shape"}

    # No detections at all.
    model.proposal_boxes += 5
    of_one_size = _OneSize(model.for_inference())
    detect = lambda image: [x.numpy() for x in of_one_size(torch.from_numpy(image))]  # noqa: E731
    assert check(detect, model, STATIC) == 0
    model.proposal_boxes -= 5
    with pytest.raises(UserError, match="disagree"):
        check(detect, model, STATIC)


@pytest.mark.parametrize("samples", [1, 2])
def test_matrix_products_pool_as_roi_align_does(samples: int) -> None:
    """Boxes in the image, partly and wholly beyond it, without and with negative area."""
    settings = {"roi_size": 5, "canonical_box_px": 40, "sampling_ratio": samples}
    pooler, ours = RoIPooler(**settings), MatrixPooler(**settings)
    pyramid = [torch.randn(2, 6, 64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]
    corners_px, sizes_px = 160 * torch.rand(2, 90, 2) - 40, 60 * torch.randn(2, 90, 2)
    sizes_px[:, ::9] = 0
    boxes_px = torch.cat((corners_px, corners_px + sizes_px), -1)  # (2, 90, 4)
    assert set(pooler.levels(boxes_px).flatten().tolist()) == {0, 1, 2, 3}
    expected = pooler(pyramid, boxes_px)
    torch.testing.assert_close(ours(pyramid, boxes_px), expected, rtol=0, atol=1e-4)


def test_the_sizes_above_use_all_levels_and_classes(source: Path) -> None:
    model = load_model(source)[0]
    with torch.no_grad():
        stages = torch.cat([model.stages([picture(*size)]).boxes for size in SIZES])
        found = torch.cat([model([picture(*size)])[0]["labels"] for size in SIZES])
    assert set(model.head.pooler.levels(stages).flatten().tolist()) == {0, 1, 2, 3}
    assert set(found.tolist()) == {0, 1, 2}


def test_the_file_describes_itself(exported: Path, runtime: str) -> None:
    file = onnx.load(exported)
    onnx.checker.check_model(file, full_check=True)
    shapes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    n = shapes["scores"][0]
    assert isinstance(n, str)
    image = [3, "height", "width"]
    assert shapes == {"image": image, "boxes": [n, 4], "scores": [n], "labels": [n]}
    metadata = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert metadata == {"class_names": NAMES, "category_ids": IDS, "test_size": 96, "max_size": 96}
    assert {name: getattr(OnnxDetector(exported), name) for name in metadata} == metadata
    assert str(ROOT).encode() not in exported.read_bytes()  # the exporter's stack traces


def test_predict_takes_the_file_in_the_place_of_the_checkpoint(
    exported: Path, source: Path, tmp_path: Path, runtime: str
) -> None:
    Image.fromarray(picture(70, 96).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    flags = ["--weights", str(exported), "--device", "cpu", "--output", str(tmp_path / "out")]
    flags += ["--score-threshold", "0"]
    assert predict.main([str(tmp_path / "a.png"), *flags]) == 0
    [record] = json.loads((tmp_path / "out" / "detections.json").read_text())
    expected = Predictor(source, "cpu", score_threshold=0)(tmp_path / "a.png")
    assert record["names"] == expected["names"]
    assert (torch.tensor(record["boxes"]) - expected["boxes"]).abs().max() < 0.05
    assert (torch.tensor(record["scores"]) - expected["scores"]).abs().max() < 1e-4
    wrong = [["--amp", "fp16"], ["--stages"], *([["--amp", "bf16"]] * (runtime == "onnxruntime"))]
    for flag in wrong:
        with pytest.raises(UserError, match=flag[0]):
            predict.main([str(tmp_path / "a.png"), *flags, *flag])


def test_damaged_and_other_files_are_the_users_to_mend(
    exported: Path, tmp_path: Path, runtime: str
) -> None:
    whole = exported.read_bytes()
    without_metadata = onnx.load(exported)
    without_metadata.metadata_props.pop()
    for content in (b"", whole[: len(whole) // 2], without_metadata.SerializeToString()):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(UserError, match=r"^.*bad\.onnx: .*python -m tools\.export.*$"):
            OnnxDetector(tmp_path / "bad.onnx")
    with pytest.raises(UserError, match=r"none\.onnx: no such file"):
        OnnxDetector(tmp_path / "none.onnx")


def test_a_file_that_disagrees_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = random_checkpoint(tmp_path / "other.pt", seed=5)
    (tmp_path / "model.onnx").write_bytes(b"what was there before")
    # An exporter that gets everything wrong: it writes another model.
    monkeypatch.setattr(export, "export_model", lambda model, path, *_: shutil.copy(exported, path))
    with pytest.raises(UserError, match=r"not written: .* disagree on an image of 96×128"):
        main([str(other), str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").read_bytes() == b"what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt", "model.onnx"}


def test_an_exporter_that_fails_leaves_log_messages_on(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        assert not logging.getLogger("torch.onnx").isEnabledFor(logging.WARNING)
        raise RuntimeError("of torch")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(RuntimeError, match="of torch"):
        main([str(source), str(source.with_name("new.onnx"))])
    assert logging.getLogger("torch.onnx").isEnabledFor(logging.WARNING)
    assert not source.with_name("new.onnx").exists()


def detections(*rows: tuple[int, float, float]) -> dict[str, torch.Tensor]:
    """Rows of (label, score, right side of the box)."""
    return {
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row[1] for row in rows]),
        "boxes": torch.tensor([[0.0, 0.0, row[2], 9.0] for row in rows]).reshape(-1, 4),
    }


A, B, C, D = (0, 0.9, 9.0), (1, 0.7, 19.0), (1, 0.69999, 29.0), (0, 0.2, 39.0)
RIGHT = {
    "rounding": [(0, 0.89995, 9.04), B, C, D],
    "a tie the other way round": [A, (1, 0.7, 29.0), (1, 0.69999, 19.0), D],
    "another one at the end": [A, B, C, (1, 0.2, 2.0)],
    "one without area": [A, B, C, (1, 0.5, 0.01), D],
}
WRONG = {
    "a box": [(0, 0.9, 9.06), B, C, D],
    "a score": [(0, 0.9002, 9.0), B, C, D],
    "a label": [(1, 0.9, 9.0), B, C, D],
    "not a number": [(0, 0.9, float("nan")), B, C, D],
    "missing": [A, C, D],
    "twice": [A, A, B, C],
    "none": [],
    "not sorted": [B, A, C, D],
}


@pytest.mark.parametrize("case", [*RIGHT, *WRONG])
def test_detections_agree_but_for_rounding_and_ties(case: str) -> None:
    found = detections(*{**RIGHT, **WRONG}[case])
    assert agree(found, detections(A, B, C, D)) == (case in RIGHT)


def test_mistakes_are_found_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_model", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    for wrong, reason in (
        ([str(source)], r"last\.pt: .* end in \.onnx"),
        (["model.tflite"], r"\.tflite needs --static"),
        (["model.pte", "--static", "70", "101"], "pip install executorch"),
    ):
        with pytest.raises(UserError, match=reason):
            main([str(source), *wrong])


# --- tools/browser.html ---


@pytest.fixture
def address(tmp_path: Path, exported: Path) -> Iterator[str]:
    """The page in a folder with the file and onnxruntime-web, served as its first lines say."""
    npm = [shutil.which("npm"), "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    if CHROMIUM is None or npm[0] is None:
        pytest.skip("needs Chromium and npm")
    web = [*npm, "onnxruntime-web@1.30.0", "--prefix", tmp_path]
    if subprocess.run(web, capture_output=True, timeout=300).returncode:
        pytest.skip("npm cannot install onnxruntime-web")
    shutil.copy(ROOT / "tools/browser.html", tmp_path / "index.html")
    shutil.copy(exported, tmp_path / "model.onnx")
    with serving(tmp_path) as address:
        yield address


@torch.no_grad()
def test_the_page_gives_pytorchs_detections(address: str, source: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    # Of the model's size, because browsers do not resize as torchvision does.
    image = picture(72, 96)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    [expected] = load_model(source)[0]([image])

    complaints: list[str] = []
    with playwright.sync_playwright() as manager:
        chromium = manager.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.set_input_files("#file", tmp_path / "photo.png")
        page.get_by_text("found in").wait_for(timeout=120_000)
        found = page.evaluate("[[...found.boxes], [...found.scores], found.labels]")
        boxes, scores, labels = map(torch.tensor, found)
        for least in ("0.4", "0.95"):
            page.fill("#least", least)
            count = int((expected["scores"] >= float(least)).sum())
            assert page.inner_text("#status").startswith(f"{count} boxes")
        chromium.close()
    assert labels.tolist() == expected["labels"].tolist() and complaints == []
    torch.testing.assert_close(boxes.view(-1, 4), expected["boxes"], rtol=0, atol=0.01)
    torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=1e-4)

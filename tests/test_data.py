"""data.py on small files made here: boxes follow the pixels that they enclose."""

import json
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision import tv_tensors

import data
from config import PRESETS, Config
from data import CocoDataset, check_data, make_dataset, require_objects, validation_set
from shapes import ShapesDataset
from support.errors import UserError
from support.loader import collate

W, H = 64, 48
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
Raw = dict[str, Any]


def box(number: int, image: int, category: int, *xywh: float, **more: Any) -> Raw:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(xywh), **more}


def example() -> Raw:
    """Image ids in no order, the second without objects; odd category ids; a crowd.

    The third box goes beyond the edges of its image.
    """
    size = {"width": W, "height": H}
    return {
        "images": [
            {"id": 30, "file_name": "a.png", **size},
            {"id": -4, "file_name": "b.png", **size},
            {"id": 10, "file_name": "sub/c.png", **size},
        ],
        "categories": [
            {"id": 1000, "name": "owl"},
            {"id": -3, "name": "cat"},
            {"id": 7, "name": "bee"},
        ],
        "annotations": [
            box(11, 10, 7, 5, 6, 20, 10),
            box(12, 30, 1000, 1.5, 2.25, 10, 20, iscrowd=0, area=99.5),
            box(13, 10, -3, -10, 40, 30, 50),
            box(14, 10, 7, 0, 0, 60, 40, iscrowd=1),
        ],
    }


def write(folder: Path, raw: Raw) -> Path:
    file = folder / "labels.json"
    file.write_text(json.dumps(raw))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (W, H), (9, 99, 199)).save(tmp_path / name)
    return tmp_path


def load(folder: Path, raw: Raw, **options: Any) -> CocoDataset:
    return CocoDataset(write(folder, raw), folder, **options)


# --- images and targets ---


def test_labels_boxes_and_attributes(folder: Path) -> None:
    dataset = load(folder, example())
    assert dataset.class_names == ("cat", "bee", "owl") and dataset.category_ids == (-3, 7, 1000)
    assert dataset.image_ids.tolist() == [30, -4, 10]
    assert dataset.file_names.tolist() == ["a.png", "b.png", "sub/c.png"]
    assert dataset.sizes_hw.tolist() == [[H, W]] * 3
    assert dataset.objects_per_image.tolist() == [1, 0, 2] and dataset.num_crowds == 1
    assert len(dataset) == 3 == sum(1 for _ in dataset)
    # The crowd is gone, and the box over the left and lower edges is clipped to them.
    expected = [
        ([[1.5, 2.25, 11.5, 22.25]], [2]),
        ([], []),
        ([[5, 6, 25, 16], [0, 40, 20, 48]], [1, 0]),
    ]
    for index, (boxes, labels) in enumerate(expected):
        image, target = dataset[index]
        assert type(image) is tv_tensors.Image
        assert image.shape == (3, H, W) and image.dtype == torch.uint8
        assert image[:, 20, 30].tolist() == [9, 99, 199]
        assert type(target["boxes"]) is tv_tensors.BoundingBoxes
        assert target["boxes"].canvas_size == (H, W)
        xyxy = torch.tensor(boxes).reshape(-1, 4).float()
        assert torch.equal(target["boxes"].as_subclass(Tensor), xyxy)
        assert target["labels"].tolist() == labels and target["labels"].dtype == torch.int64
        assert target["image_id"] == [30, -4, 10][index] and target["size_hw"] == (H, W)
    assert torch.equal(dataset[-1][1]["boxes"], dataset[2][1]["boxes"])


def test_a_target_is_a_copy(folder: Path) -> None:
    dataset = load(folder, example())
    dataset.target(0)["boxes"].mul_(0)
    dataset.target(0)["labels"].zero_()
    assert dataset.target(0)["boxes"].tolist() == [[1.5, 2.25, 11.5, 22.25]]
    assert dataset.target(0)["labels"] == 2


def test_classes_are_matched_by_name(folder: Path) -> None:
    dataset = load(folder, example(), class_names=["owl", "cat", "bee"])
    assert dataset.class_names == ("owl", "cat", "bee") and dataset.category_ids == (1000, -3, 7)
    assert dataset.target(0)["labels"].tolist() == [0]
    assert dataset.target(2)["labels"].tolist() == [2, 1]
    for names, words in [
        (["owl", "cat"], "new ['bee']"),
        (["owl", "cat", "bee", "elk"], "missing ['elk']"),
    ]:
        with pytest.raises(UserError) as caught:
            load(folder, example(), class_names=names)
        for part in ("labels.json", words, str(names), "['cat', 'bee', 'owl']"):
            assert part in str(caught.value)


def test_a_file_with_other_classes_than_the_model(folder: Path) -> None:
    """It lacks the elk, and its bees are ignored: neither learned nor evaluated."""
    options = {"allow_missing_classes": True, "ignore_new_classes": True}
    dataset = load(folder, example(), class_names=["elk", "owl", "cat"], **options)
    assert dataset.category_ids == (None, 1000, -3)
    assert dataset.target(0)["labels"].tolist() == [1]
    assert dataset.target(2)["labels"].tolist() == [2]
    truth = dataset.coco()
    assert set(truth.cats) == {1000, -3} and set(truth.anns) == {12, 13}
    assert len(truth.getImgIds()) == 3
    notes = "\n".join(dataset.notes)
    assert "ignored 'bee', which the model does not have, and 2 annotations" in notes
    assert "lacks 1 of the 3 classes: 'elk'" in notes


def test_no_annotations_at_all(folder: Path) -> None:
    dataset = load(folder, {**example(), "annotations": []})
    assert [len(target["boxes"]) for _, target in dataset] == [0, 0, 0]
    assert dataset.target(1)["boxes"].shape == (0, 4)
    assert len(dataset.coco().getImgIds()) == 3


def test_degenerate_boxes_give_one_warning(folder: Path) -> None:
    raw = example()
    raw["annotations"] += [
        box(21, 30, 7, 1, 1, 0, 5),
        box(22, 30, 7, 1, 1, 5, -2),
        box(23, 30, 7, 1, 1, 0, 0),
        box(24, 30, 7, W, 3, 9, 9),
        box(25, 30, 7, 1, -9, 9, 9),
        box(26, 30, 7, 1, 1, 0, 1),
        box(27, 30, 7, 1, 1, 0, 0, iscrowd=1),
        box(28, 30, 7, 1, 1, 0.01, 0.01),
    ]
    with pytest.warns(UserWarning) as caught:
        dataset = load(folder, raw)
    assert len(caught) == 1
    message = str(caught[0].message)
    for part in ("labels.json", "4 of zero or negative", "2 wholly outside", "21, 22, 23, 24, 25"):
        assert part in message
    assert "27" not in message.rsplit("ids", 1)[1]
    assert dataset.objects_per_image.tolist() == [2, 0, 2]  # the tiny one, 28, is kept
    # What is not trained on is evaluated all the same.
    assert {21, 22, 24, 25, 27, 14} <= set(dataset.coco().getAnnIds())


def test_coco_fills_in_what_is_absent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = load(folder, example())
    before = (folder / "labels.json").read_bytes()
    coco = dataset.coco()
    assert capsys.readouterr().out == ""
    assert set(coco.getImgIds()) == {30, -4, 10} and set(coco.getCatIds()) == {-3, 7, 1000}
    assert [coco.anns[k]["area"] for k in (11, 12, 13, 14)] == [200, 99.5, 1500, 2400]
    assert [coco.anns[k]["iscrowd"] for k in (11, 12, 13, 14)] == [0, 0, 0, 1]
    detection = {"image_id": 30, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1.0}
    assert coco.loadRes([detection]).dataset["info"] == {}
    assert (folder / "labels.json").read_bytes() == before


def average_precision(dataset: CocoDataset) -> float:
    """AP of detections that are the objects."""
    coco = dataset.coco()
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1}
        for a in coco.dataset["annotations"]
        if not a["iscrowd"]
    ]
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return evaluation.stats[0]


def test_coco_counts_a_match_with_annotation_zero(folder: Path) -> None:
    raw = {**example(), "annotations": [box(0, 30, 7, 5, 5, 20, 20)]}
    assert average_precision(load(folder, raw)) == pytest.approx(1)


@pytest.mark.parametrize("area", [-1, [400], "400", float("nan"), None])
def test_an_area_that_is_not_a_number_does_not_change_ap(folder: Path, area: Any) -> None:
    raw = {**example(), "annotations": [box(1, 30, 7, 5, 5, 20, 20, area=area)]}
    assert average_precision(load(folder, raw)) == pytest.approx(1)


def test_missing_files(folder: Path) -> None:
    file = write(folder, example())
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read \(No such file"):
        CocoDataset(folder / "nowhere.json", folder)
    with pytest.raises(UserError, match="nofolder: there is no such folder"):
        CocoDataset(file, folder / "nofolder")
    (folder / "b.png").unlink()
    (folder / "sub/c.png").unlink()
    missing = r"2 of the 3 image files listed in .*labels\.json are missing.* first is b\.png"
    with pytest.raises(UserError, match=missing):
        CocoDataset(file, folder)


def test_files_are_loaded_by_the_names_in_the_folder(folder: Path) -> None:
    raw = example()
    raw["images"][2]["file_name"] = "sub\\C.png"
    dataset = load(folder, raw)
    assert dataset.file_names.tolist() == ["a.png", "b.png", "sub/c.png"]
    assert dataset[2][0].shape == (3, H, W) and "spelled differently" in dataset.notes[0]


# --- checks before training ---


def turn(path: Path) -> None:
    """Marks an image to be shown turned by a quarter, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(path)
    image.load()
    image.save(path, exif=exif)


def test_sizes_are_those_after_exif_orientation(folder: Path) -> None:
    turn(folder / "a.png")
    raw = example()
    with pytest.raises(UserError, match=rf"a\.png: is {H} x {W} pixels, but {W} x {H} in .*EXIF"):
        load(folder, raw)[0]
    raw["images"][0] |= {"width": H, "height": W}
    dataset = load(folder, raw)
    assert dataset[0][0].shape == (3, W, H)
    assert check_data(dataset, decode=False) == check_data(dataset) == []


@pytest.mark.parametrize("decode", [True, False])
def test_check_data_lists_all_unusable_images(
    folder: Path, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load(folder, example())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as by 2>&-
        assert check_data(dataset, decode=decode) == []
    (folder / "a.png").write_bytes(b"")
    Image.new("RGB", (W, H + 1)).save(folder / "sub/c.png")
    with pytest.raises(UserError) as caught:
        check_data(dataset, decode=decode)
    for part in (
        "2 of 3 images",
        "a.png: cannot be read as an image (the file is empty)",
        f"c.png: is {W} x {H + 1}",
    ):
        assert part in str(caught.value)
    assert "b.png" not in str(caught.value)


def test_headers_alone_do_not_show_damage_further_back(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(noise).save(folder / name)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:3000])
    dataset = load(folder, example())
    dataset.check_header(0)  # the first image of a mode is decoded
    assert check_data(dataset, decode=False) == []
    with pytest.raises(UserError, match=r"1 of 3 images .*b\.png.*truncated"):
        check_data(dataset)


def test_headers_show_images_whose_range_is_not_known(folder: Path) -> None:
    Image.new("F", (W, H), 1e6).save(folder / "b.tif")
    raw = example()
    raw["images"][1]["file_name"] = "b.tif"
    with pytest.raises(UserError, match=r"1 of 3 images .*b\.tif.*from 1e\+06 to 1e\+06"):
        check_data(load(folder, raw), decode=False)


@pytest.mark.parametrize("decode", [True, False])
def test_processes_share_the_check(folder: Path, decode: bool) -> None:
    dataset = load(folder, example())
    for image in folder.rglob("*.png"):
        image.write_bytes(b"")
    counts = Counter()
    for rank in range(2):
        with pytest.raises(UserError) as caught:
            check_data(dataset, rank, 2, decode)
        counts.update(name for name in ("a.png", "b.png", "c.png") if name in str(caught.value))
    assert counts == {"a.png": 1, "b.png": 1, "c.png": 1}


def test_a_slow_disk_ends_the_check_of_headers_but_not_of_images(folder: Path) -> None:
    dataset = load(folder, example())
    (note,) = check_data(dataset, decode=False, limit_s=0.0)
    assert "labels.json" in note and "0 of 3 image files in 0 s" in note and "--check-data" in note
    assert check_data(dataset, decode=True, limit_s=0.0) == []


def test_training_data_without_objects_are_refused(folder: Path) -> None:
    require_objects(load(folder, example()))
    require_objects(ShapesDataset("demo", "train", 1))
    with pytest.raises(UserError, match=r"labels\.json: .*no objects.*learn from$"):
        require_objects(load(folder, {**example(), "annotations": []}))
    crowds = [{**annotation, "iscrowd": 1} for annotation in example()["annotations"]]
    with pytest.raises(UserError, match="no objects.*4 annotations are crowds.*set it to 0"):
        require_objects(load(folder, {**example(), "annotations": crowds}))


# --- augmentation ---


def painted(
    width: int, height: int, boxes: list[tuple[int, int, int, int]]
) -> tuple[Tensor, data.Target]:
    """A black image with the k-th box (whole xyxy pixels, none overlap) in the k-th colour."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, COLOURS, strict=False):
        pixels[y1:y2, x1:x2] = colour
    size_hw = (height, width)
    xyxy = torch.tensor(boxes).float()
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), {
        "boxes": tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=size_hw),
        "labels": torch.arange(len(boxes)),
        "image_id": 1,
        "size_hw": size_hw,
    }


def extent(image: Tensor, label: int) -> list[float] | None:
    """xyxy of the pixels of the label's colour."""
    ys, xs = torch.nonzero(image[label] > 127, as_tuple=True)
    if len(xs) == 0:
        return None
    return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]


CONFIGS = {
    "plain": Config(flip=False),
    "flip": Config(flip=True),
    "flip both ways": Config(flip=True, flip_vertical=True),
    "crop": Config(flip=True, crop=True, min_sizes=(320, 480), max_size=700),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("width", "height"), [(640, 427), (500, 640), (300, 240)])
def test_boxes_follow_the_pixels(name: str, width: int, height: int) -> None:
    torch.manual_seed(0)
    boxes = [(10, 20, 90, 70), (150, 30, 290, 180), (width - 40, height - 60, width, height)]
    transform, where = data.train_transforms(CONFIGS[name]), Counter()
    for _ in range(25 if name == "crop" else 6):
        image, target = transform(*painted(width, height, boxes))
        assert target["boxes"].canvas_size == tuple(image.shape[1:])
        assert target["size_hw"] == (height, width)
        found = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True))
        for label in range(3):
            seen = extent(image, label)
            if seen is None:  # cropped away, or down to a sliver that the resize blurred
                x1, y1, x2, y2 = found.get(label, (0, 0, 0, 0))
                assert min(x2 - x1, y2 - y1) < 2
            else:
                assert np.abs(np.array(seen) - found[label]).max() <= 1.5
            where["gone" if seen is None else "there"] += 1
        if 0 in found and 1 in found:
            where["mirrored"] += found[0][0] > found[1][0]
        if 0 in found and 2 in found:
            where["upside down"] += found[0][1] > found[2][1]
    assert where["there"] > where["gone"]
    assert (where["gone"] > 0) == (name == "crop")
    assert (where["mirrored"] > 0) == (name != "plain")
    assert (where["upside down"] > 0) == (name == "flip both ways")


def test_colour_jitter_changes_pixels_and_no_box() -> None:
    _, target = painted(64, 48, [(10, 8, 40, 30)])
    image = tv_tensors.Image(torch.randint(40, 200, (3, 48, 64), dtype=torch.uint8))
    config = Config(flip=False, min_sizes=(48,), max_size=64)
    plain = data.train_transforms(config)(image, target)
    torch.manual_seed(3)
    jittered = data.train_transforms(replace(config, color_jitter=0.3))(image, target)
    assert torch.equal(plain[1]["boxes"], jittered[1]["boxes"])
    difference = (plain[0].int() - jittered[0].int()).abs()
    assert difference.max() > 0 and difference.double().mean() < 80


def test_sizes_of_the_recipe() -> None:
    torch.manual_seed(0)
    config, shortest = PRESETS["r50-100"], set()
    transforms = [
        (data.train_transforms(config), config.min_sizes),
        (data.eval_transforms(config), (800,)),
    ]
    for width, height in [(640, 480), (427, 640), (640, 97), (333, 500), (49, 49), (7, 3000)] * 12:
        for transform, sizes in transforms:
            image, _ = transform(*painted(width, height, [(0, 0, 5, 5)]))
            new_h, new_w = image.shape[1:]
            scale = min(new_w, new_h) / min(width, height)
            if max(new_w, new_h) == 1333:
                limited = int(min(width, height) * 1333 / max(width, height) + 0.5)
                assert min(new_w, new_h) == limited <= max(sizes)
            else:  # exactly: truncation would make some of them a pixel less
                assert min(new_w, new_h) in sizes and max(new_w, new_h) < 1333
                assert max(new_w, new_h) == int(max(width, height) * scale + 0.5)
                shortest.add(min(new_w, new_h))
    assert shortest == set(config.min_sizes)


def test_a_sixtieth_pixel_is_kept_and_nothing_is_not() -> None:
    image, target = painted(60, 60, [(0, 0, 5, 5), (7, 7, 9, 7), (8, 8, 9, 9)])
    target["boxes"][2, 2:] = 8 + 1 / 60
    new_image, new_target = data.drop_degenerate(image, target)
    assert new_image is image and len(target["boxes"]) == 3
    assert new_target["labels"].tolist() == [0, 2]
    assert torch.equal(new_target["boxes"], target["boxes"][[0, 2]])
    assert new_target["boxes"].canvas_size == (60, 60) and new_target["image_id"] == 1


def test_crops_of_the_recipe() -> None:
    """Before the last resize half of the images are untouched, the others 384–600 pixels a side."""
    torch.manual_seed(0)
    config = Config(crop=True, flip=False)
    crop = data.train_transforms(config).transforms[0]
    boxes = [(0, 0, 100, 100), (400, 300, 600, 400)]
    sides, sources, cropped, rounds = set(), set(), 0, 200
    for _ in range(rounds):
        image, _ = crop(*painted(640, 427, boxes))
        if tuple(image.shape[1:]) == (427, 640):
            continue
        cropped += 1
        assert all(384 <= side <= 600 for side in image.shape[1:])
        sides |= set(image.shape[1:])
        sources.add(extent(image, 0) is None)
    assert abs(cropped / rounds - 0.5) < 0.12  # 3.4 standard deviations
    assert min(sides) < 400 and max(sides) > 580 and sources == {True, False}
    for _ in range(20):  # a side below 384 stays whole
        image, _ = data.random_size_crop(*painted(300, 500, boxes[:1]))
        assert image.shape[2] == 300 and 384 <= image.shape[1] <= 500


def test_sizes_of_crops_can_be_chosen() -> None:
    torch.manual_seed(0)
    config = Config(crop=True, crop_resize=(200,), crop_sizes=(50, 60))
    crop = data.train_transforms(config).transforms[0]
    sizes = {tuple(crop(*painted(100, 100, [(0, 0, 9, 9)]))[0].shape[1:]) for _ in range(200)}
    sizes.remove((100, 100))  # not cropped, and not resized either
    assert {side for size in sizes for side in size} == set(range(50, 61))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("crop", [False, True])
def test_the_recipe_draws_the_same_random_numbers_as_ever(seed: int, crop: bool) -> None:
    """An option that is off must not draw: a run with the same seed would be another run."""
    config = Config(crop=crop)
    torch.manual_seed(seed)
    if torch.rand(1) < 0.5 * crop:
        torch.randint(3, ())  # the size before the crop
        for _ in range(4):  # height, width, top, left
            torch.randint(9, ())
    torch.randint(11, ())  # the size
    torch.rand(1)  # the flip
    expected = torch.get_rng_state()
    for flip_vertical in (False, True):
        torch.manual_seed(seed)
        transform = data.train_transforms(replace(config, flip_vertical=flip_vertical))
        transform(*painted(640, 427, [(0, 0, 5, 5)]))
        assert torch.equal(torch.get_rng_state(), expected) == (not flip_vertical)


# --- batches ---


def test_batches_are_lists_because_images_differ_in_size(folder: Path) -> None:
    different = [load(folder, example())[0], (torch.zeros(3, 5, 7), {})]
    images, targets = collate(different)
    assert [image.shape for image in images] == [(3, H, W), (3, 5, 7)] and targets[1] == {}


# --- which data ---


def test_own_data(folder: Path) -> None:
    file, images = str(write(folder, example())), str(folder)
    own = Config(train_json=file, train_images=images)
    dataset = make_dataset(own, "train")
    assert isinstance(dataset, CocoDataset) and min(dataset[0][0].shape[1:]) in own.min_sizes
    assert make_dataset(own, "val") is None
    both = Config(train_json=file, train_images=images, val_json=file, val_images=images)
    val = make_dataset(both, "val", class_names=("owl", "bee", "cat"))
    assert val.class_names == ("owl", "bee", "cat") and min(val[0][0].shape[1:]) == 800
    assert make_dataset(both, "val", transforms=lambda *pair: pair)[0][0].shape == (3, H, W)
    for flags, missing in [
        ({"train_json": file}, "--train-images"),
        ({"train_images": images}, "--train-json"),
    ]:
        with pytest.raises(UserError, match=f"^{missing} is missing"):
            make_dataset(Config(**flags), "train")
    with pytest.raises(UserError, match="^--val-images is missing"):
        make_dataset(Config(train_json=file, train_images=images, val_json=file), "val")


def test_validation_data_may_lack_classes_and_training_data_may_not(folder: Path) -> None:
    file, images = str(write(folder, example())), str(folder)
    config = Config(train_json=file, train_images=images, val_json=file, val_images=images)
    names = ("owl", "elk", "bee", "cat")
    assert make_dataset(config, "val", names).category_ids == (1000, None, 7, -3)
    with pytest.raises(UserError, match=r"missing \['elk'\]"):
        make_dataset(config, "train", names)
    with pytest.raises(UserError, match=r"missing \['elk'\], new \['cat'\].*--ignore-new-classes"):
        make_dataset(config, "val", names[:3])
    val = make_dataset(config, "val", names[:3], ignore_new_classes=True)
    assert val.category_ids == (1000, None, 7)

    checkpoint = {"config": config, "class_names": list(names[:3])}
    with pytest.raises(UserError, match="--ignore-new-classes"):
        validation_set(checkpoint)
    val = validation_set(checkpoint, ignore_new_classes=True, test_size=96, max_size=None)
    assert val.category_ids == (1000, None, 7) and min(val[0][0].shape[1:]) == 96
    with pytest.raises(UserError, match="give --val-json and --val-images"):
        validation_set({**checkpoint, "config": Config(train_json=file, train_images=images)})


def test_shapes_data() -> None:
    config = Config(
        data="shapes-crowded", shapes_train=7, shapes_val=3, min_sizes=(120,), test_size=150
    )
    train, val = make_dataset(config, "train"), make_dataset(config, "val")
    assert isinstance(train, ShapesDataset) and (len(train), len(val)) == (7, 3)
    assert train[0][0].shape == (3, 120, 120) and val[0][0].shape == (3, 150, 150)
    assert train.class_names == ShapesDataset("crowded", "train", 1).class_names
    with pytest.raises(UserError, match="shapes-crowded.*missing .*owl"):
        make_dataset(config, "val", class_names=("owl",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_data(train) == check_data(train, decode=False) == [] and train.notes == ()


def test_coco_in_its_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        make_dataset(Config(), "train")
    for part in (
        "datasets/coco/annotations/instances_train2017.json",
        "https://cocodataset.org/#download",
        "train2017.zip",
        "val2017.zip",
        "annotations_trainval2017.zip",
        "make demo",
        "--train-json",
    ):
        assert part in str(caught.value)
    (annotations := tmp_path / "datasets/coco/annotations").mkdir(parents=True)
    for split, name in (("train", "a.png"), ("val", "b.png")):
        (images := tmp_path / f"datasets/coco/{split}2017").mkdir()
        Image.new("RGB", (W, H)).save(images / name)
        raw = {
            **example(),
            "images": [{"id": 1, "file_name": name, "width": W, "height": H}],
            "annotations": [],
        }
        (annotations / f"instances_{split}2017.json").write_text(json.dumps(raw))
        assert make_dataset(Config(), split).file_names.tolist() == [name]

"""data.py on small files made here: boxes follow the pixels that they enclose."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

import data
from config import PRESETS, Config
from data import CocoDataset, check_data, make_dataset, notes_on_data, validation_set
from shapes import ShapesDataset
from support.errors import UserError

W, H = 64, 48
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
Raw = dict[str, Any]


def box(number: int, image: int, category: int, *xywh: float, **more: Any) -> Raw:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(xywh), **more}


def example() -> Raw:
    """Image ids in no order, the second without objects; odd category ids; a crowd.

    The third box goes beyond the edges of its image.
    """
    files = {30: "a.png", -4: "b.png", 10: "sub/c.png"}
    classes = {1000: "owl", -3: "cat", 7: "bee"}
    return {
        "images": [
            {"id": i, "file_name": name, "width": W, "height": H} for i, name in files.items()
        ],
        "categories": [{"id": i, "name": name} for i, name in classes.items()],
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


@pytest.mark.parametrize("missing", [("width",), ("height", "width")])
def test_a_missing_size_is_that_of_the_picture(folder: Path, missing: tuple[str, ...]) -> None:
    raw = example()
    raw["images"][1]["width"] = None
    for name in missing:
        del raw["images"][2][name]
    dataset = load(folder, raw)
    assert dataset.sizes_hw.tolist() == [[H, W]] * 3
    assert dataset[1][0].shape[1:] == (H, W)
    assert any("2 images have no width or height" in note for note in dataset.notes)


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
    # A target is a copy.
    dataset.target(0)["boxes"].mul_(0), dataset.target(0)["labels"].zero_()
    assert dataset.target(0)["boxes"].tolist() == [[1.5, 2.25, 11.5, 22.25]]
    assert dataset.target(0)["labels"] == 2


def test_flat_boxes_and_those_outside_are_left_out_and_counted(folder: Path) -> None:
    raw = example()
    sizes = [(1, 1, 0, 5), (1, 1, 5, -2), (1, 1, 0, 0), (W, 3, 9, 9), (1, -9, 9, 9)]
    raw["annotations"] += [box(21 + k, 30, 7, *xywh) for k, xywh in enumerate(sizes)]
    raw["annotations"].append(box(26, 30, 7, 1, 1, 0.01, 0.01))  # tiny, but an object
    raw["annotations"].append(box(27, 30, 7, W, 3, 9, 9, iscrowd=1))
    words = r"labels\.json: left out 3 boxes of zero .* and of training 2 wholly outside"
    with pytest.warns(UserWarning, match=words):
        dataset = load(folder, raw)
    assert dataset.objects_per_image.tolist() == [2, 0, 2]
    # Boxes without area mark images without objects. All others are evaluated as they are.
    assert set(dataset.coco().getAnnIds()) == {11, 12, 13, 14, *range(24, 28)}


# --- checks before training ---


def test_check_data_counts_all_unusable_images_and_says_why(folder: Path) -> None:
    """Among them an image that EXIF turns, as phones do: the JSON has its size as stored."""
    dataset = load(folder, example())
    assert check_data(dataset) is None and check_data(ShapesDataset("demo", "val", 1)) is None
    (folder / "a.png").write_bytes(b"")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (W, H)).save(folder / "sub/c.png", exif=turned)
    with pytest.raises(
        UserError, match=rf"2 of 3 images .*a\.png: .*c\.png: is {H} x {W} pixels, but"
    ):
        check_data(dataset)
    # Two processes share the images.
    with pytest.raises(UserError, match=r"2 of 2 images .*a\.png: .*c\.png: is"):
        check_data(dataset, 0, 2)
    assert check_data(dataset, 1, 2) is None

    raw = example()
    raw["images"][2] |= {"width": H, "height": W}
    assert load(folder, raw)[2][0].shape == (3, W, H)


def test_objects_too_many_or_too_small_to_be_found_are_said_with_a_way_out(folder: Path) -> None:
    raw = example()
    raw["annotations"] += [box(21 + k, 30, 7, 9 * k, 9, 9, 9) for k in range(4)]
    dataset = load(folder, raw)
    assert notes_on_data(dataset, Config()) == []
    # At a shortest side of 16 pixels, a third, the four of seven are 3 pixels long.
    config = Config(max_dets=3, min_sizes=(16,))
    many, small = notes_on_data(dataset, config)
    assert "up to 4 objects of a class per image, of which 3 detections count" in many
    assert "57% of the objects are less than 4 pixels long in the resized" in small
    assert many.endswith("--max-dets 4") and "--max-size 64 and" in small
    assert notes_on_data(dataset, replace(config, max_dets=4, min_sizes=(24,))) == []


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
    "flip both ways": Config(flip=True, flip_vertical=True, color_jitter=0.2),
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
                where["other colour"] += int(image[label].max()) < 255
            where["gone" if seen is None else "there"] += 1
        if 0 in found and 1 in found:
            where["mirrored"] += found[0][0] > found[1][0]
        if 0 in found and 2 in found:
            where["upside down"] += found[0][1] > found[2][1]
    assert where["there"] > where["gone"]
    assert (where["gone"] > 0) == (name == "crop")
    assert (where["mirrored"] > 0) == (name != "plain")
    assert (where["upside down"] > 0) == (name == "flip both ways")
    assert (where["other colour"] > where["there"] / 2) == (name == "flip both ways")


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


@pytest.mark.parametrize(("low", "high"), [(384, 600), (200, 300)])
def test_crops_of_the_recipe(low: int, high: int) -> None:
    """Before the last resize half of the images are untouched, the others are cut to a window."""
    torch.manual_seed(0)
    crop = data.train_transforms(Config(crop=True, crop_sizes=(low, high))).transforms[0]
    sizes, has_corner = [], set()
    for _ in range(200):
        image, _ = crop(*painted(640, 427, [(0, 0, 100, 100)]))
        if image.shape != (3, 427, 640):
            sizes.append(image.shape[1:])
            has_corner.add(extent(image, 0) is not None)
    assert abs(len(sizes) / 200 - 0.5) < 0.12  # 3.4 standard deviations
    assert low <= np.min(sizes) < low + 16 and high - 20 < np.max(sizes) <= high
    assert len(has_corner) == 2
    for _ in range(20):  # a side below 384 stays whole
        image, _ = data.random_size_crop(*painted(300, 500, [(0, 0, 100, 100)]))
        assert image.shape[2] == 300 and 384 <= image.shape[1] <= 500


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


# --- which data ---


@pytest.mark.parametrize(("flag", "missing"), [("json", "images"), ("images", "json")])
def test_a_file_and_its_images_go_together(flag: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"^--val-{missing} is missing"):
        make_dataset(Config(**{f"val_{flag}": "a"}), "val")


def test_validation_data_may_lack_classes_and_training_data_may_not(folder: Path) -> None:
    file, images = str(write(folder, example())), str(folder)
    config = Config(train_json=file, train_images=images, val_json=file, val_images=images)
    names = ("owl", "elk", "bee", "cat")
    assert make_dataset(config, "val", names).category_ids == (1000, None, 7, -3)
    with pytest.raises(UserError, match=r"missing \['elk'\]"):
        make_dataset(config, "train", names)

    checkpoint = {"config": config, "class_names": list(names[:3])}
    with pytest.raises(UserError, match="new .'cat'.*--ignore-new-classes"):
        validation_set(checkpoint)
    with pytest.raises(UserError, match="--val-json and --val-images go together"):
        validation_set(checkpoint, val_json=file, val_images=None)
    val = validation_set(checkpoint, ignore_new_classes=True, test_size=96, max_size=None)
    assert val.category_ids == (1000, None, 7) and min(val[0][0].shape[1:]) == 96
    assert [val.class_names[k] for k in val.target(2)["labels"]] == ["bee"]
    assert set(val.coco().cats) == {1000, 7} and set(val.coco().anns) == {11, 12, 14}


def test_shapes_data() -> None:
    config = Config(
        data="shapes-crowded", shapes_train=7, shapes_val=3, min_sizes=(120,), test_size=150
    )
    train, val = make_dataset(config, "train"), make_dataset(config, "val")
    assert (len(train), len(val)) == (7, 3) and train.notes == ()
    assert train[0][0].shape == (3, 120, 120) and val[0][0].shape == (3, 150, 150)
    assert make_dataset(config, "val", train.class_names).class_names == train.class_names
    # In another order the labels would mean other classes.
    with pytest.raises(UserError, match="shapes-crowded: its classes .'ellipse'.* 'ellipse'.;"):
        make_dataset(config, "val", train.class_names[::-1])


def test_coco_in_its_usual_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"datasets/coco/annotations/instances_val2017\.json: not"):
        make_dataset(Config(), "val")
    Path("datasets/coco/annotations").mkdir(parents=True)
    Path("datasets/coco/val2017").symlink_to(folder)
    file = Path("datasets/coco/annotations/instances_val2017.json")
    file.write_text(json.dumps(example()))
    assert make_dataset(Config(), "val").image_ids.tolist() == [30, -4, 10]

"""Every promise of shapes.py, checked on a few hundred images of each level by other means."""

import itertools
import random
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2

import shapes
from shapes import ShapesDataset
from support.errors import UserError

LENGTH = 400
# As stated at the top of shapes.py: fewest classes, most objects, shortest and longest side in
# pixels, largest IoU.
PROMISED = {"demo": (3, 5, 0.12 * 96, 0.5 * 96, 0.1), "crowded": (4, 8, 0.10 * 96, 0.5 * 96, 0.4)}
LEVELS = pytest.mark.parametrize("level", PROMISED)


@cache
def dataset(level: str, split: str = "train") -> ShapesDataset:
    return ShapesDataset(level, split, LENGTH)


@cache
def images_of(level: str, split: str = "train") -> list[tuple[tv_tensors.Image, dict]]:
    data = dataset(level, split)
    return [data[i] for i in range(LENGTH)]


def scene(level: str, index: int) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """What an image is painted from: boxes, class names, background, colours."""
    data = dataset(level)
    rng = np.random.default_rng([shapes.SEEDS[level, "train"], index])
    boxes, labels = shapes.draw_layout(rng, data.level)
    background, avoid = shapes.draw_background(rng, data.level)
    colours = shapes.draw_colours(rng, len(boxes), avoid)
    return boxes, [data.class_names[k] for k in labels], background, colours


def mask(box: np.ndarray, name: str) -> np.ndarray:
    """(H, W) bool: the pixels that an object changes by more than a tenth."""
    black, white = np.zeros((3, 96, 96), np.float32), np.full(3, 255, np.float32)
    shapes.paint(black, box, shapes.SHAPES[name], white)
    return black[0] > 25.5


@LEVELS
def test_interface(level: str) -> None:
    classes, most = PROMISED[level][:2]
    data = dataset(level)
    assert len(data) == len(data.image_ids) == len(set(data.image_ids)) == LENGTH
    assert len(data.class_names) == len(set(data.class_names)) >= classes
    assert data.category_ids == tuple(range(1, len(data.class_names) + 1))
    for index, (image, target) in enumerate(images_of(level)):
        assert isinstance(image, tv_tensors.Image)
        assert image.dtype == torch.uint8 and image.shape == (3, 96, 96)
        boxes, labels = target["boxes"], target["labels"]
        assert isinstance(boxes, tv_tensors.BoundingBoxes)
        assert boxes.canvas_size == target["size_hw"] == (96, 96)
        assert boxes.dtype == torch.float32 and boxes.format == tv_tensors.BoundingBoxFormat.XYXY
        assert labels.dtype == torch.int64 and boxes.shape == (len(labels), 4)
        assert type(target["image_id"]) is int and target["image_id"] == data.image_ids[index]
        assert data.objects_per_image[index] == len(labels)
        assert tuple(data.sizes_hw[index]) == (96, 96)
    assert data.objects_per_image.shape == (LENGTH,) and data.sizes_hw.shape == (LENGTH, 2)
    # Counts and classes are uniform: a chi-squared test. The seed fixes its p value.
    counts = np.bincount(data.objects_per_image, minlength=most + 1)
    assert counts[0] == 0 and len(counts) == most + 1
    labels = torch.cat([target["labels"] for _, target in images_of(level)])
    assert labels.max() < len(data.class_names)
    for observed in (counts[1:], np.bincount(labels, minlength=len(data.class_names))):
        assert stats.chisquare(observed).pvalue > 1e-4


@LEVELS
def test_sizes_and_overlaps(level: str) -> None:
    _, _, low, high, max_iou = PROMISED[level]
    whs = []
    worst = 0.0
    for _, target in images_of(level):
        boxes = target["boxes"].as_subclass(torch.Tensor)
        assert (boxes >= 0).all() and (boxes <= 96).all()
        whs.append((boxes[:, 2:] - boxes[:, :2]).numpy())
        worst = max(worst, box_iou(boxes, boxes).fill_diagonal_(0).max().item())
    assert 0.9 * max_iou < worst <= max_iou + 1e-5
    whs = np.concatenate(whs)
    assert low - 1e-4 <= whs.min() < 1.02 * low and 0.98 * high < whs.max() <= high + 1e-4
    expected = stats.loguniform(low, high) if level == "crowded" else stats.uniform(low, high - low)
    for sides in whs.T:
        assert stats.kstest(sides, expected.cdf).pvalue > 1e-4
    # Width and height are independent.
    assert stats.spearmanr(whs[:, 0], whs[:, 1]).pvalue > 1e-4


@LEVELS
def test_images_full_of_objects_keep_the_size_distribution(level: str) -> None:
    """Large objects are not rarer than promised even in full images, where they hardly fit."""
    _, most, low, high, _ = PROMISED[level]
    rng = np.random.default_rng(0)
    setting = shapes.LEVELS[level]
    layouts = [shapes.draw_layout(rng, setting)[0] for _ in range(1500)]
    whs = np.concatenate([boxes[:, 2:] - boxes[:, :2] for boxes in layouts if len(boxes) == most])
    expected = stats.loguniform(low, high) if level == "crowded" else stats.uniform(low, high - low)
    assert len(whs) > 1000
    assert stats.kstest(whs.ravel(), expected.cdf).pvalue > 1e-4


@LEVELS
def test_large_objects_come_first_and_no_box_is_covered_by_the_later_ones(level: str) -> None:
    rng = np.random.default_rng(0)
    most_hidden = 0.0
    for _ in range(1500):
        boxes = shapes.draw_layout(rng, shapes.LEVELS[level])[0].astype(float)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        assert (np.diff(areas) <= 1e-2).all()
        top_left = np.maximum(boxes[:, None, :2], boxes[:, :2])
        bottom_right = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
        shared = (bottom_right - top_left).clip(0).prod(axis=2)  # (M, M)
        shared = np.triu(shared, k=1)  # with later boxes only
        most_hidden = max(most_hidden, (shared.sum(axis=1) / areas).max())
    assert most_hidden < 0.75 + 1e-4


@LEVELS
def test_boxes_are_tight_and_amodal(level: str) -> None:
    for index in range(LENGTH):
        boxes, names, _, _ = scene(level, index)
        assert np.array_equal(boxes, images_of(level)[index][1]["boxes"].numpy())
        for box, name in zip(boxes, names, strict=True):
            ys, xs = np.nonzero(mask(box, name))
            extent = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(extent - box).max() < 1, (index, name, box, extent)


@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("whs", [*itertools.product((9.6, 48.0), repeat=2)])
def test_the_most_extreme_boxes_are_tight_wherever_they_lie(
    name: str, whs: tuple[float, float]
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        corner = rng.uniform(0, 96 - np.array(whs))
        box = np.concatenate([corner, corner + whs]).astype(np.float32)
        ys, xs = np.nonzero(mask(box, name))
        assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box).max() < 1


# The share of its box that each shape covers, from geometry. The tips that are cut off are 6 % of
# the axis.
AREAS = {
    "ellipse": np.pi / 4,
    "rectangle": 1.0,
    "triangle": 0.53,
    "diamond": (1.06**2 * 2 - 4 * 0.06**2) / 4,
    "cross": 1 - 0.65**2,
    "ring": np.pi / 4 * (1 - 0.54**2),
}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_cover_the_area_that_geometry_says(name: str) -> None:
    """Also with edges between the pixels: the mean coverage is the area."""
    box = np.array([10.3, 20.6, 53.7, 61.9], np.float32)
    black = np.zeros((3, 96, 96), np.float32)
    shapes.paint(black, box, shapes.SHAPES[name], np.full(3, 200, np.float32))
    area_px = (box[2] - box[0]) * (box[3] - box[1])
    # The light falls off to the lower right. All shapes are symmetric from left to right, but most
    # of the triangle is in the lower half, where it is dimmer.
    assert black[0].sum() / 200 == pytest.approx(AREAS[name] * area_px, rel=0.03)
    partial = (black[0] > 10) & (black[0] < 170)
    assert partial.any(), "edges should be anti-aliased"
    assert (black[:, ~mask(box, name)] <= 25.5).all()
    assert not black[:, :20].any() and not black[:, :, 54:].any()


def test_demo_backgrounds_are_smooth_and_of_low_contrast() -> None:
    for index in range(LENGTH):
        background = scene("demo", index)[2]
        rendered = background.round().clip(0, 255)
        assert rendered.std() <= 30 and rendered.std(axis=(1, 2)).max() <= 30
        assert rendered.std(axis=(1, 2)).max() > 2, "a texture, not a plain colour"
        assert max(np.abs(np.diff(background, axis=axis)).max() for axis in (1, 2)) < 8, "no edges"


def test_crowded_backgrounds_are_as_contrasty_as_the_objects() -> None:
    """By the root-mean-square distance from the mean colour of the background."""
    backgrounds, objects = [], []
    for index in range(LENGTH):
        _, _, background, colours = scene("crowded", index)
        mean = background.mean(axis=(1, 2))
        backgrounds.append(((background - mean[:, None, None]) ** 2).sum(axis=0).mean() ** 0.5)
        objects += list(((colours - mean) ** 2).sum(axis=1) ** 0.5)
    assert min(backgrounds) > 3**0.5 * 30, "each has more than demo may have"
    assert 0.75 < np.mean(backgrounds) / np.mean(objects) < 1.25


@LEVELS
def test_every_object_can_be_seen(level: str) -> None:
    """In the finished image: in its colour, unlike what is around it, not hidden under others."""
    for index in range(LENGTH):
        boxes, names, background, colours = scene(level, index)
        masks = [mask(box, name) for box, name in zip(boxes, names, strict=True)]
        image = images_of(level)[index][0].numpy().astype(np.float32)
        for i, colour in enumerate(colours):
            visible = masks[i] & ~np.any(masks[i + 1 :], axis=0) if masks[i + 1 :] else masks[i]
            assert visible.sum() > 0.1 * masks[i].sum()
            assert visible.sum() >= 15
            painted = np.median(image[:, visible], axis=1)
            assert np.linalg.norm(painted - colour) < 35, "shading must not change the colour much"
            others = np.vstack([background.mean(axis=(1, 2)), np.delete(colours, i, axis=0)])
            assert np.linalg.norm(others - colour, axis=1).min() > 65
            # It differs from the background that it covers.
            contrast = np.linalg.norm(background[:, masks[i]] - colour[:, None], axis=0)
            assert np.median(contrast) > 50


@LEVELS
def test_images_depend_on_level_split_and_index_alone(level: str) -> None:
    before = images_of(level)[:20]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    other = ShapesDataset(level, "train", 20)
    for index in reversed(range(20)):
        np.random.rand(3), torch.rand(3)
        image, target = other[index]
        assert torch.equal(image, before[index][0])
        assert torch.equal(target["boxes"], before[index][1]["boxes"])
        assert torch.equal(target["labels"], before[index][1]["labels"])
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    other[0], other.coco(), other.objects_per_image
    assert torch.equal(state[0], torch.get_rng_state()) and random.getstate() == state[2]
    assert np.array_equal(state[1], np.random.get_state()[1]), (
        "global generators must be left alone"
    )


def test_a_worker_process_draws_the_same_images() -> None:
    loader = torch.utils.data.DataLoader(
        ShapesDataset("demo", "train", 6),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
    )
    for (image, target), (expected, expected_target) in zip(
        loader, images_of("demo")[:6], strict=True
    ):
        assert torch.equal(image, expected)
        assert torch.equal(target["boxes"], expected_target["boxes"])


def test_changing_an_image_in_place_does_not_change_the_data_set() -> None:
    image, target = dataset("demo")[3]
    image.zero_(), target["boxes"].zero_(), target["labels"].zero_()
    again, target_again = dataset("demo")[3]
    assert again.any() and target_again["boxes"].any()


def test_splits_and_levels_share_no_seed_and_no_image() -> None:
    assert set(shapes.SEEDS) == set(itertools.product(PROMISED, ("train", "val", "tune")))
    assert len(set(shapes.SEEDS.values())) == 6
    seen = [
        image.numpy().tobytes()
        for level in PROMISED
        for s in ("train", "val", "tune")
        for image, _ in images_of(level, s)
    ]
    assert len(set(seen)) == len(seen) == 6 * LENGTH


@LEVELS
def test_coco_agrees_with_the_images(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset(level)
    coco = data.coco()
    assert capsys.readouterr().out == ""
    assert coco.getImgIds() == data.image_ids
    assert tuple(c["name"] for c in coco.loadCats(data.category_ids)) == data.class_names
    assert min(coco.anns) == 1 and len(coco.anns) == data.objects_per_image.sum()
    for index, (_, target) in enumerate(images_of(level)):
        info = coco.imgs[target["image_id"]]
        assert (info["height"], info["width"]) == target["size_hw"] and info["file_name"]
        anns = coco.imgToAnns[data.image_ids[index]]
        xyxy = v2.functional.convert_bounding_box_format(target["boxes"], new_format="XYWH").numpy()
        np.testing.assert_allclose([a["bbox"] for a in anns], xyxy, atol=1e-4)
        labels = [data.category_ids.index(a["category_id"]) for a in anns]
        assert labels == target["labels"].tolist()
        for a in anns:
            assert a["area"] == pytest.approx(a["bbox"][2] * a["bbox"][3])
            assert a["iscrowd"] == 0 and a["image_id"] == target["image_id"]


def test_transforms_see_image_and_boxes() -> None:
    data = ShapesDataset("demo", "train", 3, transforms=v2.RandomHorizontalFlip(p=1.0))
    flipped, target = data[2]
    image, plain = images_of("demo")[2]
    assert torch.equal(flipped, image.flip(-1))
    x1, y1, x2, y2 = plain["boxes"].unbind(dim=1)
    mirrored = torch.stack([96 - x2, y1, 96 - x1, y2], dim=1)
    assert torch.allclose(target["boxes"], mirrored) and target["size_hw"] == (96, 96)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("easy", "train", 3), ("easy", "demo", "crowded")),
        (("demo", "test", 3), ("test", "train", "val", "tune")),
        (("demo", "val", 0), ("length=0", "1 or more")),
        (("demo", "val", 2.0), ("length=2.0", "whole number")),
        (("demo", "val", True), ("length=True", "whole number")),
    ],
)
def test_bad_arguments_name_the_allowed_ones(arguments: tuple, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        ShapesDataset(*arguments)
    assert all(name in str(error.value) for name in names)


def test_indices_end_where_the_data_set_does() -> None:
    data = ShapesDataset("demo", "val", 3)
    assert len(list(data)) == 3  # Python's own iteration ends at the IndexError
    for index in (3, -1):
        with pytest.raises(IndexError, match="data set of 3"):
            data[index]

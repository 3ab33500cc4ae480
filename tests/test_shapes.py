"""Every promise of shapes.py, checked on a few hundred images of each level by other means."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import tv_tensors
from torchvision.ops import box_area, box_convert, box_iou
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
def test_targets_counts_and_classes(level: str) -> None:
    classes, most = PROMISED[level][:2]
    data = dataset(level)
    assert len(data) == LENGTH and data.sizes_hw.shape == (LENGTH, 2)
    assert len(set(data.class_names)) == len(data.category_ids) >= classes
    for index, (image, target) in enumerate(images_of(level)):
        assert image.shape[1:] == target["boxes"].canvas_size == target["size_hw"] == (96, 96)
        assert type(target["image_id"]) is int and target["image_id"] == data.image_ids[index]
        assert data.objects_per_image[index] == len(target["labels"]) == len(target["boxes"])
    # Counts and classes are uniform: a chi-squared test. The seed fixes its p value.
    counts = np.bincount(data.objects_per_image, minlength=most + 1)
    assert counts[0] == 0 and len(counts) == most + 1
    labels = torch.cat([target["labels"] for _, target in images_of(level)])
    for observed in (counts[1:], np.bincount(labels, minlength=len(data.class_names))):
        assert stats.chisquare(observed).pvalue > 1e-4


@LEVELS
def test_sizes_and_overlaps(level: str) -> None:
    """Large objects are not rarer than promised even in full images, where they hardly fit."""
    _, most, low, high, max_iou = PROMISED[level]
    expected = stats.loguniform(low, high) if level == "crowded" else stats.uniform(low, high - low)
    whs, full = [], []
    worst = most_hidden = 0.0
    rng = np.random.default_rng(0)
    for _ in range(1500):
        boxes = torch.from_numpy(shapes.draw_layout(rng, shapes.LEVELS[level])[0])
        assert (boxes >= 0).all() and (boxes <= 96).all()
        iou, area = box_iou(boxes, boxes).triu(diagonal=1), box_area(boxes)  # with later boxes
        shared = iou / (1 + iou) * (area[:, None] + area)  # (M, M) square pixels
        worst = max(worst, iou.max().item())
        most_hidden = max(most_hidden, (shared.sum(dim=1) / area).max().item())
        assert (area.diff() <= 1e-2).all(), "large objects come first"
        whs.append((boxes[:, 2:] - boxes[:, :2]).numpy())
        full += [whs[-1]] if len(boxes) == most else []
    assert 0.9 * max_iou < worst <= max_iou + 1e-5 and most_hidden < 0.75 + 1e-4
    widths, heights = np.concatenate(whs).T
    assert low - 1e-4 <= widths.min() < 1.02 * low and 0.98 * high < widths.max() <= high + 1e-4
    for sides in (widths, heights, np.concatenate(full).ravel()):
        assert stats.kstest(sides, expected.cdf).pvalue > 1e-4
    assert stats.spearmanr(widths, heights).pvalue > 1e-4  # they are independent


@LEVELS
def test_boxes_are_tight_and_amodal(level: str) -> None:
    for index in range(LENGTH):
        boxes, names, _, _ = scene(level, index)
        assert np.array_equal(boxes, images_of(level)[index][1]["boxes"].numpy())
        for box, name in zip(boxes, names, strict=True):
            ys, xs = np.nonzero(mask(box, name))
            extent = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(extent - box).max() < 1, (index, name, box, extent)


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
    """Also with edges between the pixels, which are anti-aliased: the coverage is the area."""
    box = np.array([10.3, 20.6, 53.7, 61.9], np.float32)
    black = np.zeros((3, 96, 96), np.float32)
    shapes.paint(black, box, shapes.SHAPES[name], np.full(3, 200, np.float32))
    area_px = (box[2] - box[0]) * (box[3] - box[1])
    # The light falls off to the lower right. All shapes are symmetric from left to right, but most
    # of the triangle is in the lower half, where it is dimmer.
    assert black[0].sum() / 200 == pytest.approx(AREAS[name] * area_px, rel=0.03)


def test_demo_backgrounds_are_smooth_and_crowded_ones_as_contrasty_as_the_objects() -> None:
    """Contrast is the root-mean-square distance from the mean colour of the background."""
    contrast = []
    for index in range(LENGTH):
        background = scene("demo", index)[2]
        assert 2 < background.round().clip(0, 255).std(axis=(1, 2)).max() <= 30
        assert max(np.abs(np.diff(background, axis=axis)).max() for axis in (1, 2)) < 8, "no edges"
        _, _, background, colours = scene("crowded", index)
        mean = background.mean(axis=(1, 2))
        own = ((background - mean[:, None, None]) ** 2).sum(axis=0).mean() ** 0.5
        contrast += [(own, distance) for distance in np.linalg.norm(colours - mean, axis=1)]
        for i, colour in enumerate(colours):  # of objects: unlike the background and one another
            others = np.vstack([mean, np.delete(colours, i, axis=0)])
            assert np.linalg.norm(others - colour, axis=1).min() > 65
    backgrounds, objects = np.array(contrast).T
    assert backgrounds.min() > 3**0.5 * 30, "each has more than demo may have"
    assert 0.75 < backgrounds.mean() / objects.mean() < 1.25


@LEVELS
def test_images_depend_on_level_split_and_index_alone(level: str) -> None:
    other = ShapesDataset(level, "train", 20)
    for index in reversed(range(20)):
        image, target = other[index]
        expected, expected_target = images_of(level)[index]
        assert torch.equal(image, expected)
        assert torch.equal(target["boxes"], expected_target["boxes"])
        assert torch.equal(target["labels"], expected_target["labels"])


def test_splits_and_levels_share_no_image() -> None:
    names = set(itertools.product(PROMISED, ("train", "val", "tune")))
    assert set(shapes.SEEDS) == names
    images = {image.numpy().tobytes() for name in names for image, _ in images_of(*name)}
    assert len(images) == 6 * LENGTH


@LEVELS
def test_coco_agrees_with_the_images(level: str) -> None:
    data = dataset(level)
    coco = data.coco()
    assert tuple(c["name"] for c in coco.loadCats(data.category_ids)) == data.class_names
    assert min(coco.anns) == 1 and len(coco.anns) == data.objects_per_image.sum()
    for image_id, (_, target) in zip(coco.getImgIds(), images_of(level), strict=True):
        assert image_id == target["image_id"]
        anns = coco.imgToAnns[image_id]
        xywh = box_convert(target["boxes"].as_subclass(torch.Tensor), "xyxy", "xywh")
        np.testing.assert_allclose([a["bbox"] for a in anns], xywh, atol=1e-4)
        assert [a["category_id"] - 1 for a in anns] == target["labels"].tolist()
        areas = [a["bbox"][2] * a["bbox"][3] for a in anns]
        assert [a["area"] for a in anns] == areas and not any(a["iscrowd"] for a in anns)


def test_a_data_set_has_an_image_and_ends() -> None:
    with pytest.raises(UserError, match="0 images of demo"):
        ShapesDataset("demo", "val", 0)
    flipped = ShapesDataset("demo", "train", 3, transforms=v2.RandomHorizontalFlip(p=1.0))
    for (image, _), (expected, _) in zip(list(flipped), images_of("demo")[:3], strict=True):
        assert torch.equal(image, expected.flip(-1))  # Python's iteration ends at the IndexError

"""data.py on small files made here: what goes wrong is named, and boxes follow the pixels that they enclose."""

import json
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
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
from data import CocoDataset, check_data, make_dataset
from shapes import ShapesDataset
from support.errors import UserError
from support.loader import collate
from support.pictures import read_image

W, H = 64, 48
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
Raw = dict[str, Any]


def box(number: int, image: int, category: int, *xywh: float, **more: Any) -> Raw:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(xywh), **more}


def example() -> Raw:
    """Three images, of ids in no order, the second without objects; odd category ids; a crowd; a box over the edge."""
    sizes = {"width": W, "height": H}
    return {
        "images": [
            {"id": 30, "file_name": "a.png", **sizes},
            {"id": -4, "file_name": "b.png", **sizes},
        ]
        + [{"id": 10, "file_name": "sub/c.png", **sizes}],
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


def write(folder: Path, raw: Any) -> Path:
    file = folder / "labels.json"
    file.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (W, H), (9, 99, 199)).save(tmp_path / name)
    return tmp_path


def load(folder: Path, raw: Raw, **options: Any) -> CocoDataset:
    return CocoDataset(write(folder, raw), folder, **options)


# --- what comes out ---


def test_labels_boxes_and_attributes(folder: Path) -> None:
    dataset = load(folder, example())
    assert dataset.class_names == ("cat", "bee", "owl") and dataset.category_ids == (-3, 7, 1000)
    assert list(dataset.image_ids) == [30, -4, 10] and list(dataset.file_names) == [
        "a.png",
        "b.png",
        "sub/c.png",
    ]
    assert dataset.sizes_hw.tolist() == [[H, W]] * 3 and dataset.objects_per_image.tolist() == [
        1,
        0,
        2,
    ]
    assert len(dataset) == 3 == sum(1 for _ in dataset)
    # The crowd is gone, the box over the left and lower edges is clipped to them.
    expected = [
        ([[1.5, 2.25, 11.5, 22.25]], [2]),
        ([], []),
        ([[5, 6, 25, 16], [0, 40, 20, 48]], [1, 0]),
    ]
    for index, (boxes, labels) in enumerate(expected):
        image, target = dataset[index]
        assert (
            type(image) is tv_tensors.Image
            and image.shape == (3, H, W)
            and image.dtype == torch.uint8
        )
        assert image[:, 20, 30].tolist() == [9, 99, 199]
        assert type(target["boxes"]) is tv_tensors.BoundingBoxes and target[
            "boxes"
        ].canvas_size == (H, W)
        assert torch.equal(
            target["boxes"].as_subclass(Tensor), torch.tensor(boxes).reshape(-1, 4).float()
        )
        assert target["labels"].tolist() == labels and target["labels"].dtype == torch.int64
        assert target["image_id"] == [30, -4, 10][index] and target["size_hw"] == (H, W)
    assert torch.equal(dataset[-1][1]["boxes"], dataset[2][1]["boxes"])


def test_a_target_is_a_copy(folder: Path) -> None:
    dataset = load(folder, example())
    dataset.target(0)["boxes"].mul_(0)
    dataset.target(0)["labels"].zero_()
    assert (
        dataset.target(0)["boxes"].tolist() == [[1.5, 2.25, 11.5, 22.25]]
        and dataset.target(0)["labels"] == 2
    )


def test_classes_are_matched_by_name(folder: Path) -> None:
    dataset = load(folder, example(), class_names=["owl", "cat", "bee"])
    assert dataset.class_names == ("owl", "cat", "bee") and dataset.category_ids == (1000, -3, 7)
    assert dataset.target(0)["labels"].tolist() == [0] and dataset.target(2)["labels"].tolist() == [
        2,
        1,
    ]
    for names, words in [
        (["owl", "cat"], "new ['bee']"),
        (["owl", "cat", "bee", "elk"], "missing ['elk']"),
    ]:
        with pytest.raises(UserError) as caught:
            load(folder, example(), class_names=names)
        for part in ("labels.json", words, str(names), "['cat', 'bee', 'owl']"):
            assert part in str(caught.value)


def test_no_annotations_at_all(folder: Path) -> None:
    dataset = load(folder, {**example(), "annotations": []})
    assert [len(target["boxes"]) for _, target in dataset] == [0, 0, 0] and dataset.target(1)[
        "boxes"
    ].shape == (0, 4)
    assert len(dataset.coco().getImgIds()) == 3


def test_degenerate_boxes_give_one_warning(folder: Path) -> None:
    raw = example()
    raw["annotations"] += [
        box(21, 30, 7, 1, 1, 0, 5),
        box(22, 30, 7, 1, 1, 5, -2),
        box(23, 30, 7, 1, 1, 0, 0),
    ]
    raw["annotations"] += [
        box(24, 30, 7, W, 3, 9, 9),
        box(25, 30, 7, 1, -9, 9, 9),
        box(26, 30, 7, 1, 1, 0, 1),
    ]
    raw["annotations"] += [box(27, 30, 7, 1, 1, 0, 0, iscrowd=1), box(28, 30, 7, 1, 1, 0.01, 0.01)]
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
    assert (
        coco.loadRes(
            [{"image_id": 30, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1.0}]
        ).dataset["info"]
        == {}
    )
    assert (folder / "labels.json").read_bytes() == before


def test_coco_counts_a_match_with_annotation_zero(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {**example(), "annotations": [box(0, 30, 7, 5, 5, 20, 20)]}
    coco = load(folder, raw).coco()
    found = coco.loadRes([{"image_id": 30, "category_id": 7, "bbox": [5, 5, 20, 20], "score": 1.0}])
    evaluation = COCOeval(coco, found, "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    assert evaluation.stats[0] == pytest.approx(1)


# --- what is wrong with the JSON ---


def change(path: str, value: Any) -> Callable[[Raw], None]:
    """Sets raw[a][b][c] for the path "a.b.c"; the value ... deletes it."""

    def apply(raw: Raw) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        node: Any = raw
        for key in parents:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return apply


MISTAKES = [
    *[
        (f"images.1.{key}", ..., f'images[1]|"{key}" is missing')
        for key in ("id", "file_name", "width", "height")
    ],
    *[(f"categories.2.{key}", ..., f'categories[2]|"{key}" is missing') for key in ("id", "name")],
    *[
        (f"annotations.1.{k}", ..., f'[1]|"{k}" is missing')
        for k in ("id", "image_id", "category_id", "bbox")
    ],
    *[(name, ..., f'no list "{name}"') for name in ("images", "categories", "annotations")],
    *[(name, {}, f'no list "{name}"') for name in ("images", "categories", "annotations")],
    *[(name, [], f'empty|no "{name}"') for name in ("images", "categories")],
    *[
        (f"{name}.0", 5, f"{name}[0]|5 should be an object")
        for name in ("images", "categories", "annotations")
    ],
    ("images.1.id", "12", "images[1] (id '12')|\"id\" is '12'|integer"),
    ("images.1.id", 2**63, f"images[1]|{2**63}|integer"),
    ("images.1.id", True, "images[1]|True|integer"),
    ("images.1.width", 64.0, 'images[1] (id -4)|"width" is 64.0'),
    ("images.1.height", 0, 'images[1] (id -4)|"height" is 0'),
    ("images.1.height", None, 'images[1] (id -4)|"height" is None'),
    ("images.1.file_name", 3, 'images[1] (id -4)|"file_name" is 3'),
    ("images.1.file_name", "", "images[1] (id -4)|\"file_name\" is ''"),
    ("images.2.id", 30, 'images[2] (id 30)|same "id"'),
    ("categories.1.id", None, 'categories[1]|"id" is None'),
    ("categories.1.id", 7, 'categories[2] (id 7)|same "id"'),
    ("categories.1.name", 7, 'categories[1] (id -3)|"name" is 7'),
    ("categories.1.name", "bee", 'categories[2] (id 7)|same "name", bee'),
    ("annotations.3.id", 11, 'annotations[3] (id 11)|same "id"'),
    ("annotations.3.id", [11], 'annotations[3]|"id" is [11]'),
    (
        "annotations.2.image_id",
        31,
        'annotations[2] (id 13)|"image_id" 31 is not listed in "images"',
    ),
    ("annotations.2.image_id", "10", "annotations[2] (id 13)|\"image_id\" is '10'"),
    (
        "annotations.2.category_id",
        0,
        'annotations[2] (id 13)|"category_id" 0 is not listed in "categories"',
    ),
    ("annotations.2.category_id", 7.0, 'annotations[2] (id 13)|"category_id" is 7.0'),
    ("annotations.2.bbox", [1, 2, 3], "annotations[2] (id 13)|[1, 2, 3]|4 finite numbers"),
    ("annotations.2.bbox", "1 2 3 4", "annotations[2] (id 13)|1 2 3 4|4 finite numbers"),
    ("annotations.2.bbox", [1, 2, "3", 4], "annotations[2] (id 13)|'3'|4 finite numbers"),
    ("annotations.2.bbox", [1, 2, float("nan"), 4], "annotations[2] (id 13)|nan|4 finite numbers"),
    ("annotations.2.bbox", [float("inf"), 2, 3, 4], "annotations[2] (id 13)|inf|4 finite numbers"),
    ("annotations.2.bbox", [1, 2, 3, 10**400], "annotations[2] (id 13)|4 finite numbers"),
    ("annotations.2.iscrowd", "no", "annotations[2] (id 13)|\"iscrowd\" is 'no'"),
    ("annotations.2.iscrowd", 2, 'annotations[2] (id 13)|"iscrowd" is 2'),
]


@pytest.mark.parametrize(
    ("path", "value", "words"), MISTAKES, ids=[f"{m[0]}={str(m[1])[:12]}" for m in MISTAKES]
)
def test_mistakes_in_the_json_are_named(folder: Path, path: str, value: Any, words: str) -> None:
    raw = example()
    change(path, value)(raw)
    with pytest.raises(UserError) as caught:
        load(folder, raw)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(folder / "labels.json"))
    for part in words.split("|"):
        assert part in message


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"images": [1,]}', "[" * 100_000])
def test_not_json(folder: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"labels\.json: is not JSON"):
        load(folder, text)


def test_detections_are_no_annotations(folder: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.json: holds no list"):
        load(folder, [{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}])


def test_missing_files(folder: Path) -> None:
    file = write(folder, example())
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read \(No such file"):
        CocoDataset(folder / "nowhere.json", folder)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        CocoDataset(folder, folder)
    with pytest.raises(UserError, match="nofolder: there is no such folder"):
        CocoDataset(file, folder / "nofolder")
    (folder / "b.png").unlink()
    (folder / "sub/c.png").unlink()
    with pytest.raises(
        UserError,
        match=r"2 of the 3 image files listed in .*labels\.json are missing.* first is b\.png",
    ):
        CocoDataset(file, folder)


# --- pictures ---


def gradient(channels: int = 3) -> np.ndarray:
    """(H, W, channels) uint8, a different ramp in every channel and nothing symmetric."""
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 3, y * 4, x + 2 * y, 255 - x], axis=-1)[..., :channels].astype(np.uint8)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits a channel, which Pillow writes for grey only; pixels (H, W, 3) uint16."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def hwc(image: Tensor) -> np.ndarray:
    assert type(image) is tv_tensors.Image and image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def test_pictures_become_rgb(tmp_path: Path) -> None:
    rgb, grey = gradient(), gradient()[..., :1].repeat(3, axis=2)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.webp", lossless=True)
    Image.fromarray(gradient(4)).save(tmp_path / "rgba.png")
    write_png16(tmp_path / "rgb16.png", rgb.astype(np.uint16) * 257)
    Image.fromarray(grey[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(grey[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for name in ("rgb.png", "rgb.webp", "rgba.png", "rgb16.png"):
        assert np.array_equal(hwc(read_image(tmp_path / name)), rgb), name
    for name in ("grey.png", "grey16.png"):
        assert np.array_equal(hwc(read_image(tmp_path / name)), grey), name
    palette = COLOURS[(np.arange(H * W) % 3).reshape(H, W)].astype(np.uint8)
    Image.fromarray(palette).quantize(3).save(tmp_path / "palette.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert np.array_equal(hwc(read_image(tmp_path / "palette.png")), palette)


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    Image.fromarray(gradient()).save(tmp_path / name, exif=exif, quality=100)
    difference = hwc(read_image(tmp_path / name)).astype(int) - np.rot90(gradient(), -1)
    assert abs(difference).mean() < 3
    # The stored size in the JSON is refused, the size as shown accepted.
    raw = {
        **example(),
        "images": [{"id": 1, "file_name": name, "width": W, "height": H}],
        "annotations": [],
    }
    with pytest.raises(
        UserError, match=rf"{name}: is {H} x {W} pixels, but {W} x {H} in .*labels.json.*EXIF"
    ):
        load(tmp_path, raw)[0]
    raw["images"][0] |= {"width": H, "height": W}
    assert load(tmp_path, raw)[0][0].shape == (3, W, H)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    return cut(content) + bytes(len(content) - len(content) // 2)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BROKEN = [
    ("jpg", cut, "truncated"),
    ("jpg", zeroed, "truncated"),  # as an interrupted download leaves it
    ("png", cut, "truncated"),
    ("png", zeroed, ""),
    ("png", flipped, ""),  # torchvision's decoder ends the process on this one
    ("webp", cut, ""),
    ("jpg", lambda content: b"", "the file is empty"),
    ("jpg", lambda content: b"<html>Not found</html>", "not a known picture format"),
]


@pytest.mark.parametrize(("suffix", "damage", "words"), BROKEN)
def test_broken_pictures(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)).save(path)
    read_image(path)
    path.write_bytes(path.read_bytes() + b"\0\0padding")
    read_image(path)  # a few bytes after the end do no harm
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as a picture (") and words in str(
        caught.value
    )


def test_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be read as a picture \(No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="Is a directory"):
        read_image(tmp_path)


def test_check_data_lists_all_unusable_pictures(folder: Path) -> None:
    dataset = load(folder, example())
    check_data(dataset)
    (folder / "a.png").write_bytes(b"")
    Image.new("RGB", (W, H + 1)).save(folder / "sub/c.png")
    with pytest.raises(UserError) as caught:
        check_data(dataset)
    for part in (
        "2 of 3 images",
        "a.png: cannot be read as a picture (the file is empty)",
        f"c.png: is {W} x {H + 1}",
    ):
        assert part in str(caught.value)
    assert "b.png" not in str(caught.value)


# --- augmentation ---


def painted(
    width: int, height: int, boxes: list[tuple[int, int, int, int]]
) -> tuple[Tensor, data.Target]:
    """A black picture with the k-th box (whole xyxy pixels, none over another) filled with the k-th colour."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, COLOURS, strict=False):
        pixels[y1:y2, x1:x2] = colour
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    xyxy = tv_tensors.BoundingBoxes(
        torch.tensor(boxes).float(), format="XYXY", canvas_size=(height, width)
    )
    return image, {
        "boxes": xyxy,
        "labels": torch.arange(len(boxes)),
        "image_id": 1,
        "size_hw": (height, width),
    }


def extent(image: Tensor, label: int) -> list[float] | None:
    """xyxy of the pixels of the label's colour."""
    ys, xs = torch.nonzero(image[label] > 127, as_tuple=True)
    return (
        [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]
        if len(xs)
        else None
    )


CONFIGS = {
    "plain": Config(flip=False),
    "flip": Config(flip=True),
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
        assert target["boxes"].canvas_size == tuple(image.shape[1:]) and target["size_hw"] == (
            height,
            width,
        )
        found = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True))
        for label in range(3):
            seen = extent(image, label)
            if seen is None:  # cropped away, or down to a sliver that the resize blurred
                x1, y1, x2, y2 = found.get(label, (0, 0, 0, 0))
                assert min(x2 - x1, y2 - y1) < 2
            else:
                assert np.abs(np.array(seen) - found[label]).max() <= 1.5
            where["gone" if seen is None else "there"] += 1
        where["mirrored"] += bool(0 in found and 1 in found and found[0][0] > found[1][0])
    assert where["there"] > where["gone"]
    assert (where["gone"] > 0) == (name == "crop")
    assert (where["mirrored"] > 0) == (name != "plain")


def test_sizes_of_the_recipe() -> None:
    torch.manual_seed(0)
    config, shortest = PRESETS["r50-100"], set()
    for width, height in [(640, 480), (427, 640), (640, 97), (333, 500), (49, 49), (7, 3000)] * 12:
        for transform, sizes in (
            (data.train_transforms(config), config.min_sizes),
            (data.eval_transforms(config), (800,)),
        ):
            new_h, new_w = transform(*painted(width, height, [(0, 0, 5, 5)]))[0].shape[1:]
            scale = min(new_w, new_h) / min(width, height)
            if max(new_w, new_h) == 1333:
                assert min(new_w, new_h) <= max(sizes)
                assert min(new_w, new_h) == int(
                    min(width, height) * 1333 / max(width, height) + 0.5
                )
            else:  # exactly: truncation would make some of them a pixel less
                assert min(new_w, new_h) in sizes and max(new_w, new_h) < 1333
                assert max(new_w, new_h) == int(max(width, height) * scale + 0.5)
                shortest.add(min(new_w, new_h))
    assert shortest == set(config.min_sizes)


def test_a_sixtieth_pixel_is_kept_and_nothing_is_not() -> None:
    image, target = painted(60, 60, [(0, 0, 5, 5), (7, 7, 9, 7), (8, 8, 9, 9)])
    target["boxes"][2, 2:] = 8 + 1 / 60
    new_image, new_target = data.drop_degenerate(image, target)
    assert (
        new_image is image and new_target["labels"].tolist() == [0, 2] and len(target["boxes"]) == 3
    )
    assert torch.equal(new_target["boxes"], target["boxes"][[0, 2]])
    assert new_target["boxes"].canvas_size == (60, 60) and new_target["image_id"] == 1


def test_crops_of_the_recipe() -> None:
    """Before the last resize: half of the images untouched, others cut to 384-600 pixels a side, anywhere."""
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


# --- batches ---


def test_batches_are_lists_as_images_differ_in_size(folder: Path) -> None:
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
        check_data(train)


def test_coco_in_its_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        make_dataset(Config(), "train")
    parts = [
        "datasets/coco/annotations/instances_train2017.json",
        "https://cocodataset.org/#download",
        "train2017.zip",
    ]
    for part in [
        *parts,
        "val2017.zip",
        "annotations_trainval2017.zip",
        "make demo",
        "--train-json",
    ]:
        assert part in str(caught.value)
    for split, name in (("train", "a.png"), ("val", "b.png")):
        (images := tmp_path / f"datasets/coco/{split}2017").mkdir(parents=True)
        Image.new("RGB", (W, H)).save(images / name)
        (annotations := tmp_path / "datasets/coco/annotations").mkdir(exist_ok=True)
        raw = {
            **example(),
            "images": [{"id": 1, "file_name": name, "width": W, "height": H}],
            "annotations": [],
        }
        (annotations / f"instances_{split}2017.json").write_text(json.dumps(raw))
        assert make_dataset(Config(), split).file_names.tolist() == [name]

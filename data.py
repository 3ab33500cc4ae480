"""Data sets in COCO's format, and the augmentation of the recipe.

In: a JSON file in COCO's format and the folder of its images. Out: pairs (image, target).

    image   (3, H, W) uint8 RGB, 0–255. The model normalises and pads; see model.py.
    target  boxes     (M, 4) float32, xyxy in pixels
            labels    (M,) int64 from 0. There is no background class, unlike in torchvision.
            image_id  int, the image's id in the JSON
            size_hw   (height, width) of the image file, before transforms

Training follows the authors' configuration for COCO: the shortest side of an image becomes one of
480, 512, … 800 pixels, but the longest at most 1333, and half of the images are flipped. For the
paper's starred models half of the images are cropped first (paper, Table 1). Evaluation resizes
to 800/1333.

Shapes: M objects of an image, T objects of all images, K classes.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from config import Config
from shapes import ShapesDataset
from support import coco_json
from support.errors import UserError
from support.pictures import read_image

Target = dict[str, Any]
Transforms = Callable[[Tensor, Target], tuple[Tensor, Target]] | None
AnyPath = str | os.PathLike[str]

COCO_FOLDER = Path("datasets/coco")
TINY_PX = 4  # a shorter object covers less than one cell of p2
MIN_SIDE_PX = 1e-5  # boxes this thin or thinner are left out (authors' code)


# --- images and boxes ---


class CocoDataset(Dataset):
    """Images and boxes of a file in COCO's format.

    Images without objects are kept. Crowds are not trained on. Boxes without area, which real data
    has, are left out with a warning.

    The annotations are packed into arrays: the workers of a DataLoader would copy Python objects
    one by one, just by counting references to them.

    Args:
        json_file: the annotations.
        image_dir: the folder that the file names in it are relative to.
        transforms: a callable on (image, target), such as those of `train_transforms`.
        class_names: K names in the order of the labels, which the file's categories are matched
            to. By default the classes are the file's own, ordered by category id.
        allow_missing_classes: accept a file that lacks some of `class_names`.
        ignore_new_classes: leave out the objects of classes that are not among `class_names`.

    Attributes:
        class_names: K names; label k stands for the k-th.
        category_ids: their K ids in this file, None for a class that it lacks.
        image_ids: (len,) int64.
        file_names: (len,) str, relative to `image_dir`.
        sizes_hw: (len, 2) int64, height and width of each image file in pixels.
        objects_per_image: (len,) int64.
        num_crowds: annotations that are left out because they are crowds.
        notes: what a user should know about this file, one line each.

    Raises:
        UserError: a file is missing, the JSON is not in COCO's format, or its classes are not
            `class_names`.
    """

    def __init__(
        self,
        json_file: AnyPath,
        image_dir: AnyPath,
        transforms: Transforms = None,
        class_names: Sequence[str] | None = None,
        allow_missing_classes: bool = False,
        ignore_new_classes: bool = False,
    ) -> None:
        self.json_file = str(json_file)
        self.image_dir = str(image_dir)
        self.transforms = transforms

        # The parsed file is not kept; `coco`, which is rarely needed, reads it again.
        file = coco_json.read_coco(self.json_file)
        self.image_ids = np.array([image.id for image in file.images])
        names = [image.file_name for image in file.images]
        self.file_names = np.array(coco_json.find_files(self.image_dir, names, self.json_file))
        own_notes = coco_json.notes_on_annotations(self.json_file, file)
        for image, name in zip(file.images, self.file_names, strict=True):
            if None in (image.height, image.width):
                picture = read_image(os.path.join(self.image_dir, name))
                image.height, image.width = picture.shape[1:]
        self.sizes_hw = np.array([(image.height, image.width) for image in file.images])
        self.class_names, self.category_ids, notes = coco_json.find_classes(
            self.json_file, file, class_names, allow_missing_classes, ignore_new_classes
        )
        self.notes = (*notes, *own_notes)
        self._pack(*coco_json.pack_objects(self.json_file, file))

    def _pack(
        self, rows: np.ndarray, category_ids: np.ndarray, xywh: np.ndarray, is_crowd: np.ndarray
    ) -> None:
        """Sets the arrays that `target` reads, and warns of boxes that are not objects."""
        labels = coco_json.index_of(category_ids.tolist(), self.category_ids)
        is_known = labels >= 0
        rows, labels, xywh, is_crowd = (x[is_known] for x in (rows, labels, xywh, is_crowd))
        self.num_crowds = int(is_crowd.sum())

        # A box may have no area to begin with, or none once it is clipped to its image.
        whwh_px = np.tile(self.sizes_hw[rows][:, ::-1], 2)  # (T, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        xyxy = xyxy.clip(0, whwh_px).astype(np.float32)
        is_flat = (xywh[:, 2:] <= MIN_SIDE_PX).any(axis=1) & ~is_crowd
        is_outside = (xyxy[:, 2:] - xyxy[:, :2] <= MIN_SIDE_PX).any(axis=1) & ~is_crowd & ~is_flat
        if is_flat.any() or is_outside.any():
            warnings.warn(
                f"{self.json_file}: left out {is_flat.sum()} boxes of zero or negative width or "
                f"height, and of training {is_outside.sum()} wholly outside of their images",
                stacklevel=3,
            )
        is_box = ~is_crowd & ~is_flat
        coco_json.check_box_form(self.json_file, xywh[is_box], whwh_px[is_box, :2])

        kept = np.argsort(rows, kind="stable")  # image by image, in the order of the file
        kept = kept[(is_box & ~is_outside)[kept]]
        self._boxes, self._labels = xyxy[kept], labels[kept]
        coco_json.warn_of_copies(self.json_file, rows[kept], self._labels, self._boxes)
        self.objects_per_image = np.bincount(rows[kept], minlength=len(self))
        self._ends = np.cumsum(self.objects_per_image)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """An image and its target after `transforms`; see the top of this file."""
        image, target = self.image(index), self.target(index)
        if self.transforms is None:
            return image, target
        return self.transforms(image, target)

    def image(self, index: int) -> tv_tensors.Image:
        """An image before transforms, (3, H, W) uint8.

        Raises:
            UserError: the file is broken, or its size is not the one in the JSON.
        """
        path = os.path.join(self.image_dir, self.file_names[index])
        image = read_image(path)
        height, width = self.sizes_hw[index].tolist()
        if image.shape[1:] != (height, width):
            raise UserError(
                f"{path}: is {image.shape[2]} x {image.shape[1]} pixels, but {width} x {height} in "
                f"{self.json_file}; correct the JSON (sizes and boxes are those after EXIF "
                "orientation)"
            )
        return image

    def target(self, index: int) -> Target:
        """A target before transforms. The image is not decoded."""
        size_hw = tuple(self.sizes_hw[index].tolist())
        objects = slice(self._ends[index] - self.objects_per_image[index], self._ends[index])
        boxes_px = torch.tensor(self._boxes[objects])  # (M, 4), a copy
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes_px, format="XYXY", canvas_size=size_hw),
            "labels": torch.tensor(self._labels[objects]),
            "image_id": int(self.image_ids[index]),
            "size_hw": size_hw,
        }

    def coco(self) -> COCO:
        """The ground truth for pycocotools: all boxes of the classes with an area, crowds too."""
        return coco_json.ground_truth(coco_json.read_coco(self.json_file), self.category_ids)


# --- transforms ---


class ShortestSize(v2.RandomShortestSize):
    """Resizes the shortest side to one of several sizes, keeping the aspect ratio.

    Sizes are rounded as in detectron2. torchvision truncates them, to 479 instead of 480 if the
    ratio is inexact, or even to 0. Its antialiased bilinear resize differs from Pillow's, which the
    authors use, by at most 1 of 255 levels where compared.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = F.get_size(flat_inputs[0])  # height, width
        scale = self.min_size[int(torch.randint(len(self.min_size), ()))] / min(sides)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(sides))
        return {"size": [max(1, int(side * scale + 0.5)) for side in sides]}


def random_size_crop(
    image: Tensor, target: Target, sizes_px: tuple[int, int] = (384, 600)
) -> tuple[Tensor, Target]:
    """Cuts out a window: each side is uniform within `sizes_px`, its place uniform in the image.

    A smaller image limits the window. This is detectron2's
    "absolute_range", with the authors' sizes.
    """
    low, high = sizes_px
    full_h, full_w = image.shape[-2:]
    height = int(torch.randint(min(full_h, low), min(full_h, high) + 1, ()))
    width = int(torch.randint(min(full_w, low), min(full_w, high) + 1, ()))
    top = int(torch.randint(full_h - height + 1, ()))
    left = int(torch.randint(full_w - width + 1, ()))

    image = F.crop(image, top, left, height, width)
    boxes = F.crop(target["boxes"], top, left, height, width)  # also clips them
    return image, {**target, "boxes": boxes}


def drop_degenerate(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Removes boxes without area, which a crop leaves, and their labels.

    v2.SanitizeBoundingBoxes would also remove boxes of less than a pixel.
    """
    boxes = target["boxes"]
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE_PX).all(dim=1)  # (M,)
    boxes = tv_tensors.wrap(boxes[kept], like=boxes)
    return image, {**target, "boxes": boxes, "labels": target["labels"][kept]}


def train_transforms(config: Config) -> v2.Compose:
    """The augmentation of the recipe.

    The authors flip before they resize. The draws are independent, so the result is the same.
    """
    crop = v2.RandomApply(
        [
            ShortestSize(config.crop_resize),
            partial(random_size_crop, sizes_px=config.crop_sizes),
        ],
        p=0.5 if config.crop else 0.0,
    )
    steps = [
        crop,
        ShortestSize(config.min_sizes, config.max_size),
        v2.RandomHorizontalFlip(0.5 if config.flip else 0.0),
    ]
    # Left out rather than given a probability of 0, which would draw a random number as well;
    # runs of the paper's recipe should not depend on an option that is not in it.
    if config.flip_vertical:
        steps.append(v2.RandomVerticalFlip(0.5))
    if config.color_jitter:
        jitter = config.color_jitter
        steps.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    return v2.Compose([*steps, drop_degenerate])


def eval_transforms(config: Config) -> v2.Compose:
    """Resizes to the size of evaluation; nothing is random."""
    return v2.Compose([ShortestSize((config.eval_size,), config.max_size)])


# --- which data ---


def make_dataset(
    config: Config,
    split: str,
    class_names: Sequence[str] | None = None,
    transforms: Transforms = None,
    ignore_new_classes: bool = False,
) -> CocoDataset | ShapesDataset | None:
    """The data that a config names: your own files if it has any, else Shapes or COCO.

    Args:
        config: its data settings are used.
        split: "train" or "val".
        class_names: the classes in the order of the labels; by default the data's own. Validation
            data may lack some of them.
        transforms: by default those for training or for evaluation.
        ignore_new_classes: leave out objects of classes that are not among `class_names`.

    Returns:
        None if `split` is "val" and only training data of your own is given.

    Raises:
        UserError: a flag or a file is missing, or the classes differ.
    """
    if transforms is None:
        transforms = train_transforms(config) if split == "train" else eval_transforms(config)
    json_file = getattr(config, f"{split}_json")
    folder = getattr(config, f"{split}_images")
    if (json_file is None) != (folder is None):
        missing = "json" if json_file is None else "images"
        raise UserError(
            f"--{split}-{missing} is missing; --{split}-json and --{split}-images go together"
        )
    if json_file is None and split == "val" and config.train_json is not None:
        return None

    if json_file is None and config.data != "coco":
        level = config.data.removeprefix("shapes-")
        length = config.shapes_train if split == "train" else config.shapes_val
        shapes = ShapesDataset(level, split, length, transforms)
        if class_names is not None and tuple(class_names) != shapes.class_names:
            raise UserError(
                f"{config.data}: its classes {shapes.class_names} are not the model's "
                f"{tuple(class_names)}; give other data"
            )
        return shapes

    if json_file is None:
        json_file, folder = _coco_files(split)
    return CocoDataset(
        json_file,
        folder,
        transforms,
        class_names,
        allow_missing_classes=split == "val",
        ignore_new_classes=ignore_new_classes,
    )


def _coco_files(split: str) -> tuple[Path, Path]:
    json_file = COCO_FOLDER / f"annotations/instances_{split}2017.json"
    folder = COCO_FOLDER / f"{split}2017"
    for path in (json_file, folder):
        if not path.exists():
            raise UserError(
                f"{path}: not found; unpack train2017.zip, val2017.zip and "
                f"annotations_trainval2017.zip from https://cocodataset.org/#download in "
                f"{COCO_FOLDER}, or give --{split}-json FILE and --{split}-images FOLDER; "
                "`make demo` needs no files"
            )
    return json_file, folder


def validation_set(
    checkpoint: dict[str, Any], ignore_new_classes: bool = False, **overrides: Any
) -> CocoDataset | ShapesDataset:
    """The data that a model is evaluated on, by default that of its training.

    Args:
        checkpoint: of `load_model`.
        ignore_new_classes: leave out objects of classes that the model does not have.
        overrides: settings that replace those of the checkpoint's config, unless they are None.

    Raises:
        UserError: as `make_dataset`, or there is nothing to evaluate on.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if ("val_json" in given) != ("val_images" in given):  # the other one would be of other data
        raise UserError("--val-json and --val-images go together; give both or neither")
    config = replace(checkpoint["config"], **given)
    dataset = make_dataset(
        config, "val", checkpoint["class_names"], ignore_new_classes=ignore_new_classes
    )
    if dataset is None:
        raise UserError("the checkpoint names no validation data; give --val-json and --val-images")
    return dataset


# --- checks before training ---


def require_objects(dataset: CocoDataset | ShapesDataset) -> None:
    """Refuses training data from which nothing can be learned.

    Raises:
        UserError: there are no objects; names the crowds if there are any.
    """
    if not dataset.objects_per_image.any():
        raise UserError(
            f"{dataset.json_file}: no objects in the training images, so there is nothing to learn "
            f"from ({dataset.num_crowds} annotations are crowds, which are not trained on)"
        )


def notes_on_data(dataset: CocoDataset | ShapesDataset, config: Config) -> list[str]:
    """What the settings make of a data set, if a user may not expect it; one line each."""
    if isinstance(dataset, ShapesDataset) or not dataset.objects_per_image.any():
        return []
    notes = []
    rows = np.repeat(np.arange(len(dataset)), dataset.objects_per_image)  # (T,)
    objects = rows * len(dataset.class_names) + dataset._labels
    if (most := int(np.unique(objects, return_counts=True)[1].max())) > config.max_dets:
        notes.append(
            f"up to {most} objects of a class per image, of which {config.max_dets} detections "
            f"count: perfect boxes would not reach AP 100; give --max-dets {most}"
        )

    # At the largest training size, the longer side of each object.
    sizes_hw = dataset.sizes_hw
    scale = np.minimum(max(config.min_sizes) / sizes_hw.min(1), config.max_size / sizes_hw.max(1))
    sides_px = (dataset._boxes[:, 2:] - dataset._boxes[:, :2]).max(1) * scale[rows]
    if (share := (sides_px < TINY_PX).mean()) > 0.1:
        factor = 2 * TINY_PX / np.quantile(sides_px, 0.1)
        longest = min(int(config.max_size * factor), int(sizes_hw.max()))
        notes.append(
            f"{share:.0%} of the objects are less than {TINY_PX} pixels long in the resized images "
            f"and can hardly be seen; --max-size {longest} and --min-sizes in proportion would do, "
            "or cut the images into tiles"
        )
    return [f"{dataset.json_file}: {note}" for note in notes]


def check_data(dataset: CocoDataset | ShapesDataset, rank: int = 0, world_size: int = 1) -> None:
    """Decodes every image of a data set before time is spent on it; each process its share.

    Raises:
        UserError: some images cannot be used; says how many, and why for the first ten.
    """
    if isinstance(dataset, ShapesDataset):
        return

    def problem_with(index: int) -> str | None:
        try:
            dataset.image(index)
        except UserError as error:
            return str(error)
        return None

    share = range(rank, len(dataset), world_size)
    # None: only on a terminal. Standard error itself is None if it is closed.
    is_hidden = None if rank == 0 and sys.stderr else True
    with ThreadPoolExecutor(8) as pool:  # a disk or network may take long to answer
        found = pool.map(problem_with, share)
        bar = tqdm(found, "check data", len(share), unit="image", leave=False, disable=is_hidden)
        problems = list(filter(None, bar))
    if problems:
        first_ten = " | ".join(problems[:10])
        raise UserError(f"{len(problems)} of {len(share)} images cannot be used: {first_ten}")

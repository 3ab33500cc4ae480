"""COCO-format data sets, augmentation, batching.

In: a JSON file in COCO's format and the folder of its pictures. Out: (image, target) pairs, one by one or in batches:
    image   (3, H, W) uint8 RGB, 0-255 (the model normalises and pads)
    target  boxes (M, 4) float32 xyxy pixels, labels (M,) int64 from 0 (torchvision's own detectors start at 1),
            image_id int, size_hw the file's (height, width) before transforms

Shapes: M objects of an image, T objects of all images, K classes.

Deviations (ours | paper | authors' code | why)
    torchvision's antialiased bilinear resize | not told | Pillow's | faster; seen to differ by at most 1 of 255 levels
    boxes without area are left out with a warning | not told | left out | data sets have such boxes
    resize, then flip | not told | flip, then resize | independent draws: the same pictures are equally likely
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from support.annotations import check_same_classes, load_tables, read_json, without_gc
from support.errors import UserError
from support.pictures import read_image

Target = dict[str, Any]
Transforms = Callable[[Tensor, Target], tuple[Tensor, Target]] | None
Names = Sequence[str] | None
AnyPath = str | os.PathLike[str]

MIN_SIDE_PX = 1e-5  # boxes no wider or no higher than this are no objects (authors' code)
COCO_FOLDER = Path("datasets/coco")


class CocoDataset(Dataset):
    """Pictures and boxes of a file in COCO's format. Crowds are not trained on; images without objects are kept.

    UserError where files are missing, or the JSON is not as COCO's format has it. Annotations lie
    in packed arrays: a DataLoader's process would copy Python objects as it counts references to them.

    Args:
        class_names: in the labels' order; matched to the file's by name. By default the file's own, by category id.

    Attributes:
        class_names, category_ids: K names and K ids (of this file); label k stands for the k-th.
        image_ids, file_names, objects_per_image: (len,) int64, str, int64.
        sizes_hw: (len, 2) int64, height and width of each file in pixels.
    """

    @without_gc()
    def __init__(
        self,
        json_file: AnyPath,
        image_dir: AnyPath,
        transforms: Transforms = None,
        class_names: Names = None,
    ) -> None:
        self.json_file, self.image_dir, self.transforms = str(json_file), str(image_dir), transforms
        raw = load_tables(
            self.json_file
        )  # dropped at the end of this function: `coco()` reads the file anew
        self.image_ids = np.array([image["id"] for image in raw["images"]])
        self.sizes_hw = np.array([(image["height"], image["width"]) for image in raw["images"]])
        self.file_names = self._find_files([image["file_name"] for image in raw["images"]])
        id_of = {
            category["name"]: category["id"]
            for category in sorted(raw["categories"], key=lambda c: c["id"])
        }
        self.class_names = tuple(id_of if class_names is None else class_names)
        check_same_classes(self.json_file, tuple(id_of), self.class_names)
        self.category_ids = tuple(id_of[name] for name in self.class_names)
        self._pack(raw["annotations"])

    def _find_files(self, names: list[str]) -> np.ndarray:
        if not os.path.isdir(self.image_dir):
            raise UserError(f"{self.image_dir}: there is no such folder of images; check the path")
        if missing := [
            name for name in names if not os.path.isfile(os.path.join(self.image_dir, name))
        ]:
            what = f"{len(missing)} of the {len(names)} image files listed in {self.json_file} are missing"
            raise UserError(
                f"{self.image_dir}: {what}, the first is {missing[0]}; check the folder"
            )
        return np.array(names)

    def _pack(self, annotations: list[dict[str, Any]]) -> None:
        """Sets objects_per_image and the arrays that `target` reads; warns of the boxes that are no objects."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids.tolist())}
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        ids = np.array([a["id"] for a in annotations])  # (T,), as all arrays below except the boxes
        images = np.array([row_of[a["image_id"]] for a in annotations], dtype=np.int64)
        labels = np.array([label_of[a["category_id"]] for a in annotations], dtype=np.int64)
        crowds = np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool)
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        limits = np.tile(self.sizes_hw[images][:, ::-1], 2)  # (T, 4): w, h, w, h
        xyxy = (
            np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            .clip(0, limits)
            .astype(np.float32)
        )
        flat = ~crowds & (boxes[:, 2:] <= MIN_SIDE_PX).any(axis=1)
        outside = ~crowds & ~flat & (xyxy[:, 2:] - xyxy[:, :2] <= MIN_SIDE_PX).any(axis=1)
        if (flat | outside).any():
            kinds = f"{flat.sum()} of zero or negative width or height, {outside.sum()} wholly outside of the image"
            first = ", ".join(map(str, ids[flat | outside][:5]))
            warnings.warn(
                f"{self.json_file}: left out boxes: {kinds} (first annotation ids: {first})",
                stacklevel=3,
            )
        kept = np.argsort(images, kind="stable")
        kept = kept[~(crowds | flat | outside)[kept]]
        self._boxes, self._labels = xyxy[kept], labels[kept]
        self.objects_per_image = np.bincount(images[kept], minlength=len(self))
        self._ends = np.cumsum(self.objects_per_image)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Image and target (see the module's docstring) after `transforms`."""
        image, target = self.image(index), self.target(index)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def image(self, index: int) -> tv_tensors.Image:
        """The picture, (3, H, W) uint8; UserError if it is broken, or not of the size that the JSON gives."""
        path = os.path.join(self.image_dir, self.file_names[index])
        image, (height, width) = read_image(path), self.sizes_hw[index].tolist()
        if image.shape[1:] != (height, width):
            what = f"is {image.shape[2]} x {image.shape[1]} pixels, but {width} x {height} in {self.json_file}"
            raise UserError(
                f"{path}: {what}; correct the JSON (sizes and boxes count after EXIF orientation)"
            )
        return image

    def target(self, index: int) -> Target:
        """The target before transforms, without decoding the picture."""
        size_hw = tuple(self.sizes_hw[index].tolist())
        rows = slice(self._ends[index] - self.objects_per_image[index], self._ends[index])
        boxes = tv_tensors.BoundingBoxes(
            torch.tensor(self._boxes[rows]), format="XYXY", canvas_size=size_hw
        )
        labels = torch.tensor(self._labels[rows])
        return {
            "boxes": boxes,
            "labels": labels,
            "image_id": int(self.image_ids[index]),
            "size_hw": size_hw,
        }

    def coco(self) -> COCO:
        """The file itself for pycocotools, crowds and left-out boxes included; absent info, area, iscrowd are added."""
        coco = COCO()
        coco.dataset = {"info": {}, **read_json(self.json_file)}
        # COCOeval takes a match with annotation 0 for no match at all.
        renumber = any(annotation["id"] == 0 for annotation in coco.dataset["annotations"])
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            annotation["id"] = number if renumber else annotation["id"]
            annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
            if annotation.get("area") is None:
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


class ShortestSize(v2.RandomShortestSize):
    """Rounds sizes like detectron2; torchvision truncates, to 479 of 480 where the ratio is inexact, or even to 0."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = F.get_size(flat_inputs[0])  # height, width
        scale = self.min_size[int(torch.randint(len(self.min_size), ()))] / min(sides)
        if self.max_size is not None:
            scale = min(scale, self.max_size / max(sides))
        return {"size": [max(1, int(side * scale + 0.5)) for side in sides]}


def random_size_crop(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """A window anywhere, its sides uniform in min(side, 384) ... min(side, 600): detectron2's "absolute_range"."""
    full_h, full_w = image.shape[-2:]
    height, width = (
        int(torch.randint(min(side, 384), min(side, 600) + 1, ())) for side in (full_h, full_w)
    )
    top, left = (
        int(torch.randint(full_h - height + 1, ())),
        int(torch.randint(full_w - width + 1, ())),
    )
    window = top, left, height, width
    return F.crop(image, *window), {
        **target,
        "boxes": F.crop(target["boxes"], *window),
    }  # boxes are clipped


def drop_degenerate(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Removes boxes without area, and their labels; v2.SanitizeBoundingBoxes would remove all those below 1 pixel."""
    boxes = target["boxes"]
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_SIDE_PX).all(dim=1)
    return image, {
        **target,
        "boxes": tv_tensors.wrap(boxes[kept], like=boxes),
        "labels": target["labels"][kept],
    }


def train_transforms(config: Config) -> v2.Compose:
    """Random crop of half of the images (config.crop), random size, flip of half of them (config.flip)."""
    crop = v2.RandomApply([ShortestSize((400, 500, 600)), random_size_crop], p=0.5 * config.crop)
    flip = v2.RandomHorizontalFlip(0.5 * config.flip)
    return v2.Compose(
        [crop, ShortestSize(config.min_sizes, config.max_size), flip, drop_degenerate]
    )


def eval_transforms(config: Config) -> v2.Compose:
    """One size, nothing random."""
    return v2.Compose([ShortestSize((config.test_size,), config.max_size)])


def make_dataset(
    config: Config, split: str, class_names: Names = None, transforms: Transforms = None
) -> CocoDataset | ShapesDataset | None:
    """The config's own files, else Shapes, else COCO; None where own data has no "val" split to its "train".

    `class_names`: see `CocoDataset`. `transforms`: by default those for training or for evaluation. UserError where a
    flag or file is missing, or classes differ.
    """
    transforms = transforms or (
        train_transforms(config) if split == "train" else eval_transforms(config)
    )
    json_file, folder = getattr(config, f"{split}_json"), getattr(config, f"{split}_images")
    if (json_file is None) != (folder is None):
        missing = "json" if json_file is None else "images"
        raise UserError(
            f"--{split}-{missing} is missing; --{split}-json and --{split}-images go together"
        )
    if json_file is not None:
        return CocoDataset(json_file, folder, transforms, class_names)
    if split == "val" and config.train_json is not None:
        return None
    if config.data != "coco":
        length = config.shapes_train if split == "train" else config.shapes_val
        shapes = ShapesDataset(config.data.removeprefix("shapes-"), split, length, transforms)
        check_same_classes(config.data, shapes.class_names, class_names or shapes.class_names)
        return shapes
    files = COCO_FOLDER / f"annotations/instances_{split}2017.json", COCO_FOLDER / f"{split}2017"
    if missing := [str(path) for path in files if not path.exists()]:
        how = "unpack train2017.zip, val2017.zip, annotations_trainval2017.zip from https://cocodataset.org/#download"
        other = "`make demo`, and your own data (--train-json FILE --train-images FOLDER), need no download"
        raise UserError(f"{' and '.join(missing)}: not found; {how} in {COCO_FOLDER}; {other}")
    return CocoDataset(*files, transforms, class_names)


def check_data(dataset: CocoDataset | ShapesDataset, rank: int = 0, world_size: int = 1) -> None:
    """Decodes every picture, or a process's share; the UserError says how many fail, and why for the first ten."""
    if isinstance(dataset, ShapesDataset):
        return
    errors, share = [], range(rank, len(dataset), world_size)
    for index in tqdm(
        share, desc="check data", unit="image", leave=False, disable=None if rank == 0 else True
    ):
        try:
            dataset.image(index)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError(
            f"{len(errors)} of {len(share)} images cannot be used: {' | '.join(errors[:10])}"
        )


def validation_set(checkpoint: dict[str, Any], **overrides: Any) -> CocoDataset | ShapesDataset:
    """What a checkpoint of `load_model` is evaluated on; `overrides` that are not None replace its config's fields.

    Raises:
        UserError: as `make_dataset`, or there is nothing to evaluate on.
    """
    config = replace(
        checkpoint["config"],
        **{name: value for name, value in overrides.items() if value is not None},
    )
    dataset = make_dataset(config, "val", class_names=checkpoint["class_names"])
    if dataset is None:
        raise UserError("the checkpoint names no validation data; give --val-json and --val-images")
    return dataset

"""Pictures in, pictures and JSON out.

In:  a checkpoint (a file, or a name of `checkpoint.PUBLISHED`) or an ONNX file of `tools/export.py`; pictures, folders.
Out: `OUTPUT/NAME.png` with boxes, names and scores, `OUTPUT/detections.json`; `OUTPUT/stages/NAME.png` with --stages.

In Python:

    predictor = Predictor("runs/demo/last.pt")
    predictor("picture.jpg")  # {"boxes": (n, 4), "scores": (n,), "labels": (n,), "names": [...]}

Shapes: n detections of one picture. Boxes are xyxy in pixels of the picture given, after its EXIF orientation.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from config import Config
from data import eval_transforms
from support.checkpoint import load_model
from support.cli import AMP_DTYPES, parse_args, pick_device, run_main
from support.errors import UserError
from support.loader import make_loader
from support.pictures import AnyImage, to_image
from visualize import draw_detections, draw_stages

SUFFIXES = {
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}  # taken from folders
SHOWN_PX = (
    480,
    1600,
)  # the longest side of a picture that is written: smaller and larger ones are resized for it


class Predictor:
    """A checkpoint or an ONNX file, ready for pictures.

    Args:
        weights: a file of ours, of the authors' code or of MMDetection, a name of `checkpoint.PUBLISHED`, or NAME.onnx.
        device: "auto", "cpu", "cuda", …
        score_threshold: detections below it are left out.
        classes: names of the only classes to report; all if empty.
        batch_size: pictures at a time; only those that are resized to the same size go together, as padding counts.
        amp: "off", "bf16" or "fp16".
        test_size, max_size: pixels of the shortest side, and at most of the longest, by default those of the weights.

    Raises:
        UserError: the weights cannot be used, or a class is not one of theirs.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        device: str = "auto",
        score_threshold: float = 0.4,
        classes: Sequence[str] = (),
        batch_size: int = 4,
        amp: str = "off",
        test_size: int | None = None,
        max_size: int | None = None,
    ):
        self.device = pick_device(device)
        self.score_threshold, self.batch_size, self.amp = score_threshold, batch_size, amp
        if Path(weights).suffix == ".onnx":
            from support.onnx_detector import OnnxDetector

            if amp != "off":
                raise UserError(
                    f"{weights}: an ONNX file runs in the precision it was written in; leave out --amp"
                )
            self.model = OnnxDetector(weights, self.device)
            config = Config(test_size=self.model.test_size, max_size=self.model.max_size)
            self.class_names = list(self.model.class_names)
        else:
            model, checkpoint = load_model(weights, self.device)
            self.model, config = model.for_inference(), checkpoint["config"]
            self.class_names = list(checkpoint["class_names"])
        if unknown := [name for name in classes if name not in self.class_names]:
            raise UserError(
                f"{weights} knows no classes {unknown}; it has {', '.join(self.class_names)}"
            )
        self.labels = [
            label for label, name in enumerate(self.class_names) if not classes or name in classes
        ]
        sizes = {
            "test_size": test_size or config.test_size,
            "max_size": max_size or config.max_size,
        }
        self.transforms = eval_transforms(replace(config, **sizes))

    def __call__(
        self, images: AnyImage | Sequence[AnyImage]
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """One picture to its detections, or a list of pictures to a list.

        Args:
            images: see `to_image`.

        Returns:
            For each picture a dict of `boxes` (n, 4) float32 xyxy px, `scores` (n,) falling, `labels` (n,) int64, all
            on the CPU, and `names`, n class names.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        found = []
        for start in range(0, len(images), self.batch_size):
            pictures = [to_image(image) for image in images[start : start + self.batch_size]]
            found += self.detect(
                [self.resize(p) for p in pictures], [tuple(p.shape[1:]) for p in pictures]
            )
        return found

    def resize(self, image: Tensor) -> Tensor:
        """(3, H, W) at the size that the model is evaluated at."""
        return self.transforms(tv_tensors.Image(image)).as_subclass(Tensor)

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Tensor], sizes_hw: Sequence[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Resized images (3, h, w), and the sizes (H, W) before, to detections as of `__call__`."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(i)
        results: dict[int, dict[str, Any]] = {}
        for group in groups.values():
            with torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off"):
                detections = self.model([images[i] for i in group])
            for i, found in zip(group, detections, strict=True):
                found = {key: value.cpu() for key, value in found.items()}
                keep = (found["scores"] >= self.score_threshold) & torch.isin(
                    found["labels"], torch.tensor(self.labels)
                )
                (height, width), (h, w) = sizes_hw[i], images[i].shape[1:]
                boxes = found["boxes"][keep] * torch.tensor([width / w, height / h] * 2)
                labels = found["labels"][keep]
                names = [self.class_names[label] for label in labels.tolist()]
                results[i] = {
                    "boxes": boxes,
                    "scores": found["scores"][keep],
                    "labels": labels,
                    "names": names,
                }
        return [results[i] for i in range(len(images))]


class Pictures(Dataset):
    """Files as (resized image, info) for the loader's workers; a file that cannot be read gives (None, its error)."""

    def __init__(self, files: Sequence[Path], predictor: Predictor):
        self.files, self.resize = files, predictor.resize

    def __getitem__(self, index: int) -> tuple[Tensor | None, dict[str, Any]]:
        try:
            image = to_image(self.files[index])
        except UserError as error:
            return None, {"error": str(error)}
        longest = max(image.shape)
        shown = (
            image
            if longest <= SHOWN_PX[1]
            else F.resize(image, None, max_size=SHOWN_PX[1], antialias=True)
        )
        return self.resize(image), {
            "index": index,
            "size_hw": tuple(image.shape[1:]),
            "shown": shown,
        }


def list_pictures(inputs: Sequence[Path]) -> list[Path]:
    """The files among the inputs, and the pictures right in the folders among them, each once.

    Raises:
        UserError: an input does not exist, or a folder holds no picture.
    """
    files: dict[Path, Path] = {}
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        inside = [path]
        if path.is_dir():
            inside = sorted(
                p
                for p in path.iterdir()
                if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
            )
            if not inside:
                raise UserError(
                    f"{path}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})"
                )
        for file in inside:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def output_names(files: Sequence[Path]) -> list[str]:
    """NAME of NAME.jpg for each file; where others have it already NAME_2, NAME_3, …: nothing is overwritten."""
    names, taken = [], set()
    for file in files:
        name, number = file.stem, 1
        while name.lower() in taken:  # some file systems take a.png for A.png
            number += 1
            name = f"{file.stem}_{number}"
        names.append(name)
        taken.add(name.lower())
    return names


def save_picture(
    path: Path, shown: Tensor, size_hw: tuple[int, int], found: dict[str, Any], names: list[str]
) -> None:
    """Draws detections over a picture that may be smaller than the one they were found in."""
    height, width = shown.shape[1:]
    scale = max(1.0, SHOWN_PX[0] / max(height, width))
    dpi = max(
        100.0, max(height, width) * scale / 8
    )  # texts keep their size relative to large pictures
    figure = Figure(figsize=(width * scale / dpi, height * scale / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    boxes = found["boxes"] * (width / size_hw[1])
    draw_detections(axes, shown, {**found, "boxes": boxes}, names, threshold=0.0)
    axes.set_aspect("auto")  # sides are rounded to whole pixels
    figure.savefig(path, dpi=dpi)


@dataclass(frozen=True)
class PredictArgs:
    inputs: tyro.conf.Positional[tuple[Path, ...]]  # pictures, and folders of pictures
    weights: Path = Path(
        "sparse-rcnn-r50-100"
    )  # checkpoint, ONNX file, or name of published weights (see the README)
    output: Path = Path("runs/predict")  # folder for pictures and detections.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    batch_size: int = 4  # pictures at a time, of equal size
    workers: int = 4  # processes that load pictures; 0 loads them in the main process
    score_threshold: float = 0.4  # detections below it are left out
    classes: tuple[str, ...] = ()  # names of the only classes to report; by default all
    stages: bool = False  # also draw the learned proposals and the boxes of every stage
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    test_size: int | None = (
        None  # pixels: the shortest side of the pictures; by default that of the checkpoint
    )
    max_size: int | None = (
        None  # pixels: but its longest side never more; by default that of the checkpoint
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises `UserError`. Returns 1 where pictures were skipped."""
    args = parse_args(argv, PredictArgs, "predict.py", "Detects objects in pictures.")
    if not args.inputs:
        raise UserError(
            "give pictures or folders: python predict.py IMAGE_OR_FOLDER … --weights FILE"
        )
    if min(args.batch_size, args.test_size or 1, args.max_size or 1) < 1 or args.workers < 0:
        raise UserError(
            "--batch-size, --test-size and --max-size should be at least 1, --workers at least 0"
        )
    if not 0 <= args.score_threshold <= 1:
        raise UserError(f"--score-threshold {args.score_threshold} should lie in 0 … 1")
    files = list_pictures(args.inputs)
    names = output_names(files)
    is_input = {file.resolve() for file in files}
    if clash := [name for name in names if (args.output / f"{name}.png").resolve() in is_input]:
        raise UserError(
            f"--output {args.output}: {clash[0]}.png there is one of the inputs; choose another folder"
        )
    sizes = {"test_size": args.test_size, "max_size": args.max_size}
    predictor = Predictor(
        args.weights,
        args.device,
        args.score_threshold,
        args.classes,
        args.batch_size,
        args.amp,
        **sizes,
    )
    if args.stages and not hasattr(predictor.model, "stages"):
        raise UserError(
            f"--stages: {args.weights} holds the last stage's detections only; give the checkpoint"
        )
    (args.output / "stages" if args.stages else args.output).mkdir(parents=True, exist_ok=True)
    records, errors, total = [], [], 0
    batches = [
        list(range(i, min(i + args.batch_size, len(files))))
        for i in range(0, len(files), args.batch_size)
    ]
    bar = tqdm(
        total=len(files), desc="predict", unit="picture", disable=None, leave=False
    )  # None: on a terminal only
    for images, infos in make_loader(Pictures(files, predictor), batches, args.workers):
        bar.update(len(infos))
        errors += [info["error"] for info in infos if "error" in info]
        images, infos = (
            [i for i in images if i is not None],
            [info for info in infos if "error" not in info],
        )
        for image, info, found in zip(
            images,
            infos,
            predictor.detect(images, [info["size_hw"] for info in infos]),
            strict=True,
        ):
            name, size_hw = names[info["index"]], info["size_hw"]
            save_picture(
                args.output / f"{name}.png", info["shown"], size_hw, found, predictor.class_names
            )
            if args.stages:
                figure = draw_stages(
                    predictor.model, [image], predictor.class_names, args.score_threshold
                )
                figure.savefig(args.output / "stages" / f"{name}.png", dpi=120)
            values = {
                key: value.tolist() if isinstance(value, Tensor) else value
                for key, value in found.items()
            }
            file = str(files[info["index"]])
            records.append({"file": file, "width": size_hw[1], "height": size_hw[0], **values})
            total += len(found["scores"])
    bar.close()
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (args.output / "detections.json").write_text(f"[\n{lines}\n]\n")
    for error in errors:
        print(f"predict.py: skipped {error}", file=sys.stderr)
    how = (
        "in onnxruntime" if args.weights.suffix == ".onnx" else "batch norms folded, channels last"
    )
    print(
        f"{len(records)} pictures, {total} detections, {len(errors)} skipped "
        f"({predictor.device.type}, {how}, mixed precision {args.amp})"
    )
    print(f"written: {args.output / 'detections.json'}, and a picture each beside it")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(run_main(main, "predict.py"))

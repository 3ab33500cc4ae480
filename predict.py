"""Detects objects in image files.

    predictor = Predictor("assets/blood.pt")
    predictor("image.jpg")  # {"boxes": (n, 4), "scores": (n,), "labels": (n,), "names": [...]}

In:  a checkpoint (a file, or the name of published weights) or an ONNX file of `tools/export.py`;
     images, or folders of images.
Out: `OUTPUT/NAME.jpg`, each image with its boxes, class names and scores;
     `OUTPUT/detections.json`, a list with one record per image;
     `OUTPUT/stages/NAME.jpg`, with `--stages`: the learned proposals and the boxes of every stage.

The command takes the images one by one, while threads decode the next ones. An image that cannot be
read is reported and skipped. `detections.json` is written at the end, whatever ends the run.

Shapes: n detections of an image, K classes. Boxes are xyxy in pixels of the image given, after its
EXIF orientation.
"""

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from config import PRESETS, PresetName
from data import ShortestSize
from model import load_model
from support.checkpoint import PUBLISHED
from support.cli import parse_args, run_main
from support.devices import AMP_DTYPES, choose_threads, pick_device
from support.errors import UserError
from support.files import make_folder, replacing, write_json
from support.onnx_detector import OnnxDetector
from support.pictures import AnyImage, readable_suffixes, to_image
from visualize import draw_image, draw_stages, save_figure

# Pixels: the longest side of a picture that is written. Others are enlarged or shrunk to these.
MIN_SHOWN_PX, MAX_SHOWN_PX = 480, 1600
# To write a PNG takes about twelve times as long: a quarter of the time of a small model.
SUFFIX = ".jpg"


# --- from an image to detections ---


class Predictor:
    """A checkpoint or an ONNX file, ready for images.

    Args:
        weights: a file of ours, of the authors' code or of MMDetection; a name of
            `checkpoint.PUBLISHED`, which is downloaded once; or an ONNX file of `tools/export.py`.
        device: "auto", "cpu", "cuda", …
        score_threshold: detections that score less are left out.
        classes: names of the only classes to report; by default all.
        batch_size: how many images of a list go through the model at a time. Only those of equal
            size do, because padding would change their detections.
        amp: "off", "bf16" or "fp16".
        test_size: pixels of the shortest side that images are resized to; by default that of the
            weights.
        max_size: pixels, the limit of the longest side; by default that of the weights.
        preset: the one that a bare state dict was trained with; other weights need none.

    Raises:
        UserError: the weights cannot be used, or one of the classes is not theirs.
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
        preset: PresetName | None = None,
    ):
        self.device = pick_device(device)
        self.score_threshold = score_threshold
        self.batch_size = batch_size
        self.amp = amp
        if amp not in AMP_DTYPES:
            raise UserError(f"amp={amp!r} should be one of {', '.join(AMP_DTYPES)}")
        if Path(weights).suffix.lower() == ".onnx":
            self.model = OnnxDetector(weights, self.device, amp)
            self.class_names, self.backbone, sizes = self.model.class_names, "", self.model
        else:
            model, checkpoint = load_model(weights, self.device, PRESETS.get(preset))
            self.model, sizes = model.for_inference(), checkpoint["config"]
            self.class_names, self.backbone = checkpoint["class_names"], sizes.backbone
        test_size = sizes.test_size if test_size is None else test_size
        max_size = sizes.max_size if max_size is None else max_size
        if min(test_size, max_size, batch_size) < 1 or not 0 <= score_threshold <= 1:
            raise UserError("sizes should be at least 1, and the score threshold lie in 0 … 1")
        self.resize = ShortestSize((test_size,), max_size)

        if unknown := [name for name in classes if name not in self.class_names]:
            known = ", ".join(self.class_names)
            raise UserError(f"{weights} does not know the classes {unknown}; it has {known}")
        # (K,)
        self.is_wanted = torch.tensor([not classes or name in classes for name in self.class_names])

    def __call__(self, images: AnyImage | Sequence[AnyImage]) -> dict | list[dict]:
        """Detects objects in one image, or in each image of a list.

        Args:
            images: anything that `support.pictures.to_image` takes, or a list of such.

        Returns:
            A dict of `boxes` (n, 4) float32 xyxy px, `scores` (n,) in descending order and `labels`
            (n,) int64, all on the CPU, and `names`, n class names. A list of them for a list.

        Raises:
            UserError: an image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        found = []
        for _, same_size in groupby(map(to_image, images), key=attrgetter("shape")):
            while batch := list(islice(same_size, self.batch_size)):
                found += self.detect(batch)
        return found

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Detects objects in images (3, H, W) uint8 of one size, with one pass of the model."""
        resized = [self.resize(image) for image in images]
        with torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off"):
            results = self.model(resized)

        (height, width), (h, w) = images[0].shape[1:], resized[0].shape[1:]
        scale = torch.tensor([width / w, height / h] * 2, dtype=torch.float32)
        found = []
        for result in results:
            boxes, scores, labels = (result[key].cpu() for key in ("boxes", "scores", "labels"))
            keep = (scores >= self.score_threshold) & self.is_wanted[labels]
            names = [self.class_names[label] for label in labels[keep].tolist()]
            kept = {"boxes": boxes[keep] * scale, "scores": scores[keep], "labels": labels[keep]}
            found.append({**kept, "names": names})
        return found


# --- which files ---


def list_images(inputs: Sequence[str]) -> list[Path]:
    """The files among the inputs, and the images right inside the folders, each once.

    Raises:
        UserError: an input is neither a file nor a folder, or a folder holds no image.
    """
    files: dict[Path, Path] = {}
    suffixes = readable_suffixes()
    for text in inputs:
        inside = [Path(text)]
        if os.path.isdir(text):
            entries = sorted(Path(text).glob("[!.]*"))
            inside = [e for e in entries if e.suffix.lower() in suffixes and e.is_file()]
            content = f"{text}: {len(inside)} images and {len(entries) - len(inside)} other entries"
            if not inside:
                raise UserError(f"{content}; give a folder with images right inside")
            print(content)
        elif not os.path.isfile(text):  # a pipe or a device might never end
            raise UserError(f"{text!r} is neither a file nor a folder")
        files |= {file.resolve(): file for file in inside}
    if not files:
        raise UserError("give images or folders: predict.py IMAGE_OR_FOLDER … --weights FILE")
    return list(files.values())


def output_names(files: Sequence[Path]) -> list[str]:
    """NAME.jpg for each NAME.png; if that is taken NAME_2.jpg, NAME_3.jpg, …"""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        # Some file systems tell names apart neither by case nor by the form of their Unicode.
        while (key := unicodedata.normalize("NFC", name).casefold()) in taken:
            number += 1
            name = f"{file.stem}_{number}"
        names.append(name + SUFFIX)
        taken.add(key)
    return names


def refuse_to_overwrite(files: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raises a UserError if one of the files to write is one of those to read, by whatever name."""
    inputs = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, files)}
    for path in outputs:
        if path.exists() and (path.stat().st_dev, path.stat().st_ino) in inputs:
            raise UserError(f"{path} is one of the inputs; choose another --output")


def read_ahead(files: Sequence[Path], workers: int) -> Iterator[Callable[[], Tensor]]:
    """For each file a function that gives its image; threads decode the next ones meanwhile."""
    if workers < 1:
        yield from (partial(to_image, file) for file in files)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: list[Future[Tensor]] = []
        for file in files:
            ahead.append(pool.submit(to_image, file))
            if len(ahead) > workers:
                yield ahead.pop(0).result
        for future in ahead:
            yield future.result


# --- what is written ---


def save_picture(path: Path, image: Tensor, found: dict, class_names: Sequence[str]) -> None:
    """Draws detections on an image (3, H, W), or on a smaller or larger copy of it."""
    height, width = image.shape[1:]
    longest = max(height, width)
    shown_px = min(max(longest, MIN_SHOWN_PX), MAX_SHOWN_PX)
    # Not by F.resize's max_size, which makes a side of 0 pixels of a very long image.
    size = max(1, height * shown_px // longest), max(1, width * shown_px // longest)
    scale = torch.tensor([size[1] / width, size[0] / height] * 2)
    shown = {**found, "boxes": found["boxes"] * scale}
    picture = F.to_pil_image(draw_image(F.resize(image, size), shown, class_names))
    with replacing(path) as temporary:
        # With colours at full resolution: the usual half would smear the lines.
        picture.save(temporary, "JPEG", quality=95, subsampling="4:4:4")


def record_of(file: Path, image: Tensor, found: dict[str, Any]) -> dict[str, Any]:
    """An image's entry in detections.json."""
    height, width = image.shape[1:]
    # The name in UTF-8, whatever encoding Python takes for that of the file system.
    name = os.fsencode(file).decode("utf-8", "surrogateescape")
    record = {"file": name, "width": width, "height": height}
    for key in ("boxes", "scores", "labels"):
        record[key] = found[key].tolist()
    return {**record, "names": found["names"]}


# --- command line ---


@dataclass(frozen=True)
class PredictArgs:
    inputs: tyro.conf.Positional[tuple[str, ...]]  # images, and folders of images
    # Needed: a checkpoint, an ONNX file, or the name of published weights (see the README).
    weights: str | None = None
    output: Path = Path("runs/predict")  # folder for pictures and detections.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    workers: int = 4  # threads that decode images ahead; 0 decodes in the main thread
    score_threshold: float = 0.4  # detections that score less are left out
    classes: str = ""  # the only classes to report, as in cat,dog; by default all
    stages: bool = False  # also draw the learned proposals and the boxes of every stage
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    test_size: int | None = None  # pixels: shortest side of the images; by default the checkpoint's
    max_size: int | None = None  # pixels: limit of the longest side; by default the checkpoint's
    preset: PresetName | None = None  # of weights that were saved as a bare state dict


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        1 if images were skipped, else 0.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, PredictArgs, "predict.py", "Detects objects in images.")
    if args.weights is None:
        raise UserError(
            "--weights is missing: give a checkpoint, such as assets/blood.pt, an ONNX file, or a "
            f"name of published weights ({', '.join(PUBLISHED)}: about 420 MB, downloaded once)"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "every process of torchrun would predict all images; start one predict.py per GPU, "
            "each with files and --output of its own"
        )
    files = list_images(args.inputs)
    names = output_names(files)
    folders = [args.output, args.output / "stages"] if args.stages else [args.output]
    record_file = args.output / "detections.json"
    refuse_to_overwrite(files, [record_file, *(f / name for f in folders for name in names)])
    if args.output.resolve() in [Path(text).resolve() for text in args.inputs]:
        raise UserError(f"--output {args.output}: its pictures would be inputs of the next run")
    predictor = Predictor(
        args.weights,
        args.device,
        args.score_threshold,
        args.classes.split(",") if args.classes else (),
        amp=args.amp,
        test_size=args.test_size,
        max_size=args.max_size,
        preset=args.preset,
    )
    model, class_names = predictor.model, predictor.class_names
    if args.stages and isinstance(model, OnnxDetector):
        raise UserError(f"--stages: {args.weights} has none; use the checkpoint it was made from")
    choose_threads(predictor.device, predictor.backbone, args.amp)
    make_folder(folders[-1])

    records = []
    bar = tqdm(files, desc="predict", unit="image", disable=None, leave=False)
    try:
        for file, name, read in zip(bar, names, read_ahead(files, args.workers), strict=True):
            try:
                image = read()
            except UserError as error:
                tqdm.write(f"predict.py: skipped {error}", file=sys.stderr)
                continue
            found = predictor(image)
            save_picture(args.output / name, image, found, class_names)
            if args.stages:
                resized = predictor.resize(image)
                figure = draw_stages(model, [resized], class_names, args.score_threshold)
                save_figure(figure, args.output / "stages" / name)
            records.append(record_of(file, image, found))
    finally:
        # After an error, Ctrl-C or SIGTERM too. An earlier file stays until there is something new.
        if records:
            write_json(record_file, records)
            print(f"{len(records)} of {len(files)} images are done, with results in {args.output}")
    return 0 if len(records) == len(files) else 1


if __name__ == "__main__":
    sys.exit(run_main(main, "predict.py"))

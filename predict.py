"""Detects objects in image files.

In:  a checkpoint (a file, or the name of published weights) or an ONNX file of `tools/export.py`;
     images, or folders of images.
Out: `OUTPUT/NAME.png`, each image with its boxes, class names and scores;
     `OUTPUT/detections.json`, a list with one record per image;
     `OUTPUT/stages/NAME.png`, with `--stages`: the learned proposals and the boxes of every stage.

In Python:

    predictor = Predictor("runs/demo/last.pt")
    predictor("image.jpg")  # {"boxes": (n, 4), "scores": (n,), "labels": (n,), "names": [...]}

Both go the same way. An image is decoded and resized to the size that the model is evaluated at,
which the command line leaves to worker processes. Then `Predictor.detect` runs the model and turns
its boxes back into pixels of the image. An image that fails is reported and skipped.

Shapes: n detections of an image, N proposals, K classes, S stages. Boxes are xyxy in pixels of the
image given, after its EXIF orientation.
"""

import contextlib
import difflib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from config import Config
from data import Transforms, eval_transforms
from model import StageOutputs, load_model
from support.cli import parse_args, run_main
from support.devices import AMP_DTYPES, choose_threads, pick_device, warn_of_slow_bf16
from support.errors import UserError
from support.inputs import check_exists, describe, list_images, output_names
from support.onnx_detector import OnnxDetector
from support.pictures import AnyImage, to_image
from support.results import (
    Failure,
    Item,
    JsonList,
    attempt,
    describe_signal,
    load_tolerantly,
    make_folder,
    raise_bug,
    signal_of,
    signals_like_ctrl_c,
    undisturbed,
    would_fail_again,
)
from visualize import draw_detections, draw_stages, save_figure

# Pixels: the longest side of a picture that is written. Others are enlarged or shrunk to these.
MIN_SHOWN_PX, MAX_SHOWN_PX = 480, 1600
NO_INPUTS = "give images or folders: python predict.py IMAGE_OR_FOLDER … --weights FILE"


# --- from an image to detections ---


class Found(NamedTuple):
    """What was found in an image."""

    detections: dict[str, Any]  # see `Predictor.__call__`
    stages: StageOutputs | None  # of this image alone (B = 1), in pixels of the resized image


def resize(image: Tensor, transforms: Transforms) -> Tensor:
    """An image (3, H, W) at the size that the model is evaluated at, (3, h, w)."""
    return transforms(tv_tensors.Image(image)).as_subclass(Tensor)


def is_onnx(weights: str) -> bool:
    """Whether a file is taken for an ONNX file, rather than for a checkpoint."""
    return Path(weights).suffix.lower() == ".onnx"


class Predictor:
    """A checkpoint or an ONNX file, ready for images.

    Args:
        weights: a file of ours, of the authors' code or of MMDetection; a name of
            `checkpoint.PUBLISHED`, which is downloaded once; or an ONNX file of `tools/export.py`.
        device: "auto", "cpu", "cuda", …
        score_threshold: detections that score less are left out.
        classes: names of the only classes to report; by default all.
        batch_size: how many images go through the model at a time. Only those that are resized to
            the same size do, because padding would change their detections.
        amp: "off", "bf16" or "fp16".
        test_size: pixels of the shortest side that images are resized to; by default that of the
            weights.
        max_size: pixels, the limit of the longest side; by default that of the weights.

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
    ):
        self.weights = str(weights)
        self.device = pick_device(device)
        self.score_threshold = score_threshold
        self.batch_size = batch_size
        self.amp = amp
        self.model, config, self.class_names = self._load()
        self.test_size = test_size or config.test_size
        self.max_size = max_size or config.max_size
        self.config = replace(config, test_size=self.test_size, max_size=self.max_size)
        self.transforms = eval_transforms(self.config)
        self.select_classes(classes)

    def _load(self) -> tuple[nn.Module | OnnxDetector, Config, list[str]]:
        """The model, a config with its sizes, and its K class names."""
        if not is_onnx(self.weights):
            model, checkpoint = load_model(self.weights, self.device)
            return model.for_inference(), checkpoint["config"], list(checkpoint["class_names"])
        if self.amp != "off":
            raise UserError(
                f"{self.weights}: an ONNX file runs in the precision that it was written in; leave "
                "out --amp"
            )
        detector = OnnxDetector(self.weights, self.device)
        config = Config(test_size=detector.test_size, max_size=detector.max_size)
        return detector, config, list(detector.class_names)

    def select_classes(self, names: Sequence[str]) -> None:
        """From now on, reports only these classes; all of them if there are no names.

        Raises:
            UserError: a name is not one of the model's classes.
        """
        names = [names] if isinstance(names, str) else names
        if unknown := [name for name in names if name not in self.class_names]:
            similar = difflib.get_close_matches(unknown[0], self.class_names, n=1)
            hint = f"did you mean {similar[0]}? " if similar else ""
            shown = ", ".join(self.class_names[:100])
            more = f" and {len(self.class_names) - 100} more" if len(self.class_names) > 100 else ""
            raise UserError(
                f"{self.weights} does not know the classes {unknown}; {hint}it has {shown}{more}"
            )
        is_wanted = [not names or name in names for name in self.class_names]
        self.is_wanted = torch.tensor(is_wanted)  # (K,)

    def __call__(
        self, images: AnyImage | Sequence[AnyImage]
    ) -> dict[str, Any] | list[dict[str, Any]]:
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
        detections = []
        for first in range(0, len(images), self.batch_size):
            batch = [to_image(image) for image in images[first : first + self.batch_size]]
            resized = [resize(image, self.transforms) for image in batch]
            sizes_hw = [tuple(image.shape[1:]) for image in batch]
            detections += [found.detections for found in self.detect(resized, sizes_hw)]
        return detections

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Tensor],
        sizes_hw: Sequence[tuple[int, int]],
        with_stages: bool = False,
    ) -> list[Found]:
        """Detects objects in images that are resized already.

        Args:
            images: each (3, h, w) uint8. Those of equal size go through the model together.
            sizes_hw: heights and widths of the images before, in whose pixels the boxes come back.
            with_stages: keep the predictions of every stage, too. ONNX files do not have them.
        """
        same_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            same_size.setdefault(tuple(image.shape), []).append(i)

        found: dict[int, Found] = {}
        for group in same_size.values():
            detections, stages = self._run_model([images[i] for i in group], with_stages)
            for i, detection, stage in zip(group, detections, stages, strict=True):
                resized_hw = tuple(images[i].shape[1:])
                found[i] = Found(self._report(detection, resized_hw, sizes_hw[i]), stage)
        return [found[i] for i in range(len(images))]

    def _run_model(
        self, images: list[Tensor], with_stages: bool
    ) -> tuple[list[dict[str, Tensor]], list[StageOutputs | None]]:
        """Images (3, h, w) of one size to detections in their pixels, and to stages if wanted."""
        with torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off"):
            if not with_stages:
                return self.model(images), [None] * len(images)

            outputs = self.model.stages(images)
            height, width = images[0].shape[1:]
            whwh_px = torch.tensor([width, height, width, height], dtype=torch.float32)
            whwh_px = whwh_px.to(self.device).expand(len(images), 4)
            detections = self.model.detections(outputs.logits[-1], outputs.boxes[-1], whwh_px)
        stages = [
            StageOutputs(outputs.logits[:, i : i + 1], outputs.boxes[:, i : i + 1])
            for i in range(len(images))
        ]
        return detections, stages

    def _report(
        self, detection: dict[str, Tensor], resized_hw: tuple[int, int], size_hw: tuple[int, int]
    ) -> dict[str, Any]:
        """The detections that are wanted, in pixels of the image before it was resized."""
        boxes, scores, labels = (detection[key].cpu() for key in ("boxes", "scores", "labels"))
        keep = (scores >= self.score_threshold) & self.is_wanted[labels]
        scale = [size_hw[1] / resized_hw[1], size_hw[0] / resized_hw[0]] * 2
        return {
            "boxes": boxes[keep] * torch.tensor(scale),
            "scores": scores[keep],
            "labels": labels[keep],
            "names": [self.class_names[label] for label in labels[keep].tolist()],
        }


# --- from files to files ---


class ImageFiles(Dataset):
    """Image files as pairs (image, target), decoded and resized by the loader's worker processes.

        image    (3, h, w) uint8, at the size that the model is evaluated at
        target   size_hw   height and width of the file, in pixels
                 shown     (3, h', w') uint8, the image or, of a large one, a smaller copy

    The workers get a copy of this object, so it must not hold the model.
    """

    def __init__(self, files: Sequence[Path], transforms: Transforms):
        self.files = files
        self.transforms = transforms

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = to_image(self.files[index])
        size_hw = tuple(image.shape[1:])
        return resize(image, self.transforms), {"size_hw": size_hw, "shown": shrink(image)}


def shrink(image: Tensor) -> Tensor:
    """An image (3, H, W) whose longest side is at most `MAX_SHOWN_PX`."""
    longest = max(image.shape[1:])
    if longest <= MAX_SHOWN_PX:
        return image
    # Not by F.resize's max_size, which makes a side of 0 pixels of a very long image.
    size = [max(1, int(MAX_SHOWN_PX * side / longest)) for side in image.shape[1:]]
    return F.resize(image, size, antialias=True)


@dataclass
class Tally:
    """How far `predict_files` has come."""

    files: int  # how many there are
    output: Path
    images: int = 0  # how many are done
    detections: int = 0
    failures: list[Failure] = field(default_factory=list)  # of the images that were skipped

    def __str__(self) -> str:
        if not self.images:
            return f"no image was done; {self.output / 'detections.json'} is as it was"
        return f"{self.images} of {self.files} images are done, with results in {self.output}"

    def skip(self, file: Path, failure: Failure) -> None:
        """Counts an image as skipped and says so."""
        self.failures.append(failure)
        # Standard error may be closed or go to a full disk. That should not end the run.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # Unlike print, this does not break the progress bar.
            tqdm.write(f"predict.py: skipped {failure.about(file)}", file=sys.stderr)


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    output: Path,
    workers: int,
    with_stages: bool,
    tally: Tally,
) -> None:
    """Detects objects in files, and writes the pictures and the record of each as they come.

    Args:
        predictor: gets batches of its `batch_size`.
        files: not all of them need be images.
        output: folder to write into.
        workers: processes that load images.
        with_stages: also draw the boxes of every stage.
        tally: counts what is done; the caller can look at it even if this is interrupted.

    Raises:
        OSError: nothing more can be written, as on a full disk. The results so far are kept.
        RuntimeError: an error in the program made all images fail.
    """
    names = output_names(files)
    # None: only on a terminal. Standard error itself is None if it is closed.
    is_hidden = None if sys.stderr else True
    bar = tqdm(total=len(files), desc="predict", unit="image", disable=is_hidden, leave=False)
    with bar, JsonList(output / "detections.json") as records:
        results = detect_in_files(predictor, files, workers, with_stages)
        for file, name, (item, found) in zip(files, names, results, strict=True):
            bar.update()
            if isinstance(found, Failure):
                tally.skip(file, found)
                continue
            try:
                undisturbed(partial(write_pictures, predictor, output, name, item, found))
                records.append(record_of(file, item, found))
            except Exception as error:
                if would_fail_again(error):
                    raise
                tally.skip(file, Failure.of(error))
            else:
                tally.images += 1
                tally.detections += len(found.detections["names"])
        if not tally.images:
            raise_bug(tally.failures)


def detect_in_files(
    predictor: Predictor, files: Sequence[Path], workers: int, with_stages: bool
) -> Iterator[tuple[Item | Failure, Found | Failure]]:
    """Yields an item of `ImageFiles` and what was found in it, file by file."""

    def detect(items: Sequence[Item]) -> list[Found]:
        images = [image for image, _ in items]
        sizes_hw = [target["size_hw"] for _, target in items]
        return predictor.detect(images, sizes_hw, with_stages)

    indices = range(len(files))
    size = predictor.batch_size
    batches = [list(indices[first : first + size]) for first in indices[::size]]
    dataset = ImageFiles(files, predictor.transforms)
    resized_bytes = 3 * predictor.test_size * predictor.max_size
    batch_bytes = size * (resized_bytes + 3 * MAX_SHOWN_PX**2)  # at most
    for items in load_tolerantly(dataset, batches, workers, batch_bytes):
        yield from zip(items, attempt(detect, items), strict=True)


def write_pictures(predictor: Predictor, output: Path, name: str, item: Item, found: Found) -> None:
    """Writes NAME.png and, if there are stages, stages/NAME.png."""
    image, target = item
    save_picture(
        output / f"{name}.png",
        target["shown"],
        target["size_hw"],
        found.detections,
        predictor.class_names,
    )
    if found.stages is not None:
        figure = draw_stages(
            predictor.model,
            [image],
            predictor.class_names,
            predictor.score_threshold,
            outputs=[found.stages],
        )
        save_figure(figure, output / "stages" / f"{name}.png")


def save_picture(
    path: Path,
    shown: Tensor,
    size_hw: tuple[int, int],
    detections: dict[str, Any],
    class_names: Sequence[str],
) -> None:
    """Draws detections over an image.

    Args:
        path: of the picture. It has the pixels of `shown`, or a multiple of them.
        shown: (3, h, w), the image or a smaller copy of it.
        size_hw: height and width of the image, in whose pixels the boxes are.
        detections: see `Predictor.__call__`.
        class_names: K names.
    """
    height, width = shown.shape[1:]
    scale = max(1.0, MIN_SHOWN_PX / max(height, width))
    # On a large picture the texts are as large in relation to it.
    dpi = max(100.0, max(height, width) * scale / 8)
    # A side of less than one pixel would become none.
    size_inches = [max(1.01, side * scale) / dpi for side in (width, height)]
    figure = Figure(figsize=size_inches, dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_detections(axes, shown, detections, class_names, threshold=0.0, size_hw=size_hw)
    axes.set_aspect("auto")  # because the sides are rounded to whole pixels
    save_figure(figure, path, dpi)


def record_of(file: Path, item: Item, found: Found) -> dict[str, Any]:
    """An image's entry in detections.json."""
    _, target = item
    height, width = target["size_hw"]
    # The name in UTF-8, whatever encoding Python takes for that of the file system.
    name = os.fsencode(file).decode("utf-8", "surrogateescape")
    record = {"file": name, "width": width, "height": height}
    for key, value in found.detections.items():
        record[key] = value.tolist() if isinstance(value, Tensor) else value
    return record


# --- command line ---


@dataclass(frozen=True)
class PredictArgs:
    inputs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="IMAGE_OR_FOLDER …", help="images, and folders of images"),
    ]
    # Checkpoint, ONNX file, or name of published weights (see the README). The default is such a
    # name: it downloads about 420 MB, once, into torch.hub's cache (~/.cache/torch/hub/checkpoints
    # unless TORCH_HOME is set).
    weights: str = "sparse-rcnn-r50-100"
    output: Path = Path("runs/predict")  # folder for pictures and detections.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    batch_size: int = 4  # images at a time, of equal size
    workers: int = 4  # processes that load images; 0 loads them in the main process
    score_threshold: float = 0.4  # detections that score less are left out
    # Names of the only classes to report; by default all. A file among them is taken for an input.
    classes: tuple[str, ...] = ()
    stages: bool = False  # also draw the learned proposals and the boxes of every stage
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    test_size: int | None = None  # pixels: shortest side of the images; by default the checkpoint's
    max_size: int | None = None  # pixels: limit of the longest side; by default the checkpoint's


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        1 if images were skipped, 128 + its number after a signal, else 0.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, PredictArgs, "predict.py", "Detects objects in images.")
    check(args)
    predictor = Predictor(
        args.weights,
        args.device,
        args.score_threshold,
        batch_size=args.batch_size,
        amp=args.amp,
        test_size=args.test_size,
        max_size=args.max_size,
    )
    choose_threads(predictor.device, predictor.config, predictor.test_size)
    warn_of_slow_bf16(predictor.device, args.amp)
    classes, more_inputs = split_classes(args.classes, predictor.class_names)
    predictor.select_classes(classes)
    files, passed_over = list_images([*args.inputs, *more_inputs])
    if not files:
        raise UserError(NO_INPUTS)
    check_output(args.output, files, args.stages)
    make_folder(args.output / "stages" if args.stages else args.output)

    tally = Tally(len(files), args.output)
    try:
        with signals_like_ctrl_c():
            predict_files(predictor, files, args.output, args.workers, args.stages, tally)
    except KeyboardInterrupt as stop:
        number = signal_of(stop)
        print(f"predict.py: stopped by {describe_signal(number)}; {tally}", file=sys.stderr)
        return 128 + number
    except OSError as error:
        raise UserError(f"{error}; {tally}") from None

    print_summary(args, predictor, tally, passed_over)
    return 1 if tally.failures else 0


def check(args: PredictArgs) -> None:
    """Finds the mistakes that can be seen before the weights are loaded.

    Raises:
        UserError: says what is wrong.
    """
    for text in args.inputs:
        check_exists(text)
    if not args.inputs and not any(map(os.path.exists, args.classes)):
        words = f"{', '.join(args.classes)} after --classes: no such file; " if args.classes else ""
        raise UserError(f"{words}{NO_INPUTS}")
    sizes = [size for size in (args.test_size, args.max_size) if size is not None]
    if min([args.batch_size, *sizes]) < 1 or args.workers < 0:
        raise UserError(
            "--batch-size, --test-size and --max-size should be at least 1, --workers at least 0"
        )
    if not 0 <= args.score_threshold <= 1:
        raise UserError(f"--score-threshold {args.score_threshold} should lie in 0 … 1")
    if args.stages and is_onnx(args.weights):
        raise UserError(
            f"--stages: {args.weights} gives the detections of the last stage only; use the "
            "checkpoint that it was exported from"
        )


def split_classes(words: Sequence[str], class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words after `--classes` as class names and inputs.

    The flag takes all words up to the next flag, as in `--classes cat dog a.jpg`. A word that is
    not a class of the model but a file or folder must be an input.
    """
    inputs = [word for word in words if word not in class_names and os.path.exists(word)]
    return [word for word in words if word not in inputs], inputs


def check_output(output: Path, files: Sequence[Path], with_stages: bool) -> None:
    """Refuses to write over one of the inputs.

    Raises:
        UserError: names it.
    """
    # Path.resolve would raise an error on links in a circle.
    inputs = {os.path.realpath(file) for file in files}
    for folder in (output, output / "stages") if with_stages else (output,):
        for name in output_names(files):
            if os.path.realpath(folder / f"{name}.png") in inputs:
                raise UserError(
                    f"--output {output}: {name}.png there is one of the inputs; choose another "
                    "folder"
                )


def print_summary(
    args: PredictArgs, predictor: Predictor, tally: Tally, passed_over: Counter[str]
) -> None:
    if passed_over:
        print(f"passed over in the folders: {describe(passed_over)}")
    how = "in onnxruntime" if is_onnx(args.weights) else "batch norms folded, channels last"
    print(
        f"{tally.images} image{'s' * (tally.images != 1)}, {tally.detections} detections, "
        f"{len(tally.failures)} skipped "
        f"({predictor.device.type}, {how}, mixed precision {args.amp})"
    )
    print(f"written: {args.output / 'detections.json'}, and the pictures beside it")


if __name__ == "__main__":
    sys.exit(run_main(main, "predict.py"))

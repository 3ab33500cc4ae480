"""`python -m experiments.benchmark inference`: speed of this model and of other detectors on the same images.

Ours in several variants of the same weights, as a whole and in parts, beside the detectors of `benchmark_peers.py`,
each in float32 and under autocast. "ours" is as built, a ResNet with its channels last in memory. A pass goes from
images (3, H, W) that lie on the device to detections.

**All weights are random**, which is right for speed: our model does the same work on any image and any weights. What
is not so for the peers is said in `benchmark_peers.py`. Proposal boxes are spread over places and sizes, as those of a
trained model are, so that RoIAlign reads from all levels.

Columns: GFLOP are of one image, a multiply-add being two operations, without what `FlopCounterMode` does not know
(RoIAlign, deformable attention, element-wise work). "of product rate" is their share of what the machine does in the
same time when it multiplies large matrices of this dtype. It may be above 100 %: on CPUs whose convolutions come from
a better library than their float32 products, and on GPUs in float32, where PyTorch allows TF32 in convolutions alone.
Peak memory, on CUDA alone, is the model's weights and the most that a pass adds to them; on a CPU only the whole
process's is known, with all variants' weights in it.
The differences are the largest ones to ours in plain float32, over scores (0–1) and boxes of all proposals and stages.
In bfloat16 they are no measure of quality: with random weights every rounding grows from stage to stage.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backbone import fold_batch_norms
from config import PRESETS, Config, PresetName
from experiments.benchmark_peers import PeerName, build_peer, rois_per_image, tame_residuals
from experiments.measure import PeakMemory, Row, product_rate, report, take_turns
from model import SparseRCNN, build_model
from support.cli import AMP_DTYPES, parse_args, pick_device
from support.errors import UserError, first_line

Call = Callable[[], object]
PLAIN, FAST, FIRST, WHOLE = "ours", "ours, for_inference()", "ours, channels first", "all"
COLUMNS = {
    "variant": "{variant}",
    "part": "{part}",
    "dtype": "{dtype}",
    "ms, median": "{median_ms:.1f}",
    "min – max": "{min_ms:.1f} – {max_ms:.1f}",
    "images/s": "{images_per_second:.2f}",
    "GFLOP": "{gflop:.1f}",
    "of product rate": "{of_product_rate:.0%}",
    "parameters": "{parameters_m:.1f} M",
    "peak memory": "{peak_mb:.0f} MB",
    "scores ±": "{score_difference:.0e}",
    "boxes ± px": "{box_difference_px:.0e}",
}


@dataclass(frozen=True)
class InferenceArgs:
    preset: PresetName = "r50-100"  # which of our models
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps …
    amp: tuple[Literal["off", "bf16", "fp16"], ...] = (
        "off",
        "bf16",
    )  # float32, and mixed precision
    height: int = 800  # pixels of the images
    width: int = 1216  # pixels of the images
    batch_size: int = 1  # images at a time
    repeats: int = 7  # measurements of every variant
    warmup: int = 1  # passes of every variant before them
    compile: bool = (
        False  # also our fastest variant with torch.compile, which takes minutes to compile
    )
    peers: tuple[PeerName, ...] = get_args(PeerName)  # other detectors; none for ours alone
    seed: int = 0  # of weights and images
    output: Path = Path("runs/benchmark.jsonl")  # file that a line is added to


def dtype_name(amp: str) -> str:
    """ "off" -> "float32", and so on."""
    return str(AMP_DTYPES[amp]).removeprefix("torch.")


# --- what is measured ---


def random_model(config: Config) -> SparseRCNN:
    """Random weights with boxes and scores as varied as those of a trained model; in eval mode."""
    model = build_model(config, pretrained_backbone=False).eval().requires_grad_(False)
    tame_residuals(model.backbone)
    centres, sides = model.proposal_boxes[:, :2], model.proposal_boxes[:, 2:]  # in 0–1
    centres.uniform_(0.2, 0.8)
    sides.uniform_(-3, 0).exp_()  # between a twentieth and all of the image
    for stage in model.head.stages:
        nn.init.normal_(
            stage.box_deltas.weight, std=0.02
        )  # boxes move by a few per cent, as late stages move them
    return model


def our_models(config: Config, device: torch.device, compiled: bool) -> dict[str, SparseRCNN]:
    """The variants of one model, by name."""
    plain = random_model(config).to(device)
    first = copy.deepcopy(plain)
    first.backbone.to(memory_format=torch.contiguous_format)
    folded = copy.deepcopy(first)
    fold_batch_norms(folded.backbone)
    models = {
        FIRST: first,
        f"{FIRST}, norms folded": folded,
        PLAIN: plain,
        FAST: plain.for_inference(),
    }
    if compiled:
        model = models[f"{FAST}, compiled"] = plain.for_inference()
        model.compile()
    return models


def check_compiler(device: torch.device) -> None:
    """Fails at once, rather than after minutes, where torch.compile has no compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise UserError(
            f"--compile: torch.compile does not work here ({first_line(error)})"
        ) from None


def parts(model: SparseRCNN, images: Sequence[Tensor]) -> dict[str, Call]:
    """Each part of a pass by itself, on what the part before it gives."""
    batch, whwh_px = model.prepare(images)
    pro_feats = model.proposal_feats.expand(len(batch), -1, -1)  # (B, N, C)
    pyramid = model.backbone(batch)
    logits, boxes_px = model.head(pyramid, model.initial_boxes_px(whwh_px), pro_feats)
    return {
        "prepare": lambda: model.prepare(images),
        "backbone": lambda: model.backbone(batch),
        "head": lambda: model.head(pyramid, model.initial_boxes_px(whwh_px), pro_feats),
        "post-processing": lambda: model.detections(logits[-1], boxes_px[-1], whwh_px),
    }


# --- figures that take one pass ---


def count_flops(run: Call) -> int:
    """Floating-point operations of convolutions and matrix products, a multiply-add being two.

    The fused attention kernels are unknown to the counter, so attention is done with plain products meanwhile.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def peak_mb(model: nn.Module, run: Call, device: torch.device) -> float | None:
    """The model's weights and the most that a pass adds; None where the device does not count."""
    if device.type != "cuda":
        return None
    with PeakMemory(device) as memory:  # without all variants' weights
        run()
    return (
        memory.megabytes
        + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 1e6
    )


def differences(
    model: SparseRCNN, images: Sequence[Tensor], expected: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The largest differences to the logits and boxes expected, before any selection: no order to get in the way."""
    found = model.stages(images)
    scores, expected_scores = found.logits.float().sigmoid(), expected[0].float().sigmoid()
    return {
        "score_difference": (scores - expected_scores).abs().max().item(),
        "box_difference_px": (found.boxes - expected[1]).abs().max().item(),
    }


# --- the command ---


def measure_inference(
    models: dict[str, nn.Module],
    images: Sequence[Tensor],
    args: InferenceArgs,
    rates: dict[str, float],
) -> list[Row]:
    """The rows of the table.

    Args:
        models: in eval mode; those that are `SparseRCNN`s are variants of the one named `PLAIN`.
        images: of equal size, on the models' device.
        args: `amp`, `repeats` and `warmup` count here.
        rates: operations a second of a large matrix product in each of `args.amp`.
    """
    device = images[0].device
    plain, size = models[PLAIN], len(images)
    ours = [name for name, model in models.items() if isinstance(model, SparseRCNN)]
    expected = plain.stages(images)
    flops = {(PLAIN, part): count_flops(call) for part, call in parts(plain, images).items()}
    flops |= {
        (n, WHOLE): count_flops(lambda m=m: m(images))
        for n, m in models.items()
        if n == PLAIN or n not in ours
    }

    def precision(amp: str) -> torch.autocast:
        return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")

    def passes(call: Call, amp: str) -> Callable[[], int]:
        def run() -> int:
            with precision(amp):
                call()
            return size

        return run

    runs: dict[tuple[str, str, str], Callable[[], int]] = {}
    extras: dict[tuple[str, str, str], Row] = {}  # what is known of a run beside its time
    for name, model in models.items():
        for amp in args.amp:
            with precision(amp):
                calls: dict[str, Call] = {WHOLE: lambda model=model: model(images)}
                calls |= parts(model, images) if name in (PLAIN, FAST) else {}
                found = differences(model, images, expected) if name in ours else {}
                memory = peak_mb(model, calls[WHOLE], device)
            runs |= {(name, part, amp): passes(call, amp) for part, call in calls.items()}
            weights = sum(parameter.numel() for parameter in model.parameters())
            extras[name, WHOLE, amp] = {**found, "parameters_m": weights / 1e6, "peak_mb": memory}

    rows = []
    for (name, part, amp), turns in take_turns(runs, args.repeats, args.warmup, device).items():
        times_ms = [1000 * seconds for _, seconds in turns]
        median_s, count = (
            statistics.median(times_ms) / 1000,
            flops[PLAIN if name in ours else name, part],
        )
        rows.append(
            {
                "variant": name,
                "part": part,
                "dtype": dtype_name(amp),
                "median_ms": 1000 * median_s,
                "min_ms": min(times_ms),
                "max_ms": max(times_ms),
                "images_per_second": size / median_s if part == WHOLE else None,
                "gflop": count / size / 1e9 or None,  # none in preparing and post-processing
                "of_product_rate": count / median_s / rates[amp] or None,
                **extras.get((name, part, amp), {}),
            }
        )
    return rows


def main(argv: Sequence[str]) -> None:
    """The command `inference`; a user's mistake raises `UserError`."""
    args = parse_args(
        argv,
        InferenceArgs,
        "python -m experiments.benchmark inference",
        "Speed of detection, beside others.",
    )
    if min(args.batch_size, args.repeats, args.warmup) < 1 or args.seed not in range(2**63):
        raise UserError(
            "inference: --batch-size, --repeats and --warmup are at least 1, --seed in 0 … 2^63 − 1"
        )
    if not args.amp:
        raise UserError("inference: --amp names no precision; off is float32")
    if min(args.height, args.width) < 32:
        raise UserError(
            f"inference: images of {args.height}×{args.width} px; --height and --width are at least 32"
        )
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    if args.compile:
        check_compiler(device)
    models: dict[str, nn.Module] = dict(our_models(PRESETS[args.preset], device, args.compile))
    for name in args.peers:
        peer = build_peer(name, args.height, args.width)
        if peer is None:
            print(f"left out: {name}, as transformers is not installed")
        else:
            models[name] = peer.to(device)
    images = list(torch.rand(args.batch_size, 3, args.height, args.width).to(device))
    with torch.inference_mode():
        rates = {amp: product_rate(device, AMP_DTYPES[amp]) for amp in args.amp}
        rows = measure_inference(models, images, args, rates)
        figures = {
            f"{dtype_name(amp)}_product_gflop_per_s": rate / 1e9 for amp, rate in rates.items()
        }
        if "faster-rcnn" in models:
            figures["faster_rcnn_rois_per_image"] = rois_per_image(models["faster-rcnn"], images)
    times_ms = {
        (row["variant"], row["dtype"]): row["median_ms"] for row in rows if row["part"] == WHOLE
    }
    if theirs := times_ms.get(("faster-rcnn", "float32")):
        figures |= {
            f"{dtype}_over_faster_rcnn": ms / theirs
            for (name, dtype), ms in times_ms.items()
            if name == FAST
        }
    used = {
        "threads": torch.get_num_threads(),
        "preset": args.preset,
        "resolution": f"{args.height}×{args.width} px",
    }
    used |= {
        "batch": args.batch_size,
        "warm-up": args.warmup,
        "repeats": args.repeats,
        "seed": args.seed,
    }
    report(args.output, "inference", used, rows, COLUMNS, device, **figures)

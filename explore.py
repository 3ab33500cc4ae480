"""A page to play with: what every proposal does with one image, stage by stage.

In:  an image, a checkpoint, and the image's annotations in a COCO JSON if there are any.
Out: one HTML file. It needs no server, no network and no library: everything is in it.

    python explore.py photo.jpg --weights assets/blood.pt

The page shows boxes, scores, attention and what the generated kernels find, for the model as it was
trained, for five interventions ("what if …") and after the removal of a proposal. All of this is
computed here, by the model; `explore.html` only draws it. The backbone runs once, the head once for
each question, and each question is a small function that changes a copy of the model.

In Python, and in a notebook's `<iframe srcdoc="…">`:

    text = page(model, image, class_names)

Shapes: N proposals, S stages, K classes, C channels, D dynamic channels, R×R bins per region; one
image (B = 1). n proposals are kept in detail. Boxes are xyxy in pixels of the image that the model
gets.
"""

import base64
import copy
import io
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision import tv_tensors

from data import CocoDataset, eval_transforms
from head import Stage
from model import SparseRCNN, load_model
from support.cli import parse_args, run_main
from support.devices import choose_threads
from support.errors import UserError
from support.files import make_folder, replacing
from support.pictures import to_image
from visualize import colour

TEMPLATE = Path(__file__).with_suffix(".html")

# Attention and responses of the what-ifs are in the page for proposals that end with this score.
OBJECT_SCORE = 0.3


# --- looking inside ---


class Run(NamedTuple):
    """What the head did with one image."""

    boxes: Tensor  # (S + 1, N, 4), the proposal boxes first
    scores: Tensor  # (S, N, K)
    attention: Tensor  # (S, N, N), row i: whom proposal i attends to; the mean over the heads
    responses: Tensor  # (S, N, D, R·R), what the first generated kernels find in each bin


@torch.inference_mode()
def run_head(
    model: SparseRCNN,
    pyramid: Sequence[Tensor],
    whwh_px: Tensor,
    change: Callable[[SparseRCNN], None] = lambda model: None,
) -> Run:
    """Runs all stages from the proposals, and keeps what `SparseRCNN.stages` does not tell.

    Args:
        model: in eval mode. It stays as it is: hooks and changes go to a copy.
        pyramid: [p2, p3, p4, p5] of one image, each (1, C, H/stride, W/stride).
        whwh_px: (1, 4), the image's w, h, w, h.
        change: an intervention, such as one of `WHAT_IFS`.
    """
    model = copy.deepcopy(model, {id(model.backbone): model.backbone})  # without the large part
    change(model)
    attention, responses = [], []

    def keep_attention(stage: Stage, args: tuple[Tensor, Tensor, Tensor]) -> None:
        # Stages do not ask for the weights, which is faster. So the layer is asked once more.
        pro_feats = args[2]  # (1, N, C)
        attention.append(stage.self_attn(pro_feats, pro_feats, pro_feats)[1][0])  # (N, N)

    def keep_responses(norm: nn.Module, args: tuple[Tensor], outputs: Tensor) -> None:
        responses.append(relu(outputs).mT)  # (N, D, R·R)

    for stage in model.head.stages:
        stage.register_forward_pre_hook(keep_attention)
        stage.interaction.norm1.register_forward_hook(keep_responses)
    boxes_px = model.initial_boxes_px(whwh_px)  # (1, N, 4)
    logits, stages_px = model.head(pyramid, boxes_px, model.proposal_feats[None])

    boxes_px = torch.cat([boxes_px, stages_px[:, 0]])
    scores = logits[:, 0].sigmoid()
    return Run(boxes_px, scores, torch.stack(attention), torch.stack(responses))


# --- what if …: each changes a copy of the trained model ---


def no_self_attention(model: SparseRCNN) -> None:
    """The self-attention is left out of all stages: no proposal knows of the others."""

    def silence(layer: nn.Module, args: tuple[Tensor, ...], outputs: tuple[Any, Any]) -> Any:
        return [values if values is None else torch.zeros_like(values) for values in outputs]

    for stage in model.head.stages:
        stage.self_attn.register_forward_hook(silence)  # x = LayerNorm(x + 0)


def features_reset(model: SparseRCNN) -> None:
    """Every stage gets the learned features: only boxes are handed on, not what was found."""
    for stage in model.head.stages:  # which takes roi_feats, boxes_px, pro_feats
        stage.register_forward_pre_hook(lambda _, args: (*args[:2], model.proposal_feats[None]))


def one_pair_of_kernels(model: SparseRCNN) -> None:
    """In each stage, all proposals filter their regions with the mean of their kernels."""

    def average(linear1: nn.Module, args: tuple[Tensor], dynamic_params: Tensor) -> Tensor:
        return dynamic_params.mean(0, keepdim=True).expand_as(dynamic_params)  # (N, 2·C·D)

    for stage in model.head.stages:
        stage.interaction.linear1.register_forward_hook(average)


def whole_image_boxes(model: SparseRCNN) -> None:
    """In stage 1 all proposals see the same region: only their features tell them apart."""
    model.proposal_boxes[:] = model.proposal_boxes.new_tensor([0.5, 0.5, 1.0, 1.0])  # cx, cy, w, h


def one_feature(model: SparseRCNN) -> None:
    """All proposals start with the mean of the learned features: only their boxes differ."""
    model.proposal_feats[:] = model.proposal_feats.mean(0)


def without(model: SparseRCNN, proposal: int) -> None:
    """Nobody attends to it, as if it did not exist. What it predicts itself is to be ignored."""
    indices = torch.arange(len(model.proposal_boxes), device=model.proposal_boxes.device)
    # (N, N), True: i does not look at j. It looks at itself: softmax needs somebody.
    hidden = (indices == proposal) & (indices[:, None] != proposal)
    for stage in model.head.stages:
        stage.self_attn.register_forward_pre_hook(
            lambda layer, args, kwargs: (args, {**kwargs, "attn_mask": hidden}), with_kwargs=True
        )


WHAT_IFS = {
    "no self-attention": no_self_attention,
    "features reset at each stage": features_reset,
    "one pair of kernels for all": one_pair_of_kernels,
    "every box starts as the whole image": whole_image_boxes,
    "one feature for all": one_feature,
}


# --- the page ---


@torch.inference_mode()
def page(
    model: SparseRCNN,
    image: Tensor,
    class_names: Sequence[str],
    target: dict[str, Tensor] | None = None,
    picture: Tensor | None = None,
    title: str = "an image",
) -> str:
    """The page about one image, as the text of an HTML file.

    Args:
        model: in eval mode.
        image: (3, H, W), at the size that the model takes.
        class_names: K names.
        target: `boxes` (M, 4) in pixels of the image, `labels` (M,): shown on request.
        picture: (3, h, w), what to draw below the boxes, if there is a larger one than `image`.
        title: names the image.
    """
    batch, whwh_px = model.prepare([image.as_subclass(Tensor)])
    pyramid = model.backbone(batch)
    trained = run_head(model, pyramid, whwh_px)
    final = trained.scores[-1].amax(-1)  # (N,)
    by_score = final.argsort(descending=True)  # (N,)

    block = bytearray()  # for all arrays
    unit_px = max(1 / 8, float(whwh_px.max()) / 8192)  # boxes may reach beyond the image
    runs = [{"name": "as trained"} | pack(block, trained, by_score[:100], unit_px)]
    for name, what_if in WHAT_IFS.items():
        run = run_head(model, pyramid, whwh_px, what_if)
        best = torch.maximum(run.scores[-1].amax(-1), final)  # (N,)
        count = int((best >= OBJECT_SCORE).sum().clamp(8, 48))
        detailed = best.argsort(descending=True)[:count]
        packed = pack(block, run, detailed, unit_px)
        runs.append({"name": name, "meaning": what_if.__doc__} | packed)

    removals = {}
    # Each removal takes a run. Of many proposals only the best are removed.
    for proposal in by_score[: 64 if len(final) <= 64 else 16].tolist():
        run = run_head(model, pyramid, whwh_px, partial(without, proposal=proposal))
        run.scores[:, proposal] = 0
        rise = run.scores[-1].amax(-1) - final  # (N,); who rises most may take the object
        detailed = rise.topk(1).indices if final[proposal] >= OBJECT_SCORE else by_score[:0]
        removals[proposal] = pack(block, run, detailed, unit_px)

    data = {
        "title": title,
        "size": [image.shape[2], image.shape[1]],
        "picture": data_uri(image if picture is None else picture),
        "classNames": list(class_names),
        "colours": [colour(label) for label in range(len(class_names))],
        "truth": target and {key: target[key].tolist() for key in ("boxes", "labels")},
        "stages": len(trained.scores),
        "proposals": len(final),
        "bins": model.head.pooler.roi_size,
        "outputs": trained.responses.shape[2],
        "runs": runs,
        "removals": removals,
        "arrays": base64.b64encode(zlib.compress(block, 9)).decode(),
    }
    # "</script>" in a name would end the script that the data is in.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', text)


def add(block: bytearray, values: Tensor, dtype: str, unit: float = 1) -> list[Any]:
    """Appends values / unit, rounded, to the block; returns what JavaScript needs to find them."""
    block += bytes(len(block) % 2)  # arrays of 16 bits start at even bytes
    numbers = (values / unit).round().cpu().numpy().astype(dtype)
    place = [dtype, len(block), numbers.shape, unit]
    block += numbers.tobytes()
    return place


def pack(block: bytearray, run: Run, detailed: Tensor, unit_px: float) -> dict[str, Any]:
    """Appends a run to the block; attention and responses only of the proposals `detailed` (n,)."""
    scores, labels = run.scores.max(-1)  # (S, N) each: what a stage says
    classes = run.scores[-1].topk(min(3, run.scores.shape[2])).indices  # (N, 3), where it ends
    limit_px = 32767 * unit_px
    class_scores = run.scores.take_along_dim(classes[None], dim=2)  # (S, N, 3)

    responses = run.responses[:, detailed]  # (S, n, D, R·R)
    D = responses.shape[2]
    strongest = responses.sum(-1).topk(D if D <= 16 else 8).indices
    outputs = strongest.sort().values  # (S, n, d); d = 8 of many outputs
    responses = responses.take_along_dim(outputs[..., None], dim=2)  # (S, n, d, R·R)

    return {
        "boxes": add(block, run.boxes.clip(-limit_px, limit_px), "<i2", unit_px),
        "scores": add(block, scores, "<u2", 1 / 1000),
        "labels": add(block, labels, "<u2"),
        "classes": add(block, classes, "<u2"),
        "classScores": add(block, class_scores, "<u2", 1 / 1000),
        "detailed": detailed.tolist(),
        "attention": add(block, run.attention[:, detailed], "<u1", 1 / 255),
        "outputs": add(block, outputs, "<u2"),
        # The eye needs no more than 32 levels, and they take half of the space of 256.
        "responses": add(block, responses / run.responses.max(), "<u1", 1 / 31),
    }


def data_uri(picture: Tensor) -> str:
    """An image (3, h, w) as the address of a picture that is in the page itself."""
    photo = Image.fromarray(to_image(picture).permute(1, 2, 0).cpu().numpy())
    photo.thumbnail((1000, 1000))  # pixels at most; a smaller one stays as it is
    photo.save(file := io.BytesIO(), "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# --- the command line ---


@dataclass(frozen=True)
class ExploreArgs:
    image: tyro.conf.Positional[Path]  # the photograph
    weights: Path  # checkpoint
    annotations: Path | None = None  # COCO JSON that lists the image; its objects can be shown
    output: Path | None = None  # HTML file to write; by default runs/explore/NAME.html


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        UserError: a mistake that the user can fix.
    """
    args = parse_args(argv, ExploreArgs, "explore.py", __doc__.partition("\n")[0])
    output = args.output or Path("runs/explore") / f"{args.image.stem}.html"
    if args.weights.suffix.lower() == ".onnx":
        raise UserError(f"{args.weights}: ONNX files hide what stages do; give the checkpoint")
    if output.resolve() == TEMPLATE:
        raise UserError(f"--output {output}: is the template of the page; give another name")
    make_folder(output.parent)

    model, checkpoint = load_model(args.weights)
    config, class_names = checkpoint["config"], checkpoint["class_names"]
    choose_threads(torch.device("cpu"), config.backbone)
    transforms = eval_transforms(config)
    picture = to_image(args.image)
    if args.annotations is None:
        image, target = transforms(tv_tensors.Image(picture)), None
    else:
        # True, True: the classes need not be the model's; objects of others are not shown.
        folder = args.image.parent
        dataset = CocoDataset(args.annotations, folder, transforms, class_names, True, True)
        if args.image.name not in dataset.file_names:
            raise UserError(f"{args.annotations}: does not list {args.image.name}")
        image, target = dataset[list(dataset.file_names).index(args.image.name)]

    text = page(model, image, class_names, target, picture, title=args.image.name)
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{output}: {len(text) / 1e6:.2f} MB; open it in a browser")


if __name__ == "__main__":
    sys.exit(run_main(main, "explore.py"))

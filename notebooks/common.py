"""What several notebooks do: the two committed checkpoints, their images, and simple counts.

Shapes: B images, N proposals, C channels, S stages, K classes; M objects in one image, n
detections. Boxes are xyxy in pixels of the images that the model takes. Found objects are dicts of
`boxes` (n, 4), `scores` (n,) and `labels` (n,), targets dicts of `boxes` (M, 4) and `labels` (M,).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from data import validation_set
from evaluate import coco_metrics, coco_results
from model import load_model

torch.set_num_threads(1)  # in models as small as these, more threads wait for one another

BLOOD = {"val_json": "assets/blood/val.json", "val_images": "assets/blood"}
Found = dict[str, Tensor]


class Trained:
    """A committed checkpoint, some of its validation images, and what it finds in them.

    Args:
        name: "shapes" or "blood".
        count: how many images; there are six photographs of blood cells.

    Attributes:
        model, class_names, dataset: the model in eval mode, K names, the data set.
        images, targets: B images (3, H, W) and their objects.
        whwh_px: (B, 4), the w, h, w, h of each image.
        pyramid: p2 … p5, each (B, C, h, w).
        learned_px, learned_feats: (B, N, 4) and (B, N, C), where every image starts.
        logits, boxes_px: (S, B, N, K) and (S, B, N, 4), after every stage.
        found: the detections of the last stage, for each image.
    """

    @torch.no_grad()
    def __init__(self, name: str, count: int = 6):
        self.model, checkpoint = load_model(f"assets/{name}.pt")
        overrides = BLOOD if name == "blood" else {"shapes_val": count}
        self.dataset = validation_set(checkpoint, **overrides)
        self.class_names, self.config = checkpoint["class_names"], checkpoint["config"]
        self.title = f"{name}, {len(self.dataset)} images"

        self.images, self.raw = zip(
            *(self.dataset[i] for i in range(len(self.dataset))), strict=True
        )
        self.targets = [
            {"boxes": target["boxes"].as_subclass(Tensor), "labels": target["labels"]}
            for target in self.raw
        ]
        batch, self.whwh_px = self.model.prepare(self.images)
        self.pyramid = self.model.backbone(batch)
        self.learned_px = self.model.initial_boxes_px(self.whwh_px)
        self.learned_feats = self.model.proposal_feats.expand(len(batch), -1, -1)
        self.logits, self.boxes_px = self.model.head(
            self.pyramid, self.learned_px, self.learned_feats
        )
        self.found = self.detections(self.logits[-1], self.boxes_px[-1])

    def detections(self, logits: Tensor, boxes_px: Tensor) -> list[Found]:
        """One stage's logits (B, N, K) and boxes (B, N, 4) -> detections of each image."""
        return self.model.detections(logits, boxes_px, self.whwh_px)

    def ap(self, found: Sequence[Found]) -> float:
        """COCO's AP of such detections, in points of 100."""
        records = []
        for each, image, target in zip(found, self.images, self.raw, strict=True):
            size_hw = image.shape[-2:]
            records += coco_results(each, target, size_hw, self.dataset.category_ids)
        return 100 * max(0.0, coco_metrics(self.dataset.coco(), records)["AP"])


def at_least(found: Found, threshold: float) -> Found:
    """The detections that score at least `threshold`."""
    keep = found["scores"] >= threshold
    return {key: values[keep] for key, values in found.items()}


def with_nms(found: Found, threshold: float = 0.5) -> Found:
    """The detections that NMS leaves, class by class."""
    kept = batched_nms(found["boxes"], found["scores"], found["labels"], threshold)
    return {key: values[kept] for key, values in found.items()}


def boxes_per_object(found: Found, target: Found) -> Tensor:
    """How many detections lie on each object, (M,): the class is right, the IoU at least 0.5.

    A detection that lies on several objects counts for the one that it overlaps most.
    """
    fit = box_iou(found["boxes"], target["boxes"])  # (n, M)
    fit = fit * (found["labels"][:, None] == target["labels"])
    best, obj = fit.max(1)
    return obj[best >= 0.5].bincount(minlength=len(target["labels"]))


@contextmanager
def replaced_kernels(
    model: torch.nn.Module, change: Callable[[Tensor, int], Tensor] = lambda kernels, s: kernels
) -> Iterator[list[Tensor]]:
    """Here stage s, from 0, uses the kernels change(kernels, s), (B, N, 2·C·D).

    Yields:
        A list, to which every stage adds the kernels that it used.
    """
    N, used = len(model.proposal_feats), []

    def hook(s: int, generated: Tensor) -> Tensor:
        used.append(change(generated.unflatten(0, (-1, N)), s))
        return used[-1].flatten(0, 1)

    handles = [
        stage.interaction.linear1.register_forward_hook(lambda _, __, output, s=s: hook(s, output))
        for s, stage in enumerate(model.head.stages)
    ]
    yield used
    for handle in handles:
        handle.remove()

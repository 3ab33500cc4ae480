"""Matching: which proposal answers for which object, one to one (slides: "prediction loss").

In:  every stage's predictions and the objects of each image.
Out: an `Assignment`, the list of matched (stage, image, proposal, object).

Because every object is given to exactly one proposal and all other proposals are told "nothing here", a second proposal
on the same object is a mistake that the loss punishes. That is why no NMS is needed afterwards.

Shapes: S stages, B images, N proposals, K classes; M objects in all images of the batch together, in their order; P
matched pairs, S · Σ over images of min(objects of the image, N).

The file imports nothing of this project: copied alone it runs.

>>> import torch
>>> logits = torch.tensor([[[[-5.0], [5.0]]]])  # one stage, one image, two proposals, one class
>>> boxes_px = torch.tensor([[[[0.0, 0.0, 4.0, 4.0], [10.0, 10.0, 20.0, 20.0]]]])
>>> targets = [{"boxes": torch.tensor([[10.0, 10.0, 19.0, 20.0]]), "labels": torch.tensor([0])}]
>>> HungarianMatcher()(logits, boxes_px, targets, whwh_px=torch.tensor([[32.0, 32.0, 32.0, 32.0]])).proposal
tensor([1])

Deviations (ours | paper | authors' code | why)
    matching makes one transfer to the host a step | — | one a stage | each waits for the device; the same assignment
    only an image's own objects are compared with its proposals | — | all objects of the batch | B times less work
    of more objects than proposals, as many as there are proposals get one | — | crashed in early versions | real data
        has such images
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


class Assignment(NamedTuple):
    """Matched pairs of all stages and images; each field is (P,) int64 on the predictions' device."""

    stage: Tensor  # 0 … S − 1
    image: Tensor  # 0 … B − 1
    proposal: Tensor  # 0 … N − 1
    object: Tensor  # 0 … M − 1, counted through the batch: an index into the concatenated targets


def _generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (…, 4) xyxy pair by pair, broadcast. torchvision's compares all with all, its loss adds masks."""
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .prod(-1)
    )
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = area_a + area_b - overlap
    return overlap / union - (hull - union) / hull


class HungarianMatcher(nn.Module):
    """Assigns objects to proposals at the least total cost: 2 · focal + 5 · L1 + 2 · (−GIoU).

    Args:
        class_weight, l1_weight, giou_weight: λ of the three terms (slides: "prediction loss").
        alpha, gamma: of the focal term.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma

    def cost(
        self,
        logits: Tensor,
        boxes_px: Tensor,
        targets: Sequence[dict[str, Tensor]],
        whwh_px: Tensor,
    ) -> Tensor:
        """What it costs to give each object to each proposal of its own image: (M, S, N) float32, all on the device.

        Arguments as for `forward`.
        """
        sizes = [len(target["labels"]) for target in targets]
        labels = torch.cat([target["labels"] for target in targets])  # (M,)
        boxes = torch.cat([target["boxes"] for target in targets]).float()[
            :, None, None
        ]  # (M, 1, 1, 4)
        image = torch.arange(len(sizes), device=logits.device).repeat_interleave(
            torch.tensor(sizes, device=logits.device), output_size=sum(sizes)
        )  # (M,)

        # Each object needs one column of its own image's logits, the one of its class. Indexing stages with a slice
        # between the two indices moves M to the front.
        own_logits = logits[:, image, :, labels].float()  # (M, S, N)
        own_boxes = boxes_px[:, image].float().transpose(0, 1)  # (M, S, N, 4)

        # Focal loss as a cost: what it would cost to call this a positive, minus what it costs to leave it a negative.
        p = own_logits.sigmoid()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        cost_class = positive - negative

        # L1 in shares of the image, so that its scale does not depend on the picture's; GIoU has no scale.
        whwh = whwh_px[image][:, None, None]  # (M, 1, 1, 4)
        cost_l1 = (own_boxes / whwh - boxes / whwh).abs().sum(-1)
        cost_giou = -_generalized_iou(own_boxes, boxes)
        return (
            self.class_weight * cost_class + self.l1_weight * cost_l1 + self.giou_weight * cost_giou
        )

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        boxes_px: Tensor,
        targets: Sequence[dict[str, Tensor]],
        whwh_px: Tensor,
    ) -> Assignment:
        """Matches every stage of every image for itself.

        Args:
            logits: (S, B, N, K), before the sigmoid.
            boxes_px: (S, B, N, 4) xyxy pixels.
            targets: B dicts with `boxes` (objects, 4) xyxy pixels and `labels` (objects,) int64 in 0 … K − 1.
            whwh_px: (B, 4), each image's width, height, width, height before padding.

        Returns:
            An `Assignment` of P pairs, ordered by image, then stage.

        Raises:
            FloatingPointError: a cost is not finite; names image, stage and likely cause.
        """
        sizes = [len(target["labels"]) for target in targets]
        cost = (
            self.cost(logits, boxes_px, targets, whwh_px).cpu().numpy()
        )  # (M, S, N); matching's only transfer to the host
        if not np.isfinite(cost).all():
            raise FloatingPointError(self._explain(cost, sizes, targets))

        pairs = [np.empty((4, 0), dtype=np.int64)]
        first = 0  # object of the image, counted through the batch
        for image, size in enumerate(sizes):
            for stage in range(cost.shape[1]):
                rows, columns = linear_sum_assignment(
                    cost[first : first + size, stage]
                )  # objects, proposals
                same = np.ones_like(rows)
                pairs.append(np.stack((stage * same, image * same, columns, first + rows)))
            first += size
        return Assignment(*torch.from_numpy(np.concatenate(pairs, axis=1)).to(logits.device))

    @staticmethod
    def _explain(cost: np.ndarray, sizes: list[int], targets: Sequence[dict[str, Tensor]]) -> str:
        """The message for a cost that is not finite, cost (M, S, N)."""
        object_index, stage, proposal = np.argwhere(~np.isfinite(cost))[0]
        image = int(np.searchsorted(np.cumsum(sizes), object_index, side="right"))
        boxes = targets[image]["boxes"]
        bad_target = not bool(torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all())
        cause = (
            "its target boxes are not finite or have no area: check the annotations"
            if bad_target
            else "the model's predictions are no longer finite: the learning rate is probably too high for this batch "
            "size, or the precision too low (try --lr a few times smaller, --amp off or bf16)"
        )
        where = f"image {image} of the batch, stage {stage}, proposal {proposal}"
        return f"matching: the cost is not finite for {where}; {cause}"

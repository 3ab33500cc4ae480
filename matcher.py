"""Matching: decides which proposal answers for which object, one to one.

Every object is given to exactly one proposal, and all other proposals learn to say "nothing here".
A second proposal on the same object is therefore a mistake that the loss punishes, and this is why
no NMS is needed afterwards. Of all one-to-one assignments the cheapest is taken, by the cost

    C = λ_cls · C_cls + λ_L1 · C_L1 + λ_giou · C_giou,    λ = 2, 5, 2

(paper, "Set prediction loss", equation 1, and "Training details").

In:  the predictions of every stage, and the objects of each image.
Out: an `Assignment`: the stage, image, proposal and object of every matched pair.

Shapes: S stages, B images, N proposals per image, K classes; M objects in all images together, in
the order of the targets; P matched pairs: S · the sum over the images of min(objects, N).

The file imports nothing of this project: copied alone it runs.

>>> import torch
>>> logits = torch.tensor([[[[-5.0], [5.0]]]])  # one stage, one image, two proposals, one class
>>> boxes_px = torch.tensor([[[[0.0, 0.0, 4.0, 4.0], [10.0, 10.0, 20.0, 20.0]]]])
>>> targets = [{"boxes": torch.tensor([[10.0, 10.0, 19.0, 20.0]]), "labels": torch.tensor([0])}]
>>> whwh_px = torch.tensor([[32.0, 32.0, 32.0, 32.0]])
>>> HungarianMatcher()(logits, boxes_px, targets, whwh_px).proposal
tensor([1])
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

OBJECTS_AT_A_TIME = 128  # in `cost`


class Assignment(NamedTuple):
    """Matched pairs of all stages and images; each field is (P,) int64 on the logits' device."""

    stage: Tensor  # 0 … S − 1
    image: Tensor  # 0 … B − 1
    proposal: Tensor  # 0 … N − 1
    object: Tensor  # 0 … M − 1, an index into the concatenated targets


class HungarianMatcher(nn.Module):
    """Finds the assignment with the least total cost, for every stage of every image.

    Args:
        class_weight, l1_weight, giou_weight: λ of the three terms of the cost.
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
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.alpha = alpha
        self.gamma = gamma

    def cost(
        self,
        logits: Tensor,
        boxes_px: Tensor,
        targets: Sequence[dict[str, Tensor]],
        whwh_px: Tensor,
    ) -> Tensor:
        """What it costs to give an object to a proposal; the arguments are those of `forward`.

        Returns:
            (M, S, N) float32: for each object, all proposals of its own image in all stages. No
            other image's proposals are compared with it, because it cannot be given to them.
        """
        # Row m of everything below belongs to object m: its class, its image, and its box.
        label = torch.cat([target["labels"] for target in targets])  # (M,)
        image = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])  # (M,)
        object_px = torch.cat([target["boxes"] for target in targets]).float()  # (M, 4)
        rows = (label, image, object_px[:, None, None], whwh_px[image][:, None, None])

        logits = logits.permute(1, 3, 0, 2)  # (B, K, S, N)
        # In memory first every x1, then every y1 and so on: sums over the four are faster that way.
        boxes_px = boxes_px.permute(3, 1, 0, 2).float().contiguous()  # (4, B, S, N)

        costs = []
        # m objects at a time, in all stages. One object or one image at a time, it would take
        # longer to start the many small operations than to compute them. All M at a time, crowded
        # images would not fit into a processor's cache.
        blocks = [values.split(OBJECTS_AT_A_TIME) for values in rows]
        for label, image, object_px, whwh_px in zip(*blocks, strict=True):
            # What the proposals of its image predict: a logit for the object's class, and a box.
            logit = logits[image, label].float()  # (m, S, N)
            box_px = boxes_px[:, image].permute(1, 2, 3, 0)  # (m, S, N, 4)

            # Class: the focal loss if the proposal gets this object, minus the loss if it does not.
            #   C_cls = −α (1 − p)^γ log(p) + (1 − α) p^γ log(1 − p),    p = sigmoid(logit)
            p = logit.sigmoid()
            positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
            negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
            cost_class = positive - negative  # (m, S, N)

            # L1: how far the corners are from the object's, in fractions of the image's width and
            # height: in pixels, this term would count more in large images. (The paper has centre,
            # width and height in place of the corners; the authors' code has the corners.)
            #   C_L1 = |x1 − x1*| / W + |y1 − y1*| / H + |x2 − x2*| / W + |y2 − y2*| / H
            cost_l1 = (box_px / whwh_px - object_px / whwh_px).abs().sum(-1)  # (m, S, N)

            # GIoU: overlap relative to the size of the boxes. To L1 alone, 10 pixels are as far for
            # a box of 10 pixels as for one of 500.
            #   C_giou = −GIoU
            cost_giou = -generalized_iou(box_px, object_px)  # (m, S, N)

            costs.append(
                self.class_weight * cost_class
                + self.l1_weight * cost_l1
                + self.giou_weight * cost_giou
            )
        return torch.cat(costs)

    @torch.no_grad()
    def forward(
        self,
        logits: Tensor,
        boxes_px: Tensor,
        targets: Sequence[dict[str, Tensor]],
        whwh_px: Tensor,
    ) -> Assignment:
        """Matches every stage of every image separately.

        Args:
            logits: (S, B, N, K), before the sigmoid; any float dtype.
            boxes_px: (S, B, N, 4) xyxy pixels.
            targets: B dicts with `boxes` (objects, 4) xyxy pixels and `labels` (objects,) int64 in
                0 … K − 1.
            whwh_px: (B, 4), the width, height, width, height of each image before padding.

        Returns:
            P pairs, ordered by image, then stage. If an image has more objects than proposals,
            every proposal gets an object and the remaining objects get none.
        """
        # The only transfer to the host: the assignment algorithm runs there, and a transfer for
        # each stage or image would wait for the device each time.
        cost = self.cost(logits, boxes_px, targets, whwh_px).cpu().numpy()  # (M, S, N)
        # scipy refuses what is not finite. If a prediction is NaN, so is the loss of any matching:
        # whoever trains should look at that, and skip the step.
        cost = np.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)

        pairs: list[tuple[int, int, int, int]] = []
        first = 0  # the image's first object, counted through the batch
        for image, target in enumerate(targets):
            last = first + len(target["labels"])
            for stage in range(cost.shape[1]):
                objects, proposals = linear_sum_assignment(cost[first:last, stage])
                for obj, proposal in zip(objects.tolist(), proposals.tolist(), strict=True):
                    pairs.append((stage, image, proposal, first + obj))
            first = last

        columns = np.array(pairs, dtype=np.int64).reshape(-1, 4).T  # (4, P), also if P is 0
        return Assignment(*torch.from_numpy(columns).to(logits.device))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes a and b, each (…, 4) xyxy, broadcast to (…).

        GIoU = |A ∩ B| / |A ∪ B| − |C − (A ∪ B)| / |C|,    C the smallest box around A and B

    (Rezatofighi et al., 2019, Algorithm 1). Boxes that do not overlap have an IoU of 0, however far
    apart they are. The second term still tells near from far.
    """
    min_a, max_a = a[..., :2], a[..., 2:]  # top left and bottom right corner
    min_b, max_b = b[..., :2], b[..., 2:]

    overlap = (torch.minimum(max_a, max_b) - torch.maximum(min_a, min_b)).clamp(min=0).prod(-1)
    union = (max_a - min_a).prod(-1) + (max_b - min_b).prod(-1) - overlap
    hull = (torch.maximum(max_a, max_b) - torch.minimum(min_a, min_b)).prod(-1)
    return overlap / union - (hull - union) / hull

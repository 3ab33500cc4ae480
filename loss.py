"""Loss: focal + L1 + GIoU on the matched pairs, summed over all stages (slides: "prediction loss").

    L = λ_cls · L_cls + λ_L1 · L_L1 + λ_giou · L_giou,    λ = 2, 5, 2

In:  every stage's predictions, the objects of each image, and a matcher that says which proposal answers for which.
Out: a dict of weighted scalars `loss_cls_i`, `loss_l1_i`, `loss_giou_i` for stages i = 0 … S − 1; their sum is what to
     minimise.

The class loss is over *all* proposals, an unmatched one having zeros as its target; the box losses are over matched
pairs only. Each is a sum divided by the number of objects, not a mean over proposals.

Shapes: S stages, B images, N proposals, K classes, M objects in the whole batch, P matched pairs.

The file imports nothing of this project, the matcher being an argument: copied alone it runs.

>>> import torch
>>> from typing import NamedTuple
>>> class Pairs(NamedTuple):
...     stage: torch.Tensor
...     image: torch.Tensor
...     proposal: torch.Tensor
...     object: torch.Tensor
>>> matcher = lambda *predictions_and_targets: Pairs(*torch.tensor([[0], [0], [1], [0]]))  # object 0 to proposal 1
>>> logits, boxes_px = torch.zeros(1, 1, 3, 4), torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(1, 1, 3, 4)
>>> targets = [{"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.tensor([2])}]
>>> losses = SetCriterion(matcher)(logits, boxes_px, targets, whwh_px=torch.full((1, 4), 32.0))
>>> {name: round(loss.item(), 3) for name, loss in losses.items()}
{'loss_cls_0': 2.946, 'loss_l1_0': 0.0, 'loss_giou_0': 0.0}

Deviations (ours | paper | authors' code | why)
    the class loss is over all proposals | "only performed on matched pairs" | as ours | unmatched proposals have to
        learn to be silent
    sums are divided by max(1, objects in the whole effective batch) | — | max(1, mean objects a process) | with the
        gradients summed over processes it is the same, unless a batch has fewer objects than processes
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss


class SetCriterion(nn.Module):
    """The set prediction loss of all stages at once.

    Args:
        matcher: called with (logits, boxes_px, targets, whwh_px); returns the matched pairs as four (P,) int64 tensors
            `stage`, `image`, `proposal`, `object` (see `matcher.Assignment`).
        class_weight, l1_weight, giou_weight: λ of the three terms.
        alpha, gamma: of the focal loss.
    """

    def __init__(
        self,
        matcher: Callable,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.matcher = matcher
        self.weights = {"cls": class_weight, "l1": l1_weight, "giou": giou_weight}
        self.alpha, self.gamma = alpha, gamma

    def forward(
        self,
        logits: Tensor,
        boxes_px: Tensor,
        targets: Sequence[dict[str, Tensor]],
        whwh_px: Tensor,
        num_objects: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Matches, then sums.

        Args:
            logits: (S, B, N, K), before the sigmoid; any float dtype, the losses are computed in float32.
            boxes_px: (S, B, N, 4) xyxy pixels.
            targets: B dicts with `boxes` (objects, 4) xyxy pixels and `labels` (objects,) int64 in 0 … K − 1.
            whwh_px: (B, 4), each image's width, height, width, height before padding.
            num_objects: what to divide by, at least 1. Where the batch is only a part of the effective one (several
                processes, accumulated gradients), the objects of all parts; by default those in `targets`.

        Returns:
            3·S float32 scalars, weighted by λ.

        Raises:
            FloatingPointError: from the matcher, where a prediction is not finite.
        """
        logits, boxes_px = logits.float(), boxes_px.float()
        stage, image, proposal, object_index = self.matcher(logits, boxes_px, targets, whwh_px)
        labels = torch.cat([target["labels"] for target in targets])  # (M,)
        target_boxes = torch.cat([target["boxes"] for target in targets]).float()[
            object_index
        ]  # (P, 4)
        matched_boxes = boxes_px[stage, image, proposal]  # (P, 4)

        # Sparse targets: a one where a matched proposal has its object's class, zeros everywhere else.
        one_hot = torch.zeros_like(logits)
        one_hot[stage, image, proposal, labels[object_index]] = 1.0
        focal = sigmoid_focal_loss(logits, one_hot, self.alpha, self.gamma)  # (S, B, N, K)

        # Shares of the unpadded image, so that an object's weight does not depend on the picture's resolution.
        whwh = whwh_px[image]  # (P, 4)
        l1 = (matched_boxes / whwh - target_boxes / whwh).abs().sum(-1)  # (P,)
        giou = generalized_box_iou_loss(matched_boxes, target_boxes)  # (P,), 1 − GIoU

        def per_stage(pair_losses: Tensor) -> Tensor:  # (P,) -> (S,)
            return logits.new_zeros(len(logits)).index_add(0, stage, pair_losses)

        sums = {"cls": focal.sum(dim=(1, 2, 3)), "l1": per_stage(l1), "giou": per_stage(giou)}
        divisor = max(1, len(labels) if num_objects is None else num_objects)
        return {
            f"loss_{name}_{i}": loss
            for name, losses in sums.items()
            for i, loss in enumerate((self.weights[name] * losses / divisor).unbind())
        }

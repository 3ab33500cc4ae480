"""Loss: what the predictions of all stages cost, once each object has been given to a proposal.

    L = λ_cls · L_cls + λ_L1 · L_L1 + λ_giou · L_giou,    λ = 2, 5, 2

(paper, "Set prediction loss", equation 1). Every stage is trained alike. The class loss is over
*all* proposals, because an unmatched one has to learn to give every class a low score. The two box
losses are over matched pairs only. Each is a sum, divided by the number of objects.

In:  the predictions of every stage, the objects of each image, and a matcher that pairs them.
Out: a dict of 3·S weighted scalars `loss_cls_i`, `loss_l1_i`, `loss_giou_i`, i = 0 … S − 1, whose
     sum is what to minimise.

Shapes: S stages, B images, N proposals per image, K classes; M objects in all images together, P
matched pairs.

The file imports nothing of this project, the matcher being an argument: copied alone it runs.

>>> import torch
>>> from typing import NamedTuple
>>> class Pairs(NamedTuple):
...     stage: torch.Tensor
...     image: torch.Tensor
...     proposal: torch.Tensor
...     object: torch.Tensor
>>> matcher = lambda *_: Pairs(*torch.tensor([[0], [0], [1], [0]]))  # object 0 to proposal 1
>>> logits = torch.zeros(1, 1, 3, 4)  # one stage, one image, three proposals, four classes
>>> boxes_px = torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(1, 1, 3, 4)
>>> targets = [{"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.tensor([2])}]
>>> losses = SetCriterion(matcher)(logits, boxes_px, targets, whwh_px=torch.full((1, 4), 32.0))
>>> {name: round(loss.item(), 3) for name, loss in losses.items()}
{'loss_cls_0': 2.946, 'loss_l1_0': 0.0, 'loss_giou_0': 0.0}
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss


class SetCriterion(nn.Module):
    """The set prediction loss of all stages.

    Args:
        matcher: called with (logits, boxes_px, targets, whwh_px), returns the matched pairs as four
            (P,) int64 tensors: stage, image, proposal, and object as an index into the concatenated
            targets (see `matcher.Assignment`).
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
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self,
        logits: Tensor,
        boxes_px: Tensor,
        targets: Sequence[dict[str, Tensor]],
        whwh_px: Tensor,
        num_objects: float | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Matches, then computes the losses.

        Args:
            logits: (S, B, N, K), before the sigmoid; any float dtype, the loss is float32.
            boxes_px: (S, B, N, 4) xyxy pixels.
            targets: B dicts with `boxes` (objects, 4) xyxy pixels and `labels` (objects,) int64 in
                0 … K − 1.
            whwh_px: (B, 4), the width, height, width, height of each image before padding.
            num_objects: what to divide by; by default the objects in `targets`. If these images are
                only a part of the batch (several processes, accumulated gradients), pass the number
                of objects in the whole batch, so that the parts add up to its loss.

        Returns:
            3·S float32 scalars, weighted by λ.
        """
        S = len(logits)
        logits, boxes_px = logits.float(), boxes_px.float()
        stage, image, proposal, obj = self.matcher(logits, boxes_px, targets, whwh_px)  # (P,) each

        # The pairs: what was predicted, and the object that it should have been.
        predicted_px = boxes_px[stage, image, proposal]  # (P, 4)
        object_px = torch.cat([target["boxes"] for target in targets]).float()[obj]  # (P, 4)
        labels = torch.cat([target["labels"] for target in targets])  # (M,)

        # Class: focal loss ("Focal Loss", equation 5) on K independent sigmoids per proposal.
        #   FL = −α_t (1 − p_t)^γ log(p_t)
        # with p_t = p, α_t = α where the target is 1, and p_t = 1 − p, α_t = 1 − α where it is 0.
        # According to the paper the loss is "only performed on matched pairs". But then nothing
        # would teach the other proposals to stay silent: as in the authors' code, this term is over
        # all proposals, and the targets of those without an object are 0 for every class.
        target_classes = torch.zeros_like(logits)  # (S, B, N, K)
        target_classes[stage, image, proposal, labels[obj]] = 1.0
        focal = sigmoid_focal_loss(logits, target_classes, self.alpha, self.gamma)  # (S, B, N, K)
        loss_cls = focal.sum(dim=(1, 2, 3))  # (S,)

        # L1: the distance of the corners, in fractions of the image's width W and height H, so that
        # large images do not count more. The paper has centre, width and height in place of the
        # corners; the authors' code has the corners.
        #   L_L1 = |x1 − x1*| / W + |y1 − y1*| / H + |x2 − x2*| / W + |y2 − y2*| / H
        whwh_px = whwh_px[image]  # (P, 4)
        l1 = (predicted_px / whwh_px - object_px / whwh_px).abs().sum(-1)  # (P,)
        loss_l1 = logits.new_zeros(S).index_add(0, stage, l1)  # (S,), the sum over a stage's pairs

        # GIoU (Rezatofighi et al., 2019): overlap, and how far apart boxes are that do not overlap.
        #   L_giou = 1 − GIoU
        #   GIoU = |A ∩ B| / |A ∪ B| − |C − (A ∪ B)| / |C|,    C the smallest box around A and B
        giou = generalized_box_iou_loss(predicted_px, object_px)  # (P,)
        loss_giou = logits.new_zeros(S).index_add(0, stage, giou)  # (S,)

        # "Normalized by the number of objects inside the training batch" (paper), not by proposals:
        # nearly all are easy negatives, and the more of them, the less an object would count. At
        # least 1, because a batch without objects still has a class loss.
        num_objects = max(1, len(labels) if num_objects is None else num_objects)
        losses = {
            "loss_cls": self.class_weight * loss_cls / num_objects,
            "loss_l1": self.l1_weight * loss_l1 / num_objects,
            "loss_giou": self.giou_weight * loss_giou / num_objects,
        }
        return {
            f"{name}_{i}": loss
            for name, stage_losses in losses.items()
            for i, loss in enumerate(stage_losses)
        }

"""The dense detector of notebook 1, against torchvision's."""

import torch
from conftest import objects
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from head import apply_deltas
from notebooks.dense_head import DenseHead, label_anchors, make_anchors

ANCHORS_PX = torch.cat(make_anchors(64, 96))


def test_anchors_are_labelled_as_torchvision_does() -> None:
    objects_px = objects(7, 3, width=96, height=64)["boxes"]
    iou = box_iou(objects_px, ANCHORS_PX)
    expected = Matcher(0.5, 0.4)(iou)
    best = iou.argmax(1)  # each object's best anchor is its own, whatever the IoU
    assert len(best.unique()) == len(best), "two objects share their best anchor: another seed"
    expected[best] = torch.arange(len(objects_px))
    assert torch.equal(label_anchors(ANCHORS_PX, objects_px), expected)


@torch.no_grad()
def test_logits_are_in_the_order_of_the_anchors() -> None:
    head = DenseHead(channels=8, num_classes=2)
    for parameter in (head.cls_logits.weight, head.box_deltas.weight, head.box_deltas.bias):
        parameter.zero_()
    head.cls_logits.bias.copy_(torch.arange(18.0))  # anchor · 2 + class
    head.norm_in, head.norm, head.hidden = nn.Identity(), nn.Identity(), nn.Identity()
    pyramid = [torch.zeros(1, 8, 64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]
    logits, deltas = head(pyramid)
    expected = torch.arange(18.0).view(9, 2).repeat(len(ANCHORS_PX) // 9, 1)
    torch.testing.assert_close(logits[0], expected)
    torch.testing.assert_close(apply_deltas(deltas[0], ANCHORS_PX), ANCHORS_PX)

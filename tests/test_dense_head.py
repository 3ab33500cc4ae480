"""The dense detector of notebook 1, against torchvision's."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from head import apply_deltas
from notebooks.dense_head import K_ANCHORS, DenseHead, dense_detections, label_anchors, make_anchors

HEIGHT, WIDTH = 64, 96


def test_anchors_are_labelled_as_torchvision_does() -> None:
    anchors_px = torch.cat(make_anchors(HEIGHT, WIDTH))
    torch.manual_seed(0)
    corners = torch.rand(7, 2, 2).sort(dim=1).values * torch.tensor([WIDTH - 8, HEIGHT - 8])
    corners[:, 1] += 8
    objects_px = corners.flatten(1)
    labels = label_anchors(anchors_px, objects_px)

    iou = box_iou(objects_px, anchors_px)
    expected = Matcher(0.5, 0.4)(iou)
    best = iou.argmax(1)  # each object's best anchor is its own, whatever the IoU
    assert len(best.unique()) == len(best), "two objects share their best anchor: another seed"
    expected[best] = torch.arange(len(objects_px))
    assert torch.equal(labels, expected)
    assert (label_anchors(anchors_px, objects_px[:0]) == -1).all()


def test_logits_are_in_the_order_of_the_anchors() -> None:
    # A head that answers in one cell of one level only.
    head = DenseHead(channels=8, num_classes=2).eval()
    with torch.no_grad():
        for parameter in (head.cls_logits.weight, head.box_deltas.weight, head.box_deltas.bias):
            parameter.zero_()
        head.cls_logits.bias.copy_(torch.arange(2.0 * K_ANCHORS))  # anchor · 2 + class
    pyramid = [torch.randn(1, 8, HEIGHT // stride, WIDTH // stride) for stride in (4, 8, 16, 32)]
    logits, deltas = head(pyramid)
    anchors_px = torch.cat(make_anchors(HEIGHT, WIDTH))
    assert logits.shape == (1, len(anchors_px), 2) and deltas.shape == (1, len(anchors_px), 4)
    expected = torch.arange(2.0 * K_ANCHORS).view(K_ANCHORS, 2).repeat(len(anchors_px) // 9, 1)
    torch.testing.assert_close(logits[0], expected)
    torch.testing.assert_close(apply_deltas(deltas[0], anchors_px), anchors_px)

    # A level's cells go row by row: the hottest cell is where the feature is.
    with torch.no_grad():
        head.cls_logits.bias.zero_()
        head.norm_in, head.norm = torch.nn.Identity(), torch.nn.Identity()
        head.hidden = torch.nn.Identity()
        head.cls_logits.weight[0] = 1.0
    maps = [torch.zeros_like(level) for level in pyramid]
    maps[1][0, :, 3, 7] = 1.0  # of p3: 8 pixels per cell
    found = dense_detections(head, [level[0] for level in maps], torch.tensor([96, 64, 96, 64]))
    x1, y1, x2, y2 = found["boxes"][0].tolist()
    assert abs((x1 + x2) / 2 - 7 * 8) <= 8 and abs((y1 + y2) / 2 - 3 * 8) <= 8
    assert found["labels"][0] == 0 and found["scores"][0] == found["scores"].max()

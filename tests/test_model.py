"""SparseRCNN: the form of torchvision's detectors, learning end to end, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, objects, picture
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import convert_bounding_box_format

from backbone import ResNetFPN
from config import PRESETS
from head import DynamicInteraction
from model import Interaction, SparseRCNN, build_model, check_target


@pytest.fixture
def model() -> SparseRCNN:
    torch.manual_seed(0)
    return build_model(TINY).eval()


def test_selection_is_the_best_n_of_all_proposals_and_classes() -> None:
    B, N, K = 2, 5, 3
    logits, boxes_px = torch.randn(B, N, K), torch.rand(B, N, 4) * 20 - 5
    boxes_px[..., 2:] += 30
    whwh_px = torch.tensor([[40.0, 30.0, 40.0, 30.0], [30.0, 45.0, 30.0, 45.0]])
    found = SparseRCNN.detections(logits, boxes_px, whwh_px)
    for b in range(B):
        scores = logits[b].sigmoid()
        candidates = [(scores[n, k].item(), n, k) for n in range(N) for k in range(K)]
        ranked = sorted(candidates, reverse=True)[:N]
        assert found[b]["scores"].tolist() == pytest.approx([score for score, _, _ in ranked])
        assert found[b]["labels"].tolist() == [k for _, _, k in ranked]
        chosen_px = torch.stack([boxes_px[b, n] for _, n, _ in ranked])
        assert torch.equal(found[b]["boxes"], chosen_px.clamp(min=0).minimum(whwh_px[b]))


def test_boxes_without_area_after_clipping_are_dropped() -> None:
    right_of_the_image, inside = [60.0, 5.0, 80.0, 20.0], [5.0, 5.0, 20.0, 20.0]
    boxes_px = torch.tensor([[right_of_the_image, inside]])
    whwh_px = torch.tensor([[50.0, 40.0, 50.0, 40.0]])
    found = SparseRCNN.detections(torch.zeros(1, 2, 1), boxes_px, whwh_px)
    assert found[0]["boxes"].tolist() == [[5.0, 5.0, 20.0, 20.0]]


def test_images_are_padded_on_the_right_and_bottom_and_never_resized(model: SparseRCNN) -> None:
    images = [picture(70, 33), picture(40, 60, 1)]
    batch, whwh_px = model.prepare([images[0], images[1] / 255])  # uint8, and float 0–1
    assert batch.shape == (2, 3, 96, 64)
    assert whwh_px.tolist() == [[33, 70, 33, 70], [60, 40, 60, 40]]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for canvas, pixels in zip(batch, images, strict=True):
        height, width = pixels.shape[1:]
        expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
        assert torch.allclose(canvas[:, :height, :width], expected, atol=1e-5)
        assert not canvas[:, height:].any()
        assert not canvas[:, :, width:].any()


def test_overfits_one_image_with_two_objects() -> None:
    """What an AP of 1.0 means, in seconds: the best detections are the objects, within IoU 0.95."""
    torch.manual_seed(1)
    model = build_model(replace(TINY, hidden_dim=32, dynamic_dim=8, num_stages=3)).train()
    pixels = torch.full((3, 64, 64), 60, dtype=torch.uint8)
    pixels[0, 8:30, 6:34] = 220
    pixels[2, 36:60, 30:52] = 240
    target = {
        "boxes": torch.tensor([[6.0, 8.0, 34.0, 30.0], [30.0, 36.0, 52.0, 60.0]]),
        "labels": torch.tensor([2, 0]),
    }
    steps = 250
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model([pixels], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval()([pixels])[0]
    ious, which = box_iou(target["boxes"], found["boxes"][:2]).max(1)
    assert ious.min() > 0.95 and found["labels"][which].tolist() == [2, 0]


IMAGE = [torch.rand(3, 64, 64)]
BOXES, LABELS = torch.tensor([[2.0, 3, 9, 8], [4, 5, 20, 30]]), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("images", "targets", "words"),
    [
        ([], [], "empty"),
        ([torch.rand(1, 8, 8)], [objects(1, 3, 20, 20)], "image 0 is (1, 8, 8)"),
        ([torch.rand(3, 0, 8)], [objects(1, 3, 20, 20)], "image 0 is (3, 0, 8)"),
        ([torch.randint(9, (3, 32, 32))], [objects(1, 3, 20, 20)], "torch.int64"),
        ([torch.rand(3, 32, 32) * 255], [objects(1, 3, 20, 20)], "float 0–1"),  # of .float()
        ([torch.rand(3, 32, 32) * 2 - 1], [objects(1, 3, 20, 20)], "not normalised"),
        (IMAGE, None, "targets"),
        (IMAGE, [], "1 images but 0 targets"),
        (IMAGE, [{"boxes": BOXES, "labels": LABELS + 1}], "start at 0"),
        (IMAGE, [{"boxes": BOXES, "labels": LABELS - 2}], "start at 0"),
        (IMAGE, [{"boxes": BOXES, "labels": LABELS[:1]}], "boxes (2, 4)"),
        (IMAGE, [{"boxes": BOXES, "labels": LABELS.int()}], "torch.int32"),
        (IMAGE, [{"boxes": BOXES}], "target 0 has no labels"),
        (IMAGE, [{"image_id": 5}], "target 0 has no boxes and no labels"),
        # As torchvision's detectors do: boxes without area, or with x2 < x1, or that are NaN.
        (IMAGE, [{"boxes": BOXES[:, [0, 1, 0, 3]], "labels": LABELS}], "[2.0, 3.0, 2.0, 8.0]"),
        (IMAGE, [{"boxes": BOXES[:, [2, 1, 0, 3]], "labels": LABELS}], "[9.0, 3.0, 2.0, 8.0]"),
        (IMAGE, [{"boxes": BOXES / 0 * 0, "labels": LABELS}], "[nan, nan, nan, nan]"),
    ],
)
def test_wrong_input_is_explained(
    images: list[torch.Tensor], targets: list[dict] | None, words: str
) -> None:
    with pytest.raises(ValueError) as error:
        build_model(TINY).train()(images, targets)
    assert words in str(error.value)


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_tv_tensors_are_read_in_the_format_that_they_say(form: str) -> None:
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(64, 64))
    given = {"boxes": convert_bounding_box_format(boxes, new_format=form), "labels": LABELS}
    assert given["boxes"].format.value == form
    found = check_target(given, 3, 0, torch.device("cpu"))
    assert type(found["boxes"]) is torch.Tensor and found["boxes"].tolist() == BOXES.tolist()


def test_float16_training_leaves_float16_where_its_gradient_would_overflow() -> None:
    """Regions outside of the image are all zeros: two norms multiply their gradient by 10⁵."""
    layers = Interaction(hidden_dim=16, dynamic_dim=4, roi_size=7)
    for norm in (layers.norm1, layers.norm2):
        # As after some training: at a bias of 0 the ReLU would stop the gradient.
        torch.nn.init.constant_(norm.bias, 0.1)
    pro_feats, roi_feats = torch.randn(5, 16, requires_grad=True), torch.randn(5, 49, 16)
    roi_feats[1] = 0
    exact = layers(pro_feats, roi_feats)

    def gradients(forward: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype):
            out = forward(pro_feats.to(dtype), roi_feats.to(dtype))
        assert (out - exact).abs().max() < (0.02 if dtype == torch.float16 else 0.2)
        # 1000 stands for the loss scale.
        total = (out.float() * 1000).sum()
        return torch.autograd.grad(total, [pro_feats, *layers.parameters()])

    plain = partial(DynamicInteraction.forward, layers)
    for forward, dtype in ((layers, torch.float16), (plain, torch.bfloat16)):
        assert all(gradient.isfinite().all() for gradient in gradients(forward, dtype))
    assert not all(gradient.isfinite().all() for gradient in gradients(plain, torch.float16))
    assert all(type(s.interaction) is Interaction for s in build_model(TINY).head.stages)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_build(preset: str) -> None:
    config = PRESETS[preset]
    with torch.device("meta"):
        model = build_model(config, pretrained_backbone=False)
    assert len(model.head.stages) == config.num_stages
    assert model.proposal_feats.shape == (config.num_proposals, config.hidden_dim)
    assert model.head.stages[0].cls_logits.out_features == config.num_classes


def test_a_frozen_backbone_has_no_batch_norm_to_train_and_an_unfrozen_one_trains_all() -> None:
    frozen, free = (ResNetFPN("resnet18", 8, pretrained=False, frozen=f) for f in (True, False))
    assert not any(p.requires_grad for p in frozen.body["layer1"].parameters())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    assert all(p.requires_grad for p in free.parameters())

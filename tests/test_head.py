"""The head: what the paper says, shape by shape, and where gradients may flow."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import box_convert, roi_align

from head import DynamicHead, DynamicInteraction, RoIPooler, Stage, apply_deltas
from support.roi_align import roi_align as ours_on_a_cpu

B, N, C, D, K, S, R = 2, 5, 16, 4, 3, 6, 7  # all different


def make_head(num_stages: int = S) -> DynamicHead:
    stages = [
        Stage(
            hidden_dim=C,
            num_classes=K,
            num_heads=4,
            ffn_dim=24,
            interaction=DynamicInteraction(C, D, R),
        )
        for _ in range(num_stages)
    ]
    return DynamicHead(stages, RoIPooler(R))


def make_proposals() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """A pyramid of images of 128 × 192 pixels, boxes_px (B, N, 4), pro_feats (B, N, C)."""
    pyramid = [torch.randn(B, C, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32)]
    corners_px = torch.rand(B, N, 2) * 60
    sizes_px = 10 + torch.rand(B, N, 2) * 50
    return pyramid, torch.cat((corners_px, corners_px + sizes_px), -1), torch.randn(B, N, C)


def test_dynamic_interaction_is_two_convolutions_that_each_proposal_generates() -> None:
    layers = DynamicInteraction(C, D, R)
    pro_feats, roi_feats = torch.randn(N, C), torch.randn(N, R * R, C)
    out = layers(pro_feats, roi_feats)
    for n in range(N):
        image = roi_feats[n].T.reshape(1, C, R, R)
        kernels = layers.linear1(pro_feats[n])
        first = kernels[: C * D].view(C, D).T[:, :, None, None]  # conv2d wants (out, in, 1, 1)
        second = kernels[C * D :].view(D, C).T[:, :, None, None]
        x = nn.functional.conv2d(image, first)
        x = layers.norm1(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
        x = nn.functional.conv2d(x, second)
        x = layers.norm2(x.permute(0, 2, 3, 1)).relu()  # (1, R, R, C)
        expected = layers.norm3(layers.linear2(x.reshape(1, -1))).relu()
        torch.testing.assert_close(out[n], expected[0], rtol=1e-5, atol=1e-5)


def test_apply_deltas_inverts_the_parametrisation_of_r_cnn() -> None:
    _, given_px, _ = make_proposals()
    wanted_px = make_proposals()[1]
    x_a, y_a, w_a, h_a = box_convert(given_px, "xyxy", "cxcywh").double().unbind(-1)
    x, y, w, h = box_convert(wanted_px, "xyxy", "cxcywh").double().unbind(-1)
    t = torch.stack(((x - x_a) / w_a, (y - y_a) / h_a, (w / w_a).log(), (h / h_a).log()), dim=-1)
    found_px = apply_deltas(t * torch.tensor([2, 2, 1, 1]), given_px)
    assert torch.allclose(found_px, wanted_px, atol=1e-3)


def test_apply_deltas_stays_finite_and_in_float32() -> None:
    wild = apply_deltas(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert torch.isfinite(wild).all()
    assert wild[0, 2] - wild[0, 0] == pytest.approx(100_000 / 16, rel=1e-3)
    boxes_px = torch.tensor([[1000.5, 1000.5, 1003.5, 1003.5]])
    deltas = torch.zeros(1, 4, dtype=torch.bfloat16)
    assert torch.equal(apply_deltas(deltas, boxes_px), boxes_px)


def test_levels_are_those_of_the_fpn_paper() -> None:
    sides = [1, 55, 111, 113, 223, 225, 447, 449, 5000]
    boxes_px = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    assert RoIPooler().levels(boxes_px).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    wide = torch.tensor([[[0.0, 0.0, 448.0, 112.0]]])  # sqrt(448 · 112) = 224
    assert RoIPooler().levels(wide).tolist() == [[2]]
    extremes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, float("inf"), 9.0]])
    assert RoIPooler().levels(extremes).tolist() == [0, 3]


def test_pooling_equals_one_box_at_a_time() -> None:
    pyramid = [torch.randn(B, C, 512 // stride, 640 // stride) for stride in (4, 8, 16, 32)]
    sides_px = torch.tensor([20.0, 130.0, 240.0, 500.0, 60.0])  # of all levels
    corners_px = torch.tensor([7.0, 14.0])[:, None, None].expand(B, N, 2)
    sizes_px = sides_px[:, None] * 0.9 + torch.rand(B, N, 2)
    boxes_px = torch.cat((corners_px, corners_px + sizes_px), -1)

    pooled = RoIPooler(R)(pyramid, boxes_px).view(B, N, C, R, R)
    for b in range(B):
        for n, side in enumerate((boxes_px[b, :, 2:] - boxes_px[b, :, :2]).prod(-1).sqrt()):
            level = min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2
            one = roi_align(
                pyramid[level][b : b + 1],
                [boxes_px[b, n : n + 1]],
                R,
                1 / (4 << level),
                sampling_ratio=2,
                aligned=True,
            )
            assert torch.allclose(pooled[b, n], one[0], atol=1e-5)


def test_between_stages_boxes_carry_no_gradient_and_features_do() -> None:
    head = make_head(2)
    pyramid, boxes_px, pro_feats = make_proposals()
    boxes_px.requires_grad_()
    pro_feats.requires_grad_()
    _, refined_px = head(pyramid, boxes_px, pro_feats)

    # The gradient of the last boxes does not reach the first stage's box branch, but its features.
    refined_px[1].sum().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in head.stages[0].box_deltas.parameters())
    assert head.stages[0].ffn[0].weight.grad.abs().sum() > 0
    assert pro_feats.grad.abs().sum() > 0
    assert boxes_px.grad is None or not boxes_px.grad.any()

    # The proposal boxes learn through the first stage.
    refined_px[0].sum().backward()
    assert boxes_px.grad.abs().sum() > 0


@pytest.mark.parametrize("num_classes", [4, C, 24])
def test_initialisation_goes_by_name_whatever_the_number_of_classes(num_classes: int) -> None:
    stage = Stage(C, num_classes, num_heads=4, ffn_dim=24, prior_prob=0.01)
    assert torch.equal(stage.cls_logits.bias, torch.full((num_classes,), -math.log(99)))
    assert (stage.box_deltas.bias.abs() <= 1 / math.sqrt(C)).all()
    assert stage.box_deltas.bias.any()
    assert torch.equal(stage.attn_norm.weight, torch.ones(C))
    assert torch.equal(stage.attn_norm.bias, torch.zeros(C))
    limit = math.sqrt(6 / (C + 24))
    assert limit * 0.95 < stage.ffn[0].weight.abs().max() <= limit  # Xavier-uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_maps_may_have_any_memory_format_and_dtype(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    head = make_head(2)
    pyramid, boxes_px, pro_feats = make_proposals()
    given = [level.to(dtype).to(memory_format=layout).requires_grad_() for level in pyramid]
    plain = [level.to(dtype).float().requires_grad_() for level in pyramid]

    gradients = []
    for levels in (given, plain):
        logits, refined_px = head(levels, boxes_px, pro_feats)
        total = logits.sum() + refined_px.sum()
        gradients.append(torch.autograd.grad(total, levels))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))
    assert gradients[0][0].any()


def test_boxes_that_are_not_finite_are_pooled_without_reading_outside_of_the_map() -> None:
    pyramid = [torch.rand(1, 8, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    bad = [float("nan"), float("inf"), float("-inf")]
    boxes_px = torch.tensor([[0.0, 0.0, value, 9.0] for value in (*bad, -5.0)])[None]  # (1, 4, 4)
    for function in (roi_align, ours_on_a_cpu):
        pooler = RoIPooler(roi_size=3, roi_align=function)
        assert pooler(pyramid, boxes_px).shape == (4, 8, 3, 3)

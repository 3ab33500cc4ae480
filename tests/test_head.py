"""The head: what the slides say, shape by shape, and where gradients may flow."""

import math

import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from head import (
    DELTA_WEIGHTS,
    DynamicHead,
    DynamicInteraction,
    RoIPooler,
    Stage,
    apply_deltas,
    to_channels_first,
)

B, N, C, D, K, S, R = 2, 5, 16, 4, 3, 4, 3


def make_head(num_stages: int = S) -> DynamicHead:
    stages = [
        Stage(C, K, num_heads=4, ffn_dim=24, interaction=DynamicInteraction(C, D, R))
        for _ in range(num_stages)
    ]
    return DynamicHead(stages, RoIPooler(R))


def make_proposals() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    pyramid = [torch.randn(B, C, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32)]
    corners = torch.rand(B, N, 2) * 60
    return (
        pyramid,
        torch.cat((corners, corners + 10 + torch.rand(B, N, 2) * 50), -1),
        torch.randn(B, N, C),
    )


def test_the_shapes_that_are_documented() -> None:
    head = make_head()
    pyramid, boxes, feats = make_proposals()
    assert head.pooler(pyramid, boxes).shape == (B * N, C, R, R)
    logits, refined, obj_feats = head.stages[0](head.pooler(pyramid, boxes), boxes, feats)
    assert (logits.shape, refined.shape, obj_feats.shape) == ((B, N, K), (B, N, 4), (B, N, C))
    logits, refined = head(pyramid, boxes, feats)
    assert (
        logits.shape == (S, B, N, K)
        and refined.shape == (S, B, N, 4)
        and refined.dtype == torch.float32
    )


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
        assert torch.allclose(out[n], expected[0], atol=1e-5)


def test_each_proposal_meets_its_own_region_and_no_other() -> None:
    layers = DynamicInteraction(C, D, R)
    pro_feats, roi_feats = torch.randn(N, C), torch.randn(N, R * R, C)
    before = layers(pro_feats, roi_feats)
    roi_feats[2] += 1
    changed = (layers(pro_feats, roi_feats) != before).any(-1)
    assert changed.tolist() == [n == 2 for n in range(N)]


def test_proposals_see_each_other_but_not_those_of_other_images() -> None:
    stage, boxes = make_head().stages[0], make_proposals()[1]
    roi_feats, feats = torch.randn(B * N, C, R, R), torch.randn(B, N, C)
    before = stage(roi_feats, boxes, feats)[0]
    feats[0, 1] += 1
    changed = (stage(roi_feats, boxes, feats)[0] != before).any(-1)  # (B, N)
    assert changed[0].all() and not changed[1].any()


def test_apply_deltas_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # centre 20, 40; size 20, 40
    moved = apply_deltas(torch.tensor([[1.0, -0.5, math.log(2), math.log(0.5)]]), boxes)
    cx, cy = 20 + 1.0 / 2 * 20, 40 - 0.5 / 2 * 40
    assert torch.allclose(moved, torch.tensor([[cx - 20, cy - 10, cx + 20, cy + 10]]))
    assert torch.equal(apply_deltas(torch.zeros(1, 4), boxes), boxes)
    assert DELTA_WEIGHTS == (2, 2, 1, 1)


def test_apply_deltas_stays_finite_and_in_float32() -> None:
    wild = apply_deltas(torch.full((1, 4), 1e4), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert torch.isfinite(wild).all()
    assert wild[0, 2] - wild[0, 0] == pytest.approx(100_000 / 16, rel=1e-3)
    boxes = torch.tensor([[1000.5, 1000.5, 1003.5, 1003.5]])
    assert torch.equal(apply_deltas(torch.zeros(1, 4, dtype=torch.bfloat16), boxes), boxes)


def test_levels_are_those_of_the_fpn_paper() -> None:
    sides = [1, 55, 111, 113, 223, 225, 447, 449, 5000]
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    assert RoIPooler().levels(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    wide = torch.tensor([[0.0, 0.0, 448.0, 112.0]])  # sqrt(448 · 112) = 224
    assert RoIPooler().levels(wide).tolist() == [2]
    extremes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, float("inf"), 9.0]])
    assert RoIPooler().levels(extremes).tolist() == [0, 3]


def test_pooling_equals_one_box_at_a_time() -> None:
    pyramid = [torch.randn(B, C, 512 // stride, 640 // stride) for stride in (4, 8, 16, 32)]
    sides = torch.tensor([20.0, 130.0, 240.0, 500.0, 60.0])
    boxes = torch.stack([torch.cat((torch.full((N, 2), 7.0 * b), 7.0 * b + sides[:, None] * 0.9 + torch.rand(N, 2)), 1)
                         for b in range(1, B + 1)])  # fmt: skip
    pooled = RoIPooler(R)(pyramid, boxes).view(B, N, C, R, R)
    for b in range(B):
        for n, side in enumerate((boxes[b, :, 2:] - boxes[b, :, :2]).prod(-1).sqrt()):
            level = min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2
            one = roi_align(
                pyramid[level][b : b + 1],
                [boxes[b, n : n + 1]],
                R,
                1 / (4 << level),
                sampling_ratio=2,
                aligned=True,
            )
            assert torch.allclose(pooled[b, n], one[0], atol=1e-5)


def test_a_level_without_boxes_gets_a_gradient_of_zero() -> None:
    pyramid, boxes, feats = make_proposals()
    pyramid = [features.requires_grad_() for features in pyramid]
    RoIPooler(R)(pyramid, boxes).sum().backward()
    assert pyramid[0].grad.abs().sum() > 0
    assert all(features.grad is not None and not features.grad.any() for features in pyramid[1:])


def test_between_stages_boxes_carry_no_gradient_and_features_do() -> None:
    head = make_head(2)
    pyramid, boxes, feats = make_proposals()
    boxes.requires_grad_(), feats.requires_grad_()
    logits, refined = head(pyramid, boxes, feats)
    refined[1].sum().backward(retain_graph=True)
    # The last boxes' gradient reaches the first stage's box branch not at all, its features very well.
    assert all(p.grad is None or not p.grad.any() for p in head.stages[0].box_deltas.parameters())
    assert head.stages[0].ffn[0].weight.grad.abs().sum() > 0 and feats.grad.abs().sum() > 0
    assert boxes.grad is None or not boxes.grad.any()
    # The proposal boxes learn through the first stage.
    refined[0].sum().backward()
    assert boxes.grad.abs().sum() > 0


@pytest.mark.parametrize("num_classes", [4, C, 24])
def test_initialisation_goes_by_name_whatever_the_number_of_classes(num_classes: int) -> None:
    stage = Stage(C, num_classes, num_heads=4, ffn_dim=24, prior_prob=0.01)
    assert torch.equal(stage.cls_logits.bias, torch.full((num_classes,), -math.log(99)))
    assert (stage.box_deltas.bias.abs() <= 1 / math.sqrt(C)).all() and stage.box_deltas.bias.any()
    assert torch.equal(stage.attn_norm.weight, torch.ones(C)) and torch.equal(
        stage.attn_norm.bias, torch.zeros(C)
    )
    limit = math.sqrt(6 / (C + 24))
    assert limit * 0.95 < stage.ffn[0].weight.abs().max() <= limit  # Xavier-uniform


def test_the_interaction_can_be_replaced() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(R * R * C, C)

        def forward(self, pro_feats: torch.Tensor, roi_feats: torch.Tensor) -> torch.Tensor:
            return self.linear(roi_feats.flatten(1))

    stage = Stage(C, K, num_heads=4, ffn_dim=24, interaction=Static())
    logits, boxes, _ = stage(torch.randn(B * N, C, R, R), make_proposals()[1], torch.randn(B, N, C))
    assert logits.shape == (B, N, K) and not any(
        "linear1" in name for name, _ in stage.named_parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regions_outside_of_the_image_have_a_finite_gradient_in_half_precision(
    dtype: torch.dtype,
) -> None:
    """All-zero bins: two norms of a zero variance multiply the gradient by 10⁵, beyond float16's range."""
    layers = DynamicInteraction(C, D, R)
    pro_feats, roi_feats = torch.randn(N, C, requires_grad=True), torch.randn(N, R * R, C)
    roi_feats[1] = 0
    for norm in (layers.norm1, layers.norm2):
        nn.init.constant_(
            norm.bias, 0.1
        )  # as after some training: at 0 the ReLU would stop the gradient
    with torch.autocast("cpu", dtype):
        out = layers(pro_feats.to(dtype), roi_feats.to(dtype))
    (out.float() * 50).sum().backward()
    assert (
        all(torch.isfinite(p.grad).all() for p in layers.parameters())
        and torch.isfinite(pro_feats.grad).all()
    )
    exact = layers(pro_feats, roi_feats)
    assert (out - exact).abs().max() < (0.02 if dtype == torch.float16 else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(B, C, 70, 65), (1, C, 2, 3), (B, C, 1, 1)]
)  # 70·65: copied in blocks
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_maps_become_channels_first_with_their_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    features = torch.randn(shape, dtype=dtype).to(memory_format=layout).requires_grad_()
    found, expected = to_channels_first(features), features.float().contiguous()
    assert found.is_contiguous() and found.dtype == torch.float32 and torch.equal(found, expected)
    upstream = torch.randn(shape)
    gradients = [torch.autograd.grad(output, features, upstream)[0] for output in (found, expected)]
    assert torch.equal(*gradients) and gradients[0].count_nonzero() == features.numel()

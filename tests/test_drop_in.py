"""In other people's code: torch.compile, copies, bfloat16, other backbones."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, picture
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, box_iou

from head import DynamicInteraction, Stage
from model import SparseRCNN, build_model, load_model
from shapes import ShapesDataset

CONFIG = replace(TINY, num_proposals=10, num_classes=3)


def trained(config=CONFIG) -> SparseRCNN:
    """A model whose batch norms and proposals have moved away from where they start."""
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        model.proposal_boxes[:, :2] = torch.rand(len(model.proposal_boxes), 2)
        model.proposal_boxes[:, 2:] = 0.1 + 0.5 * torch.rand(len(model.proposal_boxes), 2)
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return model.eval()


IMAGES = [picture(70, 96, seed) for seed in (0, 1)]
TARGETS = [
    {"boxes": torch.tensor([[4.0, 5, 40, 50]]), "labels": torch.tensor([2])},
    {"boxes": torch.tensor([[30.0, 20, 60, 60], [0, 0, 20, 30]]), "labels": torch.tensor([0, 1])},
]


@pytest.mark.parametrize(("backbone", "frozen"), [("small", False), ("resnet18", True)])
def test_the_inference_copy_predicts_the_same_and_leaves_the_model_alone(
    backbone: str, frozen: bool
) -> None:
    model = trained(replace(CONFIG, backbone=backbone, freeze_backbone=frozen))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = model.for_inference()
    assert not any(hasattr(module, "running_var") for module in fast.modules())
    with torch.no_grad():
        plain, folded = model.stages(IMAGES), fast.stages(IMAGES)
    assert (plain.logits.sigmoid() - folded.logits.sigmoid()).abs().max() < 1e-5
    assert (plain.boxes - folded.boxes).abs().max() < 0.005
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert frozen or all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_compiled_training_gives_the_same() -> None:
    """The graphs of torch.compile as they are; the compiler itself is tried on one stage below."""
    model = trained()
    fast = torch.compile(model, backend="aot_eager")
    state, gradients, losses = copy.deepcopy(model.state_dict()), [], []
    for step in (model.train(), fast):
        model.load_state_dict(state)  # the batch norms' statistics move
        model.zero_grad()
        losses.append(step(IMAGES, TARGETS))
        sum(losses[-1].values()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        assert losses[1][key].item() == pytest.approx(value.item(), rel=1e-4)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_a_stage_compiled_for_real_gives_the_same() -> None:
    """By inductor, which writes C++; one small stage has all kinds of layers."""
    try:
        torch.compile(torch.sin)(torch.zeros(2))
    except RuntimeError as error:
        pytest.skip(f"no compiler: {str(error)[:80]}")
    torch.manual_seed(0)
    stage = Stage(
        hidden_dim=16,
        num_classes=3,
        num_heads=2,
        ffn_dim=32,
        interaction=DynamicInteraction(hidden_dim=16, dynamic_dim=4, roi_size=3),
    )
    fast = copy.deepcopy(stage)
    fast.compile()
    roi_feats, pro_feats = torch.randn(2 * 5, 16, 3, 3), torch.randn(2, 5, 16)
    boxes_px = torch.tensor([4.0, 8.0, 40.0, 30.0]).expand(2, 5, 4)
    results = [module(roi_feats, boxes_px, pro_feats) for module in (stage, fast)]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for outputs in results:
        sum(output.sum() for output in outputs).backward()
    for (name, expected), found in zip(stage.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_compiled_parts_give_the_same_and_compile_once_for_all_image_sizes() -> None:
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(len(inputs))
        return graph.forward

    config = replace(TINY, backbone="resnet18", pretrained_backbone=False, num_stages=4)
    model = build_model(config).train()
    fast = copy.deepcopy(model)
    fast.compile(backend=backend)
    counts = []
    for height, width in ((256, 320), (320, 256), (288, 352), (256, 448), (384, 384)):
        images = list(torch.rand(2, 3, height, width))
        expected, found = model(images, TARGETS[:2]), fast(images, TARGETS[:2])
        counts.append(len(graphs))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    # The backbone, and one stage for all four. Perhaps the first stage again: the learned proposals
    # are expanded, so their memory format differs from that of the others.
    assert counts[0] == counts[-1] in (2, 3)
    # A copy runs, and is not compiled.
    assert copy.deepcopy(fast)([torch.rand(3, 256, 320)], TARGETS[:1])
    assert len(graphs) == counts[-1]


def test_bfloat16_inference_finds_the_same_objects() -> None:
    model, _ = load_model(Path(__file__).parents[1] / "assets" / "shapes.pt")
    images = [ShapesDataset("demo", "val", 8)[i][0] for i in range(8)]
    with torch.inference_mode():
        plain = model(images)
        for small in (copy.deepcopy(model).bfloat16(), model.for_inference().bfloat16()):
            for expected, found in zip(plain, small(images), strict=True):
                assert found["boxes"].dtype == torch.float32
                expected = {k: v[expected["scores"] > 0.5] for k, v in expected.items()}
                found = {k: v[found["scores"] > 0.5] for k, v in found.items()}
                ious = box_iou(expected["boxes"], found["boxes"])
                assert ious.shape[0] == ious.shape[1]
                assert (ious.max(1).values > 0.85).all()
                assert torch.equal(expected["labels"], found["labels"][ious.argmax(1)])


def test_a_backbone_of_timm() -> None:
    timm = pytest.importorskip("timm")

    class TimmFPN(nn.Module):
        def __init__(self, name: str, out_channels: int):
            super().__init__()
            self.body = timm.create_model(
                name, features_only=True, out_indices=(1, 2, 3, 4), pretrained=False
            )
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)

        def forward(self, images: Tensor) -> list[Tensor]:
            levels = {str(i): level for i, level in enumerate(self.body(images))}
            return list(self.fpn(levels).values())

    parts = build_model(CONFIG)
    backbone = TimmFPN("resnet18", CONFIG.hidden_dim)
    model = SparseRCNN(
        backbone, parts.head, parts.criterion, parts.proposal_boxes, parts.proposal_feats
    )
    sum(model.train()(IMAGES, TARGETS).values()).backward()
    assert backbone.body.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        plain, fast = model.eval().stages(IMAGES), model.for_inference().stages(IMAGES)
    assert (plain.boxes - fast.boxes).abs().max() < 0.01  # its norms are not folded

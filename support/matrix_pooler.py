"""RoIAlign as matrix products, for runtimes that have no such operator.

A bin is a weighted sum of a map's cells, and the weights are products: how much a row counts does
not depend on the column. So pooling is one matrix product along y and one along x, between the map
and two matrices that depend on the boxes alone. Nearly all their entries are zero, which is
wasteful. But every runtime can multiply matrices, while few have RoIAlign, and not all of those
agree on it.

All boxes are pooled from all levels, and a mask keeps the level that fits. No shape depends on the
boxes.

Shapes: B images, N proposals per image, C channels, maps of H×W cells, R×R bins per region.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MatrixPooler(nn.Module):
    """The regions that a `RoIPooler` gives, for finite boxes, up to rounding.

    Args:
        pooler: a `RoIPooler`.
    """

    def __init__(self, pooler: nn.Module):
        super().__init__()
        self.pooler = pooler

    def forward(self, pyramid: Sequence[Tensor], boxes_px: Tensor) -> Tensor:
        """pyramid of (B, C, H, W), boxes_px (B, N, 4) -> (B·N, C, R, R)."""
        B, C = pyramid[0].shape[:2]
        N, R = boxes_px.shape[1], self.pooler.roi_size
        levels = self.pooler.levels(boxes_px)  # (B, N)

        regions = 0.0
        for i, features in enumerate(pyramid):
            H, W = features.shape[2:]
            # As aligned=True: a cell's value belongs to its centre.
            x1, y1, x2, y2 = (boxes_px / self.pooler.strides[i] - 0.5).unbind(
                -1
            )  # (B, N), in cells
            rows = self.weights(y1, y2, H) * (levels == i)[..., None, None]  # (B, N, R, H)
            columns = self.weights(x1, x2, W).view(B * N, 1, R, W)
            table = features.permute(0, 2, 3, 1).reshape(B, H, W * C)
            pooled = rows.view(B, N * R, H) @ table  # (B, N·R, W·C)
            regions = regions + columns @ pooled.view(B * N, R, W, C)  # (B·N, R, R, C)
        return regions.permute(0, 3, 1, 2)

    def weights(self, low: Tensor, high: Tensor, length: int) -> Tensor:
        """Along one axis: how much each cell counts in each bin.

        Args:
            low, high: (B, N) ends of the regions, in cells.
            length: cells of the map along this axis.

        Returns:
            (B, N, R, length)
        """
        R, samples = self.pooler.roi_size, self.pooler.sampling_ratio
        steps = torch.arange(R * samples, device=low.device) + 0.5
        at = low[..., None] + (high - low)[..., None] / (R * samples) * steps  # (B, N, R·samples)
        # torchvision's border: a sample more than one cell outside counts as zero, a nearer one
        # takes the value of the edge.
        is_near = (at >= -1) & (at <= length)
        at = at.clamp(0, length - 1)[..., None]
        shares = (1 - (at - torch.arange(length, device=low.device)).abs()).clamp(min=0)
        shares = shares * is_near[..., None]  # (B, N, R·samples, length)
        return shares.unflatten(2, (R, samples)).mean(3)

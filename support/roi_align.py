"""RoIAlign on a CPU, in training about three times faster than torchvision's on small maps.

torchvision's backward pass on a CPU visits one channel, bin and sample after the other, and takes a
quarter of a training step of the small network. But a bin of RoIAlign is only a weighted sum of the
map's cells: 2×2 samples, each between four cells. `embedding_bag` computes such sums with all
channels of a cell at once. The result is the same up to rounding.

Shapes: B images, C channels, n regions, R×R bins each.
"""

import torch
import torchvision.ops
from torch import Tensor
from torch.nn.functional import embedding_bag


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool = True,
) -> Tensor:
    """torchvision's `roi_align`; on a CPU with aligned=True it is computed here.

    Args:
        features: (B, C, H, W) float.
        rois: (n, 5) rows of (index of the image, x1, y1, x2, y2), in pixels. No gradient reaches
            them, as in torchvision.
        output_size: R.
        spatial_scale: cells of the map per pixel.
        sampling_ratio: samples per bin along each side, at least 1.
        aligned: a cell's value belongs to its centre.

    Returns:
        (n, C, R, R), of the dtype of `features`.
    """
    # Exported and compiled models keep the operator RoiAlign.
    is_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (is_cpu and aligned):
        return torchvision.ops.roi_align(
            features, rois, output_size, spatial_scale, sampling_ratio, aligned
        )

    B, C, H, W = features.shape
    n, R, per_bin = len(rois), output_size, 2 * sampling_ratio
    if n == 0:  # The gradient is zero; that of a sum fills no map with it.
        return features.sum() * features.new_zeros(0, C, R, R)
    with torch.no_grad():
        image = rois[:, 0].long()[:, None]  # (n, 1)
        x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - 0.5).unbind(1)  # (n,), in cells
        rows, row_weights = _cells_of_bins(y1, y2, R, sampling_ratio, H)  # (n, R·per_bin)
        columns, column_weights = _cells_of_bins(x1, x2, R, sampling_ratio, W)

        # Each bin is a sum over its rows and columns.
        rows = ((image * H + rows) * W).view(n, R, 1, per_bin, 1)
        cells = rows + columns.view(n, 1, R, 1, per_bin)  # (n, R, R, per_bin, per_bin)
        weights = row_weights.view(n, R, 1, per_bin, 1) * column_weights.view(n, 1, R, 1, per_bin)

    table = features.permute(0, 2, 3, 1).reshape(B * H * W, C)  # one row per cell
    bins = embedding_bag(
        cells.view(-1, per_bin**2),
        table,
        per_sample_weights=weights.view(-1, per_bin**2).to(features.dtype),
        mode="sum",
    )  # (n·R·R, C)
    return bins.view(n, R, R, C).permute(0, 3, 1, 2)


def _cells_of_bins(
    low: Tensor, high: Tensor, bins: int, samples: int, length: int
) -> tuple[Tensor, Tensor]:
    """Along one axis: the two cells around each sample, and their shares of the bin's mean.

    Args:
        low, high: (n,) ends of the regions, in cells.
        bins: R.
        samples: per bin.
        length: cells of the map along this axis.

    Returns:
        Indices (n, R·samples·2) int64 and weights (n, R·samples·2).
    """
    steps = torch.arange(bins * samples, device=low.device, dtype=low.dtype) + 0.5
    at = low[:, None] + (high - low)[:, None] / (bins * samples) * steps  # (n, R·samples)
    # torchvision's border: a sample more than one cell outside counts as zero, a nearer one takes
    # the value of the edge.
    is_near = (at >= -1) & (at <= length)  # never for a NaN
    at = at.nan_to_num().clamp(0, length - 1)
    first = at.floor()
    share = at - first
    weights = torch.stack((1 - share, share), dim=-1) * (is_near / samples)[..., None]
    first = first.long()
    cells = torch.stack((first, (first + 1).clamp(max=length - 1)), dim=-1)
    return cells.flatten(1), weights.flatten(1)

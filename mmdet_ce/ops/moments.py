"""The statistics that Channel Equilibrium needs of a feature map."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """First and second moments of a feature map, by channel group and by sample."""

    mean: Tensor  # (G, d, 1), over all samples and positions
    covariance: Tensor  # (G, d, d), biased, over all samples and positions
    variance: Tensor  # (N, C), unbiased, over the positions of one sample


def moments(x: Tensor, group_size: int) -> Moments:
    """Compute the batch covariance of each channel group and the spatial variance of each sample's channels.

    Args:
        x: (N, C, H, W), float32 or float64.
        group_size: Channels d of a group; divides C.

    Returns:
        The moments. A 1x1 map has variance 0.
    """
    n, c, h, w = x.shape
    groups = x.reshape(n, c // group_size, group_size, h * w).transpose(0, 1)  # (G, N, d, L)
    mean = groups.mean(dim=(1, 3), keepdim=True)  # (G, 1, d, 1)
    centred = (groups - mean).transpose(1, 2).flatten(2)  # (G, d, N L)
    covariance = centred @ centred.transpose(1, 2) / (n * h * w)
    return Moments(mean.squeeze(1), covariance, spatial_variance(x))


def spatial_variance(x: Tensor) -> Tensor:
    """Return the unbiased variance over the positions of each sample's channels, (N, C); 0 for a 1x1 map."""
    length = x.shape[2] * x.shape[3]
    return x.flatten(2).var(dim=2, correction=min(length - 1, 1))

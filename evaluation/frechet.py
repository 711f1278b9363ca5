"""How far two sets of media are apart, by features that any network makes of them."""

from __future__ import annotations

import torch
from torch import nn


class GivenFeatures(nn.Module):
    """Stands where torchmetrics has a network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, written: torch.Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 sqrt(C C')), of the means and covariances of the two sets.

    It falls with the number of media, by much where there are few for the number of features: compare distances of
    equally many. Source: Heusel et al. 2017, arXiv 1706.08500.

    Args:
        real, written: features, (media, features), at least two media each.

    Raises:
        ValueError: fewer media, or other features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, as training does not wait for its import

    check_features(real, written)
    metric = FrechetInceptionDistance(GivenFeatures(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(written.double(), real=False)
    return max(metric.compute().item(), 0.0)  # rounding may leave less than nothing


def kernel_distance(real: torch.Tensor, written: torch.Tensor) -> float:
    """The squared maximum mean discrepancy under the kernel (x y / features + 1)^3, without bias, of as many media as
    the smaller set has. Source: Binkowski et al. 2018, arXiv 1801.01401.

    Args:
        real, written: as for `frechet_distance`.

    Raises:
        ValueError: as there.
    """
    from torchmetrics.image.kid import poly_mmd

    check_features(real, written)
    count = min(len(real), len(written))
    return poly_mmd(real[:count].double(), written[:count].double()).item()


def check_features(real: torch.Tensor, written: torch.Tensor) -> None:
    """Raise ValueError for sets that cannot be compared."""
    for name, features in (("real", real), ("written", written)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"{name} features have shape {tuple(features.shape)}; give (media, features), at least two media"
            )
    if real.shape[1] != written.shape[1]:
        raise ValueError(
            f"real media have {real.shape[1]} features and written ones {written.shape[1]}; take one network for both"
        )

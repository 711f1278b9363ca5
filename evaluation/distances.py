"""How far two sets of media are apart, by features of any network, such as one that was exported to a file."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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
        ValueError: The same as there.
    """
    from torchmetrics.image.kid import poly_mmd

    check_features(real, written)
    count = min(len(real), len(written))
    return poly_mmd(real[:count].double(), written[:count].double()).item()


def compare_features(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float | None]:
    """Both distances of each pair of sets of features, by the pair's prefix and their names; None for sets of fewer
    than two.
    """
    measures = {"frechet_distance": frechet_distance, "kernel_distance": kernel_distance}
    return {
        prefix + name: measure(*pair) if min(map(len, pair)) >= 2 else None
        for prefix, pair in pairs.items()
        for name, measure in measures.items()
    }


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


# ---------------------------------------------------------------------------------------------------- networks in files


@dataclass
class FeatureDistances:
    """Between sets of images; None for sets of fewer than two."""

    digest: str
    """Of the network's file."""
    frechet_distance: float | None
    """Of written images from their references."""
    real_frechet_distance: float | None
    """Of each second reference from the others."""
    kernel_distance: float | None
    real_kernel_distance: float | None


class FeatureNetwork:
    """A network in a file that `torch.jit.save` has written: float images (images, 3, height, width) in -1 .. 1, of
    the size that the model writes, to features (images, features).

    Raises:
        ValueError: there is none in the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} holds no network ({reason}): give a file that torch.jit.save wrote") from error
        self.digest = digest_of(path)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
        """(images, features).

        Raises:
            ValueError: the network does not take images of this size.
        """
        pixels = torch.stack([pixels_of(image) for image in images])
        try:
            return torch.cat([self.network(part) for part in pixels.split(batch_size)])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"the network does not take pixels of shape {tuple(pixels.shape)} ({reason})") from error

    def distances(self, references: Sequence[Image.Image], written: Sequence[Image.Image]) -> FeatureDistances:
        """Distances of generated images from their references, and of the references from each other."""
        real = self.features(references)
        made = self.features(written) if written else real[:0]
        return FeatureDistances(self.digest, **compare_features({"": (real, made), "real_": (real[::2], real[1::2])}))


def pixels_of(image: Image.Image) -> torch.Tensor:
    """(3, height, width) in -1 .. 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def digest_of(path: Path) -> str:
    """The first half of a file's SHA-256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]

"""Distances of what is drawn from what should be, by the features of any network that was exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .frechet import frechet_distance, kernel_distance
from .judges import digest_of


@dataclass
class FeatureDistances:
    """Between sets of pictures; None for sets of fewer than two."""

    digest: str
    """Of the network's file."""
    frechet_distance: float | None
    """Of written pictures from their references."""
    real_frechet_distance: float | None
    """Of each second reference from the others."""
    kernel_distance: float | None
    real_kernel_distance: float | None


class FeatureNetwork:
    """A network in a file that `torch.jit.save` has written: float pictures (pictures, 3, height, width) in -1 .. 1, of
    the size that the model writes, to features (pictures, features).

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
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
        """(pictures, features).

        Raises:
            ValueError: the network does not take pictures of this size.
        """
        pixels = torch.stack([pixels_of(picture) for picture in pictures])
        try:
            return torch.cat([self.network(part) for part in pixels.split(batch_size)])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"the network does not take pixels of shape {tuple(pixels.shape)} ({reason})") from error

    def distances(self, references: Sequence[Image.Image], written: Sequence[Image.Image]) -> FeatureDistances:
        """Of what was written from what should be, and of the references from each other."""
        real = self.features(references)
        made = self.features(written) if written else real[:0]
        found: dict[str, float | None] = {}
        for prefix, one, other in (("", real, made), ("real_", real[::2], real[1::2])):
            for name, distance in (("frechet_distance", frechet_distance), ("kernel_distance", kernel_distance)):
                found[prefix + name] = distance(one, other) if min(len(one), len(other)) >= 2 else None
        return FeatureDistances(self.digest, **found)


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """(3, height, width) in -1 .. 1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1

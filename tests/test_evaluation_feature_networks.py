"""Distances of pictures by the features of a network in a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.feature_networks import FeatureNetwork
from evaluation.frechet import frechet_distance, kernel_distance


class Means(torch.nn.Module):
    """Of each channel, of the upper and of the lower half."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, (2, 1)).flatten(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "means.pt"
    torch.jit.save(torch.jit.script(Means()), path)
    return FeatureNetwork(path)


def pictures(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in pixels]


def means_of(picture):
    """The same by numpy."""
    values = np.asarray(picture).astype(float) / 127.5 - 1
    return np.stack([values[:4].mean((0, 1)), values[4:].mean((0, 1))], axis=1).flatten()


def test_features_are_those_of_pixels_from_minus_1_to_1(network):
    found = network.features(pictures(7, 0), batch_size=3)
    np.testing.assert_allclose(found, [means_of(picture) for picture in pictures(7, 0)], atol=1e-5)


def test_distances_from_references_and_of_these_from_each_other(network):
    references, written = pictures(9, 0), pictures(6, 1)
    real, made = (torch.tensor(np.array([means_of(it) for it in part])) for part in (references, written))
    found = network.distances(references, written)
    assert found.frechet_distance == pytest.approx(frechet_distance(real, made), abs=1e-5)
    assert found.kernel_distance == pytest.approx(kernel_distance(real, made), abs=1e-5)
    assert found.real_frechet_distance == pytest.approx(frechet_distance(real[::2], real[1::2]), abs=1e-5)
    assert found.real_kernel_distance == pytest.approx(kernel_distance(real[::2], real[1::2]), abs=1e-5)
    assert len(found.digest) == 32


@pytest.mark.parametrize("count", [0, 1])
def test_of_fewer_than_two_there_is_no_distance(network, count):
    found = network.distances(pictures(3, 0), pictures(count, 1))
    assert found.frechet_distance is found.kernel_distance is found.real_frechet_distance is None


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pt holds no network .* give a file that torch\.jit\.save wrote"):
        FeatureNetwork(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.pt holds no network"):
        FeatureNetwork(tmp_path / "text.pt")


def test_pictures_of_another_size_are_refused(tmp_path):
    network = torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2)))
    torch.jit.save(network, tmp_path / "four.pt")
    with pytest.raises(ValueError, match=r"the network does not take pixels of shape \(2, 3, 8, 6\) \("):
        FeatureNetwork(tmp_path / "four.pt").features(pictures(2, 0))

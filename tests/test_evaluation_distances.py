"""Distances of sets of features against their definitions."""

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.distances import FeatureNetwork, frechet_distance, kernel_distance


def features(count, size, seed, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    return (torch.randn(count, size, generator=generator) @ mixing) * scale + shift


def root_of(matrix):
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T


def test_the_frechet_distance_is_that_of_its_formula():
    real, written = features(400, 6, 0).numpy(), features(300, 6, 1, shift=0.7, scale=1.5).numpy()
    means, covariances = zip(*((it.mean(0), np.cov(it, rowvar=False)) for it in (real, written)), strict=True)
    root = root_of(covariances[0])
    both = np.trace(root_of(root @ covariances[1] @ root))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * both
    assert frechet_distance(torch.tensor(real), torch.tensor(written)) == pytest.approx(expected, rel=1e-4)


def test_the_distance_of_a_set_from_itself_is_none():
    real = features(50, 4, 0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)
    few = features(3, 8, 0)  # less media than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4) and frechet_distance(few, few) >= 0


def test_the_kernel_distance_is_that_of_its_formula():
    real, written = features(20, 5, 0).double(), features(14, 5, 1, shift=0.5).double()
    count = 14

    def kernel(one, other):
        return (float(one @ other) / 5 + 1) ** 3

    within = sum(
        kernel(part[i], part[j]) for part in (real, written) for i in range(count) for j in range(count) if i != j
    )
    across = sum(kernel(real[i], written[j]) for i in range(count) for j in range(count))
    expected = within / (count * (count - 1)) - 2 * across / count**2
    assert kernel_distance(real, written) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("real", "written", "message"),
    [
        ((1, 4), (5, 4), r"real features have shape \(1, 4\); give \(media, features\), at least two media"),
        ((5, 4), (5,), r"written features have shape \(5,\)"),
        ((5, 4), (5, 3), "real media have 4 features and written ones 3; take one network for both"),
    ],
)
def test_sets_that_cannot_be_compared(real, written, message):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(torch.zeros(real), torch.zeros(written))


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

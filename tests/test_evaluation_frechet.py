"""Distances of sets of features against their definitions."""

import numpy as np
import pytest
import torch

from evaluation.frechet import frechet_distance, kernel_distance


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

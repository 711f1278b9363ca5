"""The analysis of an iteration, on functions whose behaviour is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from evaluation.iteration import (
    effective_rank,
    growth_of,
    judge_states,
    measure_dynamics,
)


def linear(eigenvalues: list[complex], seed: int = 0) -> torch.Tensor:
    """A matrix with these eigenvalues, complex ones with their conjugates, in a basis that is not orthogonal."""
    blocks = [
        torch.tensor([[value.real, -value.imag], [value.imag, value.real]])
        if value.imag
        else torch.tensor([[value.real]])
        for value in map(complex, eigenvalues)
    ]
    matrix = torch.block_diag(*blocks).double()
    generator = torch.Generator().manual_seed(seed)
    basis = torch.eye(len(matrix)).double() + 0.2 * torch.randn(len(matrix), len(matrix), generator=generator).double()
    return (basis @ matrix @ torch.linalg.inv(basis)).float()


def measured(matrix: torch.Tensor, num_steps: int = 4):
    """The iteration s -> A s + b of three positions."""
    generator = torch.Generator().manual_seed(1)
    state, shift = torch.randn(2, 3, len(matrix), generator=generator)
    return measure_dynamics(lambda s, taken: s @ matrix.T + 0.1 * shift, state, num_steps)


def turn(radius: float, angle: float) -> complex:
    return complex(radius * math.cos(angle), radius * math.sin(angle))


CORES = {
    "0.5": ([0.5, -0.3, 0.2, 0.1], 0.5, "settles", None),
    "0.5, a pair": ([turn(0.5, 1.0), 0.2, 0.1], 0.5, "settles", None),
    "0.9, negative": ([-0.9, 0.3, 0.1], 0.9, "settles", None),
    "1": ([1.0, 0.5, 0.2, -0.1], 1.0, "marginal", None),
    "1, a pair": ([turn(1.0, 1.0), 0.5, 0.2], 1.0, "marginal", None),
    "1.2": ([1.2, 0.6, 0.3, -0.2], 1.2, "drifts", None),
    "1.2, a pair": ([turn(1.2, 0.7), 0.6, 0.3], 1.2, "drifts", None),
    "there and back": ([-1.0, 0.5, 0.3], 1.0, "orbits", 2),
    "in five": ([turn(1.0, 2 * math.pi / 5), 0.5, 0.3], 1.0, "orbits", 5),
}


@pytest.mark.parametrize(("eigenvalues", "radius", "name", "period"), CORES.values(), ids=CORES)
def test_linear_cores(eigenvalues, radius, name, period):
    found = measured(linear(eigenvalues))
    verdict = found.verdict
    assert torch.linalg.eigvals(linear(eigenvalues)).abs().max() == pytest.approx(radius, rel=1e-4)
    assert found.spectral_radii == pytest.approx([radius] * 5, rel=0.02)
    assert (verdict.name, verdict.period) == (name, period)
    assert verdict.spectral_radius == pytest.approx(radius, rel=0.02)


def test_a_core_of_period_two_that_is_stable():
    """s -> tanh(-2 s): the sign changes at each step, and |s| goes to the root of s = tanh(2 s)."""
    found = measure_dynamics(lambda s, taken: torch.tanh(-2 * s), torch.linspace(0.1, 1, 8).view(2, 4), num_steps=4)
    root = 0.957504
    assert (found.verdict.name, found.verdict.period) == ("orbits", 2)
    assert found.verdict.spectral_radius == pytest.approx(2 * (1 - root**2), rel=0.02)
    assert found.step_sizes[-1] == pytest.approx(2, rel=1e-4) and found.angles[-1] == pytest.approx(180, abs=0.1)
    # Half a step is a fixed point: s -> (s + tanh(-2 s)) / 2 comes to rest at 0, with derivative -1/2.
    half = found.scan[1]
    assert half.gamma == 0.5 and half.verdict.name == "settles"
    assert half.verdict.spectral_radius == pytest.approx(0.5, rel=0.02)


def test_figures_in_closed_form():
    """s -> c + a (s - c): each step is a times the one before, in the same direction."""
    rate, centre, start = 0.6, torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[4.0, 4.0], [0.0, 7.0]])
    found = measure_dynamics(lambda s, taken: centre + rate * (s - centre), start, num_steps=3)
    states = [centre + rate**i * (start - centre) for i in range(33)]
    sizes = [float((after - before).norm() / after.norm()) for before, after in pairwise(states)]
    assert found.num_followed == 32 and found.step_sizes == pytest.approx(sizes, abs=1e-6)
    of_positions = [float(((states[1] - states[0]).norm(dim=1) / states[1].norm(dim=1))[row]) for row in range(2)]
    assert found.position_step_sizes[0] == pytest.approx(of_positions, rel=1e-5)
    assert len(found.position_step_sizes) == 3
    assert found.angles[:6] == pytest.approx([0] * 6, abs=0.1)
    residuals = [float((it - states[12]).norm() / states[12].norm()) for it in states[:4]]
    assert found.residuals == pytest.approx(residuals, rel=1e-4)
    assert found.spectral_radii == pytest.approx([rate] * 4, rel=1e-4)
    for line in found.scan:  # 1 + gamma (a - 1)
        assert line.verdict.spectral_radius == pytest.approx(abs(1 + line.gamma * (rate - 1)), rel=1e-3)
        assert line.verdict.name == "settles" and line.distance < 0.06
        assert line.changes[0] == pytest.approx((1 - rate) * float((start - centre).norm() / start.norm()), rel=1e-5)


def test_the_number_of_a_step_counts():
    """A core that does something else at each step: s_i = s_{i-1} + i."""
    found = measure_dynamics(lambda s, taken: s + taken + 1, torch.ones(1, 1), num_steps=3, gammas=())
    sums = [1 + sum(range(i + 1)) for i in range(33)]
    assert found.step_sizes == pytest.approx([i / sums[i] for i in range(1, 33)])
    assert found.verdict.name == "drifts" and found.scan == []


def test_effective_ranks():
    assert effective_rank(torch.eye(4)[None]) == pytest.approx(4)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-6)
    values = torch.tensor([3.0, 1.0])
    assert effective_rank(values.diag()) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_states_that_are_no_numbers_drift():
    found = measure_dynamics(lambda s, taken: s * 1e30, torch.ones(2, 2), num_steps=2)
    assert found.verdict.name == "drifts" and math.isnan(found.effective_ranks[-1])
    assert judge_states(torch.full((33, 2), torch.nan), math.nan).name == "drifts"


def test_an_unstable_point_is_no_rest():
    """A state that happens to stand still where small differences grow is marginal, not settled."""
    found = measure_dynamics(lambda s, taken: 1 + 1.5 * (s - 1), torch.ones(2, 2), num_steps=2)
    assert found.verdict.name == "marginal" and found.verdict.step_factor is None
    assert growth_of(torch.tensor([8.0, 4.0, 2.0, 1.0])) == pytest.approx(0.5)

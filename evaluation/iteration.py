"""How the iteration of one function of a state goes: does it settle, and how fast? It knows of no model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.core_step import spectral_radius

Step = Callable[[torch.Tensor, int], torch.Tensor]
"""(state, steps taken before) -> the next state."""

GAMMAS = (0.25, 0.5, 1.0, 1.5)
"""Step sizes of the scan: 1 is the step itself."""
ITERATIONS = 40
"""Products of a power iteration, the second half of which counts."""
LEAST_FOLLOWED = 32
"""Steps that an iteration is followed for, at least, before it is judged."""
TOLERANCE = 0.02
"""Factors of growth in 1 - this .. 1 + this are neither growth nor decay."""
RETURN = 0.01
"""An orbit comes back to within this share of a step."""
REST = 1e-5
"""Steps below this share of the state are rounding."""


@dataclass
class Verdict:
    """What an iteration does in the long run."""

    name: str
    """"settles": steps shrink, and so do small differences; "orbits": it comes back to where it was `period` steps
    before; "drifts": it goes on changing, and does not come back; "marginal": none of these can be told, as differences
    neither grow nor shrink, or steps and differences disagree."""
    period: int | None
    """Steps of an orbit."""
    step_factor: float | None
    """The factor from one step's size to the next, over the second half of the steps; None where it came to rest."""
    spectral_radius: float
    """The factor by which small differences grow in a step at the last state."""


@dataclass
class ScanLine:
    """The iteration s + gamma (step(s) - s)."""

    gamma: float
    changes: list[float]
    """|step(s_i) - s_i| / |s_i|, i = 0 .. n - 1."""
    distance: float
    """|s_n - t_n| / |t_n|, t the states with gamma 1."""
    verdict: Verdict


@dataclass
class Dynamics:
    """The iteration from one state, R steps of it, and what came of it after many more."""

    num_steps: int
    """R."""
    num_followed: int
    """Steps that it was followed for."""
    step_sizes: list[float]
    """|s_i - s_{i-1}| / |s_i|, i = 1 .. num_followed; the length is that of all positions together."""
    position_step_sizes: list[list[float]]
    """The same of each position of the last dimension but one, i = 1 .. R."""
    angles: list[float]
    """Degrees between s_{i+1} - s_i and s_i - s_{i-1}, i = 1 .. num_followed - 1."""
    residuals: list[float]
    """|s_i - s_4R| / |s_4R|, i = 0 .. R."""
    spectral_radii: list[float]
    """Spectral radii of d s_{i+1} / d s_i, i = 0 .. R."""
    effective_ranks: list[float]
    """Effective ranks of s_i, (positions, hidden), i = 0 .. R."""
    verdict: Verdict
    scan: list[ScanLine]


@torch.no_grad()
def measure_dynamics(step: Step, state: torch.Tensor, num_steps: int, gammas: Sequence[float] = GAMMAS) -> Dynamics:
    """Follow an iteration.

    Args:
        step: (state, steps taken before) -> the next state, of the same shape.
        state: s_0, (..., positions, hidden).
        num_steps: R, at least 1; it is followed for 4 R steps, at least `LEAST_FOLLOWED`.
        gammas: Step sizes that are tried.
    """
    num_followed = max(4 * num_steps, LEAST_FOLLOWED)
    states = follow_states(step, state, num_followed)
    updates = states.diff(dim=0).flatten(1)
    flat = states.flatten(1)
    cosines = torch.nn.functional.cosine_similarity(updates[1:], updates[:-1], dim=-1)
    shown = states[: num_steps + 1]
    radii = [spectral_radius(at(step, taken), it, ITERATIONS) for taken, it in enumerate(shown)]
    verdict = judge_states(states, last_radius(step, states))
    scan = [scan_step_size(step, states, gamma, verdict) for gamma in gammas]
    return Dynamics(
        num_steps,
        num_followed,
        relative_lengths(updates, flat[1:]).tolist(),
        relative_lengths(shown.diff(dim=0), shown[1:]).flatten(1).tolist(),
        torch.rad2deg(cosines.clamp(-1, 1).acos()).tolist(),
        relative_lengths(flat[: num_steps + 1] - flat[4 * num_steps], flat[4 * num_steps]).tolist(),
        torch.stack(radii).tolist(),
        [effective_rank(it) for it in shown],
        verdict,
        scan,
    )


def at(step: Step, taken: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The step after `taken` others, as a function of the state alone."""
    return lambda state: step(state, taken)


def follow_states(step: Step, state: torch.Tensor, num_steps: int) -> torch.Tensor:
    """s_0 .. s_n, (n + 1, ...)."""
    states = [state]
    for taken in range(num_steps):
        states.append(step(states[-1], taken))
    return torch.stack(states)


def relative_lengths(change: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """|change| / |state| over the last dimension."""
    lengths = [torch.linalg.vector_norm(it.double(), dim=-1) for it in (change, state)]
    return lengths[0] / lengths[1].clamp(min=torch.finfo(torch.float32).tiny)


def effective_rank(state: torch.Tensor) -> float:
    """The exponential of the entropy of the singular values of (positions, hidden), in shares of their sum: between 1
    and the smaller side. Source: Roy and Vetterli 2007, "The effective rank".
    """
    if not state.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(state.flatten(0, -2).double())
    return torch.special.entr(values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)).sum().exp().item()


def last_radius(step: Step, states: torch.Tensor) -> float:
    """The spectral radius of the step from the last state on."""
    return spectral_radius(at(step, len(states) - 1), states[-1], ITERATIONS).item()


def scan_step_size(step: Step, states: torch.Tensor, gamma: float, verdict: Verdict) -> ScanLine:
    """The iteration with steps of another size, from the same s_0; `states` and `verdict` are those with gamma 1."""
    if gamma == 1:
        changes = relative_lengths(states.diff(dim=0).flatten(1), states[:-1].flatten(1))
        return ScanLine(gamma, changes.tolist(), 0.0, verdict)

    def damped(state: torch.Tensor, taken: int) -> torch.Tensor:
        return state + gamma * (step(state, taken) - state)

    found = follow_states(damped, states[0], len(states) - 1)
    changes = relative_lengths(found.diff(dim=0).flatten(1) / gamma, found[:-1].flatten(1))
    distance = relative_lengths(found[-1].flatten() - states[-1].flatten(), states[-1].flatten())
    return ScanLine(gamma, changes.tolist(), distance.item(), judge_states(found, last_radius(damped, found)))


# -------------------------------------------------------------------------------------------------------------- verdict


def judge_states(states: torch.Tensor, radius: float) -> Verdict:
    """What s_0 .. s_n, (n + 1, ...), do in their second half, and small differences at the last, by their spectral
    radius. See `Verdict`.
    """
    flat = states.flatten(1).double()
    if not flat.isfinite().all():
        return Verdict("drifts", None, None, radius)
    sizes = torch.linalg.vector_norm(flat.diff(dim=0), dim=-1)
    rest = max(REST, 4 * torch.finfo(states.dtype).eps) * flat[-1].norm()
    period, factor = None, None
    if sizes[-1] > rest:
        factor = growth_of(sizes[len(sizes) // 2 :])
        period = period_of(flat, sizes) if factor >= 1 - TOLERANCE else None
    shrinks = factor is None or factor < 1 - TOLERANCE
    if period is not None:
        name = "orbits"
    elif shrinks and radius < 1 - TOLERANCE:
        name = "settles"
    elif not shrinks and max(radius, factor) > 1 + TOLERANCE:
        name = "drifts"
    else:
        name = "marginal"
    return Verdict(name, period, factor, radius)


def growth_of(sizes: torch.Tensor) -> float:
    """The mean factor from one size to the next: the slope of a straight line through their logarithms."""
    logs, places = sizes.clamp(min=torch.finfo(torch.float32).tiny).log(), torch.arange(len(sizes)).to(sizes)
    places = places - places.mean()
    return ((places * logs).sum() / places.square().sum()).exp().item()


def period_of(flat: torch.Tensor, sizes: torch.Tensor) -> int | None:
    """The smallest number of steps, from 2 to half of the second half, after which each state of that half comes back,
    if there is one.
    """
    half = len(sizes) // 2
    for period in range(2, half // 2 + 1):
        ways = torch.linalg.vector_norm(flat[half + period :] - flat[half:-period], dim=-1)
        if ways.max() < RETURN * sizes[half:].mean():
            return period
    return None

"""Noise on the state at test time: x <- norm((1 - w) x + w noise) before each step.

Source: the released code of Geiping et al. 2025, arXiv 2502.05171, which draws from the global generator. Here the
noise of a token depends on its position, the step and the seed, and on nothing else that is in the batch.
"""

import math

import torch

from .configuration_megatransformer import MegaTransformerTextConfig
from .recurrence import keyed_generator

NOISE_SCHEDULES = ("geom", "sqrt", "line", "chi", "fixed")


class StateNoise:
    """Mixes normal noise into the state.

    With n = level * initializer_range * embedding_scale, i steps taken, and r the mean depth, the weight w is
    n / (i + 1) ("geom"), n / sqrt(i + 1) ("sqrt"), max(n, (r - i) / r) ("line"), 2 U n with U uniform on [0, 1)
    ("chi"), or n ("fixed").

    Args:
        level: At least 0; 1 is as much as the initial state has.

    Raises:
        ValueError: for a negative level, or an unknown schedule.
    """

    def __init__(self, config: MegaTransformerTextConfig, level: float, schedule: str = "geom"):
        if level < 0:
            raise ValueError(f"noise_level must be at least 0, got {level}")
        if schedule not in NOISE_SCHEDULES:
            raise ValueError(f"noise_schedule {schedule!r} is unknown; choose one of {', '.join(NOISE_SCHEDULES)}")
        self.amount = level * config.initializer_range * config.embedding_scale
        self.schedule = schedule
        self.mean_steps, self.seed = config.recurrence.mean_steps, config.recurrence.state_seed

    def weight(self, step: int) -> float:
        """w before the step that follows `step` steps."""
        if self.schedule == "geom":
            return self.amount / (step + 1)
        if self.schedule == "sqrt":
            return self.amount / math.sqrt(step + 1)
        if self.schedule == "line":
            return max(self.amount, (self.mean_steps - step) / self.mean_steps)
        if self.schedule == "chi":
            return 2 * self.amount * float(torch.rand((), generator=keyed_generator("noise weight", self.seed, step)))
        return self.amount

    def mix(self, step: int, state: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(1 - w) x + w noise.

        Args:
            step: Steps taken.
            state: (rows, sequence, hidden).
            position_ids: (1 or rows, sequence).
        """
        positions, places = position_ids.cpu().unique(return_inverse=True)
        draws = [
            torch.randn(state.shape[-1], generator=keyed_generator("noise", self.seed, step, position))
            for position in positions.tolist()
        ]
        return torch.lerp(state, torch.stack(draws)[places].to(state), self.weight(step))

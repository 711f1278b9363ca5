"""When a row that writes a latent may stop iterating: when the velocity that the flow head would begin with settles.

Texts stop by the criterion that was asked for, which reads tokens.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from .exit_criteria import EXIT_CRITERIA, ExitCheck, ExitController, ExitCriterion, ExitOptions

VELOCITY_THRESHOLD = 0.05


class VelocityOrText(ExitCriterion):
    """|v_i - v_{i-1}| / |v_i| of rows that write a latent, infinite at their first check; of others what a criterion of
    texts says. v is the head's velocity at t = 0, at the noise from which the latent will be made.

    Args:
        text: The criterion of texts.
        vocab_size: A check's `logits` are those of texts, and behind them v, zeros in rows of text.
        threshold: Of velocities.
    """

    def __init__(self, text: ExitCriterion, vocab_size: int, threshold: float):
        self.text, self.vocab_size, self.threshold = text, vocab_size, threshold
        self.default_threshold = text.default_threshold
        self.writes: torch.Tensor | None = None  # (rows,) of bool, of the last check

    def value(self, now: ExitCheck, before: ExitCheck) -> torch.Tensor:
        texts, velocity = self._parts(now)
        texts_before, velocity_before = self._parts(before)
        values = self.text.value(texts, texts_before).float()
        self.writes = velocity.abs().sum(dim=-1) > 0
        change = torch.full_like(values, torch.inf)
        if velocity_before is not None:
            length = velocity.norm(dim=-1).clamp(min=1e-12)
            change = (velocity - velocity_before).norm(dim=-1) / length
        return torch.where(self.writes, change, values)

    def stops(self, value: torch.Tensor, threshold: float) -> torch.Tensor:
        return torch.where(self.writes, value < self.threshold, self.text.stops(value, threshold))

    def _parts(self, check: ExitCheck) -> tuple[ExitCheck, torch.Tensor | None]:
        if check.logits is None:
            return check, None
        return replace(check, logits=check.logits[:, : self.vocab_size]), check.logits[:, self.vocab_size :].float()


class WritingExitController(ExitController):
    """An `ExitController` of rows of which some write latents.

    Args:
        options: As in `ExitController`, for texts.
        logits: (rows, hidden) -> (rows, vocab).
        velocities: (rows, hidden), and which rows of the batch they are, (rows,) or None for all -> (rows, size), zeros
            in rows of text.
        vocab_size: Of the logits.
        velocity_threshold: Below which a row that writes a latent stops.

    Raises:
        ValueError: as `ExitController`; for the criterion "probe", and for a threshold that is not above 0.
    """

    def __init__(
        self,
        options: ExitOptions,
        logits: Callable[[torch.Tensor], torch.Tensor],
        velocities: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        vocab_size: int,
        velocity_threshold: float = VELOCITY_THRESHOLD,
    ):
        if options.criterion == "probe":
            raise ValueError("exit_criterion 'probe' judges text alone; name another to write media")
        if not velocity_threshold > 0:
            raise ValueError(f"velocity_threshold is {velocity_threshold}; give a number above 0")
        super().__init__(options, logits)
        self.criterion = VelocityOrText(EXIT_CRITERIA[options.criterion], vocab_size, velocity_threshold)
        self.velocities_of = velocities

    def read(self, hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """(rows, vocab + size): logits, and behind them velocities."""
        return torch.cat((super().read(hidden, rows).float(), self.velocities_of(hidden, rows)), dim=-1)

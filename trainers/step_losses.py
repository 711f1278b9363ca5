"""The losses of a run as they come, on the device."""

import math

import torch
from accelerate.utils import reduce


class StepLosses:
    """The losses that are added up for a log. `Trainer` keeps one sum for all steps of a log, from which a loss that is
    not finite can never be taken again; so it gets the loss before in its place, and the log says that there was one.
    """

    def __init__(self) -> None:
        self.of_step = self.last_finite = torch.zeros(())
        self.has_not_finite = torch.zeros(())  # since the last log

    def begin_step(self) -> None:
        """Counts the losses of a step from 0."""
        self.of_step = torch.zeros_like(self.of_step)

    def add(self, loss: torch.Tensor) -> torch.Tensor:
        """Takes the loss of a micro-batch in, a number; what `Trainer` adds to its sum."""
        is_finite = loss.isfinite()
        self.of_step = self.of_step.to(loss.device) + loss
        self.has_not_finite = torch.where(is_finite, self.has_not_finite.to(loss.device), 1.0)
        self.last_finite = torch.where(is_finite, loss, self.last_finite.to(loss.device))
        return self.last_finite

    def mean_of_step(self) -> float:
        """The loss of the step, as it would be logged, for which the host waits."""
        return float(reduce(self.of_step, "mean"))

    def leave_out(self) -> None:
        """Forgets that a loss was not finite, as its update is left out."""
        self.has_not_finite = torch.zeros_like(self.has_not_finite)

    def for_log(self, mean: float) -> float:
        """The mean loss since the last log as it is logged: NaN where a loss of any rank was not finite."""
        is_bad = float(reduce(self.has_not_finite, "sum")) > 0
        self.leave_out()
        return math.nan if is_bad else mean

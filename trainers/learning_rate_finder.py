"""A range test of learning rates: the first steps of a run, each at a larger rate, and what its losses say."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_STEPS = 100
"""Optimizer steps of a range test."""
LEAST_FACTOR, MOST_FACTOR = 1e-3, 1e2
"""The first and the last rate, as factors of the rate of the run."""
DIVERGENCE, RECENT = 1.5, 5
"""The test ends where the mean of the last five losses is more than one and a half times its least value."""
WINDOW = 9
"""Losses of which each point of the smoothed curve is the mean."""
LEAST_STEPS = WINDOW + 2
"""Losses of which one slope of the smoothed curve is known."""


class NothingFoundError(ValueError):
    """A few steps of a run were not enough to find what they were made for."""


@dataclass(frozen=True)
class RangeTest:
    """The losses of steps at rates that grow. Source: Smith 2017, arXiv 1506.01186; the suggestion is that of
    Lightning, but from means that do not lag behind.

    Args:
        factors: What all learning rates of the run were multiplied by in each step, growing.
        losses: Loss of each step, before its update.
        rates: The learning rates of the run, by the names of their options.
    """

    factors: list[float]
    losses: list[float]
    rates: dict[str, float]

    @property
    def smoothed(self) -> np.ndarray:
        """float (steps,): means of up to `WINDOW` losses around each step, as many before as behind it."""
        ends = np.concatenate([[0.0], np.cumsum(self.losses)])
        places = np.arange(len(self.losses))
        reach = np.minimum(np.minimum(places, places[::-1]), WINDOW // 2)
        return (ends[places + reach + 1] - ends[places - reach]) / (2 * reach + 1)

    @property
    def best_step(self) -> int:
        """The step with the least smoothed loss, behind which the run diverges."""
        return int(self.smoothed.argmin())

    @property
    def steepest_step(self) -> int:
        """The step, before the best, at which the smoothed loss falls most for a rate that grows by the same factor; of
        those alone whose slope is of whole windows, as that of fewer losses is steep by chance.

        Raises:
            NothingFoundError: The loss does not fall.
        """
        if self.best_step + 1 < WINDOW:
            least, most = (factor * self.rates["learning_rate"] for factor in (self.factors[0], self.factors[-1]))
            raise NothingFoundError(
                f"the loss falls at none of the learning rates from {least:.2g} to {most:.2g}; give another "
                "training.learning_rate, around which they are tried"
            )
        first = WINDOW // 2 + 1
        last = min(self.best_step, len(self.losses) - 1 - first)
        return first + int(np.gradient(self.smoothed)[first : last + 1].argmin())

    def rates_at(self, factor: float) -> dict[str, float]:
        """The learning rates of the run times a factor, by option."""
        return {name: rate * factor for name, rate in self.rates.items()}

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values: what is suggested, a tenth of the rates of the least loss, and each step."""
        return {
            "suggested": self.rates_at(self.factors[self.steepest_step]),
            "tenth_of_best": self.rates_at(self.factors[self.best_step] / 10),
            "learning_rate": [factor * self.rates["learning_rate"] for factor in self.factors],
            "loss": self.losses,
            "smoothed_loss": self.smoothed.tolist(),
        }

    def summary(self) -> str:
        """The suggestion in one line."""
        found = self.as_dict()
        suggested = ", ".join(f"{name} {rate:.2g}" for name, rate in found["suggested"].items())
        return f"{suggested} (steepest descent; a tenth of the best is {found['tenth_of_best']['learning_rate']:.2g})"

    def figure(self) -> "Figure":
        """A plot of the losses over the learning rate, with what is suggested."""
        from matplotlib.figure import Figure  # it takes a second, which only a plot is worth

        found, figure = self.as_dict(), Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(found["learning_rate"], self.losses, alpha=0.3, label="loss")
        axes.plot(found["learning_rate"], self.smoothed, label=f"mean of {WINDOW} steps")
        for name, style in (("suggested", "-"), ("tenth_of_best", ":")):
            rate = found[name]["learning_rate"]
            axes.axvline(
                rate, color="black", linestyle=style, linewidth=1, label=f"{name.replace('_', ' ')}: {rate:.2g}"
            )
        axes.set(xscale="log", xlabel="learning_rate", ylabel="loss")
        axes.legend()
        return figure


class RangeTestCallback(TrainerCallback):
    """Multiplies the rates of all groups of parameters by a factor that grows with each step, from `LEAST_FACTOR` to
    `MOST_FACTOR`, and ends the training where the loss diverges. It needs a schedule that is constant, a log of each
    step, and to stand before what keeps groups frozen.
    """

    def __init__(self) -> None:
        self.initial: list[float] = []
        self.factors: list[float] = []
        self.losses: list[float] = []
        self.least = math.inf

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Keep the rates of the run."""
        self.initial = [group["lr"] for group in optimizer.param_groups]

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Set those of this step."""
        share = state.global_step / max(state.max_steps - 1, 1)
        self.factors.append(LEAST_FACTOR * (MOST_FACTOR / LEAST_FACTOR) ** share)
        for group, rate in zip(optimizer.param_groups, self.initial, strict=True):
            group["lr"] = rate * self.factors[-1]

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Keep the loss of a step, and end the training where it diverges; one that is not finite is left out."""
        if "loss" not in logs:
            return
        mean = logs["loss"]
        if math.isfinite(mean):
            self.losses.append(mean)
            mean = float(np.mean(self.losses[-RECENT:]))
            self.least = min(self.least, mean)
        if not mean <= DIVERGENCE * self.least:  # NaN is not, either
            control.should_training_stop = True

    def result(self, rates: dict[str, float]) -> RangeTest:
        """What was measured; see `RangeTest`.

        Raises:
            NothingFoundError: Too few steps were.
        """
        if len(self.losses) < LEAST_STEPS:
            raise NothingFoundError(
                f"only {len(self.losses)} steps have a finite loss, where {LEAST_STEPS} are needed; look at the data, "
                "or try --debug"
            )
        return RangeTest(self.factors[: len(self.losses)], self.losses, rates)

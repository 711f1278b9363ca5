"""What is drawn for the steps of a micro-batch besides their number."""

import torch

from model.depth import keyed_generator


def scheduled_mean(mean: int, share: float, step: int, max_steps: int) -> int:
    """The mean of the drawn steps in update `step`, counted from 0, of `max_steps`: from 1 it grows linearly to `mean`
    over that share of the updates.
    """
    length = share * max_steps
    return mean if step >= length else round(1 + (mean - 1) * step / length)


def dropped_steps(rate: float, num_steps: int, *key: int) -> frozenset[int]:
    """Which of the first steps go without their low-rank update, each with this probability; drawn from `key` alone."""
    draws = torch.rand(num_steps, generator=keyed_generator("loop_dropout", *key))
    return frozenset((draws < rate).nonzero().flatten().tolist())

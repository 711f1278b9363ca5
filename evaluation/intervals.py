"""How sure a score is: intervals of 95 % for shares, means and differences of two models over the same examples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964
"""The quantile of the normal distribution that leaves 2.5 % above it."""
LEVELS = (0.025, 0.975)
DRAWS, FEWEST_DRAWS = 10_000, 1_000
"""Draws of a bootstrap of sums; fewer where there are so many examples that a draw takes its time."""
MOST_NUMBERS = 2 * 10**7
"""Numbers that such a bootstrap draws, if that leaves the fewest draws."""
AT_ONCE = 2**22
"""Numbers that a bootstrap holds at a time, at most, unless one draw has more."""


class Interval(NamedTuple):
    """An interval that holds the true value in 95 % of repetitions."""

    low: float
    high: float


def wilson_interval(right: int, count: int) -> Interval:
    """The interval of a share, right of count: Wilson 1927, whose width is above 0 where all are right, or none."""
    share, spread = right / count, Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Interval(middle - half if right else 0.0, middle + half if right < count else 1.0)


def difference_interval(only_first: int, only_second: int, count: int) -> Interval:
    """The interval of the difference of two shares over the same examples: Bonett and Price 2012, formula 8.

    Args:
        only_first: Examples that the first alone has right.
        only_second: Examples that the second alone has right.
        count: All examples.
    """
    first, second = (only_first + 1) / (count + 2), (only_second + 1) / (count + 2)
    half = Z * math.sqrt((first + second - (first - second) ** 2) / (count + 2))
    return Interval(max(-1.0, first - second - half), min(1.0, first - second + half))


def sign_test(only_first: int, only_second: int) -> float:
    """The probability of so uneven a split, or a more uneven one, if either side were as likely: McNemar's exact test
    of pairs that are right and wrong, and the sign test of differences.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(count, number) for number in range(fewer + 1)) / 2**count)


def ratio_interval(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """The interval of the sum of values by the sum of weights, by a bootstrap over examples.

    Of documents with the sums of their losses as values and their tokens as weights, it is that of the loss of a token;
    of the differences of two models' sums, that of the difference of their losses. Without weights it is a mean's.

    Args:
        values: One for each example.
        weights: One for each example, above 0 in sum. Default: 1.
        seed: The seed of the draws.

    Raises:
        ValueError: There is no example.
    """
    weights = np.ones(len(values)) if weights is None else weights
    sums = sums_of_draws(np.stack([np.asarray(values, float), np.asarray(weights, float)], axis=1), seed)
    return interval_of(divided(sums[:, 0], sums[:, 1]))


def sums_of_draws(columns: np.ndarray, seed: int = 0) -> np.ndarray:
    """The sums of columns, (examples, columns), over each draw of as many examples with replacement, (draws, columns).

    Raises:
        ValueError: There is no example.
    """
    count = len(columns)
    if not count:
        raise ValueError("0 examples have no interval; give some")
    draw, found = np.random.default_rng(seed), []
    draws, size = min(DRAWS, max(FEWEST_DRAWS, MOST_NUMBERS // count)), max(1, AT_ONCE // count)
    for first in range(0, draws, size):
        number = min(size, draws - first)
        chosen = draw.integers(count, size=(number, count)) + count * np.arange(number)[:, None]
        times = np.bincount(chosen.ravel(), minlength=number * count).reshape(number, count)
        found.append(times.astype(float) @ columns)
    return np.concatenate(found)


def divided(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The quotients, no number where a draw has no weight."""
    return values / np.where(weights > 0, weights, np.nan)


def interval_of(draws: np.ndarray) -> Interval:
    """The interval between the quantiles of draws."""
    return Interval(*map(float, np.nanquantile(draws, LEVELS)))

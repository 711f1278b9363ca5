"""Intervals: closed forms on small numbers, and how often they hold the truth in simulations."""

import math

import numpy as np
import pytest

from evaluation.intervals import (
    Interval,
    difference_interval,
    ratio_interval,
    sign_test,
    wilson_interval,
)

TRIALS, EXAMPLES = 1000, 200


def coverage(intervals: list[Interval], truth: float) -> float:
    return sum(it.low <= truth <= it.high for it in intervals) / len(intervals)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_intervals_of_shares_hold_the_truth(share):
    rights = np.random.default_rng(1).binomial(EXAMPLES, share, TRIALS)
    assert 0.93 <= coverage([wilson_interval(int(right), EXAMPLES) for right in rights], share) <= 0.97


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.4), (0.9, 0.85), (0.99, 0.95)])
def test_intervals_of_differences_of_shares_hold_the_truth(first, second):
    """Of one hardness of an example for both, so that they are right and wrong together more often than by chance."""
    draw, intervals, limits = np.random.default_rng(2), [], thresholds(first, second)[:, None]
    for _ in range(TRIALS):
        hardness = (draw.random(EXAMPLES) + 0.5 * draw.random((2, EXAMPLES))) / 1.5
        a, b = hardness < limits
        intervals.append(difference_interval(int((a & ~b).sum()), int((b & ~a).sum()), EXAMPLES))
    assert 0.93 <= coverage(intervals, first - second) <= 0.97


def thresholds(*shares: float) -> np.ndarray:
    """The values of hardness below which so many are, by a large sample."""
    draw = np.random.default_rng(3)
    return np.quantile((draw.random(2_000_000) + 0.5 * draw.random(2_000_000)) / 1.5, shares)


@pytest.mark.parametrize("is_paired", [False, True])
def test_intervals_of_means_and_of_paired_differences_hold_the_truth(monkeypatch, is_paired):
    """Losses of documents with different numbers of tokens; the second model is 0.1 worse on each token in the mean."""
    monkeypatch.setattr("evaluation.intervals.DRAWS", 400)
    draw, intervals = np.random.default_rng(4), []
    for trial in range(TRIALS):
        tokens = draw.integers(20, 200, EXAMPLES)
        losses = draw.gamma(4.0, 0.5, EXAMPLES)
        if is_paired:
            worse = losses + 0.1 + 0.2 * draw.standard_normal(EXAMPLES)
            intervals.append(ratio_interval((worse - losses) * tokens, tokens, trial))
        else:
            intervals.append(ratio_interval(losses * tokens, tokens, trial))
    assert 0.93 <= coverage(intervals, 0.1 if is_paired else 2.0) <= 0.97


def test_wilsons_interval_is_where_the_test_of_the_share_has_its_quantiles():
    """Both ends solve |share - p| = z sqrt(p (1 - p) / n), by bisection; 200 of 200 has a width."""
    for right, count in ((3, 10), (50, 100), (200, 200), (0, 7)):
        found = wilson_interval(right, count)
        for end, (low, high) in zip(found, ((0.0, right / count), (right / count, 1.0)), strict=True):
            for _ in range(60):
                middle = (low + high) / 2
                is_inside = abs(right / count - middle) <= 1.959964 * math.sqrt(middle * (1 - middle) / count)
                towards_share = (middle > right / count) == is_inside
                low, high = (middle, high) if towards_share else (low, middle)
            assert end == pytest.approx(low, abs=1e-9)
    assert wilson_interval(200, 200).low == pytest.approx(0.98116, abs=1e-4)


def test_the_interval_of_a_difference_by_hand():
    """With one example added to each kind: (6 - 2) / 52 +- z sqrt((6/52 + 2/52 - (4/52)^2) / 52)."""
    half = 1.959964 * math.sqrt((8 / 52 - (4 / 52) ** 2) / 52)
    assert difference_interval(5, 1, 50) == pytest.approx((4 / 52 - half, 4 / 52 + half))
    assert difference_interval(0, 0, 50)[1] > 0


def test_the_sign_test_counts_both_tails():
    assert sign_test(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert sign_test(3, 3) == 1 and sign_test(0, 0) == 1
    assert sign_test(0, 10) == pytest.approx(2 / 1024)


def test_the_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(3, 1, 1000)
    low, high = ratio_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert ratio_interval(values) == (low, high)  # seeded
    assert ratio_interval(2 * values, np.full(1000, 2.0)) == pytest.approx((low, high))
    with pytest.raises(ValueError, match="0 examples have no interval"):
        ratio_interval([])

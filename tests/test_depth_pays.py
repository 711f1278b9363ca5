"""The arithmetic of the benchmark of depth."""

import pytest

from benchmarks.depth_pays import CONTESTANTS, DEPTHS, mean_and_interval, report, steps_needed, updates_in_the_same_time


def result(accuracy: dict, seconds: float = 10.0, updates: int = 100) -> dict:
    return {"seconds": seconds, "updates": updates, "accuracy": accuracy}


def by_level(*shares: float) -> dict:
    return {str(level): share for level, share in enumerate(shares, start=1)}


def test_interval_is_that_of_students_t():
    """Three values 1, 2, 3: mean 2, standard deviation 1, t = 4.303."""
    assert mean_and_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_and_interval([0.5]) == (0.5, 0.0)


def test_steps_needed_is_the_first_depth_whose_mean_over_seeds_is_enough():
    seeds = [
        result({str(depth): by_level(0.8 if depth < 4 else 1.0) for depth in DEPTHS}),
        result({str(depth): by_level(0.9 if depth < 3 else 1.0) for depth in DEPTHS}),
    ]
    assert steps_needed(seeds, level=1) == 3  # means: 0.85, 0.85, 0.9, 1
    assert steps_needed(seeds, level=1, accuracy=0.95) == 4
    assert steps_needed([result({str(depth): by_level(0.5) for depth in DEPTHS})], level=1) is None


def test_the_long_run_at_one_step_takes_the_time_of_the_recurrent_one():
    contestants = {contestant.name: contestant for contestant in CONTESTANTS}
    results = {
        (contestants["recurrent"], 0): result({}, seconds=90.0),
        (contestants["one_step"], 0): result({}, seconds=30.0, updates=200),
        (contestants["one_step"], 1): result({}, seconds=1.0, updates=200),
    }
    assert updates_in_the_same_time(contestants["one_step_long"], 0, results) == 600


def test_report_has_a_line_for_each_contestant_and_for_each_depth():
    results = {}
    for contestant in CONTESTANTS:
        depths = DEPTHS if contestant.name == "recurrent" else [contestant.depth or "plain"]
        results[contestant.name] = [result({str(depth): by_level(*[1.0] * 4, *[0.5] * 4) for depth in depths})] * 3
    text = report(results)
    assert all(f"| {contestant.title} | 75.0 ± 0.0 | 100.0 ± 0.0 | 83.3" in text for contestant in CONTESTANTS)
    assert "| 16 | 100.0 | 100.0 | 100.0 | 100.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in text
    assert "| needed for 90 % | 1 | 1 | 1 | 1 | - | - | - | - |" in text

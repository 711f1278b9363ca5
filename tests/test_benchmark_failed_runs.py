"""The benchmark of runs that fail: what it hears, and what it makes of it."""

import logging

from benchmarks.failed_runs import SET_UPS, AlarmLog, has_surprised, report


def test_alarms_are_heard_with_their_steps():
    heard, logger = AlarmLog(), logging.getLogger("tests.failed_runs")
    logger.addHandler(heard)
    logger.warning("%s", "step 40: the states of different tokens have a mean correlation of 0.999; it runs away")
    logger.warning("another")
    assert heard.alarms == [
        (40, "the states of different tokens have a mean correlation of 0.999"),
        (40, "it runs away"),
    ]


def test_a_set_up_surprises_that_is_silent_or_says_something_else():
    collapse, ignored, healthy = SET_UPS
    alarms = [(40, "the states of different tokens have a mean correlation of 0.999: they are collapsing")]
    assert not has_surprised(collapse, alarms) and has_surprised(collapse, [])
    assert has_surprised(ignored, alarms) and has_surprised(healthy, alarms) and not has_surprised(healthy, [])
    logs = [
        {"loss": 3.0, "depth_gap": 0.5, "token_correlation": 0.7, "state_growth": 2.0},
        {"loss": 2.0, "depth_gap": 0.1, "token_correlation": 0.4, "state_growth": 3.0},
    ]
    results = {set_up.name: {"alarms": alarms if set_up is collapse else [], "logs": logs} for set_up in SET_UPS}
    first, _, last = report(results).splitlines()[2:]
    assert first.endswith("| 40 | 2.000 | 0.100 | 0.700 | 3.000 |") and last.endswith(
        "| - | 2.000 | 0.100 | 0.700 | 3.000 |"
    )

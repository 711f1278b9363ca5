"""The benchmark of objectives: its arithmetic, and a run of a second."""

import math

import pytest

from benchmarks import credit, equal_time
from tests.test_pretrain import write_config


def row(objective: str = "full", seed: int = 0, **others) -> dict:
    exits = [
        {"criterion": "kl_divergence", "threshold": 0.1, "score": 0.4, "share": 0.25},
        {"criterion": "kl_divergence", "threshold": 0.01, "score": 0.7, "share": 0.4},
        {"criterion": "probe", "threshold": 0.5, "score": 0.795, "share": 0.5 + seed / 10},
        {"criterion": "probe", "threshold": 0.1, "score": 0.8, "share": 0.9},
    ]
    found = {"score": {"2": 0.1, "8": 0.8, "32": 0.5}, "exits": exits, "mean_steps": 8, "peak_mib": 30.0}
    job = {"task": "cups", "objective": objective, "seed": seed, "updates_of_truncated": 1300, "questions": 10}
    return {**job, "updates": 100, "cpu_seconds": 5.5, **found, **others}


def test_exits_have_to_keep_99_of_100_answers():
    """Of a score of 0.8, 0.792; which 0.795 at half of the steps is."""
    assert credit.least_share(row()) == 0.5
    assert credit.least_share(row(score={"8": 0.81})) == 1.0  # 0.8 is less than 0.8019
    assert math.isnan(credit.least_share(row(score={"8": 0.4})))  # what was not learned can be kept in a step
    assert credit.score_at_few_steps(row()) == 0.7
    assert credit.score_at_few_steps(row(exits=[])) == 0.0 and credit.least_share(row(exits=[])) == 1.0


def test_the_report_has_means_and_intervals_over_seeds():
    """Shares of 50, 60 and 70 per cent: 60, and 4.303 times 10 / sqrt(3) beside it."""
    text = credit.report([row(seed=seed) for seed in range(3)] + [row("truncated")])
    assert "| full | 3 | 80.0 ± 0.0 | 60.0 ± 24.8 | 70.0 ± 0.0 | 50.0 ± 0.0 | 30.0 ± 0.0 |" in text
    assert "| truncated | 1 | 80.0 | 50.0 | 70.0 | 50.0 | 30.0 | 100.0 | 5.5 |" in text
    assert text.startswith("cups, at a mean of 8 steps")
    one = row(seed=1, score={"2": 0.1, "8": 0.2, "32": 0.5})
    assert "| full | 2 | 50.0 ± 381.2 | - | " in credit.report([row(), one])


def test_a_run_trains_for_the_time_of_the_truncated_objective_and_answers(tmp_path, monkeypatch):
    config = write_config(tmp_path, training={"logging_steps": 1000})
    task = credit.RecurrentTask(config, "addition", updates=12, levels=(1,))
    monkeypatch.setitem(credit.TASKS, "tiny", task)
    monkeypatch.setattr(equal_time, "PILOT", 4)
    monkeypatch.setattr(credit, "THRESHOLDS", {"kl_divergence": (1e9, 1e-30), "probe": (0.5,)})
    found = credit.measure("tiny", "exit distribution", 0, questions=6)
    assert 1 < found["updates"] < 12 and found["cpu_seconds"] > 0 and found["peak_mib"] > 0
    assert credit.measure("tiny", "truncated", 0, questions=6)["updates"] == 12
    assert list(found["score"]) == [1, 3, 6, 12] and found["mean_steps"] == 3
    first, never, gate = found["exits"]
    assert first["share"] == pytest.approx(1 / 3) and first["score"] == found["score"][1]
    assert never["share"] == 1 and never["score"] == found["score"][3] and gate["criterion"] == "probe"

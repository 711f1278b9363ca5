"""The benchmark of depth: its arithmetic, and which runs it takes up again."""

import json

import pytest

from benchmarks import depth_pays
from benchmarks.depth_pays import (
    CONTESTANTS,
    DEPTHS,
    Job,
    compete_all,
    mean_and_interval,
    report,
    steps_needed,
    updates_in_the_same_time,
)
from configs import RunConfig, resolve


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
        results[contestant.name] = [result({str(depth): by_level(*[1.0] * 3, *[0.5] * 3) for depth in depths})] * 3
    text = report(results)
    groups = "75.0 ± 0.0 | 100.0 ± 0.0 | 75.0 ± 0.0 | 50.0 ± 0.0"
    assert all(f"| {contestant.title} | {groups} |" in text for contestant in CONTESTANTS)
    assert "| 16 | 100.0 | 100.0 | 100.0 | 50.0 | 50.0 | 50.0 |" in text
    assert "| needed for 90 % | 1 | 1 | 1 | - | - | - |" in text


@pytest.fixture
def commands(monkeypatch):
    """The scripts that would be started; each leaves an empty table, as if it evaluated."""
    started = []

    def run(_, module, folder, *arguments):
        started.append(module)
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "depth.json").write_text('{"rows": []}')

    monkeypatch.setattr(depth_pays, "run", run)
    return started


def leave_run(job: Job, updates: int, *flags: str) -> None:
    """What a run of `pretrain.py` leaves of itself, if it had the flags of a job and others."""
    RunConfig.from_options(resolve([*job.flags, *flags]), skip=("training",)).save(job.folder / "config.yaml")
    state = {"global_step": updates, "log_history": [{"loss": 1.0}, {"train_runtime": 7.0}]}
    job.state_file.write_text(json.dumps(state))


def test_a_finished_run_is_only_judged_again(tmp_path, commands):
    job = Job(CONTESTANTS[0], 0, tmp_path, 20)
    leave_run(job, 20)
    assert compete_all([job], workers=1) == {(CONTESTANTS[0], 0): {"seconds": 7.0, "updates": 20, "accuracy": {}}}
    assert commands == ["evaluation"]


@pytest.mark.parametrize(
    ("updates", "flags", "difference"),
    [
        (20, ["--training.max_steps", "20"], "training.max_steps is 20 there and 2000 here"),
        (20, [], "updates is 20 there and 2000 here"),  # stopped early
        (2000, ["--training.learning_rate", "1e-3"], "training.learning_rate is 0.001 there and 0.002 here"),
        (2000, ["--model.num_core_layers", "2"], "model.num_core_layers is 2 there and 1 here"),
    ],
)
def test_a_run_that_was_trained_otherwise_is_refused_before_any_other_begins(
    tmp_path, commands, capsys, updates, flags, difference
):
    jobs = [Job(CONTESTANTS[0], seed, tmp_path, 2000) for seed in (0, 1)]
    leave_run(jobs[1], updates, *flags)
    with pytest.raises(SystemExit, match="2"):
        compete_all(jobs, workers=1)
    assert not commands
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path}/recurrent-1 holds another run: {difference}; remove the folder, or ")

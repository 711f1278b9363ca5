"""What comparisons in equal time share: which runs they take up again, and how these are started."""

import json
import os

import pytest

from benchmarks import equal_time
from tests.test_pretrain import write_config


def key(seed: int, task: str = "cups") -> dict:
    return {"task": task, "objective": "full", "seed": seed, "updates_of_truncated": 1300, "questions": 10}


def test_what_a_file_holds_is_not_run_again(tmp_path):
    """Rows of other keys stay in the file, and are not among those that were asked for."""
    file, started = tmp_path / "there" / "rows.json", []

    def run(key):
        started.append(key)
        return {**key, "updates": 100 + key["seed"]}

    keys = [key(seed) for seed in range(2)]
    equal_time.run_missing([*keys[:1], key(0, "scenes")], file, run)
    found = equal_time.run_missing([*keys, *keys], file, run)
    assert started == [keys[0], key(0, "scenes"), keys[1]]
    assert found == [{**key(0), "updates": 100}, {**key(1), "updates": 101}]
    rows = json.loads(file.read_text())
    assert [row["task"] for row in rows] == ["cups", "scenes", "cups"]
    with pytest.raises(ZeroDivisionError):  # what fails later does not take away what is there
        equal_time.run_missing([key(2)], file, lambda key: 1 / 0)
    assert json.loads(file.read_text()) == rows


def test_a_run_is_a_process_that_has_the_data_of_its_task_and_says_why_it_failed(tmp_path, monkeypatch):
    """Data are built once for all runs of a seed, here, and change nothing of a run that builds its own."""
    config = write_config(tmp_path, training={"logging_steps": 1, "max_steps": 3})
    task, here, build = equal_time.Task(config, "addition", updates=3), os.getpid(), equal_time.build_pretraining
    built: list[bool] = []
    monkeypatch.setattr(
        equal_time, "build_pretraining", lambda run, **given: built.append(not given) or build(run, **given)
    )

    def measure(name, way, seed, questions):
        if way == "wrong":
            raise ValueError("no way here")
        trainer, _ = equal_time.train(task, [], seed, 3, str(tmp_path / "run"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"losses": losses, "others": [name, way, questions], "process": os.getpid(), "built": list(built)}

    monkeypatch.setattr(equal_time, "measure_here", measure, raising=False)
    rows = [equal_time.run_apart(measure_by_name, {"cups": task}, key(seed)) for seed in (0, 0, 1)]
    assert [row["built"] for row in rows] == [[True, False], [True, False], [True, True, False]]
    assert rows[0]["losses"] == rows[1]["losses"] != rows[2]["losses"]
    assert all(row["others"] == ["cups", "full", 10] and row["process"] != here for row in rows)
    alone = build(equal_time.config_of(task, ["--training.output_dir", tmp_path / "alone", "--training.seed", "1"]))
    alone.train()
    assert rows[2]["losses"] == [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    with pytest.raises(ValueError, match="no way here"):
        equal_time.run_apart(measure_by_name, {"cups": task}, {**key(1), "objective": "wrong"})


def measure_by_name(*args):
    """What can be sent to another process, which finds the function of the test by its name."""
    return equal_time.measure_here(*args)


def test_a_run_that_diverges_has_a_row_and_is_counted(tmp_path):
    """It has no figures, so that the mean is that of the others, and it is not run again."""

    def run(key):
        if key["seed"] == 1:
            raise FloatingPointError("At step 200 the loss is nan. Lower the learning rate.")
        return key | {"score": 10.0 * (key["seed"] + 1)}

    rows = equal_time.run_missing([key(seed) for seed in range(3)], tmp_path / "rows.json", run)
    assert equal_time.run_missing([key(1)], tmp_path / "rows.json", lambda key: 1 / 0) == rows[1:2]
    assert rows[1] == key(1) | {"diverged": "At step 200 the loss is nan"}
    table = equal_time.tables(rows, "objective", {"score": lambda row: row["score"]}, lambda row: "title")
    assert [part.strip() for part in table.splitlines()[-1].strip("|").split("|")] == ["full", "3", "1", "20.0 ± 127.1"]
    assert equal_time.tables(rows[1:2], "objective", {"score": lambda row: row["score"]}, str).endswith(
        "| full | 1 | 1 | - |\n"
    )

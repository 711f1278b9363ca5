"""Runs that end by themselves: when, with several sources, after a restart, and what is refused."""

import logging

import pytest

import pretrain
from tests.test_pretrain import TINY_RUN, write_config
from tests.test_trainer import Interrupt, build, rows
from trainers import RecurrentTrainingArguments, find_resume_point
from trainers.early_stopping import evaluations_in_vain
from trainers.resuming import is_finished, read_state

STOPPING = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 3}


def stopping(folder, **options):
    """A trainer with two sources of validation, by default at a learning rate of 0, with which nothing improves."""
    trainer = build(folder, **{"learning_rate": 0.0, **STOPPING, **options})
    trainer.eval_dataset = {"one": rows(8), "other": rows(4)}
    trainer.args.choose_best_metric(trainer.eval_dataset, ("loss",))
    return trainer


@pytest.mark.parametrize(("patience", "steps"), [(1, 2), (3, 4), (9, 9)])
def test_it_ends_after_as_many_evaluations_in_vain(tmp_path, caplog, patience, steps):
    """The first one is the best there is. Of the evaluations of single sources nothing is said."""
    trainer = stopping(tmp_path, early_stopping_patience=patience)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == steps
    assert trainer.args.metric_for_best_model == "eval_loss"
    assert "arly" not in caplog.text


def test_one_source_decides_where_it_is_named(tmp_path):
    trainer = stopping(tmp_path, metric_for_best_model="other_loss", early_stopping_patience=2)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 5), (1.0, 3)])
def test_less_than_the_threshold_is_no_improvement(tmp_path, threshold, steps):
    """A rate at which each evaluation is a little better, so that without a threshold the run goes on."""
    options = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 5, "early_stopping_patience": 2}
    trainer = stopping(tmp_path, early_stopping_threshold=threshold, **options)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == sorted(evaluated, reverse=True) and evaluated[0] - evaluated[-1] < 1
    assert trainer.state.global_step == steps


def test_the_count_goes_on_after_a_restart(tmp_path):
    """Two steps, a checkpoint, new objects: it ends where the uninterrupted run does. From the checkpoint of its end it
    makes no step.
    """
    options = {"save_strategy": "steps", "save_steps": 1}
    cut = stopping(tmp_path, **options)
    cut.add_callback(Interrupt(2))
    cut.train()
    assert cut.state.global_step == 2 and not is_finished(tmp_path, cut.args)
    for _ in range(2):
        again = stopping(tmp_path, resume_from_checkpoint="true", **options)
        again.train(resume_from_checkpoint=find_resume_point(again.args))
        assert again.state.global_step == 4
    raised = stopping(tmp_path, resume_from_checkpoint="true", **{**options, "early_stopping_patience": 5})
    raised.train(resume_from_checkpoint=find_resume_point(raised.args))
    assert raised.state.global_step == 6


def test_a_run_that_ended_by_itself_is_finished(tmp_path, caplog):
    """The same command again, as after any kill, changes nothing."""
    flags = {"learning_rate": 0.0, "resume_from_checkpoint": True, "output_dir": str(tmp_path / "out"), "save_steps": 1}
    config = write_config(tmp_path, training=TINY_RUN["training"] | STOPPING | flags, callbacks={"samples": {}})
    assert pretrain.main(["--config", str(config)]) == 0
    assert read_state(tmp_path / "out")["global_step"] == 4
    before = (tmp_path / "out/trainer_state.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert pretrain.main(["--config", str(config)]) == 0
    assert "holds the finished run: nothing is left to do" in caplog.text
    assert (tmp_path / "out/trainer_state.json").stat().st_mtime_ns == before


def test_the_evaluation_behind_the_end_is_none_in_vain(tmp_path):
    """The state of the finished run has the count of its last checkpoint, and more patience goes on."""
    out = tmp_path / "out"
    flags = {"learning_rate": 0.0, "resume_from_checkpoint": True, "output_dir": str(out), "save_steps": 1}
    config = write_config(tmp_path, training=TINY_RUN["training"] | STOPPING | flags, callbacks={"samples": {}})
    for patience, steps in ((1, 2), (2, 3)):
        command = ["--config", str(config), "--training.early_stopping_patience", str(patience)]
        assert pretrain.main(command) == 0
        states = [read_state(folder) for folder in (out, out / f"checkpoint-{steps}")]
        assert [state["global_step"] for state in states] == [steps, steps]
        assert [evaluations_in_vain(state["stateful_callbacks"]) for state in states] == [patience, patience]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"eval_strategy": "no"},
            "early_stopping_patience is 3, but eval_strategy is no, so that nothing is evaluated",
        ),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0; give at least 1"),
        ({"early_stopping_threshold": -0.5}, "early_stopping_threshold is -0.5; give at least 0"),
        (
            {"early_stopping_patience": None, "early_stopping_threshold": 0.1},
            "early_stopping_threshold is 0.1, but early_stopping_patience is null",
        ),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{**STOPPING, **options})

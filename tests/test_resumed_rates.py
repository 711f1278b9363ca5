"""Rates, decay and other options of the optimizer in a run that goes on: those of closed forms, not of a checkpoint."""

import logging
import math

import pytest
import torch

from tests.test_trainer import Interrupt, build, losses
from tests.tiny import tiny_model
from trainers import ParameterGroup
from trainers.resuming import ResumeError

PEAK = 1e-2


def begun(folder, steps=4, **options):
    """The checkpoint of a run of four steps, cut or finished after some of them."""
    trainer = build(folder, **{"max_steps": 4, "learning_rate": PEAK, **options})
    trainer.add_callback(Interrupt(steps))
    trainer.train()
    return folder / f"checkpoint-{steps}"


def gone_on(checkpoint, **options):
    """The trainer of a run that has gone on from a checkpoint."""
    trainer = build(checkpoint.parent, model=tiny_model(seed=5), **{"max_steps": 8, "learning_rate": PEAK, **options})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def rates(trainer):
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}


def cosine(step, steps, peak=PEAK):
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear(step, steps, warmup=0, peak=PEAK):
    return peak * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


def test_a_finished_schedule_is_that_of_more_steps(tmp_path):
    """The rate of the checkpoint is 0; that of update i is that of step i - 1 of the longer schedule."""
    checkpoint = begun(tmp_path, lr_scheduler_type="cosine")
    trainer = gone_on(checkpoint, lr_scheduler_type="cosine")
    after = {step: rate for step, rate in rates(trainer).items() if step > 4}
    assert after == pytest.approx({step: cosine(step - 1, 8) for step in (5, 6, 7, 8)}, rel=1e-12)
    assert rates(trainer)[4] == pytest.approx(cosine(3, 4), rel=1e-12)  # the past stays


def test_more_steps_move_the_weights_at_once(tmp_path):
    """SGD, whose update is rate times gradient: that after the checkpoint is as long as its rate, and not 0."""
    moved = []

    class Watch(Interrupt):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
            if not moved:
                moved.append((after - self.before).norm().item())

    options = {"optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 1e-3}
    checkpoint = begun(tmp_path, **options)
    trainer = build(tmp_path, model=tiny_model(seed=5), max_steps=5, learning_rate=PEAK, **options)
    trainer.add_callback(Watch(5))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert moved[0] == pytest.approx(linear(4, 5) * 1e-3, rel=1e-2)  # the gradient is clipped to 1e-3


def test_other_rates_need_leave(tmp_path):
    """Of a checkpoint that says nothing of its options, the state of the optimizer does."""
    checkpoint = begun(tmp_path, steps=2)
    for option, value, name in (
        ("learning_rate", 1e-4, "lr 0.01, and here 0.0001"),
        ("weight_decay", 0.5, "weight_decay 0.0, and here 0.5"),
        ("adam_beta2", 0.9, r"betas \(0.9, 0.999\), and here \(0.9, 0.9\)"),
        ("adam_epsilon", 1e-6, "eps 1e-08, and here 1e-06"),
    ):
        with pytest.raises(ValueError, match=f"the optimizer there has {name}; give the same, or add"):
            gone_on(checkpoint, **{option: value})


def test_a_state_of_other_groups_is_refused(tmp_path):
    checkpoint = begun(tmp_path, steps=2)
    groups = [ParameterGroup("model.coda.*", lr_factor=0.5)]
    with pytest.raises(ResumeError, match=r"the optimizer there has groups of \[\d+, \d+\] parameters, here of \["):
        gone_on(checkpoint, parameter_groups=groups, allow_changes=True)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_changes_reach_the_optimizer_and_the_schedule(tmp_path, schedule):
    """Against a run that has had them from the beginning, but for its moments: the same options and rates."""
    checkpoint = begun(tmp_path, steps=2)
    changes = {
        "learning_rate": 3e-4,
        "weight_decay": 0.25,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "lr_scheduler_type": schedule,
        "warmup_steps": 4,
    }
    trainer = gone_on(checkpoint, allow_changes=True, **changes)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.25, 0]
    assert all(tuple(group["betas"]) == (0.8, 0.95) and group["eps"] == 1e-7 for group in groups)
    assert trainer.lr_scheduler.base_lrs == [3e-4, 3e-4]
    at = {"constant": lambda step: 3e-4, "linear": lambda step: linear(step, 8, 4, 3e-4)}
    at["cosine"] = lambda step: linear(step, 8, 4, 3e-4) if step < 4 else cosine(step - 4, 4, 3e-4)
    expected = {step: at[schedule](step - 1) for step in range(3, 9)}
    assert {step: rate for step, rate in rates(trainer).items() if step > 2} == pytest.approx(expected, rel=1e-12)


def test_changes_of_groups_and_muon(tmp_path):
    """Each group has the new rate of its own, and the schedule of all."""

    def options(rate, muon, factor):
        groups = [ParameterGroup("model.coda.*", lr_factor=factor), ParameterGroup("model.core.*", learning_rate=rate)]
        return {"muon_learning_rate": muon, "parameter_groups": groups, "lr_scheduler_type": "linear"}

    checkpoint = begun(tmp_path, steps=2, **options(5e-3, 2e-3, 0.5))
    trainer = gone_on(checkpoint, allow_changes=True, learning_rate=1e-3, **options(7e-3, 4e-3, 0.1))
    fresh = build(tmp_path / "fresh", max_steps=8, learning_rate=1e-3, **options(7e-3, 4e-3, 0.1))
    bases = [group["lr"] for group in fresh.optimizer.param_groups]
    assert trainer.lr_scheduler.base_lrs == bases and {1e-3, 4e-3, 1e-4, 7e-3} <= set(bases)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # after the last step


def test_a_schedule_that_remembers_keeps_its_rate(tmp_path):
    """Reduced on a plateau: what was reduced stays so when steps are added."""
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0},  # nothing is better by 10: each evaluation halves it
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    }
    options["lr_scheduler_kwargs"]["factor"] = 0.5
    checkpoint = begun(tmp_path, steps=3, **options)
    trainer = gone_on(checkpoint, **options)
    found = rates(trainer)
    assert found[4] == pytest.approx(found[3] / 2) and found[8] == pytest.approx(found[4] / 16)


def test_leave_without_changes_changes_nothing(tmp_path):
    whole = build(tmp_path / "whole", max_steps=6, lr_scheduler_type="cosine")
    whole.train()
    checkpoint = begun(tmp_path / "cut", steps=3, max_steps=6, lr_scheduler_type="cosine")
    trainer = gone_on(checkpoint, max_steps=6, lr_scheduler_type="cosine", allow_changes=True)
    assert losses(trainer) == losses(whole) and rates(trainer) == rates(whole)


# --------------------------------------------------------------------------------------------------- nothing is left


@pytest.mark.parametrize("steps", [4, 8], ids=["within an epoch", "at its end"])
def test_nothing_left_is_one_end_and_no_step(tmp_path, caplog, steps):
    """`Trainer` would take one more step within an epoch, which has 8 here; the end of the run is made up for."""
    ended = []

    class End(Interrupt):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.global_step)

    checkpoint = begun(tmp_path, steps=steps, max_steps=steps)
    trainer = build(tmp_path, model=tiny_model(seed=5), max_steps=steps, learning_rate=PEAK)
    trainer.add_callback(End(-1))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == steps and ended == [steps] and trainer.state.num_train_epochs == 1
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, steps + 1))
    saved = build(tmp_path / "saved", max_steps=steps, learning_rate=PEAK)
    saved.train()
    assert all(
        torch.equal(weight, saved.model.state_dict()[name]) for name, weight in trainer.model.state_dict().items()
    )
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_a_checkpoint_behind_the_end_is_refused(tmp_path):
    """By epochs, whose steps are known when the data are: 8 of them, and half as many in half an epoch."""
    checkpoint = begun(tmp_path, steps=5, max_steps=8)
    with pytest.raises(ValueError, match=r"checkpoint-5 is of step 5, and training\.num_train_epochs is 0\.5: nothing"):
        gone_on(checkpoint, max_steps=-1, num_train_epochs=0.5)
    assert gone_on(checkpoint, max_steps=-1, num_train_epochs=0.75).state.global_step == 6

"""The exponential moving average of the weights."""

import pytest
import torch
from safetensors.torch import load_file

from tests.test_trainer import Interrupt, build, losses
from tests.test_trainer_parameter_groups import weights_of
from tests.tiny import tiny_model
from trainers import find_resume_point
from trainers.resuming import ResumeError


class Recorder:
    """The weights after each update."""

    def __init__(self, trainer):
        self.weights = [weights_of(trainer.model)]
        step = trainer.create_optimizer().step

        def record(*args, **kwargs):
            result = step(*args, **kwargs)
            self.weights.append(weights_of(trainer.model))
            return result

        trainer.optimizer.step = record


def test_a_run_leaves_the_average_behind(tmp_path):
    """By its definition, from the weights after each update; losses are those of a run without it."""
    trainer = build(tmp_path / "average", max_steps=6, ema_decay=0.3)
    recorder = Recorder(trainer)
    trainer.train()
    expected = recorder.weights[0]
    for number, weights in enumerate(recorder.weights[1:], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
    for name, weight in weights_of(trainer.model).items():
        torch.testing.assert_close(weight, expected[name])
    plain = build(tmp_path / "plain", max_steps=6)
    plain.train()
    assert losses(plain) == losses(trainer)


def test_resumed_equals_uninterrupted_with_an_average(tmp_path):
    options = {"max_steps": 6, "ema_decay": 0.9}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    first = build(tmp_path / "parts", **options)
    first.add_callback(Interrupt(3))
    first.train()
    second = build(tmp_path / "parts", model=tiny_model(seed=5), resume_from_checkpoint="true", **options)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    for name, weight in weights_of(second.model).items():
        assert torch.equal(weight, weights_of(whole.model)[name]), name
    (tmp_path / "parts/checkpoint-3/average.safetensors").unlink()
    third = build(tmp_path / "parts", **options)
    with pytest.raises(ResumeError, match=r"checkpoint-3 has no average\.safetensors"):
        third.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-3"))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_named(tmp_path, decay):
    with pytest.raises(ValueError, match=f"ema_decay is {decay}"):
        build(tmp_path, ema_decay=decay)


def test_what_was_evaluated_best_is_what_the_run_leaves_behind(tmp_path):
    """The metrics of each evaluation are those of the average in its checkpoint, and the best of them is left; the run
    itself goes on with the weights as they were.
    """
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"ema_decay": 0.5, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = build(tmp_path / "best", learning_rate=0.3, **options)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(range(6), key=evaluated.__getitem__)
    assert len(set(evaluated)) == 6 and best != 5
    for step, loss in enumerate(evaluated, start=1):
        average = load_file(tmp_path / f"best/checkpoint-{step}/average.safetensors")
        other = build(tmp_path / "other")
        other.model.load_state_dict(average | {"lm_head.weight": average["model.embed_tokens.weight"]})
        assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    average = load_file(tmp_path / f"best/checkpoint-{best + 1}/average.safetensors")
    for name, weight in weights_of(trainer.model).items():
        assert torch.equal(weight, average[name]), name
    plain = build(tmp_path / "plain", learning_rate=0.3)
    plain.args.max_steps = 6
    plain.train()
    assert losses(plain) == losses(trainer)

"""Steps that are not finite or whose loss leaps: saved so that they can be repeated, then skipped, gone back on, or the
end of the run.
"""

import copy
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from callbacks import CallbacksConfig, NonFiniteConfig, repeat_loss
from callbacks.non_finite import check_non_finite, median_and_deviation
from tests.test_callbacks import build_trainer
from tests.tiny import tiny_model

LEAPS = (20, 27)
"""Steps with batches of tokens that no other batch has."""


def data(leaps=LEAPS, steps=30):
    """Two rows for each step, all alike but for those of the leaps."""
    draws = torch.Generator().manual_seed(0)
    usual = torch.arange(3, 13)
    pairs = (torch.randint(20, 300, (2, 10), generator=draws) if step in leaps else usual.expand(2, -1)
             for step in range(1, steps + 1))  # fmt: skip
    return [{"input_ids": row.clone(), "labels": row.clone()} for pair in pairs for row in pair]


class Weights(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = {name: it.detach().clone() for name, it in model.named_parameters()}


def build(folder, leaps=LEAPS, **options):
    """A run of 30 steps that looks at each; and its weights, step by step."""
    config = {"action": "skip", "spike_deviations": 3.0, **options.pop("config", {})}
    settings = {
        "max_steps": 30,
        "logging_steps": 1,
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        "save_steps": 5,
    }
    trainer = build_trainer(
        folder,
        model=tiny_model(vocab_size=320, hidden_dropout=0.1),
        callbacks=CallbacksConfig(non_finite=NonFiniteConfig(**config)),
        data=data(leaps),
        **{**settings, "save_strategy": "steps", **options},
    )
    weights = Weights()
    trainer.add_callback(weights)
    return trainer, weights.after


def are_equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_leap_is_skipped_and_its_batch_repeats_its_loss(tmp_path, caplog):
    """To the last bit, dropout and all, on a model that had other weights."""
    trainer, after = build(tmp_path)
    with caplog.at_level(logging.WARNING, logger="callbacks.non_finite"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("The loss of step 20 is ")
    assert "standard deviations above the median" in said[0] and "its update is skipped" in said[0]
    assert (
        are_equal(after[19], after[20]) and not are_equal(after[18], after[19]) and not are_equal(after[20], after[21])
    )
    path = tmp_path / "non_finite" / "step-20-rank-0.pt"
    saved = torch.load(path, weights_only=True)
    assert [saved["step"], saved["seed"]] == [20, 42]
    assert torch.equal(saved["inputs"]["input_ids"], torch.stack([row["input_ids"] for row in data()[38:40]]))
    logged = next(entry["loss"] for entry in trainer.state.log_history if entry["step"] == 20)
    other = tiny_model(seed=1, vocab_size=320, hidden_dropout=0.1)
    drawn = torch.get_rng_state()
    assert repeat_loss(other, path).item() == saved["loss"].item() == pytest.approx(logged, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_run_goes_back_and_on_behind_the_leap(tmp_path, caplog):
    """The weights are those of the newest checkpoint; the step, and with it data and rates, go on."""
    trainer, after = build(tmp_path, config={"action": "roll_back"})
    with caplog.at_level(logging.WARNING, logger="callbacks.non_finite"):
        trainer.train()
    assert "the run goes on with checkpoint-15 and the data behind this step" in caplog.text
    assert are_equal(after[20], after[15]) and are_equal(after[27], after[25]) and not are_equal(after[21], after[20])
    saved = load_file(tmp_path / "checkpoint-20" / "model.safetensors")
    assert are_equal(saved, after[20])
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * (31 - step) / 30 for step in range(1, 31)])
    assert trainer.state.global_step == 30


def test_a_run_that_has_gone_back_resumes_as_if_it_had_not_ended(tmp_path):
    """What is expected of losses, and how often the run has gone back, is in each checkpoint."""
    whole, after = build(tmp_path / "whole", config={"action": "roll_back"})
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-25", tmp_path / "again" / "checkpoint-25")
    again, resumed = build(tmp_path / "again", config={"action": "roll_back"})
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-25"))
    assert min(resumed) == 26 and are_equal(resumed[27], after[25])
    assert are_equal(resumed[30], after[30])


def test_a_run_goes_back_no_more_often_than_it_may(tmp_path):
    trainer, after = build(tmp_path, config={"action": "roll_back", "max_rollbacks": 1})
    message = r"The loss of step 27 is .*, and the run has gone back 1 times \(callbacks\.non_finite\.max_rollbacks\)"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert max(after) == 26


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_a_leap_stops_the_run_or_is_only_saved(tmp_path, caplog, action):
    trainer, after = build(tmp_path, config={"action": action}, save_strategy="no")
    if action == "stop":
        with pytest.raises(FloatingPointError, match=r"The loss of step 20 is .* skip or roll_back goes on"):
            trainer.train()
        assert max(after) == 19
    else:
        trainer.train()
        assert not are_equal(after[19], after[20]) and "the run goes on" in caplog.text
    assert (tmp_path / "non_finite" / "step-20-rank-0.pt").exists()


def test_before_the_first_checkpoint_a_step_is_skipped(tmp_path, caplog):
    trainer, after = build(tmp_path, leaps=(), config={"action": "roll_back"}, max_steps=4)
    state = trainer.state
    weight = trainer.model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * math.inf if trainer.state.global_step == 2 else gradient)
    trainer.train()
    assert state is not trainer.state  # a fresh one, which the hook reads
    assert "The gradient of step 3 is not finite: its update is skipped, as there is no checkpoint yet" in caplog.text
    assert are_equal(after[2], after[3]) and not are_equal(after[3], after[4])


def test_what_falls_or_differs_as_ever_is_no_leap(tmp_path, caplog):
    trainer, _ = build(tmp_path, leaps=())
    trainer.train()
    assert not caplog.records and not (tmp_path / "non_finite").exists()


def test_a_deviation_that_single_values_do_not_move():
    """Of normal values it is their standard deviation; a value far off changes nothing; and it is never too small."""
    values = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).double() * 3 + 50
    median, deviation = median_and_deviation(values.tolist())
    assert median == pytest.approx(50, abs=0.1) and deviation == pytest.approx(3, rel=0.03)
    assert median_and_deviation([1.0, 2.0, 3.0, 4.0, 1e9]) == (3.0, pytest.approx(1.4826))
    assert median_and_deviation([2.0] * 20) == (2.0, pytest.approx(0.02))


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (
            {"action": "skip"},
            {"deepspeed": "zero2.json"},
            "action is 'skip', but with training.deepspeed the gradients",
        ),
        ({"action": "roll_back"}, {"deepspeed": "zero2.json"}, "action is 'roll_back', but with training.deepspeed"),
        (
            {"spike_deviations": 9.0},
            {"deepspeed": "zero2.json"},
            "spike_deviations is 9.0, but with training.deepspeed",
        ),
        ({"action": "roll_back"}, {"fsdp": ["full_shard"]}, "with training.fsdp the weights are divided among ranks"),
        (
            {"action": "roll_back"},
            {"save_strategy": "no"},
            "training.save_strategy is 'no', and there is nothing to go",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(config, arguments, message):
    args = {"deepspeed": None, "fsdp": [], "save_strategy": "steps", "logging_nan_inf_filter": False, **arguments}
    with pytest.raises(ValueError, match=message):
        check_non_finite(NonFiniteConfig(**config), SimpleNamespace(**args))
    check_non_finite(NonFiniteConfig(), SimpleNamespace(**args))


def poisoned(folder, config, **options):
    """A run of 8 steps with a loss of step 3 that is not a number, but finite gradients: where the loss alone is added
    to.
    """
    config = CallbacksConfig(non_finite=NonFiniteConfig(**config))
    trainer = build_trainer(folder, callbacks=config, max_steps=8, logging_steps=1, report_to="none", **options)

    def poison(model, args, output):
        if model.training and trainer.state.global_step == 2:
            output.loss = output.loss + torch.full((), math.nan)

    trainer.model.register_forward_hook(poison)
    return trainer


@pytest.mark.parametrize(("action", "num_not_finite"), [("skip", 0), ("warn", 1)])
def test_a_loss_that_is_not_finite_is_in_one_log_at_most(tmp_path, caplog, action, num_not_finite):
    """Though its gradient is finite; and one step is left out, or one batch saved."""
    trainer = poisoned(tmp_path, {"action": action})
    with caplog.at_level(logging.WARNING, logger="callbacks.non_finite"):
        trainer.train()
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert [step for step, loss in logged.items() if not math.isfinite(loss)] == [3] * num_not_finite
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    saved = sorted(path.name for path in (tmp_path / "non_finite").glob("*rank*"))
    assert len(caplog.records) == 1 and saved == ["step-3-rank-0.pt"]


def test_what_is_expected_goes_back_with_the_weights(tmp_path):
    """Else the steps behind it would be leaps as well, where the loss has fallen by far since the checkpoint."""
    trainer, _ = build(tmp_path, leaps=(20,), config={"action": "roll_back"})
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected = trainer.state.stateful_callbacks["non_finite"]["losses"]
    assert expected == pytest.approx(logged[:15] + logged[20:], abs=1e-4)


def test_losses_that_are_watched_are_those_that_are_logged(tmp_path):
    trainer, _ = build(tmp_path, leaps=(), config={"spike_deviations": 1e6}, gradient_accumulation_steps=1)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.stateful_callbacks["non_finite"]["losses"] == pytest.approx(logged, abs=1e-4)


def test_a_batch_of_a_half_precise_run_repeats_its_loss(tmp_path):
    trainer = poisoned(tmp_path, {"action": "skip"}, bf16=True)
    other, kept = copy.deepcopy(trainer.model), {}

    def keep(model, args, output):
        if model.training and trainer.state.global_step == 2:
            kept["loss"] = output.loss.clone()

    trainer.model.register_forward_hook(keep, prepend=True)
    trainer.train()
    assert repeat_loss(other, tmp_path / "non_finite" / "step-3-rank-0.pt").item() == kept["loss"].item()

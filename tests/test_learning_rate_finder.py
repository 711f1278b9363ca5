"""`pretrain.py --find-lr`: rates of each step, where it ends, what it suggests of known curves, and its files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import TrainerCallback

import pretrain
from configs.tools import check_schedule, rates_of
from tests.test_pretrain import write_config
from tests.test_trainer import build
from trainers import ParameterGroup
from trainers.learning_rate_finder import (
    LEAST_FACTOR,
    LEAST_STEPS,
    MOST_FACTOR,
    NUM_STEPS,
    WINDOW,
    NothingFoundError,
    RangeTest,
    RangeTestCallback,
)

EXPONENTS = np.linspace(-3, 2, NUM_STEPS)


def measured(losses, rate=1e-2):
    """A test at a rate, with losses that are a function of the exponent of its factor."""
    found = [float(losses(exponent)) for exponent in EXPONENTS]
    return RangeTest(list(10.0**EXPONENTS), found, {"learning_rate": rate, "muon_learning_rate": 4 * rate})


@pytest.mark.parametrize("centre", [-1.5, -1.0, 0.0])
def test_the_steepest_descent_of_a_known_curve(centre):
    """A logistic fall whose steepest place is its centre, and a wall at ten times the rate of the run."""

    def losses(exponent):
        return 6 - 4 / (1 + np.exp(-4 * (exponent - centre))) + np.exp(8 * (exponent - 1))

    found = measured(losses).as_dict()
    assert np.log10(found["suggested"]["learning_rate"] / 1e-2) == pytest.approx(centre, abs=0.06)
    assert found["suggested"]["muon_learning_rate"] == pytest.approx(4 * found["suggested"]["learning_rate"])
    fine = np.linspace(-3, 2, 100_001)
    best = 1e-2 * 10 ** fine[losses(fine).argmin()]
    assert found["tenth_of_best"]["learning_rate"] == pytest.approx(best / 10, rel=0.2)


def test_noise_moves_the_suggestion_little():
    noise = np.random.default_rng(0).normal(scale=0.1, size=NUM_STEPS)
    found = RangeTest(
        list(10.0**EXPONENTS), (6 - 4 / (1 + np.exp(-3 * EXPONENTS)) + noise).tolist(), {"learning_rate": 1.0}
    )
    assert abs(np.log10(found.as_dict()["suggested"]["learning_rate"])) < 0.35
    for step, mean in enumerate(found.smoothed):
        reach = min(step, NUM_STEPS - 1 - step, WINDOW // 2)
        assert mean == pytest.approx(np.mean(found.losses[step - reach : step + reach + 1]))


def test_single_noisy_losses_are_not_taken_for_a_descent():
    """Of 200 noises none moves the suggestion out of the fall, where slopes of few losses are steeper than it."""
    fall, noise = 6 - 3 / (1 + np.exp(-6 * EXPONENTS)), np.random.default_rng(0)
    for _ in range(200):
        losses = (fall + noise.normal(scale=0.2, size=NUM_STEPS)).tolist()
        assert abs(EXPONENTS[RangeTest(list(10.0**EXPONENTS), losses, {"learning_rate": 1.0}).steepest_step]) < 0.7


@pytest.mark.parametrize("count", [LEAST_STEPS, LEAST_STEPS + 1])
def test_the_least_number_of_losses_has_a_slope(count):
    """That of the step in the middle, of which alone it is known."""
    found = RangeTest(list(np.geomspace(1e-3, 1, count)), np.linspace(2, 1, count).tolist(), {"learning_rate": 1.0})
    assert found.steepest_step in range(WINDOW // 2 + 1, count - WINDOW // 2 - 1)


def test_a_loss_that_never_falls_suggests_nothing():
    with pytest.raises(
        NothingFoundError, match=r"none of the learning rates from 1e-05 to 1; give another training\.lea"
    ):
        measured(lambda exponent: 5 + np.exp(exponent)).summary()


class Probe(TrainerCallback):
    """The rates of all groups when the optimizer makes its step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_each_step_has_the_rates_of_the_run_times_its_factor(tmp_path):
    """Those of Muon and of groups too; what is frozen at the beginning stays so."""
    trainer = build(
        tmp_path,
        max_steps=6,
        learning_rate=1e-4,
        muon_learning_rate=1e-3,
        lr_scheduler_type="constant",
        parameter_groups=[ParameterGroup("*.coda.*", lr_factor=0.5), ParameterGroup("*.prelude.*", freeze_steps=3)],
    )
    given = [group["lr"] for group in trainer.optimizer.param_groups]
    frozen = [group.get("freeze_steps", 0) for group in trainer.optimizer.param_groups]
    callback, probe = RangeTestCallback(), Probe()
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.add_callback(probe)
    trainer.train()
    factors = np.geomspace(LEAST_FACTOR, MOST_FACTOR, 6)[: len(probe.rates)]
    assert len(set(given)) == 4 and 3 in frozen and len(factors) > 3
    for step, (factor, rates) in enumerate(zip(factors, probe.rates, strict=True)):
        expected = [0 if step < steps else rate * factor for rate, steps in zip(given, frozen, strict=True)]
        assert rates == pytest.approx(expected)
    found = callback.factors
    assert found == pytest.approx(factors)
    assert rates_of(trainer) == {"learning_rate": 1e-4, "muon_learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("losses", "kept", "stops"), [([4, 3, float("nan")], 2, 3), ([4, 2, 2, 9], 4, 4), ([4, 3, 4], 3, 0)]
)
def test_it_ends_where_the_loss_diverges(losses, kept, stops):
    """The mean of the last five, against one and a half times its least value; NaN is left out."""
    callback, control, stopped = RangeTestCallback(), SimpleNamespace(should_training_stop=False), 0
    for step, loss in enumerate(losses, start=1):
        callback.on_log(None, None, control, {"loss": loss})
        stopped = stopped or (step if control.should_training_stop else 0)
    callback.on_log(None, None, control, {"train_runtime": 3.0})
    assert (len(callback.losses), stopped) == (kept, stops)
    with pytest.raises(NothingFoundError, match=f"only {kept} steps have a finite loss, where {LEAST_STEPS} are"):
        callback.result({"learning_rate": 1.0})


def test_the_command_writes_a_plot_and_a_table_and_nothing_else(tmp_path, capsys):
    """No checkpoint, no weights, no config.yaml."""
    out = tmp_path / "out"
    training = {"output_dir": str(out), "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
    model = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = write_config(tmp_path, training=training, model=model, data={"block_size": 16})
    assert pretrain.main(["--config", str(config), "--find-lr"]) == 0
    assert sorted(path.name for path in out.rglob("*")) == ["learning_rates.json", "learning_rates.png"]
    found = json.loads((out / "learning_rates.json").read_text())
    rates = found["learning_rate"]
    assert rates == pytest.approx(np.geomspace(0.3 * LEAST_FACTOR, 0.3 * MOST_FACTOR, NUM_STEPS)[: len(rates)])
    assert len(rates) == len(found["loss"]) == len(found["smoothed_loss"]) > 50
    suggested = found["suggested"]["learning_rate"]
    assert rates[0] < suggested < rates[-1]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"learning_rate {suggested:.2g} (steepest descent; a tenth of the best is ")
    assert last.endswith(str(out / "learning_rates.png"))
    with Image.open(out / "learning_rates.png") as image:
        assert image.size == (700, 400) and len(np.unique(image)) > 10


def test_a_schedule_of_deepspeed_is_in_the_way():
    settings = SimpleNamespace(config={"scheduler": {"type": "WarmupLR"}})
    training = SimpleNamespace(deepspeed="file.json", hf_deepspeed_config=settings)
    with pytest.raises(
        ValueError, match=r"^--find-lr needs the learning rates to itself, but the file of training\.dee"
    ):
        check_schedule(SimpleNamespace(mode="find_lr", training=training))
    check_schedule(SimpleNamespace(mode="profile", training=training))

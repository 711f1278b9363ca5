"""Grokfast's filters: what they add to gradients, and that a run goes on with them."""

import pytest
import torch
from torch import nn

from configs import load_config
from tests.test_trainer import Interrupt, build, losses
from tests.test_trainer_parameter_groups import train, weights_of
from tests.tiny import tiny_model
from trainers import find_resume_point
from trainers.gradient_filters import GradientFilter, GradientFilterOptions
from trainers.resuming import ResumeError

EMA = {"name": "ema", "decay": 0.8, "factor": 3.0}
MA = {"name": "ma", "window": 4, "factor": 3.0}


def averages(options, gradients):
    """What the paper adds, before the factor, at each update."""
    if options["name"] == "ma":
        means = [sum(gradients[max(0, end - 4) : end]) / 4 for end in range(1, len(gradients) + 1)]
        return [mean * (end >= 4) for end, mean in enumerate(means, start=1)]
    found = [gradients[0]]
    for gradient in gradients[1:]:
        found.append(0.8 * found[-1] + 0.2 * gradient)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [EMA, MA])
def test_what_is_added(options, dtype):
    """To what the optimizer gets, and to nothing else; averages are float32. A weight without gradient has no part."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 3, generator=generator).to(dtype).float() for _ in range(11)]
    model = nn.ModuleList([nn.Linear(3, 5, bias=False, dtype=dtype), nn.Linear(3, 5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradient_filter = GradientFilter(GradientFilterOptions(**options), model)
    gradient_filter.attach(optimizer)
    for gradient, average in zip(gradients, averages(options, gradients), strict=True):
        model[0].weight.grad = gradient.to(dtype, copy=True)
        optimizer.step()
        near = {"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(model[0].weight.grad, (gradient + 3 * average).to(dtype), **near)
    state = gradient_filter.averages["0.weight"].state
    assert {it.dtype for it in state.values() if it.is_floating_point()} == {torch.float32}
    assert not gradient_filter.averages["1.weight"].state


@pytest.mark.parametrize("options", [EMA, MA])
def test_a_checkpoint_is_bounded(tmp_path, options):
    """Its file is as long after 9 updates as after 4: one number for each weight, or window + 1."""
    sizes = []
    for steps in (4, 9):
        settings = {"gradient_filter": GradientFilterOptions(**options), "max_steps": steps}
        trainer, _ = train(tmp_path / str(steps), save_strategy="steps", save_steps=steps, **settings)
        sizes.append((tmp_path / f"{steps}/checkpoint-{steps}/gradient_filter.safetensors").stat().st_size)
    numbers = sum(weight.numel() for weight in trainer.model.parameters())
    assert sizes[0] == sizes[1]
    assert sizes[0] == pytest.approx(4 * numbers * (1 if options["name"] == "ema" else 5), rel=0.1)


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch"}, {"optimizer": "adamuon", "muon_learning_rate": 5e-3}])
@pytest.mark.parametrize("options", [EMA, MA])
def test_resumed_equals_uninterrupted(tmp_path, options, optimizer):
    """Invariant 6; the same run without a filter is another one."""
    settings = {"max_steps": 9, "gradient_filter": GradientFilterOptions(**options), **optimizer}
    whole, _ = train(tmp_path / "whole", **settings)
    first = build(tmp_path / "cut", **settings)
    first.add_callback(Interrupt(5))
    first.train()
    second = build(tmp_path / "cut", model=tiny_model(seed=5), resume_from_checkpoint="true", **settings)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(whole)
    for name, weight in weights_of(second.model).items():
        assert torch.equal(weight, weights_of(whole.model)[name]), name
    plain, _ = train(tmp_path / "plain", **{**settings, "gradient_filter": GradientFilterOptions()})
    assert losses(plain)[0] == losses(whole)[0] and losses(plain)[-1] != losses(whole)[-1]
    (tmp_path / "cut/checkpoint-5/gradient_filter.safetensors").unlink()
    third = build(tmp_path / "cut", **settings)
    with pytest.raises(ResumeError, match=r"checkpoint-5 has no gradient_filter\.safetensors; set it to null"):
        third.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-5"))


@pytest.mark.parametrize(("width", "others"), [(5, EMA), (5, {**MA, "window": 3}), (5, {**MA, "window": 8}), (6, MA)])
def test_averages_of_another_filter_or_of_other_weights_are_refused(tmp_path, width, others):
    """A window that is shorter would be filled wrongly. A weight that has had no gradient yet is in no file."""
    filters = []
    for size, options in ((5, MA), (5, MA), (width, others)):
        model = nn.ModuleList([nn.Linear(3, size, bias=False), nn.Linear(3, 5)])
        filters.append(GradientFilter(GradientFilterOptions(**options), model))
    first, same, other = filters
    first.parameters["0.weight"].grad = torch.ones(5, 3)
    first.apply()
    first.save(str(tmp_path))
    same.load(str(tmp_path))
    assert {name: it.tolist() for name, it in same.states().items()} == {
        name: it.tolist() for name, it in first.states().items()
    }
    with pytest.raises(ValueError, match=r"gradient_filter: .*/0\.weight of .*; give the options of that run"):
        other.load(str(tmp_path))
    assert not other.states()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "median"}, "gradient_filter.name is 'median'; give one of ema, ma"),
        ({"name": "ema", "factor": -1.0}, "gradient_filter.factor is -1.0; give a finite number, at least 0"),
        ({"name": "ema", "decay": 1.0}, "gradient_filter.decay is 1.0; give a number from 0 to below 1"),
        ({"name": "ma", "window": 0}, "gradient_filter.window is 0; give at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GradientFilterOptions(**options)


def test_it_stands_in_the_yaml(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{output_dir: {tmp_path}, gradient_filter: {{name: ma, window: 7}}}}\n")
    assert load_config(["--config", str(path)]).training.gradient_filter == GradientFilterOptions("ma", window=7)
    with pytest.raises(SystemExit) as stop:
        load_config(["--config", str(path), "--training.gradient_filter.window", "0"])
    assert stop.value.code == 2 and "gradient_filter.window is 0; give at least 1" in capsys.readouterr().err

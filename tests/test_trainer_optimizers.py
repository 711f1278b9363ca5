"""Muon for the matrices inside the layers, and optimizers of one's own."""

import copy
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from tests.test_trainer import Interrupt, build, losses
from tests.test_trainer_parameter_groups import train, weights_of
from tests.tiny import tiny_model
from trainers import ParameterGroup, find_resume_point
from trainers.base import BaseTrainer
from trainers.optimizers import OPTIMIZERS, CombinedOptimizer, combine, matrices_of


def names_of_matrices(model):
    """By their names, which is another way than by the modules."""
    outside = ("embed", "lm_head", "norm")
    return [
        name
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and not any(part in name for part in outside)
    ]


def test_both_do_what_they_do_alone():
    """Five steps on copies of a model: torch's Muon on the matrices and AdamW on the rest, each by itself."""
    together, apart = tiny_model(seed=0), tiny_model(seed=0)
    names = names_of_matrices(together)
    chosen = dict(together.named_parameters())
    assert {id(weight) for weight in matrices_of(together)} == {id(chosen[name]) for name in names} and names
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    both = combine(
        torch.optim.AdamW(together.parameters(), **settings),
        matrices_of(together),
        lambda own: torch.optim.Muon(own, lr=1e-2, adjust_lr_fn="match_rms_adamw"),
    )
    alone = dict(apart.named_parameters())
    rest = torch.optim.AdamW([weight for name, weight in alone.items() if name not in names], **settings)
    muon = torch.optim.Muon([alone[name] for name in names], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for a, b in zip(together.parameters(), apart.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if step == 3:  # as a checkpoint would bring it back
            both.load_state_dict(copy.deepcopy(both.state_dict()))
        both.step()
        rest.step()
        muon.step()
    for name, weight in together.named_parameters():
        assert torch.equal(weight, alone[name]), name


def test_an_update_is_a_rotation_of_the_size_of_adams(tmp_path):
    """The singular values of what a step adds are alike, about 0.2 * sqrt(greater side) * rate; those of SGD not."""
    options = {"max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    trainer, before = train(tmp_path, muon_learning_rate=0.01, **options)
    names = names_of_matrices(trainer.model)
    moved = {name: weight - before[name] for name, weight in weights_of(trainer.model).items()}
    assert all(bool(moved[name].any()) == (name in names) for name in moved)
    for name in names:
        values = torch.linalg.svdvals(moved[name]) / (0.2 * max(moved[name].shape) ** 0.5 * 0.01)
        assert 0.5 < values.median() < 1.3, name
        assert values.max() < 1.3, name


def test_resumed_equals_uninterrupted_with_muon(tmp_path):
    """Invariant 6, with a group that has a rate of its own."""
    options = {
        "max_steps": 6,
        "muon_learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "parameter_groups": [ParameterGroup("model.core.*", lr_factor=0.5, freeze_steps=2)],
    }
    whole, _ = train(tmp_path / "whole", **options)
    rates = {options["lr"] for options in whole.optimizer.param_groups}
    assert len(whole.lr_scheduler.base_lrs) == len(whole.optimizer.param_groups) and rates == {0.0}
    first = build(tmp_path / "cut", **options)
    assert 2.5e-3 in {group["lr"] for group in first.optimizer.param_groups}
    first.add_callback(Interrupt(3))
    first.train()
    second = build(tmp_path / "cut", model=tiny_model(seed=5), resume_from_checkpoint="true", **options)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(whole)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon_learning_rate": -1.0}, "muon_learning_rate is -1.0; give at least 0"),
        ({"muon_learning_rate": 0.01, "optim": "adafactor"}, "training.optim makes a Adafactor, but beside muon"),
    ],
)
def test_what_muon_cannot_do_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# One's own


@pytest.fixture
def own(monkeypatch):
    """A function that names another one, which is put into a module that can be imported."""
    module = types.ModuleType("optimizers_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def name(function):
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
        return f"{module.__name__}:{function.__name__}"

    return name


def sgd(groups, args, model):
    assert len(groups) == 2 and isinstance(model, PreTrainedModel)
    return torch.optim.SGD(groups, lr=args.learning_rate)


def test_an_optimizer_of_ones_own_trains_and_goes_on(tmp_path, own):
    """As that of torch does by `optim`; also with groups, and from a checkpoint."""
    groups = [ParameterGroup("model.core.*", lr_factor=0.5)]
    options = {"max_steps": 6, "learning_rate": 0.1, "parameter_groups": groups}
    theirs, _ = train(tmp_path / "theirs", optim="sgd", **options)
    ours, _ = train(tmp_path / "ours", optimizer=own(sgd), **options)
    assert type(ours.optimizer.optimizer) is torch.optim.SGD and losses(ours) == losses(theirs)
    first = build(tmp_path / "cut", optimizer=own(sgd), **options)
    first.add_callback(Interrupt(3))
    first.train()
    options |= {"model": tiny_model(seed=5), "resume_from_checkpoint": "true"}
    second = build(tmp_path / "cut", optimizer=own(sgd), **options)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(ours)


def test_an_optimizer_that_is_registered_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "plain", sgd)
    assert type(build(tmp_path, optimizer="plain").optimizer) is torch.optim.SGD
    named, chosen = (train(tmp_path, muon_learning_rate=0.01, optimizer=name)[0] for name in ("muon", None))
    assert losses(named) == losses(chosen) and isinstance(named.optimizer.optimizer, CombinedOptimizer)


def raises(groups, args, model):
    raise KeyError("rate")


def nothing(groups, args, model):
    return None


@pytest.mark.parametrize(
    ("optimizer", "others", "message"),
    [
        (
            "lion",
            {},
            "optimizer is 'lion'; give one of muon, adamuon, schedule_free, soap, or module:function",
        ),
        ("muon", {}, "optimizer is 'muon', but muon_learning_rate is null"),
        (sgd, {"muon_learning_rate": 0.1}, "muon_learning_rate is 0.1, but optimizer is 'optimizers_of_a_test:sgd'"),
        (":build", {}, "optimizer ':build' names no function; write module:function"),
        ("no_such:build", {}, "optimizer 'no_such:build': no_such cannot be imported .ModuleNotFoundError"),
        ("trainers.optimizers:no", {}, "trainers.optimizers has no function 'no', only .*build_muon"),
        (raises, {}, "optimizer 'optimizers_of_a_test:raises' raised KeyError: 'rate'"),
        (nothing, {}, "optimizer 'optimizers_of_a_test:nothing' returned None; it must return a torch.optim.Optimizer"),
    ],
)
def test_optimizers_that_cannot_be_are_named(tmp_path, own, optimizer, others, message):
    name = optimizer if isinstance(optimizer, str) else own(optimizer)
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", optimizer=name, **others)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["optimizer", "parameter_groups", "muon_learning_rate"])
def test_an_optimizer_of_deepspeeds_file_is_not_given_twice(option):
    found = SimpleNamespace(config={"optimizer": {"type": "AdamW"}})
    args = SimpleNamespace(
        optimizer=None, parameter_groups=[], muon_learning_rate=None, max_steps=-1, deepspeed="z.json"
    )
    args.hf_deepspeed_config = found
    trainer = SimpleNamespace(args=args, is_deepspeed_enabled=True)
    BaseTrainer._check_deepspeed_settings(trainer)
    setattr(args, option, "mine:build")
    with pytest.raises(ValueError, match=f"training.{option} has no effect on the optimizer .* out of z.json"):
        BaseTrainer._check_deepspeed_settings(trainer)

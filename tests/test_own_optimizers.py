"""AdaMuon, schedule-free AdamW and SOAP against their papers, with weights of 16 bits, and through the trainer."""

import copy
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from tests.test_trainer import Interrupt, build, losses
from tests.test_trainer_parameter_groups import train, weights_of
from tests.tiny import tiny_model
from trainers import ParameterGroup, find_resume_point
from trainers.gradient_filters import GradientFilterOptions
from trainers.muon import AdaMuon, Muon, orthogonalize
from trainers.optimizers import OPTIMIZERS, CombinedOptimizer, bytes_of_optim, bytes_of_states
from trainers.schedule_free import ScheduleFreeAdamW

OPTIONS = {
    "muon": {"muon_learning_rate": 5e-3},
    "adamuon": {"muon_learning_rate": 5e-3},
    "schedule_free": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "soap": {"adam_beta1": 0.95, "adam_beta2": 0.95, "learning_rate": 3e-3},
}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name == "soap" else []) for name in OPTIONS]


def test_all_names_are_tried():
    assert set(OPTIONS) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("option", "others"),
    [
        *[pytest.param({"optimizer": it.values[0]}, OPTIONS[it.values[0]], marks=it.marks) for it in NAMES],
        ({"optim": "adamw_torch"}, {}),
        ({"optim": "sgd"}, {"ema_decay": 0.9}),
        ({"optim": "adamw_torch"}, {"gradient_filter": GradientFilterOptions("ma", window=3)}),
        ({"optim": "rmsprop"}, {"gradient_filter": GradientFilterOptions("ema")}),
    ],
)
def test_bytes_of_states_are_those_that_are_there(tmp_path, option, others):
    """After a training of four updates; counts of steps are not counted."""
    trainer, _ = train(tmp_path, **option, **others, max_steps=4)
    found = [it for state in trainer.optimizer.optimizer.state.values() for it in tensors_in(state)]
    found += [] if trainer.gradient_filter is None else trainer.gradient_filter.states().values()
    found += [] if trainer.average is None else trainer.average.average.values()
    there = sum(it.nbytes for it in found if it.ndim)
    assert bytes_of_states(trainer.args, trainer.model) == there


def test_eight_bits_are_a_byte_for_each_moment():
    assert [bytes_of_optim(name) for name in ("adamw_bnb_8bit", "lion_8bit", "adamw_torch_fused")] == [2, 1, 8]


def gradients(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_adamuon_is_the_papers():
    """Algorithm 1 of arXiv 2507.11005, written down again."""
    weight = nn.Parameter(torch.linspace(-1, 1, 48).view(6, 8))
    expected = weight.detach().clone()
    optimizer = AdaMuon([weight], lr=0.02, weight_decay=0.1)
    momentum, second = torch.zeros(6, 8), torch.zeros(6, 8)
    for gradient in gradients(5, 6, 8):
        weight.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + gradient
        orthogonal = torch.sign(momentum) / torch.sign(momentum).norm()
        for _ in range(5):
            square = orthogonal @ orthogonal.T
            orthogonal = 3.4445 * orthogonal + (-4.7750 * square + 2.0315 * square @ square) @ orthogonal
        second = 0.95 * second + 0.05 * orthogonal**2
        direction = orthogonal / (second**0.5 + 1e-8)
        size = 0.2 * 48**0.5 / direction.norm()
        expected = expected - 0.02 * (size * direction + 0.1 * expected)
        torch.testing.assert_close(weight.detach(), expected)
        assert (size * direction).square().mean().sqrt() == pytest.approx(0.2)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (8, 8)])
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(gradients(1, *shape)[0]))
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_iteration_is_a_polynomial_of_singular_values(shape):
    """U S V becomes U p(S) V, with p five times the quintic of Muon."""
    (matrix,) = gradients(1, *shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalize(matrix), ((left * values) @ right).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_muon_is_that_of_torch(shape):
    """Which multiplies in bfloat16; each goes on from the state of the other."""
    ours, theirs = (nn.Parameter(torch.ones(*shape)) for _ in range(2))
    own, reference = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn="match_rms_adamw")
    for step, gradient in enumerate(gradients(8, *shape)):
        if step == 4:
            states = own.state_dict(), reference.state_dict()
            own.load_state_dict(states[1])
            reference.load_state_dict(states[0])
        ours.grad, theirs.grad = gradient, gradient.clone()
        own.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * 0.02 * 0.2 * 8**0.5 * 0.02)  # 2 % of all steps
    assert (ours - 1).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_orthogonal_matrix_is_that_of_muon(shape):
    """Which computes it in bfloat16."""
    (matrix,) = gradients(1, *shape)
    weight = nn.Parameter(torch.zeros(*shape))
    weight.grad = matrix.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    size = max(1, shape[0] / shape[1]) ** 0.5  # by which Muon's step is longer
    torch.testing.assert_close(orthogonalize(matrix) * size, -weight.detach(), rtol=0, atol=0.03)


def test_schedule_free_is_the_papers():
    """Algorithm 1 of arXiv 2405.15682 with AdamW's step, and rates that rise."""
    weight = nn.Parameter(torch.linspace(-1, 1, 12))
    z = x = weight.detach().clone()
    optimizer = ScheduleFreeAdamW([weight], lr=0.0, betas=(0.9, 0.99), weight_decay=0.1)
    moment, total = torch.zeros(12), 0.0
    for step, gradient in enumerate(gradients(6, 12), start=1):
        rate = optimizer.param_groups[0]["lr"] = min(step / 3, 1) * 0.05
        optimizer.train()
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(weight.detach(), y)
        weight.grad = gradient
        optimizer.step()
        moment = 0.99 * moment + 0.01 * gradient**2
        z = z - rate * (gradient / ((moment / (1 - 0.99**step)) ** 0.5 + 1e-8) + 0.1 * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        torch.testing.assert_close(weight.detach(), 0.1 * z + 0.9 * x)
        if step % 2:
            optimizer.eval()
            torch.testing.assert_close(weight.detach(), x)


@pytest.mark.slow
def test_soap_is_the_papers():
    """Algorithm 3 of arXiv 2409.11321, over two renewals of the eigenbases; the first step only measures."""
    from pytorch_optimizer import SOAP

    weight = nn.Parameter(torch.eye(4))
    optimizer = CombinedOptimizer(SOAP([{"params": [weight], "weight_decay": 0.1}], lr=0.01, betas=(0.95, 0.95)))
    first, *others = gradients(25, 4, 4)
    weight.grad = first.clone()
    optimizer.step()
    expected, moment, second = torch.eye(4), torch.zeros(4, 4), torch.zeros(4, 4)
    sides = [0.05 * first @ first.T, 0.05 * first.T @ first]
    left, right = (torch.linalg.eigh(side)[1].flip(1) for side in sides)
    for step, gradient in enumerate(others, start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        moment = 0.95 * moment + 0.05 * gradient
        second = 0.95 * second + 0.05 * (left.T @ gradient @ right) ** 2
        rate = 0.01 * (1 - 0.95**step) ** 0.5 / (1 - 0.95**step)
        expected = expected - rate * left @ (left.T @ moment @ right / (second**0.5 + 1e-8)) @ right.T
        expected = expected * (1 - 0.01 * 0.1)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)
        sides = [0.95 * sides[0] + 0.05 * gradient @ gradient.T, 0.95 * sides[1] + 0.05 * gradient.T @ gradient]
        if step % 10 == 0:
            rows, columns = (
                (basis * (side @ basis)).sum(0).argsort(descending=True)
                for basis, side in zip((left, right), sides, strict=True)
            )
            left = torch.linalg.qr((sides[0] @ left)[:, rows])[0]
            right = torch.linalg.qr((sides[1] @ right)[:, columns])[0]
            second = second[rows][:, columns]


def test_soap_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimizer is 'soap', which the package pytorch-optimizer has; pip install"):
        build(tmp_path / "out", optimizer="soap")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allow_changes", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted(tmp_path, name, allow_changes):
    """Invariant 6, with groups, accumulation, and evaluations of which the cut run has others; changes that are allowed
    and not made change nothing.
    """
    groups = [ParameterGroup("model.core.*", lr_factor=0.5, freeze_steps=2), ParameterGroup("*norm*", learning_rate=0)]
    options = {"max_steps": 14, "optimizer": name, "parameter_groups": groups, "gradient_accumulation_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 4, **OPTIONS[name]}
    whole, before = train(tmp_path / "whole", **options)
    after = weights_of(whole.model)
    assert all(torch.equal(after[name], before[name]) == ("norm" in name and "core" not in name) for name in after)
    first = build(tmp_path / "cut", **options)
    first.add_callback(Interrupt(5))
    first.train()
    options |= {"resume_from_checkpoint": "true", "allow_changes": allow_changes}
    second = build(tmp_path / "cut", model=tiny_model(seed=5), **options)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(whole)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def tensors_in(value):
    """All tensors in nested lists and mappings."""
    if isinstance(value, (dict, list)):
        return [it for part in (value.values() if isinstance(value, dict) else value) for it in tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_16_bits_have_a_float32_state(tmp_path, name):
    """They learn, and a state that is loaded is the same to the bit, so that the next step is."""
    options = {"optimizer": name, "max_steps": 12, **OPTIONS[name]}
    trainer, _ = train(tmp_path, model=tiny_model().bfloat16(), **options)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.bfloat16}
    optimizer = trainer.optimizer.optimizer
    states = [{key: it for key, it in state.items() if key != "remainder"} for state in optimizer.state.values()]
    found = [it for state in states for it in tensors_in(state)]
    assert found and {it.dtype for it in found if it.is_floating_point()} == {torch.float32}
    assert all(it.abs().max() == 0 or not torch.equal(it, it.bfloat16().float()) for it in found if it.numel() > 500)
    other = build(tmp_path, model=copy.deepcopy(trainer.model), **options).optimizer
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for made in (optimizer, other):
        made.train()
        for group in made.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.01)
        made.step()
    for group, same in zip(optimizer.param_groups, other.param_groups, strict=True):
        for a, b in zip(group["params"], same["params"], strict=True):
            assert torch.equal(a, b)


def test_a_float32_update_that_is_cast():
    """bfloat16 weights after a step are those of float32 ones, rounded."""
    start = torch.linspace(-1, 1, 48).view(6, 8).bfloat16()
    weights = [nn.Parameter(start.clone()), nn.Parameter(start.float())]
    for weight in weights:
        weight.grad = gradients(1, 6, 8)[0].bfloat16().to(weight.dtype)
        CombinedOptimizer(AdaMuon([weight], lr=0.1, weight_decay=0.1)).step()
    assert torch.equal(weights[0], weights[1].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_of_less_than_the_last_bit_add_up(dtype):
    """A weight of 16 bits, with what it leaves over, follows one of float32 over updates that rounding would undo."""
    start = torch.linspace(0.5, 1.5, 48).view(6, 8).to(dtype)
    weights = [nn.Parameter(start.clone()), nn.Parameter(start.float())]
    for weight in weights:
        optimizer = CombinedOptimizer(torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0))
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        if weight.dtype == dtype:
            kept = optimizer.state[weight]["remainder"]
            assert kept.dtype == dtype
    assert (weights[1] - start.float()).mean().item() == pytest.approx(-0.01, rel=1e-3)
    most = 100 * torch.finfo(dtype).eps ** 2 / 4  # each update rounds the remainder, of at most half a last bit
    torch.testing.assert_close(weights[0].float() + kept.float(), weights[1].data, rtol=0, atol=most)
    assert not torch.equal(weights[0], start)


def test_adamw_of_16_bits_is_one_of_ours(tmp_path):
    """Torch's own would keep both moments in 16 bits; its checkpoints with such moments load."""
    trainer, _ = train(tmp_path, model=tiny_model().bfloat16(), max_steps=2)
    states = trainer.optimizer.optimizer.state
    assert {it.dtype for state in states.values() for it in (state["exp_avg"], state["exp_avg_sq"])} == {torch.float32}
    saved = trainer.optimizer.optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"].bfloat16()
    for group in saved["param_groups"]:
        del group["is_muon"]
    trainer.optimizer.optimizer.load_state_dict(saved)
    assert {state["exp_avg"].dtype for state in trainer.optimizer.optimizer.state.values()} == {torch.float32}
    assert {state["remainder"].dtype for state in trainer.optimizer.optimizer.state.values()} == {torch.bfloat16}
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in trainer.optimizer.optimizer.param_groups:
        group["lr"] = 0.1  # the schedule has ended at 0
    before = {name: it.clone() for name, it in trainer.model.named_parameters()}
    trainer.optimizer.optimizer.step()
    assert all(not torch.equal(it, before[name]) for name, it in trainer.model.named_parameters())


def test_a_schedule_free_run_evaluates_and_leaves_the_average(tmp_path):
    """Its weights during training are other ones; checkpoints, evaluations and the end have x."""
    options = {"optimizer": "schedule_free", "max_steps": 6, "lr_scheduler_type": "constant"}
    trainer, _ = train(tmp_path, save_strategy="steps", save_steps=4, **options)
    averages = {name: trainer.optimizer.state[weight]["x"] for name, weight in trainer.model.named_parameters()}
    for name, weight in weights_of(trainer.model).items():
        assert torch.equal(weight, averages[name]), name
    state = torch.load(tmp_path / "checkpoint-4/optimizer.pt", weights_only=True)["state"]
    saved = load_file(tmp_path / "checkpoint-4/model.safetensors")
    order = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for index, parameter in enumerate(order):
        assert torch.equal(state[index]["x"], saved[names[parameter]])
    trainer.optimizer.train()
    assert any(not torch.equal(weight, averages[name]) for name, weight in trainer.model.named_parameters())


def test_the_average_is_what_the_watch_over_depth_and_the_end_of_a_run_see(tmp_path):
    """In every step, also behind one without a checkpoint, and the samples that callbacks make at the end. After the
    first step there is but one z to average.
    """
    options = {"optimizer": "schedule_free", "max_steps": 4, "lr_scheduler_type": "constant", "save_steps": 2}
    options |= {"recurrence_logging_steps": 1, "save_strategy": "steps"}
    trainer, seen = build(tmp_path, **options), []

    def note(*arguments):
        states = trainer.optimizer.state
        is_average = [torch.equal(it, states[it]["x"]) for it in trainer.model.parameters() if states.get(it)]
        seen.append((trainer.model.training, all(is_average)))

    class AtEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            note()

    trainer.model.register_forward_pre_hook(note)
    trainer.add_callback(AtEnd())
    trainer.train()
    is_watched = [is_average for is_training, is_average in seen[:-1] if not is_training]
    assert is_watched == [True] * 8 and seen[-1][1]
    assert [is_average for is_training, is_average in seen[:-1] if is_training] == [True, True, False, False]


def test_the_best_checkpoint_of_a_schedule_free_run_stays(tmp_path):
    """What is loaded at the end is not taken back by the average of the last step."""
    options = {"optimizer": "schedule_free", "max_steps": 6, "lr_scheduler_type": "constant", "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    trainer, _ = train(tmp_path, metric_for_best_model="loss", greater_is_better=True, **options)
    assert trainer.state.best_global_step == 2
    for name, weight in load_file(tmp_path / "checkpoint-2/model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamuon"}, "optimizer is 'adamuon', but muon_learning_rate is null; give its rate"),
        ({"optimizer": "soap", "muon_learning_rate": 0.1}, "but optimizer is 'soap', which is not Muon"),
        (
            {"optimizer": "schedule_free"},
            "lr_scheduler_type is linear, but optimizer is 'schedule_free'",
        ),
        (
            {"optimizer": "schedule_free", "lr_scheduler_type": "constant", "ema_decay": 0.9},
            "ema_decay is 0.9, but optimizer is 'schedule_free', which averages by itself; set it to null",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

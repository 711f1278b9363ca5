"""The norm that learns faster on a CPU: torch's values, and derivatives of all kinds against torch's own."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from tests.test_trainer import build
from tests.tiny import tiny_ids, tiny_model
from trainers.norms import RMSNorm, RMSNormFunction, speed_up_norms


def pair(width=12, eps=1e-6):
    """Our norm and torch's, with the same weights."""
    norms = RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
    for norm in norms:
        norm.weight.data = torch.linspace(0.5, 2.0, width)
    return norms


def learned(norm, x, grad):
    """Values, and the gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad(y, (x, norm.weight), grad)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 3, 4, 12)])
def test_values_and_gradients_are_those_of_torch(shape, monkeypatch):
    taken = []
    apply = RMSNormFunction.apply
    monkeypatch.setattr(RMSNormFunction, "apply", lambda *args: taken.append(True) or apply(*args))
    x, grad = torch.randn(shape), torch.randn(shape)
    ours, theirs = (learned(norm, x, grad) for norm in pair())
    assert taken == [True]
    assert torch.equal(ours[0], theirs[0])
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_gradients_are_those_of_finite_differences():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inputs = x.requires_grad_(), weight.requires_grad_()
    function = lambda x, weight: RMSNormFunction.apply(x, weight, 1e-6)[0]  # noqa: E731
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(function, inputs)


def test_parts_that_are_frozen_have_no_gradient():
    ours, _ = pair()
    ours.requires_grad_(False)
    x = torch.randn(2, 12, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.weight.grad is None
    ours.requires_grad_(True)
    ours(x.detach()).sum().backward()
    torch.testing.assert_close(ours.weight.grad, nn.functional.rms_norm(x.detach(), (12,), eps=1e-6).sum(0))
    assert not ours.requires_grad_(False)(x.detach()).requires_grad


@pytest.mark.parametrize("kind", ["half", "mixed", "no gradient"])
def test_torch_computes_what_is_no_training_in_float32(kind, monkeypatch):
    monkeypatch.setattr(RMSNormFunction, "apply", None)  # would be called in vain
    ours, theirs = pair()
    x = torch.randn(2, 12).to(torch.bfloat16 if kind != "no gradient" else torch.float32)
    if kind == "half":
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    with torch.set_grad_enabled(kind != "no gradient"):
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda norm, x: grad(lambda x: norm(x).sin().sum())(x),
        lambda norm, x: vmap(grad(lambda x: norm(x).sin().sum()))(x),
        lambda norm, x: vmap(lambda x: torch.func.vjp(norm, x)[1](torch.ones(12))[0])(x),
        lambda norm, x: jvp(norm, (x,), (x.cos(),))[1],
        lambda norm, x: hessian(lambda x: norm(x).sin().sum())(x[0]),
        lambda norm, x: vmap(lambda weight: functional_call(norm, {"weight": weight}, x))(torch.rand(3, 12)),
        lambda norm, x: vmap(
            lambda weight: grad(lambda x: functional_call(norm, {"weight": weight}, x).sin().sum())(x)
        )(torch.linspace(0.5, 1, 36).view(3, 12)),
    ],
    ids=["grad", "vmap of grad", "vmap of vjp", "jvp", "hessian", "vmap of weights", "vmap of weights of grad"],
)
def test_transforms_of_functions(transform):
    x = torch.randn(4, 12)
    torch.manual_seed(0)
    ours = transform(pair()[0], x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, transform(pair()[1], x), atol=1e-5, rtol=1e-4)


def test_a_model_learns_as_with_the_norms_of_torch():
    """The norms of queries and keys as well."""
    gradients, names = [], []
    for is_fast in (False, True):
        model = tiny_model(qk_norm=True)
        if is_fast:
            speed_up_norms(model)
        ids = tiny_ids(2, 8)
        model(ids, labels=ids, num_steps=3).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        names.append({type(module) for module in model.modules() if isinstance(module, nn.RMSNorm)})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert names == [{nn.RMSNorm}, {RMSNorm}]


def test_a_trainer_has_them_and_a_norm_of_another_kind_is_left_alone(tmp_path):
    trainer = build(tmp_path)
    assert {type(it) for it in trainer.model.modules() if isinstance(it, nn.RMSNorm)} == {RMSNorm}
    others = nn.ModuleList([nn.RMSNorm(4), nn.RMSNorm(4, eps=1e-6, elementwise_affine=False), nn.LayerNorm(4)])
    speed_up_norms(others)
    assert [type(it) for it in others] == [nn.RMSNorm, nn.RMSNorm, nn.LayerNorm]

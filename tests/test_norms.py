"""The norm's own gradient against torch's, which is made of its parts: to the last bit, and of every kind."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model import MegaTransformerTextConfig
from model.attention import apply_rotary, rotary_angles, rotary_tables
from model.blocks import RMSNorm, RootMeanSquare, build_norm


def gradients(norm: nn.Module, x: torch.Tensor, matrix: torch.Tensor) -> list[torch.Tensor]:
    """Of a normed branch beside a residual, so that gradients of x come from two places, and of a norm behind both."""
    x = x.clone().requires_grad_()
    norm.weight.grad = None
    hidden = 1.1 * x
    out = norm(hidden + nn.functional.linear(norm(hidden), matrix))
    out.sin().sum().backward()
    return [out, x.grad, norm.weight.grad]


@pytest.mark.parametrize("shape", [(4, 32, 256), (3, 7, 130), (5, 96)])
def test_values_and_gradients_are_those_of_torch_to_the_last_bit(shape):
    torch.manual_seed(0)
    ours, theirs = RMSNorm(shape[-1], eps=1e-6), nn.RMSNorm(shape[-1], eps=1e-6)
    weight, x, matrix = torch.rand(shape[-1]), torch.randn(shape), torch.randn(shape[-1], shape[-1])
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    for own, reference in zip(gradients(ours, x, matrix), gradients(theirs, x, matrix), strict=True):
        assert torch.equal(own, reference)


def test_derivatives_of_every_kind_are_right():
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return RootMeanSquare.apply(x, x, weight, 1e-5)[0]

    assert torch.autograd.gradcheck(norm, (x, weight), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(norm, (x, weight))
    point, tangent = x.detach(), torch.randn(3, 8, dtype=torch.float64)
    reference = nn.RMSNorm(8, eps=1e-5, dtype=torch.float64)
    reference.weight.data.copy_(weight.data)
    own = torch.func.jvp(lambda x: norm(x, weight.detach()), (point,), (tangent,))
    torch.testing.assert_close(own, torch.func.jvp(reference, (point,), (tangent,)))


def test_backward_keeps_the_input_and_not_what_is_normed_besides():
    norm, x, kept = RMSNorm(64, eps=1e-6), torch.randn(2, 8, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda it: it):
        norm(x)
    assert sorted(map(tuple, kept)) == [(2, 8, 1), (2, 8, 64), (64,)]


def test_frozen_weights_have_no_gradient():
    norm, x = RMSNorm(8, eps=1e-6).requires_grad_(False), torch.randn(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad.shape == (2, 8)


def test_models_have_the_norm():
    assert type(build_norm(MegaTransformerTextConfig(hidden_size=32, num_attention_heads=2))) is RMSNorm


def test_rotations_are_those_of_llama_to_the_last_bit():
    torch.manual_seed(0)
    angles = rotary_angles(torch.arange(5)[None], 8, 10000.0)
    both = torch.cat((angles, angles), dim=-1)
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 5, 8)
    theirs = apply_rotary_pos_emb(query, key, both.cos(), both.sin())[0]
    ours = apply_rotary(query, *rotary_tables(angles, torch.float32))
    assert torch.equal(ours, theirs)
    probe = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(out, query, probe)[0] for out in (ours, theirs)))

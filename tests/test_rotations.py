"""Rotary positions against Llama's, to the last bit."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.attention import apply_rotary, rotary_angles, rotary_tables


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

"""The mixture of very many experts, against all of its experts written out."""

import math

import pytest
import torch
from torch import nn

from model import MegaTransformerForCausalLM
from model.peer import PeerFeedForward
from tests.tiny import tiny_config, tiny_ids, tiny_model
from trainers.dry_run import StepCounts, flops_per_token, linear_parameters
from trainers.optimizers import matrices_of

PEER = {"mlp": "peer", "peer_num_experts": 144, "peer_num_heads": 3, "peer_top_k": 5, "peer_key_dim": 10}


def layer_of(**options) -> PeerFeedForward:
    return tiny_model(scale=2.0, **{**PEER, **options}).model.core.layers[0].mlp


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0))


def scores_of_all(layer: PeerFeedForward, hidden: torch.Tensor) -> torch.Tensor:
    """The product of each query with the whole key of each expert, (tokens, heads, experts)."""
    query = layer.query_norm((hidden @ layer.query_proj.weight.T).unflatten(-1, (3, 10)))
    keys = torch.stack([torch.cat((first, second)) for first in layer.keys[0] for second in layer.keys[1]])
    return torch.einsum("thd,nd->thn", query, keys)


@pytest.mark.parametrize(("experts", "top_k"), [(144, 5), (144, 12), (16, 4), (1, 1)])
@torch.no_grad()
def test_the_experts_are_the_best_of_all(experts, top_k):
    """By the scores of all N; no two of which are the same. Up to as many as there are half-keys."""
    layer, hidden = layer_of(peer_num_experts=experts, peer_top_k=top_k), inputs(1, 50)
    every = scores_of_all(layer, hidden[0])
    gaps = every.sort(dim=-1).values.diff(dim=-1)
    assert experts == 1 or gaps.min() > 0
    expected = every.topk(top_k, dim=-1)
    scores, found = layer.retrieve(hidden)
    assert found.shape == (1, 50, 3, top_k) and torch.equal(found[0], expected.indices)
    torch.testing.assert_close(scores[0], expected.values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_output_is_the_sum_of_the_chosen_experts():
    """One token, one head and one expert after the other."""
    layer, hidden = layer_of(), inputs(2, 3)
    output = layer(hidden)
    for x, found in zip(hidden.flatten(0, 1), output.flatten(0, 1), strict=True):
        expected = torch.zeros(32)
        for scores in scores_of_all(layer, x[None])[0]:
            best = scores.topk(5)
            for weight, expert in zip(best.values.softmax(-1), best.indices.tolist(), strict=True):
                u, v = layer.expert_in.weight[expert], layer.expert_out.weight[expert]
                expected += weight * nn.functional.gelu(u @ x) * v
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert output.abs().mean() > 0.01


@torch.no_grad()
def test_a_row_depends_on_nothing_but_the_row():
    """As it would with the paper's norm over the batch; in training too."""
    layer, hidden = layer_of().train(), inputs(4, 6)
    torch.testing.assert_close(layer(hidden)[1], layer(hidden[1:2])[0])


def test_experts_that_are_not_chosen_get_no_gradient():
    layer, hidden = layer_of(), inputs(1, 4)
    chosen = layer.retrieve(hidden)[1].unique()
    layer(hidden).square().sum().backward()
    assert len(chosen) < 60
    for table in (layer.expert_in, layer.expert_out):
        assert torch.equal(table.weight.grad.abs().sum(-1).nonzero().squeeze(1), chosen)
    assert layer.keys.grad.any() and layer.query_proj.weight.grad.any()


def test_initialisation_follows_its_table():
    """On a layer wide enough for tight statistics; what comes out is of the order of a dense layer's output."""
    model = tiny_model(**{**PEER, "hidden_size": 256, "peer_num_experts": 1024, "peer_key_dim": 64})
    layer, std, cut = model.model.core.layers[0].mlp, (2 / (5 * 256)) ** 0.5, 0.9866  # cut at three deviations
    expected = {
        layer.query_proj.weight: std,
        layer.expert_in.weight: std,
        layer.expert_out.weight: std * 16 / math.sqrt(2 * (1 + 4 * 2 + 1)),
        layer.keys: (2 / 64) ** 0.5,
    }
    for weight, value in expected.items():
        assert weight.std().item() == pytest.approx(value * cut, rel=0.02)
    dense = tiny_model(hidden_size=256, intermediate_size=768).model.core.layers[0].mlp
    hidden = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.2 < layer(hidden).std() / dense(hidden).std() < 5


def test_optimizers_and_estimates_know_what_is_a_matrix():
    """Muon turns the queries' matrix; experts, which have a row each, and keys are left to the other optimizer. A token
    is multiplied with the experts that it has chosen, and with all keys.
    """
    model = tiny_model(**PEER)
    layer, matrices = model.model.core.layers[0].mlp, set(matrices_of(model))
    assert [name for name, weight in layer.named_parameters() if weight in matrices] == ["query_proj.weight"]
    assert linear_parameters(layer) == 32 * 3 * 10 + 3 * (2 * 12 * 5 + 5 * 2 * 32)
    many, steps = tiny_model(**{**PEER, "peer_num_experts": 576}), StepCounts(0, 2, 2)
    more = flops_per_token(many, steps, 8).forward - flops_per_token(model, steps, 8).forward
    assert more == 2 * (1 + 2 * 2 + 1) * 3 * (2 * 12 * 5)  # twice as many half-keys, not four times


def test_half_precision_and_saving(tmp_path):
    """bf16 chooses by scores in float32; a checkpoint of shared experts is the same again."""
    model, ids = tiny_model(scale=2.0, **PEER).to(torch.bfloat16), tiny_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded = MegaTransformerForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(ids).logits, model(ids).logits)
        assert model(ids).logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model(scale=2.0, **PEER)(ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer_num_experts": 150}, r"peer_num_experts \(150\) must be a square, .* such as 144 or 169"),
        ({"peer_top_k": 13}, r"peer_top_k \(13\) must be at most sqrt\(peer_num_experts\) \(12\)"),
        ({"peer_key_dim": 9}, r"peer_key_dim \(9\) must be even"),
        ({"peer_num_heads": 0}, "peer_num_heads: .*greater or equal to 1"),
    ],
)
def test_sizes_that_make_no_layer_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**PEER, **options})

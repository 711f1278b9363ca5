"""The cache of static size: the same tokens as the one that grows, and one compiled graph for every length."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from model import RecurrentCache
from tests.tiny import PAD, tiny_ids, tiny_model

POLICIES = ["full", "ring", "last"]
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3, "do_sample": False},
    "exits": {"do_sample": False, "exit_criterion": "cosine", "exit_threshold": 0.1},
}


def model_of(**overrides):
    model = tiny_model(scale=2.0, **overrides)
    model.generation_config.eos_token_id = None  # full length, for comparison
    return model


def generated(model, ids, **options) -> torch.Tensor:
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=8, num_steps=5, **options)


@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_static_equals_dynamic(position, mode, policy):
    """Invariant 1, with padding."""
    model = model_of(position_embedding=position)
    ids = torch.cat((tiny_ids(1, 14), nn.functional.pad(tiny_ids(1, 9, seed=1), (5, 0), value=PAD)))
    options = {"cache_policy": policy, **MODES[mode]}
    expected = generated(model, ids, **options)
    assert torch.equal(generated(model, ids, cache_implementation="static", **options), expected)


def test_assisted_generation_is_refused():
    with pytest.raises(ValueError, match="not possible with a static cache"):
        generated(model_of(), tiny_ids(1, 6), cache_implementation="static", prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_fewer_steps_than_there_is_room_for(policy):
    """A chunk that takes fewer leaves its deepest entry in the slots above, as in a cache that grows."""
    model, ids = model_of(), tiny_ids(2, 9)
    grows, static = RecurrentCache(model.config, policy), RecurrentCache(model.config, policy, None, 9, 6)
    for part, steps in zip(ids.split([4, 1, 3, 1], dim=1), (3, 6, 2, 5), strict=True):
        with torch.no_grad():
            expected = model(part, num_steps=6 if grows.length == 0 else steps, cache=grows).logits
            ours = model(part, num_steps=6 if static.length == 0 else steps, cache=static).logits
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_compiled_decoding_gives_the_same_tokens_and_compiles_nothing_after_the_second():
    """Two graphs for the prompt, of a block that runs once and of a step; two for a token, whatever its length, its
    step and its slot.
    """
    ids, graphs, runs = tiny_ids(2, 6), {}, []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    expected = generated(model_of(), ids)
    for new in (2, 8):
        torch._dynamo.reset()
        counters.clear()
        runs.clear()
        options = {"cache_implementation": "static", "compile_config": CompileConfig(True, None, backend, None)}
        ours = model_of().generate(ids, max_new_tokens=new, num_steps=5, do_sample=False, **options)
        assert torch.equal(ours, expected[:, : 6 + new])
        assert len(runs) == new * (1 + 5 + 1)
        assert not counters["graph_break"]
        graphs[new] = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs[8] == graphs[2] == 4


@pytest.mark.parametrize(
    ("policy", "kept", "slots"), [("full", None, 5), ("ring", 3, 3), ("ring", 9, 5), ("last", None, 1)]
)
def test_memory_is_that_of_its_formula(policy, kept, slots):
    """1 + 2 + 1 layers, 2 key/value heads of 8, float32; room is taken at once and not again."""
    model = model_of()
    cache = RecurrentCache(model.config, policy, kept, max_length=40, max_steps=5)
    for length in (4, 30):
        model(tiny_ids(3, length), num_steps=5, cache=cache)
        assert cache.num_bytes == 2 * (2 + 2 * slots) * 3 * 2 * 40 * 8 * 4


def test_more_than_there_is_room_for_is_refused():
    model = model_of()
    cache = RecurrentCache(model.config, max_length=6, max_steps=3)
    model(tiny_ids(1, 4), num_steps=3, cache=cache)
    with pytest.raises(
        ValueError, match=r"4 \+ 3 tokens are more than the static cache has room for, 6; make it larger"
    ):
        model(tiny_ids(1, 3), num_steps=3, cache=cache)
    with pytest.raises(
        ValueError, match=r"num_steps \(4\) is more than the static cache has room for, 3; make it larger"
    ):
        model(tiny_ids(1, 1), num_steps=4, cache=cache)
    model(tiny_ids(1, 2), num_steps=3, cache=cache)
    assert cache.length == 6

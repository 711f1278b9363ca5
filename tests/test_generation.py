"""`generate`: depth rules, batches, padding, beams, cache."""

import pytest
import torch
from transformers import GenerationConfig

from model import RecurrentCache
from tests.tiny import tiny_ids, tiny_model


def greedy_by_hand(model, ids, new_tokens, num_steps):
    """Greedy decoding without a cache: the whole sequence again for every token."""
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, num_steps=num_steps).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.fixture(scope="module")
def model():
    model = tiny_model(scale=3.0)
    model.generation_config.eos_token_id = None  # full length, for comparison
    return model


def test_greedy_equals_recomputing_everything(model):
    ids = tiny_ids(2, 5)
    for steps in (1, 5):
        ours = model.generate(ids, num_steps=steps, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours, greedy_by_hand(model, ids, 8, steps))


def test_depth_from_keyword_then_generation_config_then_config_then_mean(model):
    ids = tiny_ids(2, 5)
    expected = {steps: greedy_by_hand(model, ids, 6, steps) for steps in (1, 2, 3, 4)}
    assert not torch.equal(expected[2], expected[3])

    def generated(**kwargs):
        return model.generate(ids, max_new_tokens=6, do_sample=False, **kwargs)

    assert torch.equal(generated(), expected[4])  # the mean
    try:
        model.config.num_steps = 3
        assert torch.equal(generated(), expected[3])
        model.generation_config.num_steps = 2
        assert torch.equal(generated(), expected[2])
        assert torch.equal(generated(num_steps=1), expected[1])
        passed = GenerationConfig(max_new_tokens=6, do_sample=False, num_steps=3)
        assert torch.equal(model.generate(ids, generation_config=passed), expected[3])
        assert torch.equal(model.generate(ids, generation_config=passed, num_steps=1), expected[1])
    finally:
        model.config.num_steps = None
        model.generation_config.num_steps = None


@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "sinusoidal", "none"])
def test_padded_batch_equals_each_alone(position):
    """Left padding in `generate`."""
    model = tiny_model(scale=3.0, position_embedding=position)
    model.generation_config.eos_token_id = None
    long, short = tiny_ids(1, 7), tiny_ids(1, 4, seed=1)
    batch = torch.cat((long, torch.cat((torch.zeros(1, 3, dtype=torch.long), short), dim=1)))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    out = model.generate(batch, attention_mask=mask, num_steps=3, max_new_tokens=6, do_sample=False)
    for row, prompt in enumerate((long, short)):
        alone = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_steps=3, max_new_tokens=6, do_sample=False
        )
        assert torch.equal(out[row, 7:], alone[0, prompt.shape[1] :])


def test_rows_may_have_their_own_depth(model):
    ids, depths = tiny_ids(3, 5), torch.tensor([1, 4, 2])
    out = model.generate(ids, num_steps=depths, max_new_tokens=6, do_sample=False)
    for row, depth in enumerate(depths.tolist()):
        assert torch.equal(out[row], greedy_by_hand(model, ids[row : row + 1], 6, depth)[0])


def test_beams_with_cache_equal_beams_without(model):
    """Beam search reorders the recurrent cache."""
    ids = tiny_ids(2, 5)
    kwargs = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "num_steps": 3}
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs))


def test_sampling_is_seeded_and_the_same_with_and_without_cache(model):
    ids, kwargs = tiny_ids(2, 5), {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "num_steps": 3}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, use_cache=use_cache, **kwargs))
    assert torch.equal(*outputs)


def test_continuing_from_a_returned_cache(model):
    ids, cache = tiny_ids(1, 5), RecurrentCache(model.config)
    first = model.generate(ids, num_steps=3, max_new_tokens=4, do_sample=False, cache=cache)
    second = model.generate(first, num_steps=3, max_new_tokens=4, do_sample=False, cache=cache)
    assert torch.equal(second, greedy_by_hand(model, ids, 8, 3))


def test_unknown_option_and_depth_are_refused(model):
    with pytest.raises(ValueError, match="num_stepz"):
        model.generate(tiny_ids(1, 4), num_stepz=3)
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(tiny_ids(1, 4), num_steps=0, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation 'quantized' is not possible here; choose 'dynamic' or"):
        model.generate(tiny_ids(1, 4), cache_implementation="quantized", max_new_tokens=2)

"""What `forward` gives and takes: the cache by both of its names, hidden states, attentions, arguments of libraries."""

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from model import ExitOptions, RecurrentCache
from tests.tiny import tiny_ids, tiny_model

LAYERS, STEPS = 2, 3  # of the core


def outputs_of_modules(model, modules, run) -> list[torch.Tensor]:
    """The outputs of modules, in the order in which they run."""
    seen = []
    handles = [module.register_forward_hook(lambda _, args, out: seen.append(out)) for module in modules]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_has_two_names(use_cache):
    model, ids = tiny_model(), tiny_ids(2, 6)
    first = model(ids[:, :4], use_cache=use_cache)
    assert first.past_key_values is first.cache
    assert isinstance(first.cache, RecurrentCache) == use_cache
    if use_cache:
        second = model(ids[:, 4:], past_key_values=first.cache)
        assert second.cache is first.cache
        torch.testing.assert_close(second.logits, model(ids).logits[:, 4:])
        assert torch.equal(model.generate(ids, past_key_values=RecurrentCache(model.config)), model.generate(ids))
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="two names of the same"):
                call(ids, cache=first.cache, past_key_values=first.cache)


def test_hidden_states_are_those_of_prelude_each_step_and_coda():
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 5)
    inner = model.model
    modules = [*inner.prelude.layers, inner.core, *inner.coda.layers]
    out = model(ids, num_steps=STEPS, output_hidden_states=True, output_states=True)
    seen = outputs_of_modules(model, modules, lambda: model(ids, num_steps=STEPS))
    assert len(out.hidden_states) == len(seen) + 1 == 1 + 1 + STEPS + 1
    assert torch.equal(out.hidden_states[0], inner.embed_tokens(ids))
    assert all(torch.equal(given, wanted) for given, wanted in zip(out.hidden_states[1:-1], seen[:-1], strict=True))
    assert torch.equal(out.hidden_states[-1], inner.norm(seen[-1]))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert all(
        torch.equal(given, wanted) for given, wanted in zip(out.hidden_states[2:-1], out.states[1:], strict=True)
    )
    assert model(ids).hidden_states is None


def test_hidden_states_beside_exits_are_those_of_the_final_reading():
    model, ids = tiny_model(scale=2.0), tiny_ids(3, 5)
    exits = {"num_steps": 8, "exits": ExitOptions("kl_divergence", 0.2)}
    out, plain = model(ids, output_hidden_states=True, **exits), model(ids, **exits)
    assert len(set(plain.exit_steps.tolist())) > 1
    assert torch.equal(out.exit_steps, plain.exit_steps)
    assert len(out.hidden_states) == 1 + 1 + int(plain.exit_steps.max()) + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), plain.logits)


def test_attentions_by_hand_and_zero_in_rows_that_have_stopped():
    """The first layer's, written out; the rest by what probabilities are."""
    model, ids = tiny_model(scale=2.0, position_embedding="none"), tiny_ids(2, 5)
    out = model(ids, num_steps=torch.tensor([1, STEPS]), output_attentions=True)
    assert len(out.attentions) == 1 + LAYERS * STEPS + 1
    block = model.model.prelude.layers[0]
    with torch.no_grad():
        qkv = block.attention.qkv_proj(block.attention_norm_in(model.model.embed_tokens(ids))).unflatten(-1, (-1, 8))
        query, key = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:6].transpose(1, 2).repeat_interleave(2, dim=1)
        logits = query @ key.transpose(2, 3) / 8**0.5
        hidden = torch.ones(5, 5).triu(1).bool()
        torch.testing.assert_close(out.attentions[0], logits.masked_fill(hidden, -torch.inf).softmax(-1))
    sums = torch.stack([each.sum(dim=-1) for each in out.attentions])  # (layers, batch, heads, query)
    torch.testing.assert_close(sums[:, 1], torch.ones_like(sums[:, 1]))
    assert sums[1 + LAYERS : -1, 0].eq(0).all() and sums[: 1 + LAYERS, 0].gt(0.99).all()


def test_attentions_do_not_change_the_result():
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 5)
    torch.testing.assert_close(model(ids, output_attentions=True).logits, model(ids).logits)


def test_generate_gives_them_for_each_token():
    model, ids = tiny_model(), tiny_ids(2, 5)
    asked = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    out = model.generate(ids, num_steps=STEPS, max_new_tokens=3, do_sample=False, eos_token_id=None, **asked)
    assert [len(each) for each in out.hidden_states] == [1 + 1 + STEPS + 1] * 3
    assert [each[0].shape for each in out.attentions] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    whole = model(out.sequences[:, :-1], num_steps=STEPS, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[2][-1][:, 0], whole.hidden_states[-1][:, -1])


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"])
def test_what_says_again_where_documents_begin_is_accepted(name):
    model, ids = tiny_model(), tiny_ids(1, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    value = {"c": starts, "m": 4, "s": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])}[name[0]]
    packed = model(ids, position_ids=positions, **{name: value}).logits
    alone = torch.cat((model(ids[:, :3]).logits, model(ids[:, 3:]).logits), dim=1)
    torch.testing.assert_close(packed, alone)
    with pytest.raises(ValueError, match=f"{name} says where packed documents begin"):
        model(ids, **{name: value})


def test_documents_that_positions_do_not_begin_are_refused():
    starts = torch.tensor([0, 2, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"documents begin at \[0, 2, 7\], where position_ids do not restart"):
        tiny_model()(tiny_ids(1, 7), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), cu_seq_lens_q=starts)


def test_what_asks_for_nothing_is_accepted_and_what_is_misspelt_is_named():
    model, ids = tiny_model(), tiny_ids(1, 4)
    idle = {"token_type_ids": None, "output_router_logits": False, "return_dict": True}
    assert torch.equal(model(ids, **idle).logits, model(ids).logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    with pytest.raises(ValueError, match="does not know the argument 'num_stepz'; did you mean 'num_steps'"):
        model(ids, num_stepz=3)
    with pytest.raises(ValueError, match="does not know the argument 'xyz'; see its docstring"):
        model(ids, xyz=3)


@pytest.mark.parametrize("asked", [{}, {"num_steps": 3}, {"exit_criterion": "none"}])
def test_generate_hands_on_nothing_of_its_own_where_nothing_is_asked(asked):
    """Libraries that put functions of their own between `generate` and `forward` know none of our names but
    `num_steps`, which `forward` has.
    """
    model, names = tiny_model(), set()
    original = model.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        names.update(kwargs)
        return original(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare
    model.generate(tiny_ids(1, 4), max_new_tokens=3, do_sample=False, **asked)
    libraries = {"attention_mask", "position_ids", "next_sequence_length", "is_first_iteration", "use_cache"}
    libraries |= {"cache", "past_key_values", "logits_to_keep"}
    assert names - libraries == asked.keys() & {"num_steps"}


def test_what_generate_cannot_do_is_refused_aloud():
    model, ids = tiny_model(), tiny_ids(1, 4)
    places = r"each of 4 layers .* 10 are executed at 4 steps: .*convert.py serve"
    with pytest.raises(ValueError, match=places):
        model.generate_batch([[3, 4, 5]], GenerationConfig(max_new_tokens=2))
    with pytest.raises(ValueError, match=places):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="assistant_early_exit drafts with the first layers"):
        model.generate(ids, assistant_early_exit=1, max_new_tokens=2)
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(ids, cache=foreign_cache(model.config), max_new_tokens=2)


def foreign_cache(config) -> StaticCache:
    """A cache of transformers that holds keys of two layers, where the model has four."""
    cache = StaticCache(config=config, max_cache_len=8)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), layer)
    return cache

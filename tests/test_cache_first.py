"""Cache policy "first", which a model of that option also follows without a cache: steps after the first see tokens
before a window as the first step left them.
"""

import pytest
import torch
from torch import nn

from inference.engine import InferenceEngine
from model import MegaTransformerForCausalLM, MegaTransformerTextConfig, RecurrentCache
from tests.tiny import PAD, tiny_config, tiny_ids, tiny_model

EXACT = {"atol": 1e-10, "rtol": 0}
STEPS = 4


def model_of(window: int, **overrides) -> MegaTransformerForCausalLM:
    recurrence = {"cache_policy": "first", "num_kept_tokens": window, **overrides.pop("recurrence", {})}
    return tiny_model(scale=2.0, recurrence=recurrence, **overrides).double()


def logits_of(model, ids, num_steps=STEPS, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, num_steps=num_steps, **kwargs).logits


def decode(model, ids: torch.Tensor, num_steps: int, window: int) -> torch.Tensor:
    """Logits, (1, tokens, vocab), of a core of one layer, token by token, by the rule; differentiable."""
    layer, state, tokens, logits = model.model.core.layers[0], model.model.fixed_state(model.lm_head.weight), [], []
    for place, token in enumerate(ids[0]):
        s, e, own = state.view(1, 1, -1), model.model.embed_tokens(token)[None, None], []
        for step in range(num_steps):
            x = model.model.core.injection(s, e)
            q, k, v = layer.attention._project(layer.attention_norm_in(x))
            own.append((k, v))
            seen = [left[step if place - at < window else 0] for at, left in enumerate(tokens)] + [own[step]]
            keys, values = (torch.cat(part, 2).repeat_interleave(2, 1) for part in zip(*seen, strict=True))
            mixed = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1) @ values
            x = layer.attention_norm_out(x + layer.attention.o_proj(mixed.transpose(1, 2).flatten(2)))
            s = layer.mlp_norm_out(x + layer.mlp(layer.mlp_norm_in(x)))
        tokens.append(own)
        logits.append(model.lm_head(model.model.norm(model.model.norm(s))))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("window", [1, 3])
def test_a_pass_without_a_cache_gives_what_the_rule_gives_and_its_gradients(window):
    model = model_of(window, position_embedding="none", num_prelude_layers=0, num_coda_layers=0, num_core_layers=1)
    ids, gradients = tiny_ids(1, 7), []
    found, expected = model(ids, num_steps=STEPS, use_cache=False).logits, decode(model, ids, STEPS, window)
    torch.testing.assert_close(found, expected, **EXACT)
    for logits in (found, expected):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(gradient.abs().sum() > 0 for gradient in gradients[-1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_tokens_one_by_one_or_in_chunks_give_what_one_pass_gives(window, position, backend):
    """With padding on the left, too. Chunks are shorter than the window, as long, and longer."""
    model, ids = model_of(window, position_embedding=position, attn_implementation=backend), tiny_ids(2, 13)
    model = model if backend == "sdpa" else model.float()  # its softmax is of float32
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :2] = 0
    close = EXACT if backend == "sdpa" else {"atol": 1e-4, "rtol": 1e-4}
    for given in (None, mask):
        whole, is_token = logits_of(model, ids, attention_mask=given, use_cache=False), mask.bool() | (given is None)
        for lengths in ([1] * 13, [5, 3, 4, 1], [6, 7], [13]):
            cache, parts = RecurrentCache(model.config), []
            for part in ids.split(lengths, dim=1):
                seen = None if given is None else given[:, : cache.get_seq_length() + part.shape[1]]
                parts.append(logits_of(model, part, attention_mask=seen, cache=cache))
            torch.testing.assert_close(torch.cat(parts, dim=1)[is_token], whole[is_token], **close)
    alone = logits_of(model, ids[1:, 2:], use_cache=False)
    torch.testing.assert_close(whole[1:, 2:], alone, **close)


def test_a_window_of_all_tokens_is_the_policy_full():
    """Bitwise, and no other window is."""
    ids, full = tiny_ids(2, 9), tiny_model(scale=2.0).double()
    for window, is_full in ((9, True), (20, True), (8, False)):
        model = model_of(window)
        assert torch.equal(logits_of(model, ids, use_cache=False), logits_of(full, ids, use_cache=False)) is is_full
        logits = [logits_of(each, ids, cache=RecurrentCache(each.config)) for each in (model, full)]
        assert torch.equal(*logits) is is_full


def test_steps_without_gradient_and_with_are_steps():
    """In value, with rows of their own depth beside each other, each as alone; every parameter gets a gradient."""
    model, ids = model_of(2), tiny_ids(3, 8)
    whole = logits_of(model, ids, use_cache=False)
    loss = model(ids, labels=ids, num_steps=(3, 1), use_cache=False)
    torch.testing.assert_close(loss.logits, whole, **EXACT)
    loss.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    depths = torch.tensor([1, 4, 2])
    found = logits_of(model, ids, num_steps=depths, use_cache=False)
    for row, depth in enumerate(depths.tolist()):
        alone = logits_of(model, ids[row : row + 1], num_steps=depth, use_cache=False)
        torch.testing.assert_close(found[row : row + 1], alone, **EXACT)


def test_activation_checkpointing_changes_nothing():
    model, ids, gradients = model_of(2).train(), tiny_ids(2, 8), []
    for is_on in (False, True):
        if is_on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, num_steps=(1, 3)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        model(ids, labels=ids, num_steps=3).loss.backward()
        gradients[-1] += [parameter.grad.clone() for parameter in model.parameters()]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_compiled_units_give_the_same():
    model, compiled, ids = model_of(2).train(), model_of(2).train(), tiny_ids(2, 8)
    compiled.model.compile_units(backend="eager")
    gradients = []
    for each in (model, compiled):
        each(ids, labels=ids, num_steps=(1, 3)).loss.backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_documents_of_a_packed_row_are_each_alone():
    model, ids = model_of(3), tiny_ids(1, 12)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    found = logits_of(model, ids, position_ids=positions, use_cache=False)
    for part, logits in zip(ids.split([7, 5], 1), found.split([7, 5], 1), strict=True):
        torch.testing.assert_close(logits, logits_of(model, part, use_cache=False), **EXACT)


def test_attention_probabilities_are_those_of_tokens():
    """Whether a token is seen at its first step or at the reader's: one number for each."""
    model, ids = model_of(3), tiny_ids(2, 9)
    with torch.no_grad():
        found = model(ids, num_steps=STEPS, use_cache=False, output_attentions=True).attentions
        cache = RecurrentCache(model.config)
        model(ids[:, :5], num_steps=STEPS, cache=cache)
        chunk = model(ids[:, 5:], num_steps=STEPS, cache=cache, output_attentions=True).attentions
    for whole, part in zip(found, chunk, strict=True):
        torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]), atol=1e-5, rtol=0)
        assert whole.triu(1).abs().max() == 0
        torch.testing.assert_close(part, whole[:, :, 5:], atol=1e-5, rtol=0)


def test_steps_that_are_taken_for_the_first_time_find_the_deepest():
    """Behind a prompt of one step, of which there are no rings, and behind one of two."""
    for before in (1, 2):
        model, ids, found = model_of(3), tiny_ids(1, 8), []
        for policy in ("first", "full"):
            cache = RecurrentCache(model.config, policy, num_kept_tokens=9 if policy == "first" else None)
            logits_of(model, ids[:, :5], num_steps=before, cache=cache)
            found.append(logits_of(model, ids[:, 5:], num_steps=STEPS, cache=cache))
        torch.testing.assert_close(*found, **EXACT)


def test_what_is_taken_back_has_to_be_in_the_window():
    model, ids = model_of(4), tiny_ids(1, 9)
    cache = RecurrentCache(model.config)
    logits_of(model, ids[:, :4], cache=cache)
    cache.crop(-2)  # all of it is in the window
    logits_of(model, ids[:, 2:], cache=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="crop of 1 tokens is not possible with cache policy 'first': of token 4 only"):
        cache.crop(-1)
    expected = logits_of(model, ids, use_cache=False)[:, 8:]
    torch.testing.assert_close(logits_of(model, ids[:, 8:], cache=cache), expected, **EXACT)
    cache.crop(-9)
    torch.testing.assert_close(logits_of(model, ids, cache=cache)[:, 8:], expected, **EXACT)


def test_generation_follows_the_model_and_the_keyword(tmp_path):
    """Beams and rows of their own depth; the model as it is loaded again."""
    model, prompt = model_of(3), tiny_ids(2, 6)
    model.save_pretrained(tmp_path)
    loaded = MegaTransformerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "num_steps": STEPS}
    for more in ({}, {"num_beams": 3}):
        whole = model.generate(prompt, use_cache=False, **more, **options)
        assert torch.equal(model.generate(prompt, **more, **options), whole)
        assert torch.equal(loaded.generate(prompt, **more, **options), whole)
        padded = nn.functional.pad(prompt, (2, 0), value=PAD)
        rows = model.generate(padded, attention_mask=(padded != PAD).long(), **more, **options)
        assert torch.equal(rows[:, 2:], whole)
    full, options["num_steps"] = tiny_model(scale=2.0).double(), torch.tensor([4, 2])
    asked = full.generate(prompt, cache_policy="first", num_kept_tokens=3, **options)
    assert torch.equal(asked, model.generate(prompt, **options))
    assert not torch.equal(asked, full.generate(prompt, **options))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: RecurrentCache(model.config, max_length=9), "a static cache is not possible with cache policy"),
        (lambda model: RecurrentCache(model.config, "full", num_kept_tokens=2), "num_kept_tokens .2. is for cache pol"),
        (lambda model: RecurrentCache(model.config, num_kept_tokens=0), r"num_kept_tokens \(0\) must be at least 1"),
        (lambda model: InferenceEngine(model, 1, max_length=9), "which a model of cache policy 'first' does not see"),
        (lambda model: model.generate(tiny_ids(1, 3), decoding="wavefront"), "'wavefront' is not possible with cache"),
        (
            lambda model: model.generate(tiny_ids(1, 9), prompt_lookup_num_tokens=2),
            "not possible with cache policy 'fi",
        ),
        (lambda model: model.generate(tiny_ids(1, 3), cache_implementation="static"), "a static cache is not possible"),
        (lambda model: RecurrentCache.of_prefix(model.config, None), "a prefix of keys and values is not possible"),
    ],
)
def test_what_does_not_go_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(model_of(2))


def test_backends_and_models_without_a_mask_of_two_parts_are_refused():
    model, ids = model_of(2), tiny_ids(1, 4)
    for backend in ("flex_attention", "flash_attention_2"):
        model.config._attn_implementation = backend
        with pytest.raises(ValueError, match=f"cache policy 'first' is not possible with {backend}; use sdpa or eager"):
            model(ids)
    model.config._attn_implementation, model.config.is_causal = "sdpa", False
    with pytest.raises(ValueError, match="cache policy 'first' is not possible without a causal mask"):
        model(ids, use_cache=False)


def test_residuals_need_heads_of_whole_bytes_and_caches_that_grow():
    for config, size, message in (
        (tiny_config(head_dim=6), {}, "packs four numbers in a byte, and head_dim is 6"),
        (tiny_config(), {"max_length": 9}, "a static cache is not possible with cache policy 'residual'"),
    ):
        assert isinstance(config, MegaTransformerTextConfig)
        with pytest.raises(ValueError, match=message):
            RecurrentCache(config, "residual", **size)
    for options in ({"decoding": "wavefront"}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="not possible with cache policy 'residual'"):
            tiny_model().generate(tiny_ids(1, 9), cache_policy="residual", **options)
    with pytest.raises(ValueError, match="a prefix of keys and values is not possible with cache policy 'residual'"):
        RecurrentCache.of_prefix(tiny_config(recurrence={"cache_policy": "residual"}), None)

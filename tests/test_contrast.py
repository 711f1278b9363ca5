"""Contrast between the states of a token: what is read, and that it leaves no trace."""

import copy
import math

import pytest
import torch

from model import RecurrentCache
from model.depth import ContrastOptions, keyed_generator
from model.modeling_megatransformer import take_media
from tests.test_writing import targets_of
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_seq2seq import tiny_seq2seq
from tests.tiny_writing import tiny_writer

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def last_logits(model, ids, cache=None, **options) -> torch.Tensor:
    """(rows, vocab), behind the last token."""
    with torch.no_grad():
        cache = RecurrentCache(model.config) if cache is None else cache
        return model(ids, cache=cache, logits_to_keep=1, num_steps=5, **options).logits[:, -1]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("step", [1, 3])
def test_it_is_the_formula(step, alpha):
    """Without coda, so that nothing else comes between the states and the head."""
    model, ids = tiny_model(scale=2.0, num_coda_layers=0), tiny_ids(3, 6)
    with torch.no_grad():
        states = [state[:, -1] for state in model(ids, num_steps=5, output_states=True).states]
        norm = model.model.norm
        late, mixed = (
            model.lm_head(norm(norm(state))) for state in (states[-1], states[-1] + 0.4 * (states[-1] - states[step]))
        )
    if alpha:
        p = late.softmax(-1)
        mixed[p < alpha * p.amax(-1, keepdim=True)] = -math.inf
    found = last_logits(model, ids, contrast=ContrastOptions(0.4, step, alpha))
    torch.testing.assert_close(found, mixed, **CLOSE)
    assert (found == -math.inf).any() == bool(alpha)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("chunks", [[1] * 8, [5, 3]])
def test_chunks_do_not_matter_and_the_cache_is_that_of_plain_reading(chunks, position):
    model, ids, contrast = tiny_model(scale=2.0, position_embedding=position), tiny_ids(2, 8), ContrastOptions(0.4)
    whole, cache, plain = last_logits(model, ids, contrast=contrast), RecurrentCache(model.config), None
    for part in ids.split(chunks, dim=1):
        found = last_logits(model, part, cache, contrast=contrast)
    torch.testing.assert_close(found, whole, **CLOSE)
    assert (whole - last_logits(model, ids)).abs().max() > 0.1
    plain = RecurrentCache(model.config)
    last_logits(model, ids, plain)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.buffer[..., :8, :], theirs.buffer[..., :8, :], **CLOSE)


def test_a_single_state_has_no_contrast():
    """Nor has a row that stops at the step with which it is compared."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 4)
    contrast = ContrastOptions(0.4, step=2, alpha=0.0)
    with torch.no_grad():
        found, plain = (
            model(ids, cache=RecurrentCache(model.config), num_steps=torch.tensor([2, 5]), **options).logits[:, -1]
            for options in ({"contrast": contrast}, {})
        )
    torch.testing.assert_close(found[0], plain[0], **CLOSE)
    assert (found[1] - plain[1]).abs().max() > 0.1


@pytest.mark.parametrize("exits", [{}, {"exit_criterion": "kl_divergence", "exit_threshold": 0.1}])
def test_generate_writes_what_a_loop_of_forward_passes_does(exits):
    model, ids = tiny_model(scale=2.0), tiny_ids(1, 5)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "num_steps": 5, "do_sample": False, **exits}
    found = model.generate(ids, contrast_strength=0.8, contrast_step=2, contrast_alpha=0.2, **options)
    if not exits:
        expected = ids
        for _ in range(8):
            logits = last_logits(model, expected, contrast=ContrastOptions(0.8, 2, 0.2))
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(ids, **options))


def test_off_is_bitwise_unchanged():
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 5)
    options = {"max_new_tokens": 6, "num_steps": 4, "output_logits": True, "return_dict_in_generate": True}
    plain, off = model.generate(ids, **options), model.generate(ids, contrast_strength=0.0, **options)
    assert all(map(torch.equal, plain.logits, off.logits)) and torch.equal(plain.sequences, off.sequences)


def test_the_generation_config_may_hold_it():
    model, ids = tiny_model(scale=2.0), tiny_ids(1, 5)
    config = copy.deepcopy(model.generation_config)
    config.contrast_strength, config.contrast_step = 0.8, 2
    found = model.generate(ids, generation_config=config, max_new_tokens=8)
    assert torch.equal(found, model.generate(ids, contrast_strength=0.8, contrast_step=2, max_new_tokens=8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contrast_strength": math.inf}, "contrast_strength must be a finite number"),
        ({"contrast_strength": 0.2, "contrast_step": 0}, "contrast_step must be an integer of at least 1, got 0"),
        ({"contrast_strength": 0.2, "contrast_alpha": 2.0}, "contrast_alpha must be from 0 to 1"),
        ({"contrast_step": 2}, "contrast_step has no effect without contrast_strength"),
        ({"contrast_strength": 0.2, "use_cache": False}, "contrast is possible with a cache"),
        ({"contrast_strength": 0.2, "decoding": "wavefront"}, "not possible with contrast_strength"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        tiny_model().generate(tiny_ids(1, 4), max_new_tokens=2, **options)


def test_models_without_core_or_behind_an_encoder():
    with pytest.raises(ValueError, match="contrast_strength was given, but this model has no core"):
        tiny_model(num_core_layers=0).generate(tiny_ids(1, 4), contrast_strength=0.2)
    model, ids = tiny_seq2seq(scale=2.0), tiny_ids(1, 4)
    plain, found = model.generate(ids), model.generate(ids, contrast_strength=3.0)
    assert not torch.equal(plain, found)


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["no guidance", "guidance"])
@pytest.mark.parametrize("name", ["image", "audio"])
@torch.no_grad()
def test_latents_follow_the_velocity_of_the_formula(name, scale):
    """Against the states of one pass over what was written, without coda, and Euler's method in three lines."""
    model, prompt = tiny_writer(scale=2.0, num_coda_layers=0), torch.tensor([[20, 21, 22, 23]])
    options = {"generation_mode": name, "guidance_scale": scale, "flow_seeds": [7], "num_steps": 5, "num_flow_steps": 3}
    found = model.generate(prompt, **options, contrast_strength=0.7, contrast_step=2)
    latents, writer, norm = found.latents[name][0], model.model.writers[name], model.model.norm
    places = torch.arange(len(latents))

    def condition(start, step):
        ids = torch.cat((start, found.sequences[:, prompt.shape[1] :]), dim=1)
        media = targets_of(found, model)
        states = model.model(input_ids=ids, num_steps=5, output_states=True, **media).states
        read = model.model.embed(ids, take_media(media)).targets.latents[name]
        return writer.condition(norm(norm(states[step][read.rows, read.columns - 1])), places)

    bare = torch.full_like(prompt, model.config.null_token_id)
    late, early, free = condition(prompt, -1), condition(prompt, 2), condition(bare, -1)
    noise = torch.randn(writer.num_places, latents.shape[1], generator=keyed_generator("sample", name, 7, 0))
    expected = noise[: len(latents)]
    for time in torch.arange(3) / 3:
        of = {
            what: writer.head.velocity(expected, time.expand(len(places)), it)
            for what, it in (("late", late), ("early", early), ("free", free))
        }
        velocity = of["free"] + scale * (of["late"] - of["free"]) + 0.7 * (of["late"] - of["early"])
        expected = expected + velocity / 3
    torch.testing.assert_close(latents, writer.codec.project(expected), **CLOSE)
    plain, off = (model.generate(prompt, **options, **given) for given in ({}, {"contrast_strength": 0.0}))
    assert torch.equal(plain.latents[name][0], off.latents[name][0])
    assert not torch.allclose(plain.latents[name][0], latents[: len(plain.latents[name][0])], atol=0.01)


def test_texts_between_media_have_no_contrast():
    model, prompt = tiny_writer(), torch.tensor([[20, 21, 22, 23]])
    with pytest.raises(ValueError, match="contrast_strength"):
        model.generate(prompt, generation_mode="any", contrast_strength=0.2)
    with pytest.raises(ValueError, match="contrast_alpha"):
        model.generate(prompt, generation_mode="image", contrast_strength=0.2, contrast_alpha=0.3)

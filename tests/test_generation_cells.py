"""Every way to generate x every way to begin x every cache policy x positions: the tokens of a second way.

What is not possible is at the end, with the error that it raises.
"""

import pytest
import torch
from torch import nn

from model import RecurrentCache
from model.generation_text import CACHE_OPTIONS
from tests.tiny import PAD, tiny_ids, tiny_model

STEPS, NEW = 3, 6
POLICIES = {"full": {}, "ring": {"num_kept_steps": 2}, "wide ring": {"num_kept_steps": STEPS}, "last": {}}
POLICIES |= {"first": {"num_kept_tokens": 3}, "residual": {}}
EXACT = ("full", "wide ring")  # policies under which a cache changes nothing
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3},
    "assisted": {"assistant_model": None},  # filled in
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
BEGINNINGS = ("left padding", "chunked prefill", "continue from a returned cache", "inputs_embeds")
LOSSLESS_ONLY = ("assisted", "prompt lookup")
CELLS = [
    (mode, policy, beginning)
    for mode in MODES
    for policy in POLICIES
    for beginning in BEGINNINGS
    if mode not in LOSSLESS_ONLY or (policy in EXACT and beginning != "inputs_embeds")
]


@pytest.fixture(scope="module")
def models():
    """By position: the model, and a smaller one that drafts for it."""
    found = {}
    for position in ("rope", "alibi"):
        model, assistant = tiny_model(scale=2.0, position_embedding=position), tiny_model(seed=1, num_core_layers=0)
        model.generation_config.eos_token_id = assistant.generation_config.eos_token_id = None
        found[position] = model, assistant
    return found


def options_of(mode: str, policy: str, assistant) -> dict:
    options = {"max_new_tokens": NEW, "num_steps": STEPS, "do_sample": False, **MODES[mode], **POLICIES[policy]}
    options["cache_policy"] = "ring" if policy == "wide ring" else policy
    return {**options, "assistant_model": assistant} if mode == "assisted" else options


def new_tokens(model, prompt: torch.Tensor, **options) -> torch.Tensor:
    """(rows, NEW); seeded."""
    torch.manual_seed(11)
    return model.generate(prompt, **options)[:, -NEW:]


def prefilled(model, chunks, policy: str) -> RecurrentCache:
    """A cache that holds these chunks, each put in by a pass of its own."""
    cache = RecurrentCache(model.config, "ring" if policy == "wide ring" else policy, **POLICIES[policy])
    for chunk in chunks:
        with torch.no_grad():
            model(chunk, cache=cache, num_steps=STEPS)
    return cache


def by_hand(model, mode: str, policy: str, chunks) -> torch.Tensor:
    """Greedy decoding or sampling, one row, the prompt in these chunks, with nothing of `generate`."""
    cache, tokens = prefilled(model, chunks[:-1], policy), [chunks[-1]]
    torch.manual_seed(11)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(tokens[-1], cache=cache, num_steps=STEPS).logits[:, -1]
        draw = torch.multinomial(logits.softmax(-1), 1) if mode == "sampling" else logits.argmax(-1, keepdim=True)
        tokens.append(draw)
    return torch.cat(tokens[1:], dim=1)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize(("mode", "policy", "beginning"), CELLS)
def test_cell(models, position, mode, policy, beginning):
    """Invariant 1. Where nothing is lost, the second way is `generate` without a cache; elsewhere decoding by hand, or,
    for beams, a cache that was filled by hand.
    """
    model, assistant = models[position]
    prompt = tiny_ids(1, 7).repeat(1, 2)  # repeats itself, so that there is something to look up
    options, chunks = options_of(mode, policy, assistant), [prompt]
    if beginning == "left padding":
        padded = nn.functional.pad(prompt, (3, 0), value=PAD)
        ours = new_tokens(model, padded, attention_mask=(padded != PAD).long(), **options)
    elif beginning == "chunked prefill":
        chunks = list(prompt.split([4, 5, 5], dim=1))  # counted from the end
        ours = new_tokens(model, prompt, prefill_chunk_size=5, **options)
    elif beginning == "continue from a returned cache":
        chunks = list(prompt.split([9, 5], dim=1))
        cache = prefilled(model, chunks[:1], policy)
        rows = MODES[mode].get("num_beams", 1)
        cache.batch_repeat_interleave(rows)
        given = {name: value for name, value in options.items() if name not in CACHE_OPTIONS}
        ours = new_tokens(model, prompt, cache=cache, **given)
    else:
        embeds = model.get_input_embeddings()(prompt)
        torch.manual_seed(11)
        ours = model.generate(inputs_embeds=embeds, **options)

    if policy in EXACT:
        whole = {name: value for name, value in options.items() if name not in CACHE_OPTIONS}
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            whole.pop(name, None)
        expected = new_tokens(model, prompt, use_cache=False, **whole)
    elif mode == "beam":
        cache = prefilled(model, chunks[:-1], policy)
        cache.batch_repeat_interleave(3)
        given = {"cache": cache} if len(chunks) > 1 else {}
        for name in CACHE_OPTIONS if given else ():
            options.pop(name, None)
        expected = new_tokens(model, prompt, **given, **options)
    else:
        expected = by_hand(model, mode, policy, chunks)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_a_prompt_go_on_from_no_token(models, size):
    """One that is a single token, too, where new ones begin with the state of the token before."""
    model, ids = models["rope"][0], tiny_ids(2, 9)
    options = {"max_new_tokens": NEW, "num_steps": STEPS, "do_sample": False, "state_warm_start": True}
    assert torch.equal(new_tokens(model, ids, prefill_chunk_size=size, **options), new_tokens(model, ids, **options))


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_chunks_have_a_number_of_tokens(models, size):
    model, ids = models["rope"][0], tiny_ids(1, 6)
    with pytest.raises(ValueError, match=rf"prefill_chunk_size is {size!r}; give a whole number of at least 1"):
        model.generate(ids, prefill_chunk_size=size, max_new_tokens=1)
    with pytest.raises(ValueError, match="prefill_chunk_size is not possible with inputs_embeds"):
        embeds = model.get_input_embeddings()(ids)
        model.generate(inputs_embeds=embeds, prefill_chunk_size=size, max_new_tokens=1)


@pytest.mark.parametrize("policy", ["ring", "last", "first", "residual"])
@pytest.mark.parametrize("mode", LOSSLESS_ONLY)
def test_policies_that_lose_something_refuse_to_check_tokens_together(models, mode, policy):
    """They would see each other at their own step, and the steps kept of each other when they come one by one."""
    model, assistant = models["rope"]
    with pytest.raises(
        ValueError, match=f"assisted generation of 3 steps is not possible with cache policy '{policy}'"
    ):
        model.generate(tiny_ids(1, 6), **options_of(mode, policy, assistant))


@pytest.mark.parametrize("mode", LOSSLESS_ONLY)
def test_checking_tokens_together_needs_the_ids_of_the_prompt(models, mode):
    model, assistant = models["rope"]
    ids = tiny_ids(1, 6)
    with pytest.raises(ValueError, match="assisted generation is not possible with inputs_embeds"):
        model.generate(ids, inputs_embeds=model.get_input_embeddings()(ids), **options_of(mode, "full", assistant))


@pytest.mark.parametrize("mode", LOSSLESS_ONLY)
def test_checking_tokens_together_is_for_one_row(models, mode):
    model, assistant = models["rope"]
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(tiny_ids(2, 6), **options_of(mode, "full", assistant))


def test_a_draft_has_the_depth_of_its_own_generation_config(models):
    """Not that of the model which checks it."""
    model, depths = models["rope"][0], []
    draft = tiny_model(seed=2, scale=2.0)
    draft.generation_config.eos_token_id, draft.generation_config.num_steps = None, 2
    draft.register_forward_pre_hook(lambda module, args, kwargs: depths.append(kwargs["num_steps"]), with_kwargs=True)
    ids = tiny_ids(1, 6)
    ours = new_tokens(model, ids, assistant_model=draft, num_steps=STEPS, max_new_tokens=NEW, do_sample=False)
    assert set(depths) == {2}
    assert torch.equal(ours, new_tokens(model, ids, num_steps=STEPS, max_new_tokens=NEW, do_sample=False))

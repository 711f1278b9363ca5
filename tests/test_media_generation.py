"""`generate` with media in the prompt: every cell against the same model without a cache; what is not possible, with
its error.
"""

import pytest
import torch
from torch import nn

from model import RecurrentCache
from tests.tiny import PAD, tiny_model
from tests.tiny_media import IMAGE, row_of, tiny_inputs, tiny_media_model

STEPS, NEW = 3, 5
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": None},  # filled in
}
BEGINNINGS = ("as it is", "left padding", "chunked prefill", "continue from a returned cache", "static cache")
IMPOSSIBLE = {("assisted", "static cache"), ("prompt lookup", "static cache")}  # in transformers


@pytest.fixture(scope="module")
def models():
    """By position: the model, and a smaller one that drafts for it, from the text alone."""
    found = {}
    for position in ("rope", "alibi"):
        model, draft = tiny_media_model(scale=2.0, position_embedding=position), tiny_model(seed=1, num_core_layers=0)
        model.generation_config.eos_token_id = draft.generation_config.eos_token_id = None
        found[position] = model, draft
    return found


def options_of(mode: str, draft) -> dict:
    options = {"max_new_tokens": NEW, "num_steps": STEPS, "do_sample": False, **MODES[mode]}
    return {**options, "assistant_model": draft} if mode == "assisted" else options


def new_tokens(model, inputs: dict, **options) -> torch.Tensor:
    return written(model, inputs, **options)[0]


def written(model, inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens, and the logits of each: tokens may be the same by luck."""
    torch.manual_seed(11)
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -NEW:], torch.stack(out.logits[:NEW], dim=1)


def plain(options: dict) -> dict:
    """The options without those that only make decoding faster."""
    return {
        name: value for name, value in options.items() if name not in ("assistant_model", "prompt_lookup_num_tokens")
    }


CELLS = [(mode, start) for mode in MODES for start in BEGINNINGS if (mode, start) not in IMPOSSIBLE]


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize(("mode", "beginning"), CELLS)
def test_cell(models, position, mode, beginning):
    """Invariant 1 of a prompt with two images, which the cuts go through."""
    model, draft = models[position]
    inputs, options = row_of(tiny_inputs(), 1), options_of(mode, draft)
    expected = written(model, inputs, use_cache=False, **plain(options))
    if beginning == "left padding":
        ids = nn.functional.pad(inputs["input_ids"], (3, 0), value=PAD)
        inputs = {**inputs, "input_ids": ids, "attention_mask": (ids != PAD).long()}
    elif beginning == "chunked prefill":
        options["prefill_chunk_size"] = 6
    elif beginning == "static cache":
        options["cache_implementation"] = "static"
    elif beginning == "continue from a returned cache":
        cache = RecurrentCache(model.text_config)
        first = {"input_ids": inputs["input_ids"][:, :7], "mm_encoder_outputs": features_of(model, inputs, (1, 2))}
        with torch.no_grad():
            model(**first, cache=cache, num_steps=STEPS)
        cache.batch_repeat_interleave(MODES[mode].get("num_beams", 1))
        options["cache"] = cache
    tokens, logits = written(model, inputs, **options)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], atol=1e-4, rtol=1e-4)


def features_of(model, inputs: dict, counts: tuple[int, ...]) -> dict:
    """The first features of each image of a row, so many of each."""
    with torch.no_grad():
        output = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    output.pooler_output = [part[:count] for part, count in zip(output.pooler_output, counts, strict=True)]
    return {"image": output}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 5}], ids=str
)
def test_a_batch_with_any_mix_of_media_is_each_of_its_rows(models, options):
    model, _ = models["rope"]
    inputs, options = tiny_inputs(), {**options_of("greedy", None), **options}
    together = new_tokens(model, inputs, **options)
    alone = [new_tokens(model, row_of(inputs, row), **options) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("criterion", ["kl_divergence", "latent_difference"])
def test_a_row_that_exits_is_the_row_alone_with_those_steps(models, criterion):
    """Invariant 4: alone, with the depths that it took as a schedule."""
    model, _ = models["rope"]
    inputs = tiny_inputs()
    options = {"max_new_tokens": NEW, "do_sample": False, "num_steps": 6, "return_dict_in_generate": True}
    threshold = {"kl_divergence": 0.2, "latent_difference": 0.3}[criterion]
    out = model.generate(**inputs, exit_criterion=criterion, exit_threshold=threshold, **options)
    assert out.exit_steps.shape == (3, NEW) and len(out.exit_steps[:, 1:].unique()) > 1
    for row in range(3):
        schedule = {"exit_criterion": "schedule", "exit_schedule": out.exit_steps[row].tolist()}
        alone = model.generate(**row_of(inputs, row), **schedule, **options)
        assert torch.equal(alone.sequences[0], out.sequences[row])


def test_a_placeholder_is_never_written(models):
    """Its logit is the largest everywhere here."""
    model = tiny_media_model(scale=2.0, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = 100 * model(**tiny_inputs(), num_steps=1).state.mean(dim=(0, 1))
    tokens = new_tokens(model, tiny_inputs(), max_new_tokens=NEW, do_sample=False)
    assert not (tokens == IMAGE).any()


def test_media_beside_embeddings_or_misspelt_are_refused(models):
    model, _ = models["rope"]
    inputs = row_of(tiny_inputs(), 1)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="need input_ids with their placeholders"):
        model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], max_new_tokens=1)
    tokens = model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False)  # without media
    assert tokens.shape == (1, 2)
    with pytest.raises(ValueError, match="pixel_value"):
        model.generate(inputs["input_ids"], pixel_value=inputs["pixel_values"], max_new_tokens=1)
    with pytest.raises(ValueError, match="sample 0 has 5 placeholders of image"):
        model.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"][:1], max_new_tokens=1)


@pytest.mark.parametrize("mode", ["assisted", "prompt lookup"])
def test_checking_tokens_together_needs_a_cache_that_grows(models, mode):
    model, draft = models["rope"]
    with pytest.raises(ValueError, match="not possible with a static cache"):
        model.generate(**row_of(tiny_inputs(), 1), cache_implementation="static", **options_of(mode, draft))

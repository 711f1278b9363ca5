"""Conversations in which media were read and generated before: whatever `generate` is asked for, a row in a batch is
the row alone, and a turn that goes on from a cache is the turn behind the whole conversation.
"""

from copy import deepcopy

import pytest
import torch
from transformers import LogitsProcessorList

from model import RecurrentCache
from tests.test_writing import Script
from tests.tiny_codecs import tiny_autoencoder
from tests.tiny_conversations import Conversation, batch_of, random_turns
from tests.tiny_writing import (
    ASSISTANT,
    AUDIO_START,
    BEGIN,
    END,
    FIRST_TEXT,
    IMAGE_START,
    USER,
    WRITTEN_IMAGE,
    tiny_writer,
    written_image,
)

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STEPS, NEW = 3, 5


@pytest.fixture(scope="module")
def model():
    model = tiny_writer(scale=1.5)
    model.generation_config.eos_token_id = None
    return model


def options_of(mode: str, seeds: list[int], **options) -> dict:
    """Options of `generate`, the same whatever is in the batch."""
    shared = {"num_steps": STEPS, "do_sample": False, "return_dict_in_generate": True, **options}
    if mode == "text":
        return {"max_new_tokens": NEW, "output_logits": True, **shared}
    shared |= {"generation_mode": mode, "flow_seeds": seeds}
    if mode in ("image", "audio"):
        shared.pop("top_k", None)
    return {"max_new_tokens": 16, **shared} if mode == "any" else shared


def assert_same_row(row: int, together, start: int, alone, length: int) -> None:
    """Compares the tokens, media and steps of a row of a batch with those of the row alone; of texts logits, too."""
    expected = alone.sequences[0, length:].tolist()
    found = together.sequences[row, start:].tolist()
    assert found[: len(expected)] == expected
    steps = together.exit_steps[row].tolist()
    assert steps[: len(expected)] == alone.exit_steps[0].tolist() and not any(steps[len(expected) :])
    if "segments" not in alone:
        if "beam_indices" not in alone:
            both = (torch.stack(one.logits, dim=1)[place] for one, place in ((together, row), (alone, 0)))
            torch.testing.assert_close(*both, **CLOSE)
        return
    assert [kind for kind, _ in together.segments[row]] == [kind for kind, _ in alone.segments[0]]
    for (kind, number), (_, place) in zip(together.segments[row], alone.segments[0], strict=True):
        if kind != "text":
            torch.testing.assert_close(together.latents[kind][number], alone.latents[kind][place], **CLOSE)


WAYS = {
    "plain": {},
    "ring": {"cache_policy": "ring", "num_kept_steps": 2},
    "last": {"cache_policy": "last"},
    "first": {"cache_policy": "first", "num_kept_tokens": 3},
    "residual": {"cache_policy": "residual"},
    "exits": {"exit_criterion": "latent_difference", "exit_threshold": 0.3},
    "chunks": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 2},
    "sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
}
MODES = ("text", "image", "audio", "any")
CELLS = [(mode, way) for mode in MODES for way in WAYS if mode == "text" or way != "beams"]


def check_rows(model, conversations: list[Conversation], mode: str, options: dict) -> None:
    """Compares each row of a batch, and each of its sequences, with the row alone."""
    inputs, copies = batch_of(conversations), options.get("num_return_sequences", 1)
    seeds = [row for row in range(len(conversations)) for _ in range(copies)]
    together = model.generate(**inputs, **options_of(mode, seeds, **options))
    for row, conversation in enumerate(conversations):
        alone = model.generate(**batch_of([conversation]), **options_of(mode, [row] * copies, **options))
        for copy in range(copies):
            assert_same_row(row * copies + copy, together, inputs["input_ids"].shape[1], alone, len(conversation.ids))


@pytest.mark.parametrize(("mode", "way"), CELLS)
def test_rows_of_a_batch_are_the_rows_alone(model, mode, way):
    check_rows(model, [random_turns(seed, num_turns=1 + seed % 3) for seed in range(3)], mode, WAYS[way])


POLICIES = {"full": {}, "ring": {"cache_policy": "ring", "num_kept_steps": 2}, "last": {"cache_policy": "last"}}
POLICIES |= {name: WAYS[name] for name in ("first", "residual")}
MANY = [
    (mode, policy, way)
    for mode in MODES
    for policy in POLICIES
    for way in ("plain", "exits", "beams", "sequences", "chunks")
    if mode == "text" or way != "beams"
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "policy", "way"), MANY)
def test_200_random_conversations(model, mode, policy, way):
    """Batches of 8 ragged rows, more than 25 of them."""
    seed = 1000 + 8 * MANY.index((mode, policy, way))
    conversations = [random_turns(seed + row, num_turns=1 + (seed + row) % 4) for row in range(8)]
    check_rows(model, conversations, mode, {**POLICIES[policy], **WAYS[way]})


CHUNKED = [
    ("image", {"guidance_scale": 2.5}),
    ("audio", {"guidance_scale": 1.0, "state_warm_start": True}),
    ("any", {"guidance_scale": 2.5, "cache_implementation": "static"}),
]


def check_chunks(model, seeds: range, mode: str, options: dict) -> None:
    """Compares prompts in chunks with whole ones."""
    inputs = batch_of([random_turns(seed, num_turns=1 + seed % 3) for seed in seeds])
    whole = model.generate(**inputs, **options_of(mode, list(seeds), **options))
    for size in (1, 7):
        found = model.generate(**inputs, **options_of(mode, list(seeds), prefill_chunk_size=size, **options))
        assert torch.equal(found.sequences, whole.sequences) and torch.equal(found.exit_steps, whole.exit_steps)
        for name, latents in whole.latents.items():
            torch.testing.assert_close(found.latents[name], latents, **CLOSE)


@pytest.mark.parametrize(("mode", "options"), CHUNKED, ids=str)
def test_prompts_in_chunks_are_the_whole_prompts(model, mode, options):
    """Of ragged rows, with media that were read and generated, through which the cuts go."""
    check_chunks(model, range(1, 3), mode, options)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("mode", MODES[1:])
def test_random_prompts_in_chunks_are_the_whole_prompts(model, mode, scale):
    check_chunks(model, range(300, 308), mode, {"guidance_scale": scale})


@pytest.mark.parametrize("way", ["full", "ring", "last"])
def test_a_text_of_any_mode_is_that_of_text_mode(model, way):
    """Also in chunks, with a short memory, where no item is opened."""
    inputs = batch_of([random_turns(seed, num_turns=2) for seed in (1, 2)])
    asked = {**POLICIES[way], "prefill_chunk_size": 5, "suppress_tokens": list(range(FIRST_TEXT))}
    text = model.generate(**inputs, **options_of("text", [], **asked))
    found = model.generate(
        **inputs, **options_of("any", [1, 2], guidance_scale=1.0, **{**asked, "max_new_tokens": NEW})
    )
    assert torch.equal(found.sequences, text.sequences) and torch.equal(found.exit_steps, text.exit_steps)


def whole_pass(model, conversation: Conversation, ids: torch.Tensor) -> torch.Tensor:
    """The logits of all that was written behind a conversation, (new tokens, vocab), by one pass without a cache."""
    media = {name: it for name, it in batch_of([conversation]).items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(input_ids=ids[None], **media, num_steps=STEPS).logits[0]
    return logits[len(conversation.ids) - 1 : -1]


@pytest.mark.parametrize("way", [{}, {"prefill_chunk_size": 7}, {"use_cache": False}], ids=str)
def test_text_behind_generated_media_is_that_of_a_whole_pass(model, way):
    """Each token is the likeliest, behind media that were read, drawn and played."""
    conversation = random_turns(seed=1, num_turns=3)
    assert all((conversation.images, conversation.clips, conversation.drawn, conversation.played))
    ids = model.generate(**batch_of([conversation]), **options_of("text", [], **way)).sequences[0]
    logits = whole_pass(model, conversation, ids)
    logits[:, model.placeholder_ids] = -torch.inf
    assert logits.argmax(-1).tolist() == ids[len(conversation.ids) :].tolist()


def test_beams_behind_generated_media_have_the_probabilities_of_a_whole_pass(model):
    """Two prompts with other media each, two beams of each."""
    conversations = [random_turns(seed, num_turns=2) for seed in (1, 2)]
    beams = {"num_beams": 2, "num_return_sequences": 2, "output_scores": True}
    found = model.generate(**batch_of(conversations), **options_of("text", [], **beams))
    for number, (ids, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
        conversation = conversations[number // 2]
        ids = ids[-NEW - len(conversation.ids) :]
        log_p = whole_pass(model, conversation, ids).log_softmax(-1).gather(1, ids[-NEW:, None])
        torch.testing.assert_close(log_p.mean(), score, **CLOSE)


def test_codes_of_generated_images_are_read_once(model):
    """With a head "fsq": the text, drawn images among it, is that of a prompt that has the codes."""
    image = {"codec": "autoencoder", "head": "fsq"}
    config = tiny_autoencoder(bottleneck="fsq", fsq_levels=[3, 5], image_size=8, latent_size=2).config.to_dict()
    model = tiny_writer(scale=1.5, image={**image, "codec_config": config}, code_offset=40, vocab_size=55)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.rand(3, 8, 8, generator=generator) * 2 - 1 for _ in range(3)]
    rows = [
        Conversation([BEGIN, USER, 20, ASSISTANT, *written_image(), 21, *written_image(), END, USER, 22, ASSISTANT]),
        Conversation([BEGIN, USER, 20, ASSISTANT, *written_image(), END, USER, 22, ASSISTANT]),
    ]
    rows[0].drawn, rows[1].drawn = drawn[:2], drawn[2:]
    inputs = batch_of(rows)
    coded = model.with_codes({**inputs, "labels": inputs["input_ids"]})
    ids = {"input_ids": coded["input_ids"], "attention_mask": inputs["attention_mask"]}
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 5}):
        options = options_of("text", [], **options)
        found, expected = model.generate(**inputs, **options), model.generate(**ids, **options)
        assert torch.equal(found.sequences, expected.sequences)
    assert not (found.sequences == WRITTEN_IMAGE).any()


# ------------------------------------------------------------------------------------- a turn that goes on from a cache


def first_turn(model, prompts: list[Conversation], scale: float, **room):
    """Rows draw and play in turn; what came out, and the conversations with it, as prompts of their own."""
    inputs = batch_of(prompts)
    scripts = [{1: IMAGE_START} if row % 2 == 0 else {0: AUDIO_START} for row in range(len(prompts))]
    script = LogitsProcessorList([Script(inputs["input_ids"].shape[1], *scripts)])
    options = options_of("any", list(range(len(prompts))), guidance_scale=scale, max_new_tokens=9, **room)
    outputs = model.generate(**inputs, **options, logits_processor=script)
    whole = []
    for row, prompt in enumerate(prompts):
        new = Conversation(outputs.sequences[row, inputs["input_ids"].shape[1] :].tolist())
        for kind, number in outputs.segments[row]:
            if kind == "image":
                latents = outputs.latents["image"][number]
                new.drawn.append(torch.nn.functional.fold(latents.T[None] / 2, 8, 4, stride=4)[0])
            elif kind == "audio":
                new.played.append(model.model.writers["audio"].codec.log_mel(outputs.latents["audio"][number]))
        whole.append(prompt + new)
    assert whole[0].drawn and whole[1].played
    return outputs, inputs["attention_mask"], whole


def check_second_turn(model, prompts: list[Conversation], new: list[Conversation], mode, scale, gives, **room) -> None:
    """Compares a turn on the returned cache with each row alone and anew."""
    outputs, mask, whole = first_turn(model, prompts, scale or 2.5, **room)
    turn = batch_of(new)
    mask = torch.cat((mask, torch.ones(len(new), 9, dtype=torch.long), turn["attention_mask"]), dim=1)
    whole = [row + turn for row, turn in zip(whole, new, strict=True)]
    inputs = {**(turn if gives == "new media" else batch_of(whole)), "attention_mask": mask}
    inputs["input_ids"] = torch.cat((outputs.sequences, turn["input_ids"]), dim=1)
    options = {} if scale is None else {"guidance_scale": scale}
    seeds = list(range(len(new)))
    after = model.generate(**inputs, **options_of(mode, seeds, **options), past_key_values=outputs.past_key_values)
    for row, conversation in enumerate(whole):
        alone = model.generate(**batch_of([conversation]), **options_of(mode, [row], **options))
        assert_same_row(row, after, mask.shape[1], alone, len(conversation.ids))


@pytest.mark.parametrize(
    ("mode", "scale", "gives"),
    [
        ("text", None, "all media"),
        ("text", None, "new media"),
        ("image", 1.0, "new media"),
        ("audio", 2.5, "all media"),
        ("any", 1.0, "all media"),
        ("any", 2.5, "all media"),
        ("image", 2.5, "all media, and a cache of static size"),
    ],
)
def test_a_second_turn_on_the_returned_cache_is_the_whole_conversation(model, mode, scale, gives):
    """Two rows of several lengths, with media read and generated in both turns."""
    new = [random_turns(seed, 1, begins=False) for seed in (5, 3)]
    assert any(each.images for each in new) and len(new[0].ids) != len(new[1].ids)
    room = {"cache_implementation": "static", "max_cache_len": 150} if "static" in gives else {}
    check_second_turn(model, [random_turns(seed, 2) for seed in (1, 2)], new, mode, scale, gives, **room)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_second_turns_of_random_conversations(model, seed):
    mode, scale = (("text", None), ("image", 1.0), ("audio", 2.5), ("any", 2.5))[seed % 4]
    rows = range(100 * seed, 100 * seed + 4)
    new = [random_turns(row + 50, 1 + row % 2, begins=False) for row in rows]
    gives = "all media" if seed % 8 < 4 or scale == 2.5 else "new media"
    check_second_turn(model, [random_turns(row, 1 + row % 3) for row in rows], new, mode, scale, gives)


def test_guidance_on_a_cache_needs_the_whole_prompt(model):
    """Of which it reads the part that the cache holds again, without its text."""
    outputs, mask, _ = first_turn(model, [random_turns(seed, 2) for seed in (1, 2)], 1.0)
    new = batch_of([random_turns(3, 1, begins=False)] * 2)
    mask = torch.cat((mask, torch.ones(2, 9 + new["input_ids"].shape[1], dtype=torch.long)), dim=1)
    ids = torch.cat((outputs.sequences[:, -1:], new["input_ids"]), dim=1)
    options = options_of("image", [3, 4], guidance_scale=2.0, past_key_values=outputs.past_key_values)
    with pytest.raises(ValueError, match="guidance reads all of the prompt a second time"):
        model.generate(**{**new, "input_ids": ids, "attention_mask": mask}, **options)


@pytest.mark.parametrize("policy", ["first", "residual"])
def test_guidance_on_a_cache_that_rows_cannot_be_added_to_is_refused(model, policy):
    ids, cache = torch.tensor([random_turns(1, 1).ids]), RecurrentCache(model.text_config, policy)
    with torch.no_grad():
        model.model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match=f"guidance on a cache .* is not possible with cache policy '{policy}'"):
        model.generate(ids, **options_of("image", [3], guidance_scale=2.0, past_key_values=cache))


def test_a_cache_that_holds_the_whole_prompt_is_refused(model):
    conversation = random_turns(1, 1)
    cache = model.generate(**batch_of([conversation]), **options_of("text", [])).past_key_values
    with pytest.raises(ValueError, match=rf"the cache holds {len(conversation.ids) + NEW - 1} tokens, and the prompt"):
        model.generate(torch.tensor([conversation.ids]), **options_of("text", []), past_key_values=cache)


# -------------------------------------------------------------------------------------------------------------- drafts


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}], ids=str)
def test_a_draft_reads_the_media_itself(model, options):
    """The text is that without a draft; of a draft that is the model itself, all that is drafted is right, so that few
    passes check it.
    """
    conversation = random_turns(seed=1, num_turns=3)
    inputs, options = batch_of([conversation]), options_of("text", [], max_new_tokens=8, **options)
    expected = model.generate(**inputs, **options)
    itself, other = deepcopy(model), tiny_writer(scale=1.0)
    itself.generation_config.num_steps, itself.generation_config.assistant_confidence_threshold = STEPS, 0.0
    assert torch.equal(model.generate(**inputs, **options, assistant_model=other).sequences, expected.sequences)
    passes = []
    hook = model.register_forward_pre_hook(lambda *args: passes.append(1))
    found = model.generate(**inputs, **options, assistant_model=itself).sequences
    hook.remove()
    assert torch.equal(found, expected.sequences) and len(passes) <= 2


def test_a_draft_that_reads_media_needs_them(model):
    """Features are those of the model that checks."""
    inputs = batch_of([random_turns(seed=2, num_turns=1)])
    features = {"image": model.get_image_features(inputs.pop("pixel_values"))}
    with pytest.raises(ValueError, match="mm_encoder_outputs are of this model, and a draft reads media itself"):
        model.generate(**inputs, **options_of("text", []), mm_encoder_outputs=features, assistant_model=model)

"""Media that are written: nothing sees what it is to predict, what is written step by step is what training computes,
and a row in a batch is the row alone.
"""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from model import MediaChunk, RecurrentCache
from model.depth import keyed_generator
from model.generation_media import MediaGenerateOutput
from model.modeling_megatransformer import take_media
from model.output_heads import embed_latents, perturb
from model.recurrence import default_state
from tests.test_cache import visible_entry
from tests.tiny_writing import (
    ASSISTANT,
    AUDIO_END,
    AUDIO_START,
    BEGIN,
    END,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    NULL,
    NUM_PATCHES,
    USER,
    WRITTEN_AUDIO,
    WRITTEN_IMAGE,
    tiny_writer,
    writing_batch,
)

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STEPS = 3


@pytest.fixture
def model():
    return tiny_writer(scale=1.5)


class Script(LogitsProcessor):
    """Makes rows write given tokens, by their number in the batch and how many places are there already."""

    def __init__(self, prompt_length: int, *scripts: dict[int, int]):
        self.prompt_length, self.scripts = prompt_length, scripts

    def __call__(self, input_ids, scores):
        for row, script in enumerate(self.scripts):
            token = script.get(input_ids.shape[1] - self.prompt_length)
            if token is not None:
                scores[row] = -torch.inf
                scores[row, token] = 0
        return scores


# --------------------------------------------------------------------------------------------------------- 5: no leaks


@pytest.mark.parametrize("name", ["image", "audio"])
def test_no_loss_sees_its_target_or_what_follows(model, name):
    """The prediction of latent i changes with latent j, as it is read, for j < i and for no other."""
    batch = writing_batch()
    embedded = model.model.embed(batch["input_ids"], take_media(dict(batch)))
    embeds, latents = embedded.embeds.detach(), embedded.targets.latents
    found = latents[name]
    found.latents = found.latents.clone().requires_grad_()
    hidden = model.model(
        inputs_embeds=embed_latents(embeds, model.model.writers, latents, None, run_all=False),
        attention_mask=batch["attention_mask"],
        num_steps=STEPS,
    ).last_hidden_state
    writer = model.model.writers[name]
    conditions = writer.condition(hidden[found.rows, found.columns - 1], found.places)
    for number in range(len(conditions)):
        (gradient,) = torch.autograd.grad(conditions[number].sum(), found.latents, retain_graph=True)
        sees = gradient.abs().amax(dim=1) > 0
        before = (found.rows == found.rows[number]) & (found.columns < found.columns[number])
        assert sees.tolist() == before.tolist()


def test_no_token_sees_latents_that_follow(model):
    """The logits of row 0 up to its image are those of a row without it; behind it they are not."""
    batch = writing_batch()
    del batch["labels"]
    start = batch["input_ids"][0].tolist().index(WRITTEN_IMAGE)
    with torch.no_grad():
        logits = model(**batch, num_steps=STEPS).logits[0]
        other = model(**{**batch, "image_targets": batch["image_targets"].flip(2)}, num_steps=STEPS).logits[0]
    torch.testing.assert_close(logits[:start], other[:start], atol=0, rtol=0)
    assert (logits[start:] - other[start:]).abs().amax(dim=-1).min() > 1e-4


def test_the_loss_is_its_formula(model):
    """By hand, from the hidden states before each latent, with draws from the same keys; and that of the tokens."""
    batch = writing_batch()
    seeds = torch.tensor([3, 4, 5])
    with torch.no_grad():
        outputs = model(**batch, num_steps=STEPS, flow_seeds=seeds)
        hidden = model.model(
            **{key: it for key, it in batch.items() if key != "labels"}, num_steps=STEPS
        ).last_hidden_state
        logits = model.lm_head(hidden)
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    image = model.model.writers["image"]
    patches = (
        batch["image_targets"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, NUM_PATCHES, -1)
    )
    losses = []
    for row in (0, 1):
        generator = keyed_generator("flow", "image", int(seeds[row]))
        noise, times = (
            torch.randn(NUM_PATCHES, 1, 48, generator=generator)[:, 0],
            torch.randn(NUM_PATCHES, 1, generator=generator).sigmoid(),
        )
        start = batch["input_ids"][row].tolist().index(WRITTEN_IMAGE)
        condition = image.head.condition(hidden[row, start - 1 : start - 1 + NUM_PATCHES], torch.arange(NUM_PATCHES))
        clean = 2 * patches[row]
        velocity = image.head(noise * (1 - times) + clean * times, times[:, 0], condition)
        losses.append((velocity - (clean - noise)).square().mean(-1))
    images, rows = outputs.target_losses["image"]
    assert rows.tolist() == [0] * NUM_PATCHES + [1] * NUM_PATCHES
    torch.testing.assert_close(images, torch.cat(losses), **CLOSE)
    audio, _ = outputs.target_losses["audio"]
    torch.testing.assert_close(outputs.loss, expected + images.mean() + audio.mean(), **CLOSE)


def test_weights_and_counts_of_the_trainer_scale_the_loss(model):
    """Of images at weight 3, divided by 16 in place of 8."""
    batch = writing_batch()
    with torch.no_grad():
        plain = model(**batch, num_steps=STEPS)
        model.model.writers["image"].config.loss_weight = 3.0
        scaled = model(**batch, num_steps=STEPS, num_targets_in_batch={"image": 16})
    image = plain.target_losses["image"][0].sum()
    torch.testing.assert_close(scaled.loss - plain.loss, image * 3 / 16 - image / 8, **CLOSE)


def test_latents_that_are_read_back_are_noisy_in_training_alone(model):
    batch = writing_batch()
    inputs = {key: it for key, it in batch.items() if key != "labels"}
    clean = model.model.embed(inputs["input_ids"], take_media(dict(inputs))).targets.latents["image"]
    noisy = perturb(model.model.writers["image"], clean, torch.tensor([1, 2, 3]))
    spread = (noisy - clean.latents).std(dim=1)
    assert spread.min() > 0 and spread.max() < 0.45
    first = model.model(**inputs, flow_seeds=torch.tensor([1, 2, 3])).last_hidden_state
    assert torch.equal(first, model.model(**inputs, flow_seeds=torch.tensor([4, 5, 6])).last_hidden_state)
    model.train()
    first = model.model(**inputs, flow_seeds=torch.tensor([1, 2, 3]), num_steps=2).last_hidden_state
    other = model.model(**inputs, flow_seeds=torch.tensor([4, 2, 3]), num_steps=2).last_hidden_state
    assert not torch.equal(first[0], other[0]) and torch.equal(first[1:], other[1:])


def test_every_weight_gets_a_gradient_whatever_the_batch_holds(model):
    """Zero without media, but there: ranks wait for each other's."""
    model.train()
    model(**writing_batch(), num_steps=2).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.writers.parameters())
    model.zero_grad()
    ids = torch.tensor([[BEGIN, USER, 26, ASSISTANT, 27, END]])
    model(input_ids=ids, labels=ids, num_steps=2).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.model.writers.parameters())


# ---------------------------------------------------------------------------------------------- step by step = training


def prompts(*rows: list[int]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


TEXT_PROMPT = [BEGIN, USER, 23, 24, 25, ASSISTANT]
IMAGE_PROMPT = [BEGIN, USER, IMAGE_START, *[IMAGE] * 4, IMAGE_END, 21, ASSISTANT]
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def targets_of(outputs, model) -> dict[str, torch.Tensor]:
    """What was written, as targets: the inverse of the codecs' patches, in other words."""
    targets = {}
    if outputs.latents.get("image"):
        grids = torch.stack(outputs.latents["image"]).view(-1, 2, 2, 3, 4, 4) / 2
        targets["image_targets"] = grids.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 8, 8)
    if outputs.latents.get("audio"):
        clips = [it.view(len(it), 8, 2).permute(1, 0, 2).reshape(8, -1) for it in outputs.latents["audio"]]
        longest = max(clip.shape[1] for clip in clips)
        targets["audio_targets"] = torch.stack(
            [torch.nn.functional.pad(it, (0, longest - it.shape[1])) for it in clips]
        )
        mask = torch.tensor([[frame < clip.shape[1] for frame in range(longest)] for clip in clips])
        targets["audio_targets_mask"] = mask.long()
    return targets


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["no guidance", "guidance"])
@pytest.mark.parametrize("name", ["image", "audio"])
def test_step_by_step_is_one_pass(model, name, scale):
    """The latents that `generate` wrote one by one are those that the hidden states of one pass over all of them make
    of the same noise.
    """
    inputs = prompts(IMAGE_PROMPT)
    outputs = model.generate(
        **inputs, pixel_values=PIXELS, generation_mode=name, guidance_scale=scale, flow_seeds=[7], num_steps=STEPS
    )
    latents = outputs.latents[name][0]
    writer = model.model.writers[name]
    bare = torch.where(inputs["input_ids"] == 21, NULL, inputs["input_ids"])
    hidden = []
    for prompt in (inputs["input_ids"], bare):
        ids = torch.cat((prompt, outputs.sequences[:, prompt.shape[1] :]), dim=1)
        with torch.no_grad():
            media = {"pixel_values": PIXELS, **targets_of(outputs, model)}
            passed = model.model(input_ids=ids, num_steps=STEPS, **media)
            found = model.model.embed(ids, take_media(media)).targets.latents[name]
        hidden.append(passed.last_hidden_state[found.rows, found.columns - 1])
    places = torch.arange(len(latents))
    noise = torch.randn(writer.num_places, latents.shape[1], generator=keyed_generator("sample", name, 7, 0))
    with torch.no_grad():
        expected = writer.head.sample(
            writer.condition(hidden[0], places),
            noise[: len(latents)],
            num_steps=3,
            away=[(torch.full((len(latents),), scale - 1), writer.condition(hidden[1], places))],
        )
    torch.testing.assert_close(latents, writer.codec.project(expected), **CLOSE)


def sound_goes_on(model) -> None:
    """Until there are as many latents as a sound may have: its end is as likely as a further one."""
    model.lm_head.weight.data[AUDIO_END] = model.lm_head.weight.data[WRITTEN_AUDIO]


def after_chunks(model, chunks: list[tuple[torch.Tensor, int]], policy: str, kept: int | None) -> torch.Tensor:
    """Hidden states after the last place of each chunk, (chunks, hidden), by a decoder that keeps what every place has
    left at every step and applies the read rule. For one layer each in prelude, core and coda, and no positions.

    Args:
        chunks: (1, places, hidden) and core steps, each.
    """
    body, hidden = model.model, []
    state, left = default_state(model.text_config), {"prelude": [], "core": [], "coda": []}
    for embeds, depth in chunks:
        e, own = layer_by_hand(body.prelude.layers[0], embeds, left["prelude"])
        left["prelude"] += own
        s, steps = state.expand_as(e), []
        for step in range(depth):
            visible = [visible_entry(entries, step, policy, kept) for entries in left["core"]]
            s, own = layer_by_hand(body.core.layers[0], body.core.injection(s, e), visible)
            steps.append(own)
        left["core"] += zip(*steps, strict=True)
        h, own = layer_by_hand(body.coda.layers[0], body.norm(s), left["coda"])
        left["coda"] += own
        hidden.append(body.norm(h)[:, -1])
    return torch.cat(hidden)


def layer_by_hand(layer, x: torch.Tensor, past: list) -> tuple[torch.Tensor, list]:
    """A layer on a chunk, place by place; and the key and value that each has left."""
    query, keys, values = layer.attention._project(layer.attention_norm_in(x))
    own, mixed = list(zip(keys.split(1, 2), values.split(1, 2), strict=True)), []
    for number, q in enumerate(query.split(1, 2)):
        k, v = (torch.cat(part, 2) for part in zip(*past, *own[: number + 1], strict=True))
        mixed.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    x = layer.attention_norm_out(x + layer.attention.o_proj(torch.cat(mixed, 2).transpose(1, 2).flatten(2)))
    return layer.mlp_norm_out(x + layer.mlp(layer.mlp_norm_in(x))), own


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["no guidance", "guidance"])
@pytest.mark.parametrize(("policy", "kept"), [("full", None), ("ring", 2), ("ring", 3), ("last", None)])
def test_each_policy_writes_by_its_read_rule(policy, kept, scale):
    """An image and then a sound, at depths of their own, against a decoder that applies the rule."""
    model = tiny_writer(scale=1.5, position_embedding="none", num_key_value_heads=4)
    sound_goes_on(model)
    inputs, start, depths = prompts(IMAGE_PROMPT), len(IMAGE_PROMPT), {"text": 2, "image": 5, "audio": 4}
    script = Script(start, {0: IMAGE_START, NUM_PATCHES + 2: AUDIO_START})
    with torch.no_grad():
        outputs = model.generate(
            **inputs,
            pixel_values=PIXELS,
            generation_mode="any",
            guidance_scale=scale,
            flow_seeds=[7],
            num_steps=depths,
            max_new_tokens=NUM_PATCHES + 2 + 8,
            logits_processor=LogitsProcessorList([script]),
            cache_policy=policy,
            num_kept_steps=kept,
        )
        new, names = outputs.sequences[0, start:], dict.fromkeys((WRITTEN_IMAGE, IMAGE_END), "image")
        names |= dict.fromkeys((WRITTEN_AUDIO, AUDIO_END), "audio")
        steps = [depths[names.get(token, "text")] for token in new.tolist()]  # of the place before each
        embeds, writers = model.model.embed_tokens(new), model.model.writers
        for name, token in (("image", WRITTEN_IMAGE), ("audio", WRITTEN_AUDIO)):
            embeds[new == token] = writers[name].embed(outputs.latents[name][0])
        bare = torch.where(inputs["input_ids"] == 21, NULL, inputs["input_ids"])
        guided, free = (
            after_chunks(
                model,
                [(model.model.embed(prompt, take_media({"pixel_values": PIXELS})).embeds, steps[0])]
                + [(embed[None, None], depth) for embed, depth in zip(embeds, steps[1:], strict=False)],
                policy,
                kept,
            )
            for prompt in (inputs["input_ids"], bare)
        )
        for number, (name, token) in enumerate((("image", WRITTEN_IMAGE), ("audio", WRITTEN_AUDIO))):
            writer, places = writers[name], torch.arange(len(outputs.latents[name][0]))
            shape = writer.num_places, writer.codec.latent_size
            noise = torch.randn(shape, generator=keyed_generator("sample", name, 7, number))[: len(places)]
            expected = writer.head.sample(
                writer.condition(guided[new == token], places),
                noise,
                num_steps=3,
                away=[(torch.full((len(places),), scale - 1), writer.condition(free[new == token], places))],
            )
            assert len(places) == writer.num_places
            torch.testing.assert_close(outputs.latents[name][0], writer.codec.project(expected), **CLOSE)


@pytest.mark.parametrize(
    "policy", [{}, {"cache_policy": "ring", "num_kept_steps": 2}, {"cache_policy": "last"}], ids=str
)
def test_rows_of_a_batch_are_the_rows_alone(model, policy):
    """Free interleaving: an image, text, a sound; text, then a sound; an image at once. Depths by modality."""
    rows = [TEXT_PROMPT, IMAGE_PROMPT, [*TEXT_PROMPT[:3], ASSISTANT]]
    scripts = [
        {0: IMAGE_START, 6: 20, 7: AUDIO_START},
        {0: 21, 1: 22, 2: AUDIO_START},
        {0: IMAGE_START, 6: END},
    ]
    options = {
        "generation_mode": "any",
        "max_new_tokens": 24,
        "num_steps": {"text": 2, "image": 4, "audio": 3},
        "guidance_scale": 1.5,
        "do_sample": False,
        **policy,
    }
    inputs = prompts(*rows)
    together = model.generate(
        **inputs,
        pixel_values=PIXELS,
        flow_seeds=[1, 2, 3],
        logits_processor=LogitsProcessorList([Script(inputs["input_ids"].shape[1], *scripts)]),
        **options,
    )
    images, audio = iter(together.images), iter(together.audio)
    latents = {name: iter(parts) for name, parts in together.latents.items()}
    for number, (row, script) in enumerate(zip(rows, scripts, strict=True)):
        alone = model.generate(
            **prompts(row),
            **({"pixel_values": PIXELS} if IMAGE in row else {}),
            flow_seeds=[number + 1],
            logits_processor=LogitsProcessorList([Script(len(row), script)]),
            **options,
        )
        written = together.sequences[number, inputs["input_ids"].shape[1] :].tolist()
        expected = alone.sequences[0, len(row) :].tolist()
        assert written[: len(expected)] == expected
        assert [kind for kind, _ in alone.segments[0]] == [kind for kind, _ in together.segments[number]]
        assert [it for kind, it in alone.segments[0] if kind == "text"] == [
            it for kind, it in together.segments[number] if kind == "text"
        ]
        for name, parts in alone.latents.items():
            for part in parts:
                torch.testing.assert_close(part, next(latents[name]), **CLOSE)
        for image in alone.images:
            assert abs(torch.tensor(list(image.tobytes())) - torch.tensor(list(next(images).tobytes()))).max() <= 1
        for clip in alone.audio:
            assert clip.shape == next(audio).shape
        steps = together.exit_steps[number, : len(expected)].tolist()
        of_places = {WRITTEN_IMAGE: 4, IMAGE_END: 4, WRITTEN_AUDIO: 3, AUDIO_END: 3}
        assert steps == [of_places.get(token, 2) for token in expected]


def test_what_was_written_is_read_from_the_cache(model):
    """The text behind an image depends on the image, and equals that of a pass over prompt, image and text."""
    inputs = prompts(TEXT_PROMPT)
    script = Script(len(TEXT_PROMPT), {0: IMAGE_START})
    outputs = model.generate(
        **inputs,
        generation_mode="any",
        guidance_scale=1,
        max_new_tokens=12,
        flow_seeds=[1],
        num_steps=STEPS,
        logits_processor=LogitsProcessorList([script]),
    )
    with torch.no_grad():
        passed = model(input_ids=outputs.sequences[:, :-1], num_steps=STEPS, **targets_of(outputs, model))
    start = len(TEXT_PROMPT) + NUM_PATCHES + 2
    forbidden = [WRITTEN_IMAGE, WRITTEN_AUDIO, IMAGE, 10, IMAGE_END, AUDIO_END, NULL, AUDIO_START, IMAGE_START]
    logits = passed.logits[0, start - 1 :].clone()
    logits[:, forbidden] = -torch.inf
    assert logits.argmax(-1).tolist()[:1] == outputs.sequences[0, start : start + 1].tolist()


def chunks_of(model, rows: int = 1, **options) -> tuple[list[MediaChunk], MediaGenerateOutput]:
    """What a caller sees while media are written, and what comes out in the end."""
    chunks, inputs = [], prompts(*[TEXT_PROMPT] * rows)
    seeds = list(range(rows))
    outputs = model.generate(**inputs, guidance_scale=1, flow_seeds=seeds, on_chunk=chunks.append, **options)
    return chunks, outputs


def test_chunks_show_images_patch_by_patch(model):
    """Two rows, after each second patch; what is not there yet is gray."""
    chunks, outputs = chunks_of(model, rows=2, generation_mode="image", chunk_size=2)
    assert [(it.row, it.modality, it.is_complete) for it in chunks] == [
        (row, "image", is_complete) for is_complete in (False, False, True) for row in (0, 1)
    ]
    for number, chunk in enumerate(chunks):
        whole = np.asarray(outputs.images[chunk.row])
        there = 4 if number < 2 else 8  # rows of pixels: a half, all
        assert (np.asarray(chunk.item)[:there] == whole[:there]).all()
        assert (np.asarray(chunk.item)[there:] == 128).all()


def test_chunks_let_sound_be_heard_as_it_grows(model):
    """Each is what its latents alone would be; the last is the sound."""
    sound_goes_on(model)
    chunks, outputs = chunks_of(model, generation_mode="audio", chunk_size=3)
    codec, latents = model.model.writers["audio"].codec, outputs.latents["audio"][0]
    assert len(latents) == 6 and [chunk.is_complete for chunk in chunks] == [False, False, True]
    for chunk, count in zip(chunks, (3, 6, 6), strict=True):
        torch.testing.assert_close(chunk.item, codec.decode(latents[:count]), **CLOSE)
    assert len(chunks[0].item) < len(chunks[1].item)
    assert torch.equal(chunks[-1].item, outputs.audio[0])


def test_without_a_size_chunks_come_every_16_latents(model):
    chunks, outputs = chunks_of(model, generation_mode="image")
    assert [chunk.is_complete for chunk in chunks] == [True]
    assert chunks[0].item.tobytes() == outputs.images[0].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_mode": "video"}, "generation_mode 'video' is unknown"),
        ({"generation_mode": "image", "guidance_scale": -1.0}, "guidance_scale is -1.0; give a number of at least 0"),
        ({"generation_mode": "image", "num_flow_steps": 0}, "num_flow_steps is 0; give a whole number of at least 1"),
        ({"generation_mode": "image", "flow_temperature": -0.5}, "flow_temperature is -0.5"),
        ({"generation_mode": "any", "num_steps": {"video": 3}}, "num_steps names 'video'"),
        ({"generation_mode": "image", "flow_seeds": [1, 2]}, "flow_seeds has 2 seeds for 1 rows"),
        (
            {"generation_mode": "image", "num_flow_steps": 2.5},
            "num_flow_steps is 2.5; give a whole number of",
        ),
        ({"generation_mode": "image", "guidance_scale": float("inf")}, "guidance_scale is inf; give a number of"),
        ({"generation_mode": "image", "guidance_scale": float("nan")}, "guidance_scale is nan; give a number of"),
        ({"generation_mode": "image", "on_chunk": print, "chunk_size": 0}, "chunk_size is 0; give a whole number of"),
        ({"generation_mode": "image", "chunk_size": 2}, "chunk_size has no effect without on_chunk"),
        ({"generation_mode": "text", "num_flow_steps": 4}, "num_flow_steps has no effect"),
        ({"generation_mode": "text", "on_chunk": print}, "on_chunk has no effect"),
    ],
)
def test_options_out_of_range_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(TEXT_PROMPT), **options)


def test_media_are_completed_within_the_room_there_is(model):
    """Sound ends early; an image cannot."""
    outputs = model.generate(**prompts(TEXT_PROMPT), generation_mode="audio", guidance_scale=1, max_new_tokens=4)
    assert outputs.sequences[0, len(TEXT_PROMPT) :].tolist() == [AUDIO_START, WRITTEN_AUDIO, WRITTEN_AUDIO, AUDIO_END]
    with pytest.raises(ValueError, match="room for 5 new tokens, but an image takes 6"):
        model.generate(**prompts(TEXT_PROMPT), generation_mode="image", max_new_tokens=5)


def test_a_model_without_a_head_for_it_says_what_it_writes(model):
    del model.model.writers["audio"]
    with pytest.raises(ValueError, match=r"'audio' needs a flow head .* it writes text, image"):
        model.generate(**prompts(TEXT_PROMPT), generation_mode="audio")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["image", "audio"])
def test_latents_that_are_no_numbers_are_refused(model, name, value):
    """Also those that the codec would cut to its range."""
    model.model.writers[name].head.out_proj.bias.data[0] = value
    with pytest.raises(ValueError, match=f"the {name} head gave latents that are NaN or infinite; is the checkpoint"):
        model.generate(**prompts(TEXT_PROMPT), generation_mode=name, guidance_scale=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("image_targets"), "there are 8 places for a written image, but no image_targets"),
        (lambda batch: batch.update(image_targets=batch["image_targets"][:1]), "a written image"),
        (lambda batch: batch.update(image_targets=torch.zeros(2, 3, 12, 12)), r"expected \(images, 3, 8, 8\)"),
        (lambda batch: batch["image_targets"].fill_(torch.nan), "NaN or infinite"),
        (lambda batch: batch.update(audio_targets=torch.zeros(1, 8, 5)), "a multiple of 2 frames"),
    ],
    ids=["missing", "fewer", "size", "nan", "frames"],
)
def test_targets_that_do_not_fit_are_refused(model, change, message):
    batch = writing_batch()
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


# --------------------------------------------------------------------------------------------------------------- exits


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_place_that_exits_is_the_place_with_that_many_steps(model, temperature):
    """Of each medium's places the velocities at every depth, by a pass of its own; the first that changed less than the
    threshold is where it has stopped. Depths differ from place to place, so the cache holds them all.
    """
    inputs = prompts(TEXT_PROMPT)
    options = {"generation_mode": "image", "guidance_scale": 1, "flow_seeds": [3], "num_steps": 8}
    options["flow_temperature"] = temperature
    exits = {"exit_criterion": "kl_divergence", "velocity_threshold": 0.15}
    outputs = model.generate(**inputs, **options, **exits)
    steps = outputs.exit_steps[0].tolist()
    assert len(set(steps[1:-1])) > 1 and max(steps[1:-1]) <= 8
    writer = model.model.writers["image"]
    noise = torch.randn(writer.num_places, 48, generator=keyed_generator("sample", "image", 3, 0)) * temperature**0.5
    cache = RecurrentCache(model.text_config)
    ids = outputs.sequences[:, :-1]
    embeds = model.model.embed_tokens(ids).detach()
    embeds[0, len(TEXT_PROMPT) + 1 :] = writer.embed(outputs.latents["image"][0])
    with torch.no_grad():
        model.model(inputs_embeds=embeds[:, : len(TEXT_PROMPT)], cache=cache, num_steps=8, use_cache=True)
        for place in range(NUM_PATCHES):
            position, velocities = len(TEXT_PROMPT) + place, []
            for depth in range(1, 9):
                copy = deepcopy(cache)
                part = embeds[:, position : position + 1]
                hidden = model.model(inputs_embeds=part, cache=copy, num_steps=depth, use_cache=True)
                condition = writer.condition(hidden.last_hidden_state[:, -1], torch.tensor([place]))
                velocities.append(writer.head.velocity(noise[place : place + 1], torch.zeros(1), condition))
                if depth == steps[place + 1]:
                    kept = copy
            changes = [((now - then).norm() / now.norm()).item() for then, now in pairwise(velocities)]
            first = next((number for number, change in enumerate(changes, start=2) if change < 0.15), 8)
            assert first == steps[place + 1]
            cache = kept


# ------------------------------------------------------------------------------------------------------ what is opened


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("name", "start"), [("image", IMAGE_START), ("audio", AUDIO_START)])
@pytest.mark.parametrize("is_any", [False, True])
def test_an_item_that_the_prompt_opens_is_the_item_that_is_opened_at_once(model, is_any, name, start, scale):
    """A row of a batch whose prompt ends with the start token, and the row that is made to begin with it."""
    sound_goes_on(model)
    mode = "any" if is_any else name
    options = {"generation_mode": mode, "guidance_scale": scale, "num_steps": STEPS}
    options |= {"max_new_tokens": 10} if mode == "any" else {}
    inputs = prompts([*TEXT_PROMPT, start], IMAGE_PROMPT)
    script = Script(inputs["input_ids"].shape[1], {}, {0: start})
    processors = {"logits_processor": LogitsProcessorList([script])} if mode == "any" else {}
    opened = model.generate(**inputs, pixel_values=PIXELS, flow_seeds=[7, 8], **options, **processors)
    script = Script(len(TEXT_PROMPT), {0: start})
    processors = {"logits_processor": LogitsProcessorList([script])} if mode == "any" else {}
    plain = model.generate(**prompts(TEXT_PROMPT), flow_seeds=[7], **options, **processors)
    torch.testing.assert_close(opened.latents[name][0], plain.latents[name][0], **CLOSE)
    assert len(opened.latents[name]) >= 2
    ids = opened.sequences[0][inputs["attention_mask"][0].argmax() :].tolist()
    length = len(TEXT_PROMPT) + 1 + len(plain.latents[name][0]) + 1
    assert ids[:length] == plain.sequences[0, :length].tolist()


@pytest.mark.parametrize(("mode", "row"), [("text", [IMAGE_START]), ("image", [AUDIO_START]), ("audio", [IMAGE_START])])
def test_an_item_that_is_opened_for_another_mode_is_refused(model, mode, row):
    name = "audio" if row == [AUDIO_START] else "image"
    with pytest.raises(ValueError, match=f"prompt 1 ends within an {name}, which generation_mode '{mode}' cannot"):
        model.generate(**prompts(TEXT_PROMPT, [*TEXT_PROMPT, *row]), generation_mode=mode, max_new_tokens=8)


@pytest.mark.parametrize(("name", "is_any", "scale"), [("image", False, 2.5), ("audio", True, 1.0)])
def test_an_item_that_the_prompt_has_begun_is_completed(model, name, is_any, scale):
    """From its first two latents, generated with the same seed, in several sequences of a row of a batch."""
    sound_goes_on(model)
    options = {"guidance_scale": scale, "num_steps": STEPS, "do_sample": True}
    plain = model.generate(**prompts(TEXT_PROMPT), generation_mode=name, flow_seeds=[7], **options)
    latents, length = plain.latents[name][0], len(TEXT_PROMPT)
    begun = plain.sequences[0, : length + 3].tolist()
    if name == "image":  # whole, though the prompt ends within it
        targets = {"image_targets": torch.nn.functional.fold(latents.T[None] / 2, 8, 4, stride=4)}
    else:
        targets = {"audio_targets": model.model.writers["audio"].codec.log_mel(latents[:2])[None]}
    options |= {"flow_seeds": [8, 8, 7, 7], "num_return_sequences": 2, "generation_mode": "any" if is_any else name}
    options |= {"max_new_tokens": len(latents) + 1, "top_k": 1} if is_any else {}
    found = model.generate(**prompts(IMAGE_PROMPT, begun), pixel_values=PIXELS, **targets, **options)
    expected = plain.sequences[0, length + 3 :].tolist()
    start = found.sequences.shape[1] - found.exit_steps.shape[1]
    for row in (2, 3):
        number = next(number for kind, number in found.segments[row] if kind == name)
        torch.testing.assert_close(found.latents[name][number], latents, **CLOSE)
        assert found.sequences[row, start:][: len(expected)].tolist() == expected


@pytest.mark.parametrize("begun", [[AUDIO_START, WRITTEN_AUDIO], [WRITTEN_AUDIO]])
def test_an_item_that_is_begun_without_its_latents_is_refused(model, begun):
    targets = {"audio_targets": torch.zeros(1, 8, 2)} if begun[0] == WRITTEN_AUDIO else {}
    with pytest.raises(ValueError, match="prompt 0 ends within an audio, of which audio_targets or the start token is"):
        model.generate(**prompts([*TEXT_PROMPT, *begun]), **targets, generation_mode="audio")


@pytest.mark.parametrize(("most", "places"), [(None, 6), (5, 3)])
def test_linear_guidance_is_whole_at_the_last_place_there_is_room_for(model, monkeypatch, most, places):
    sound_goes_on(model)
    writer, found = model.model.writers["audio"], []
    writer.config.guidance_schedule = "linear"
    sample = writer.head.sample
    monkeypatch.setattr(writer.head, "sample", lambda *args: (found.append(1 + args[4][0][0].item()), sample(*args))[1])
    options = {} if most is None else {"max_new_tokens": most}
    outputs = model.generate(**prompts(TEXT_PROMPT), generation_mode="audio", guidance_scale=3.0, **options)
    assert len(outputs.latents["audio"][0]) == places
    assert found == pytest.approx([1 + 2 * place / (places - 1) for place in range(places)])

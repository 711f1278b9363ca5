"""What is always true of the model that reads images and sound: padding, caches, backends, exits, saving, half
precision; of rows that need padding, for positions that rotate and positions that bias.
"""

import pytest
import torch
from transformers import AutoModel, AutoModelForMultimodalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from model import ExitOptions, RecurrentCache
from tests.tiny import PAD
from tests.tiny_media import AUDIO, IMAGE, row_of, tiny_inputs, tiny_media_model
from tests.tiny_processor import picture, sound, tiny_processor
from tests.tiny_reader import tiny_reader

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STEPS, NEW = 3, 4
LENGTH = 21
"""Of the rows of `padded_inputs`, of which 16 are real."""


@pytest.fixture(params=["rope", "alibi"])
def position(request) -> str:
    return request.param


@pytest.fixture
def model(position):
    model = tiny_media_model(scale=2.0, position_embedding=position)
    model.generation_config.eos_token_id = None  # full length, for comparison
    return model


@torch.no_grad()
def logits_of(model, **inputs) -> torch.Tensor:
    return model(**{"num_steps": STEPS, "use_cache": False, **inputs}).logits


def padded_inputs(*left: int) -> dict[str, torch.Tensor]:
    """`tiny_inputs` with so many tokens of padding in front of each row, and the rest of five behind it."""
    inputs = tiny_inputs()
    ids = torch.full((3, LENGTH), PAD)
    for row, count in enumerate(left):
        ids[row, count : count + 16] = inputs["input_ids"][row]
    return {**inputs, "input_ids": ids, "attention_mask": (ids != PAD).long()}


def rows_alone(model, **options) -> list[torch.Tensor]:
    """The logits of each row by itself, its media without padding."""
    return [logits_of(model, **row_of(tiny_inputs(), row), **options)[0] for row in range(3)]


# ------------------------------------------------------------------------------------------------- 1: padding, caches


@pytest.mark.parametrize("left", [(5, 5, 5), (0, 0, 0), (0, 3, 5), (5, 0, 2)], ids=str)
def test_a_padded_row_in_a_batch_is_the_row_alone(model, left):
    """Left, right, and each row in its own place; the media of the batch are padded too."""
    together = logits_of(model, **padded_inputs(*left))
    for logits, alone, count in zip(together, rows_alone(model), left, strict=True):
        torch.testing.assert_close(logits[count : count + 16], alone, **CLOSE)


def features_between(model, inputs: dict, start: int, stop: int) -> dict[str, BaseModelOutputWithPooling]:
    """Features whose placeholders stand in these columns, token by token."""
    ids, found = inputs["input_ids"], {}
    media = {
        IMAGE: model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]),
        AUDIO: model.model.get_audio_features(inputs["input_features"]),
    }
    for (token, output), name in zip(media.items(), ("image", "audio"), strict=True):
        rest = iter(torch.cat(output.pooler_output))
        of_place = {place: next(rest) for place in map(tuple, (ids == token).nonzero().tolist())}
        chosen = tuple(feature[None] for (_, column), feature in of_place.items() if start <= column < stop)
        found[name] = BaseModelOutputWithPooling(pooler_output=chosen)
    return found


@pytest.mark.parametrize("policy", ["full", "ring"])
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [6, 4, 7, 3, 1]], ids=["token by token", "chunks"])
def test_with_a_cache_is_without(model, policy, chunks):
    """Cuts that go through images and sound, of rows with padding in front; a ring of as many steps as are taken."""
    inputs, start, parts = padded_inputs(5, 0, 3), 0, []
    del inputs["attention_mask"]
    mask = (inputs["input_ids"] != PAD).long()
    cache = RecurrentCache(model.text_config, policy, STEPS if policy == "ring" else None)
    for size in chunks:
        stop = start + size
        with torch.no_grad():
            part = {
                "input_ids": inputs["input_ids"][:, start:stop],
                "attention_mask": mask[:, :stop],
                "mm_encoder_outputs": features_between(model, inputs, start, stop),
            }
        parts.append(logits_of(model, **part, cache=cache, use_cache=True))
        start = stop
    together = torch.cat(parts, dim=1)
    for logits, alone, count in zip(together, rows_alone(model), (5, 0, 3), strict=True):
        torch.testing.assert_close(logits[count : count + 16], alone, **CLOSE)


def generated(model, inputs: dict, **options):
    """Tokens of each row, the logits they were taken from, and the steps they took."""
    options = {"max_new_tokens": NEW, "do_sample": False, "num_steps": STEPS, **options}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1), out.exit_steps


@pytest.mark.parametrize("policy", ["full", "ring"])
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=["whole", "static", "chunked"]
)
def test_generating_with_a_cache_is_generating_without(model, policy, options):
    """Rows padded in front: static = dynamic = none, a prompt in chunks = a whole one. Logits, not only tokens."""
    inputs = padded_inputs(5, 5, 5)
    tokens, logits, _ = generated(model, inputs, use_cache=False)
    kept = {"num_kept_steps": STEPS} if policy == "ring" else {}
    found = generated(model, inputs, cache_policy=policy, **kept, **options)
    assert torch.equal(found[0], tokens)
    torch.testing.assert_close(found[1], logits, **CLOSE)


def test_saved_is_loaded(model, tmp_path):
    """Bitwise, with and without the head."""
    model.save_pretrained(tmp_path)
    loaded, base = AutoModelForMultimodalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert (type(loaded), type(base)) == (type(model), type(model.model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    inputs = padded_inputs(0, 3, 5)
    expected = logits_of(model, **inputs)
    assert torch.equal(logits_of(loaded, **inputs), expected)
    with torch.no_grad():
        hidden = base.eval()(**inputs, num_steps=STEPS).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected)


# ------------------------------------------------------------------------------------------------- 2: backends


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_backends_agree_with_eager(position, backend, stem):
    """In the encoders as well. FlexAttention runs as plain tensor operations: its compiled kernel is for GPUs."""
    inputs = padded_inputs(0, 3, 5)
    eager, other = (tiny_media_model(scale=2.0, position_embedding=position, vision={"stem": stem}) for _ in range(2))
    eager.set_attn_implementation("eager")
    other.set_attn_implementation(backend)
    readers = other.model.readers
    assert {readers[name].encoder.config._attn_implementation for name in readers} == {backend}
    with torch.compiler.set_stance("force_eager"):
        pair = [logits_of(one, **inputs)[inputs["attention_mask"].bool()] for one in (eager, other)]
    torch.testing.assert_close(*pair, **CLOSE)


# ------------------------------------------------------------------------------------------------- 4: exits


def test_a_row_that_exits_is_the_row_alone_with_those_steps(model):
    """One pass over the prompts: each row leaves after a number of steps of its own."""
    inputs = padded_inputs(0, 3, 5)
    with torch.no_grad():
        out = model(**inputs, num_steps=8, exits=ExitOptions("latent_difference", 0.4), use_cache=False)
    assert len(out.exit_steps.unique()) > 1
    for row, (steps, left) in enumerate(zip(out.exit_steps.tolist(), (0, 3, 5), strict=True)):
        alone = logits_of(model, **row_of(tiny_inputs(), row), num_steps=steps)[0]
        torch.testing.assert_close(out.logits[row, left : left + 16], alone, **CLOSE)


@pytest.mark.parametrize("policy", ["full", "ring"])
def test_a_row_that_exits_in_generate_is_the_row_alone_with_those_steps(model, policy):
    """The prompts too; alone, with the depths that the row took as a schedule."""
    exits = {"exit_criterion": "latent_difference", "exit_threshold": 0.4, "exit_in_prefill": True}
    options = {"num_steps": 8, "cache_policy": policy, **({"num_kept_steps": 8} if policy == "ring" else {})}
    tokens, logits, steps = generated(model, padded_inputs(5, 5, 5), **exits, **options)
    assert all(len(column.unique()) > 1 for column in (steps[:, 0], steps[:, 1:]))
    for row in range(3):
        schedule = {**exits, "exit_criterion": "schedule", "exit_schedule": steps[row].tolist()}
        alone = generated(model, row_of(tiny_inputs(), row), **schedule, **options)
        assert torch.equal(alone[0][0], tokens[row]) and torch.equal(alone[2][0], steps[row])
        torch.testing.assert_close(alone[1][0], logits[row], **CLOSE)


# ------------------------------------------------------------------------------------------------- half precision


def test_in_bfloat16_with_what_the_processor_gives(position):
    """Pixels and spectrograms are float32. The answers are close to those in float32, and far from those to others."""
    processor, model = tiny_processor(), tiny_reader(scale=1.0, position_embedding=position)
    texts = ["<|image|>a<|audio|>", "<|image|><|image|>b"]

    def inputs(seed):
        images = [picture(16, 16, seed), picture(32, 16, seed + 1), picture(16, 24, seed + 2)]
        return processor(text=texts, images=images, audio=[sound(3000, seed)], padding=True, return_tensors="pt")

    batch = inputs(0)
    assert batch["pixel_values"].dtype == batch["input_features"].dtype == torch.float32
    is_real = batch["attention_mask"].bool()
    exact, others = (logits_of(model, **each)[is_real] for each in (batch, inputs(7)))
    half = logits_of(model.to(torch.bfloat16), **batch)[is_real]
    assert half.dtype == torch.bfloat16
    error = (half.float() - exact).square().mean().sqrt() / exact.std()
    assert error < 0.03 and (others - exact).square().mean().sqrt() / exact.std() > 10 * error
    written = model.generate(**batch, max_new_tokens=NEW, do_sample=False, num_steps=STEPS)
    assert written.shape == (2, is_real.shape[1] + NEW)
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss) and model.model.readers["image"].encoder.stem.proj.weight.grad.any()

"""Inference under autocast, and in half precision, against the same in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model import ExitOptions, NoiseOptions, RecurrentCache
from model.step_lora import add_step_lora
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_writing import ASSISTANT, BEGIN, IMAGE, IMAGE_END, IMAGE_START, USER, tiny_writer, writing_batch

ROWS = torch.tensor([2, 3, 5])
EXITS = {"exit_criterion": "latent_difference", "exit_threshold": 0.3}
POSITIONS = ["rope", "alibi", "learned", "sinusoidal", "none"]
CLOSE = {"atol": 0.03, "rtol": 0.03}  # of logits of about 0.5, in numbers of 8 bits
FORMS = {
    "fixed": {},
    "rows": {"num_steps": ROWS},
    "ring": {"cache": {"policy": "ring", "num_kept_steps": 2}, "num_steps": ROWS},
    "last": {"cache": {"policy": "last"}, "num_steps": ROWS},
    "first": {"cache": {"policy": "first", "num_kept_tokens": 2}, "num_steps": ROWS},
    "residual": {"cache": {"policy": "residual"}, "num_steps": ROWS},
    "static": {"cache": {"max_length": 16, "max_steps": 5}, "num_steps": ROWS},
    "noise": {"state_noise": NoiseOptions(1.0)},
    "warm start": {"initial_state": "last"},
}


def half(model: torch.nn.Module, dtype: torch.dtype, autocast: bool, run: Callable[[], Any]) -> Any:
    """What `run` gives under autocast of a type, or with all weights of it."""
    if not autocast:
        model.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        result = run()
    model.float()
    return result


def logits_in_chunks(model: torch.nn.Module, cache: dict[str, Any], **options: Any) -> torch.Tensor:
    """Logits of three rows, (3, 7, vocab): a padded prompt in two chunks, and a token."""
    ids, mask = tiny_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    cache, end, parts = RecurrentCache(model.config, **cache), 0, []
    for part in ids.split([4, 2, 1], dim=1):
        end += part.shape[1]
        parts.append(model(part, attention_mask=mask[:, :end], cache=cache, **options).logits)
    return torch.cat(parts, dim=1).float()


@pytest.mark.parametrize(
    ("form", "position", "dtype", "autocast"),
    [(form, "rope", torch.bfloat16, True) for form in FORMS]
    + [("rows", position, torch.bfloat16, True) for position in POSITIONS[1:]]
    + [("rows", "rope", torch.float16, True), ("rows", "rope", torch.bfloat16, False)]
    + [("rows", "alibi", torch.float16, False)],
)
def test_half_precision_gives_the_logits_of_float32(form, position, dtype, autocast):
    """Of rows of their own depth, through caches of each policy and of static size."""
    model = tiny_model(position_embedding=position, qk_norm=position == "rope")
    options = {"num_steps": 4, "cache": {}, **FORMS[form]}
    expected = half(model, torch.float32, False, lambda: logits_in_chunks(model, **options))
    ours = half(model, dtype, autocast, lambda: logits_in_chunks(model, **options))
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, :2] = False
    torch.testing.assert_close(ours[real], expected[real], **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{"qk_norm": True}, {"qk_bias": True}, {"position_embedding": "alibi"}])
def test_keys_and_values_of_autocast_have_its_type_in_every_backend(backend, options):
    model = tiny_model(attn_implementation=backend, **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(tiny_ids(3, 5), num_steps=ROWS, use_cache=True)
    assert {layer.dtype for layer in outputs.past_key_values.layers} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits.float(), model(tiny_ids(3, 5), num_steps=ROWS).logits, **CLOSE)


@pytest.mark.parametrize("size", [{}, {"max_length": 16, "max_steps": 5}], ids=["grows", "static"])
@pytest.mark.parametrize("first", [True, False], ids=["under autocast", "without"])
def test_a_cache_goes_on_when_autocast_begins_or_ends(first, size):
    model, ids, parts = tiny_model(), tiny_ids(3, 8), []
    cache = RecurrentCache(model.config, **size)
    for part, autocast in zip(ids.split([4, 3, 1], dim=1), (first, not first, first), strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            parts.append(model(part, num_steps=ROWS, cache=cache).logits.float())
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, num_steps=ROWS).logits, **CLOSE)


@pytest.mark.parametrize("criterion", ["latent_difference", "kl_divergence"])
@pytest.mark.parametrize("position", POSITIONS)
def test_an_exit_under_autocast_equals_the_row_at_that_depth(position, criterion):
    model, ids = tiny_model(scale=2.0, position_embedding=position), tiny_ids(3, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, num_steps=8, exits=ExitOptions(criterion), use_cache=True)
        expected = model(ids, num_steps=outputs.exit_steps)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, **EXITS},
        {"cache_implementation": "static", **EXITS},
        {"prefill_chunk_size": 2, **EXITS, "exit_in_prefill": True},
        {"exit_criterion": "schedule", "exit_schedule": [4, 1, 2]},
        {"guidance_scale": 1.5},
        {"do_sample": True, "num_return_sequences": 2, "num_steps": ROWS},
    ],
)
def test_generate_runs_under_autocast(options):
    """Beams, chunks, exits and guidance, with adapters of single steps."""
    model, ids = tiny_model(scale=4.0), tiny_ids(3, 6)
    options = {"max_new_tokens": 3, "num_steps": 5, "do_sample": False, **options}
    add_step_lora(model, ["layers.0.attention.qkv_proj"], num_steps=2, rank=2, alpha=4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.generate(ids, **options)
    assert 6 < ours.shape[1] <= 9 and torch.equal(ours[:, :6], ids.repeat_interleave(len(ours) // 3, dim=0))


PROMPTS = torch.tensor([[BEGIN, USER, 20, ASSISTANT], [BEGIN, USER, 21, ASSISTANT]])


@pytest.mark.parametrize("mode", ["image", "audio", "any"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_media_with_exits_are_written_in_half_precision(mode, autocast):
    model = tiny_writer(scale=1.5)
    options = {"exit_criterion": "cosine", "exit_threshold": 0.3, "num_steps": {"text": 4, "image": 6, "audio": 5}}
    options |= {"generation_mode": mode, "flow_seeds": [1, 2]} | ({"max_new_tokens": 8} if mode == "any" else {})
    if mode == "audio":  # whose first position is its last here
        options |= {"exit_in_prefill": True, "exit_threshold": 1.0}
    written = half(model, torch.bfloat16, autocast, lambda: model.generate(PROMPTS, **options))
    steps = written.exit_steps[:, mode != "audio" :]
    assert steps.min() < steps.max() <= 6
    for latents in (each for found in written.latents.values() for each in found):
        assert latents.isfinite().all()


def test_images_are_read_and_rows_exit_under_autocast():
    model = tiny_writer()
    batch = {name: value for name, value in writing_batch().items() if name != "labels"}
    with torch.no_grad():
        expected = model(**batch, num_steps=ROWS).logits
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(**batch, num_steps=ROWS, use_cache=True).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real].float(), expected[real], **CLOSE)
    prompt = torch.tensor([[BEGIN, USER, IMAGE_START, *[IMAGE] * 4, IMAGE_END, ASSISTANT]])
    with torch.autocast("cpu", torch.bfloat16):
        new = model.generate(prompt, pixel_values=batch["pixel_values"], max_new_tokens=2, num_steps=6, **EXITS)
    assert new.shape == (1, 11)

"""Which backend each part of a model computes attention with, counted by functions in transformers' registry."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForMultimodalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.hub_encoders import save_tiny_encoders
from tests.tiny import tiny_ids, tiny_model
from tests.tiny_media import tiny_inputs, tiny_media_config, tiny_media_model

PREFIXES = {"model.readers.image.": "vision_config", "model.readers.audio.": "audio_config"}
BOTH_ENCODERS = {"vision_config": "two", "audio_config": "two"}
CALLS: list[tuple[str, torch.nn.Module]] = []


def counting(name: str):
    """The backend sdpa under another name, which notes who calls it."""

    def attend(module, *args, **kwargs):
        CALLS.append((name, module))
        return sdpa_attention_forward(module, *args, **kwargs)

    return attend


@pytest.fixture(autouse=True)
def registered():
    for name in ("one", "two"):
        AttentionInterface.register(name, counting(name))
        AttentionMaskInterface.register(name, sdpa_mask)


@torch.no_grad()
def used(model: PreTrainedModel, **inputs) -> dict[str, set[str]]:
    """The counting backends that the modules of each part call in a forward pass."""
    CALLS.clear()
    model(**(inputs or tiny_inputs()), num_steps=2)
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for backend, module in CALLS:
        part = next((part for prefix, part in PREFIXES.items() if names[module].startswith(prefix)), "text_config")
        found.setdefault(part, set()).add(backend)
    return found


def expected(**backends) -> dict[str, set[str]]:
    return {part: {backend} for part, backend in backends.items()}


def loaded(tmp_path, backends) -> PreTrainedModel:
    tiny_media_model().save_pretrained(tmp_path)
    return AutoModelForMultimodalLM.from_pretrained(tmp_path, attn_implementation=backends).eval()


def from_config(tmp_path, backends) -> PreTrainedModel:
    return AutoModelForMultimodalLM.from_config(tiny_media_config(), attn_implementation=backends).eval()


def set_later(tmp_path, backends) -> PreTrainedModel:
    model = tiny_media_model()
    model.set_attn_implementation(backends)
    return model


@pytest.mark.parametrize("make", [loaded, from_config, set_later])
@pytest.mark.parametrize(
    ("backends", "parts"),
    [
        ("one", {"text_config": "one", "vision_config": "one", "audio_config": "one"}),
        ({"text_config": "one"}, {"text_config": "one"}),
        ({"": "one"}, {"text_config": "one"}),
        ({"": "two", "text_config": "one"}, {"text_config": "one"}),
        ({"vision_config": "two"}, {"vision_config": "two"}),
        ({"text_config": "one", **BOTH_ENCODERS}, {"text_config": "one", **BOTH_ENCODERS}),
        ({"text_config": "eager", "audio_config": "two", "vision_config": "sdpa"}, {"audio_config": "two"}),
    ],
)
def test_each_part_uses_the_backend_that_it_was_given(make, backends, parts, tmp_path):
    assert used(make(tmp_path, backends)) == expected(**parts)


def test_parts_that_are_not_named_stay_as_they_are(monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", warnings.append)
    model = tiny_media_model()
    model.set_attn_implementation({"text_config": "one", "audio_config": "two"})
    model.set_attn_implementation({"vision_config": "two"})
    assert used(model) == expected(text_config="one", **BOTH_ENCODERS)
    model.set_attn_implementation({"audio_config": "one", "": "two"})
    assert used(model) == expected(text_config="two", vision_config="two", audio_config="one")
    model.set_attn_implementation("one")
    assert used(model) == expected(text_config="one", vision_config="one", audio_config="one")
    assert warnings == []


def test_pretrained_encoders_are_parts_too(tmp_path):
    save_tiny_encoders(tmp_path)
    backbones = {"vision": {"backbone": str(tmp_path / "siglip")}, "audio": {"backbone": str(tmp_path / "whisper")}}
    ids = tiny_ids(1, 60, high=60)
    ids[0, :4], ids[0, 5:55] = 61, 62
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 16, 16), "input_features": torch.zeros(1, 8, 100)}
    config = tiny_media_config(**backbones)
    backends = {"text_config": "eager", "vision_config": "one", "audio_config": "two"}
    model = AutoModelForMultimodalLM.from_config(config, attn_implementation=backends).eval()
    assert used(model, **inputs) == expected(vision_config="one", audio_config="two")
    model.set_attn_implementation({"text_config": "two"})
    assert used(model, **inputs) == expected(text_config="two", vision_config="one", audio_config="two")
    model.set_attn_implementation({"vision_config": "two", "audio_config": "eager"})
    assert used(model, **inputs) == expected(text_config="two", vision_config="two")
    model.set_attn_implementation("one")
    assert used(model, **inputs) == expected(text_config="one", vision_config="one", audio_config="one")


def test_what_cannot_be_is_refused():
    model = tiny_media_model()
    with pytest.raises(ValueError, match="names 'visoin_config'; the parts with attention are text_config, vision"):
        model.set_attn_implementation({"visoin_config": "eager"})
    with pytest.raises(ValueError, match=r"'vision_config'; the parts with attention are text_config$"):
        tiny_model().set_attn_implementation({"vision_config": "eager"})
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation({"text_config": "none"})


def test_a_backend_that_would_leave_out_a_term_is_refused_however_it_is_chosen():
    capped = tiny_media_model(attn_logit_softcapping=50.0)
    assert used(capped) == {}  # eager for the text, sdpa for the rest
    with pytest.raises(ValueError, match="attn_logit_softcapping is not possible with sdpa"):
        capped.set_attn_implementation({"text_config": "sdpa"})
    config = tiny_media_config(attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match="attn_logit_softcapping is not possible with sdpa"):
        AutoModelForMultimodalLM.from_config(config, attn_implementation={"text_config": "sdpa"})
    capped.config.text_config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attn_logit_softcapping is not possible with sdpa"):
        capped(**tiny_inputs())
    alibi = tiny_model(position_embedding="alibi")
    alibi.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'alibi' is not possible with flash_attention_2"):
        alibi(tiny_ids(1, 4))
